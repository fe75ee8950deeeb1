"""Cross entropy of a linear layer's logits, without ever holding the logits of all rows.

    logits = x · weightᵀ            (N, V), in float32, CHUNK_BYTES of it at a time
    lse    = logsumexp(logits)      (N,)
    loss_i = lse_i − logits_{i, targets_i} + z_loss · lse_i²
    dlogits_i = softmax(logits_i) · (1 + 2 · z_loss · lse_i) − onehot(targets_i)

The gradients follow from the same chunk of logits, so they are computed in the forward pass and the backward pass only scales
them: 6·N·V·D FLOPs (forward 2, dx 2, dweight 2), where recomputing the logits would cost 8. The price is holding dx and dweight
between the two passes. dweight is summed over chunks in float32: in bfloat16 training diverges [Liger-Kernel#512].

Bytes, with s bytes per element of x: reads of x and weight and writes of dx and dweight (2·s·N·D + (s + 4)·V·D) once, and per
logit 4 written, then read and written by the softmax and rounded to s for the two matmuls: about (12 + 3·s)·N·V.

z-loss: PaLM (arXiv:2204.02311, section 5). Chunking over rows: Liger-Kernel (arXiv:2410.10989, section 3.2).
"""

import torch

from .dispatch import require, require_like, use_triton, wide

CHUNK_BYTES = 64 * 2**20  # of float32 logits
CHUNK_ROWS = 1024  # at least: every chunk reads and writes all of dweight, 12·V·D bytes for the 6·V·D FLOPs of each of its rows
REDUCTIONS = ("mean", "sum", "none")


def flops(rows: int, width: int, vocab: int, backward: bool = True) -> int:
    """FLOPs of the matmuls: 2 per multiply-add, one matmul forward and two backward."""
    return (6 if backward else 2) * rows * width * vocab


def _logits(x_chunk: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x_chunk.is_cuda and x_chunk.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x_chunk, weight.t(), out_dtype=torch.float32)  # not offered on the CPU
    return wide(x_chunk @ weight.t())


def _loss_and_gradients(x, weight, targets, ignore_index, z_loss, row_scale=None, gradients=True):
    """Per-row loss (N,) and, if asked for, d(Σ row_scale · loss)/dx and /dweight; row_scale=None means ones.

    x (N, D) and weight (V, D) in the compute dtype, targets (N,).
    """
    rows, vocab = x.shape[0], weight.shape[0]
    loss = torch.empty(rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    dx = torch.empty_like(x) if gradients else None
    dweight = torch.zeros(weight.shape, dtype=loss.dtype, device=x.device) if gradients else None
    chunk = max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocab))
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        kept = (targets[part] != ignore_index).unsqueeze(1)
        target = torch.where(kept, targets[part].unsqueeze(1), 0)
        logits = _logits(x[part], weight)
        log_probs = torch.log_softmax(logits, dim=1)
        target_log_prob = log_probs.gather(1, target)
        lse = logits.gather(1, target) - target_log_prob
        loss[part] = torch.where(kept, z_loss * lse.square() - target_log_prob, 0).squeeze(1)
        if not gradients:
            continue
        dlogits = log_probs.exp_()
        if z_loss:
            dlogits.mul_(1 + 2 * z_loss * lse)
        dlogits.scatter_add_(1, target, -torch.ones_like(lse))
        if row_scale is not None:
            dlogits.mul_(row_scale[part].unsqueeze(1))
        dlogits = dlogits.to(x.dtype)
        kept = kept.to(x.dtype)  # ignored rows vanish in what is D wide, which is far less to touch than what is V wide
        dx[part] = (dlogits @ weight).mul_(kept)
        dweight += dlogits.t() @ (x[part] * kept)
    return loss, dx, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, reduction, z_loss, gradients):
        ctx.reduction, ctx.ignore_index, ctx.z_loss, ctx.weight_dtype = reduction, ignore_index, z_loss, weight.dtype
        cast = weight.to(x.dtype)
        eager = gradients and reduction != "none"
        loss, dx, dweight = _loss_and_gradients(x, cast, targets, ignore_index, z_loss, gradients=eager)
        if reduction == "none":  # each row's weight is known only in the backward pass, which starts again from the inputs
            ctx.save_for_backward(x, weight, targets)
            return loss
        factor = torch.ones_like(loss[:0].sum())
        if reduction == "mean":
            factor = 1 / (targets != ignore_index).sum().clamp(min=1).to(loss.dtype)
        ctx.save_for_backward(dx, dweight, factor)
        return loss.sum() * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        if ctx.reduction == "none":
            x, weight, targets = ctx.saved_tensors
            _, dx, dweight = _loss_and_gradients(x, weight.to(x.dtype), targets, ctx.ignore_index, ctx.z_loss, dloss)
        else:
            dx, dweight, factor = ctx.saved_tensors
            dx, dweight = dx * (dloss * factor).to(dx.dtype), dweight * (dloss * factor)
        return dx, dweight.to(ctx.weight_dtype), None, None, None, None, None


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross entropy in nats of `x @ weight.T` against `targets`, in float32.

    x (..., D), weight (V, D), targets (...) of int64. Rows whose target is ignore_index count for nothing; "mean" divides by
    the number of the others (0 if there is none), "none" returns (...). weight may be a float32 master of a bfloat16 x: it is
    rounded once for the matmuls, and its gradient comes back in float32. One code serves both backends: its time is matmuls.
    """
    require(reduction in REDUCTIONS, f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    require_like("weight", weight, "x", x, dtype=False)
    require_like("targets", targets, "x", x, dtype=False)
    require(
        weight.ndim == 2 and weight.shape[1] == x.shape[-1],
        f"weight has shape {tuple(weight.shape)}; it must be (vocabulary, {x.shape[-1]}) for x of shape {tuple(x.shape)}",
    )
    require(
        targets.shape == x.shape[:-1],
        f"targets has shape {tuple(targets.shape)}; it must be {tuple(x.shape[:-1])} for x of shape {tuple(x.shape)}",
    )
    require(targets.dtype == torch.int64, f"targets is {targets.dtype}; it must be torch.int64")
    use_triton(backend, x)
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    x_rows, targets_rows = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    loss = _LinearCrossEntropy.apply(x_rows, weight, targets_rows, ignore_index, reduction, z_loss, gradients)
    return loss.reshape(targets.shape) if reduction == "none" else loss
