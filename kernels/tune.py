"""Measure this GPU and print rows for the table in kernels/configs.py.

    python -m kernels.tune [--kernel attention_forward rotary] [--size 64 128] [--samples 20]

For every kernel and size of the table it compiles a grid of candidates on all cores, drops those that spill or need more shared
memory than there is, checks the results of the others against the row in use, times them in turn with cold caches, and
prints the fastest. A new row is proposed only where it is more than 2 % faster than the row in use.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import product
from multiprocessing import get_context
from statistics import median

import torch
from rich.console import Console
from rich.progress import track

import kernels

from . import aot
from .configs import ANY, FP32, TABLE, Config, attention, lookup, row, rows_for, rows_of
from .dispatch import triton
from .timing import interleaved

BETTER = 0.98  # of the time of the row in use


def candidates(kernel: str, arch: int) -> list[Config]:
    """What is worth trying for a kernel."""
    if kernel.startswith("attention"):
        tma = (False, True) if arch >= 90 else (False,)
        grid = product((64, 128), (32, 64, 128), (4, 8), (2, 3), tma)
        return [attention(m, n, warps, stages, TMA=use) for m, n, warps, stages, use in grid]
    if kernel == "rms_norm_forward":
        return [row(warps, BLOCK_ROWS=rows) for warps, rows in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8))]
    if kernel == "rms_norm_backward":
        grid = product((4, 8, 16, 32), (1, 2, 3), (1, 2, 4), (1, 4))
        return [row(warps, stages, programs, BLOCK_ROWS=rows) for warps, stages, programs, rows in grid]
    if kernel == "rotary":
        return [row(warps, BLOCK_HEAD=heads) for warps, heads in product((1, 2, 4, 8), (4, 8, 16, 32))]
    name = "BLOCK_V" if kernel == "cross_entropy" else "BLOCK"
    return [row(warps, **{name: block}) for warps, block in product((2, 4, 8, 16), (512, 1024, 2048, 4096, 8192))]


def workload(kernel: str, size: int, device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call, of a size that fills a large GPU, that launches the kernel."""

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    ops = torch.ops.nanostack
    if kernel.startswith("attention"):
        batch, seq, head, scale = 2, 4096, 4096 // size, size**-0.5
        q, k, v, dout = (randn(batch, seq, head, size) for _ in range(4))
        if kernel == "attention_forward":
            return lambda: ops.flash_attention(q, k, v, None, True, scale)
        out, lse = ops.flash_attention(q, k, v, None, True, scale)
        return lambda: ops.flash_attention_backward(dout, q, k, v, None, out, lse, True, scale)
    if kernel.startswith("rms_norm"):
        x, residual, dy = (randn(2**26 // size, size) for _ in range(3))
        weight = randn(size, dtype=torch.float32)
        if kernel == "rms_norm_forward":
            return lambda: ops.add_rms_norm(x, residual, weight, 1e-5)
        return lambda: ops.rms_norm_backward(dy, residual, x, weight, 1e-5)
    if kernel == "rotary":
        q, k = randn(4, 4096, 2048 // size, 2 * size), randn(4, 4096, 512 // size, 2 * size)
        cos, sin = (randn(4096, size, dtype=torch.float32) for _ in range(2))
        return lambda: ops.rotary(q, k, cos, sin, 0, False)
    if kernel.startswith("swiglu"):
        gate_up, dy = randn(16384, 2 * 5632), randn(16384, 5632)
        if kernel == "swiglu_forward":
            return lambda: (ops.swiglu(gate_up),)
        return lambda: (ops.swiglu_backward(dy, gate_up),)
    x, weight, targets = randn(1024, 256), randn(128256, 256), torch.randint(128256, (1024,), device=device)
    return lambda: ops.linear_cross_entropy_rows(x, weight, targets, None, -100, 0.0, True, "triton")


def sound(kernel: str, size: int, arch: int, configs: list[Config]) -> list[Config]:
    """The candidates that pass the gate in every way their kernel is called, found by all cores."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = [(kernel, size, arch, config) for config in configs]
        answers = list(zip(configs, pool.map(_fault, jobs), strict=True))
    dropped = [fault for _, fault in answers if fault]
    if dropped:
        print(f"# {kernel} {size}: {len(dropped)} of {len(configs)} not tried, the first: {dropped[0]}", file=sys.stderr)
    return [config for config, fault in answers if not fault]


def _fault(job: tuple[str, int, int, Config]) -> str | None:
    """Why a candidate is not worth trying."""
    kernel, size, arch, config = job
    for call in aot.calls_of(kernel):
        if aot.calls_of(kernel)[call].odd:
            continue
        try:
            faults = aot.inspect(aot.Case(kernel, size, call, arch, "bf16", config)).faults
        except Exception as error:  # the compiler's own limits: a tile that is too small for the matrix unit, for example
            faults = [f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"]
        if faults:
            return f"{as_row(config)}, {call}: {faults[0]}"
    return None


def fastest(kernel: str, size: int, configs: list[Config], samples: int, device: torch.device) -> tuple[Config, dict]:
    """The best candidate and the median seconds of each that gave the right results."""
    call = workload(kernel, size, device)
    expected = call()

    def using(config: Config) -> Callable[[], object]:
        def run():
            TABLE[kernel] = {arch: {size: config} for arch in (FP32, 80, 90)}
            return call()

        return run

    before, right = TABLE[kernel], {}
    try:
        for config in configs:
            try:
                results = using(config)()
            except Exception as error:  # does not fit this GPU after all
                print(f"# {as_row(config)}: {type(error).__name__}", file=sys.stderr)
                continue
            if all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2) for a, b in zip(results, expected, strict=True)):
                right[config] = using(config)
            else:
                print(f"# {as_row(config)}: WRONG RESULTS", file=sys.stderr)
        names = {str(number): run for number, run in enumerate(right.values())}
        times = interleaved(names, samples, device)
    finally:
        TABLE[kernel] = before
    seconds = {config: median(times[str(number)]) for number, config in enumerate(right)}
    return min(seconds, key=seconds.get), seconds


def as_row(config: Config) -> str:
    """The source of a row of the table."""
    spills = (("stack", config.stack), ("odd_stack", config.odd_stack))
    if "TMA" in config.tiles:
        tma = ", TMA=True" if config.tiles["TMA"] else ""
        stack = "".join(f", {name}={spilled}" for name, spilled in spills if spilled)
        tiles = (config.tiles["BLOCK_M"], config.tiles["BLOCK_N"], config.num_warps, config.num_stages)
        return f"attention({', '.join(map(str, tiles))}{tma}{stack})"
    words = [str(config.num_warps)]
    if config.num_stages != 1 or config.programs_per_sm != 1:
        words += [str(config.num_stages), str(config.programs_per_sm)]
    words += [f"{name}={spilled}" for name, spilled in spills if spilled]
    return f"row({', '.join([*words, *(f'{name}={value}' for name, value in config.tiles.items())])})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernel", nargs="+", default=list(TABLE), choices=list(TABLE), metavar="NAME")
    parser.add_argument("--size", type=int, nargs="+", help="only these sizes")
    parser.add_argument("--samples", type=int, default=20)
    options = parser.parse_args(arguments)
    reason = kernels.unavailable_reason("cuda")
    if reason:
        print(f"error: nothing to measure: {reason} python -m kernels.aot checks rows without a GPU.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    arch, served_by = 10 * major + minor, rows_of(major)
    where = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {date.today().isoformat()}"
    print(f"# rows of {served_by}, measured on {where}", flush=True)
    sizes = {name: rows_for(name, served_by) for name in options.kernel}
    todo = [(name, size) for name, rows in sizes.items() for size in rows if not options.size or size in options.size]
    for name, size in track(todo, "tuning", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        now = lookup(name, size, device, torch.bfloat16)
        tried = [config for config in candidates(name, arch) if config != now]
        best, seconds = fastest(name, size, [now, *sound(name, size, arch, tried)], options.samples, device)
        if seconds[best] > BETTER * seconds[now]:
            best = now
        label = "ANY" if size == ANY else size
        gain = f"{1e3 * seconds[best]:.4f} ms, {seconds[now] / seconds[best]:.2f} x as fast as the row in use"
        print(f'"{name}" {label}: {as_row(best)},  # {gain}, of {len(seconds)} candidates', flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
