"""Attention as the model calls it, alone or behind rotary: in Triton (attention_triton.py), C (cpu_attention.c) or torch."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import cpu
from .attention_triton import LN_2, document_bounds, flash_attention_op, widest_head
from .dispatch import (
    once_differentiable,
    require,
    require_floating,
    require_like,
    require_number,
    upcast,
    use_c,
    use_triton,
)
from .norm_rotary import norm_rotary, norm_rotary_reference
from .rotary import check as check_rotary
from .rotary import require_heads, rotary, rotary_reference

# The C functions as operations of torch's: the FLOP counter and selective checkpointing must see them. Registered by hand, as a
# custom_op takes 0.1 ms more a call, and small models on a CPU do not have that.
_library = torch.library.Library("nanostack", "FRAGMENT")
_library.define(
    "flash_attention_c(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? cu_seqlens, bool causal, float scale)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "flash_attention_backward_c(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? cu_seqlens, "
    "Tensor out, Tensor lse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, bool causal, float scale) -> ()"
)
_library.impl("flash_attention_c", cpu.attention, "CPU")
_library.impl("flash_attention_backward_c", cpu.attention_backward, "CPU")


class _AttentionC(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, cu_seqlens, causal, scale):
        return torch.ops.nanostack.flash_attention_c(q, k, v, None, None, cu_seqlens, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, cu_seqlens, ctx.causal, ctx.scale = inputs
        _save(ctx, (q, k, v, None, None, cu_seqlens), output)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout, _):
        gradients = [x.new_empty(x.shape) for x in saved[:3]]
        torch.ops.nanostack.flash_attention_backward_c(dout, *saved, *gradients, ctx.causal, ctx.scale)
        return *gradients, None, None, None


class _RotaryAttentionC(torch.autograd.Function):
    """Attention of q, k and v in one tensor, whose gradient is one tensor, too. It saves that tensor, not the turned one."""

    @staticmethod
    def forward(qkv, heads, cos, sin, cu_seqlens, scale):
        return torch.ops.nanostack.flash_attention_c(*qkv.split(heads, 2), cos, sin, cu_seqlens, True, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, ctx.heads, cos, sin, cu_seqlens, ctx.scale = inputs
        _save(ctx, (qkv, cos, sin, cu_seqlens), output)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout, _):
        qkv, *rest = saved
        dqkv = qkv.new_empty(qkv.shape)
        inputs, gradients = (x.split(ctx.heads, 2) for x in (qkv, dqkv))
        torch.ops.nanostack.flash_attention_backward_c(dout, *inputs, *rest, *gradients, True, ctx.scale)
        return dqkv, None, None, None, None, None


def _save(ctx, tensors, output):
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def flops(batch: int, q_len: int, kv_len: int, n_head: int, d_head: int, causal: bool, backward: bool = False) -> int:
    """FLOPs the formula needs: what a benchmark divides by its seconds. The counter's convention is causal=False."""
    return (10 if backward else 4) * batch * n_head * q_len * kv_len * d_head // (2 if causal else 1)


def _count_flops(op, seq: int, head: int, backward: bool) -> None:
    """Tell the FLOP counter about an attention op whose shapes hold lengths and heads in these dimensions."""

    def formula(*shapes, out_shape=None, **kwargs) -> int:
        q, k = shapes[1:3] if backward else shapes[:2]
        return flops(q[0], q[seq], k[seq], q[head], q[3], causal=False, backward=backward)

    if op not in flop_registry:
        register_flop_formula(op)(formula)


_count_flops(torch.ops.nanostack.flash_attention, 1, 2, backward=False)
_count_flops(torch.ops.nanostack.flash_attention_backward, 1, 2, backward=True)
_count_flops(torch.ops.nanostack.flash_attention_c, 1, 2, backward=False)
_count_flops(torch.ops.nanostack.flash_attention_backward_c, 1, 2, backward=True)
# torch 2.13 counts attention on every device but the CPU, where its own op would silently cost nothing.
_count_flops(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, 2, 1, backward=False)
_count_flops(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, 2, 1, backward=True)


class HeadNorms(NamedTuple):
    """Gains (K,) of RMSNorm on the heads of q and of k, before rotary."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


class Documents(NamedTuple):
    """cu_seqlens as attention takes it, translated once for all layers of a model."""

    cu_seqlens: torch.Tensor
    bounds: torch.Tensor | None  # what the Triton kernels read; None where none of them is to run


def documents(cu_seqlens: torch.Tensor, seq_len: int, x: torch.Tensor, d_head: int, backend: str | None = None) -> Documents:
    """What to pass for cu_seqlens to several calls of attention on seq_len tokens, with heads of d_head in x's dtype and place.

    Each call takes cu_seqlens, too, with the same result, and translates it anew. Raises ValueError as flash_attention does.
    """
    if not use_triton(backend, x, _too_wide(x, d_head)):
        return Documents(cu_seqlens, None)
    _check_edges(cu_seqlens, seq_len)
    return Documents(cu_seqlens, document_bounds(cu_seqlens, seq_len))


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: "torch.Tensor | Documents | None" = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """softmax(scale · q kᵀ) v for q (B, T, H, K) and k, v (B, T_kv, H_kv, K), H a multiple of H_kv → (B, T, H, K).

    scale is 1/√K unless given. causal needs T = T_kv. cu_seqlens (n_doc + 1,) int32 = [0, ..., T] keeps attention inside packed
    documents of a batch of 1 (view (B, T) as (1, B·T) first). return_lse adds lse (B, H, T), natural log, fp32, no gradient.
    Raises ValueError, which names the argument, for what does not fit together. The values of cu_seqlens are checked on the
    CPU only; on a GPU, which nothing here waits for, values that do not rise from 0 to T make the result nan.
    """
    cu_seqlens, bounds = cu_seqlens if isinstance(cu_seqlens, Documents) else (cu_seqlens, None)
    _check(q, k, v, causal, scale, cu_seqlens, bounds)
    on_triton = use_triton(backend, q, _too_wide(q, q.shape[-1]))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if on_triton and q.numel():
        if cu_seqlens is not None and bounds is None:
            _check_edges(cu_seqlens, q.shape[1])
            bounds = document_bounds(cu_seqlens, q.shape[1])
        out, lse = flash_attention_op(q, k, v, bounds, causal, scale)
        return (out, lse * LN_2) if return_lse else out
    if use_c(backend, q, k, v, torch_is_faster=_torch_is_faster(q)) and q.numel():
        out, lse = _AttentionC.apply(q, k, v, cu_seqlens, causal, scale)
        return (out, lse) if return_lse else out
    if cu_seqlens is not None:
        return _torch_by_document(q, k, v, causal, scale, cu_seqlens, return_lse)
    out = _attention_torch(q, k, v, causal, scale)
    return (out, _lse_torch(q, k, causal, scale)) if return_lse else out


def flash_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """The formula, with all scores at once, for any dtype, differentiated by autograd."""
    scores = scores_reference(q, k, causal, scale, cu_seqlens)
    out = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v.repeat_interleave(q.shape[2] // v.shape[2], 2))
    return (out, scores.logsumexp(-1)) if return_lse else out


def scores_reference(
    q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """scale · q kᵀ (B, H, T, T_kv), -inf where a query does not see a key."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None, :]
    seen = (j <= i) if causal else torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if cu_seqlens is not None:
        document = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.cpu().diff())
        seen = seen & (document[:, None] == document[None, :])
    return scores.masked_fill(~seen.to(scores.device), float("-inf"))


def rotary_attention(
    qkv: torch.Tensor,
    n_kv_head: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: "torch.Tensor | Documents | None" = None,
    norms: HeadNorms | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """flash_attention, causal, of q, k, v side by side in qkv (B, T, H + 2·H_kv, K), q and k turned by rotary → (B, T, H, K).

    cos and sin as rotary takes them. cu_seqlens (n_doc + 1,) int32 = [0, ..., B·T] counts documents through all rows. With
    `norms` q and k are turned by norm_rotary. In C this is one operation without norms; elsewhere rotary and flash_attention,
    one after the other. Raises ValueError as they do.
    """
    require_floating("qkv", qkv)
    require_number("n_kv_head", n_kv_head, whole=True)
    enough = qkv.ndim == 4 and 0 < 2 * n_kv_head < qkv.shape[2]
    require(enough, lambda: f"qkv has shape {tuple(qkv.shape)}; it must be (batch, seq, heads + 2 · {n_kv_head}, d_head)")
    (B, T, _, K), heads = qkv.shape, (qkv.shape[2] - 2 * n_kv_head, n_kv_head, n_kv_head)
    packed = (B, T) if cu_seqlens is None else (1, B * T)
    if norms is None and use_c(backend, qkv, torch_is_faster=_torch_is_faster(qkv)) and qkv.numel():
        q, k, _ = qkv.split(heads, 2)
        check_rotary(q, k, cos, sin, 0)
        qkv = qkv.reshape(*packed, -1, K)
        cu_seqlens = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Documents) else cu_seqlens
        q, k, v = qkv.split(heads, 2)
        _check(q, k, v, True, None, cu_seqlens)
        out, _ = _RotaryAttentionC.apply(qkv, heads, cos[:T], sin[:T], cu_seqlens, K**-0.5)
        return out.reshape(B, T, -1, K)
    q, k, v = qkv.split(heads, 2)
    q, k = turned(q, k, cos, sin, norms, backend)
    q, k, v = (x.reshape(*packed, -1, K) for x in (q, k, v))
    return flash_attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend).reshape(B, T, -1, K)


def turned(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k at their positions: by rotary, or with `norms` by norm_rotary."""
    if norms is None:
        return rotary(q, k, cos, sin, backend=backend)
    q = norm_rotary(q, norms.q, cos, sin, norms.eps, backend=backend)
    return q, norm_rotary(k, norms.k, cos, sin, norms.eps, backend=backend)


def rotary_attention_reference(
    qkv: torch.Tensor,
    n_kv_head: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """The formula: rotary_reference, then flash_attention_reference, for any dtype, differentiated by autograd."""
    (B, T, H, K), G = qkv.shape, n_kv_head
    q, k, v = qkv.split((H - 2 * G, G, G), 2)
    if norms is None:
        q, k = rotary_reference(q, k, cos, sin)
    else:
        q, k = (norm_rotary_reference(x, gain, cos, sin, norms.eps) for x, gain in ((q, norms.q), (k, norms.k)))
    packed = (B, T) if cu_seqlens is None else (1, B * T)
    q, k, v = (x.reshape(*packed, -1, K) for x in (q, k, v))
    return flash_attention_reference(q, k, v, cu_seqlens=cu_seqlens).reshape(B, T, -1, K)


def _torch_is_faster(q: torch.Tensor) -> bool:
    """Than C: for a single new token."""
    return q.shape[1] == 1


def _too_wide(x, d_head):
    most = widest_head(x.device, x.dtype)
    return f"the kernel takes a d_head of at most {most} here, not {d_head}" if d_head > most else None


def _check(q, k, v, causal, scale, cu_seqlens, bounds=None):
    if scale is not None:
        require_number("scale", scale)
    require_floating("q", q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_like(name, x, "q", q)
        require_heads(name, x)
    require(q.shape[3] > 0, lambda: f"q has shape {tuple(q.shape)}; its heads are empty")
    shapes = lambda: f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}"  # noqa: E731
    require(v.shape == k.shape, lambda: f"v has shape {tuple(v.shape)} and k {tuple(k.shape)}; they must match")
    require(k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3], lambda: f"{shapes()}; k must agree in batch and d_head")
    require(k.shape[1] > 0, lambda: f"k has shape {tuple(k.shape)}; there is nothing to attend to")
    require(
        k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0, lambda: f"{shapes()}; the heads of q must be a multiple of those of k"
    )
    one_length = q.shape[1] == k.shape[1] or not (causal or cu_seqlens is not None)
    require(one_length, lambda: f"{shapes()}; causal attention and cu_seqlens need q and k of one length")
    if cu_seqlens is None:
        return
    require_like("cu_seqlens", cu_seqlens, "q", q, dtype=False)
    offsets = cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
    require(offsets, lambda: f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; it must be torch.int32 (n_doc + 1,)")
    require(q.shape[0] == 1, lambda: f"q has batch {q.shape[0]}; cu_seqlens needs batch 1: view (B, T) as (1, B·T)")
    right = bounds is None or bounds.shape[1] == q.shape[1]
    require(right, lambda: f"q has {q.shape[1]} tokens; its Documents were made for {bounds.shape[1]}")


def _check_edges(cu_seqlens, seq_len):
    """Raise ValueError for values that cannot be; on a GPU, which is not waited for, document_bounds makes nan of them."""
    if not cu_seqlens.is_cuda:
        rising = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == seq_len and bool((cu_seqlens.diff() >= 0).all())
        require(rising, lambda: f"cu_seqlens is {cu_seqlens.tolist()}; it must rise from 0 to {seq_len}, the length of q")


def _attention_torch(q, k, v, causal, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if causal and scale <= 0:  # torch's CPU kernel scales its mask, too: -inf · 0 is nan, and -inf · -1 hides nothing
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    # torch takes no symbolic bool of torch.compile, so the argument is given only where it is needed.
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, **grouped)
    return out.transpose(1, 2)


@torch.no_grad()
def _lse_torch(q, k, causal, scale):
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthk,bshk->bhts", upcast(q), upcast(k).repeat_interleave(group, 2)) * scale
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return scores.logsumexp(-1)


@torch.compiler.disable  # the shapes depend on the values of cu_seqlens
def _torch_by_document(q, k, v, causal, scale, cu_seqlens, return_lse):
    edges, seq_len = cu_seqlens.tolist(), q.shape[1]
    rising = edges[0] == 0 and edges[-1] == seq_len and edges == sorted(edges)
    require(rising, lambda: f"cu_seqlens is {edges}; it must rise from 0 to {seq_len}, the length of q")
    parts = [slice(start, end) for start, end in pairwise(edges) if start < end]
    out = torch.cat([_attention_torch(q[:, d], k[:, d], v[:, d], causal, scale) for d in parts], 1)
    if not return_lse:
        return out
    return out, torch.cat([_lse_torch(q[:, d], k[:, d], causal, scale) for d in parts], 2)
