"""What an installation brings: nanostack with its kernels and scripts, and no package of a name that others have."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from installed import use

import nanostack

pytest.importorskip("setuptools", "77", reason="builds a wheel, which takes setuptools")


@pytest.fixture
def clone(tmp_path):
    """A copy of what a clone holds, but for results and pictures."""
    folder = tmp_path / "clone"
    for name in ("nanostack", "kernels", "bench", "study", "tests", "config"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, folder)
    return folder


def built(clone, what: str):
    """The wheel that setuptools builds, open."""
    code = f"from setuptools.build_meta import {what}; print({what}('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(clone / done.stdout.splitlines()[-1])


def test_wheel_and_source_bring_nanostack_alone_and_pass_the_checks_of_the_trade(clone):
    """The wheel is built from the source archive, as whoever packages it would."""
    words = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", "dist"]
    done = subprocess.run(words, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    source, wheel = sorted(clone.glob("dist/*"), key=lambda path: path.suffix == ".whl")
    assert wheel.name == f"nanostack-{nanostack.__version__}-py3-none-any.whl"
    checks = ["twine", "check", "--strict", source, wheel], ["check_wheel_contents", wheel]
    for check in checks:
        done = subprocess.run([sys.executable, "-m", *check], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"nanostack"}
    for path in (*clone.glob("nanostack/**/*.*"), *clone.glob("kernels/*.*"), *clone.glob("config/*.py")):
        name = path.relative_to(clone).as_posix()
        name = f"nanostack/{name.replace('config/', 'presets/')}" if name.startswith(("kernels/", "config/")) else name
        assert not path.is_file() or name in names, name
    assert {"nanostack/py.typed", "nanostack/scripts/train.py", "nanostack/scripts/grow.py"} <= names
    archive = subprocess.run(["tar", "tzf", source], capture_output=True, text=True).stdout.split()
    assert not [name for name in archive if "/tests" in name]
    assert {"CITATION.cff", "constraints.txt", "constraints-clients.txt"} <= {name.partition("/")[2] for name in archive}


def test_zip_that_pip_unpacks_without_its_links_is_refused(clone):
    (clone / "nanostack/kernels").unlink()
    (clone / "nanostack/kernels").write_text("../kernels")
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: nanostack/kernels should be a link"), done.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_wheel_serves_someone_without_a_clone(clone, tmp_path):
    """An environment that sees the packages of this one, but no clone."""
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    wheel = built(clone, "build_wheel").filename
    install = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--no-deps", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    use(environment / "bin/python", folder)


def test_editable_installation_puts_the_clone_on_the_path(clone):
    """Not a finder that knows nanostack alone: scripts of bench and study import these packages too."""
    with built(clone, "build_editable") as wheel:
        (pth,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert wheel.read(pth).decode().strip() == str(clone)


def test_version_is_said_alike_everywhere():
    version = nanostack.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
