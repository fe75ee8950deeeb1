"""Commands of README.md and docs/, as they stand there, run at toy size on the CPU."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import zstandard
from conftest import ROOT, python, ranks

NEEDS = re.compile(r" # needs (a GPU|GPUs|a network|Slurm)")
SMALL = (
    "--model.d_model 32 --model.n_head 2 --model.n_kv_head 2 --model.d_ff 48 --model.seq_len 32 --batch_tokens 1024 "
    "--micro_batch 4 --log_interval 1024 --save_interval 4096 --data.val_tokens 512 --dtype float32"
)
STAGE = "--stages.{0}.tokens 4096 --stages.{0}.warmup_tokens 1024"
LAYERS = {"config/1b.py": 2, "config/1b_scratch.py": 8}  # 1b_base keeps its 6: a page tells a list of them
MODULES = ("argparse.py", "ast.py", "bdb.py", "code.py", "copy.py")


def lines_of(page: Path) -> list[str]:
    """All command lines of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def commands(page: Path) -> list[str]:
    """Those that need neither a GPU nor a network nor Slurm."""
    return [line for line in lines_of(page) if not NEEDS.search(line)]


def workshop(folder: Path) -> None:
    """Make `folder` a clone, beside the text that the pages speak of: code, and a few lines where they have a crawl."""
    for name in ("train.py", "grow.py", "config", "nanostack", "kernels", "bench", "study"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "texts").mkdir()
    for name in MODULES:
        (folder / "texts" / name).symlink_to(os.path.join(os.path.dirname(os.__file__), name))
    sources = [path.read_text() for path in sorted((folder / "texts").iterdir())]
    (folder / "notes.txt").write_text(sources[0])
    packed = zstandard.compress("".join(json.dumps({"body": text}) + "\n" for text in sources).encode())
    (folder / "crawl.jsonl.zst").write_bytes(packed)
    for path in ("dump/part-0.parquet", "dump/part-1.parquet", "mirror/sample/10BT/000.parquet"):
        table(folder / path, [{"text": f"{path}\n{text}"} for text in sources])
    sciq = {"question": "What do plants take in?", "distractor1": "oxygen", "distractor2": "neon", "distractor3": "helium"}
    sciq |= {"correct_answer": "carbon dioxide", "support": "Plants take in carbon dioxide and give off oxygen."}
    for split in ("train", "validation", "test"):
        table(folder / f"tasks/allenai/sciq/data/{split}-00000-of-00001.parquet", [sciq] * 2)


def table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


class Shell:
    """Runs command lines of pages in a folder, at toy size.

    Python commands run in forks of a process that has imported torch. With `launches`, the first torchrun starts two processes
    as it does; the ranks of every other one are forks, which get from here what torchrun would tell them.
    """

    def __init__(self, folder: Path, launches: bool = False):
        self.folder, self.launches = folder, launches

    def __call__(self, line: str) -> str:
        words = small(line)
        if words[0] == "torchrun":
            done = self.torchrun(words)
        elif words[0] == "nanostack":
            done = python("-m", *words, cwd=self.folder)
        elif words[0] == "python" and words[1] != "-m":
            done = python(*words[1:], cwd=self.folder)
        else:  # python -m: a fork is no main module that processes of its own could import
            done = subprocess.run([sys.executable, *words[1:]], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def torchrun(self, words: list[str]) -> subprocess.CompletedProcess:
        script, two = words[words.index("train.py") :], "--nproc_per_node" in words
        if two and self.launches:
            self.launches = False
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            return subprocess.run([*launch, *script], cwd=self.folder, capture_output=True, text=True)
        if not two:
            return python(*script, cwd=self.folder)
        return ranks(*script, number=2, cwd=self.folder)


def small(line: str) -> list[str]:
    """The same command at toy size: tiny shapes, few tokens."""
    words = shlex.split(line, comments=True)
    if "train.py" in words:
        config = next(word for word in words if word.startswith("config/"))
        stages = range(2 if config == "config/1b.py" else 1)
        layers = ["--model.n_layer", str(LAYERS[config])] if config in LAYERS else []
        return words + SMALL.split() + layers + " ".join(STAGE.format(i) for i in stages).split()
    if words[:2] == ["nanostack", "fit"]:
        words += ["--model.n_layer", "1"]
    if words[:2] == ["nanostack", "sample"]:
        words += ["--tokens", "8"]
    if words[:2] == ["nanostack", "prepare"]:
        words = ["texts/" if word.partition(":")[0] in ("stdlib", "site-packages", "packages") else word for word in words]
    return [re.sub("bpe:[0-9]+", "bpe:300", word) for word in words]
