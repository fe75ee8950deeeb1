"""Uses nanostack as someone who has no clone: python tests/installed.py --wheels FOLDER

Makes an empty environment, installs nanostack from a folder of wheels alone, and there, in an empty folder, prepares text,
trains a preset, grows it, trains it on with two ranks and lets it write. FOLDER holds the wheels of nanostack and of all that
it needs, as `pip wheel --wheel-dir FOLDER --constraint constraints.txt "torch==2.13.0" .` fills it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = (
    "--model.d_model",
    "48",
    "--model.n_head",
    "2",
    "--model.n_kv_head",
    "2",
    "--model.d_ff",
    "128",
    "--model.seq_len",
    "64",
)
SMALL = ("--batch_tokens", "1024", "--micro_batch", "4", "--data.path", "text", "--data.val_tokens", "1024")
LENGTHS = ("--log_interval", "1024", "--eval_interval", "4096", "--save_interval", "4096")


def steps(python: Path) -> dict[str, list[str]]:
    """What is typed, by the name of what must be there afterwards."""
    nanostack = [str(python.with_name("nanostack"))]
    ranks = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "nanostack"]
    first = ("--stages.0.tokens", "8192", "--stages.0.warmup_tokens", "0")
    then = ("--init_from", "base/ckpt-x2.pt", "--out", "grown", *MODEL, "--model.n_layer", "4", *SMALL, *LENGTHS, *first)
    return {
        "text/manifest.json": [*nanostack, "prepare", "stdlib", "--out", "text", "--tokenizer", "bpe:300"],
        "base/ckpt.pt": [
            *nanostack,
            "train",
            "1b_base",
            "--model.n_layer",
            "2",
            *MODEL,
            *SMALL,
            *LENGTHS,
            *first,
            "--out",
            "base",
        ],
        "base/ckpt-x2.pt": [*nanostack, "grow", "base/ckpt.pt", "--g", "2"],
        "grown/ckpt.pt": [*ranks, "train", "1b_grown", *then],
        "": [*nanostack, "sample", "grown/ckpt.pt", "--data", "text", "--prompt", "def ", "--tokens", "8"],
    }


def use(python: Path, folder: Path, say=lambda line: None) -> None:
    """Do all of it in an empty folder. AssertionError with what was said where something fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"CUDA_VISIBLE_DEVICES": ""}
    for made, command in steps(python).items():
        say(" ".join(Path(word).name if word.startswith("/") else word for word in command))
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (folder / made).exists(), made
    assert done.stdout.startswith("def "), done.stdout
    where = "import nanostack, sys; print(nanostack.__file__); import nanostack.kernels; assert 'kernels' not in sys.modules"
    done = subprocess.run([python, "-c", where], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and Path(done.stdout).is_relative_to(python.parent.parent), done.stdout + done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    wheels = parser.parse_args().wheels.resolve()
    with tempfile.TemporaryDirectory() as place:
        environment, folder = Path(place) / "environment", Path(place) / "empty"
        folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin/python"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", wheels, "nanostack"], check=True
        )
        use(python, folder, lambda line: print(line, flush=True))
        print("nanostack works from its wheel alone")
