"""RMSNorm (Zhang & Sennrich, arXiv:1910.07467), alone and fused with the residual addition before it.

    y = x · rstd · weight,   rstd = 1 / √(mean(x²) + eps)                                     per row of width D
    dx = rstd · (g − x̂ · mean(g · x̂)),   g = dy · weight,   x̂ = x · rstd,   dweight = Σ_rows dy · x̂

add_rms_norm first forms residual_out = x + residual (rounded to x's dtype) and normalises that; its backward adds the gradient
that arrives at residual_out in the same pass. Arithmetic is fp32 whatever the dtype; weight is multiplied before rounding.

Bytes per row at s bytes per element: forward 2·s·D, fused 4·s·D; backward 3·s·D, fused 4·s·D. FLOPs: about 4·D and 11·D,
nothing beside the bytes. The backward recomputes rstd, as it holds the whole row anyway, so nothing is saved but x. dweight:
persistent programs, one to four a multiprocessor, sum their rows in registers, then torch sums (programs, D): no atomics.
"""

import torch
from torch.library import triton_op

from . import cpu
from .configs import lookup
from .dispatch import (
    as_rows,
    launch,
    multiprocessors,
    once_differentiable,
    refuse_second_derivative,
    require,
    require_floating,
    require_like,
    require_number,
    rounded,
    tl,
    triton,
    upcast,
    use_c,
    use_triton,
    wrap_triton,
)

MAX_WIDTH = 16384  # a row stays in the registers of one program


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, residual_out_ptr, stride_x_row, stride_residual_row, rows, width,
    EPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (column < width)
    x = tl.load(x_ptr + row * stride_x_row + column, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * stride_residual_row + column, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(y_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + row * width + column, rounded, mask=mask)
        x = rounded.to(tl.float32)  # what the backward pass will read
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + EPS)
    y = x * rstd[:, None] * weight
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr,
    stride_dy_row, stride_dresidual_row, stride_x_row, rows, width,
    EPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)  # reduced over its rows once, after the loop
    # Without num_stages here a loop with no dot is not pipelined, and its loads wait for the rows before them.
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & (column < width)
        x = tl.load(x_ptr + row * stride_x_row + column, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dy_row + column, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + EPS)[:, None]
        x_hat = x * rstd
        dweight += dy * x_hat
        dy_weight = dy * weight
        projection = tl.sum(dy_weight * x_hat, axis=1)[:, None] / width
        dx = (dy_weight - x_hat * projection) * rstd
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + row * stride_dresidual_row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * width + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    column = tl.arange(0, BLOCK_D)
    tl.store(dweight_ptr + tl.program_id(0) * width + column, tl.sum(dweight, axis=0), mask=column < width)


def _forward(x, residual, weight, eps):
    x_rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = None if residual is None else torch.empty_like(y)
    rows, width = x_rows.shape
    config = lookup("rms_norm_forward", width, x.device, x.dtype)
    launch(
        wrap_triton(rms_norm_forward_kernel), (triton.cdiv(rows, config.tiles["BLOCK_ROWS"]),), config,
        x_rows, residual_rows, weight.contiguous(), y, residual_out, x_rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0), rows, width,
        EPS=eps, BLOCK_D=triton.next_power_of_2(width),
    )  # fmt: skip
    return y, residual_out


def _backward(dy, dresidual, x, weight, eps):
    x_rows, dy_rows = as_rows(x), as_rows(dy)
    dresidual_rows = None if dresidual is None else as_rows(dresidual)
    rows, width = x_rows.shape
    config = lookup("rms_norm_backward", width, x.device, x.dtype)
    programs = min(triton.cdiv(rows, config.tiles["BLOCK_ROWS"]), config.programs_per_sm * multiprocessors(x.device))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    launch(
        wrap_triton(rms_norm_backward_kernel), (programs,), config,
        dy_rows, dresidual_rows, x_rows, weight.contiguous(), dx, dweight, dy_rows.stride(0),
        0 if dresidual_rows is None else dresidual_rows.stride(0), x_rows.stride(0), rows, width,
        EPS=eps, BLOCK_D=triton.next_power_of_2(width), STAGES=config.num_stages,
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


@triton_op("nanostack::rms_norm", mutates_args=())
def rms_norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _forward(x, None, weight, eps)[0]


@triton_op("nanostack::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, residual, weight, eps)


@triton_op("nanostack::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    dy: torch.Tensor, dresidual: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(dy, dresidual, x, weight, eps)


@rms_norm_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@add_rms_norm_op.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@rms_norm_backward_op.register_fake
def _(dy, dresidual, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    *_, weight, ctx.eps = inputs
    x = inputs[0] if isinstance(output, torch.Tensor) else output[1]
    ctx.save_for_backward(x, weight)


def _rms_norm_autograd(ctx, dy):
    dx, dweight = rms_norm_backward_op(dy, None, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None


def _add_rms_norm_autograd(ctx, dy, dresidual):
    dx, dweight = rms_norm_backward_op(dy, dresidual, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dweight, None


rms_norm_op.register_autograd(_rms_norm_autograd, setup_context=_save)
rms_norm_backward_op.register_autograd(refuse_second_derivative)
add_rms_norm_op.register_autograd(_add_rms_norm_autograd, setup_context=_save)


def _check(x, weight, eps):
    require_floating("x", x)
    require_floating("weight", weight)
    require_number("eps", eps)
    require_like("weight", weight, "x", x, dtype=False)
    require(x.ndim > 0, "x has no dimensions; it must be (..., width)")
    require(
        weight.shape == x.shape[-1:],
        lambda: f"weight has shape {tuple(weight.shape)}; it must be ({x.shape[-1]},) for x of shape {tuple(x.shape)}",
    )


def _too_wide(x):
    return f"the kernel takes rows of at most {MAX_WIDTH}, not {x.shape[-1]}" if x.shape[-1] > MAX_WIDTH else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str | None = None) -> torch.Tensor:
    """Normalise the last dimension of `x` (..., D) by its root mean square and scale by `weight` (D,).

    weight may be fp32 while x is bf16: y has x's dtype, the gradient of weight has weight's. Raises ValueError, which names
    the argument, for what does not fit together.
    """
    _check(x, weight, eps)
    on_triton = use_triton(backend, x, _too_wide(x))
    if on_triton and x.numel():
        return rms_norm_op(x, weight, eps)
    if use_c(backend, x):
        return _RMSNormC.apply(x, None, weight, eps)[0]
    return _RMSNormTorch.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, residual_out) with residual_out = x + residual and y = rms_norm(residual_out). Gradients arrive through both.

    residual is like x; the rest is as for rms_norm.
    """
    _check(x, weight, eps)
    require_like("residual", residual, "x", x)
    require(
        residual.shape == x.shape,
        lambda: f"residual has shape {tuple(residual.shape)} and x has {tuple(x.shape)}; they must match",
    )
    if use_triton(backend, x, _too_wide(x)) and x.numel():
        return add_rms_norm_op(x, residual, weight, eps)
    if use_c(backend, x, residual):
        return _RMSNormC.apply(x, residual, weight, eps)
    residual_out = x + residual
    return _RMSNormTorch.apply(residual_out, weight, eps), residual_out


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula, for any dtype, differentiated by autograd."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, for any dtype, differentiated by autograd."""
    return rms_norm_reference(x + residual, weight, eps), x + residual


class _RMSNormTorch(torch.autograd.Function):
    """Optimised torch: with its backward written out, on the CPU three times as fast as autograd through F.rms_norm."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x_upcast = upcast(x)
        mean_square = torch.linalg.vector_norm(x_upcast, dim=-1, keepdim=True).square() / x.shape[-1]
        rstd = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(x, weight, rstd)
        return rounded(x_upcast * rstd * weight, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        x, weight, rstd = saved
        x_hat, dy = upcast(x) * rstd, upcast(dy)
        dy_x_hat = dy * x_hat
        dweight = dy_x_hat.reshape(-1, x.shape[-1]).sum(0)
        projection = (dy_x_hat @ weight.to(dy.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        dx = (dy * weight).sub_(x_hat.mul_(projection)).mul_(rstd)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class _RMSNormC(torch.autograd.Function):
    """Both operations on the CPU: (y, x + residual), the second None without a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, summed, rstd = cpu.rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(x if residual is None else summed, weight, rstd)
        ctx.added = residual is not None
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy, dresidual):
        x, weight, rstd = saved
        dx, dweight = cpu.rms_norm_backward(dy, dresidual if ctx.added else None, x, weight, rstd)
        return dx, dx if ctx.added else None, dweight.to(weight.dtype), None
