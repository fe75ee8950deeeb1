"""The one way to write a file that is whole or not there."""

import contextlib
import glob
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A new file, open for writing, that takes the place of `path` when the block ends.

    It is written beside its place, synced to disk, then renamed, and the folder is synced. A process killed at any moment
    leaves the old file or the new one, and perhaps `NAME.HOST.PID.partial`, which the next one to write there from the same
    host clears away. Whatever is raised in the block leaves the old file.
    """
    beside = f"{path.name}.{socket.gethostname()}"
    for left in path.parent.glob(f"{glob.escape(beside)}.*.partial"):
        if not _runs(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)
    partial = path.with_name(f"{beside}.{os.getpid()}.partial")
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _runs(pid: str) -> bool:
    """Whether a process of this number may run on this machine."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass  # of another user
    return True


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
