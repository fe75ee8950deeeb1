"""Numbers: each operation, its outputs and all its gradients, against the reference beside each kernel in fp64.

This file runs three times: here on the torch and C paths, in test_interpreted.py on the interpreted Triton kernels, and
with a CUDA device on the compiled ones.
"""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracle import (
    INTERPRETED,
    all_operations,
    assert_obeys_error_rule,
    attention_inputs,
    check_attention,
    few_examples,
    holds,
    in_turn,
    on_every_target,
    on_triton,
    outputs_and_gradients,
    plain_rms_norm,
    plain_swiglu,
    randn,
)

import kernels
from kernels import configs, tune

EPS = 1e-5


def check_rms_norm(x, weight, target, monkeypatch):
    assert_obeys_error_rule(
        lambda x, w: kernels.rms_norm(x, w, EPS, backend=target[1]),
        lambda x, w: plain_rms_norm(x, w, EPS),
        lambda x, w: kernels.rms_norm_reference(x, w, EPS),
        (x, weight),
        monkeypatch,
    )


def check_add_rms_norm(x, residual, weight, target, monkeypatch):
    assert_obeys_error_rule(
        lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS, backend=target[1]),
        lambda x, r, w: (plain_rms_norm(x + r, w, EPS), x + r),
        lambda x, r, w: kernels.add_rms_norm_reference(x, r, w, EPS),
        (x, residual, weight),
        monkeypatch,
    )


@in_turn(shape=[(1, 1), (192,), (37, 192), (3, 5, 781), (2, 3, 4, 64), (3, 4096)])
def test_rms_norm_obeys_error_rule_in_every_rank(shape, target, monkeypatch):
    weight = randn(shape[-1], target=target, seed=1)
    check_rms_norm(randn(*shape, target=target), weight, target, monkeypatch)
    residual = randn(*shape, target=target, seed=2)
    check_add_rms_norm(randn(*shape, target=target), residual, weight, target, monkeypatch)


@in_turn()
def test_rms_norm_takes_strided_inputs_and_fp32_weight(target, monkeypatch):
    weight = randn(96, target=target, seed=1).detach().float().requires_grad_()
    for view in (lambda x: x.transpose(0, 1)[:13], lambda x: x[:, ::2, :96], lambda x: x.transpose(1, 2)[..., :96]):
        x, residual = (view(randn(4, 100, 100, target=target, seed=seed, grad=False)) for seed in (0, 1))
        x, residual = x[:, :5, :96].requires_grad_(), residual[:, :5, :96].requires_grad_()
        assert not x.is_contiguous()
        check_rms_norm(x, weight, target, monkeypatch)
        check_add_rms_norm(x, residual, weight, target, monkeypatch)


@on_every_target
def test_add_rms_norm_normalises_the_rounded_sum_it_returns(target):
    """The backward pass sees that sum only: normalising the unrounded one would make it the gradient of another function."""
    x, residual, weight = randn(50, 64, target=target), randn(50, 64, target=target, seed=1), randn(64, target=target)
    y, residual_out = kernels.add_rms_norm(x, residual, weight, EPS, backend=target[1])
    assert torch.equal(residual_out, x + residual)
    assert torch.equal(y, kernels.rms_norm(residual_out, weight, EPS, backend=target[1]))


@in_turn()
def test_rms_norm_takes_the_gradient_of_a_sum(target):
    """sum() sends back an expanded tensor of strides 0, which has no unit stride to walk along."""
    x, weight = randn(3, 40, target=target), randn(40, target=target)
    dx = torch.autograd.grad(kernels.rms_norm(x, weight, EPS, backend=target[1]).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(plain_rms_norm(x, weight, EPS).sum(), x))


@on_every_target
@given(rows=st.integers(1, 40), width=st.integers(1, 300))
@few_examples
def test_rms_norm_obeys_error_rule_in_any_shape(rows, width, target, monkeypatch):
    check_rms_norm(randn(rows, width, target=target), randn(width, target=target, seed=1), target, monkeypatch)


@in_turn(shape=[(2,), (3, 74), (2, 5, 384), (1, 2, 3, 2050)])
def test_swiglu_obeys_error_rule_in_every_rank(shape, target, monkeypatch):
    gate_up = randn(*shape, target=target, scale=3)
    swiglu = lambda x: kernels.swiglu(x, backend=target[1])  # noqa: E731
    assert_obeys_error_rule(swiglu, plain_swiglu, kernels.swiglu_reference, (gate_up,), monkeypatch)
    strided = randn(4, 6, 2 * shape[-1], target=target, grad=False).transpose(0, 1)[..., : shape[-1]].requires_grad_()
    assert_obeys_error_rule(swiglu, plain_swiglu, kernels.swiglu_reference, (strided,), monkeypatch)
    apart = randn(5, 3 * shape[-1], target=target, grad=False)[:, : shape[-1]].requires_grad_()  # walked without a copy
    assert_obeys_error_rule(swiglu, plain_swiglu, kernels.swiglu_reference, (apart,), monkeypatch)


@on_every_target
def test_linear_obeys_error_rule_and_takes_an_fp32_master(target, monkeypatch):
    """The product is the vendor's; what is ours is where its gradient goes, and in which dtype."""
    x, weight = randn(3, 5, 24, target=target), randn(10, 24, target=target, seed=1)
    for master in (weight, weight.detach().float().requires_grad_()):
        assert_obeys_error_rule(
            lambda x, w: kernels.linear(x, w, w.detach().to(x.dtype)),
            *[kernels.linear_reference] * 2,
            (x, master),
            monkeypatch,
        )


@in_turn()
def test_linear_adds_to_the_gradient_that_is_there(target):
    x, weight = randn(3, 5, 24, target=target), randn(10, 24, target=target, seed=1)
    for _ in range(2):
        kernels.linear(x, weight, weight.detach()).sum().backward()
    once = torch.autograd.grad(kernels.linear_reference(x, weight).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, 2 * once, rtol=0.02, atol=0.02)


def test_references_keep_double_precision():
    """They are what fp64 results come from: none rounds to less on the way."""
    for name, function, inputs in (
        ("rms_norm", kernels.rms_norm_reference, ((3, 8), (8,), EPS)),
        ("add_rms_norm", kernels.add_rms_norm_reference, ((3, 8), (3, 8), (8,), EPS)),
        ("rotary", kernels.rotary_reference, ((1, 3, 2, 8), (1, 3, 1, 8), (3, 4), (3, 4))),
        ("norm_rotary", kernels.norm_rotary_reference, ((1, 3, 2, 8), (8,), (3, 4), (3, 4), EPS)),
        ("flash_attention", kernels.flash_attention_reference, ((1, 3, 2, 8), (1, 3, 1, 8), (1, 3, 1, 8))),
        ("swiglu", kernels.swiglu_reference, ((3, 8),)),
        ("linear", kernels.linear_reference, ((3, 8), (5, 8), (5,))),
        (
            "linear_cross_entropy",
            lambda x, w: kernels.linear_cross_entropy_reference(x, w, torch.arange(3), z_loss=0.1),
            ((3, 8), (5, 8)),
        ),
    ):
        given = [torch.rand(x).double().requires_grad_() if isinstance(x, tuple) else x for x in inputs]
        out = function(*given)
        assert all(x.dtype == torch.float64 for x in (out if isinstance(out, tuple) else (out,))), name
        assert torch.autograd.gradcheck(function, given), name


@in_turn()
@given(data=st.data())
@few_examples
def test_strides_do_not_matter(data, target, monkeypatch):
    """Any order of dimensions in memory, any gaps between rows: the same numbers as from contiguous tensors."""

    def laid_out(*shape, seed):
        order = data.draw(st.permutations(range(len(shape))))
        gap = data.draw(st.integers(0, 3))
        memory = randn(*(shape[i] + gap for i in order), target=target, seed=seed, grad=False)
        inverse = [order.index(i) for i in range(len(shape))]
        return memory.permute(inverse)[tuple(slice(0, n) for n in shape)].requires_grad_()

    weight = randn(24, target=target)
    check_add_rms_norm(laid_out(2, 5, 24, seed=1), laid_out(2, 5, 24, seed=2), weight, target, monkeypatch)
    swiglu = lambda x: kernels.swiglu(x, backend=target[1])  # noqa: E731
    assert_obeys_error_rule(swiglu, plain_swiglu, kernels.swiglu_reference, (laid_out(3, 4, 20, seed=3),), monkeypatch)
    q, k, v = laid_out(2, 19, 4, 32, seed=4), laid_out(2, 19, 2, 32, seed=5), laid_out(2, 19, 2, 32, seed=6)
    check_attention(q, k, v, target, monkeypatch)


@in_turn()
def test_two_runs_give_the_same_bits_and_leave_the_inputs_alone(target):
    for name, (function, inputs) in all_operations(target).items():
        before = [x.detach().clone() for x in inputs]
        runs = [outputs_and_gradients(function, inputs) for _ in range(2)]
        assert all(map(torch.equal, *runs)), name
        assert all(map(torch.equal, before, inputs)), name


def between_others(x):
    """The same values, with others between any two of them in memory."""
    return torch.stack((x, torch.full_like(x, 77)), -1)[..., 0]


def repeated(dim):
    """One slice of `x` seen again and again, with stride 0."""
    return lambda x: x.narrow(dim, 0, 1).expand_as(x) if x.is_floating_point() and x.ndim else x


LAYOUTS = {"between others": between_others, "rows repeated": repeated(0), "elements repeated": repeated(-1)}
LAYOUTS["sign to be turned"] = lambda x: torch._neg_view(-x)


@in_turn(layout=list(LAYOUTS))
def test_memory_layout_does_not_matter(layout, target):
    """The layout of any input, integers too, and of the gradients that come back makes no difference."""
    for name, (function, inputs) in all_operations(target, batch=2, seq=7).items():
        runs = []
        for view in (LAYOUTS[layout], lambda x: LAYOUTS[layout](x).clone(memory_format=torch.contiguous_format).resolve_neg()):
            given = [view(x.detach()).requires_grad_(x.requires_grad) for x in inputs]
            outputs = function(*given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            upstream = [view(randn(*out.shape, target=target, seed=5, grad=False).to(out.dtype)) for out in outputs]
            runs.append([*outputs, *torch.autograd.grad(outputs, [x for x in given if x.requires_grad], upstream)])
        # Loosely, as torch's matrix products sum in another order: what was read elsewhere is 77, nan, or of the other sign.
        torch.testing.assert_close(*runs, rtol=0.1, atol=0.1, msg=lambda found, name=name: f"{name}: {found}")


@in_turn()
def test_second_derivatives_are_refused(target):
    """In a loss where other terms do have them: a missing term would be a wrong number. Rotary's own, in Triton, are right."""
    for name, (function, inputs) in all_operations(target).items():
        outputs = function(*inputs)
        total = sum(out.float().square().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))
        wanted = [x for x in inputs if x.requires_grad]
        total = total + sum(x.float().pow(3).sum() for x in wanted)
        first = torch.autograd.grad(total, wanted, create_graph=True)
        scalar = sum(dx.float().square().sum() for dx in first)
        if (name, target[1]) == ("rotary", "triton"):
            # Rotary is orthogonal: the first derivative is 2·x + 3·x², and the square's is 2·(2·x + 3·x²)·(2 + 6·x).
            exact = [2 * (2 * x + 3 * x**2) * (2 + 6 * x) for x in map(torch.Tensor.double, wanted)]
            torch.testing.assert_close(torch.autograd.grad(scalar, wanted), exact, check_dtype=False, rtol=0.02, atol=0.2)
            continue
        with pytest.raises(RuntimeError, match=r"have first derivatives only|_backward is not implemented"):
            torch.autograd.grad(scalar, wanted)


@in_turn()
def test_gradients_of_a_kept_graph_are_first_derivatives(target):
    """create_graph changes no gradient, and a gradient that a weight has already is not added to behind the graph's back."""
    for name, (function, inputs) in all_operations(target).items():
        wanted = [x for x in inputs if x.requires_grad]
        for x in wanted:
            x.grad = torch.ones_like(x)
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(out) for out in outputs]
        kept = torch.autograd.grad(outputs, wanted, upstream, create_graph=True)
        for x in wanted:
            assert torch.equal(x.grad, torch.ones_like(x)), name
            x.grad = None
        again = torch.autograd.grad(function(*inputs), wanted, upstream)
        assert all(map(torch.equal, kept, again)), name


@on_triton
def test_triton_operations_pass_opcheck(target):
    """Schema, autograd registration and fake tensors; tracing needs a kernel that is compiled and run."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests = tests if INTERPRETED else (*tests, "test_aot_dispatch_dynamic")
    x, weight = randn(5, 40, target=target), randn(40, target=target)
    q, k, v = attention_inputs(1, 20, 20, 2, 1, 32, target)
    angle = torch.arange(20 * 16.0, device=target[0]).view(20, 16)
    bounds = torch.stack((torch.zeros(20), torch.full((20,), 20))).to(target[0], torch.int32)
    lse = torch.zeros(1, 2, 20, device=target[0])
    nanostack = torch.ops.nanostack
    for op, args in (
        (nanostack.rms_norm, (x, weight, EPS)),
        (nanostack.add_rms_norm, (x, x.detach() + 1, weight, EPS)),
        (nanostack.rms_norm_backward, (x.detach(), None, x.detach(), weight.detach(), EPS)),
        (nanostack.rotary, (q, k, angle, angle, 0, False)),
        (nanostack.norm_rotary, (q, randn(32, target=target), angle, angle, EPS, 0)),
        (nanostack.norm_rotary_backward, (q.detach(), q.detach(), weight.detach()[:32], angle, angle, EPS, 0)),
        (nanostack.swiglu, (x,)),
        (nanostack.swiglu_backward, (x.detach()[:, :20], x.detach())),
        (nanostack.flash_attention, (q, k, v, None, True, 0.2)),
        (nanostack.flash_attention, (q, k, v, bounds, False, 0.2)),
        (nanostack.flash_attention_backward, (*(t.detach() for t in (q, q, k, v)), None, q.detach(), lse, True, 0.2)),
    ):
        torch.library.opcheck(op.default, args, test_utils=tests)


@in_turn()
def test_cross_entropy_rows_pass_opcheck(target):
    x, weight = randn(6, 40, target=target, grad=False), randn(61, 40, target=target, grad=False)
    targets, scale = torch.arange(6, device=target[0]), torch.rand(6, device=target[0])
    for row_scale, gradients in ((None, False), (None, True), (scale, True)):
        args = (x, weight, targets, row_scale, -100, 1e-4, gradients, target[1])
        torch.library.opcheck(torch.ops.nanostack.linear_cross_entropy_rows.default, args)


CROSS_ENTROPY_OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"z_loss": 0.1},
    {"z_loss": 0.1, "reduction": "none"},
    {"ignore_index": 3},
]


@in_turn(chunk_rows=[1, 5, 1000], options=CROSS_ENTROPY_OPTIONS)
def test_cross_entropy_obeys_error_rule_in_any_chunks(chunk_rows, options, target, monkeypatch):
    module = importlib.import_module("kernels.linear_cross_entropy")
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 61 * chunk_rows)
    monkeypatch.setattr(module, "CHUNK_ROWS", 1)
    if chunk_rows == 5:  # a row of logits in one piece, or in several
        monkeypatch.setitem(configs.TABLE, "cross_entropy", {80: {configs.ANY: configs.row(4, BLOCK_V=16)}})
    x, weight = randn(3, 7, 40, target=target), randn(61, 40, target=target, seed=1, scale=0.3)
    targets = (torch.arange(21, device=target[0]) * 5 % 61).view(3, 7)
    targets[0, 1:4] = options.get("ignore_index", -100)

    def fused(x, weight):
        return kernels.linear_cross_entropy(x, weight, targets, backend=target[1], **options)

    def reference(x, weight):
        return kernels.linear_cross_entropy_reference(x, weight, targets, **options)

    assert_obeys_error_rule(fused, reference, reference, (x, weight), monkeypatch)
    master = weight.detach().float().requires_grad_()
    assert_obeys_error_rule(fused, reference, reference, (x, master), monkeypatch)


@on_every_target
@given(rows=st.integers(1, 40), width=st.integers(16, 50), vocab=st.integers(50, 5000), z_loss=st.sampled_from([0.0, 1e-3]))
@few_examples
def test_cross_entropy_obeys_error_rule_in_any_shape(rows, width, vocab, z_loss, target, monkeypatch):
    x, weight = randn(rows, width, target=target), randn(vocab, width, target=target, seed=1, scale=width**-0.5)
    targets = (torch.arange(rows, device=target[0]) * 7919) % vocab
    assert_obeys_error_rule(
        lambda x, w: kernels.linear_cross_entropy(x, w, targets, z_loss=z_loss, backend=target[1]),
        *[lambda x, w: kernels.linear_cross_entropy_reference(x, w, targets, z_loss=z_loss)] * 2,
        (x, weight),
        monkeypatch,
    )


@in_turn()
def test_cross_entropy_takes_strided_targets(target):
    x, weight = randn(4, 40, target=target), randn(61, 40, target=target, seed=1)
    targets = torch.tensor([[3, 9], [60, 9], [-100, 9], [0, 9]], device=target[0])[:, 0]
    assert targets.stride() == (2,)
    runs = [
        outputs_and_gradients(lambda x, w, t=t: kernels.linear_cross_entropy(x, w, t, backend=target[1]), (x, weight))
        for t in (targets, targets.clone())
    ]
    assert all(map(torch.equal, *runs))


@in_turn()
def test_cross_entropy_gives_the_same_gradients_from_a_retained_graph(target):
    """The first backward scales what the forward pass prepared in place; the second one has to start again."""
    x, weight = randn(5, 40, target=target), randn(61, 40, target=target, seed=1).detach().float().requires_grad_()
    loss = kernels.linear_cross_entropy(x, weight, torch.arange(5, device=target[0]), backend=target[1])
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(0.3, device=target[0]), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight), torch.tensor(0.3, device=target[0]))
    assert all(map(torch.equal, first, second))


@on_every_target
def test_cross_entropy_gradients_of_a_mean_are_not_biased(target):
    """1/53 rounded to bf16 is off by 1/350, rounded to fp16 by 1/2600, and so would all gradients be."""
    x, weight = randn(53, 40, target=target), randn(61, 40, target=target, seed=1)
    targets = torch.arange(53, device=target[0])
    mean, total = (
        torch.autograd.grad(kernels.linear_cross_entropy(x, weight, targets, reduction=r, backend=target[1]), x)[0].double()
        for r in ("mean", "sum")
    )
    assert holds((mean * total).sum() / total.square().sum() * 53 == pytest.approx(1, abs=2e-4))


@on_every_target
def test_target_outside_the_vocabulary_gives_nan(target):
    """Nobody overlooks a nan; a read outside the logits would be silent."""
    x, weight = randn(3, 40, target=target, grad=False), randn(61, 40, target=target, grad=False)
    loss = kernels.linear_cross_entropy(
        x, weight, torch.tensor([0, 61, -1], device=target[0]), reduction="none", backend=target[1]
    )
    assert holds(loss.isnan().tolist() == [False, True, True])


@on_every_target
def test_cross_entropy_of_nothing_is_zero(target):
    x, weight = randn(4, 40, target=target), randn(61, 40, target=target)
    targets = torch.full((4,), -100, device=target[0])
    for result in outputs_and_gradients(lambda *t: kernels.linear_cross_entropy(*t, targets, backend=target[1]), (x, weight)):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.skipif(not INTERPRETED, reason="times real kernels where there is no GPU")
def test_tuning_keeps_to_candidates_that_are_right_and_restores_the_table(monkeypatch, capsys):
    gate_up, before = torch.randn(3, 80), configs.TABLE["swiglu_forward"]
    op = torch.ops.nanostack.swiglu

    def call():
        block = configs.lookup("swiglu_forward", 40, gate_up.device, gate_up.dtype).tiles["BLOCK"]
        if block == 64:
            raise RuntimeError("out of resources")
        return (op(gate_up) + (block == 32),)

    monkeypatch.setattr(tune, "workload", lambda *_: call)
    tried = [configs.row(4, BLOCK=block) for block in (1024, 16, 32, 64)]
    best, seconds = tune.fastest("swiglu_forward", configs.ANY, tried, 4, gate_up.device)
    assert set(seconds) == set(tried[:2]) and best == min(seconds, key=seconds.get)
    assert configs.TABLE["swiglu_forward"] is before
    assert capsys.readouterr().err == "# row(4, BLOCK=32): WRONG RESULTS\n# row(4, BLOCK=64): RuntimeError\n"
