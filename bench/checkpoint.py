"""Saving and reading a state: one file against shards; the peak of host memory on every rank, and seconds.

    python bench/checkpoint.py [--params 0.5] [--ranks 2] [--at FOLDER] [--json]

Each form has a launch of its own by torchrun, on the CPU: every rank makes its part of a model and of AdamW's moments, saves it
as a run does, and reads it again. Stalled is how long `save` keeps training; written, when all is on disk. Memory is what a
rank's peak (VmHWM) rises over what it held before. The page cache is not counted.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from bench import ROOT
from bench.results import place, write_result
from nanostack import checkpoint, parallel
from nanostack.config import Optim, Parallel
from nanostack.errors import UserError, command_line
from nanostack.flops import n_params
from nanostack.model import LlamaConfig
from nanostack.optimizer import MOMENTS
from nanostack.provenance import device_name
from nanostack.state import State

FORMS = ("file", "sharded")


@dataclass(frozen=True)
class Command:
    """Time saving one file beside saving shards."""

    params: float = 0.5
    """Billions of parameters."""
    ranks: int = 2
    at: Path | None = None
    """A folder for the checkpoints; the system's for temporary files unless given."""
    out: Path | None = None
    """Result file; in bench/results/ by device."""
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def shape(params: float) -> LlamaConfig:
    """A Llama of about so many billions of parameters."""
    n_layer = max(1, round((params * 1e9 - 2 * 32_000 * 1536) / (4 * 1536**2 + 3 * 1536 * 4096)))
    return LlamaConfig(n_layer, 12, 12, 1536, 4096, 32_000, 2048)


def held(which: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def measure(work) -> tuple[float, int]:
    """Seconds, and bytes that the peak rose over what was held before."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = held("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - began, held("VmHWM") - before


def worker(form: str, params: float, folder: Path) -> None:
    """One rank: make, save, read; rank 0 prints what all ranks measured."""
    placement = parallel.start(Parallel(), "float32", compile=False)
    state = State.create(shape(params), Optim(), placement, seed=0)
    for parameter in state.model.parameters():
        moments = {name: torch.rand_like(parameter) for name in MOMENTS}
        state.optimizer.state[parameter] = {"step": torch.ones(())} | moments
    found: dict = {}

    def saved() -> None:
        with checkpoint.Saver(folder / "ckpt.pt", None, 1, form == "sharded", print) as saver:
            began = time.perf_counter()
            saver.save(state)
            found["stalled, s"] = time.perf_counter() - began

    dist.barrier()
    found["written, s"], found["saving, bytes"] = measure(saved)
    dist.barrier()
    found["state, bytes"] = sum(p.to_local().nbytes * 3 for p in state.model.parameters())

    def read() -> None:
        State.restore(checkpoint.load(folder / "ckpt.pt"), Optim(), placement)

    found["reading, s"], found["reading, bytes"] = measure(read)
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if parallel.is_main_rank():
        print(json.dumps(ranks))
    parallel.leave()


def main(command: Command) -> dict:
    if command.params <= 0 or command.ranks < 2:
        raise UserError(f"params must be positive and ranks at least 2, not {command.params:g} and {command.ranks}")
    console, model = Console(stderr=command.json, highlight=False), shape(command.params)
    table = Table("form", "rank", "its state, GiB", "saving, + GiB", "stalled, s", "written, s", "reading, + GiB", "reading, s")
    out = place("checkpoint", device_name(torch.device("cpu")), command.out)
    result: dict = {"n_params": n_params(model), "ranks": command.ranks, "device": device_name(torch.device("cpu"))}
    for form in FORMS:
        with tempfile.TemporaryDirectory(dir=command.at) as folder:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(command.ranks)]
            words = [str(Path(__file__).resolve()), "worker", form, str(command.params), folder]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*launch, *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise UserError(f"{form}: {done.stderr[-2000:]}")
        result[form] = json.loads(done.stdout.splitlines()[-1])
        for rank, one in enumerate(result[form]):
            gib = (f"{one[name] / 2**30:.2f}" for name in ("state, bytes", "saving, bytes", "reading, bytes"))
            state, saving, reading = gib
            seconds = (f"{one[name]:.1f}" for name in ("stalled, s", "written, s"))
            table.add_row(form, str(rank), state, saving, *seconds, reading, f"{one['reading, s']:.1f}")
    console.print(table)
    write_result(result, out)
    console.print(f"wrote {out}")
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
    else:
        command_line(Command, main, __doc__)
