"""Inputs at the edge of a dtype: what is finite in fp64 and fits the dtype stays so, and nothing that is not finite is lost.

The right value is the naive formula in fp64, rounded. Where torch in the same dtype has another, that is accepted, too, unless
a test says that only the right one is. As test_kernels.py: on the torch references, in C, interpreted, and on a GPU.
"""

import pytest
import torch
from kernel_oracle import (
    in_double,
    naive_cross_entropy,
    naive_scores,
    on_every_target,
    plain_attention,
    plain_rms_norm,
    plain_swiglu,
)

import kernels
from kernels import configs


def results(function, inputs, size=1.0):
    """Outputs and gradients, with upstream gradients of `size`."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    smooth = [out for out in outputs if out.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    return [*outputs, *torch.autograd.grad(smooth, wanted, [torch.full_like(out, size) for out in smooth])]


def assert_right(kernel, plain, inputs, size=1.0, naive=None, torch_too=True):
    ours, theirs = results(kernel, inputs, size), results(plain, inputs, size)
    exact = results(naive or plain, [in_double(x) for x in inputs], size)
    for i, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        near = {"rtol": max(1e-5, 2 * torch.finfo(mine.dtype).eps), "atol": 1e-30, "equal_nan": True}
        right = torch.isclose(mine, truth.to(mine.dtype), **near)
        if torch_too:
            right |= torch.isclose(mine, other, **near)
        assert right.all(), f"result {i}: {mine[~right]}, torch's {other[~right]}, exact {truth[~right]}"


def column(values, target, grad=True):
    return torch.tensor(values, device=target[0], dtype=target[2]).requires_grad_(grad)


FINITE = [0.0, 1.0, -1.0, 30.0, -30.0, 88.5, -88.5, 1e4, -1e4, 3e38, -3e38]
NOT_FINITE = [float("inf"), -float("inf"), float("nan")]


@on_every_target
@pytest.mark.parametrize("size", [1.0, 1e20])
@pytest.mark.parametrize("up", [0.5, -2.0, 1e20])
def test_swiglu_of_any_gate(up, size, target):
    swiglu = lambda x: kernels.swiglu(x, backend=target[1])  # noqa: E731
    gates = [gate for gate in FINITE if target[2] != torch.float16 or abs(gate) < 6e4]
    up, size = (min(x, 1e4) if target[2] == torch.float16 else x for x in (up, size))
    assert_right(swiglu, plain_swiglu, [column([[gate, up] for gate in gates], target)], size, torch_too=False)
    assert_right(swiglu, plain_swiglu, [column([[gate, up] for gate in NOT_FINITE], target)], size)
    assert_right(swiglu, plain_swiglu, [column([[gate, other] for gate in FINITE for other in NOT_FINITE], target)], size)


@on_every_target
@pytest.mark.parametrize("value", [*FINITE, *NOT_FINITE, 1e20, 1e-20], ids=str)
def test_rms_norm_of_any_row(value, target):
    x, weight = column([[value] * 24, [1.0, value] * 12, [1.0] * 23 + [value]], target), column([1.0, -2.0] * 12, target)
    rms_norm = lambda x, w: kernels.rms_norm(x, w, 1e-5, backend=target[1])  # noqa: E731
    assert_right(rms_norm, lambda x, w: plain_rms_norm(x, w, 1e-5), [x, weight])


@on_every_target
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("size", [1.0, 300.0, 3e4, 1e8, 1.9e19, -1.9e19, 1e30, 3e38, -3e38])
def test_cross_entropy_of_logits_of_any_size(size, z_loss, target):
    """Some of them equal: their share is the same however large they are, and the log of their number is not lost."""
    if target[2] == torch.float16 and abs(size) > 6e4:
        pytest.skip("beyond float16")
    for answer in range(4):
        targets = torch.tensor([answer], device=target[0])
        inputs = [column([[size]], target), column([[1.0], [1.0], [0.5], [-1.0], [0.0]], target)]
        cross_entropy = lambda x, w, t=targets: kernels.linear_cross_entropy(x, w, t, z_loss=z_loss, backend=target[1])  # noqa: E731
        naive = lambda x, w, t=targets: naive_cross_entropy(x, w, t, z_loss=z_loss)  # noqa: E731
        assert_right(cross_entropy, naive, inputs, torch_too=abs(size) > 1e4 and z_loss > 0)


@on_every_target
@pytest.mark.parametrize("answer", [3, 39])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_of_logits_of_minus_infinity(z_loss, answer, target, monkeypatch):
    """A class that is forbidden: the whole first block of a row is, and the target may be."""
    monkeypatch.setitem(configs.TABLE, "cross_entropy", {80: {configs.ANY: configs.row(4, BLOCK_V=16)}})
    weight = torch.linspace(-1, 1, 40)[:, None].index_fill(0, torch.arange(20), -float("inf")).to(target[0], target[2])
    x, targets = column([[1.0]], target, grad=False), torch.tensor([answer], device=target[0])
    cross_entropy = lambda w: kernels.linear_cross_entropy(x, w, targets, z_loss=z_loss, backend=target[1])  # noqa: E731
    naive = lambda w: naive_cross_entropy(x.to(w.dtype), w, targets, z_loss=z_loss)  # noqa: E731
    assert_right(cross_entropy, naive, [weight.requires_grad_()], torch_too=False)


def exact_attention(q, k, v, causal, scale):
    scores = naive_scores(q, k, causal, scale, None)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v), scores.logsumexp(-1).detach()


@on_every_target
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3, -2.0])
def test_attention_of_any_scale(scale, causal, target):
    q, k, v = (torch.randn(1, 37, 1, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    inputs = [x.to(target[0], target[2]).requires_grad_() for x in (q, k, v)]
    ours = results(lambda *t: kernels.flash_attention(*t, causal, scale, return_lse=True, backend=target[1]), inputs)
    exact = results(lambda *t: exact_attention(*t, causal, scale), [in_double(x) for x in inputs])
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=2e-5 if target[2] == torch.float32 else 0.05)


@on_every_target
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", [1e4, -1e4, -1e29, -1e30, -1e31, -1e38, 1e38])
def test_attention_of_scores_of_any_size(score, causal, target):
    """Equal ones give the mean; the largest one takes all. Gradients of equal ones are lost to rounding in torch, too."""
    if target[2] == torch.float16 and abs(score) > 1e5:
        pytest.skip("beyond float16")
    backend, root = target[1], abs(score) ** 0.5

    def inputs(last):
        q, k, v = torch.zeros(1, 21, 1, 16), torch.zeros(1, 21, 1, 16), torch.linspace(-1, 1, 336).view(1, 21, 1, 16)
        q[..., 0], k[..., 0] = root, score / root
        k[0, -1, 0, 0] = last * score / root
        return [x.to(target[0], target[2]).requires_grad_() for x in (q, k, v)]

    def attention(*qkv):
        return kernels.flash_attention(*qkv, causal, 1.0, backend=backend)

    def exact(*qkv):
        return exact_attention(*qkv, causal, 1.0)[0]

    for last in (1.0, 0.5, 2.0):
        assert_right(attention, lambda *qkv: plain_attention(*qkv, causal, 1.0), inputs(last), naive=exact, torch_too=last == 1)
    if abs(score) > 1e20:
        _, lse = kernels.flash_attention(*inputs(1.0), causal, 1.0, return_lse=True, backend=backend)
        torch.testing.assert_close(lse, torch.full_like(lse, score), rtol=0.02, atol=0)
