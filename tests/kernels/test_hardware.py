"""GPUs that nobody has here: rows compiled for them, the rows that each would get, and what is said where there are none."""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from bench import hardware
from kernels import aot, configs, dispatch
from kernels.configs import ANY, TABLE, attention, row
from kernels.dry import DryGPU
from kernels.machine_code import ARCHITECTURES, target
from nanostack import device as devices
from nanostack import preflight
from nanostack.config import load
from nanostack.parallel import Placement

CUDA = torch.device("cuda", 0)
compiles = pytest.mark.skipif(
    not dispatch.HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)


def faked(monkeypatch, name: str) -> None:
    """A GPU of this kind seems to be there: "7.5", or "gfx942:sramecc+:xnack-"."""
    amd = name.startswith("gfx")
    major, minor = (9, 4) if amd else map(int, name.split("."))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)


@pytest.mark.parametrize(
    ("name", "rows", "widest"),
    [
        ("gfx942:sramecc+:xnack-", "cdna", 256),
        ("gfx90a:sramecc+:xnack-", "cdna", 256),
        ("gfx1100", "rdna3", 64),
        ("8.0", 80, 256),
        ("8.6", 80, 256),
        ("8.9", 80, 256),
        ("9.0", 90, 256),
        ("10.0", 100, 256),
        ("10.3", 100, 256),
        ("12.0", 120, 256),
        ("12.1", 120, 256),
    ],
)
def test_gpu_gets_the_rows_of_its_family_and_bfloat16(name, rows, widest, monkeypatch):
    faked(monkeypatch, name)
    assert configs.architecture(CUDA, torch.bfloat16) == rows and kernels.unavailable_reason(CUDA) is None
    assert kernels.widest_head(CUDA, torch.bfloat16) == widest and devices.compute_dtype(CUDA) == torch.bfloat16
    for kernel in (kernel for kernel in TABLE if kernel.startswith("attention")):
        with_tma = configs.lookup(kernel, 64, CUDA, torch.bfloat16).tiles["TMA"]
        assert with_tma == (rows in (90, 100)) and not configs.lookup(kernel, 64, CUDA, torch.float32).tiles["TMA"]


def test_heads_too_wide_for_the_gpu_are_told_or_refused(monkeypatch, capsys):
    faked(monkeypatch, "gfx1100")
    placement = Placement(CUDA, torch.bfloat16)
    for d_head, named, said in ((None, "auto", ""), (128, "auto", "note: torch computes attention"), (64, "triton", "")):
        config = load(TINY, ["--model.d_head", str(d_head), "--kernels", named])
        found = preflight.backend_of_attention(config, placement, "triton")
        assert found == ("torch" if said else "triton")
        assert capsys.readouterr().err.startswith(said)
    with pytest.raises(ValueError, match="--kernels triton: here the kernel takes a d_head of at most 64, not 128"):
        preflight.backend_of_attention(load(TINY, ["--model.d_head", "128", "--kernels", "triton"]), placement, "triton")


@pytest.mark.parametrize(
    ("name", "said", "dtype"),
    [
        ("7.0", "need compute capability 8.0 or newer and cuda:0 has 7.0.", torch.float32),
        ("7.5", "need compute capability 8.0 or newer and cuda:0 has 7.5.", torch.float32),
        (
            "gfx906:sramecc+:xnack-",
            "of AMD's GPUs the kernels have rows for gfx90a, .* is a gfx906.",
            torch.float32,
        ),
        ("gfx1030", "and cuda:0 is a gfx1030.", torch.float32),
        ("gfx908:sramecc+:xnack-", "and cuda:0 is a gfx908.", torch.bfloat16),
        ("gfx1200", "and cuda:0 is a gfx1200.", torch.bfloat16),
    ],
)
def test_gpu_without_rows_runs_torch_in_a_dtype_that_it_multiplies(name, said, dtype, monkeypatch):
    faked(monkeypatch, name)
    assert re.search(said, kernels.unavailable_reason(CUDA)) and devices.compute_dtype(CUDA) == dtype
    on_it = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=CUDA)
    assert not dispatch.use_triton(None, on_it, kernels.widest_head(CUDA, torch.float16) < 256 or None)
    with pytest.raises(ValueError, match=said):
        dispatch.use_triton("triton", on_it)


@compiles
def test_torch_compile_sees_an_amd_gpu(monkeypatch):
    """It cannot trace the properties of a device, which are asked for once."""
    faked(monkeypatch, "gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or torch asks for the state of its random numbers
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda device: None)
    program = SimpleNamespace(get_current_target=lambda: target("gfx942"), get_current_device=lambda: 0)
    monkeypatch.setattr(dispatch.triton.runtime.driver, "_active", program)
    with FakeTensorMode():
        q = torch.empty(2, 99, 4, 64, dtype=torch.bfloat16, device="cuda")
        compiled = torch.compile(lambda q: kernels.flash_attention(q, q, q), backend="aot_eager", fullgraph=True)
        assert compiled(q).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_an_old_gpu_runs_is_differentiated_by_torch(dtype, monkeypatch):
    """As far as a CPU can tell: every operation of a block in torch, in both dtypes that such a GPU multiplies."""
    x, weight = torch.randn(6, 16, dtype=dtype, requires_grad=True), torch.ones(16)
    q, cos = torch.randn(1, 6, 2, 8, dtype=dtype, requires_grad=True), torch.ones(6, 4)
    y = kernels.swiglu(kernels.rms_norm(x, weight, 1e-5, backend="torch"), backend="torch")
    out = kernels.flash_attention(*kernels.rotary(q, q, cos, cos, backend="torch"), q, backend="torch")
    loss = kernels.linear_cross_entropy(y, torch.randn(9, 8, dtype=dtype), torch.arange(6), backend="torch")
    (loss + out.float().sum()).backward()
    assert x.grad.dtype == q.grad.dtype == dtype and bool(x.grad.isfinite().all() and q.grad.isfinite().all())


def inspected(*cases: tuple) -> list[aot.Report]:
    """Reports on (architecture, kernel, size, call, dtype) with the row in use, or the row that comes last."""
    todo = []
    for arch, kernel, size, call, dtype, *config in cases:
        in_use = configs.fitting(configs.rows_for(kernel, configs.rows_of(arch)), size)
        todo.append(aot.Case(kernel, size, call, arch, dtype, *(config or [in_use])))
    return aot.judge(todo, [aot.build(case) for case in todo])


@compiles
def test_sample_of_rows_for_amd_consumer_cards_and_blackwell_compiles():
    """All of them: python -m kernels.aot --arch gfx942 gfx90a gfx1100 86 89 120 100."""
    reports = inspected(
        ("gfx942", "attention_dk_dv", 128, "causal, documents", "bf16"),
        ("gfx90a", "attention_forward", 64, "causal", "fp16"),
        ("gfx1100", "attention_dq", 64, "causal", "bf16"),
        ("gfx942", "swiglu_forward", ANY, "", "bf16"),
        ("gfx90a", "rms_norm_backward", 16384, "with residual", "bf16"),
        ("gfx1100", "cross_entropy", ANY, "loss", "bf16"),
        (86, "attention_dq", 64, "causal", "bf16"),
        (89, "attention_dk_dv", 128, "causal", "fp16"),
        (100, "attention_dk_dv", 128, "causal, documents", "bf16"),
        (100, "attention_dk_dv", 256, "documents", "bf16"),
        (120, "attention_dq", 256, "causal, documents", "bf16"),
    )
    assert not [report for report in reports if report.faults or report.stack]
    counts = [report.instructions for report in reports]
    assert all(counts[i]["MFMA"] and not counts[i]["WMMA"] for i in (0, 1)) and counts[2]["WMMA"] and not counts[2]["MFMA"]


@compiles
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (("gfx942", "attention_dq", 128, "causal", "bf16", attention(64, 64, 8, 2)), r"stack of \d+ bytes, 0 allowed"),
        (
            ("gfx942", "attention_forward", 64, "causal", "bf16", attention(1024, 16, 16, 1)),
            "bytes of shared memory, 65536",
        ),
        (("gfx90a", "rms_norm_forward", 16384, "alone", "bf16", row(32, BLOCK_ROWS=1)), "2048 threads, 1024 at most"),
        (("gfx942", "swiglu_forward", ANY, "", "bf16", row(4, BLOCK=1024)), "no load of 16 bytes at a time"),
        (("gfx1100", "attention_forward", 32, "causal", "bf16", attention(128, 64, 8, 1, TMA=True)), "TMA is not used"),
    ],
)
def test_gate_catches_a_row_that_is_wrong_on_amd(case, fault):
    (report,) = inspected(case)
    assert any(re.search(fault, said) for said in report.faults), report


@compiles
def test_dry_amd_gpu_compiles_what_is_launched_and_wide_heads_of_rdna3_are_none_of_it():
    narrow, wide = (torch.empty(1, 128, 2, d_head, dtype=torch.bfloat16) for d_head in (64, 128))
    with DryGPU("gfx1100") as gpu:
        kernels.flash_attention(narrow, narrow, narrow)
        assert gpu.launches == 1
        kernels.flash_attention(wide, wide, wide)
        assert gpu.launches == 1
        with pytest.raises(ValueError, match="the kernel takes a d_head of at most 64 here, not 128"):
            kernels.flash_attention(wide, wide, wide, backend="triton")


def test_the_gate_refuses_an_architecture_that_it_has_no_rows_for(capsys):
    with pytest.raises(SystemExit) as ended:
        aot.main(["--arch", "gfx1030"])
    assert ended.value.code == 2 and "gfx1030" in capsys.readouterr().err


def test_table_of_the_page_is_what_the_command_writes():
    page = (ROOT / "docs/hardware.md").read_text()
    assert hardware.placed(page, hardware.table()) == page, "python bench/hardware.py"


def test_nothing_is_claimed_that_was_not_done(monkeypatch):
    """Compiled is what was compiled since a row or a kernel changed; run is what a file of results proves."""
    lines = {line.split(" | ")[1]: line.split(" | ") for line in hardware.table().splitlines()[2:]}
    assert {arch for arch, line in lines.items() if line[0] != "| CPU" and "bench/results/" in line[5]} == {"sm_90"}
    assert all(lines[arch][5] == "nothing" for arch in ("gfx90a", "gfx942", "gfx1100", "sm_100", "sm_120"))
    told = [lines[hardware.named(arch)][3] for arch in ARCHITECTURES]
    assert all("rows" in said and "faults" not in said for said in told), "the whole gate, once a row has changed"
    for change in (
        lambda other: other.setitem(TABLE, "swiglu_forward", {80: {ANY: row(8, BLOCK=1024)}}),
        lambda other: other.setattr(aot, "getsource", lambda kernel: "another"),
    ):
        with monkeypatch.context() as other:
            change(other)
            assert hardware.table().count("not since a row or a kernel changed") == len(ARCHITECTURES)


def test_results_find_the_row_of_their_device_and_leave_what_they_lack(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "RESULTS", tmp_path)
    (tmp_path / "a100").mkdir()
    timed = [{"op": op, "way": "nanostack"} for op in ("rms_norm", "swiglu", "flash_attention")]
    (tmp_path / "a100/kernels.json").write_text(json.dumps({"device": "NVIDIA A100-SXM4-80GB", "rows": timed}))
    lines = {line.split(" | ")[1]: line.split(" | ")[5:] for line in hardware.table().splitlines()[2:]}
    assert lines["sm_80"][0].endswith("flash_attention: `bench/results/a100/kernels.json`")
    assert lines["sm_80"][1] == "timing rotary, cross entropy, training |" and lines["sm_90"][0] == "nothing"


def test_gate_that_was_not_whole_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "COMPILED", tmp_path / "compiled.json")
    case = next(aot.cases("gfx942", ["swiglu_forward"]))
    report = {"kernel": case.kernel, "size": None, "call": "", "arch": "gfx942", "dtype": "bf16", "stack": 0, "faults": []}
    (tmp_path / "told.json").write_text(json.dumps({"triton": "3.7.1", "kernels": [report]}))
    for file, said in (("told.json", "1 calls of gfx942 were compiled, and it has"), ("none.json", "there is no ")):
        monkeypatch.setattr(sys, "argv", ["hardware.py", str(tmp_path / file)])
        assert hardware.main() == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "compiled.json").exists()
