"""Measure this GPU and print rows for the table in kernels/configs.py.

    python -m kernels.tune [--kernel attention_forward rotary] [--size 64 128] [--samples 20] [--seconds 200]

For every kernel and size of the table it compiles a grid of candidates on all cores, as a launch would, so that this process
finds them in Triton's cache; checks their results against those of the row in use; and times them in turn with cold caches. The
fastest that passes the gate (kernels.aot: no spills, no more shared memory than there is) is printed. A new row is proposed
only where its call is more than 2 % faster than with the row in use. For attention_dq and attention_dk_dv that call is the
whole backward pass, both kernels together. `bench/tuning.py` makes a patch of them.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from multiprocessing import connection, get_context
from statistics import median
from typing import Any, cast

import torch

from . import aot
from .configs import ANY, FP32, TABLE, Config, attention, for_pointers, lookup, owner, row, rows_for, rows_of
from .dispatch import Arch, arch_of, triton, unavailable_reason
from .timing import interleaved

BETTER = 0.98  # of the seconds of the call with the row in use
AT_THE_GATE = 8  # the fastest, of which one should pass
LAST = 30  # seconds that a candidate which has begun may take
MOST_WORKERS = 16  # beyond it their memory on the GPU counts
WHOLE_BACKWARD = ("attention_dq", "attention_dk_dv")  # whose call launches the other one too


def candidates(kernel: str, arch: Arch) -> list[Config]:
    """The rows that are worth trying for a kernel."""
    if kernel.startswith("attention"):
        tma = (False, True) if isinstance(arch, int) and arch >= 90 else (False,)
        tiles = product((64, 128), (32, 64, 128), (4, 8), (2, 3), tma)
        return [attention(m, n, warps, stages, TMA=use) for m, n, warps, stages, use in tiles]
    if kernel == "rms_norm_forward":
        return [row(warps, BLOCK_ROWS=rows) for warps, rows in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8))]
    if kernel == "rms_norm_backward":
        grid = product((4, 8, 16, 32), (1, 2, 3), (1, 2, 4), (1, 4))
        return [row(warps, stages, programs, BLOCK_ROWS=rows) for warps, stages, programs, rows in grid]
    if kernel == "norm_rotary_forward":
        return [row(warps, BLOCK_ROWS=rows) for warps, rows in product((2, 4, 8), (4, 8, 16, 32, 64))]
    if kernel == "norm_rotary_backward":
        grid = product((4, 8), (1, 2, 3), (1, 2, 4), (8, 16, 32, 64))
        return [row(warps, stages, programs, BLOCK_ROWS=rows) for warps, stages, programs, rows in grid]
    if kernel == "rotary":
        return [row(warps, BLOCK_HEAD=heads) for warps, heads in product((1, 2, 4, 8), (4, 8, 16, 32))]
    name = "BLOCK_V" if kernel == "cross_entropy" else "BLOCK"
    return [Config({name: block}, warps, 1) for warps, block in product((2, 4, 8, 16), (512, 1024, 2048, 4096, 8192))]


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
    if kernel.startswith("norm_rotary"):
        x, dout = (randn(4, 4096, 2048 // size, 2 * size) for _ in range(2))
        gain, cos, sin = (randn(*shape, dtype=torch.float32) for shape in ((2 * size,), (4096, size), (4096, size)))
        if kernel == "norm_rotary_forward":
            return lambda: (ops.norm_rotary(x, gain, cos, sin, 1e-6, 0),)
        return lambda: ops.norm_rotary_backward(dout, x, gain, cos, sin, 1e-6, 0)
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


Judge = Callable[[str, int, Arch, Config], str | None]
Workload = Callable[[str, int, torch.device], Callable[[], tuple[torch.Tensor, ...]]]


def answers(work: Callable, jobs: list[tuple], seconds: float, grace: float = 0.0) -> dict[int, Any]:
    """What `work(*job)` returned, by the job's number: each in a process of its own, as many at a time as there are cores,
    begun within so many seconds. A job whose process dies has a sentence that says so; one that takes longer, and `grace`
    seconds more, is killed, and has no answer. When this returns, none of them runs.

    A CUDA error spoils its process for whatever comes next, so none serves twice. They are forked from one that has imported
    torch, and has not touched the GPU: starting one takes no seconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "nanostack.kernels.tune"])
    cores = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    waiting, end = list(enumerate(jobs)), time.monotonic() + seconds
    running: dict[Any, tuple] = {}
    found: dict[int, Any] = {}
    try:
        while running or waiting:
            now = time.monotonic()
            if now >= end + grace or (now >= end and not running):
                break
            while waiting and len(running) < cores and now < end:
                number, job = waiting.pop(0)
                answer, says = context.Pipe(duplex=False)
                process = context.Process(target=_answer, args=(says, work, job), daemon=True)
                process.start()
                says.close()
                running[answer] = number, process
            for ready in connection.wait(running, timeout=0.2):
                answer = cast(connection.Connection, ready)
                number, process = running.pop(answer)
                try:
                    found[number] = answer.recv()
                    process.join(1)
                except EOFError:
                    process.join()
                    found[number] = f"its process ended with exit code {process.exitcode}"
                finally:
                    process.kill()
                    process.join()
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return found


def _answer(says: connection.Connection, work: Callable, job: tuple) -> None:
    says.send(work(*job))


def launched(
    kernel: str, size: int, configs: list[Config], device: torch.device, make: Workload, seconds: float, grace: float = LAST
) -> list[Config]:
    """The candidates that compile and launch, found by all cores within so many seconds: Triton's cache has their machine code
    then. What breaks its process breaks none that times."""
    found = answers(_launch, [(kernel, size, config, device, make) for config in configs], seconds, grace)
    dropped = [f"{as_row(configs[number])}: {fault}" for number, fault in sorted(found.items()) if fault]
    late = len(configs) - len(found)
    if dropped or late:
        told = f"{len(dropped)} of {len(configs)} do not work, {late} were too late"
        print(f"# {kernel} {size}: {told}; {dropped[0] if dropped else ''}", file=sys.stderr)
    return [config for number, config in enumerate(configs) if found.get(number, "late") is None]


def _launch(kernel: str, size: int, config: Config, device: torch.device, make: Workload) -> str | None:
    """Why a candidate does not run here."""
    try:
        with in_use(kernel, size, config):
            make(kernel, size, device)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # the compiler's own limits: a tile that is too small for the matrix unit, for example
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def gated(kernel: str, size: int, arch: Arch, configs: list[Config], seconds: float, judge: Judge) -> Config | None:
    """The first of them that is found in time to pass the gate in every way the kernel is called; None where there is none."""
    found = answers(judge, [(kernel, size, arch, config) for config in configs], seconds)
    for number, config in enumerate(configs):
        if found.get(number, "late") is None:
            return config
        if number in found:
            print(f"# {kernel} {size}: fast, but {found[number]}", file=sys.stderr)
    return None


def _fault(kernel: str, size: int, arch: Arch, config: Config) -> str | None:
    """Why a candidate is not worth trying."""
    for case in calls(kernel, size, arch, config, odd=False):
        if faults := aot.inspect(case).faults:
            return f"{as_row(config)}, {case.call}, {case.dtype}: {faults[0]}"
    return None


def calls(kernel: str, size: int, arch: Arch, config: Config, odd: bool) -> list[aot.Case]:
    """All that the gate would ask of a row: calls that people train with, or odd ones, in every dtype that the row serves."""
    dtypes = ("bf16", "fp16") if FP32 in TABLE[kernel] else aot.DTYPES
    another = for_pointers(kernel, size, config) is not config  # serves tensors that TMA cannot read
    asked = {c: how for c, how in aot.calls_of(kernel).items() if how.odd == odd and not (how.pointers and another)}
    return [aot.Case(kernel, size, call, arch, d, config) for call, how in asked.items() for d in dtypes if d in how.dtypes]


def _odd_stack(case: aot.Case) -> int | str:
    """Bytes of stack that an odd call needs, or its fault."""
    report = aot.inspect(replace(case, config=replace(case.config, odd_stack=sys.maxsize, by={})))
    return report.faults[0] if report.faults else report.stack


def with_odd_calls(kernel: str, size: int, arch: Arch, config: Config, seconds: float) -> Config | None:
    """The row with the stack that its odd calls need by this Triton; None where one of them does not work. Says so where time
    did not do for all of them."""
    asked = calls(kernel, size, arch, config, odd=True)
    found = answers(_odd_stack, [(case,) for case in asked], seconds)
    if faults := [f"{asked[number].call}: {fault}" for number, fault in found.items() if isinstance(fault, str)]:
        print(f"# {kernel} {size}: {as_row(config)}: {faults[0]}", file=sys.stderr)
        return None
    if len(found) < len(asked):
        print(f"# {kernel} {size}: {as_row(config)}: {len(asked) - len(found)} odd calls were too late", file=sys.stderr)
    most = max(found.values(), default=0)
    return replace(config, odd_stack=most if most > config.stack else 0, by={})


@contextlib.contextmanager
def in_use(kernel: str, size: int, config: Config):
    """Within it the kernel is launched with this row, whatever its tensors."""
    before = TABLE[kernel]
    TABLE[kernel] = {arch: {size: config} for arch in (FP32, 80, *before)}
    try:
        yield
    finally:
        TABLE[kernel] = before


def fastest(
    kernel: str, size: int, configs: list[Config], samples: int, device: torch.device, make: Workload | None = None
) -> tuple[Config, dict]:
    """The best candidate and the median seconds of each that gave the right results."""
    call = (make or workload)(kernel, size, device)
    expected = call()

    def using(config: Config) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run():
            with in_use(kernel, size, config):
                return call()

        return run

    right = {}
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
    times = interleaved({str(number): run for number, run in enumerate(right.values())}, samples, device)
    seconds = {config: median(times[str(number)]) for number, config in enumerate(right)}
    return min(seconds, key=lambda config: seconds[config]), seconds


def as_row(config: Config) -> str:
    """The source of a row of the table."""
    spills = (("stack", config.stack), ("odd_stack", config.odd_stack), ("by", config.by))
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


@dataclass(frozen=True)
class Tuned:
    """What was found for one row of the table."""

    kernel: str
    size: int
    arch: Arch  # whose row it is
    row: str  # source of the best
    row_before: str
    seconds: float
    seconds_before: float
    candidates: int  # that gave the right results
    timed: str  # whose seconds these are


def tuned(
    todo: list[tuple[str, int]],
    samples: int,
    seconds: float = math.inf,
    device: torch.device | None = None,
    make: Workload = workload,
    grid: Callable[[str, Arch], list[Config]] = candidates,
    judge: Judge = _fault,
    finish: Callable[[str, int, Arch, Config, float], Config | None] = with_odd_calls,
) -> Iterator[Tuned]:
    """Tune these (kernel, size) in turn, as many as begin within so many seconds. The last one may end with less candidates."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    arch, end = machine(device), time.monotonic() + seconds
    for number, (kernel, size) in enumerate(todo):
        left = end - time.monotonic()
        if left <= 0:
            return
        share = left / (len(todo) - number) if math.isfinite(left) else math.inf  # compiling takes most of it
        now, most = lookup(kernel, size, device, torch.bfloat16), min(0.6 * share, 3600)
        others = [config for config in grid(kernel, arch) if config != replace(now, stack=0, odd_stack=0, by={})]
        tried = launched(kernel, size, others, device, make, most, min(0.15 * share, LAST))
        _, times = fastest(kernel, size, [now, *tried], samples, device, make)
        faster = sorted((c for c in times if times[c] <= BETTER * times[now]), key=lambda config: times[config])[:AT_THE_GATE]
        found: Config | None = None
        best: Config | None = now
        while faster and found is None and (best := gated(kernel, size, arch, faster, in_time(end), judge)):
            found, faster = finish(kernel, size, arch, best, in_time(end)), faster[faster.index(best) + 1 :]
        best, found = (best, found) if best and found else (now, now)
        rows = owner(kernel, rows_of(arch))
        timed = "the whole backward" if kernel in WHOLE_BACKWARD else "the call"
        yield Tuned(kernel, size, rows, as_row(found), as_row(now), times[best], times[now], len(times), timed)


def in_time(end: float) -> float:
    """Seconds that judging may still take."""
    return max(10.0, min(end - time.monotonic(), 3600))


def machine(device: torch.device) -> Arch:
    """The architecture of a GPU, as in 90; Hopper's where there is none, which a rehearsal compiles for."""
    return arch_of(device) or 90


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nanostack.kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernel", nargs="+", default=list(TABLE), choices=list(TABLE), metavar="NAME")
    parser.add_argument("--size", type=int, nargs="+", help="only these sizes")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many")
    options = parser.parse_args(arguments)
    reason = unavailable_reason("cuda")
    if reason:
        print(
            f"error: nothing to measure: {reason} python -m nanostack.kernels.aot checks rows without a GPU.", file=sys.stderr
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    served_by = rows_of(machine(device))
    where = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {date.today().isoformat()}"
    print(f"# rows of {served_by}, measured on {where}", flush=True)
    sizes = {name: rows_for(name, served_by) for name in options.kernel}
    todo = [(name, size) for name, rows in sizes.items() for size in rows if not options.size or size in options.size]
    for found in tuned(todo, options.samples, options.seconds, device):
        label = "ANY" if found.size == ANY else found.size
        gain = f"{1e3 * found.seconds:.4f} ms, {found.seconds_before / found.seconds:.2f} x as fast as with the row in use"
        print(f'"{found.kernel}" {label}: {found.row},  # {found.timed}: {gain}, of {found.candidates} candidates', flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
