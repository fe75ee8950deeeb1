"""Attention without the score matrix (FlashAttention-2, Dao, arXiv:2307.08691), with grouped heads and packed documents.

    S = scale · Q Kᵀ (masked),   P = softmax(S),   out = P V,   lse = logsumexp(S)           for each query head
    Δ = Σ_K dout · out,   dS = P ∘ (dout Vᵀ − Δ),   dV = Pᵀ dout,   dK = scale · dSᵀ Q,   dQ = scale · dS K

A query head reads the kv head of its group, which is never repeated in memory; the gradient of a kv head is summed over its
group by one program. No atomics: two runs give the same bits. S, lse and Δ are fp32, S and lse in units of log 2 (a factor
between forward and backward pass would round large ones to p = exp2(±ulp)); P and dS are rounded to the dtype of the
input for the matrix units. With documents, row i attends to columns of [start_i, end_i), the bounds of its own document.

FLOPs: forward 4·B·H·T·T_kv·K, backward 10 (14 are done, as dK/dV and dQ each form S and dP); a causal mask needs half of them.
The FLOP counter is told 4 and 10 with any mask, torch's own convention for attention.
Bytes at s per element: forward s·B·K·(2·H·T + 2·H_kv·T_kv) + 4·B·H·T; backward about 2.5 times that. The FLOPs are what counts.
"""

import math

import torch
from torch.library import triton_op

from .configs import Config, architecture, for_pointers, lookup, rows_for
from .dispatch import (
    launch,
    refuse_second_derivative,
    tl,
    triton,
    unit_stride,
    wrap_triton,
)

LOG2_E = tl.constexpr(1.4426950408889634)  # scores are kept in units of log 2: exp2 is one instruction, exp two
LN_2 = math.log(2)
# Finite: a row that has met masked columns only gets exp2(-inf - LOWEST) = 0 and not nan. No float32 is below it: a row whose
# scores all were would have the sum 0. Nothing is added to it but what is subtracted: LOWEST - 3e38 is -inf, whose exp2 is 0.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tile_source(x_ptr, stride_row, n_row, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Through what load_tile reads a (n_row, D) matrix: a descriptor for Hopper's TMA unit, or just its pointer."""
    if TMA:
        return tl.make_tensor_descriptor(x_ptr, [n_row, D], [stride_row, 1], [BLOCK, BLOCK_D])
    else:
        return x_ptr


@triton.jit
def load_tile(
    source, stride_row, first_row, n_row, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """BLOCK rows of a (n_row, D) matrix, zero outside it. Offsets in int64: 16k tokens × 131k columns overflow int32."""
    if TMA:
        return source.load([first_row, 0])
    else:
        row, dim = first_row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        mask = (row < n_row)[:, None] if D == BLOCK_D else (row < n_row)[:, None] & (dim < D)[None, :]
        return tl.load(source + row.to(tl.int64)[:, None] * stride_row + dim[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(x_ptr, stride_row, row, n_row, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    mask = (row < n_row)[:, None] if D == BLOCK_D else (row < n_row)[:, None] & (dim < D)[None, :]
    tl.store(x_ptr + row.to(tl.int64)[:, None] * stride_row + dim[None, :], tile.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def locate(n_row, n_head, BLOCK: tl.constexpr):
    """This program's block of rows, and its batch and head in int64: (n_row / BLOCK) programs per head, one after another."""
    n_block = tl.cdiv(n_row, BLOCK)
    batch_head = (tl.program_id(0) // n_block).to(tl.int64)
    return tl.program_id(0) % n_block, batch_head // n_head, batch_head % n_head


@triton.jit
def visible(row, column, bounds_ptr, q_len, kv_len, CAUSAL: tl.constexpr):
    """Which columns each row attends to. row and column broadcast, so it serves S and Sᵀ.

    What lies behind the last column, or behind the document of a row, lies behind the row: a causal mask hides it already. Rows
    behind the last are not stored, and have p = 0 in the backward pass.
    """
    seen = column <= row if CAUSAL else column < kv_len
    if bounds_ptr is not None:
        seen = seen & (tl.load(bounds_ptr + row, mask=row < q_len, other=0) <= column)
        if not CAUSAL:
            seen = seen & (tl.load(bounds_ptr + q_len + row, mask=row < q_len, other=2**31 - 1) > column)
    return seen


@triton.jit
def column_range(q_block, bounds_ptr, q_len, kv_len, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, masked, last): a block of rows needs no mask in [first, masked) and one in [masked, last)."""
    first_row = q_block * BLOCK_M
    last = tl.minimum(first_row + BLOCK_M, kv_len) if CAUSAL else kv_len
    if bounds_ptr is not None:
        first = tl.load(bounds_ptr + first_row) // BLOCK_N * BLOCK_N
        end = tl.load(bounds_ptr + q_len + tl.minimum(first_row + BLOCK_M, q_len) - 1)
        return first, first, tl.minimum(last, end)
    masked = first_row // BLOCK_N * BLOCK_N if CAUSAL else kv_len // BLOCK_N * BLOCK_N
    return 0, masked, last


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, bounds_ptr, out_ptr, lse_ptr, stride_q_batch, stride_q_seq, stride_q_head,
    stride_k_batch, stride_k_seq, stride_k_head, stride_v_batch, stride_v_seq, stride_v_head, n_head, group, q_len, kv_len,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    q_block, batch, head = locate(q_len, n_head, BLOCK_M)
    q_block = tl.cdiv(q_len, BLOCK_M) - 1 - q_block  # the longest rows of a causal mask start first
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + (head // group) * stride_k_head
    v_ptr += batch * stride_v_batch + (head // group) * stride_v_head
    q_source = tile_source(q_ptr, stride_q_seq, q_len, D, BLOCK_M, BLOCK_D, TMA)
    k_source = tile_source(k_ptr, stride_k_seq, kv_len, D, BLOCK_N, BLOCK_D, TMA)
    v_source = tile_source(v_ptr, stride_v_seq, kv_len, D, BLOCK_N, BLOCK_D, TMA)
    row = q_block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(q_source, stride_q_seq, q_block * BLOCK_M, q_len, D, BLOCK_M, BLOCK_D, TMA)

    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    first, masked, last = column_range(q_block, bounds_ptr, q_len, kv_len, CAUSAL, BLOCK_M, BLOCK_N)
    for MASKED in tl.static_range(2):
        for tile in range(masked if MASKED else first, last if MASKED else masked, BLOCK_N):
            column = tile + tl.arange(0, BLOCK_N)
            k = load_tile(k_source, stride_k_seq, tile, kv_len, D, BLOCK_N, BLOCK_D, TMA)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2_E)
            if MASKED:
                seen = visible(row[:, None], column[None, :], bounds_ptr, q_len, kv_len, CAUSAL)
                scores = tl.where(seen, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            p = tl.exp2(scores - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_max = new_max
            row_sum = row_sum * shrink + tl.sum(p, 1)
            v = load_tile(v_source, stride_v_seq, tile, kv_len, D, BLOCK_N, BLOCK_D, TMA)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")

    out_ptr += (batch * q_len * n_head + head) * D
    store_tile(out_ptr, n_head * D, row, q_len, out / row_sum[:, None], D, BLOCK_D)
    lse_ptr += (batch * n_head + head) * q_len
    tl.store(lse_ptr + row, row_max + tl.log2(row_sum), mask=row < q_len)


@triton.jit
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, bounds_ptr, dout_ptr, lse_ptr, delta_ptr, out_ptr, dq_ptr,
    stride_q_batch, stride_q_seq, stride_q_head, stride_k_batch, stride_k_seq, stride_k_head, stride_v_batch, stride_v_seq,
    stride_v_head, stride_dout_batch, stride_dout_seq, stride_dout_head, n_head, group, q_len, kv_len, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    q_block, batch, head = locate(q_len, n_head, BLOCK_M)
    q_block = tl.cdiv(q_len, BLOCK_M) - 1 - q_block
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + (head // group) * stride_k_head
    v_ptr += batch * stride_v_batch + (head // group) * stride_v_head
    dout_ptr += batch * stride_dout_batch + head * stride_dout_head
    q_source = tile_source(q_ptr, stride_q_seq, q_len, D, BLOCK_M, BLOCK_D, TMA)
    k_source = tile_source(k_ptr, stride_k_seq, kv_len, D, BLOCK_N, BLOCK_D, TMA)
    v_source = tile_source(v_ptr, stride_v_seq, kv_len, D, BLOCK_N, BLOCK_D, TMA)
    dout_source = tile_source(dout_ptr, stride_dout_seq, q_len, D, BLOCK_M, BLOCK_D, TMA)
    row = q_block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(q_source, stride_q_seq, q_block * BLOCK_M, q_len, D, BLOCK_M, BLOCK_D, TMA)
    dout = load_tile(dout_source, stride_dout_seq, q_block * BLOCK_M, q_len, D, BLOCK_M, BLOCK_D, TMA)
    rows_before = (batch * n_head + head) * q_len
    lse = tl.load(lse_ptr + rows_before + row, mask=row < q_len, other=float("inf"))  # p = 0 past the end
    offset = (batch * q_len * n_head + head) * D
    out = load_tile(out_ptr + offset, n_head * D, q_block * BLOCK_M, q_len, D, BLOCK_M, BLOCK_D, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + rows_before + row, delta, mask=row < q_len)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, masked, last = column_range(q_block, bounds_ptr, q_len, kv_len, CAUSAL, BLOCK_M, BLOCK_N)
    for MASKED in tl.static_range(2):
        for tile in range(masked if MASKED else first, last if MASKED else masked, BLOCK_N):
            column = tile + tl.arange(0, BLOCK_N)
            k = load_tile(k_source, stride_k_seq, tile, kv_len, D, BLOCK_N, BLOCK_D, TMA)
            v = load_tile(v_source, stride_v_seq, tile, kv_len, D, BLOCK_N, BLOCK_D, TMA)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2_E)
            p = tl.exp2(scores - lse[:, None])
            if MASKED:
                p = tl.where(visible(row[:, None], column[None, :], bounds_ptr, q_len, kv_len, CAUSAL), p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_tile(dq_ptr + offset, n_head * D, row, q_len, dq * SCALE, D, BLOCK_D)


@triton.jit
def attention_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, bounds_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_q_batch, stride_q_seq, stride_q_head, stride_k_batch, stride_k_seq, stride_k_head, stride_v_batch, stride_v_seq,
    stride_v_head, stride_dout_batch, stride_dout_seq, stride_dout_head, n_head, group, q_len, kv_len, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    n_kv_head = n_head // group
    kv_block, batch, kv_head = locate(kv_len, n_kv_head, BLOCK_N)
    first_column = kv_block * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_k_batch + kv_head * stride_k_head
    v_ptr += batch * stride_v_batch + kv_head * stride_v_head
    k_source = tile_source(k_ptr, stride_k_seq, kv_len, D, BLOCK_N, BLOCK_D, TMA)
    v_source = tile_source(v_ptr, stride_v_seq, kv_len, D, BLOCK_N, BLOCK_D, TMA)
    k = load_tile(k_source, stride_k_seq, first_column, kv_len, D, BLOCK_N, BLOCK_D, TMA)
    v = load_tile(v_source, stride_v_seq, first_column, kv_len, D, BLOCK_N, BLOCK_D, TMA)

    first, last = (first_column // BLOCK_M * BLOCK_M if CAUSAL else 0), q_len
    if bounds_ptr is not None:
        first = first if CAUSAL else tl.load(bounds_ptr + first_column) // BLOCK_M * BLOCK_M
        last = tl.load(bounds_ptr + q_len + tl.minimum(first_column + BLOCK_N, kv_len) - 1)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Not pipelined: of one token, the loop over rows folds away, and Triton cannot pipeline what makes a descriptor.
    for head in tl.range(kv_head * group, (kv_head + 1) * group, num_stages=1):
        q_head_ptr = q_ptr + batch * stride_q_batch + head * stride_q_head
        dout_head_ptr = dout_ptr + batch * stride_dout_batch + head * stride_dout_head
        q_source = tile_source(q_head_ptr, stride_q_seq, q_len, D, BLOCK_M, BLOCK_D, TMA)
        dout_source = tile_source(dout_head_ptr, stride_dout_seq, q_len, D, BLOCK_M, BLOCK_D, TMA)
        rows_before = (batch * n_head + head) * q_len
        for tile in range(first, last, BLOCK_M):
            row = tile + tl.arange(0, BLOCK_M)
            q = load_tile(q_source, stride_q_seq, tile, q_len, D, BLOCK_M, BLOCK_D, TMA)
            # Sᵀ directly: transposing what a dot returned gives wrong gradients on Hopper [flash-linear-attention#826].
            scores_t = tl.dot(k, tl.trans(q), input_precision="ieee") * (SCALE * LOG2_E)
            lse = tl.load(lse_ptr + rows_before + row, mask=row < q_len, other=float("inf"))  # p = 0 past the end
            p_t = tl.exp2(scores_t - lse[None, :])
            # Every tile is masked: with a second loop for those that need none, this kernel spills.
            if CAUSAL or bounds_ptr is not None:
                p_t = tl.where(visible(row[None, :], column[:, None], bounds_ptr, q_len, kv_len, CAUSAL), p_t, 0.0)
            dout = load_tile(dout_source, stride_dout_seq, tile, q_len, D, BLOCK_M, BLOCK_D, TMA)
            dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision="ieee")
            dp_t = tl.dot(v, tl.trans(dout), input_precision="ieee")
            delta = tl.load(delta_ptr + rows_before + row, mask=row < q_len, other=0.0)
            ds_t = p_t * (dp_t - delta[None, :])
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")

    offset = (batch * kv_len * n_kv_head + kv_head) * D
    store_tile(dk_ptr + offset, n_kv_head * D, column, kv_len, dk * SCALE, D, BLOCK_D)
    store_tile(dv_ptr + offset, n_kv_head * D, column, kv_len, dv, D, BLOCK_D)


def block_d(d_head: int) -> int:
    """Width of a tile: a power of two that holds a head, and what the matrix units take at least."""
    return max(16, triton.next_power_of_2(d_head))


def widest_head(device: torch.device, dtype: torch.dtype) -> int:
    """The d_head up to which there are rows for tensors of this dtype there: wider heads do not fit into the registers."""
    return max(rows_for("attention_dk_dv", architecture(device, dtype)))


def launch_config(kernel: str, *tensors: torch.Tensor) -> Config:
    """The row for these tensors (batch, seq, head, d_head): one with TMA only where rows, heads and batches of them all start
    on 16 bytes, as TMA reads nothing else."""
    like = tensors[0]
    d_head = like.shape[-1]
    config = lookup(kernel, d_head, like.device, like.dtype)
    starts = [start for x in tensors for start in (x.storage_offset(), *x.stride()[:3])]
    tma = all(start * like.element_size() % 16 == 0 for start in starts)
    tma = tma and all(x.stride(1) > 0 for x in tensors)  # an expanded tensor repeats one row, and no descriptor does
    return config if tma else for_pointers(kernel, d_head, config)


@triton_op("nanostack::flash_attention", mutates_args=())
def flash_attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = unit_stride(q, k, v)
    batch, q_len, n_head, d_head = q.shape
    kv_len, n_kv_head = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, n_head, q_len), dtype=torch.float32, device=q.device)
    config = launch_config("attention_forward", q, k, v)
    launch(
        wrap_triton(attention_forward_kernel), (batch * n_head * triton.cdiv(q_len, config.tiles["BLOCK_M"]),), config,
        q, k, v, bounds, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], n_head, n_head // n_kv_head,
        q_len, kv_len, SCALE=scale, CAUSAL=causal, D=d_head, BLOCK_D=block_d(d_head),
    )  # fmt: skip
    return out, lse


@triton_op("nanostack::flash_attention_backward", mutates_args=())
def flash_attention_backward_op(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dout, q, k, v = unit_stride(dout, q, k, v)
    batch, q_len, n_head, d_head = q.shape
    kv_len, n_kv_head = k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    inputs = (q, k, v, bounds, dout, lse, delta)
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]
    sizes = (n_head, n_head // n_kv_head, q_len, kv_len)
    # dQ first: it leaves Δ to dK/dV.
    config = launch_config("attention_dq", q, k, v, dout)
    launch(
        wrap_triton(attention_dq_kernel), (batch * n_head * triton.cdiv(q_len, config.tiles["BLOCK_M"]),), config,
        *inputs, out.contiguous(), dq, *strides, *sizes, SCALE=scale, CAUSAL=causal, D=d_head, BLOCK_D=block_d(d_head),
    )  # fmt: skip
    config = launch_config("attention_dk_dv", q, k, v, dout)
    launch(
        wrap_triton(attention_dk_dv_kernel), (batch * n_kv_head * triton.cdiv(kv_len, config.tiles["BLOCK_N"]),), config,
        *inputs, dk, dv, *strides, *sizes, SCALE=scale, CAUSAL=causal, D=d_head, BLOCK_D=block_d(d_head),
    )  # fmt: skip
    return dq, dk, dv


@flash_attention_op.register_fake
def _(q, k, v, bounds, causal, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@flash_attention_backward_op.register_fake
def _(dout, q, k, v, bounds, out, lse, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, documents, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, documents, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, _):
    return *flash_attention_backward_op(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


flash_attention_op.register_autograd(_autograd, setup_context=_save)
flash_attention_backward_op.register_autograd(refuse_second_derivative)


def document_bounds(cu_seqlens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """(2, seq_len) int32: first position of each position's document, and one past its last.

    Where cu_seqlens does not rise from 0 to seq_len all documents are empty, and attention to nothing is nan.
    """
    cu_seqlens = cu_seqlens.contiguous()
    position = torch.arange(seq_len, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:], position, right=True).clamp_(max=cu_seqlens.shape[0] - 2)
    sound = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == seq_len) & (cu_seqlens.diff() >= 0).all()
    return torch.stack((cu_seqlens[document], cu_seqlens[document + 1])).to(torch.int32) * sound
