"""One door for all commands, and what old names answer."""

import subprocess
import sys

import pytest
from conftest import ROOT, python

from nanostack.__main__ import COMMANDS, SCRIPTS
from nanostack.names import MOVED


def test_door_lists_its_commands_with_a_line_each():
    listed = python("-m", "nanostack")
    assert listed.returncode == 2 and python("-m", "nanostack", "--help").stdout == listed.stdout
    _, _, *lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*SCRIPTS, *COMMANDS]
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_says_what_it_is_for(name):
    done = python("-m", "nanostack", name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: nanostack {name} "), done.stderr
    about = __import__(f"nanostack.commands.{COMMANDS[name][0]}", fromlist=["run"]).__doc__
    assert f"nanostack {name} " in about and "".join(about.split()) in "".join(done.stdout.split())


def test_help_of_prepare_has_the_table_of_sources():
    said = python("-m", "nanostack", "prepare", "--help").stdout
    for source in ("stdlib", "site-packages", "hf:OWNER/NAME", "*.jsonl", "*.parquet", "anything else"):
        assert f"\n    {source} " in said


def test_unknown_command_is_refused_in_one_line():
    done = python("-m", "nanostack", "abacus")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "abacus" in done.stderr and all(name in done.stderr for name in COMMANDS)
    assert "did you mean train?" in python("-m", "nanostack", "Traim").stderr


def test_windows_is_told_to_use_wsl_in_one_line():
    done = python("-c", "import sys; sys.platform = 'win32'; del sys.modules['nanostack']; import nanostack")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "on Windows, use WSL" in done.stderr


@pytest.mark.parametrize("name", MOVED)
def test_old_command_says_the_new_one_in_one_line(name):
    done = python("-m", name, "--out", "nowhere")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: python -m {name} is now: ")
    place, command = MOVED[name]
    assert done.stderr.rstrip().endswith(f"nanostack {command}" if command else place)


def test_every_place_and_command_that_an_old_name_leads_to_is_there():
    for name, (place, command) in MOVED.items():
        assert command is None or command in COMMANDS, name
        for one in place.split(" and "):
            __import__(one)


@pytest.mark.parametrize("name", sorted(MOVED.keys() - {"nanostack.track"}))
def test_old_import_says_the_new_place(name):
    with pytest.raises(ImportError, match=f"{name} is now {MOVED[name][0]}".replace(".", r"\.")):
        __import__(name)
    assert name not in sys.modules


@pytest.mark.parametrize("arguments", [(), ("plan", "--help"), ("plan", "--params", "7e9", "--tokens", "3e11")])
def test_reader_that_leaves_early_gets_no_traceback(arguments):
    """`head -1` leaves like this; here the reader is gone before anything is written."""
    command = [sys.executable, "-m", "nanostack", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 141 and said == ""


SAME = """
import sys
names = ["kernels", "kernels.rms_norm", "kernels.attention", "kernels.dispatch", "kernels.configs", "kernels.aot"]
first = [__import__(name, fromlist=["x"]) for name in names] if "before" in sys.argv else []
import nanostack.model
import torch
operators = sorted(name for name in dir(torch.ops.nanostack) if not name.startswith("_"))
for name in names:
    short, long = __import__(name, fromlist=["x"]), __import__(f"nanostack.{name}", fromlist=["x"])
    assert short is long is sys.modules[name] is sys.modules[f"nanostack.{name}"], name
    assert long.__name__ == long.__spec__.name == f"nanostack.{name}"
assert not first or first == [sys.modules[name] for name in names]
for name in ("rms_norm", "linear_cross_entropy", "swiglu", "rotary"):
    function = getattr(sys.modules["kernels"], name)
    assert callable(function) and function is getattr(sys.modules[f"kernels.{name}"], name)
assert "linear_cross_entropy_rows" in operators
assert operators == sorted(name for name in dir(torch.ops.nanostack) if not name.startswith("_"))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_kernels_is_the_same_package_by_both_names(when):
    """A second copy would register every operator again, which torch refuses."""
    done = subprocess.run([sys.executable, "-c", SAME, when], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_of_kernels_run_by_their_short_name():
    done = subprocess.run([sys.executable, "-m", "kernels.aot", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
