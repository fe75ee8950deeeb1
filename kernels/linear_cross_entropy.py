"""Cross entropy of a linear layer's logits, without ever holding the logits of all rows.

    logits = x · weightᵀ            (N, V), in float32, CHUNK_ROWS rows at a time, or what CHUNK_BYTES hold
    lse    = logsumexp(logits)      (N,)
    loss_i = lse_i − logits_{i, targets_i} + z_loss · lse_i²
    dlogits_i = softmax(logits_i) · (1 + 2 · z_loss · lse_i) − onehot(targets_i)

The gradients follow from the same chunk of logits, so they are computed in the forward pass and the backward pass only scales
them: 6·N·V·D FLOPs (forward 2, dx 2, dweight 2), where recomputing the logits would cost 8. The price is holding dx and dweight
between the two passes. dweight is summed over chunks in float32: in bfloat16 training diverges [Liger-Kernel#512]. The matrix
products are the vendor library's; between them one kernel reads a row of logits twice, for lse and for dlogits.

Bytes, with s bytes per element of x: x, weight, dx and dweight once (2·s·N·D + (s + 4)·V·D), 8·V·D more per chunk to accumulate
dweight, and per logit 4 written, 4 or 8 read (the second time from the cache where the rows at work fit), s written as dlogits
and read twice: (8 or 12 + 3·s)·N·V.

z-loss: PaLM (arXiv:2204.02311, section 5). Chunking over rows: Liger-Kernel (arXiv:2410.10989, section 3.2).
"""

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import cpu
from .configs import ANY, lookup
from .dispatch import (
    launch,
    once_differentiable,
    require,
    require_floating,
    require_like,
    require_number,
    tl,
    triton,
    upcast,
    use_c,
    use_triton,
)

CHUNK_BYTES = 64 * 2**20  # of float32 logits
CHUNK_ROWS = 1024  # at least: every chunk reads and writes all of dweight, 8·V·D bytes for the 6·V·D FLOPs of each of its rows
REDUCTIONS = ("mean", "sum", "none")
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; from -inf, a block of logits of -inf would make exp2(nan)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, row_scale_ptr, loss_ptr, dlogits_ptr, stride_logits_row, vocab,
    IGNORE_INDEX: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """loss of a row of logits (vocab,) and, unless dlogits_ptr is None, row_scale · d loss / d logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits_row
    target = tl.load(targets_ptr + row)
    row_max = LOWEST
    row_sum = 0.0
    for start in range(0, vocab, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(logits))
        row_sum = row_sum * tl.exp2((row_max - new_max) * LOG2_E) + tl.sum(tl.exp2((logits - new_max) * LOG2_E))
        row_max = new_max
    log_sum = tl.log(row_sum)  # kept apart from row_max, which may be so large that their sum is row_max
    lse = row_max + log_sum

    kept = target != IGNORE_INDEX
    # A target outside the vocabulary gives nan, which nobody overlooks, instead of a read outside the logits.
    inside = (target >= 0) & (target < vocab)
    target_logit = tl.load(logits_ptr + target, mask=kept & inside, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(kept, log_sum - (target_logit - row_max) + Z_LOSS * lse * lse, 0.0))

    if dlogits_ptr is not None:
        dlogits_ptr += row * vocab
        scale = tl.where(kept, 1.0, 0.0)
        if row_scale_ptr is not None:
            scale *= tl.load(row_scale_ptr + row)
        softmax_scale = scale * (1 + 2 * Z_LOSS * lse) / row_sum
        for start in range(0, vocab, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            logits = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            dlogits = tl.exp2((logits - row_max) * LOG2_E) * softmax_scale - tl.where(column == target, scale, 0.0)
            dlogits = tl.where(kept, dlogits, 0.0)  # whatever the logits are: nan times 0 is nan
            tl.store(dlogits_ptr + column, dlogits.to(dlogits_ptr.dtype.element_ty), mask=column < vocab)


def _rows_triton(logits, targets, row_scale, ignore_index, z_loss, loss, dlogits):
    config = lookup("cross_entropy", ANY, logits.device, logits.dtype)
    launch(
        cross_entropy_kernel, (logits.shape[0],), config,
        logits, targets, row_scale, loss, dlogits, logits.stride(0), logits.shape[1], IGNORE_INDEX=ignore_index, Z_LOSS=z_loss,
    )  # fmt: skip


def _rows_torch(logits, targets, row_scale, ignore_index, z_loss, loss, dlogits):
    kept = (targets != ignore_index).unsqueeze(1)
    inside = ((targets >= 0) & (targets < logits.shape[1])).unsqueeze(1)
    target = torch.where(kept & inside, targets.unsqueeze(1), 0)
    log_probs = torch.log_softmax(logits, dim=1)
    row_loss = -log_probs.gather(1, target)
    if z_loss:  # 0 · lse² is nan where lse² overflows
        lse = logits.logsumexp(1, keepdim=True)
        row_loss += z_loss * lse * lse
    row_loss.masked_fill_(~inside, torch.nan)
    loss.copy_(torch.where(kept, row_loss, 0).squeeze(1))
    if dlogits is None:
        return
    upcast_dlogits = log_probs.exp_()
    if z_loss:
        upcast_dlogits.mul_(1 + 2 * z_loss * lse)
    upcast_dlogits.scatter_add_(1, target, -torch.ones_like(row_loss))
    if row_scale is not None:
        upcast_dlogits.mul_(row_scale.unsqueeze(1))
    dlogits.copy_(upcast_dlogits.masked_fill_(~kept, 0))


@torch.library.custom_op("nanostack::linear_cross_entropy_rows", mutates_args=())
def rows_op(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, row_scale: torch.Tensor | None,
    ignore_index: int, z_loss: float, gradients: bool, way: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss of each row (N,) and, with `gradients`, dx and dweight of Σ row_scale · loss; row_scale None means ones.

    x (N, D) and weight (V, D) in the compute dtype, targets (N,); way is "triton", "c" or "torch". Opaque to torch.compile,
    which would unroll the chunks.
    """
    rows, vocab = x.shape[0], weight.shape[0]
    targets = targets.contiguous()
    loss = torch.empty(rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if gradients else x.new_empty(0)
    dweight = torch.zeros(weight.shape if gradients else 0, dtype=loss.dtype, device=x.device)
    chunk = max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocab))
    low_precision_on_cuda = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)  # elsewhere mm has no out_dtype
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        if low_precision_on_cuda:
            logits = torch.mm(x[part], weight.t(), out_dtype=torch.float32)
        else:
            logits = upcast(torch.mm(x[part], weight.t()))
        dlogits = torch.empty(logits.shape, dtype=x.dtype, device=x.device) if gradients else None
        row_scale_part = None if row_scale is None else row_scale[part].contiguous()
        step = {"triton": _rows_triton, "c": cpu.cross_entropy, "torch": _rows_torch}[way]
        step(logits, targets[part], row_scale_part, ignore_index, z_loss, loss[part], dlogits)
        if dlogits is not None:
            torch.mm(dlogits, weight, out=dx[part])
            if low_precision_on_cuda:
                torch.addmm(dweight, dlogits.t(), x[part], out_dtype=torch.float32, out=dweight)
            else:
                dweight += torch.mm(dlogits.t(), x[part])
        del logits, dlogits  # before the next chunk's are made
    return loss, dx, dweight


@rows_op.register_fake
def _(x, weight, targets, row_scale, ignore_index, z_loss, gradients, way):
    upcast_dtype = torch.promote_types(x.dtype, torch.float32)
    dx, dweight = (x.shape, weight.shape) if gradients else ((0,), (0,))
    return x.new_empty(x.shape[0], dtype=upcast_dtype), x.new_empty(dx), x.new_empty(dweight, dtype=upcast_dtype)


def flops(rows: int, width: int, vocab: int, backward: bool = True) -> int:
    """FLOPs of the matrix products: 2 per multiply-add, one product forward and two backward."""
    return (6 if backward else 2) * rows * width * vocab


def scratch_bytes(rows: int, width: int, vocab: int, element_size: int, on_triton: bool) -> int:
    """Bytes that the loss and its gradients take for themselves while they are computed, results apart."""
    logits = min(rows, max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocab))) * vocab
    return logits * (4 + element_size) + (0 if on_triton else 4 * max(logits, vocab * width))


def _count_flops(x, weight, targets, row_scale, ignore_index, z_loss, gradients, *args, out_shape=None, **kwargs) -> int:
    return flops(x[0], x[1], weight[0], gradients)


if torch.ops.nanostack.linear_cross_entropy_rows not in flop_registry:
    register_flop_formula(torch.ops.nanostack.linear_cross_entropy_rows)(_count_flops)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, reduction, z_loss, gradients, way):
        ctx.options = (ignore_index, z_loss, True, way)
        ctx.save_for_backward(x, weight, targets)
        # "none": each row's weight is known only in the backward pass, which starts again from the inputs.
        early = gradients and reduction != "none"
        loss, dx, dweight = rows_op(x, weight.to(x.dtype), targets, None, ignore_index, z_loss, early, way)
        ctx.gradients = (dx, dweight) if early else None
        if reduction == "none":
            ctx.factor = None
            return loss
        ctx.factor = torch.ones_like(loss[:0].sum())
        if reduction == "mean":
            ctx.factor = 1 / (targets != ignore_index).sum().clamp(min=1).to(loss.dtype)
        return loss.sum() * ctx.factor

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dloss):
        x, weight, targets = saved
        if ctx.factor is None:
            _, dx, dweight = rows_op(x, weight.to(x.dtype), targets, dloss, *ctx.options)
            return dx, dweight.to(weight.dtype), None, None, None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward through a retained graph: the first one scaled what there was in place
            gradients = rows_op(x, weight.to(x.dtype), targets, None, *ctx.options)[1:]
        dx, dweight = gradients
        return *_scaled(dx, dweight, dloss * ctx.factor, weight.dtype), None, None, None, None, None, None


def _scaled(dx, dweight, scale, weight_dtype):
    """Both times the fp32 number `scale`, rounded once; dweight, the size of the weights, in place where its dtype stays."""
    scale = scale.reshape(1, 1)  # a dimension makes it take part in type promotion: the product is formed in fp32
    if torch.compiler.is_compiling():
        return (dx * scale).to(dx.dtype), (dweight * scale).to(weight_dtype)
    out = dweight if dweight.dtype == weight_dtype else torch.empty_like(dweight, dtype=weight_dtype)
    return torch.mul(dx, scale, out=dx), torch.mul(dweight, scale, out=out)


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
    rounded once for the matrix products, and its gradient comes back in float32. A target outside the vocabulary gives nan;
    any other misfit raises ValueError, which names the argument.
    """
    require(reduction in REDUCTIONS, lambda: f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    require_floating("x", x)
    require_floating("weight", weight)
    require_like("weight", weight, "x", x, dtype=False)
    require_like("targets", targets, "x", x, dtype=False)
    require(x.ndim > 0, "x has no dimensions; it must be (..., width)")
    require(
        weight.ndim == 2 and weight.shape[1] == x.shape[-1],
        lambda: (
            f"weight has shape {tuple(weight.shape)}; it must be (vocabulary, {x.shape[-1]}) for x of shape {tuple(x.shape)}"
        ),
    )
    require(
        targets.shape == x.shape[:-1],
        lambda: f"targets has shape {tuple(targets.shape)}; it must be {tuple(x.shape[:-1])} for x of shape {tuple(x.shape)}",
    )
    require(targets.dtype == torch.int64, lambda: f"targets is {targets.dtype}; it must be torch.int64")
    require(weight.numel() > 0, lambda: f"weight has shape {tuple(weight.shape)}; there is nothing to choose from")
    require_number("ignore_index", ignore_index, whole=True)
    require_number("z_loss", z_loss)
    way = "triton" if use_triton(backend, x) else "c" if use_c(backend, x) else "torch"
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    x_rows, targets_rows = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    options = (ignore_index, reduction, float(z_loss), gradients, way)
    loss = _LinearCrossEntropy.apply(x_rows, weight, targets_rows, *options)
    return loss.reshape(targets.shape) if reduction == "none" else loss


def linear_cross_entropy_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The formula, with all logits at once, for any dtype, differentiated by autograd."""
    logits = upcast(torch.einsum("...d,vd->...v", x, weight.to(x.dtype)))
    kept = targets != ignore_index
    lse = logits.logsumexp(-1)
    loss = lse - logits.gather(-1, targets.where(kept, 0)[..., None])[..., 0] + z_loss * lse.square()
    loss = loss.where(kept, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)
