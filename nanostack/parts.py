"""Sharded checkpoints too large for one process: processes play the ranks of a mesh in turn, one part in memory at a time."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from nanostack import checkpoint, models, sharded
from nanostack.growth import Growth, Receipt
from nanostack.growth.moments import RESET
from nanostack.parallel import Placement


def grow(source: Path, how: Growth, pointer: Path, device: torch.device, done: Callable[[], object]) -> Receipt:
    """Grow a sharded checkpoint in depth, into the one that `pointer` is to name. Calls `done()` after every part.

    There are as many parts as ranks that wrote it. Returns the receipt, whose bytes are those of the first part. UserError
    as `grow`.
    """
    parts = models.read(source)["ranks"]
    # torch keeps what it found out about a mesh, whichever rank asks: every part has a process of its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanostack.parts"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        found = []
        for part in range(parts):
            found.append(pool.submit(_grow_part, source, how, pointer, device, part, parts).result())
            done()
    receipt, plain, _ = found[0]
    sharded.PartWriter(pointer.with_suffix(""), plain, pointer).make_one([written for *_, written in found])
    return receipt


def _grow_part(source: Path, how: Growth, pointer: Path, device: torch.device, part: int, parts: int) -> tuple:
    """Write one part. Returns the receipt, the plain values, and DCP's account of what was written."""
    saved = models.read(source)
    if how.moments() == RESET:
        saved["optimizer"] = {}  # never to be read
    with sharded.in_turn(part, parts, device) as mesh:
        state = models.restore(saved, replace(Placement(device), mesh=mesh), optimizer=True)
        receipt = state.grow(how)
        writer = checkpoint.part_writer(state, pointer, saved["manifest_sha256"])
        sharded.save(checkpoint.shards(state), writer, together=False)
    return receipt, writer.plain, writer.account
