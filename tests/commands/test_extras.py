"""nanostack without its extras: it trains and grows, and what takes one of them says which, with the line that installs it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, TINY, python

ABSENT = """
import sys
from importlib.machinery import PathFinder


class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {packages} else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""


def packages() -> list[str]:
    """What the extras of pyproject.toml import, those for development left out."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [line for extra, lines in extras.items() if extra != "dev" for line in lines]
    return sorted({re.match(r"[\w-]+", line)[0].replace("-", "_") for line in wanted})


WITHOUT = """
import runpy
import sys
sys.modules.pop("sitecustomize", None)  # Debian's Python has one, which the fork's parent has imported
import sitecustomize

assert not [name for name in sys.modules if name.partition(".")[0] in {packages}]
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Bare:
    """Runs commands in `folder`, in processes for which the extras' packages are not installed.

    `fresh` is a process of its own from the start, and a call a fork of one that has imported nanostack and none of the extras.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(ABSENT.format(packages=packages()))
        for name in ("train.py", "grow.py", "config", "bench", "nanostack", "kernels"):
            (folder / name).symlink_to(ROOT / name)
        self.env = {"PYTHONPATH": f"{self.folder / 'site'}:{self.folder}", "CUDA_VISIBLE_DEVICES": ""}

    def __call__(self, *arguments) -> subprocess.CompletedProcess:
        return python("-c", WITHOUT.format(packages=packages()), *arguments, cwd=self.folder, env=self.env)

    def fresh(self, *arguments) -> str:
        command, env = [sys.executable, *arguments], os.environ | self.env
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=True).stdout

    def good(self, *arguments) -> str:
        done = self(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def everything(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Bare:
    """Text prepared, and a run that grew, without extras; beside them, files that take an extra to read."""
    bare = Bare(tmp_path_factory.mktemp("bare"))
    library = Path(os.__file__).parent
    sources = (str(library / name) for name in ("argparse.py", "ast.py", "json", "email"))
    bare.good("-m", "nanostack", "prepare", *sources, "--out", "data", "--tokenizer", "bpe:300", "--val_fraction", "0.2")
    bare.fresh("train.py", TINY, "--data.path", "data", "--out", "out/run")
    (bare.folder / "model").mkdir()
    (bare.folder / "model" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (bare.folder / "text.parquet").write_bytes(b"PAR1")
    (bare.folder / "tokenizer.json").write_text("{}")
    return bare


def test_extras_are_absent(bare):
    """The other tests of this file show nothing where an extra is there."""
    found = bare.fresh("-c", f"import importlib.util as u; print([name for name in {packages()} if u.find_spec(name)])")
    assert found == "[]\n" and {"pyarrow", "lm_eval", "tensorboard", "liger_kernel"} < set(packages())


@pytest.mark.slow
def test_everything_else_works(bare):
    bare.good("grow.py", "out/run/ckpt.pt", "--g", "2")
    assert (bare.folder / "out/run/ckpt-x2.pt").exists()
    sampled = bare.good("-m", "nanostack", "sample", "out/run/ckpt.pt", "--data", "data", "--tokens", "5", "--json")
    assert json.loads(sampled)["samples"][0]["text"].startswith("def ")
    assert json.loads(
        bare.good("-m", "nanostack", "evaluate", "out/run/ckpt.pt", "--val", "data", "--out", "val.json", "--json")
    )
    bare.good("-m", "nanostack", "plot", "out/run")
    assert (bare.folder / "out/run/curves.svg").exists()
    assert json.loads(bare.good("-m", "nanostack", "fit", TINY, "--json"))
    assert json.loads(bare.good("-m", "nanostack", "plan", "--params", "1e9", "--tokens", "2e10", "--json"))


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("-m nanostack export out/run/ckpt.pt exported --data data", "safetensors", "hf"),
        ("-m nanostack export out/run/ckpt.pt exported --data data --gguf", "gguf", "gguf"),
        ("-m nanostack import model out/imported.pt", "safetensors", "hf"),
        ("-m nanostack import OWNER/NAME out/imported.pt", "", "hf"),
        ("grow.py model --g 2", "safetensors", "hf"),
        ("-m nanostack prepare text.parquet --out new --tokenizer bpe:300", "pyarrow", "data"),
        ("-m nanostack prepare hf:OWNER/NAME --out new --tokenizer bpe:300", "datasets", "data"),
        ("-m nanostack prepare data --out new --tokenizer tokenizer.json", "tokenizers", "hf"),
        (f"train.py {TINY} --data.path data --out new --track tensorboard", "tensorboard", "track"),
        ("-m nanostack track out/run --to wandb", "wandb", "track"),
        ("-m nanostack evaluate out/run/ckpt.pt --tokenizer data --tasks arc_easy", "datasets", "eval"),
    ],
)
def test_missing_extra_is_named_with_its_install_line(bare, command, package, extra):
    before = everything(bare.folder)
    done = bare(*command.split())
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert package in done.stderr and done.stderr.endswith(f"pip install 'nanostack[{extra}]'\n"), done.stderr
    assert everything(bare.folder) == before
