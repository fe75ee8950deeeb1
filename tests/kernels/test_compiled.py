"""The gate without a GPU: every kernel in every configuration, compiled for real architectures; and what torch.compile sees."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import aot, dispatch, machine_code, tune
from kernels.configs import ANY, FP32, TABLE, attention, row, rows_for

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)


SPILLS = attention(128, 256, 4, 1, TMA=True)  # at a d_head of 128


@pytest.mark.slow
@pytest.mark.timeout(1200)  # hundreds of compilations, on whatever cores there are
def test_every_configuration_compiles_into_the_code_it_promises(capsys):
    reports = []
    # Rows of memory-bound kernels and of fp32 are the same on both. All calls of all rows: python -m kernels.aot.
    attention = [name for name in TABLE if name.startswith("attention")]
    for arguments in (("--arch", "90"), ("--arch", "80", "--dtype", "bf16", "--kernel", *attention)):
        code = aot.main([*arguments, "--in-turn", "--json"])
        told = capsys.readouterr()
        assert code == 0, told.err
        reports += json.loads(told.out)["kernels"]
    for name in TABLE:
        for arch, dtype in ((90, "bf16"), (90, "fp16"), (90, "fp32"), (80, "bf16")):
            if name not in attention and (dtype == "fp16" or arch == 80):
                continue
            mine = [r for r in reports if (r["kernel"], r["arch"], r["dtype"]) == (name, arch, dtype)]
            sizes = rows_for(name, FP32 if dtype == "fp32" else arch)
            assert {r["size"] for r in mine} == {None if size == ANY else size for size in sizes}, (name, arch, dtype)
            assert all(0 < r["registers"] <= 255 for r in mine)


def test_calls_in_turn_meet_every_kernel_and_size():
    def pairs(cases):
        found = {(case.kernel, case.dtype, case.call) for case in cases}
        return found | {
            (case.size, case.call) for case in cases if case.dtype != "fp32" and case.kernel.startswith("attention")
        }

    todo = list(aot.cases(90, list(TABLE)))
    assert pairs(aot.in_turn(todo)) == pairs(todo) and len(aot.in_turn(todo)) < 0.6 * len(todo)


@pytest.mark.parametrize(
    ("kernel", "size", "call", "config", "fault"),
    [
        ("attention_forward", 128, "causal", SPILLS, r"stack of \d+ bytes, 0 allowed"),
        ("attention_forward", 128, "causal", attention(128, 128, 8, 4, TMA=True), "bytes of shared memory"),
        ("attention_forward", 64, "causal", attention(16, 64, 4, 1), "no HGMMA"),
        ("rms_norm_forward", 256, "alone", row(8, BLOCK_ROWS=1), "no load of 16 bytes"),
    ],
)
def test_the_gate_names_what_is_wrong_with_a_row(kernel, size, call, config, fault):
    report = aot.inspect(aot.Case(kernel, size, call, 90, "bf16", config))
    assert any(re.search(fault, found) for found in report.faults), report.faults


def test_the_gate_fails_with_a_message(monkeypatch, capsys):
    monkeypatch.setitem(TABLE, "swiglu_forward", {80: {ANY: row(4, BLOCK=128)}})
    assert aot.main(["--arch", "90", "--kernel", "swiglu_forward"]) == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: swiglu_forward bf16 sm_90: no load of 16 bytes at a time"
    with pytest.raises(SystemExit) as ended:
        aot.main(["--arch", "70"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("what", "value", "said"), [("INTERPRETED", True, "TRITON_INTERPRET=1"), ("HAS_TRITON", False, "Triton")]
)
def test_the_gate_does_not_take_interpreted_kernels_and_needs_triton(what, value, said, monkeypatch, capsys):
    monkeypatch.setattr(aot, what, value)
    assert aot.main([]) == 2 and capsys.readouterr().err.startswith(f"error: {said} is ")


def test_listings_of_several_kernels_are_each_the_one_of_the_whole_file(tmp_path):
    """One run of the disassembler for all kernels, beside a run for each whole file of machine code."""
    cases = [aot.Case(name, ANY, "", 90, "bf16", row(4, BLOCK=1024)) for name in ("swiglu_forward", "swiglu_backward")]
    cubins = [aot.compile_case(case).asm["cubin"] for case in cases]
    listings = machine_code.disassemble([machine_code.sections_of(cubin) for cubin in cubins], 90)
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
    for cubin, listing in zip(cubins, listings, strict=True):
        whole = machine_code._nvidia_tool("cuobjdump", "--dump-sass", data=cubin)
        opcodes, expected = ([found.split()[0] for found in instruction.findall(text)] for text in (listing, whole))
        assert len(opcodes) > 50 and opcodes == expected


def test_tune_prints_rows_as_the_source_of_the_table():
    names = {"attention": attention, "row": row}
    rows = [config for by_arch in TABLE.values() for by_size in by_arch.values() for config in by_size.values()]
    assert all(eval(tune.as_row(config), names) == config for config in rows)
    for kernel in TABLE:
        tried = tune.candidates(kernel, 90)
        assert len(set(tried)) == len(tried) > 10 and all(eval(tune.as_row(config), names) == config for config in tried)


class Shapes(TorchDispatchMode):
    """Keeps the name of each of our operators that is called, and the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "nanostack":
            self.seen.append((op._opname, [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]))
        return op(*args, **(kwargs or {}))


def shapes_of(kernel: str, size: int) -> tuple[str, list[tuple[int, ...]]]:
    """The operator that launches a kernel, and the shapes that it takes."""
    heads, rows, turned = (2, 4096, 4096 // size, size), (2**26 // size, size), (4, 4096, 2048 // size, 2 * size)
    if kernel == "attention_forward":
        return "flash_attention", [heads] * 3
    if kernel.startswith("attention"):
        return "flash_attention_backward", [heads] * 5 + [(2, 4096 // size, 4096)]
    return {
        "rms_norm_forward": ("add_rms_norm", [rows, rows, (size,)]),
        "rms_norm_backward": ("rms_norm_backward", [rows, rows, rows, (size,)]),
        "rotary": ("rotary", [(4, 4096, n // size, 2 * size) for n in (2048, 512)] + [(4096, size)] * 2),
        "norm_rotary_forward": ("norm_rotary", [turned, (2 * size,), (4096, size), (4096, size)]),
        "norm_rotary_backward": ("norm_rotary_backward", [turned, turned, (2 * size,), (4096, size), (4096, size)]),
        "swiglu_forward": ("swiglu", [(16384, 11264)]),
        "swiglu_backward": ("swiglu_backward", [(16384, 5632), (16384, 11264)]),
        "cross_entropy": ("linear_cross_entropy_rows", [(1024, 256), (128256, 256), (1024,)]),
    }[kernel]


def test_tune_calls_the_operator_of_every_row_with_shapes_that_fit_together():
    """On tensors without storage, so its sizes cost nothing."""
    for kernel, by_arch in TABLE.items():
        for size in {size for by_size in by_arch.values() for size in by_size}:
            with Shapes() as shapes:
                tune.workload(kernel, size, torch.device("meta"))()
            assert shapes.seen[-1] == shapes_of(kernel, size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tune_says_that_there_is_nothing_to_measure(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to measure: no CUDA device")


@pytest.mark.gpu
def test_tune_measures_a_kernel():
    command = [sys.executable, "-m", "kernels.tune", "--kernel", "swiglu_forward", "--samples", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and '"swiglu_forward" ANY: row(' in done.stdout, done.stdout + done.stderr


def test_unsound_candidates_are_not_taken_however_fast():
    fine, spills = row(4, BLOCK=1024), SPILLS
    taken = [
        tune.gated(kernel, size, 90, [config], seconds, tune._fault)
        for kernel, size, config, seconds in (
            ("swiglu_forward", ANY, fine, 200),
            ("attention_forward", 128, spills, 200),
            ("swiglu_forward", ANY, fine, 0),
        )
    ]
    assert taken == [fine, None, None], "one that spills, and one that nobody has judged in time, are not"


def of_a_candidate(number: int) -> bool:
    if number == 1:
        os._exit(3)
    if number == 2:
        time.sleep(60)
    return not torch.cuda.is_initialized() and triton.runtime.driver._active is None  # or CUDA refuses a forked process


def test_candidate_whose_process_dies_or_is_late_costs_only_itself():
    began, before = time.monotonic(), set(multiprocessing.active_children())
    found = tune.answers(of_a_candidate, [(0,), (1,), (3,)], 60)
    assert found == {0: True, 1: "its process ended with exit code 3", 2: True}
    assert tune.answers(of_a_candidate, [(2,)], 0.5, 0.5) == {} and time.monotonic() - began < 50
    assert not set(multiprocessing.active_children()) - before, "nothing runs beside what is timed"


def test_tuned_row_allows_its_odd_calls_what_they_need_and_none_that_breaks_is_taken(monkeypatch):
    config, asked = row(4, BLOCK=1024), tune.calls("attention_dk_dv", 64, 90, attention(64, 64, 4, 2, TMA=True), odd=True)
    assert {(case.call, case.dtype) for case in asked} >= {("one token", "fp16"), ("causal, narrow", "bf16")}
    assert "causal, pointers" not in {case.call for case in asked}, "which the row of 80 serves"
    assert tune.with_odd_calls("swiglu_forward", ANY, 90, config, 200) == config
    for needs, taken in (({0: 0, 1: 24}, replace(config, odd_stack=24)), ({0: 8, 1: "does not compile"}, None), ({}, config)):
        monkeypatch.setattr(tune, "answers", lambda *_, needs=needs: needs)
        assert tune.with_odd_calls("attention_dk_dv", 64, 90, config, 1) == taken


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU")
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_sees_each_kernel_and_what_it_writes(dynamic, monkeypatch):
    """One graph, no copies of inputs for fear that a kernel might write them: traced with fake tensors on a fake Hopper."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    hopper = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda device: None)
    nanostack = torch.ops.nanostack
    written = []

    def note(graph, _):
        launches = (node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target))
        written.extend(node.kwargs["tensors_to_clone"] for node in launches)
        return graph

    def block(x, weight, q, k, angle):
        y, x = kernels.add_rms_norm(x, kernels.rms_norm(x, weight, 1e-5), weight, 1e-5)
        q, k = kernels.rotary(q, k, angle, angle)
        out, lse = kernels.flash_attention(q, k, k, return_lse=True)
        dq = nanostack.flash_attention_backward(out, q, k, k, None, out, lse, True, 0.125)
        dx = nanostack.rms_norm_backward(y, None, x, weight, 1e-5)
        return *dq, *dx, nanostack.swiglu_backward(kernels.swiglu(x), x)

    with FakeTensorMode():
        x, q, k = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((99, 64), (2, 99, 4, 64), (2, 99, 2, 64))
        )
        weight, angle = torch.empty(64, device="cuda"), torch.empty(99, 32, device="cuda")
        compiled = torch.compile(block, backend=aot_autograd(fw_compiler=note), fullgraph=True, dynamic=dynamic)
        compiled(x, weight, q, k, angle)
    assert written == [
        ["y_ptr"],
        ["y_ptr", "residual_out_ptr"],
        ["q_out_ptr", "k_out_ptr"],
        ["out_ptr", "lse_ptr"],
        ["delta_ptr", "dq_ptr"],
        ["dk_ptr", "dv_ptr"],
        ["dx_ptr", "dweight_ptr"],
        ["y_ptr"],
        ["dgate_up_ptr"],
    ]
