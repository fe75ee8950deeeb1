"""RMSNorm of each head, then rotary, in one pass: what Qwen3 does to q and to k (arXiv:2505.09388).

    n = x · rstd · gain,   rstd = 1 / √(mean(x²) + eps)                        per head of K channels, one gain for all heads
    out = rotary(n)                                                            rotary.py has the formula
    d = rotary⁻¹(dout),   g = d · gain,   x̂ = x · rstd,   dx = rstd · (g − x̂ · mean(g · x̂)),   dgain = Σ_heads d · x̂

Apart they read and write q and k twice. Bytes per head at s bytes per element: forward 2·s·K, backward 3·s·K; cos and sin stay
in cache. FLOPs: about 7·K and 17·K, nothing beside the bytes. The backward recomputes rstd, as it holds the whole head anyway,
so only x is saved. dgain: each persistent program sums its heads in registers, then torch sums (programs, K): deterministic.
"""

import torch
from torch.library import triton_op

from . import cpu
from .configs import lookup
from .dispatch import (
    launch,
    multiprocessors,
    once_differentiable,
    refuse_second_derivative,
    require,
    require_floating,
    require_like,
    require_number,
    tl,
    triton,
    unit_stride,
    use_c,
    use_triton,
    wrap_triton,
)
from .rms_norm import rms_norm, rms_norm_reference
from .rotary import MAX_D_HEAD, check_tables, require_heads, rotary_reference, rotate


@triton.jit
def load_heads(
    x_ptr, cos_ptr, sin_ptr, row, dim, mask, seq_len, n_head, offset,
    stride_x_batch, stride_x_seq, stride_x_head, stride_cos_seq, stride_sin_seq, HALF: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Both halves of the heads `row` of x, normalised without a gain; 1 / root mean square; cos and sin of their positions."""
    token = row // n_head
    position = token % seq_len
    x_ptrs = x_ptr + token // seq_len * stride_x_batch + position * stride_x_seq + row % n_head * stride_x_head + dim
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + (position + offset) * stride_cos_seq + dim, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (position + offset) * stride_sin_seq + dim, mask=mask, other=0.0)
    rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + EPS)[:, None]
    return x1 * rstd, x2 * rstd, rstd, cos, sin


@triton.jit
def norm_rotary_forward_kernel(
    x_ptr, gain_ptr, cos_ptr, sin_ptr, out_ptr,
    stride_x_batch, stride_x_seq, stride_x_head, stride_cos_seq, stride_sin_seq, rows, seq_len, n_head, offset,
    EPS: tl.constexpr, HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (row < rows) & (dim < HALF)
    x1, x2, _, cos, sin = load_heads(
        x_ptr, cos_ptr, sin_ptr, row, dim, mask, seq_len, n_head, offset,
        stride_x_batch, stride_x_seq, stride_x_head, stride_cos_seq, stride_sin_seq, HALF, EPS,
    )  # fmt: skip
    n1 = x1 * tl.load(gain_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    n2 = x2 * tl.load(gain_ptr + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + row * (2 * HALF) + dim
    tl.store(out_ptrs, (n1 * cos - n2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, (n2 * cos + n1 * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_rotary_backward_kernel(
    dout_ptr, x_ptr, gain_ptr, cos_ptr, sin_ptr, dx_ptr, dgain_ptr,
    stride_x_batch, stride_x_seq, stride_x_head, stride_cos_seq, stride_sin_seq, rows, seq_len, n_head, offset,
    EPS: tl.constexpr, HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    gain1 = tl.load(gain_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    gain2 = tl.load(gain_ptr + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    dgain1 = tl.zeros((BLOCK_ROWS, BLOCK_HALF), tl.float32)  # reduced over its rows once, after the loop
    dgain2 = tl.zeros((BLOCK_ROWS, BLOCK_HALF), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & (dim < HALF)
        x1, x2, rstd, cos, sin = load_heads(
            x_ptr, cos_ptr, sin_ptr, row, dim, mask, seq_len, n_head, offset,
            stride_x_batch, stride_x_seq, stride_x_head, stride_cos_seq, stride_sin_seq, HALF, EPS,
        )  # fmt: skip
        d1 = tl.load(dout_ptr + row * (2 * HALF) + dim, mask=mask, other=0.0).to(tl.float32)
        d2 = tl.load(dout_ptr + row * (2 * HALF) + HALF + dim, mask=mask, other=0.0).to(tl.float32)
        dn1, dn2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
        dgain1 += dn1 * x1
        dgain2 += dn2 * x2
        dn1 *= gain1
        dn2 *= gain2
        projection = (tl.sum(dn1 * x1, axis=1) + tl.sum(dn2 * x2, axis=1))[:, None] / (2 * HALF)
        dx_ptrs = dx_ptr + row * (2 * HALF) + dim
        tl.store(dx_ptrs, ((dn1 - x1 * projection) * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptrs + HALF, ((dn2 - x2 * projection) * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
    dim = tl.arange(0, BLOCK_HALF)
    dgain_ptr += tl.program_id(0) * (2 * HALF)
    tl.store(dgain_ptr + dim, tl.sum(dgain1, axis=0), mask=dim < HALF)
    tl.store(dgain_ptr + HALF + dim, tl.sum(dgain2, axis=0), mask=dim < HALF)


@triton_op("nanostack::norm_rotary", mutates_args=())
def norm_rotary_op(
    x: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, offset: int
) -> torch.Tensor:
    x, cos, sin = unit_stride(x, cos, sin)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, half = x.numel() // x.shape[3], x.shape[3] // 2
    config = lookup("norm_rotary_forward", half, x.device, x.dtype)
    launch(
        wrap_triton(norm_rotary_forward_kernel), (triton.cdiv(rows, config.tiles["BLOCK_ROWS"]),), config,
        x, gain.contiguous(), cos, sin, out, *x.stride()[:3], cos.stride(0), sin.stride(0),
        rows, x.shape[1], x.shape[2], offset, EPS=eps, HALF=half, BLOCK_HALF=triton.next_power_of_2(half),
    )  # fmt: skip
    return out


@triton_op("nanostack::norm_rotary_backward", mutates_args=())
def norm_rotary_backward_op(
    dout: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x, cos, sin = unit_stride(x, cos, sin)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, half = x.numel() // x.shape[3], x.shape[3] // 2
    config = lookup("norm_rotary_backward", half, x.device, x.dtype)
    programs = min(triton.cdiv(rows, config.tiles["BLOCK_ROWS"]), config.programs_per_sm * multiprocessors(x.device))
    dgain = torch.empty((programs, 2 * half), dtype=torch.float32, device=x.device)
    launch(
        wrap_triton(norm_rotary_backward_kernel), (programs,), config,
        dout.contiguous(), x, gain.contiguous(), cos, sin, dx, dgain, *x.stride()[:3], cos.stride(0), sin.stride(0),
        rows, x.shape[1], x.shape[2], offset, EPS=eps, HALF=half, BLOCK_HALF=triton.next_power_of_2(half),
        STAGES=config.num_stages,
    )  # fmt: skip
    return dx, dgain.sum(0).to(gain.dtype)


@norm_rotary_op.register_fake
def _(x, gain, cos, sin, eps, offset):
    return x.new_empty(x.shape)


@norm_rotary_backward_op.register_fake
def _(dout, x, gain, cos, sin, eps, offset):
    return x.new_empty(x.shape), gain.new_empty(gain.shape)


def _save(ctx, inputs, output):
    *saved, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(*saved)


def _norm_rotary_autograd(ctx, dout):
    dx, dgain = norm_rotary_backward_op(dout, *ctx.saved_tensors, ctx.eps, ctx.offset)
    return dx, dgain, None, None, None, None


norm_rotary_op.register_autograd(_norm_rotary_autograd, setup_context=_save)
norm_rotary_backward_op.register_autograd(refuse_second_derivative)


def norm_rotary(
    x: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Normalise each head of x (B, T, H, K), scale it by gain (K,), and rotate it to positions offset … offset + T − 1.

    cos and sin as rotary takes them. gain may be fp32 while x is bf16: its gradient has its dtype. Returns a new contiguous
    tensor like x. Without Triton and C it is rms_norm, then rotary. Raises ValueError, which names the argument, for what does
    not fit together.
    """
    _check(x, gain, cos, sin, eps, offset)
    refusal = f"the kernel takes a d_head of at most {MAX_D_HEAD}, not {x.shape[3]}" if x.shape[3] > MAX_D_HEAD else None
    if use_triton(backend, x, refusal) and x.numel():
        return norm_rotary_op(x, gain, cos, sin, eps, offset)
    rows = slice(offset, offset + x.shape[1])
    if use_c(backend, x) and x.numel():
        return _NormRotaryC.apply(x, gain, cos[rows], sin[rows], eps)
    return rotate(rms_norm(x, gain, eps, backend="torch"), cos[rows], sin[rows], in_c=False)


def _check(x, gain, cos, sin, eps, offset) -> None:
    require_floating("x", x)
    require_heads("x", x)
    require_number("eps", eps)
    require_floating("gain", gain)
    require_like("gain", gain, "x", x, dtype=False)
    require(
        gain.shape == x.shape[-1:],
        lambda: f"gain has shape {tuple(gain.shape)}; it must be ({x.shape[-1]},) for x of shape {tuple(x.shape)}",
    )
    check_tables("x", x, cos, sin, offset)


def norm_rotary_reference(
    x: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, offset: int = 0
) -> torch.Tensor:
    """The formula, for any dtype, differentiated by autograd."""
    return rotary_reference(rms_norm_reference(x, gain, eps), x[:, :, :0], cos, sin, offset)[0]


class _NormRotaryC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, cos, sin, eps):
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.eps = eps
        return cpu.norm_rotary(x, gain, cos, sin, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        x, gain, cos, sin = saved
        dx, dgain = cpu.norm_rotary_backward(dout, x, gain, cos, sin, ctx.eps)
        return dx, dgain.to(gain.dtype), None, None, None
