"""The compiled kernels at the sizes people train with, and past 2^31 elements. Every test needs a GPU."""

import importlib

import pytest
import torch
from kernel_oracle import (
    assert_obeys_error_rule,
    naive_attention,
    naive_cross_entropy,
    naive_rms_norm,
    naive_rotary,
    naive_swiglu,
    outputs_and_gradients,
    plain_attention,
    plain_rms_norm,
    plain_swiglu,
    randn,
)

import kernels

pytestmark = pytest.mark.gpu
EPS = 1e-5
DEVICE = "cuda"
TARGET = (DEVICE, None, torch.bfloat16)
MANY = 2**31 + 2**16  # elements: an int32 offset to the last of them is negative


def check(kernel, plain, naive, inputs, monkeypatch):
    """The error rule, and the same bits from a second run."""
    assert_obeys_error_rule(kernel, plain, naive, inputs, monkeypatch)
    assert all(map(torch.equal, *(outputs_and_gradients(kernel, inputs) for _ in range(2))))


def need_gigabytes(n: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < n:
        pytest.skip(f"needs {n} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("shape", [(8192, 4096), (4, 1000, 2048), (999, 16384), (4097, 5120), (65536, 256)], ids=str)
def test_norms(shape, monkeypatch):
    x, residual, weight = (randn(*s, target=TARGET, seed=i) for i, s in enumerate((shape, shape, shape[-1:])))
    check(
        lambda x, w: kernels.rms_norm(x, w, EPS),
        lambda x, w: plain_rms_norm(x, w, EPS),
        lambda x, w: naive_rms_norm(x, w, EPS),
        (x, weight),
        monkeypatch,
    )
    check(
        lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
        lambda x, r, w: (plain_rms_norm(x + r, w, EPS), x + r),
        lambda x, r, w: (naive_rms_norm(x + r, w, EPS), x + r),
        (x, residual, weight),
        monkeypatch,
    )


@pytest.mark.parametrize(("batch", "seq", "n_head", "n_kv_head", "d_head"), [(2, 4096, 32, 8, 128), (4, 2047, 32, 32, 64)])
def test_rotary(batch, seq, n_head, n_kv_head, d_head, monkeypatch):
    fused = randn(batch, seq, n_head + 2 * n_kv_head, d_head, target=TARGET, grad=False)
    q, k, _ = (x.requires_grad_() for x in fused.split([n_head, n_kv_head, n_kv_head], 2))
    angle = torch.outer(torch.arange(seq + 0.0), 1e4 ** -torch.linspace(0, 1, d_head // 2)).to(DEVICE)
    cos, sin = angle.cos(), angle.sin()

    def naive(q, k):
        return naive_rotary(q, k, cos.to(q.dtype) if q.dtype == torch.float64 else cos, sin)

    check(lambda q, k: kernels.rotary(q, k, cos, sin), naive, naive, (q, k), monkeypatch)


@pytest.mark.parametrize("shape", [(8192, 2 * 11008), (3, 1001, 2 * 5632)], ids=str)
def test_swiglu(shape, monkeypatch):
    check(kernels.swiglu, plain_swiglu, naive_swiglu, (randn(*shape, target=TARGET),), monkeypatch)


@pytest.mark.parametrize("d_head", [64, 80, 128, 256])
@pytest.mark.parametrize(
    ("seq", "causal", "edges"), [(4096, True, None), (1000, False, None), (2048, True, [0, 7, 1100, 2048])]
)
def test_attention(d_head, seq, causal, edges, monkeypatch):
    need_gigabytes(20)
    q = randn(1, seq, 8, d_head, target=TARGET)
    k, v = (randn(1, seq, 2, d_head, target=TARGET, seed=seed) for seed in (1, 2))
    options = {"causal": causal, "cu_seqlens": edges and torch.tensor(edges, dtype=torch.int32, device=DEVICE)}
    check(
        lambda *qkv: kernels.flash_attention(*qkv, **options),
        lambda *qkv: plain_attention(*qkv, **options),
        lambda *qkv: naive_attention(*qkv, **options),
        (q, k, v),
        monkeypatch,
    )


@pytest.mark.parametrize("seq", [1000, 4096])
def test_attention_with_tma_and_with_pointers_agrees(seq, monkeypatch):
    """Rows of 64 + 4 elements apart start on 8 bytes: TMA cannot read them, pointers can."""
    q, k, v = (randn(2, seq, 4, 64, target=TARGET, seed=seed) for seed in range(3))
    apart = [torch.nn.functional.pad(x.detach(), (0, 4))[..., :64].requires_grad_() for x in (q, k, v)]
    for ours, theirs in zip(*(outputs_and_gradients(kernels.flash_attention, x) for x in ((q, k, v), apart)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("vocab", [32000, 50257])
def test_linear_cross_entropy(vocab, monkeypatch):
    need_gigabytes(20)
    x, weight = randn(3000, 2048, target=TARGET), randn(vocab, 2048, target=TARGET, seed=1, scale=2048**-0.5)
    targets = torch.randint(vocab, (3000,), device=DEVICE)
    targets[::7] = -100

    def naive(x, weight):
        return naive_cross_entropy(x, weight, targets, z_loss=1e-4)

    check(lambda x, w: kernels.linear_cross_entropy(x, w, targets, z_loss=1e-4), naive, naive, (x, weight), monkeypatch)


def assert_end_as_alone(function, inputs, sliced, rows=4):
    """The last rows of a result past 2^31 elements are those of the last rows alone, forward and backward."""
    alone = [x.detach()[-rows:].clone().requires_grad_() if i in sliced else x for i, x in enumerate(inputs)]
    out, expected = function(*inputs), function(*alone)
    assert torch.equal(out[-rows:], expected)
    dout = torch.ones_like(out)
    gradients = torch.autograd.grad(out, [inputs[i] for i in sliced], dout)
    wanted = torch.autograd.grad(expected, [alone[i] for i in sliced], dout[-rows:])
    assert all(torch.equal(gradient[-rows:], w) for gradient, w in zip(gradients, wanted, strict=True))


def big(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()


def test_offsets_past_2_to_the_31():
    need_gigabytes(60)
    width = 16384
    x, weight = big(MANY // width, width), torch.ones(width, device=DEVICE)
    assert_end_as_alone(lambda x, w: kernels.rms_norm(x, w, EPS), (x, weight), (0,))
    assert_end_as_alone(kernels.swiglu, (x,), (0,))
    heads = x.detach().view(-1, 2, 64, 128).requires_grad_()
    angle = torch.arange(128.0, device=DEVICE).view(2, 64)
    turned = lambda q: kernels.rotary(q, q, angle.cos(), angle.sin())[0]  # noqa: E731
    assert_end_as_alone(turned, (heads,), (0,))
    heads = x.detach().view(-1, 64, 2, 128).requires_grad_()
    assert_end_as_alone(lambda q: kernels.flash_attention(q, q, q), (heads,), (0,))


def test_logits_past_2_to_the_31(monkeypatch):
    need_gigabytes(40)
    rows, vocab = 20000, 131072
    monkeypatch.setattr(importlib.import_module("kernels.linear_cross_entropy"), "CHUNK_ROWS", rows)
    x, weight, targets = big(rows, 64), big(vocab, 64), torch.randint(vocab, (rows,), device=DEVICE)

    def function(x):
        return kernels.linear_cross_entropy(x, weight.detach(), targets[-len(x) :], reduction="none")

    loss, expected = function(x), function(x.detach()[-4:])
    torch.testing.assert_close(loss[-4:], expected, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx[-4:].isfinite().all() and dx[-4:].abs().sum() > 0


def test_compiled_model_block_gives_the_numbers_of_eager():
    weight, angle = torch.rand(256, device=DEVICE), torch.rand(500, 32, device=DEVICE)
    targets = torch.arange(1000, device=DEVICE)

    def block(x, head):
        y, x = kernels.add_rms_norm(x, kernels.rms_norm(x, weight, EPS), weight, EPS)
        q, k = kernels.rotary(*y.view(2, 500, 4, 64).split(2, 2), angle, angle)
        y = kernels.flash_attention(q, k, k).reshape(1000, 128)
        return kernels.linear_cross_entropy(torch.cat((kernels.swiglu(x), y), -1), head, targets)

    inputs = [randn(1000, 256, target=TARGET), randn(1000, 256, target=TARGET)]
    eager, compiled = (outputs_and_gradients(f, inputs) for f in (block, torch.compile(block, fullgraph=True)))
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    x = torch.randn(8, 64, device="cuda:1")
    torch.testing.assert_close(kernels.rms_norm(x, x[0], EPS), kernels.rms_norm(x, x[0], EPS, backend="torch"))
