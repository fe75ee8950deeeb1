"""Where the milliseconds of a training step go, by operation.

    python bench/timeline.py [CONFIG]              measured: torch's profiler over steps of train.py's own loop, on this device
    python bench/timeline.py --estimate [CONFIG]   from FLOPs and bytes and an H200's data sheet: an estimate, nothing is run

CONFIG is config/1b.py with a GPU or --estimate, config/quickstart.py without; options of train.py may follow. Without
--data.path, the batches are random ids. JSON goes to bench/results/.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench import ROOT
from bench.results import place, write_result
from bench.throughput import default_config, ours, timed
from nanostack.config import Optim, Train, load
from nanostack.device import choose_device
from nanostack.errors import UserError, command_line
from nanostack.flops import MFU, mfu, n_matmul, n_matrices, n_params, newton_schulz_flops, peak_by_name
from nanostack.kernels.linear_cross_entropy import CHUNK_BYTES, CHUNK_ROWS
from nanostack.model import LlamaConfig
from nanostack.optimizer import state_numbers
from nanostack.provenance import device_name

KINDS = {  # the first whose pattern is found in the name of a kernel or, on a CPU, an operation
    "attention": r"attention|flash|fmha|cudnn.*sdpa",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|aten::(b?addb?)?mm|aten::bmm",  # Newton–Schulz's too
    "RMSNorm": r"rms_?norm",
    "rotary": r"rotary",
    "SwiGLU": r"swiglu",
    "cross entropy": r"cross_entropy",
    "optimizer, clipping": r"adam|multi_tensor|foreach|linalg_vector_norm",
    "copies, fills": r"memcpy|memset|copy|fill|aten::cat",
    "other elementwise": r"elementwise|reduce|triton_|aten::(add|mul|sum|div|index|embedding)|scatter|gather",
}
REST = "all else"


@dataclass(frozen=True)
class Command:
    """Where does a step's time go?"""

    config: tyro.conf.Positional[str] = ""
    """Its last stage's model is taken. Default: config/1b.py on a GPU, config/quickstart.py without."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Changes to it as train.py takes them: all options that are not named here."""
    estimate: bool = False
    """Estimate an H200's step from FLOPs and bytes."""
    steps: int = 4
    """Profiled, after as many that are not."""
    accumulate: int = 4
    """Micro-batches a step at most, where the config has more."""
    out: Path | None = None
    """Result file; in bench/results/ by config and device."""
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def measured(config: Train, steps: int) -> dict[str, float]:
    """{kind: milliseconds of a step}; what the device idles, or Python takes on a CPU, is in `all else`."""
    cuda, count, bounds = torch.cuda.is_available(), 0, []
    trace = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def mark():
        nonlocal count
        count += 1
        if count in (steps, 2 * steps):
            if cuda:
                torch.cuda.synchronize()
            trace.start() if count == steps else trace.stop()

    ours(config, mark)
    found = defaultdict(float)
    for event in trace.events():
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        bounds += [event.time_range.start, event.time_range.end]
        found[kind(event.name)] += took / 1e3 / steps
    if not bounds:
        raise UserError("the profiler saw no kernel on the device: is CUPTI installed, and allowed to this user?")
    whole = (max(bounds) - min(bounds)) / 1e3 / steps
    found[REST] += max(0.0, whole - sum(found.values()))
    return dict(found)


@dataclass(frozen=True)
class Machine:
    """A data sheet, and what share of it is assumed to be reached."""

    name: str
    flops: float  # dense bf16 per second
    bytes: float  # per second
    products: float  # shares: of flops by matrix products, by attention; of bytes
    attention: float
    bandwidth: float


H200 = Machine("H200", peak_by_name("H200") or 0.0, 4.8e12, products=0.72, attention=0.55, bandwidth=0.85)


def estimated(model: LlamaConfig, rows: int, parts: int, optim: Optim, gpu: Machine = H200) -> dict[str, float]:
    """{kind: milliseconds of a step} of `parts` micro-batches of `rows` tokens, in bf16 over fp32 masters, nothing recomputed.

    Bytes are those of docs/kernels.md: every operation reads and writes what it must once.
    """
    n, d, f, v = rows, model.d_model, model.d_ff, model.vocab_size
    heads, weights = model.n_head + 2 * model.n_kv_head, n_params(model)
    in_blocks = n_matrices(model)
    s = 2  # bytes of bf16
    layer = {
        "RMSNorm": s * n * d * ((2 + 4) + (3 + 4)),  # alone and fused with the addition; forward, backward
        "rotary": 2 * 2 * s * n * (model.n_head + model.n_kv_head) * model.head_dim,
        "SwiGLU": s * n * f * (3 + 5),
        "other elementwise": s * n * d * (3 + 3),  # the second addition to the residual stream, the sum of its gradients
    }
    moved = {name: model.depth * size for name, size in layer.items()}
    # logits and their gradients; of the head: the bf16 copy, and its gradient zeroed, added to by every chunk, scaled, added
    chunks = -(-n // max(CHUNK_ROWS, CHUNK_BYTES // (4 * v)))
    moved["cross entropy"] = (8 + 3 * s) * n * v + (6 + 4 + 8 * chunks + 8 + 12) * v * d
    moved["other elementwise"] += (4 + 12) * v * d  # the embedding's gradient: zeroed, added
    moved["copies, fills"] = s * n * heads * model.head_dim * 2 * model.depth  # gradients of q, k, v put side by side
    flops = {
        "matrix products": 6 * n * n_matmul(model),
        "attention": 3.5 * 2 * n * model.seq_len * model.n_head * model.head_dim * model.depth,  # causal; backward 2.5 times
    }
    share = {"matrix products": gpu.products, "attention": gpu.attention}
    found = {name: parts * amount / (gpu.flops * share[name]) * 1e3 for name, amount in flops.items()}
    # fp32 gradients are added to in place: read and written beside each product
    found["matrix products"] += parts * 8 * model.loops * in_blocks / (gpu.bytes * gpu.bandwidth) * 1e3
    found |= {name: parts * size / (gpu.bytes * gpu.bandwidth) * 1e3 for name, size in moved.items()}
    # once a step: weight, gradient and state read, weight and state written; the norm; gradients zeroed; bf16 copies made
    kept = 2 * getattr(torch, optim.moments).itemsize * state_numbers(model, optim.name)
    if optim.name == "muon":  # five times X·Xᵀ, its square, and that times X; X is read twice and written once each time
        products = newton_schulz_flops(model) / (gpu.flops * gpu.products)
        found["Newton–Schulz"] = (products + 5 * 3 * s * in_blocks / (gpu.bytes * gpu.bandwidth)) * 1e3
        kept += 4 * s * in_blocks  # what is orthogonalised, and the update, written and read
    found["optimizer, clipping"] = ((12 + 4 + 4) * weights + kept) / (gpu.bytes * gpu.bandwidth) * 1e3
    found["copies, fills"] += 6 * in_blocks / (gpu.bytes * gpu.bandwidth) * 1e3
    return found


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 120)
    if min(command.steps, command.accumulate) < 1:
        raise UserError("steps and accumulate must be at least 1")
    path = command.config or (str(ROOT / "config/1b.py") if command.estimate else default_config())
    config = load(path, list(command.overrides))
    device = choose_device("auto")
    stem = f"timeline-{Path(path).stem}" + ("-estimate" if command.estimate else "")
    where = H200.name if command.estimate else device_name(device)
    out = place(stem, where, command.out)
    if command.estimate:
        if config.dtype == "float32" or config.parallel.activation_checkpointing != "none" or config.compile:
            raise UserError("the estimate is of bfloat16 with nothing recomputed and nothing compiled; leave these options out")
        model = config.shapes()[-1]
        model = replace(model, vocab_size=model.vocab_size or 32000)
        rows = config.micro_batch * model.seq_len
        parts = min(command.accumulate, max(1, config.batch_tokens // rows))
        tokens, found = rows * parts, estimated(model, rows, parts, config.optim)
    else:
        with timed(config, command.overrides, 2 * command.steps + 1, command.accumulate) as config:
            model, tokens, found = config.model, config.batch_tokens, measured(config, command.steps)
    whole = sum(found.values())
    result = {"config": Path(path).name, "device": where, "estimate": command.estimate, "tokens": tokens, "ms": whole}
    result |= {"by_kind": dict(sorted(found.items(), key=lambda pair: -pair[1]))}
    if command.estimate:
        speed = tokens / whole * 1e3
        result |= {"mfu_full": mfu(model, speed, H200.flops), "mfu_causal": mfu(model, speed, H200.flops, causal=True)}
        result["assumed"] = {name: getattr(H200, name) for name in ("flops", "bytes", "products", "attention", "bandwidth")}
    shown = Table("operation", "ms a step", "%", title=f"{result['config']}, {tokens:,} tokens a step, {where}")
    for name, ms in result["by_kind"].items():
        shown.add_row(name, f"{ms:.1f}", f"{100 * ms / whole:.1f}")
    shown.add_row("all", f"{whole:.1f}", "100")
    console.print(shown)
    if command.estimate:
        console.print(f"an ESTIMATE, nothing was run: {result['assumed']}")
        console.print(
            f"it would be {100 * result['mfu_full']:.0f} % MFU full, {100 * result['mfu_causal']:.0f} % causal. {MFU}"
        )
    write_result(result, out)
    console.print(f"wrote {out}", soft_wrap=True)
    return result


if __name__ == "__main__":
    command_line(Command, main)
