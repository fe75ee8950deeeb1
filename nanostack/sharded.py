"""Sharded checkpoints: a folder that torch.distributed.checkpoint (DCP) writes, each rank its own shards.

    ckpt-4096/__0_0.distcp   a file of every rank, in DCP's format: its shards of weights and of the optimizer's state
    ckpt-4096/.metadata      DCP's table: where in which file each shard of each tensor lies
    ckpt-4096/nanostack.json everything else that a checkpoint holds, a SHA-256 of every shard and one of .metadata
    ckpt.pt                  the pointer: a line of JSON that names the folder

The folder gets its name when all of it is on disk, and then the pointer is replaced in one atomic step. It is read by any
number of ranks on any mesh: each rank reads the shards that overlap its own, one at a time, and checks their hashes.
"""

import base64
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from nanostack import files, stop
from nanostack.errors import UserError

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process saves what it has, as it should

FORMAT, POINTER = "nanostack-sharded-1", "nanostack-pointer-1"
PLAIN, TABLE, PARTIAL, AGAIN = "nanostack.json", ".metadata", ".partial", ".again"


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes; it is on the host."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_of(path: Path) -> Path | None:
    """The folder of the sharded checkpoint that `path` is or points to; None where it is no such thing.

    UserError for a pointer to nothing.
    """
    if path.is_dir():
        return path if (path / PLAIN).exists() or (path / TABLE).exists() else None
    name = pointed_to(path)
    if name is None:
        return None
    folder = (path.resolve() if path.is_symlink() else path).parent / name
    if not folder.is_dir():
        there = sorted(other.name for other in path.parent.glob(f"{path.stem}-*") if folder_of(other) == other)
        others = f"there are {', '.join(there)}, each of which can be named instead" if there else "no other is there"
        raise UserError(f"{path} points to {folder}, which is not there; {others}")
    return folder


def pointed_to(path: Path) -> str | None:
    """The name in a pointer; None where `path` is none."""
    try:
        if not path.is_file() or path.stat().st_size > 4096:
            return None
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != POINTER:
        return None
    name = found.get("folder")
    if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or len(name.encode()) > 255:
        raise UserError(f"{path} is damaged: it names no folder beside it")
    return name


def point(path: Path, folder: Path) -> None:
    """Make `path` point to a folder beside it, in one atomic step."""
    with files.replacing(path) as file:
        file.write(json.dumps({"format": POINTER, "folder": folder.name}) + "\n")


def check_place(out: Path, source: Path, overwrite: bool) -> None:
    """Raise `UserError` unless a sharded checkpoint made of `source` can be put at `out`, and its shards beside it."""
    if not out.suffix:
        raise UserError(f"{out} points to the folder of a sharded checkpoint: give it a suffix, as in {out}.pt")
    beside, own = out.with_suffix(""), folder_of(source) or source
    for place in (beside, out.with_name(pointed_to(out) or out.name)):
        if place.exists() and place.samefile(own):
            raise UserError(f"{place}, whose place the shards would take, is {source} itself: choose another name")
    if not os.path.lexists(beside):
        return
    if beside.is_symlink() or folder_of(beside) != beside:
        raise UserError(f"{beside}, where the shards would go, exists already and is no checkpoint: choose another name")
    if not overwrite:
        raise UserError(f"{beside}, where the shards would go, exists already: choose another name, or --overwrite")


def remove(folder: Path) -> None:
    """Delete a checkpoint; whoever looks meanwhile finds all of it or nothing of that name. Of a link the link."""
    if folder.is_symlink():
        return folder.unlink()
    going = folder.with_name(f"{folder.name}.old{PARTIAL}")  # not the name under which another is being written
    shutil.rmtree(going, ignore_errors=True)
    os.rename(folder, going)
    shutil.rmtree(going, ignore_errors=True)


@dataclass(frozen=True)
class Written(WriteResult):
    sha256: str


class Planner(dcp.DefaultSavePlanner):
    """DCP's plan, which takes the SHA-256 of every shard as it is handed out to be written."""

    def __init__(self):
        super().__init__(flatten_state_dict=False)
        self.hashes: dict[MetadataIndex, str] = {}

    def resolve_data(self, write_item):
        tensor = super().resolve_data(write_item)
        assert isinstance(tensor, Tensor)
        self.hashes[write_item.index] = tensor_sha256(tensor)
        return tensor


class Writer(dcp.FileSystemWriter):
    """Writes the shards into `folder`.partial; when those of all ranks are on disk, rank 0 makes a checkpoint of it.

    `plain` are the values that are no shards. `put(folder)`, on rank 0, then makes `pointer` point to it.
    """

    def __init__(self, folder: Path, plain: dict, pointer: Path, put: Callable[[Path], object] | None = None):
        super().__init__(folder.with_name(folder.name + PARTIAL))
        self.folder, self.plain, self.pointer = folder, plain, pointer
        self.put = put or (lambda folder: point(pointer, folder))

    def write_data(self, plan, planner):
        results = super().write_data(plan, planner).value()
        answer: Any = torch.futures.Future()
        answer.set_result([Written(**vars(one), sha256=planner.hashes[one.index]) for one in results])
        return answer

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        complete(Path(self.path), self.plain, [one for of_rank in results for one in of_rank])
        folder, last = self.folder, pointed_to(self.pointer)
        if last == folder.name:  # which stays until another is in its place
            folder = folder.with_name(folder.name + AGAIN)
        if os.path.lexists(folder):
            remove(folder)
        os.rename(self.path, folder)
        files.sync(folder.parent)
        self.put(folder)
        if last and last != folder.name and last.removesuffix(AGAIN) == self.folder.name:
            remove(folder.with_name(last))


def complete(partial: Path, plain: dict, written: list) -> None:
    """Add the plain values and the hashes to a folder that has the shards of all ranks and the table."""
    holds: dict[str, int] = {}
    for one in written:
        place = one.storage_data
        holds[place.relative_path] = max(holds.get(place.relative_path, 0), place.offset + place.length)
    for name, size in holds.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size < size:
            raise UserError(f"rank 0 does not see {partial / name}, which another rank wrote: all must share that file system")
    for other in partial.iterdir():  # left by an attempt that was killed
        if other.name not in holds and other.name != TABLE:
            other.unlink()
    table = hashlib.sha256((partial / TABLE).read_bytes()).hexdigest()
    plain = plain | {"format": FORMAT, "hashes": {key_of(one.index): one.sha256 for one in written}, "table_sha256": table}
    with files.replacing(partial / PLAIN) as file:
        json.dump(plain | {"sha256": plain_sha256(plain)}, file)


def key_of(index: MetadataIndex) -> str:
    """A shard's name: that of its tensor, and where in it the shard begins."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def plain_sha256(plain: dict) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def encoded(rng: Mapping[str, Tensor]) -> dict[str, str]:
    """States of random number generators, as JSON has them."""
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in rng.items()}


def stager(device: torch.device) -> DefaultStager:
    """Copies shards to the host, on a GPU into pinned memory that is kept for the next time."""
    on_gpu = device.type == "cuda"
    return DefaultStager(
        StagingOptions(use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu)
    )


def tensors_of(model: dict[str, Tensor], optimizer: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors under the names that they have in DCP's table."""
    state = {f"optimizer.{name}.{key}": value for name, kept in optimizer.items() for key, value in kept.items()}
    return {f"model.{name}": value for name, value in model.items()} | state


def save(tensors: dict[str, Tensor], writer: Writer, together: bool = True) -> None:
    """Write a checkpoint and wait for it; all ranks must call it. UserError on all of them where one could not.

    Ranks that are not `together`, as those of `parallel.fake_ranks`, each write their part alone.
    """
    try:
        alone = not dist.is_initialized()
        with stop.held_back():
            dcp.save(tensors, storage_writer=writer, planner=Planner(), no_dist=alone, use_collectives=together)
    except (CheckpointException, OSError, RuntimeError) as error:  # the first where ranks are together
        if alone or not together or dist.get_rank() == 0:
            shutil.rmtree(writer.path, ignore_errors=True)  # it takes room, and is no checkpoint
        raise UserError(f"could not save {writer.folder}: {reason(error)}; earlier checkpoints are intact") from error


class PartWriter(Writer):
    """Writes the shards of one of `parallel.fake_ranks`; when all have written theirs, `make_one` makes one checkpoint."""

    account: tuple[Metadata, list]  # of what was written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.account = metadata, results

    def make_one(self, accounts: list[tuple[Metadata, list]]) -> None:
        table = accounts[0][0]
        for name, entry in (item for other, _ in accounts[1:] for item in tensors_in(other).items()):
            chunks = tensors_in(table)[name].chunks
            chunks += [chunk for chunk in entry.chunks if chunk not in chunks]  # what is not sharded, every part has
        try:
            super().finish(table, [of_rank for _, results in accounts for of_rank in results])
        except OSError as error:
            raise UserError(f"could not save {self.folder}: {reason(error)}; earlier checkpoints are intact") from error


def save_async(tensors: dict[str, Tensor], writer: Writer, staging: DefaultStager, group: dist.ProcessGroup | None) -> Future:
    """Copy the shards to the host, and have them written by a thread while training goes on; all ranks must call it."""
    answer = dcp.async_save(
        tensors,
        storage_writer=writer,
        planner=Planner(),
        process_group=group,
        async_stager=staging,
        no_dist=not dist.is_initialized(),
    )
    assert isinstance(answer, Future)  # as staging is not asynchronous
    return answer


def reason(error: BaseException) -> str:
    """What was wrong, in a line."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"rank {rank}: {reason(cause)}" if len(error.failures) < 2 and rank else reason(cause)
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    if isinstance(found, OSError) and found.strerror:
        return found.strerror
    if "inline_container" in str(error):  # what torch's writer of zips says of it, where another rank's cause is lost
        return "the file system took less than was written: is it full?"
    return (str(error).splitlines() or [type(error).__name__])[0]


def tensors_in(table: Metadata) -> dict[str, TensorStorageMetadata]:
    return {name: one for name, one in table.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)}
