"""What is done on disk to checkpoints that no process could hold: one part, or one tensor, is in memory at a time."""

import mmap
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanostack import checkpoint, files, models, sharded, stop
from nanostack.errors import UserError
from nanostack.growth import Growth, Receipt
from nanostack.growth.moments import RESET
from nanostack.micro_step import MicroStep
from nanostack.parallel import Placement, fake_ranks
from nanostack.state import State
from nanostack.text.dataset import Prefetcher, Tokens

TOGETHER = 4  # sequences that go through the model at a time, at most


def grow(source: Path, how: Growth, pointer: Path, device: torch.device, done: Callable[[], object]) -> Receipt:
    """Grow a sharded checkpoint in depth, into the one that `pointer` is to name. Calls `done()` after every part.

    There are as many parts as ranks that wrote it. Returns the receipt, whose bytes are those of the first part. UserError
    as `grow`.
    """
    parts = models.read(source)["ranks"]
    # torch keeps what it found out about a mesh, whichever rank asks: every part has a process of its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanostack.parts"])
    writer = sharded.PartWriter(pointer.with_suffix(""), {}, pointer)
    try:
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            found = []
            for part in range(parts):
                found.append(pool.submit(_grow_part, source, how, pointer, device, part, parts).result())
                done()
        receipt, writer.plain, _ = found[0]
        writer.make_one([written for *_, written in found])
    except BaseException:
        shutil.rmtree(writer.path, ignore_errors=True)  # parts are no checkpoint
        raise
    return receipt


def _grow_part(source: Path, how: Growth, pointer: Path, device: torch.device, part: int, parts: int) -> tuple:
    """Write one part. Returns the receipt, the plain values, and DCP's account of what was written."""
    saved = models.read(source)
    if how.moments() == RESET:
        saved["optimizer"] = {}  # never to be read
    with fake_ranks((1, parts), part, device.type) as mesh:
        state = models.restore(saved, replace(Placement(device), mesh=mesh), optimizer=True)
        receipt = state.grow(how)
        writer = checkpoint.part_writer(state, pointer, saved["manifest_sha256"])
        sharded.save(checkpoint.shards(state), writer, together=False)
    return receipt, writer.plain, writer.account


def to_shards(saved: dict, path: Path) -> None:
    """Write what `checkpoint.load` read of one file as a sharded checkpoint that `path` points to. UserError if that fails."""
    plain = {k: v for k, v in saved.items() if k not in ("model", "optimizer", "hashes", "format")}
    writer = sharded.Writer(path.with_suffix(""), plain | {"rng": sharded.encoded(saved["rng"])}, path)
    sharded.save(sharded.tensors_of(saved["model"], saved["optimizer"]), writer)


def to_file(saved: dict, path: Path) -> None:
    """Write what `checkpoint.load` read of a sharded checkpoint as one file. UserError if it cannot be.

    The tensors are read twice, as their hashes stand in the file before they do. torch.save leaves room for them, which is
    filled through a memory map.
    """
    shards, of_a_folder = saved["shards"], ("shards", "ranks", "table_sha256")
    contents = {k: v for k, v in saved.items() if k not in of_a_folder} | {"format": checkpoint.FORMAT}
    hashes = {name: sharded.tensor_sha256(shards[name]) for name in shards}
    hashes |= {f"rng.{name}": sharded.tensor_sha256(state) for name, state in saved["rng"].items()}
    contents["hashes"] = checkpoint.with_plain(hashes, contents)
    with FakeTensorMode():
        room = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in shards.table.items()}
    contents["model"] = {name: room[f"model.{name}"] for name in saved["model"]}
    contents["optimizer"] = {
        name: {key: room[f"optimizer.{name}.{key}"] for key in keys} for name, keys in saved["optimizer"].items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path, "wb") as file:
            with torch.serialization.skip_data(materialize_fake_tensors=True), stop.held_back():
                torch.save(contents, file)
            file.flush()
            if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk would end the process below
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                places = checkpoint.all_tensors(torch.load(file.name, mmap=True, weights_only=True))
            for name, place in places.items():
                place.copy_(saved["rng"][name.removeprefix("rng.")] if name.startswith("rng.") else shards[name])
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not save {path}: {sharded.reason(error)}; what was there is intact") from error


def gradients_of(
    state: State, text: Tokens, steps: int, batch_tokens: int, done: Callable[[], object]
) -> Callable[[], torch.Tensor]:
    """A function that puts the gradients of the next batch into the model, moves the cursor past it, and returns the loss.

    It can be called `steps` times, and calls `done()`.
    """
    size, first = batch_tokens // text.seq_len, state.cursor.samples
    each = max(n for n in range(1, TOGETHER + 1) if size % n == 0)
    step = MicroStep(size // each, graphed=False)
    samples = ((start, start + each) for start in range(first, first + steps * size, each))
    batches = Prefetcher(text, samples, device=state.placement.device)

    def gradients() -> torch.Tensor:
        loss = step.accumulate(state.model, batches)
        state.cursor.advance(size, state.model.config)
        done()
        return loss

    return gradients
