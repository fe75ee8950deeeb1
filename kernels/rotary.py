"""Rotary position embedding (Su et al., arXiv:2104.09864) in the rotate-half convention of Hugging Face's Llama.

    out[..., :K/2] = x₁ · cos − x₂ · sin        x₁ = x[..., :K/2], x₂ = x[..., K/2:]
    out[..., K/2:] = x₂ · cos + x₁ · sin        backward: the same with −sin

cos and sin stay fp32, and so does the arithmetic: bf16 angles change the loss curve [TransformerEngine#1245].

Bytes per token: 2·s·(H + H_kv)·K at s bytes per element, and 4·K of cos and sin. FLOPs: 3·(H + H_kv)·K, nothing beside that.
One launch rotates both q and k; they may be slices of one fused projection, the outputs are contiguous.
"""

import torch
from torch.library import triton_op

from . import cpu
from .configs import lookup
from .dispatch import (
    launch,
    once_differentiable,
    require,
    require_floating,
    require_like,
    require_number,
    tl,
    triton,
    unit_stride,
    upcast,
    use_c,
    use_triton,
    wrap_triton,
)

MAX_D_HEAD = 256


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, stride_x_head, first_head, n_head, cos, sin, dim,
    HALF: tl.constexpr, BLOCK_HEAD: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.arange(0, BLOCK_HEAD)[:, None]
    mask = (head < n_head) & (dim < HALF)
    x_ptrs = x_ptr + head * stride_x_head + dim
    out_ptrs = out_ptr + head * (2 * HALF) + dim
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    tl.store(out_ptrs, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    stride_q_batch, stride_q_seq, stride_q_head, stride_k_batch, stride_k_seq, stride_k_head, stride_cos_seq, stride_sin_seq,
    seq_len, n_head, n_kv_head, offset,
    HALF: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // seq_len, token % seq_len
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + (position + offset) * stride_cos_seq + dim, mask=dim < HALF, other=0.0)
    sin = tl.load(sin_ptr + (position + offset) * stride_sin_seq + dim, mask=dim < HALF, other=0.0)
    head_block = tl.program_id(1)
    q_blocks = tl.cdiv(n_head, BLOCK_HEAD)
    if head_block < q_blocks:
        q_ptr += batch * stride_q_batch + position * stride_q_seq
        q_out_ptr += token * n_head * (2 * HALF)
        rotate_heads(
            q_ptr, q_out_ptr, stride_q_head, head_block * BLOCK_HEAD, n_head, cos, sin, dim, HALF, BLOCK_HEAD, INVERSE
        )  # fmt: skip
    else:
        k_ptr += batch * stride_k_batch + position * stride_k_seq
        k_out_ptr += token * n_kv_head * (2 * HALF)
        first_head = (head_block - q_blocks) * BLOCK_HEAD
        rotate_heads(
            k_ptr, k_out_ptr, stride_k_head, first_head, n_kv_head, cos, sin, dim, HALF, BLOCK_HEAD, INVERSE
        )  # fmt: skip


@triton_op("nanostack::rotary", mutates_args=())
def rotary_op(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, cos, sin = unit_stride(q, k, cos, sin)
    batch, seq_len, n_head, d_head = q.shape
    n_kv_head = k.shape[2]
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    config = lookup("rotary", d_head // 2, q.device, q.dtype)
    block_half = triton.next_power_of_2(d_head // 2)
    block_head = min(triton.next_power_of_2(n_head), config.tiles["BLOCK_HEAD"])
    head_blocks = triton.cdiv(n_head, block_head) + triton.cdiv(n_kv_head, block_head)
    launch(
        wrap_triton(rotary_kernel), (batch * seq_len, head_blocks), config,
        q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3], cos.stride(0), sin.stride(0),
        seq_len, n_head, n_kv_head, offset, HALF=d_head // 2, BLOCK_HALF=block_half, INVERSE=inverse,
        BLOCK_HEAD=block_head,
    )  # fmt: skip
    return q_out, k_out


@rotary_op.register_fake
def _(q, k, cos, sin, offset, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.offset, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_autograd(ctx, dq, dk):
    dq, dk = rotary_op(dq, dk, *ctx.saved_tensors, ctx.offset, not ctx.inverse)
    return dq, dk, None, None, None, None


rotary_op.register_autograd(_rotary_autograd, setup_context=_save)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offset: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q (B, T, H, K) and k (B, T, H_kv, K) to positions offset … offset + T − 1.

    cos and sin are fp32 tables (at least offset + T, K/2) without a gradient. Returns new contiguous tensors. Raises
    ValueError, which names the argument, for what does not fit together.
    """
    check(q, k, cos, sin, offset)
    refusal = f"the kernel takes a d_head of at most {MAX_D_HEAD}, not {q.shape[3]}" if q.shape[3] > MAX_D_HEAD else None
    if use_triton(backend, q, refusal) and q.numel():
        return rotary_op(q, k, cos, sin, offset, False)
    rows, in_c = slice(offset, offset + q.shape[1]), use_c(backend, q, k)
    return rotate(q, cos[rows], sin[rows], in_c), rotate(k, cos[rows], sin[rows], in_c)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, in_c: bool) -> torch.Tensor:
    """x (B, T, H, K) turned by cos and sin (T, K/2), in C or in torch; its arguments have been checked."""
    return _Rotary.apply(x, cos, sin, in_c)


def check(q, k, cos, sin, offset) -> None:
    """Raise ValueError, which names the argument, for what `rotary` does not take."""
    require_floating("q", q)
    require_heads("q", q)
    require_like("k", k, "q", q)
    require(
        k.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3],
        lambda: f"k has shape {tuple(k.shape)} and q has {tuple(q.shape)}; they must agree in batch, seq and d_head",
    )
    check_tables("q", q, cos, sin, offset)


def check_tables(of: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int) -> None:
    """Raise ValueError unless the tables have the angles of x (B, T, H, K), which is called `of`, from position `offset` on."""
    require_number("offset", offset, whole=True)
    require(x.shape[3] % 2 == 0, lambda: f"{of} has d_head {x.shape[3]}; it must be even")
    require(offset >= 0, lambda: f"offset is {offset}; it must not be negative")
    _check_table("cos", cos, of, x, offset)
    _check_table("sin", sin, of, x, offset)


def _check_table(name, table, of, x, offset):
    require_like(name, table, of, x, dtype=False)
    require(
        table.dtype == torch.promote_types(x.dtype, torch.float32),
        lambda: f"{name} is {table.dtype}; it must be {upcast(x[:0]).dtype}: angles lose their meaning in less",
    )
    require(
        table.ndim == 2 and table.shape[0] >= offset + x.shape[1] and table.shape[1] == x.shape[3] // 2,
        lambda: (
            f"{name} has shape {tuple(table.shape)}; it must be (at least {offset + x.shape[1]}, {x.shape[3] // 2}) "
            f"for offset {offset} and {of} of shape {tuple(x.shape)}"
        ),
    )


def require_heads(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless `x` has the four dimensions of attention."""
    require(x.ndim == 4, lambda: f"{name} has shape {tuple(x.shape)}; it must be (batch, seq, head, d_head)")


def rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, as apply_rotary_pos_emb of Hugging Face's Llama has it, for any dtype, differentiated by autograd."""
    cos, sin = (torch.cat((table, table), -1)[offset : offset + q.shape[1], None] for table in (cos, sin))

    def rotated(x):
        x1, x2 = x.chunk(2, -1)
        return (x * cos + torch.cat((-x2, x1), -1) * sin).to(x.dtype)

    return rotated(q), rotated(k)


class _Rotary(torch.autograd.Function):
    """In C or in optimised torch, its backward written out: no autograd through slices, and only cos and sin are saved."""

    @staticmethod
    def forward(ctx, x, cos, sin, in_c):
        ctx.save_for_backward(cos, sin)
        ctx.rotate = cpu.rotate if in_c else _rotate_torch
        return ctx.rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        cos, sin = saved
        return ctx.rotate(dout, cos, sin, -1), None, None, None


def _rotate_torch(x, cos, sin, sign):
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x1, x2 = upcast(x[..., :half]), upcast(x[..., half:])
    out = x.new_empty(x.shape)
    out[..., :half] = (x1 * cos).addcmul_(x2, sin, value=-sign)
    out[..., half:] = (x2 * cos).addcmul_(x1, sin, value=sign)
    return out
