"""A run holds a lock on its folder: two runs in one folder would leave the records of one and the weights of the other.

On one machine it is flock's, which the operating system drops with the process, however it ends. Not every file system carries
that to other machines, so the holder also touches the file every BEAT_SECONDS. A file that nobody has touched for STALE_SECONDS
is that of a machine that died, and blocks nobody; a process that finds its lock taken ends at once.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from nanostack.errors import UserError
from nanostack.launch import boot

NAME, BEAT_SECONDS, STALE_SECONDS = ".lock", 10.0, 60.0

_held: dict[Path, "Lock"] = {}  # by this process


class Lock:
    """The lock on a folder, held from `take` until `release`."""

    def __init__(self, folder: Path, descriptor: int):
        self.path, self._descriptor = folder / NAME, descriptor
        self._ended = threading.Event()
        _held[folder] = self
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Let others have the folder. A second call does nothing."""
        if not self._ended.is_set():
            self._ended.set()
            _held.pop(self.path.parent, None)
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)

    def _beat(self) -> None:
        told = False
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file system may be away for a while, or the folder deleted
                if not (told or self.path.exists() or self._ended.is_set()):
                    gone = f"{self.path.parent} was moved or deleted, or its {NAME}: records go where metrics.jsonl is,"
                    print(f"warning: {gone} checkpoints into a folder of the former name", file=sys.stderr, flush=True)
                    told = True
                mine = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
                if mine:
                    os.utime(self._descriptor)
                elif not self._ended.is_set():
                    taker, why = _name(_read(self.path)), f"nothing was heard for {STALE_SECONDS:.0f} s, or {NAME} was deleted"
                    print(f"error: {taker} has taken {self.path.parent}: {why}; this one ends", file=sys.stderr, flush=True)
                    os._exit(2)


def take(folder: Path, launch: str | None) -> Lock:
    """Lock a folder that exists. UserError where another run holds it, or where it cannot be written to.

    `launch` names what started this process: an earlier attempt of the same launch is dead by now, on whichever machine it was.
    """
    folder = folder.resolve()
    if folder in _held:  # by an earlier run of this process
        _held[folder].release()
    path = folder / NAME
    descriptor, locked = _open(path)
    holder = _read(path)
    try:
        if locked is False and holder.get("boot") == boot():
            raise UserError(f"{folder} is in use by {_name(holder)}: wait for its end, stop it, or choose another --out")
        stranger = bool(holder) and (locked is not True or holder.get("boot") != boot())
        if locked is False or (stranger and (launch is None or holder.get("launch") != launch)):
            _wait_for_silence(folder, holder)
        content = json.dumps({"host": socket.gethostname(), "boot": boot(), "pid": os.getpid(), "launch": launch}).encode()
        if locked is False:  # a machine that died, and whose lock a server still keeps: leave that file to it
            os.close(descriptor)
            new = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.partial")
            descriptor, _ = _open(new)
            os.write(descriptor, content)
            os.replace(new, path)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(folder, descriptor)


def release_all() -> None:
    """Release what this process holds."""
    for lock in list(_held.values()):
        lock.release()


def _open(path: Path) -> tuple[int, bool | None]:
    """The lock file, and whether it is locked by us; None where this file system knows no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return descriptor, False
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                os.close(descriptor)
                raise
            return descriptor, None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor, True
        os.close(descriptor)  # another file has taken its place meanwhile


def _read(path: Path) -> dict:
    """Who holds a lock, as far as the file tells."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _name(holder: dict) -> str:
    return f"a run on {holder.get('host', 'this or another host')}, process {holder.get('pid', 'unknown')}"


def _wait_for_silence(folder: Path, holder: dict) -> None:
    """Return when nobody has touched the lock for STALE_SECONDS; UserError as soon as somebody does."""
    path = folder / NAME
    before, age = _touched(path), _age(path)
    who = _name(holder)
    if 0 <= age < STALE_SECONDS:
        rest = f"waiting {STALE_SECONDS - age:.0f} s to hear whether it lives"
        print(f"note: {folder} was in use by {who} {age:.0f} s ago; {rest}", file=sys.stderr, flush=True)
    give_up = time.monotonic() + STALE_SECONDS - max(0.0, age)
    while time.monotonic() < give_up:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        if _touched(path) != before:
            who = _name(_read(path) or holder)  # it may have had no time to say who it is
            raise UserError(f"{folder} is in use by {who}: wait for its end, stop it, or choose another --out")
    silent = f"nothing was heard of {who} for {STALE_SECONDS:.0f} s"
    print(f"note: {folder}: {silent}, so its place is taken", file=sys.stderr, flush=True)


def _touched(path: Path) -> int:
    """When the file was touched last. It is opened for that: a network file system may tell old news of a closed one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _age(path: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system; 0 where that was set back meanwhile."""
    probe = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.partial")
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666))
    now = _touched(probe)
    probe.unlink()
    return max(0.0, (now - _touched(path)) / 1e9)
