"""Reads sharded checkpoints: each rank the shards that overlap its own, one at a time, and no byte is believed.

A folder as nanostack/sharded.py writes it may come from anywhere, and its table is a pickle: nothing is made of it but what
tables are made of, and every shard that is read has to have its hash.
"""

import base64
import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex

from nanostack.errors import UserError
from nanostack.sharded import FORMAT, PLAIN, TABLE, key_of, plain_sha256, reason, tensor_sha256, tensors_in

EARLIER = "use an earlier checkpoint of the run"

IN_A_TABLE = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
}


class _Table(pickle.Unpickler):
    """Reads DCP's table, which is a pickle, and makes nothing but what tables are made of."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):  # how some Pythons write a member of an enumeration
            return lambda kind, member: _MEM_FORMAT_ENCODING[member] if kind is _MEM_FORMAT_ENCODING else None
        if name not in IN_A_TABLE.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in one")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads shards of a folder, and checks the hash of each."""

    def __init__(self, folder: Path, hashes: Mapping[str, str], table: Metadata):
        super().__init__(folder)
        self.folder, self.hashes, self.table = folder, hashes, table
        self.storage_data = table.storage_data

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self.table

    def read_data(self, plan, planner):
        wanted: dict[MetadataIndex, list] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for index, items in wanted.items():
            shard = self.shard(index)
            for item in items:
                part = tuple(slice(at, at + size) for at, size in zip(item.storage_offsets, item.lengths, strict=True))
                target = planner.resolve_tensor(item).detach()
                target.copy_(shard[part])
                planner.commit_tensor(item, target)
        answer: Any = torch.futures.Future()
        answer.set_result(None)
        return answer

    def shard(self, index: MetadataIndex) -> Tensor:
        """The shard as it was saved. UserError where it is not."""
        place = self.storage_data[index]
        file = self.folder / place.relative_path
        what = f"{index.fqn}, the shard at {list(index.offset or ())}"
        try:
            with open(file, "rb") as stream:
                tensor = torch.load(self._slice_file(stream, place), map_location="cpu", weights_only=True)
            intact = tensor_sha256(tensor) == self.hashes[key_of(index)]
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
        except Exception as error:  # a damaged zip or pickle fails in many ways
            raise UserError(f"{file} is damaged at {what} ({type(error).__name__}); {EARLIER}") from error
        if not intact:
            raise UserError(f"{file} is damaged, or of another checkpoint: {what} is not what was saved; {EARLIER}")
        return tensor


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by their names in DCP's table. Each is read whole when it is asked for, shard by shard."""

    def __init__(self, reader: Reader):
        self.reader, self.table = reader, tensors_in(reader.table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, name: str) -> Tensor:
        known = self.table[name]
        tensor = torch.empty(known.size, dtype=known.properties.dtype)
        self.read_into({name: tensor}, alone=True)
        return tensor

    def read_into(self, targets: dict[str, Tensor], alone: bool = False) -> None:
        """Fill tensors, sharded or not, with their part of what is there. All ranks must call it, unless each reads `alone`."""
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        if alone or not dist.is_initialized() or dist.get_backend() == "fake":
            planner.set_up_planner(targets, self.reader.table, is_coordinator=True)
            self.reader.read_data(planner.finish_plan(planner.create_local_plan()), planner)
            return
        try:
            dcp.load(targets, storage_reader=self.reader, planner=planner)
        except CheckpointException as error:
            if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
                raise KeyboardInterrupt from error
            raise UserError(reason(error)) from error


class Named(Mapping[str, Tensor]):
    """Some of the tensors, under names of their own."""

    def __init__(self, shards: Shards, names: dict[str, str]):
        self.shards, self.names = shards, names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Tensor:
        return self.shards[self.names[name]]


def load(folder: Path) -> dict:
    """What `checkpoint.load` gives. Tensors are read when they are asked for; `shards` reads parts of them.

    `ranks` is how many wrote it. UserError for a folder that lacks a file, or one whose plain values or table were altered.
    """
    plain = plain_of(folder)
    raw = (folder / TABLE).read_bytes() if (folder / TABLE).is_file() else b""
    if hashlib.sha256(raw).hexdigest() != plain["table_sha256"]:
        raise UserError(f"{folder / TABLE} is {'damaged' if raw else 'missing'}; {EARLIER}")
    try:
        table = _Table(io.BytesIO(raw)).load()
        ends: dict[str, int] = {}
        for place in table.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        shards = Shards(Reader(folder, plain["hashes"], table))
        lacking = _lacking(table, plain["hashes"])
    except (pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / TABLE} is no table of a checkpoint: {error}") from error
    if lacking:
        raise UserError(f"{folder} does not hold all of {lacking}; {EARLIER}")
    for name, end in sorted(ends.items()):
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, the shards of one rank; {EARLIER}")
        if (size := (folder / name).stat().st_size) < end:
            raise UserError(f"{folder / name} is cut off: it has {size} bytes, the last shard ends at {end}; {EARLIER}")
    model = {name.removeprefix("model."): name for name in shards if name.startswith("model.")}
    kept: dict[str, dict[str, str]] = {}
    for name in (name for name in shards if name.startswith("optimizer.")):
        parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
        kept.setdefault(parameter, {})[key] = name
    rng = {name: torch.frombuffer(bytearray(base64.b64decode(raw)), dtype=torch.uint8) for name, raw in plain["rng"].items()}
    optimizer = {name: Named(shards, keys) for name, keys in kept.items()}
    found = {"model": Named(shards, model), "optimizer": optimizer, "rng": rng}
    return plain | found | {"shards": shards, "ranks": len(ends)}


def _lacking(table: Metadata, hashes: Mapping[str, str]) -> str | None:
    """A tensor of which there is no shard for some part, or a shard without its tensor or its hash; None where all is there."""
    found = {key_of(index): index.fqn for index in table.storage_data}
    for name in sorted(found.keys() ^ hashes.keys()):
        return name
    for name, one in tensors_in(table).items():
        known = [chunk for chunk in one.chunks if key_of(MetadataIndex(name, chunk.offsets)) in found]
        if sum(math.prod(chunk.sizes) for chunk in known) != math.prod(one.size):
            return name
    return next((name for name in found.values() if name not in table.state_dict_metadata), None)


def plain_of(folder: Path) -> dict:
    path = folder / PLAIN
    try:
        plain = json.loads(path.read_text())
        whole = plain.pop("sha256") == plain_sha256(plain)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not what was written"
        raise UserError(f"{path} is missing or damaged ({why}); {EARLIER}") from error
    if plain.get("format") != FORMAT:
        raise UserError(f"{folder} is not a nanostack checkpoint of format {FORMAT} (found {plain.get('format')!r})")
    if not whole:
        raise UserError(f"{path} is damaged: its values are not what was saved; {EARLIER}")
    return plain
