"""Every fused operation, forward and backward, beside what one would use instead, and beside what the machine can do at all.

    python bench/kernel_ops.py [--op rms_norm swiglu] [--shape 16384x2048] [--samples 50] [--json]

Ours, torch eager, torch.compile, SDPA forced to flash and to cuDNN, F.linear_cross_entropy and Liger (the extra peers)
are called in turn within one run; so are a large copy and a large matrix product, whose rates are the roofline. Reported are
the median, the spread (half the distance between the quartiles, as a share of the median), the rate that follows from the bytes
or FLOPs which the operation must spend, and that rate as a share of the roofline. Table, JSON and bar chart go to
bench/results/.

In bfloat16; without a GPU in float32, at the shapes of 8 layers × 192, what runs there: C if there is a compiler, else torch.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.ops import OPS, OURS, SHAPES, Apart, dtype_on
from bench.results import picture, place, write_result
from nanostack.device import choose_device
from nanostack.errors import UserError, command_line
from nanostack.flops import peak_by_name
from nanostack.kernels.timing import interleaved
from nanostack.provenance import device_name

ROOFLINE = "roofline"
NO_GPU_WAYS = (OURS, "torch eager", "F.linear_cross_entropy")
# The last four where this GPU, this torch and what is installed have them
WAYS = (*NO_GPU_WAYS, "torch.compile", "SDPA flash", "SDPA cuDNN", "Liger")


@dataclass(frozen=True)
class Command:
    """Time the kernels against their peers."""

    op: tuple[str, ...] = ()
    """Only these operations."""
    shape: tuple[str, ...] = ()
    """Only shapes whose name contains one of these."""
    way: tuple[str, ...] = ()
    """Beside ours only these ways, by their names in the table."""
    samples: int = 50
    """Calls of each that are timed."""
    out: Path | None = None
    """The JSON file; the picture stands beside it. Default: bench/results/kernels-DEVICE.json"""
    floor: bool = False
    """Instead of timing: print what each must spend and what that takes an H200 by its data sheet, as in docs/kernels.md."""
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def passes(way: Callable, inputs: tuple[Tensor, ...], backward_alone: bool) -> dict[str, Callable[[], object]]:
    """Forward alone, backward alone and both of one way, to be timed; they run here first, so what cannot work fails here."""
    outputs, upstream = forward_with_grad(way, inputs)

    @torch.no_grad()
    def forward():
        return way(*inputs)

    def backward():
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

    def both():
        return torch.autograd.grad(as_tuple(way(*inputs)), inputs, upstream)

    calls = {"forward": forward, "backward": backward, "both": both}
    if not backward_alone:
        del calls["backward"]
    for call in calls.values():
        call()
    return calls


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forward_with_grad(way: Callable, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs, and a gradient to send back through each."""
    outputs = as_tuple(way(*inputs))
    return outputs, [torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out) for out in outputs]


def extra_bytes(way: Callable, inputs: tuple[Tensor, ...]) -> int | None:
    """Peak memory that forward and backward take beyond the inputs and their gradients (CUDA)."""
    device = inputs[0].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs, upstream = forward_with_grad(way, inputs)
    torch.autograd.grad(outputs, inputs, upstream)
    gradients = sum(x.nbytes for x in inputs)
    return torch.cuda.max_memory_allocated(device) - before - gradients


def roofline(device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """A large copy and a large matrix product, with the bytes and FLOPs they are."""
    numbers, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    source = torch.empty(numbers // 2, dtype=dtype_on(device), device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype_on(device)) for _ in range(2))
    return {"bytes": (lambda: target.copy_(source), 2 * source.nbytes), "flops": (lambda: a @ b, 2 * side**3)}


def measure(op: str, shape: tuple[int, ...], device: torch.device, samples: int, only: tuple[str, ...] = ()) -> list[dict]:
    """Rows of the result for one operation at one shape: of all ways, or of ours and those named in `only`."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # a shape is compiled for itself, and not given up on after eight others
    work = OPS[op](device, *shape)
    limit, limit_size = roofline(device)[work.unit]
    timed: dict[tuple[str, str], Callable] = {(ROOFLINE, "forward"): limit}
    failures, memory = {}, {}
    for name, way in work.ways.items():
        if (device.type != "cuda" and name not in NO_GPU_WAYS) or (only and name not in (OURS, *only)):
            continue
        way, inputs = (way.way, way.inputs) if isinstance(way, Apart) else (way, work.inputs)
        try:
            timed |= {(name, direction): call for direction, call in passes(way, inputs, work.backward_alone).items()}
            memory[name] = extra_bytes(way, inputs)
        except Exception as error:  # a peer may not know this GPU or shape; ours has to
            if name == OURS:
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    seconds = interleaved(timed, samples, device)
    best_rate = limit_size / statistics.median(seconds.pop((ROOFLINE, "forward")))
    about = {"op": op, "shape": "x".join(map(str, shape)), "unit": work.unit, "roofline_per_s": best_rate}
    rows = []
    for (name, direction), taken in seconds.items():
        low, median, high = statistics.quantiles(taken, n=4)
        needed = {"forward": work.forward, "backward": work.backward, "both": work.forward + work.backward}
        rate = needed[direction] / median
        numbers = {"seconds": median, "spread": (high - low) / 2 / median, "per_s": rate, "of_roofline": rate / best_rate}
        rows.append(about | {"way": name, "direction": direction, "extra_bytes": memory[name]} | numbers)
    rows += [about | {"way": name, "failed": why} for name, why in failures.items()]
    return rows


H200 = {"bytes": 4.8e12, "flops": peak_by_name("H200")}  # per second: memory of the data sheet, and dense bf16


def floors(shapes: list[tuple[str, tuple[int, ...]]]) -> list[dict]:
    """What each operation must spend and the least time that this takes an H200. No tensor is filled."""
    answer = []
    for op, shape in shapes:
        work = OPS[op](torch.device("meta"), *shape)
        spent = {"forward": work.forward, "backward": work.backward, "unit": work.unit}
        seconds = {f"floor_{d}_us": 1e6 * spent[d] / H200[work.unit] for d in ("forward", "backward")}
        answer.append({"op": op, "shape": "x".join(map(str, shape))} | spent | seconds)
    return answer


def floor_table(rows: list[dict]) -> str:
    lines = ["| op | shape | forward | floor | backward | floor |", "|---|---|--:|--:|--:|--:|"]
    for row in rows:
        scale, unit = (1e6, "MB") if row["unit"] == "bytes" else (1e9, "GFLOP")
        cells = (f"{row[d] / scale:,.0f} {unit} | {row[f'floor_{d}_us']:,.0f} µs" for d in ("forward", "backward"))
        lines.append(f"| {row['op']} | {row['shape']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(rows: list[dict], console: Console) -> None:
    table = Table(title="kernels and their peers (median; ours / theirs in time: above 1 we are faster)")
    for name in ("op", "shape", "way", "direction", "ms", "± %", "rate", "of roofline", "theirs / ours", "extra MiB"):
        table.add_column(name, justify="left" if name in ("op", "shape", "way", "direction") else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["op"], row["shape"], row["way"], "failed: " + row["failed"], *[""] * 6)
            continue
        unit = "TB/s" if row["unit"] == "bytes" else "TFLOP/s"
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:,.0f}"
        numbers = f"{1e3 * row['seconds']:.4f}", f"{100 * row['spread']:.1f}", f"{row['per_s'] / 1e12:.3f} {unit}"
        share, gain = f"{100 * row['of_roofline']:.1f} %", f"{ratio(row, rows):.2f}"
        table.add_row(row["op"], row["shape"], row["way"], row["direction"], *numbers, share, gain, memory)
    console.print(table)


def ratio(row: dict, rows: list[dict]) -> float:
    """Seconds of this way over ours: how many times as fast ours is."""
    same = ("op", "shape", "direction")
    ours = next(r for r in rows if r["way"] == OURS and all(r[key] == row[key] for key in same))
    return row["seconds"] / ours["seconds"]


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Share of the roofline, a panel per direction, a group of bars per operation and shape, a bar per way."""
    rows = [row for row in rows if "failed" not in row]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    groups = list(dict.fromkeys((row["op"], row["shape"]) for row in rows))
    figure, panels = plt.subplots(3, 1, figsize=(max(8, 1.1 * len(groups) + 2), 10), dpi=130, sharex=True)
    for axes, direction in zip(panels, ("forward", "backward", "both"), strict=True):
        for i, way in enumerate(ways):
            found = {(row["op"], row["shape"]): row for row in rows if row["way"] == way and row["direction"] == direction}
            at = [g + (i - (len(ways) - 1) / 2) * 0.8 / len(ways) for g, group in enumerate(groups) if group in found]
            heights = [100 * found[group]["of_roofline"] for group in groups if group in found]
            axes.bar(at, heights, 0.8 / len(ways), label=way, color="#d1495b" if way == OURS else plt.cm.Greys(0.3 + 0.12 * i))
        axes.axhline(100, color="black", lw=0.6)
        axes.set_ylabel(f"{direction}\n% of the machine's own rate")
        axes.grid(axis="y", alpha=0.25)
    panels[0].legend(frameon=False, ncols=len(ways), loc="lower left", bbox_to_anchor=(0, 1))
    panels[0].set_title(title, pad=28, fontsize=10)
    panels[-1].set_xticks(range(len(groups)), [f"{op}\n{shape}" for op, shape in groups], rotation=30, ha="right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 180)
    device = choose_device("auto")
    unknown = set(command.op) - set(OPS)
    if unknown:
        raise UserError(f"there is no operation {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    if unknown := set(command.way) - set(WAYS):
        raise UserError(f"there is no way {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    if command.samples < 4:
        raise UserError(f"samples is {command.samples}; quartiles need at least 4")
    sizes = SHAPES["cuda" if command.floor else device.type]
    shapes = [(op, shape) for op in (command.op or OPS) for shape in sizes[op]]
    shapes = [(op, s) for op, s in shapes if not command.shape or any(part in "x".join(map(str, s)) for part in command.shape)]
    if not shapes:
        raise UserError(f"no shape here is named like {' or '.join(command.shape)}")
    if command.floor:
        rows = floors(shapes)
        console.print(floor_table(rows), soft_wrap=True)
        return {"what": "least work and time by data sheet", "device": "NVIDIA H200", "per_s": H200, "rows": rows}
    if device.type == "cpu":
        console.print("no GPU: float32, in C or torch; nothing here is about the Triton kernels")
    out = place("kernels", device_name(device), command.out)
    rows: list[dict] = []
    answer = {"what": "bench/kernel_ops.py", "device": device_name(device), "samples": command.samples}
    answer["dtype"] = str(dtype_on(device)).removeprefix("torch.")
    answer["rows"] = rows
    for op, shape in track(shapes, "timing", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        rows += measure(op, shape, device, command.samples, command.way)
        write_result(answer, out, ("liger-kernel",))
    if drawing := picture(out):
        draw(rows, f"kernels on {answer['device']}, {answer['dtype']}, median of {command.samples}", drawing)
    show(rows, console)
    console.print(f"wrote {out}" + (f" and {drawing}" if drawing else ""), soft_wrap=True)
    return answer


if __name__ == "__main__":
    command_line(Command, main)
