"""Two runs never share a folder; a process or a machine that died leaves it free."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from conftest import ROOT

from nanostack import lock
from nanostack.launch import boot

ELSEWHERE = {"host": "elsewhere", "boot": "another kernel", "pid": 4711, "launch": None}
HOLD = "import sys, pathlib, time; from nanostack import lock; lock.take(pathlib.Path(sys.argv[1]), None); print(1, flush=True)"


@pytest.fixture
def quick(monkeypatch):
    """A minute of silence is a second."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)


def left_by_a_machine(folder, seconds_ago: float = 0.0):
    path = folder / lock.NAME
    path.write_text(json.dumps(ELSEWHERE))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def test_second_process_is_refused_by_host_and_pid_and_a_killed_one_leaves_no_lock(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{HOLD}; time.sleep(100)", str(tmp_path)]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=rf"is in use by a run on {os.uname().nodename}, process {holder.pid}: "):
        lock.take(tmp_path, None)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    lock.take(tmp_path, None).release()
    assert (tmp_path / lock.NAME).read_bytes() == b"", "a run that ended says so to other machines"


def test_next_run_of_the_same_process_has_the_folder(tmp_path):
    first = lock.take(tmp_path, None)
    second = lock.take(tmp_path, None)
    first.release()  # again, which changes nothing
    assert json.loads((tmp_path / lock.NAME).read_bytes())["pid"] == os.getpid()
    second.release()


def test_folder_that_is_moved_away_is_told_once(tmp_path, quick, capfd):
    (folder := tmp_path / "run").mkdir()
    held = lock.take(folder, None)
    folder.rename(tmp_path / "moved")
    time.sleep(1)
    held.release()
    assert capfd.readouterr().err.count("was moved or deleted") == 1


def test_file_system_that_is_away_for_a_while_ends_no_heartbeat(tmp_path, quick, monkeypatch):
    held = lock.take(tmp_path, None)
    with monkeypatch.context() as away:
        away.setattr(type(tmp_path), "exists", Mock(side_effect=OSError(errno.ESTALE, os.strerror(errno.ESTALE))))
        time.sleep(0.5)
    os.utime(tmp_path / lock.NAME, (0, 0))
    time.sleep(0.5)
    assert (tmp_path / lock.NAME).stat().st_mtime > 0
    held.release()


def test_machine_that_beats_is_refused(tmp_path, quick, capfd):
    path = left_by_a_machine(tmp_path)
    beat = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(.3); os.utime({str(path)!r}); time.sleep(9)"])
    with pytest.raises(ValueError, match="is in use by a run on elsewhere, process 4711"):
        lock.take(tmp_path, None)
    beat.kill()
    beat.wait()
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("seconds_ago", [0.0, 5.0, -5.0])
def test_dead_machine_blocks_nobody_whatever_its_clock_said(tmp_path, quick, capfd, seconds_ago):
    left_by_a_machine(tmp_path, seconds_ago)
    lock.take(tmp_path, None).release()
    said = capfd.readouterr().err.splitlines()
    assert said[-1].endswith("nothing was heard of a run on elsewhere, process 4711 for 1 s, so its place is taken")
    assert len(said) == (1 if seconds_ago > 1 else 2)


def test_next_attempt_of_a_launch_waits_for_nobody(tmp_path, capfd):
    (tmp_path / lock.NAME).write_text(json.dumps(ELSEWHERE | {"launch": "key"}))
    lock.take(tmp_path, "key").release()
    assert capfd.readouterr().err == ""


def test_lock_that_a_server_keeps_for_a_dead_machine_is_left_to_it(tmp_path, quick, monkeypatch):
    """And where that machine lives after all, its process finds out and ends."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = f"from nanostack import lock; lock.BEAT_SECONDS = 1.5; {HOLD}; time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment, stdout=-1, stderr=-1, text=True)
    holder.stdout.readline()
    monkeypatch.setattr(lock, "boot", lambda: "another kernel")
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.3)
    mine = lock.take(tmp_path, None)
    said = holder.communicate(timeout=60)[1]
    assert holder.returncode == 2 and f"process {os.getpid()} has taken {tmp_path}" in said
    mine.release()


def test_file_system_without_locks_has_the_heartbeat(tmp_path, quick, monkeypatch):
    def unknown(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    held = lock.take(tmp_path, None)
    lock._held.clear()  # as another process would see it
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        lock.take(tmp_path, None)
    held.release()
    lock.take(tmp_path, None).release()
    assert boot() == boot() != ""
