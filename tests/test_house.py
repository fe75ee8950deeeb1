"""The rules of the house: imports run one way, without circles; budgets of lines; one line of code is where it belongs."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from conftest import ROOT

LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]


def contracts(tree: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*LINT, "--no-cache"], cwd=tree, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The packages that the contracts are about."""
    tree = tmp_path_factory.mktemp("house")
    for name in ("pyproject.toml", "train.py", "grow.py"):
        shutil.copy(ROOT / name, tree)
    for name in ("nanostack", "kernels", "bench", "study", "config"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return tree


def test_imports_keep_the_contracts(copy):
    done = contracts(copy)
    assert done.returncode == 0 and "7 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("nanostack/errors.py", "from nanostack import state", "Imports run one way within nanostack"),
        ("nanostack/hf/weights.py", "import nanostack.__main__", "Imports run one way within nanostack"),
        ("nanostack/commands/plot.py", "from nanostack.commands import fit", "Commands do not know each other"),
        ("kernels/dispatch.py", "from nanostack import model", "Imports run one way"),
        ("study/plan.py", "from bench import anchors", "Imports run one way: bench and study, nanostack, kernels"),
        ("nanostack/growth/depth.py", "from nanostack.growth import config", "No circles"),
        ("bench/ops.py", "import study.plan", "Imports run one way: bench and study, nanostack, kernels"),
        ("nanostack/growth/learn.py", "from nanostack.growth import Hooks", "No module of growth imports growth"),
        ("bench/ops.py", "import kernels", "Nobody imports kernels by its short name"),
        ("nanostack/state.py", "import train", "Nobody imports the scripts at the top"),
    ],
)
def test_planted_import_breaks_its_contract(copy, file, line, contract):
    path = copy / file
    before = path.read_text()
    path.write_text(f"{before}\n\ndef planted():\n    {line}\n")
    try:
        done = contracts(copy)
    finally:
        path.write_text(before)
    broken = [said for said in done.stdout.splitlines() if "BROKEN" in said and said.startswith(contract)]
    assert done.returncode == 1 and broken, done.stdout + done.stderr


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_files_keep_their_budgets():
    assert lines(ROOT / "train.py") <= 230 and lines(ROOT / "grow.py") <= 180
    library = [path for folder in ("nanostack", "kernels") for path in (ROOT / folder).rglob("*.*")]
    library = [path for path in library if path.suffix in (".py", ".c")]
    assert not {str(path.relative_to(ROOT)): n for path in library if (n := lines(path)) > 400}
    (run,) = (node for node in ast.parse((ROOT / "train.py").read_text()).body if getattr(node, "name", "") == "Run")
    begin = next(node for node in run.body if getattr(node, "name", "") == "__init__")
    assert begin.end_lineno - begin.lineno + 1 <= 30


def test_every_fault_can_be_planted():
    texts = faults.sources(ROOT)
    assert [one.name for one in faults.FAULTS if faults.planted(one, texts) is None] == []


def test_no_file_hides_a_package_and_no_path_is_patched():
    packages = {"nanostack", "kernels", "bench", "study", "tests"}
    for folder in ("bench", "study", "nanostack", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.stem not in packages, path
            assert "sys.path" not in path.read_text() and "noqa: E402" not in path.read_text(), path
