"""Compile every kernel in every configuration of the table, with no GPU, and read what the machine code needs.

    python -m kernels.aot [--arch 80 90 gfx942] [--kernel attention_forward] [--in-turn] [--json]

For each row of kernels/configs.py and each way its kernel is called (causal, with documents, ...) it prints registers, stack
bytes (spills), shared memory and the matrix and memory instructions found. It fails, with exit code 1, where a kernel does not
compile, where a stack is larger than its row allows, shared memory than the architecture has, or a block than
1024 threads, where a matrix kernel does not use the architecture's matrix instructions, a TMA row no TMA, or a memory-bound
kernel does not load 16 bytes at a time.

Sizes are as large as a row serves, and 16 divides them, as it does strides, and no tensor is larger than 2 GiB, which AMD's
compiler is told; calls that say so differ. What a real call of an operation launches, the dry GPU tells (dry.py).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from inspect import getsource
from itertools import product
from multiprocessing import get_context
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .attention_triton import attention_dk_dv_kernel, attention_dq_kernel, attention_forward_kernel
from .configs import ANY, TABLE, Config, for_pointers, rows_for, rows_of
from .dispatch import HAS_TRITON, INTERPRETED, Arch, triton
from .linear_cross_entropy import cross_entropy_kernel
from .machine_code import (
    ARCHITECTURES,
    counted,
    instructions,
    listings,
    matrix_instruction,
    named,
    resources,
    shared_memory,
    target,
)
from .norm_rotary import norm_rotary_backward_kernel, norm_rotary_forward_kernel
from .rms_norm import rms_norm_backward_kernel, rms_norm_forward_kernel
from .rotary import rotary_kernel
from .swiglu import swiglu_backward_kernel, swiglu_forward_kernel

DTYPES = ("bf16", "fp16", "fp32")
MOST_THREADS = 1024  # of a block
FP32_TENSORS = ("lse", "delta", "dweight", "weight", "dgain", "gain", "cos", "sin", "loss", "row_scale", "logits")
TYPES = {"bounds_ptr": "*i32", "targets_ptr": "*i64"} | {f"{name}_ptr": "*fp32" for name in FP32_TENSORS}


@dataclass(frozen=True)
class Call:
    """A way to call a kernel: its constexpr arguments by name, None for a pointer that is not given, 1 for a size that is 1, as
    Triton makes that a constant."""

    constants: dict
    strides_of_16: bool = True  # divisible by 16 elements, and sizes with them
    share: float = 1.0  # of the head width that a row serves at most
    dtypes: tuple[str, ...] = DTYPES
    pointers: bool = False  # of tensors that TMA cannot read: where a row has TMA, that of 80 serves them

    @property
    def odd(self) -> bool:
        """Whether it is none that people train with."""
        return not self.strides_of_16 or self.share != 1 or 1 in (self.constants.get(name) for name in ("q_len", "seq_len"))


@dataclass(frozen=True)
class Kernel:
    """A kernel and the ways it is called, by name: first the one with most code."""

    function: object
    calls: dict[str, Call]
    matrix: bool = False


@dataclass(frozen=True)
class Case:
    kernel: str
    size: int
    call: str
    arch: Arch
    dtype: str  # one of DTYPES
    config: Config


@dataclass(frozen=True)
class Report:
    kernel: str
    size: int | None
    call: str
    arch: Arch
    dtype: str
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    seconds: float  # of compiling; next to nothing where Triton's cache had it
    faults: list[str]


def _kernels() -> dict[str, Kernel]:
    causal, full = {"CAUSAL": True, "bounds_ptr": None}, {"CAUSAL": False, "bounds_ptr": None}
    attention = {
        "causal, documents": Call({"CAUSAL": True}, dtypes=("bf16", "fp32")),
        "causal": Call(causal),
        "full": Call(full, dtypes=("bf16", "fp32")),
        "documents": Call({"CAUSAL": False}, dtypes=("bf16", "fp32")),
        "documents, narrow": Call({"CAUSAL": True}, share=5 / 8, dtypes=("bf16",)),  # a head width that is no power of two
        "causal, narrow": Call(causal, share=5 / 8, dtypes=("bf16", "fp32")),
        "causal, pointers": Call(causal, strides_of_16=False, dtypes=("bf16",), pointers=True),
        "one token": Call(causal | {"q_len": 1, "kv_len": 1}, dtypes=("bf16", "fp16")),
        "one query": Call(full | {"q_len": 1}, dtypes=("bf16",)),
    }
    odd = Call({}, strides_of_16=False, dtypes=("bf16",))
    norm_alone = Call({"residual_ptr": None, "residual_out_ptr": None})
    return {
        "attention_forward": Kernel(attention_forward_kernel, attention, matrix=True),
        "attention_dq": Kernel(attention_dq_kernel, attention, matrix=True),
        "attention_dk_dv": Kernel(attention_dk_dv_kernel, attention, matrix=True),
        "rms_norm_forward": Kernel(
            rms_norm_forward_kernel, {"with residual": Call({}), "alone": norm_alone, "odd strides": odd}
        ),
        "rms_norm_backward": Kernel(
            rms_norm_backward_kernel,
            {"with residual": Call({}), "alone": Call({"dresidual_ptr": None}), "odd strides": odd},
        ),
        "rotary": Kernel(rotary_kernel, {"": Call({"INVERSE": False}), "one token": Call({"INVERSE": False, "seq_len": 1})}),
        "norm_rotary_forward": Kernel(norm_rotary_forward_kernel, {"": Call({}), "odd strides": odd}),
        "norm_rotary_backward": Kernel(norm_rotary_backward_kernel, {"": Call({}), "odd strides": odd}),
        "swiglu_forward": Kernel(swiglu_forward_kernel, {"": Call({}), "odd strides": odd}),
        "swiglu_backward": Kernel(swiglu_backward_kernel, {"": Call({}), "odd strides": odd}),
        "cross_entropy": Kernel(
            cross_entropy_kernel,
            {
                "loss and gradient": Call({"row_scale_ptr": None}),
                "loss": Call({"dlogits_ptr": None, "row_scale_ptr": None}),
                "odd vocabulary": odd,
            },
        ),
    }


def calls_of(kernel: str) -> dict[str, Call]:
    """The ways a kernel of the table is called."""
    return _kernels()[kernel].calls


def source_of(kernel: str) -> str:
    """Of a kernel of the table and all functions of ours that it calls."""
    found: dict[str, str] = {}
    todo: list[Any] = [_kernels()[kernel].function]
    while todo:
        function = todo.pop().fn  # as it was before triton.jit
        if function.__qualname__ not in found:
            found[function.__qualname__] = getsource(function)
            called = (function.__globals__.get(name) for name in function.__code__.co_names)
            todo += [one for one in called if hasattr(one, "fn")]
    return "\n".join(found[name] for name in sorted(found))


def cases(arch: Arch, kernels: list[str]) -> Iterator[Case]:
    """Every row that this architecture would use, in every way its kernel is called."""
    for name, dtype in product(kernels, DTYPES):
        for size, config in rows_for(name, rows_of(arch, dtype == "fp32")).items():
            for call, how in calls_of(name).items():
                row = for_pointers(name, size, config) if how.pointers else config
                if dtype in how.dtypes and (dtype != "fp16" or _kernels()[name].matrix):  # without products it is bf16's code
                    yield Case(name, size, call, arch, dtype, row)


def in_turn(todo: list[Case]) -> list[Case]:
    """The call of each row with most code, and a third of its others: three rows of a kernel and dtype together have all."""
    rows: dict[tuple, dict[int, list[Case]]] = {}
    for case in todo:
        rows.setdefault((case.kernel, case.arch, case.dtype), {}).setdefault(case.size, []).append(case)
    chosen = []
    for (kernel, *_), by_size in rows.items():
        share = min(3, len(by_size))
        for number, (fullest, *others) in enumerate(by_size.values()):
            turn = (list(TABLE).index(kernel) + number) % share  # goes through kernels of one size, and sizes of one kernel
            chosen += [fullest, *others[turn::share]]
    return chosen


def constants(case: Case) -> dict:
    """All constexpr arguments of this call but the launch options."""
    call = calls_of(case.kernel)[case.call]
    sizes: dict[str, dict] = {
        "attention": {"D": int(case.size * call.share), "BLOCK_D": case.size, "SCALE": 0.125},
        "rms": {"BLOCK_D": case.size, "EPS": 1e-5},
        "rotary": {"HALF": case.size, "BLOCK_HALF": case.size},
        "norm": {"HALF": case.size, "BLOCK_HALF": case.size, "EPS": 1e-6},
        "cross": {"IGNORE_INDEX": -100, "Z_LOSS": 1e-4},
    }
    size = sizes.get(case.kernel.split("_")[0], {})
    pipelined = {"STAGES": case.config.num_stages} if case.kernel.endswith(("norm_backward", "norm_rotary_backward")) else {}
    return {**case.config.tiles, **size, **pipelined, **call.constants}


def compile_case(case: Case):
    """The compiled kernel, for tensors that start on 16 bytes."""
    from triton.compiler import ASTSource

    kernel: Any = _kernels()[case.kernel].function
    fixed = constants(case)
    names = [parameter.name for parameter in kernel.params]
    tensor = f"*{case.dtype}"
    kinds = {n: TYPES.get(n, tensor if n.endswith("_ptr") else "i32") for n in names}
    signature = {n: "constexpr" if n in fixed else kind for n, kind in kinds.items()}
    sizes = ("_len", "width", "d_ff", "vocab", "stride")
    by_16 = calls_of(case.kernel)[case.call].strides_of_16

    def is_aligned(name: str) -> bool:
        return name not in fixed and (name.endswith("_ptr") or (by_16 and any(size in name for size in sizes)))

    aligned = [i for i, n in enumerate(names) if is_aligned(n)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    if isinstance(case.arch, str) and by_16:  # the JIT tells AMD's compiler which tensors are no larger than 2 GiB
        for i in aligned:
            attributes[(i,)] += [["tt.pointer_range", 32]] if names[i].endswith("_ptr") else []
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in fixed.items()}, attributes)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    return triton.compile(source, target=target(case.arch), options=options)


@dataclass(frozen=True)
class Built:
    """What compiling a case gave."""

    seconds: float
    registers: int = 0
    stack: int = 0
    shared: int = 0
    code: bytes = b""  # the instructions
    error: str | None = None  # what the compiler said where there is no code


def build(case: Case) -> Built:
    """Compile one case."""
    started = time.perf_counter()
    try:
        compiled = compile_case(case)
    except Exception as error:  # whatever the compiler raises is a fault of the case
        return Built(time.perf_counter() - started, error=one_line(error))
    seconds = time.perf_counter() - started
    return Built(seconds, *resources(compiled), compiled.metadata.shared, instructions(compiled))


def judge(cases: list[Case], built: list[Built]) -> list[Report]:
    """The report of each case, from what its machine code needs and holds."""
    found: dict[int, str] = {}
    for arch in {case.arch for case in cases}:  # the disassembler takes a third of a second to start, and no time for a kernel
        mine = [number for number, case in enumerate(cases) if case.arch == arch]
        found |= dict(zip(mine, listings([built[number].code for number in mine], arch), strict=True))
    return [_report(case, result, found[number]) for number, (case, result) in enumerate(zip(cases, built, strict=True))]


def _report(case: Case, built: Built, listing: str) -> Report:
    about = (case.kernel, None if case.size == ANY else case.size, case.call, case.arch, case.dtype)
    if built.error is not None:
        return Report(*about, 0, 0, 0, {}, round(built.seconds, 2), [f"does not compile: {built.error}"])
    found = counted(listing, case.arch)
    faults = too_much(case.arch, case.config, built.stack, built.shared, calls_of(case.kernel)[case.call].odd)
    faults += _lacking(case, found)
    return Report(*about, built.registers, built.stack, built.shared, found, round(built.seconds, 2), faults)


def inspect(case: Case) -> Report:
    """Compile one case and read its machine code."""
    return judge([case], [build(case)])[0]


def one_line(error: Exception) -> str:
    """The end of what a compiler said: before it stand the places in the source."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[-1] if said else ''}"[:200]


def too_much(arch: Arch, config: Config, stack: int, shared: int, odd: bool) -> list[str]:
    """What of it is more than the row allows, to an `odd` call or to one that people train with, or the architecture has."""
    faults, allowed = [], config.may_spill(arch, odd)
    if stack > allowed:
        faults.append(f"stack of {stack} bytes, {allowed} allowed")
    if shared > shared_memory(arch):
        faults.append(f"{shared} bytes of shared memory, {shared_memory(arch)} there are")
    if (threads := config.num_warps * target(arch).warp_size) > MOST_THREADS:  # which no compiler counts
        faults.append(f"{threads} threads, {MOST_THREADS} at most")
    return faults


def _lacking(case: Case, found: dict[str, int]) -> list[str]:
    """Instructions that the machine code should have and has not, and slow ones that it has."""
    faults: list[str] = []
    if case.dtype == "fp32" and _kernels()[case.kernel].matrix:
        return faults  # for checking: the matrix units would round
    if calls_of(case.kernel)[case.call].pointers:
        return faults  # nobody is served fast there
    matrix = matrix_instruction(case.arch)
    if _kernels()[case.kernel].matrix:
        if not found[matrix]:
            faults.append(f"no {matrix} instruction")
        if matrix != "HMMA" and found.get("HMMA"):
            faults.append("HMMA, the slow matrix path of this architecture")
    elif not found["load 16 B"] and calls_of(case.kernel)[case.call].strides_of_16:
        faults.append("no load of 16 bytes at a time")
    if constants(case).get("TMA") and not found.get("TMA"):
        faults.append("no UTMALDG instruction: TMA is not used")
    return faults


def inspect_all(todo: list[Case], console: Console) -> list[Report]:
    """Reports in the order of `todo`, compiled by all cores."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["nanostack.kernels.aot"])  # torch is imported once for all workers
    workers = min(len(todo), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        done = pool.map(build, todo)
        return judge(todo, list(track(done, "compiling", total=len(todo), console=console, disable=not console.is_terminal)))


def show(reports: list[Report], console: Console) -> None:
    table = Table(title="machine code of the kernels")
    for name in ("kernel", "size", "call", "arch", "dtype", "regs", "stack", "shared", "instructions", "verdict"):
        table.add_column(name, justify="right" if name in ("size", "regs", "stack", "shared") else "left", overflow="fold")
    for r in reports:
        found = ", ".join(f"{count} {name}" for name, count in r.instructions.items() if count)
        numbers = ("any" if r.size is None else str(r.size), r.call, named(r.arch), r.dtype, str(r.registers), str(r.stack))
        table.add_row(r.kernel, *numbers, f"{r.shared:,}", found, "; ".join(r.faults) or "ok")
    console.print(table)


def architecture(word: str) -> Arch:
    """90 of "90" and of "sm_90", "gfx942" of "gfx942"."""
    word = word.removeprefix("sm_")
    return int(word) if word.isdecimal() else word


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nanostack.kernels.aot", description=__doc__.split("\n\n")[0])
    known = f"of {', '.join(map(str, ARCHITECTURES))}; 80 and 90, unless some are named"
    parser.add_argument(
        "--arch", type=architecture, nargs="+", default=[80, 90], choices=ARCHITECTURES, metavar="ARCH", help=known
    )
    parser.add_argument("--in-turn", action="store_true", help="a third of the calls, others at each row: for CI")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES, help="all, unless some are named")
    parser.add_argument(
        "--kernel", nargs="+", default=list(TABLE), choices=list(TABLE), metavar="NAME", help=f"of {', '.join(TABLE)}"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    if not HAS_TRITON or INTERPRETED:
        why = "TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled" if HAS_TRITON else "Triton is not installed"
        print(f"error: {why}", file=sys.stderr)
        return 2
    todo = [case for arch in options.arch for case in cases(arch, options.kernel) if case.dtype in options.dtype]
    todo = in_turn(todo) if options.in_turn else todo
    reports = inspect_all(todo, Console(stderr=True))
    if options.json:
        print(json.dumps({"triton": triton.__version__, "kernels": [asdict(report) for report in reports]}))
    else:
        show(reports, Console(width=None if sys.stdout.isatty() else 200))
    faulty = [report for report in reports if report.faults]
    for report in faulty:
        where = " ".join(filter(None, (report.kernel, str(report.size or ""), report.call, report.dtype, named(report.arch))))
        print(f"error: {where}: {'; '.join(report.faults)}", file=sys.stderr)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
