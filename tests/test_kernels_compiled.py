"""Builds every Triton kernel for sm_90 and sm_80 with the configurations we launch and reads the machine code. Needs no GPU."""

import importlib
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

attention, rms_norm, rotary, swiglu = (
    importlib.import_module(f"kernels.{name}") for name in ("flash_attention", "rms_norm", "rotary", "swiglu")
)
SHARED_MEMORY = {90: 227 * 1024, 80: 99 * 1024}  # sm_80 has 163 KiB, its launch table serves sm_86 and sm_120 too
TYPES = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "dweight_ptr": "*fp32", "weight_ptr": "*fp32", "cos_ptr": "*fp32"}
TYPES |= {"sin_ptr": "*fp32", "bounds_ptr": "*i32"}


def build(kernel, arch, config, tmp_path, absent=(), **constants):
    """The compiled kernel and its SASS for bf16 tensors with 16-byte alignment; pointers in `absent` are None."""
    options = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    constants |= {name: value for name, value in config.items() if name not in options} | dict.fromkeys(absent)
    names = [parameter.name for parameter in kernel.params]
    kinds = {n: TYPES.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names}
    signature = {n: "constexpr" if n in constants else kind for n, kind in kinds.items()}
    aligned = [i for i, n in enumerate(names) if n.endswith(("_ptr", "_len", "rows", "width", "d_ff")) or "stride" in n]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in constants}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(what):
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout

    stack = int(re.search(r"STACK:(\d+)", dump("--dump-resource-usage"))[1])
    return compiled.metadata.shared, stack, dump("--dump-sass")


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("d_head", [64, 128])
@pytest.mark.parametrize("name", ["forward", "dk_dv", "dq"])
def test_attention_fits_the_registers_and_uses_the_matrix_units(name, d_head, arch, tmp_path):
    kernel = getattr(attention, f"attention_{name}_kernel")
    config = attention.launch_config(f"sm_{arch}", d_head, torch.bfloat16)[name]
    shared, stack, sass = build(kernel, arch, config, tmp_path, absent=("bounds_ptr",), SCALE=0.125, CAUSAL=True, D=d_head)
    assert stack == 0, "registers are spilled"
    assert shared <= SHARED_MEMORY[arch]
    assert ("HGMMA" if arch == 90 else "HMMA") in sass
    assert arch == 80 or not re.search(r"\bHMMA", sass), "the slow matrix path on Hopper"


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("name", ["forward", "dk_dv", "dq"])
def test_attention_with_documents_fits_for_the_widest_heads(name, arch, tmp_path):
    kernel = getattr(attention, f"attention_{name}_kernel")
    config = attention.launch_config(f"sm_{arch}", 256, torch.bfloat16)[name]
    shared, stack, _ = build(kernel, arch, config, tmp_path, SCALE=0.125, CAUSAL=True, D=256)
    assert stack <= 32 and shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("arch", [90, 80])
def test_memory_bound_kernels_fit_the_registers_and_move_16_bytes_at_a_time(arch, tmp_path):
    builds = {
        "rotary": (rotary.rotary_kernel, rotary.launch_config(32, 64), {"HALF": 64, "INVERSE": False}),
        "swiglu forward": (swiglu.swiglu_forward_kernel, swiglu.LAUNCH, {}),
        "swiglu backward": (swiglu.swiglu_backward_kernel, swiglu.LAUNCH, {}),
    }
    for width in (192, 8192):
        config = rms_norm.launch_config(width)
        builds[f"rms_norm forward {width}"] = (rms_norm.rms_norm_forward_kernel, config, {"EPS": 1e-5})
        builds[f"rms_norm backward {width}"] = (rms_norm.rms_norm_backward_kernel, config, {"EPS": 1e-5})
    for name, (kernel, config, constants) in builds.items():
        shared, stack, sass = build(kernel, arch, config, tmp_path, **constants)
        assert stack == 0 and shared <= 48 * 1024, name
        assert re.search(r"LDG\.E\.(\w+\.)*128", sass), f"{name} loads too few bytes at a time"


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU")
def test_torch_compile_sees_each_kernel_and_what_it_writes(monkeypatch):
    """One graph, no copies of inputs for fear that a kernel might write them: traced with fake tensors on a fake Hopper."""
    hopper = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(importlib.import_module("kernels.dispatch"), "unavailable_reason", lambda device: None)
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
        torch.compile(block, backend=aot_autograd(fw_compiler=note), fullgraph=True)(x, weight, q, k, angle)
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
