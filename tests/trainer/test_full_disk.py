"""A disk that is full for a moment, or for good, at any write: nothing is lost, and training goes on when there is room."""

import os
import re
import subprocess
import time

import pytest
from conftest import Trainer, python, records
from test_checkpoint import trained

from nanostack import checkpoint

# As much room as a run needs, on a file system of its own that a file can fill.
STEPS = ("--save_interval", "512", "--log_interval", "256", "--stages.0.tokens", "4096", "--stages.1.tokens", "2048")


@pytest.fixture
def small(corpus, tmp_path):
    """A run whose folder is on a disk of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield Trainer(corpus, disk)
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk) -> None:
    with open(disk / "fill", "wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096) == 4096:
                pass
        except OSError:
            pass


def wait_for(seen, process) -> None:
    end = time.monotonic() + 60
    while not seen():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_run_goes_on_through_a_full_disk_and_loses_nothing(small, trainer, processes):
    """Full after the first checkpoint, for some saves and records, then free again."""
    whole = trainer.good("whole", *STEPS, processes=processes)
    process = small.start("run", *STEPS, processes=processes)
    out = small.folder / "run"
    wait_for(lambda: (out / "ckpt.pt").exists(), process)
    fill(small.folder)
    said = ""
    while "it will be tried again" not in said and (line := process.stdout.readline() or process.poll() is None):
        said += line if isinstance(line, str) else ""
        time.sleep(0 if isinstance(line, str) else 0.02)
    (small.folder / "fill").unlink()
    code = process.wait()
    said += process.stdout.read()
    assert code == 0, said
    assert "could not save" in said and "No space left on device" in said, said
    assert [one["loss"] for one in records(out)] == [one["loss"] for one in records(whole)]
    a, b = (checkpoint.load(folder / "ckpt.pt") for folder in (out, whole))
    assert a["cursor"] == b["cursor"] and not list(out.glob("*.partial"))


@pytest.mark.slow
def test_run_that_ends_on_a_full_disk_says_so_and_keeps_the_last_checkpoint(small):
    process = small.start("run", *STEPS)
    out = small.folder / "run"
    wait_for(lambda: (out / "ckpt.pt").exists(), process)
    fill(small.folder)
    code, said = process.wait(), process.stdout.read()
    assert code == 2 and re.search("error: could not (save|write)", said) and "Traceback" not in said
    assert checkpoint.load(out / "ckpt.pt")["cursor"]["tokens"] > 0


def test_consolidating_onto_a_full_disk_leaves_nothing_there(small, tmp_path):
    checkpoint.save(trained(), tmp_path / "file.pt")
    checkpoint.save_sharded(trained(), tmp_path / "shards.pt")
    fill(small.folder)
    for name in ("file.pt", "shards.pt"):
        done = python("-m", "nanostack", "consolidate", tmp_path / name, small.folder / "out.pt")
        assert done.returncode == 2 and "could not save" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in small.folder.iterdir()] == ["fill"]


def test_growing_part_by_part_onto_a_full_disk_leaves_nothing_there(small, tmp_path):
    checkpoint.save_sharded(trained(), tmp_path / "shards.pt")
    fill(small.folder)
    done = python("grow.py", tmp_path / "shards.pt", "--g", "2", "--out", small.folder / "out.pt")
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [path.name for path in small.folder.iterdir()] == ["fill"]


def test_run_that_cannot_begin_or_go_on_for_want_of_room_says_so_and_leaves_all(small):
    """At the first line of a new run, at its lock, and at what a resume copies and writes anew."""
    fill(small.folder)
    assert "No space left" in small.refused("run", *STEPS)
    (small.folder / "fill").unlink()
    out = small.good("run", *STEPS)
    fill(small.folder)
    before = {path: path.read_bytes() for path in out.iterdir()}
    earlier = str(min(out.glob("ckpt-*.pt")))
    for how in (["--resume", "--stages.1.tokens", "4096"], ["--resume_from", earlier]):
        assert "No space left" in small.refused("run", *STEPS, *how)
        assert {path: path.read_bytes() for path in out.iterdir()} == before, how
    (small.folder / "fill").unlink()
    small.good("run", *STEPS, "--resume_from", earlier)
