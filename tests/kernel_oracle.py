"""What the kernel tests share: where they run, plain torch to measure with, and the rule that says how close is close.

Error rule: ‖kernel − exact‖ ≤ 2 · ‖torch in the same dtype − exact‖ + small. exact is the kernel's reference in fp64 on the
same inputs. small is a few fp32 roundings of numbers of order 1, or the usual error of one rounding to the result's dtype:
without it a torch that is exact by luck (one row, whose elements share one rounding) would demand an exact kernel.
"""

import contextlib
import functools
import itertools
import os
import types

import dry_gpu
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.attention import scores_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # patches triton.language anew at each call of a device function, a third of its time: once a launch will do
    from triton import language
    from triton.runtime import interpreter

    both = types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
    interpreter._patch_lang = functools.partial(lambda patch, _: patch(both), interpreter._patch_lang)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
GPU_DEVICE = "cpu" if dry_gpu.active else "cuda"  # in a dry run CPU tensors stand for those on a GPU


def _target(device, backend, dtype, gpu=False):
    name = "cuda" if gpu else device
    return pytest.param((device, backend, dtype), id=f"{name}-{backend}-{str(dtype)[6:]}", marks=[pytest.mark.gpu] * gpu)


# The interpreter multiplies raw bits in a bf16 tl.dot, so it never sees bf16.
INTERPRETER = [_target("cpu", "triton", dtype) for dtype in (torch.float32, torch.float16)]
GPU = [_target(GPU_DEVICE, "triton", dtype, gpu=True) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
CPU = [_target("cpu", way, dtype) for way in ("torch", "c") for dtype in (torch.float32, torch.bfloat16)]
# What shapes can show is shown in the interpreter, and on a dry GPU whether they compile; a GPU's minutes are for realistic
# sizes (kernels/test_gpu.py).
on_every_target = pytest.mark.parametrize("target", INTERPRETER if INTERPRETED else GPU if dry_gpu.active else CPU)
on_triton = pytest.mark.parametrize("target", INTERPRETER if INTERPRETED else GPU if dry_gpu.active else GPU[-1:])
on_gpu = pytest.mark.parametrize("target", GPU)


def in_turn(**parameters):
    """Parametrise a test by all combinations of these values, each on every target.

    In the interpreter, which takes seconds for a case, a combination has one of the two dtypes, in turn: with two parameters or
    more any two values, and any value and dtype, still meet. Without parameters: what no dtype makes a difference to.
    """
    names, cases = ",".join(("target", *parameters)), []
    for numbers in itertools.product(*(range(len(values)) for values in parameters.values())):
        chosen = [values[i] for values, i in zip(parameters.values(), numbers, strict=True)]
        targets = INTERPRETER[sum(numbers) % 2 :][:1] if INTERPRETED else GPU if dry_gpu.active else CPU
        for target in targets:
            name = "-".join([target.id, *map(str, chosen)])
            cases.append(pytest.param(*target.values, *chosen, id=name, marks=target.marks))
    return pytest.mark.parametrize(names, cases)


few_examples = settings(
    max_examples=3 if INTERPRETED or dry_gpu.active else 12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def randn(*shape, target, seed=0, scale=1.0, grad=True):
    device, _, dtype = target
    return noise(*shape, seed=seed + sum(shape), scale=scale).to(device, dtype).requires_grad_(grad)


def noise(*shape, seed, scale=1.0):
    """Normally distributed numbers in fp32 on the CPU; in a dry run, which reads none, whatever is in memory."""
    if dry_gpu.active:
        return torch.empty(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def holds(statement) -> bool:
    """A statement about values, such as x.isfinite().all(); a dry run counts it and takes it for true."""
    if dry_gpu.active:
        dry_gpu.pass_over()
        return True
    return bool(statement)


@contextlib.contextmanager
def poisoned_memory(monkeypatch):
    """Everything torch.empty and its kin return is full of NaN, so that what a kernel forgets to write shows."""

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return make_poisoned

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@functools.lru_cache(maxsize=2)  # large ones take seconds, and a test sends the same back several times
def upstream_noise(shape, seed):
    return noise(*shape, seed=seed)


def outputs_and_gradients(function, inputs):
    """The outputs of `function`, then the gradient of each input that wants one, for fixed upstream gradients."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sent = [upstream_noise(out.shape, 97 + i) for i, out in enumerate(outputs)]
    upstream = [x.bfloat16().to(out.device, out.dtype) for x, out in zip(sent, outputs, strict=True)]  # exact in all dtypes
    wanted = [x for x in inputs if x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]


def in_double(x):
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def assert_obeys_error_rule(kernel, plain, reference, inputs, monkeypatch):
    """Check each output and gradient of `kernel` against `reference` in fp64, measured by `plain`, torch in the same dtype."""
    if dry_gpu.active:
        for _ in outputs_and_gradients(kernel, inputs):
            dry_gpu.pass_over()
        return
    with poisoned_memory(monkeypatch):
        got = outputs_and_gradients(kernel, inputs)
    torch_result = outputs_and_gradients(plain, inputs)
    exact = outputs_and_gradients(reference, [in_double(x) for x in inputs])
    for i, (ours, theirs, truth) in enumerate(zip(got, torch_result, exact, strict=True)):
        assert ours.shape == truth.shape and ours.dtype == theirs.dtype, f"result {i}: {ours.dtype} {tuple(ours.shape)}"
        error, yardstick = ((x.double() - truth).norm().item() for x in (ours, theirs))
        size = truth.norm().item()
        small = max(4 * torch.finfo(torch.float32).eps * (size + truth.numel() ** 0.5), torch.finfo(ours.dtype).eps / 4 * size)
        assert error <= 2 * yardstick + small, f"result {i}: error {error:.3g}, torch's own {yardstick:.3g} + {small:.1g}"


def plain_rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def plain_attention(q, k, v, causal=True, scale=None, cu_seqlens=None):
    group = q.shape[2] // k.shape[2]
    mask = scores_reference(q, k, causal, scale, cu_seqlens).isneginf().logical_not()[:, :1]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    # Pinned: left to itself torch may take cuDNN on Hopper, which errs with masks and single queries [pytorch#196678].
    pinned = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else contextlib.nullcontext()
    with pinned:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def check_attention(q, k, v, target, monkeypatch, **options):
    assert_obeys_error_rule(
        lambda *qkv: kernels.flash_attention(*qkv, backend=target[1], **options),
        lambda *qkv: plain_attention(*qkv, **options),
        lambda *qkv: kernels.flash_attention_reference(*qkv, **options),
        (q, k, v),
        monkeypatch,
    )


def attention_inputs(batch, q_len, kv_len, n_head, n_kv_head, d_head, target):
    shapes = ((batch, q_len, n_head, d_head), *[(batch, kv_len, n_kv_head, d_head)] * 2)
    return [randn(*shape, seed=seed, target=target) for seed, shape in enumerate(shapes)]


def all_operations(target, batch=1, seq=11 if INTERPRETED else 40, heads=2, kv_heads=1, d_head=32, width=40, vocab=50):
    """Each operation as (function, inputs), on small odd shapes."""
    device, backend, _ = target
    x, residual, weight, gate_up, head = (
        randn(*shape, target=target, seed=3)
        for shape in ((batch, seq, width), (batch, seq, width), (width,), (batch, seq, 2 * width), (vocab, width))
    )
    q, k, v = attention_inputs(batch, seq, seq, heads, kv_heads, d_head, target)
    angle = torch.arange(seq * d_head / 2.0, device=device).view(seq, -1)
    tables, targets = (angle.cos(), angle.sin()), torch.arange(batch * seq, device=device).view(batch, seq) % vocab
    gain, bias = randn(d_head, target=target, seed=3), randn(vocab, target=target, seed=3)
    packed = [part.flatten(0, 1)[None].detach().requires_grad_() for part in (q, k, v)]
    edges = torch.tensor([0, 5, batch * seq], dtype=torch.int32, device=device)

    def rotary_attention(q, k, v, cos, sin):
        return kernels.rotary_attention(torch.cat((q, k, v), 2), k.shape[2], cos, sin, backend=backend)

    def normed_attention(q, k, v, gain, cos, sin):
        norms = kernels.HeadNorms(gain, gain, 1e-5)
        return kernels.rotary_attention(torch.cat((q, k, v), 2), k.shape[2], cos, sin, norms=norms, backend=backend)

    def loss(reduction):
        return lambda x, w, t: kernels.linear_cross_entropy(x, w, t, reduction=reduction, z_loss=0.01, backend=backend)

    return {
        "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5, backend=backend), (x, weight)),
        "add_rms_norm": (lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5, backend=backend), (x, residual, weight)),
        "rotary": (lambda *t: kernels.rotary(*t, backend=backend), (q, k, *tables)),
        "norm_rotary": (lambda *t: kernels.norm_rotary(*t, 1e-5, backend=backend), (q, gain, *tables)),
        "flash_attention": (lambda *t: kernels.flash_attention(*t, backend=backend), (q, k, v)),
        "full_attention": (lambda *t: kernels.flash_attention(*t, causal=False, backend=backend), (q, k, v)),
        "documents": (lambda *t: kernels.flash_attention(*t[:3], cu_seqlens=t[3], backend=backend), (*packed, edges)),
        "rotary_attention": (rotary_attention, (q, k, v, *tables)),
        "swiglu": (lambda x: kernels.swiglu(x, backend=backend), (gate_up,)),
        "normed_attention": (normed_attention, (q, k, v, gain, *tables)),
        "linear": (lambda x, w: kernels.linear(x, w, w.detach()), (x, head)),
        "linear_with_bias": (lambda x, w, b: kernels.linear(x, w, w.detach(), b), (x, head, bias)),
        "mean_loss": (loss("mean"), (x, head, targets)),
        "loss_of_each_row": (loss("none"), (x, head, targets)),
    }
