"""The dry GPU (kernels/dry.py, tests/dry_gpu.py): planted faults are caught, and what it cannot run is known by name."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from dry_gpu import NOT_DRY

import kernels
from kernels import attention_triton, configs, dispatch, dry
from kernels.dry import DryFault, DryGPU

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
tl = triton.language


def qkv(*shape: int, dtype=torch.bfloat16):
    return [torch.empty(shape, dtype=dtype).requires_grad_() for _ in range(3)]


@triton.jit
def copy_box(x_ptr, stride_x_seq, BLOCK: tl.constexpr, TMA: tl.constexpr):
    box = tl.make_tensor_descriptor(x_ptr, [BLOCK, 16], [stride_x_seq, 1], [BLOCK, 16])
    box.store([0, 0], box.load([0, 0]))


def test_box_that_tma_refuses_is_caught():
    x = torch.empty(512, 16, dtype=torch.bfloat16)
    with DryGPU(90) as gpu:
        gpu.launch(copy_box, (1,), configs.row(4), x, 16, BLOCK=256, TMA=True)
        with pytest.raises(DryFault, match="a TMA box of 512×16, 256 at most"):
            gpu.launch(copy_box, (1,), configs.row(4), x, 16, BLOCK=512, TMA=True)
        with pytest.raises(DryFault, match="TMA reads x, which starts 8 bytes behind a multiple of 16"):
            gpu.launch(copy_box, (1,), configs.row(4), x.view(-1)[4:], 16, BLOCK=256, TMA=True)
        with pytest.raises(DryFault, match="TMA reads x of stride_x_seq = 20 elements, no multiple of 16 bytes"):
            gpu.launch(copy_box, (1,), configs.row(4), x, 20, BLOCK=256, TMA=True)
        with pytest.raises(DryFault, match="a grid of"):
            gpu.launch(copy_box, (1, 65536), configs.row(4), x, 16, BLOCK=256, TMA=True)


def test_tile_that_spills_is_caught(monkeypatch):
    rows = {90: {128: configs.attention(128, 256, 4, 1, TMA=True)}}
    monkeypatch.setitem(configs.TABLE, "attention_forward", rows)
    with DryGPU(90), pytest.raises(DryFault, match=r"stack of \d+ bytes, 0 allowed"):
        kernels.flash_attention(*qkv(1, 512, 2, 128))


def test_pipelined_loop_over_heads_is_caught(monkeypatch):
    """What failed on an H100 on 2026-11-27: dK/dV of one token, with more than one head to a kv head."""
    new, old = attention_triton.attention_dk_dv_kernel, triton.JITFunction(attention_triton.attention_dk_dv_kernel.fn)
    loop = "tl.range(kv_head * group, (kv_head + 1) * group, num_stages=1)"
    assert new.src.count(loop) == 1
    old._unsafe_update_src(new.src.replace(loop, loop.replace("tl.range", "range").replace(", num_stages=1", "")))
    (q, *_), (k, v, _) = qkv(2, 1, 2, 64, dtype=torch.float16), qkv(2, 1, 1, 64, dtype=torch.float16)
    with DryGPU(90):
        kernels.flash_attention(q, k, v).backward(q.detach())
        monkeypatch.setattr(attention_triton, "attention_dk_dv_kernel", old)
        with pytest.raises(DryFault, match=r"attention_dk_dv_kernel does not compile for sm_90: .*PassManager"):
            kernels.flash_attention(q, k, v).backward(q.detach())


def test_tensors_that_tma_cannot_read_get_a_row_without_it():
    apart = [torch.empty(1, 100, 2, 68, dtype=torch.bfloat16)[..., :64].requires_grad_() for _ in range(3)]
    with DryGPU(90) as gpu:
        kernels.flash_attention(*apart).backward(torch.empty(1, 100, 2, 64, dtype=torch.bfloat16))
        assert gpu.launches == 3
    assert dispatch._dry is None, "behind the block launches run again"


def test_amd_device_without_rows_is_refused_and_gets_none_of_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx940:xnack-"))
    assert "and cuda is a gfx940" in kernels.unavailable_reason("cuda")
    on_it = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert not dispatch.use_triton(None, on_it)
    with pytest.raises(ValueError, match="AMD"):
        dispatch.use_triton("triton", on_it)


@pytest.mark.slow
def test_sample_of_gpu_tests_compiles():
    """All of them: make dry-gpu. Here each operation in one dtype at least, and each dtype with one at least."""
    chosen = "one_token or another_length or (norms and not float16) or (test_rotary and float32)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--dry-gpu=sm_90", "tests/kernels/test_gpu.py"]
    done = subprocess.run([*command, "-k", chosen], cwd=ROOT, capture_output=True, text=True)
    told = re.search(r"sm_90: (\d+) tests, (\d+) launches, (\d+) kernels compiled; nothing was run, and (\d+)", done.stdout)
    assert done.returncode == 0 and told, done.stdout[-3000:] + done.stderr
    tests, launches, compiled, assertions = map(int, told.groups())
    assert tests > 8 and launches > 2 * tests and compiled > 20 and assertions > tests, told[0]


@pytest.mark.parametrize(
    ("names", "interpreted", "said"),
    [
        ("sm_70", False, "it takes architectures by comma, of sm_80, sm_86, .*, not sm_70"),
        ("", False, "it takes architectures by comma, of sm_80, .*, not nothing"),
        ("sm_90", True, "TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled: unset it"),
    ],
)
def test_dry_run_that_cannot_be_is_refused_in_a_line(names, interpreted, said, monkeypatch, capsys):
    monkeypatch.setattr(dry, "INTERPRETED", interpreted)
    code = pytest.main([f"--dry-gpu={names}", "-s", "-p", "no:cacheprovider", str(ROOT / "tests/kernels/test_gpu.py")])
    assert code == 4 and re.search(f"ERROR: --dry-gpu: {said}", capsys.readouterr().err)


def test_dry_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr(dry, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        DryGPU(90)


def test_no_more_tests_than_these_need_a_device():
    """A gpu test that launches kernels is to run dry. Add to the list what cannot, and say why beside it."""
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(NOT_DRY) <= 14
    assert not [name for name in NOT_DRY if f"def {name}(" not in sources]
