"""Inputs at the edge of a dtype: what is finite in fp64 and fits the dtype stays so, and nothing that is not finite is lost.

The right value is the formula in fp64, rounded. Where torch in the same dtype has another, that is accepted, too, unless
a test says that only the right one is. As test_operations.py: on the torch paths, in C, interpreted, and on a GPU.
"""

import dry_gpu
import pytest
import torch
from kernel_oracle import (
    holds,
    in_double,
    in_turn,
    on_every_target,
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


def assert_right(kernel, plain, inputs, size=1.0, reference=None, torch_too=True, slack=()):
    """`slack`: how much of rounding, in units of the dtype's, each result may show beside its own size."""
    ours = results(kernel, inputs, size)
    if dry_gpu.active:
        return dry_gpu.pass_over()
    theirs = results(plain, inputs, size)
    exact = results(reference or plain, [in_double(x) for x in inputs], size)
    for i, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        unit, mine, other, truth = 8 * torch.finfo(mine.dtype).eps, mine.double(), other.double(), truth.to(mine.dtype).double()
        near = unit * (truth.abs() + (slack[i] if slack else 0)) + 1e-36
        right = (mine - truth).abs() <= near
        if torch_too:
            right |= (mine - truth).abs() <= 2 * (other - truth).abs()
            right |= torch.isclose(mine, other, rtol=0, atol=0, equal_nan=True)
        right |= torch.isclose(mine, truth, rtol=0, atol=0, equal_nan=True)
        assert right.all(), f"result {i}: {mine[~right]}, torch's {other[~right]}, exact {truth[~right]}"


def column(values, target, grad=True):
    return torch.tensor(values, device=target[0], dtype=target[2]).requires_grad_(grad)


FINITE = [0.0, 1.0, -1.0, 30.0, -30.0, 88.5, -88.5, 1e4, -1e4, 3e38, -3e38]
NOT_FINITE = [float("inf"), -float("inf"), float("nan")]


@in_turn(size=[1.0, 1e20], up=[0.5, -2.0, 1e20])
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
    assert_right(rms_norm, lambda x, w: plain_rms_norm(x, w, 1e-5), [x, weight], slack=(0, 1, 100))


def exact_cross_entropy(x, weight, targets, z_loss):
    """In logits less their maximum, as the log of a sum of ones is lost beside 1e30 in fp64, too."""
    logits = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
    most = logits.detach().amax(-1, keepdim=True)
    log_sum = (logits - most).exp().sum(-1).log()
    lse = log_sum + most[:, 0]
    return (log_sum - (logits - most).gather(-1, targets[:, None])[:, 0] + (z_loss * lse * lse if z_loss else 0)).sum()


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
        reference = lambda x, w, t=targets: exact_cross_entropy(x, w, t, z_loss)  # noqa: E731
        assert_right(cross_entropy, reference, inputs, torch_too=False, slack=(1, 1 + abs(size * z_loss), abs(size)))


@in_turn(answer=[3, 39], z_loss=[0.0, 1e-2])
def test_cross_entropy_of_logits_of_minus_infinity(z_loss, answer, target, monkeypatch):
    """A class that is forbidden: the whole first block of a row is, and the target may be."""
    monkeypatch.setitem(configs.TABLE, "cross_entropy", {80: {configs.ANY: configs.row(4, BLOCK_V=16)}})
    weight = torch.linspace(-1, 1, 40)[:, None].index_fill(0, torch.arange(20), -float("inf")).to(target[0], target[2])
    x, targets = column([[1.0]], target, grad=False), torch.tensor([answer], device=target[0])
    cross_entropy = lambda w: kernels.linear_cross_entropy(x, w, targets, z_loss=z_loss, backend=target[1])  # noqa: E731
    reference = lambda w: exact_cross_entropy(x.to(w.dtype), w, targets, z_loss)  # noqa: E731
    assert_right(cross_entropy, reference, [weight.requires_grad_()], torch_too=False, slack=(1, 1))


def exact_attention(q, k, v, causal, scale):
    out, lse = kernels.flash_attention_reference(q, k, v, causal, scale, return_lse=True)
    return out, lse.detach()


@in_turn(causal=[True, False], scale=[0.3, 0.0, -0.3, -2.0])
def test_attention_of_any_scale(scale, causal, target):
    q, k, v = (torch.randn(1, 37, 1, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    inputs = [x.to(target[0], target[2]).requires_grad_() for x in (q, k, v)]
    ours = results(lambda *t: kernels.flash_attention(*t, causal, scale, return_lse=True, backend=target[1]), inputs)
    exact = results(lambda *t: exact_attention(*t, causal, scale), [in_double(x) for x in inputs])
    for mine, truth in zip(ours, exact, strict=True):
        loose = {"rtol": 0, "atol": 2e-5} if target[2] == torch.float32 else {"rtol": 0.02, "atol": 0.12}
        torch.testing.assert_close(mine.double(), truth, **loose)


def attention_inputs_of(score, last, target):
    """Inputs whose scores are all `score`, but for those of the last key, which are `last` times as large."""
    root = abs(score) ** 0.5
    q, k, v = torch.zeros(1, 21, 1, 16), torch.zeros(1, 21, 1, 16), torch.linspace(-1, 1, 336).view(1, 21, 1, 16)
    q[..., 0], k[..., 0] = root, score / root
    k[0, -1, 0, 0] *= last
    return [x.to(target[0], target[2]).requires_grad_() for x in (q, k, v)]


# Compiled, the backward pass forms dot · scale − lse in one instruction, and only lse was rounded before: beyond this size half
# of its last bit is no small number, and exp2 of it is far from 1. To round both would take an instruction more for each score.
FUSED = 1e6
SCORES = [1e4, -1e4, -1e29, -1e30, -1e31, -1e38, 1e38]


@on_every_target
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_attention_of_equal_scores_is_the_mean(score, causal, target):
    """The gradients of scores that size are lost to rounding, in torch, too; they stay finite."""
    if target[2] == torch.float16 and abs(score) > 1e5:
        pytest.skip("beyond float16")
    inputs = attention_inputs_of(score, 1.0, target)
    out, lse, *gradients = results(
        lambda *qkv: kernels.flash_attention(*qkv, causal, 1.0, return_lse=True, backend=target[1]), inputs
    )
    seen = torch.arange(1, 22, device=target[0]) if causal else torch.full((21,), 21, device=target[0])
    values = inputs[2].double()
    exact = values.cumsum(1) / seen[:, None, None] if causal else values.mean(1, keepdim=True).expand_as(values)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6 if target[2] == torch.float32 else 0.01)
    exact = score + seen.log().expand_as(lse)
    torch.testing.assert_close(lse, exact, rtol=1e-5 if target[2] == torch.float32 else 0.02, atol=0)
    if target[0] == "cpu" or abs(score) < FUSED:
        assert holds(all(gradient.isfinite().all() for gradient in gradients))


@on_every_target
@pytest.mark.parametrize("score", SCORES)
def test_largest_score_takes_all(score, target):
    if target[2] == torch.float16 and abs(score) > 1e5:
        pytest.skip("beyond float16")
    inputs = attention_inputs_of(score, 0.5 if score < 0 else 2.0, target)
    out, _, _, dv = results(lambda *qkv: kernels.flash_attention(*qkv, False, 1.0, backend=target[1]), inputs)
    assert torch.equal(out, inputs[2][:, -1:].expand_as(out))
    if target[0] == "cpu" or abs(score) < FUSED:
        exact = torch.zeros_like(dv).index_fill(1, torch.tensor([20], device=target[0]), 21.0)
        torch.testing.assert_close(dv, exact, rtol=2e-3 if target[0] == "cuda" else 0, atol=0)
