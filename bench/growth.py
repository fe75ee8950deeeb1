"""Growing in place beside the usual way: time, peak memory, host traffic; ×4 by stack, shapes of config/.

    python bench/growth.py [--shapes 410m 1b] [--samples 3] [--json]

in place           nanostack.growth.grow, new moments zero (the paper's reset)
in place, moments  the same, Adam's moments and steps copied with the layers
by way of the host what else one does: state dict to the host, old model freed, big model built there (without initialising
                   it), layers copied, moved to the device, a new optimizer; its moments are lost

Every sample is a process of its own, which warms up on a tiny model, so that nothing is in any cache or pool. Reported are the
median and the range; the peak beyond the larger of the states before and after, in layers; bytes between host and device
(from a trace; none exist where the device is the host); and the share of the device's own copy rate that the copying
reached, allocation included. Shapes that do not fit are named and left out. Results go to bench/results/.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench import ROOT
from bench.results import place, write_result
from nanostack import growth
from nanostack.config import Optim, load
from nanostack.device import choose_device, free_bytes
from nanostack.errors import UserError, command_line
from nanostack.flops import n_params
from nanostack.growth.moments import COPY, RESET
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import make_optimizer
from nanostack.provenance import device_name

G = 4
WAYS = ("in place", "in place, moments", "by way of the host")
TINY = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=128, vocab_size=256, seq_len=64)


@dataclass(frozen=True)
class Command:
    """Time growing in place beside the usual way."""

    shapes: tuple[str, ...] = ("410m", "1b", "3b", "7b")
    """Names of configs whose first stage is the base."""
    samples: int = 3
    traced: bool = True
    """On a GPU, grow once more under the profiler, which counts the bytes between host and device."""
    out: Path | None = None
    """Result file; in bench/results/ by the name of the device."""
    json: bool = False
    """Print the result as one JSON object."""


def base_of(name: str) -> LlamaConfig:
    """The base that a config begins with, with the paper's vocabulary where it leaves that open."""
    model = TINY if name == "tiny" else load(str(ROOT / f"config/{name}.py"), []).model
    return replace(model, vocab_size=model.vocab_size or 32000)


def built(config: LlamaConfig, device: torch.device) -> tuple[Llama, torch.optim.AdamW]:
    """A base in training: weights, moments, steps."""
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device=device)
    model.init_weights(seed=0)
    optimizer = make_optimizer(model, Optim())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.ones((), device=device),
            "exp_avg": torch.zeros_like(parameter).add_(1e-3),  # written to: memory that is only promised costs nothing
            "exp_avg_sq": torch.zeros_like(parameter).add_(1e-6),
        }
    return model, optimizer


def grown_in_place(base: list, way: str) -> tuple:
    model, optimizer = base
    receipt = growth.grow(model, optimizer, op="stack", g=G, moments=COPY if way.endswith("moments") else RESET)
    return model, optimizer, receipt["bytes_copied_on_device"]


def grown_by_way_of_the_host(base: list, way: str) -> tuple:
    model, optimizer = base
    device, config, n_base = model.embed.weight.device, model.config, len(model.blocks)
    saved = {name: value.cpu() for name, value in model.state_dict().items()}
    base.clear()
    del model, optimizer
    with torch.device("meta"):
        big = Llama(replace(config, n_layer=G * n_base))
    big.to_empty(device="cpu")
    big.init_rope()
    wanted = {}
    for name in big.state_dict():
        words = name.split(".")
        if words[0] == "blocks":
            words[1] = str(int(words[1]) % n_base)
        wanted[name] = saved[".".join(words)]
    big.load_state_dict(wanted)
    big.to(device)
    return big, make_optimizer(big, Optim()), sum(p.nbytes for p in big.parameters())


def sample(name: str, way: str, device_type: str, traced: bool = False) -> dict:
    """Grow once, in this process. With `traced`, only the bytes that passed between host and device."""
    device = torch.device(device_type)
    grow = grown_by_way_of_the_host if way == WAYS[2] else grown_in_place
    grow(list(built(TINY, device)), way)
    memory = Memory(device)
    base = list(built(base_of(name), device))
    gc.collect()
    if traced:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            grow(base, way)
            torch.cuda.synchronize()
        return {"bytes_host": host_traffic(trace)}
    before = bytes_of(*base)
    memory.forget_peak()
    wait(device)
    started = time.perf_counter()
    model, optimizer, copied = grow(base, way)
    wait(device)
    seconds = time.perf_counter() - started
    state = bytes_of(model, optimizer)
    layer = sum(p.nbytes for p in model.blocks[0].parameters())
    peak = memory.peak()
    del model, optimizer, base
    rate = copy_rate(device)
    sizes = {"peak": peak, "before": before, "state": state, "layer": layer, "copied": copied}
    return {"seconds": seconds, "copy_rate": rate} | sizes


def bytes_of(model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters and optimizer state."""
    moments = (value for values in optimizer.state.values() for value in values.values())
    return sum(p.nbytes for p in model.parameters()) + sum(value.nbytes for value in moments)


class Memory:
    """Memory in use beyond what was in use when this was made: of the GPU's allocator, or resident in this process."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before = self._now("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()

    def forget_peak(self) -> None:
        if self.device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        else:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        now = self._now("VmHWM") if self.device.type == "cpu" else torch.cuda.max_memory_allocated()
        return now - self.before

    @staticmethod
    def _now(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: torch.device, size: int = 2**29, times: int = 9) -> float:
    """Bytes per second, read and written, of copying one warm tensor to another."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(times):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size / statistics.median(seconds)


def host_traffic(trace: profile) -> int:
    """Bytes copied between host and device in a trace."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copies = [event for event in events if any(way in event.get("name", "") for way in ("Memcpy HtoD", "Memcpy DtoH"))]
    return sum(event["args"]["bytes"] for event in copies)


def alone(function: Callable, *arguments):
    """What it returns, called in a fresh process, whose memory is gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(name: str, way: str, device: torch.device, samples: int, traced: bool) -> dict:
    found = [alone(sample, name, way, device.type) for _ in range(samples)]
    seconds = sorted(one["seconds"] for one in found)
    best = {key: statistics.median(one[key] for one in found) for key in ("peak", "copy_rate")}
    first, median = found[0], statistics.median(seconds)
    return {
        "shape": name,
        "way": way,
        "n_params": n_params(replace(base_of(name), n_layer=G * base_of(name).n_layer)),
        "seconds": median,
        "seconds_range": [seconds[0], seconds[-1]],
        "peak_bytes": best["peak"],
        "state_bytes_before": first["before"],
        "state_bytes": first["state"],
        "layers_beyond": (best["peak"] - max(first["before"], first["state"])) / first["layer"],
        "bytes_copied": first["copied"],
        "bytes_host": alone(sample, name, way, device.type, True)["bytes_host"] if traced and device.type == "cuda" else None,
        "copy_bytes_per_s": best["copy_rate"],
        "of_copy_rate": 2 * first["copied"] / median / best["copy_rate"],
    }


def bytes_needed(name: str) -> int:
    """By the most demanding of the ways: weights and both moments of the grown model."""
    base = base_of(name)
    return 12 * n_params(replace(base, n_layer=G * base.n_layer))


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 140)
    if command.samples < 1:
        raise UserError(f"samples is {command.samples}; at least 1 is needed")
    device = choose_device("auto")
    known = [*sorted(path.stem for path in (ROOT / "config").glob("*.py")), "tiny"]
    if unknown := set(command.shapes) - set(known):
        raise UserError(f"there is no shape {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise UserError("memory without a GPU is read from Linux's /proc, which is not here")
    room = 0.9 * free_bytes(device)
    left_out = {name: bytes_needed(name) for name in command.shapes if bytes_needed(name) > room}
    for name, needed in left_out.items():
        console.print(f"{name} left out: it needs {needed / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free")
    jobs = [(name, way) for name in command.shapes if name not in left_out for way in WAYS]
    if not jobs:
        raise UserError("no shape is left to measure")
    rows, out = [], place("growth", device_name(device), command.out)
    answer = {"what": "bench/growth.py", "device": device_name(device), "g": G, "samples": command.samples}
    answer |= {"left_out": left_out, "rows": rows}
    for job in track(jobs, "growing", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        rows.append(measure(*job, device, command.samples, command.traced))
        first = next(row for row in rows if row["shape"] == job[0])
        rows[-1]["times_in_place"] = rows[-1]["seconds"] / first["seconds"]
        write_result(answer, out)
    console.print(table(answer))
    console.print(f"wrote {out}", soft_wrap=True)
    return answer


HEAD = ("shape", "way", "seconds", "range", "× in place", "peak GiB", "layers beyond", "host GiB", "% of copy rate")


def cells(result: dict) -> list[list[str]]:
    """A row under HEAD for every shape and way."""
    shown = []
    for row in result["rows"]:
        low, high = row["seconds_range"]
        times = [f"{row['seconds']:.3f}", f"{low:.3f}-{high:.3f}", f"{row['times_in_place']:.2f}"]
        memory = [f"{row['peak_bytes'] / 2**30:.2f}", f"{row['layers_beyond']:.2f}"]
        host = "-" if row["bytes_host"] is None else f"{row['bytes_host'] / 2**30:.2f}"
        shown.append([row["shape"], row["way"], *times, *memory, host, f"{100 * row['of_copy_rate']:.0f}"])
    return shown


def table(result: dict) -> Table:
    shown = Table(*HEAD, title=f"growing ×{G} on {result['device']}")
    for row in cells(result):
        shown.add_row(*row)
    return shown


if __name__ == "__main__":
    command_line(Command, main)
