"""The switch between backends, the error messages, and what a caller may rely on beside numbers."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from kernel_oracle import all_operations, outputs_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import dispatch

Q, K = torch.randn(2, 6, 4, 16), torch.randn(2, 6, 2, 16)
COS = SIN = torch.zeros(10, 8)
X, W = torch.randn(3, 8), torch.ones(8)
PACKED = torch.randn(1, 6, 2, 16)
ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731

MISTAKES = [
    (lambda: kernels.rms_norm(X, torch.ones(7), 1e-5), r"weight has shape \(7,\).*\(8,\)"),
    (lambda: kernels.rms_norm(X.long(), W, 1e-5), "x is torch.int64"),
    (lambda: kernels.rms_norm(X.to("meta"), W, 1e-5), "weight is on cpu and x on meta"),
    (lambda: kernels.add_rms_norm(X, X[:2], W, 1e-5), r"residual has shape \(2, 8\)"),
    (lambda: kernels.add_rms_norm(X, X.double(), W, 1e-5), "residual is torch.float64"),
    (lambda: kernels.rotary(Q[0], K, COS, SIN), r"q has shape \(6, 4, 16\)"),
    (lambda: kernels.rotary(Q, K[:, :5], COS, SIN), r"k has shape \(2, 5, 2, 16\)"),
    (lambda: kernels.rotary(Q, K.double(), COS, SIN), "k is torch.float64"),
    (lambda: kernels.rotary(Q[..., :15], K[..., :15], COS, SIN), "q has d_head 15; it must be even"),
    (lambda: kernels.rotary(Q, K, COS.bfloat16(), SIN), "cos is torch.bfloat16; it must be torch.float32"),
    (lambda: kernels.rotary(Q, K, COS, SIN, offset=5), r"cos has shape \(10, 8\); it must be \(at least 11, 8\)"),
    (lambda: kernels.rotary(Q, K, COS, SIN, offset=-1), "offset is -1"),
    (lambda: kernels.norm_rotary(Q, W, COS, SIN, 1e-5), r"gain has shape \(8,\); it must be \(16,\)"),
    (lambda: kernels.norm_rotary(Q, Q[0, 0, 0].long(), COS, SIN, 1e-5), "gain is torch.int64"),
    (lambda: kernels.norm_rotary(Q, Q[0, 0, 0], COS, SIN, None), "eps is None; it must be a number"),
    (
        lambda: kernels.norm_rotary(Q, Q[0, 0, 0], COS, SIN, 1e-5, offset=5),
        r"cos has shape \(10, 8\); it must be \(at least 11",
    ),
    (lambda: kernels.linear(X, W[None], W[None], X[0]), r"bias has shape \(8,\); it must be \(1,\)"),
    (lambda: kernels.flash_attention(Q[0], K, K), r"q has shape \(6, 4, 16\)"),
    (lambda: kernels.flash_attention(Q, K.double(), K), "k is torch.float64"),
    (lambda: kernels.flash_attention(Q, K.to("meta"), K), "k is on meta and q on cpu"),
    (lambda: kernels.flash_attention(Q, K, K[:, :5]), "v has shape"),
    (lambda: kernels.flash_attention(Q[:, :, :3], K, K), "the heads of q must be a multiple"),
    (lambda: kernels.flash_attention(Q, K[:, :5], K[:, :5]), "causal attention and cu_seqlens need q and k of one length"),
    (lambda: kernels.flash_attention(Q, K[:, :0], K[:, :0], causal=False), "nothing to attend to"),
    (lambda: kernels.flash_attention(Q, K, K, cu_seqlens=ints(0, 6)), "q has batch 2; cu_seqlens needs batch 1"),
    (lambda: kernels.flash_attention(PACKED, PACKED, PACKED, cu_seqlens=ints(0, 6).long()), "cu_seqlens is torch.int64"),
    (lambda: kernels.flash_attention(PACKED, PACKED, PACKED, cu_seqlens=ints(0, 5)), "must rise from 0 to 6"),
    (lambda: kernels.flash_attention(PACKED, PACKED, PACKED, cu_seqlens=ints(0, 4, 2, 6)), "must rise from 0 to 6"),
    (lambda: kernels.swiglu(torch.randn(3, 7)), r"gate_up has shape \(3, 7\)"),
    (lambda: kernels.swiglu(torch.ones(3, 8).int()), "gate_up is torch.int32"),
    (lambda: kernels.linear_cross_entropy(X, W, torch.zeros(3).long()), r"weight has shape \(8,\)"),
    (lambda: kernels.linear_cross_entropy(X, W[None], torch.zeros(2).long()), r"targets has shape \(2,\); it must be \(3,\)"),
    (lambda: kernels.linear_cross_entropy(X, W[None], ints(0, 0, 0)), "targets is torch.int32"),
    (lambda: kernels.linear_cross_entropy(X.long(), W[None], torch.zeros(3).long()), "x is torch.int64"),
    (lambda: kernels.linear_cross_entropy(X, W[None].long(), torch.zeros(3).long()), "weight is torch.int64"),
    (lambda: kernels.linear_cross_entropy(X, W[None].to("meta"), torch.zeros(3).long()), "weight is on meta and x on cpu"),
    (lambda: kernels.linear_cross_entropy(torch.tensor(1.0), W[None], torch.tensor(0)), "x has no dimensions"),
    (lambda: kernels.linear_cross_entropy(X, W[None], torch.zeros(3).long(), reduction="avg"), "reduction is 'avg'"),
    (lambda: kernels.rms_norm(X, W, None), "eps is None; it must be a number"),
    (lambda: kernels.rms_norm([1.0], W, 1e-5), r"x is \[1.0\]; it must be a torch.Tensor"),
    (lambda: kernels.add_rms_norm(X, None, W, 1e-5), "residual is None; it must be a torch.Tensor"),
    (lambda: kernels.rotary(Q, K, COS, SIN, offset=1.5), "offset is 1.5; it must be a whole number"),
    (lambda: kernels.flash_attention(Q[..., :0], K[..., :0], K[..., :0]), "its heads are empty"),
    (lambda: kernels.rotary_attention(Q, 2, Q, Q), r"it must be \(batch, seq, heads \+ 2 · 2, d_head\)"),
    (lambda: kernels.rotary_attention(Q, 1.0, Q, Q), "n_kv_head is 1.0; it must be a whole number"),
    (lambda: kernels.rotary_attention(Q, 1, Q[0, :, 0], Q[0, :, 0]), "cos has shape"),
    (lambda: kernels.flash_attention(Q, K, K, scale="a"), "scale is 'a'; it must be a number"),
    (lambda: kernels.flash_attention(PACKED, PACKED, PACKED, cu_seqlens=[0, 6]), r"cu_seqlens is \[0, 6\]; it must be a"),
    (lambda: kernels.linear_cross_entropy(X, torch.ones(0, 8), torch.zeros(3).long()), "there is nothing to choose from"),
    (lambda: kernels.linear_cross_entropy(X, W[None], torch.zeros(3).long(), z_loss=None), "z_loss is None"),
    (lambda: kernels.linear_cross_entropy(X, W[None], torch.zeros(3).long(), ignore_index=1.5), "ignore_index is 1.5"),
    (lambda: kernels.swiglu(X, backend="cuda"), "backend is 'cuda'; it must be one of auto, torch, triton, c"),
    (lambda: kernels.set_backend("cuda"), "backend is 'cuda'; it must be one of auto, torch, triton, c"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_triton_on_the_cpu_says_why_not_and_auto_falls_back(monkeypatch):
    assert "TRITON_INTERPRET=1" in kernels.unavailable_reason("cpu")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.swiglu(X, backend="triton")
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda device: None)
    for too_wide in (
        lambda: kernels.rms_norm(torch.ones(2, 16385), torch.ones(16385), 1e-5, backend="triton"),
        lambda: kernels.flash_attention(*[torch.ones(1, 2, 1, 320)] * 3, backend="triton"),
        lambda: kernels.rotary(*[torch.ones(1, 2, 1, 320)] * 2, *[torch.ones(2, 160)] * 2, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"impossible: the kernel takes .* at most"):
            too_wide()
    monkeypatch.undo()
    kernels.set_backend("triton")
    try:
        with pytest.raises(ValueError, match="impossible"):
            kernels.rms_norm(X, W, 1e-5)
        assert kernels.rms_norm(X, W, 1e-5, backend="torch").shape == X.shape
    finally:
        kernels.set_backend("auto")
    assert kernels.rms_norm(X, W, 1e-5).shape == X.shape


def test_unavailable_reason_names_old_devices_and_missing_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernels.unavailable_reason("cuda").endswith("has 7.5.")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.unavailable_reason("cuda") is None
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert "not installed" in kernels.unavailable_reason("cuda")


def test_kernels_work_where_triton_is_not_installed():
    program = """if True:
        import sys
        sys.modules["triton"] = None
        import kernels, torch
        q = torch.randn(1, 4, 2, 8, requires_grad=True)
        kernels.flash_attention(*kernels.rotary(q, q, torch.ones(4, 4), torch.ones(4, 4)), q).sum().backward()
        assert "not installed" in kernels.unavailable_reason("cpu")
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_torch_paths_compile_into_one_graph_and_give_the_same_numbers():
    targets = torch.tensor([0, 3, -100])

    def block(x, weight, q, k, head):
        y, x = kernels.add_rms_norm(x, kernels.rms_norm(x, weight, 1e-5), weight, 1e-5)
        q, k = kernels.rotary(q, k, COS + 0.5, SIN + 0.5, 2)
        attended = kernels.flash_attention(q, k, k).mean()
        return kernels.linear_cross_entropy(kernels.swiglu(torch.cat((y, x), -1)) + attended, head, targets, z_loss=0.1)

    inputs = [t.clone().requires_grad_() for t in (X, W, Q, K, torch.randn(5, 8))]
    loss, compiled = block(*inputs), torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, loss)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs), torch.autograd.grad(loss, inputs))


def test_torch_paths_have_the_gradients_of_finite_differences():
    x, weight = torch.randn(3, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    q, k = (torch.randn(1, 5, h, 4).double().requires_grad_() for h in (2, 1))
    cos, sin, head = (torch.randn(*shape).double() for shape in ((5, 2), (5, 2), (4, 6)))
    targets = torch.arange(3)
    for function, inputs in (
        (lambda x, w: kernels.add_rms_norm(x, x * 2, w, 1e-5), (x, weight)),
        (lambda q, k: kernels.rotary(q, k, cos, sin), (q, k)),
        (lambda q, k: kernels.flash_attention(q, k, k * 2), (q, k)),
        (kernels.swiglu, (x,)),
        (lambda x, w: kernels.linear_cross_entropy(x, w, targets, z_loss=0.1), (x, head.requires_grad_())),
        (lambda x, w: kernels.linear_cross_entropy(x, w, targets, reduction="none"), (x, head)),
    ):
        assert torch.autograd.gradcheck(function, inputs)


OPERATIONS = list(all_operations(("cpu", "torch", torch.float32)))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "documents"])  # their shapes depend on values
def test_torch_paths_compile_once_for_every_size(name):
    """Batch, sequence, heads, width and vocabulary; a second size compiles nothing."""
    target = ("cpu", "torch", torch.float32)
    sizes = {"batch": 5, "seq": 11, "heads": 8, "kv_heads": 4, "width": 40, "vocab": 50}, {"batch": 7, "seq": 17, "heads": 9}
    sizes[1].update(kv_heads=3, width=44, vocab=70)
    torch.compiler.reset()
    function, _ = all_operations(target)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for size, stance in zip(sizes, ("default", "fail_on_recompile"), strict=True):
        inputs = all_operations(target, d_head=26, **size)[name][1]
        with torch.compiler.set_stance(stance):
            found = outputs_and_gradients(compiled, inputs)
        torch.testing.assert_close(found, outputs_and_gradients(function, inputs))


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_cross_entropy_never_holds_all_logits_and_skips_gradients_nobody_wants(monkeypatch):
    rows, width, vocab, chunk = 100, 8, 64, 25
    monkeypatch.setattr(sys.modules["kernels.linear_cross_entropy"], "CHUNK_BYTES", 4 * vocab * chunk)
    monkeypatch.setattr(sys.modules["kernels.linear_cross_entropy"], "CHUNK_ROWS", 1)
    x, head = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    with FlopCounterMode(display=False) as counter:
        kernels.linear_cross_entropy(x, head, targets).backward()
    assert counter.get_total_flops() == 6 * rows * width * vocab
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        kernels.linear_cross_entropy(x, head, targets)
    assert counter.get_total_flops() == 2 * rows * width * vocab
    rows = sys.modules["kernels.linear_cross_entropy"].rows_op._init_fn  # behind the operation, where a mode sees inside
    with LargestTensor() as largest:
        rows(x.detach(), head.detach(), targets, None, -100, 0.0, True, "torch")
    assert largest.elements == vocab * chunk
