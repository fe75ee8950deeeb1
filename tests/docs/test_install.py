"""What an installation brings: nanostack with its kernels, and no package of a name that others have."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

pytest.importorskip("setuptools", "77", reason="builds a wheel, which takes setuptools")


@pytest.fixture
def clone(tmp_path):
    """A copy of what a clone holds, but for results and pictures."""
    folder = tmp_path / "clone"
    for name in ("nanostack", "kernels", "bench", "study", "tests", "config"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "grow.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def built(clone, what: str):
    """The wheel that setuptools builds, open."""
    code = f"from setuptools.build_meta import {what}; print({what}('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(clone / done.stdout.splitlines()[-1])


def test_wheel_brings_nanostack_alone(clone):
    names = set(built(clone, "build_wheel").namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"nanostack"}
    for source in (*clone.glob("nanostack/**/*.py"), *clone.glob("kernels/*.[pc]*")):
        name = source.relative_to(clone).as_posix()
        if source.is_file():
            assert (f"nanostack/{name}" if name.startswith("kernels/") else name) in names
    assert {"nanostack/py.typed", "nanostack/commands/watch.html"} <= names


def test_editable_installation_puts_the_clone_on_the_path(clone):
    """Not a finder that knows nanostack alone: scripts of bench and study import these packages too."""
    with built(clone, "build_editable") as wheel:
        (pth,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert wheel.read(pth).decode().strip() == str(clone)
