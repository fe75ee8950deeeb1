"""Reads the records of a run: all at once, or as they are written."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from nanostack.errors import UserError
from nanostack.old_fields import current_config


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """Header and records of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (no metrics.jsonl)")
    try:
        header, *records = map(json.loads, path.read_text().splitlines())
    except ValueError as error:
        raise UserError(f"{path} is not whole: the run died while it was written, or is under way; resume it first") from error
    return _of_today(header, path), records


def _of_today(header: dict, path: Path) -> dict:
    """The header, its config under the names of today."""
    if isinstance(header, dict) and isinstance(header.get("config"), dict):
        header["config"] = current_config(header["config"], str(path))
    return header


def name_of(folder: Path, all_: list[Path]) -> str:
    """The folder's own name, or its whole path where others have the same."""
    name = folder.resolve().name
    return name if name and sum(other.resolve().name == name for other in all_) == 1 else str(folder)


@dataclass
class News:
    """What a run's file says that a `Follower` has not told before."""

    anew: bool
    """Whether it is another file than before, or another past: what was told before no longer holds."""
    header: dict | None = None
    records: list[dict] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    """Numbers of the lines that are no records."""
    left: int = 0
    """Bytes after those that were read."""
    torn: bool = False
    """Whether the last line has no end: it is being written, or its writer died."""


class Follower:
    """Reads a run's metrics.jsonl piece by piece while it is written.

    A resumed run replaces the file by one that is cut back to a checkpoint, and that may be longer than the old one when it is
    looked at. The follower therefore keeps the end of what it has read: where the file is another one, or has something else
    in that place, it begins anew. It reads a line when the line has an end.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self._file: tuple[int, int] | None = None  # device and inode
        self._at, self._lines, self._last = 0, 0, b""

    def news(self, limit: int = 8 << 20) -> News:
        """What `limit` bytes more of the file say. OSError where there is none, or it cannot be read."""
        with open(self.path, "rb") as file:
            about = os.fstat(file.fileno())
            file.seek(self._at - len(self._last))
            same = (about.st_dev, about.st_ino) == self._file and file.read(len(self._last)) == self._last
            if not same:
                self._file, self._at, self._lines, self._last = (about.st_dev, about.st_ino), 0, 0, b""
                file.seek(0)
            read = file.read(limit)
        whole = read.rfind(b"\n") + 1 or (limit if len(read) == limit else 0)  # no record is as long as that: it is damaged
        news = News(anew=not same, left=max(0, about.st_size - self._at - len(read)), torn=whole < len(read) < limit)
        lines = read[:whole].removesuffix(b"\n").split(b"\n") if whole else []
        for number, line in enumerate(lines, self._lines + 1):
            try:
                record = json.loads(line)
                if "config" in record:
                    news.header = _of_today(dict(record), self.path)
                else:
                    news.records.append(record | {"tokens": int(record["tokens"])})
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                news.damaged.append(number)
        self._at, self._lines = self._at + whole, self._lines + len(lines)
        self._last = (self._last + read[:whole])[-4096:]
        return news
