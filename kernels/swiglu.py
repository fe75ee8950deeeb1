"""SwiGLU (Shazeer, arXiv:2002.05202) of a fused gate and up projection.

    y = silu(gate) · up,   silu(g) = g · σ(g),   gate_up = [gate; up] along the last dimension
    dgate = dy · up · σ(g) · (1 + g · (1 − σ(g))),   dup = dy · silu(g)

All in fp32, rounded once at the end [where the casts sit shows in the loss: Liger-Kernel#783]. Only gate_up is saved.

Bytes per row at s bytes per element: forward 3·s·F, backward 5·s·F. FLOPs: about 5·F and 10·F, nothing beside the bytes.
"""

import torch
import torch.nn.functional as F
from torch.library import triton_op

from . import cpu
from .configs import lookup
from .dispatch import (
    as_rows,
    launch,
    once_differentiable,
    refuse_second_derivative,
    require,
    require_floating,
    rounded,
    tl,
    triton,
    upcast,
    use_c,
    use_triton,
    wrap_triton,
)


@triton.jit
def swiglu_forward_kernel(gate_up_ptr, y_ptr, stride_gate_up_row, d_ff, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < d_ff
    gate_ptrs = gate_up_ptr + row * stride_gate_up_row + column
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + d_ff, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * d_ff + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr, stride_dy_row, stride_gate_up_row, d_ff, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < d_ff
    gate_ptrs = gate_up_ptr + row * stride_gate_up_row + column
    dgate_ptrs = dgate_up_ptr + row * (2 * d_ff) + column
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + d_ff, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy_row + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * (up * (sigmoid * (1 + gate * (1 - sigmoid))))  # no product overflows before the sigmoid makes it small
    dup = dy * (gate * sigmoid)
    tl.store(dgate_ptrs, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptrs + d_ff, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)


@triton_op("nanostack::swiglu", mutates_args=())
def swiglu_op(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up_rows = as_rows(gate_up)
    rows, d_ff = gate_up_rows.shape[0], gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], d_ff), dtype=gate_up.dtype, device=gate_up.device)
    config = lookup("swiglu_forward", d_ff, gate_up.device, gate_up.dtype)
    grid = (rows, triton.cdiv(d_ff, config.tiles["BLOCK"]))
    launch(wrap_triton(swiglu_forward_kernel), grid, config, gate_up_rows, y, gate_up_rows.stride(0), d_ff)
    return y


@triton_op("nanostack::swiglu_backward", mutates_args=())
def swiglu_backward_op(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    dy_rows, gate_up_rows = as_rows(dy), as_rows(gate_up)
    rows, d_ff = dy_rows.shape
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    config = lookup("swiglu_backward", d_ff, gate_up.device, gate_up.dtype)
    grid = (rows, triton.cdiv(d_ff, config.tiles["BLOCK"]))
    strides = (dy_rows.stride(0), gate_up_rows.stride(0))
    launch(wrap_triton(swiglu_backward_kernel), grid, config, dy_rows, gate_up_rows, dgate_up, *strides, d_ff)
    return dgate_up


@swiglu_op.register_fake
def _(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@swiglu_backward_op.register_fake
def _(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


swiglu_op.register_autograd(lambda ctx, dy: swiglu_backward_op(dy, *ctx.saved_tensors), setup_context=_save)
swiglu_backward_op.register_autograd(refuse_second_derivative)


def swiglu(gate_up: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """silu(gate) · up of gate_up (..., 2F), gate first → (..., F). Raises ValueError for an odd width or no numbers."""
    require_floating("gate_up", gate_up)
    require(
        gate_up.ndim > 0 and gate_up.shape[-1] % 2 == 0,
        lambda: f"gate_up has shape {tuple(gate_up.shape)}; its last dimension must be even: gate, then up",
    )
    on_triton = use_triton(backend, gate_up)
    return swiglu_op(gate_up) if on_triton and gate_up.numel() else _SwiGLU.apply(gate_up, use_c(backend, gate_up))


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The formula, for any dtype, differentiated by autograd."""
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


class _SwiGLU(torch.autograd.Function):
    """In C or in optimised torch, its backward written out: half the time of autograd, and only gate_up is saved."""

    @staticmethod
    def forward(ctx, gate_up, in_c):
        ctx.save_for_backward(gate_up)
        ctx.in_c = in_c
        if in_c:
            return cpu.swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return rounded(F.silu(upcast(gate)) * up, gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        (gate_up,) = saved
        if ctx.in_c:
            return cpu.swiglu_backward(dy, gate_up), None
        gate, up = (upcast(half) for half in gate_up.chunk(2, dim=-1))
        dy = upcast(dy)
        dgate_up = gate_up.new_empty(gate_up.shape)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        dup.copy_(F.silu(gate).mul_(dy))
        dgate.copy_(torch.ops.aten.silu_backward(up, gate).mul_(dy))
        return dgate_up, None
