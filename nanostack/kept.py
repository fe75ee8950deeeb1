"""The checkpoints of a run: `ckpt.pt` is the last one, or points to it; earlier ones have their samples in their names."""

import itertools
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from nanostack import files, shard_reader, sharded
from nanostack.errors import UserError

LEFT = ".left"  # ends the names of what a run that went back leaves behind

_stay: set[Path] = set()  # checkpoints that the system does not let go


def prune(path: Path, keep: int) -> None:
    """Remove all checkpoints but `path`, or what it points to, and the last `keep` - 1 of the others."""
    others = [other for other in numbered_checkpoints(path) if other.name != sharded.pointed_to(path)]
    for old in others[: max(0, len(others) - (keep - 1))]:
        try:
            sharded.remove(old) if old.is_dir() else old.unlink(missing_ok=True)
        except OSError as error:  # a mount point, another user's: the new checkpoint is whole all the same
            if old not in _stay:
                print(f"note: {old} is too old to be kept, and cannot be removed: {error.strerror}", file=sys.stderr)
            _stay.add(old)


def go_back(source: Path, path: Path) -> None:
    """Make `path` the earlier checkpoint `source`, or point to it; what was there gets a number."""
    if (folder := sharded.folder_of(source)) is not None:
        beside = path.parent / folder.name
        if beside.exists() and not beside.samefile(folder):
            raise UserError(f"{beside} is in the way of a copy of {folder}: rename one of them")
        if not beside.exists():
            _copy_folder(folder, beside)
        give_number(path)
        former = sharded.pointed_to(path)
        sharded.point(path, beside)
        number_former(path, former)
        return
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(source, "rb") as earlier, files.replacing(new, "wb") as copy:
        shutil.copyfileobj(earlier, copy)
    put_in_place(new, path, samples_of(new))


def _copy_folder(folder: Path, beside: Path) -> None:
    """A copy of a folder that is whole or not there."""
    partial = beside.with_name(f"{beside.name}{sharded.PARTIAL}")
    try:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
    except shutil.Error as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"could not copy {folder} to {beside}: {error.args[0][0][2]}") from error
    os.replace(partial, beside)


def put_in_place(new: Path, path: Path, new_samples: int | None) -> None:
    """Rename `new` to `path`, and give the checkpoint that was there the name with its number. One of them is always there."""
    give_number(path, unless=new_samples)
    former = sharded.pointed_to(path)
    os.replace(new, path)
    files.sync(path.parent)
    number_former(path, former)


def give_number(path: Path, unless: int | None = None) -> None:
    """Give a checkpoint that is one file the name with its number, unless it is that one: another is to be `path`."""
    samples = samples_of(path) if sharded.pointed_to(path) is None else None
    if samples is None or samples == unless:
        return
    numbered = path.with_name(f"{path.stem}-{samples}{path.suffix}")
    if numbered.exists():
        if numbered.samefile(path):  # `path` is a link to it
            return
        if _hashes_of(numbered) != _hashes_of(path):  # of another run, or before what the run went back from
            os.replace(numbered, left_name(numbered))
    numbered.unlink(missing_ok=True)
    try:
        os.link(path, numbered)  # for a moment: whatever takes its place ends it
    except OSError:  # a file system without hard links
        os.replace(path, numbered)


def number_former(path: Path, former: str | None) -> None:
    """A folder under another name, to which `path` pointed, gets the name with its number: it goes when it is too old."""
    if former is None or former == sharded.pointed_to(path) or _samples_in(folder := path.with_name(former), path) is not None:
        return
    samples = samples_of(folder)
    if samples is not None and not os.path.lexists(numbered := path.with_name(f"{path.stem}-{samples}")):
        os.rename(folder, numbered)


def left_name(file: Path) -> Path:
    """NAME.left for what a run leaves behind; NAME.2.left and so on where an earlier one has that."""
    names = (f"{file.name}{f'.{number}' if number > 1 else ''}{LEFT}" for number in itertools.count(1))
    return next(new for name in names if not os.path.lexists(new := file.with_name(name)))


def number_of(file: Path, path: Path) -> int:
    """The samples that a numbered checkpoint of `path` has seen; what its name says where it cannot be read."""
    samples = samples_of(file)
    return samples if samples is not None else _samples_in(file, path) or 0


def _hashes_of(path: Path) -> dict | None:
    """The hashes in a checkpoint that is one file, its tensors unread; None where it is none."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["hashes"]
    except Exception:  # as below
        return None


def samples_of(path: Path) -> int | None:
    """The samples that a checkpoint has seen, its tensors unread; None where it is none."""
    try:
        if (folder := sharded.folder_of(path)) is not None:
            return int(shard_reader.plain_of(folder)["cursor"]["samples"])
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["cursor"]["samples"])
    except Exception:  # a damaged zip or pickle fails in many ways
        return None


def found(path: Path) -> Path:
    """`path`, or ckpt.pt for a ckpt-SAMPLES.pt that is not there, where that has seen so many: the last one has no number."""
    last = path.with_name(re.sub(r"-\d+$", "", path.stem) + path.suffix)
    if path.exists() or last == path or not last.is_file() or _samples_in(path, last) != samples_of(last):
        return path
    return last


def numbered_checkpoints(path: Path) -> list[Path]:
    """`ckpt-<samples>.pt` beside `ckpt.pt`, and sharded ones, in the order of their numbers: those of clocks can be wrong."""
    found = [(_samples_in(file, path), file) for file in path.parent.glob(f"{path.stem}-*")]
    return [file for samples, file in sorted(found, key=lambda one: one[0] or 0) if samples is not None]


def _samples_in(file: Path, path: Path) -> int | None:
    """The number in the name of a numbered checkpoint of `path`; None where it is none."""
    found = re.fullmatch(rf"-(\d+)({re.escape(path.suffix)}|{re.escape(sharded.AGAIN)}|)", file.name.removeprefix(path.stem))
    if found is None:
        return None
    as_named = not file.is_dir() if found[2] == path.suffix else file.is_dir() and sharded.folder_of(file) is not None
    return int(found[1]) if as_named else None
