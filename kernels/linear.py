"""A linear layer whose weight is an fp32 master with a low-precision copy beside it.

    y = x · copyᵀ + bias      dx = dy · copy      dweight = dyᵀ · x and dbias = Σ_rows dy, in fp32

The products are the vendor library's. The savings lie around them: the copy is made once a step instead of once a
micro-batch, and dweight leaves the matrix units in fp32 and is added to the gradient there (beta = 1), where autograd would
round it to bf16, cast it and add it in passes of their own: 18 bytes per weight and micro-batch. In bf16 on the CPU the
product is rounded first, as torch has no fp32 output for it there.

FLOPs: 2·rows·D_in·D_out forward, twice that backward. Bytes beyond the products: none.
"""

import torch
import torch.nn.functional as F

from .dispatch import once_differentiable, require, require_floating, require_like


def linear(
    x: torch.Tensor, weight: torch.Tensor, compute_weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weightᵀ + bias, computed with `compute_weight`, which is `weight` in x's dtype. Gradients of weight and bias are in
    their dtypes.

    x (..., D_in), weight and compute_weight (D_out, D_in), bias (D_out,) → (..., D_out) in x's dtype. compute_weight gets no
    gradient. Outside of torch.compile a gradient that weight has already is added to in place. Raises ValueError for arguments
    that do not fit.
    """
    require_floating("x", x)
    require_like("compute_weight", compute_weight, "x", x)
    require_like("weight", weight, "x", x, dtype=False)
    require(
        weight.ndim == 2 and compute_weight.shape == weight.shape and x.ndim > 0 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)} and compute_weight {tuple(compute_weight.shape)}; "
            "weight and compute_weight must be (D_out, D_in) for x of (..., D_in)"
        ),
    )
    if bias is not None:
        require_like("bias", bias, "x", x, dtype=False)
        require(
            bias.shape == weight.shape[:1],
            lambda: f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},) for weight {tuple(weight.shape)}",
        )
    return _Linear.apply(x, weight, compute_weight.detach(), bias)


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The formula, for any dtype, differentiated by autograd."""
    y = x @ weight.to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, compute_weight, bias):
        ctx.save_for_backward(x, weight, compute_weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, compute_weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        x, weight, compute_weight = saved
        dx = dy @ compute_weight if ctx.needs_input_grad[0] else None
        dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dbias = dy_rows.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, dbias
        fp32_out = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32
        if torch.compiler.is_compiling() or weight.grad is None:
            dweight = torch.mm(dy_rows.t(), x_rows, out_dtype=torch.float32) if fp32_out else dy_rows.t() @ x_rows
            return dx, dweight.to(weight.dtype), None, dbias
        if fp32_out:
            torch.addmm(weight.grad, dy_rows.t(), x_rows, out_dtype=torch.float32, out=weight.grad)
        else:
            weight.grad.add_(dy_rows.t() @ x_rows)
        return dx, None, None, dbias
