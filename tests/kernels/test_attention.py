"""Numbers of attention, as in test_operations.py: on the torch paths, in C, interpreted, and with a CUDA device compiled."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracle import (
    INTERPRETED,
    assert_obeys_error_rule,
    attention_inputs,
    check_attention,
    few_examples,
    holds,
    in_turn,
    on_every_target,
    on_triton,
    outputs_and_gradients,
    plain_attention,
    randn,
)
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import attention as attention_module
from kernels import attention_triton, configs, dispatch
from nanostack.model import Llama, LlamaConfig

ATTENTION_SHAPES = [  # batch, q_len, kv_len, n_head, n_kv_head, d_head, causal
    (2, 1, 1, 2, 1, 64, True),
    (1, 127, 127, 4, 1, 32, True),
    (2, 33, 33, 8, 1, 32, True),
    (1, 64, 64, 2, 2, 64, True),
    (1, 41, 41, 4, 2, 80, True),
    (1, 50, 50, 2, 1, 128, True),
    (1, 35, 35, 1, 1, 256, True),
    (1, 261, 261, 1, 1, 32, True),
    (1, 32, 64, 2, 1, 32, False),
    (2, 1, 70, 4, 2, 48, False),
    (1, 70, 19, 3, 3, 32, False),
]


@in_turn(shape=ATTENTION_SHAPES)
def test_attention_obeys_error_rule(shape, target, monkeypatch):
    check_attention(*attention_inputs(*shape[:-1], target), target, monkeypatch, causal=shape[-1])


@in_turn()
def test_attention_of_1000_tokens_obeys_error_rule(target, monkeypatch):
    if INTERPRETED:  # with tiles that it is done with soon
        for kernel in ("attention_forward", "attention_dq", "attention_dk_dv"):
            rows = configs.TABLE[kernel] | {configs.FP32: {256: configs.attention(128, 128, 4, 1)}}
            monkeypatch.setitem(configs.TABLE, kernel, rows)
    check_attention(*attention_inputs(1, 1000, 1000, 1, 1, 32, target), target, monkeypatch)


@on_every_target
def test_attention_takes_slices_of_a_fused_projection_and_a_scale(target, monkeypatch):
    fused = randn(2, 8, 21, 32, target=target, grad=False).transpose(1, 2)
    q, k, v = (x.requires_grad_() for x in fused.split([4, 2, 2], 2))
    assert not q.is_contiguous()
    check_attention(q, k, v, target, monkeypatch, scale=0.3)


@on_every_target
def test_attention_survives_scores_far_below_zero(target):
    """exp of a masked or padded score minus such an lse overflows, and inf · 0 would poison the gradients."""
    q, k, v = attention_inputs(1, 37, 37, 1, 1, 32, target)
    k = (-100 * q.detach().mean(1, keepdim=True) + 0.01 * k).detach().requires_grad_()
    q = (q.detach().mean(1, keepdim=True) * 10 + 0.01 * q).detach().requires_grad_()
    for causal in (True, False):
        for result in outputs_and_gradients(
            lambda q, k, v, c=causal: kernels.flash_attention(q, k, v, causal=c, backend=target[1]), (q, k, v)
        ):
            assert holds(result.isfinite().all())


@in_turn(causal=[True, False], edges=[[0, 50], [0, 1, 1, 17, 18, 75], [0, 40, 64, 65]])
def test_attention_stays_inside_documents(edges, causal, target, monkeypatch):
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=target[0])
    q, k, v = attention_inputs(1, edges[-1], edges[-1], 4, 2, 32, target)
    check_attention(q, k, v, target, monkeypatch, causal=causal, cu_seqlens=cu_seqlens)


@in_turn(edges=[None, [0, 20, 45]])
def test_attention_returns_the_natural_logsumexp(edges, target):
    q, k, v = attention_inputs(1, 45, 45, 4, 2, 32, target)
    cu_seqlens = None if edges is None else torch.tensor(edges, dtype=torch.int32, device=target[0])
    out, lse = kernels.flash_attention(q, k, v, cu_seqlens=cu_seqlens, return_lse=True, backend=target[1])
    _, exact = kernels.flash_attention_reference(q.double(), k.double(), v.double(), cu_seqlens=cu_seqlens, return_lse=True)
    assert out.requires_grad and not lse.requires_grad and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=4e-6)


@in_turn()
def test_documents_translated_once_give_the_same_bits(target):
    """kernels.documents, which the model calls once for all its blocks, beside the translation in every call."""
    q, k, v = attention_inputs(1, 45, 45, 4, 2, 32, target)
    cu_seqlens, angle = torch.tensor([0, 20, 45], dtype=torch.int32, device=target[0]), torch.ones(45, 16, device=target[0])
    translated = kernels.documents(cu_seqlens, 45, q, 32, backend=target[1])
    assert (translated.bounds is not None) == (target[1] == "triton")
    for function, inputs in (
        (lambda documents, q, k, v: kernels.flash_attention(q, k, v, cu_seqlens=documents, backend=target[1]), (q, k, v)),
        (
            lambda documents, qkv: kernels.rotary_attention(qkv, 2, angle, angle, documents, backend=target[1]),
            (torch.cat((q, k, v), 2).detach().requires_grad_(),),
        ),
    ):
        runs = [outputs_and_gradients(functools.partial(function, given), inputs) for given in (cu_seqlens, translated)]
        assert all(map(torch.equal, *runs))
    with pytest.raises(ValueError, match=r"made for 45|must rise from 0 to 40"):
        kernels.flash_attention(q[:, :40], k[:, :40], v[:, :40], cu_seqlens=translated, backend=target[1])


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton kernels that run on this machine")
def test_a_model_translates_documents_once_for_all_its_blocks(monkeypatch):
    model = Llama(LlamaConfig(n_layer=3, n_head=1, n_kv_head=1, d_model=16, d_ff=16, vocab_size=8, seq_len=6))
    model.end_of_text, calls = 0, []
    monkeypatch.setattr(dispatch, "_backend", "triton")
    bounds = attention_module.document_bounds
    monkeypatch.setattr(attention_module, "document_bounds", lambda *given: calls.append(1) or bounds(*given))
    model(torch.tensor([[3, 0, 5, 6, 0, 1]]), torch.ones(1, 6, dtype=torch.int64))
    assert len(calls) == 1


@on_every_target
@given(
    seq=st.integers(1, 70),
    n_kv_head=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3]),
    d_head=st.sampled_from([32, 40]),
    causal=st.booleans(),
)
@few_examples
def test_attention_obeys_error_rule_in_any_shape(seq, n_kv_head, group, d_head, causal, target, monkeypatch):
    inputs = attention_inputs(1, seq, seq, group * n_kv_head, n_kv_head, d_head, target)
    check_attention(*inputs, target, monkeypatch, causal=causal)


@on_triton
def test_documents_that_do_not_cover_the_row_are_seen(target):
    """On the CPU by name; on a GPU, whose values nobody waits for, by nan."""
    q = attention_inputs(1, 20, 20, 1, 1, 32, target)[0]
    for edges in ([0, 12], [3, 20], [0, 15, 9, 20]):
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        bounds = attention_triton.document_bounds(cu_seqlens, 20).to(target[0])
        out, _ = torch.ops.nanostack.flash_attention(q, q, q, bounds, True, 0.2)
        assert holds(out.isnan().all())
        if INTERPRETED:
            with pytest.raises(ValueError, match="must rise from 0 to 20"):
                kernels.flash_attention(q, q, q, cu_seqlens=cu_seqlens, backend="triton")


@on_every_target
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), causal=st.booleans(), group=st.sampled_from([1, 3]))
@few_examples
def test_attention_stays_inside_any_documents(lengths, causal, group, target, monkeypatch):
    edges = torch.tensor([0, *lengths, 1]).cumsum(0)
    cu_seqlens = edges.to(target[0], torch.int32)
    inputs = attention_inputs(1, int(edges[-1]), int(edges[-1]), group, 1, 32, target)
    check_attention(*inputs, target, monkeypatch, causal=causal, cu_seqlens=cu_seqlens)


SEQ = 19 if INTERPRETED else 37  # two blocks of rows of the interpreter's, three of columns; in C more than one of either


@in_turn(heads=[(4, 2, 40), (1, 1, 64)], edges=[(), (1, SEQ), (5, SEQ - 7)])
def test_rotary_attention_obeys_error_rule(heads, edges, target, monkeypatch):
    """Two rows of tokens; a document that goes on from the first into the second keeps the positions of each."""
    n_head, n_kv_head, d_head = heads
    edges = [0, *edges, SEQ + 13, SEQ + 13, 2 * SEQ] if edges else None
    qkv = randn(2, SEQ, n_head + 2 * n_kv_head, d_head, target=target)
    angle = torch.outer(torch.arange(SEQ + 4.0), 1e4 ** -torch.linspace(0, 1, d_head // 2)).to(target[0])
    cos, sin = angle.cos(), angle.sin()
    cu_seqlens = None if edges is None else torch.tensor(edges, dtype=torch.int32, device=target[0])

    def apart(attend):
        def function(qkv):
            q, k, v = qkv.split([n_head, n_kv_head, n_kv_head], 2)
            q, k = kernels.rotary_reference(
                q, k, *(table[:SEQ].to(torch.promote_types(q.dtype, torch.float32)) for table in (cos, sin))
            )
            packed = [x if edges is None else x.reshape(1, 2 * SEQ, -1, d_head) for x in (q, k, v)]
            return attend(*packed, cu_seqlens=cu_seqlens).reshape(2, SEQ, n_head, d_head)

        return function

    def ours(qkv):
        return kernels.rotary_attention(qkv, n_kv_head, cos, sin, cu_seqlens, backend=target[1])

    def formula(qkv):
        tables = (table.to(torch.promote_types(qkv.dtype, torch.float32)) for table in (cos, sin))
        return kernels.rotary_attention_reference(qkv, n_kv_head, *tables, cu_seqlens)

    assert_obeys_error_rule(ours, apart(plain_attention), formula, (qkv,), monkeypatch)
    strided = qkv.detach().repeat(1, 1, 2, 1)[:, :, : qkv.shape[2]].requires_grad_()
    assert_obeys_error_rule(ours, apart(plain_attention), formula, (strided,), monkeypatch)


@pytest.mark.skipif(not INTERPRETED, reason="tile shapes are varied in the interpreter, where they cost nothing to compile")
@pytest.mark.parametrize("tiles", [(16, 32), (32, 32), (16, 64), (64, 16)], ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
def test_attention_does_not_depend_on_its_tiles(tiles, tma, monkeypatch):
    target = ("cpu", "triton", torch.float32)
    for kernel in ("attention_forward", "attention_dq", "attention_dk_dv"):
        rows = configs.TABLE[kernel] | {configs.FP32: {256: configs.attention(*tiles, 4, 1, TMA=tma)}}
        monkeypatch.setitem(configs.TABLE, kernel, rows)
    check_attention(*attention_inputs(1, 101, 101, 2, 1, 40, target), target, monkeypatch)
    check_attention(*attention_inputs(2, 30, 75, 2, 1, 32, target), target, monkeypatch, causal=False)
    cu_seqlens = torch.tensor([0, 9, 71, 90], dtype=torch.int32)
    check_attention(*attention_inputs(1, 90, 90, 1, 1, 32, target), target, monkeypatch, cu_seqlens=cu_seqlens)


def test_tma_is_used_only_where_rows_and_heads_start_on_16_bytes(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device, dtype: 90)

    def uses_tma(*tensors):
        return attention_triton.launch_config("attention_forward", *tensors).tiles["TMA"]

    fused = torch.empty(1, 8, 6, 64, dtype=torch.bfloat16)
    assert uses_tma(*fused.split(2, 2))
    assert not uses_tma(torch.empty(1, 8, 2, 36, dtype=torch.bfloat16))  # 72 bytes from head to head
    assert not uses_tma(torch.empty(1, 8, 2, 65, dtype=torch.bfloat16)[..., 1:])
    assert not uses_tma(torch.empty(1, 1, 2, 64, dtype=torch.bfloat16).expand(1, 8, 2, 64))


@in_turn()
def test_flop_counter_sees_attention_forward_and_backward(target):
    q, k, v = attention_inputs(2, 24, 24, 4, 2, 32, target)
    with FlopCounterMode(display=False) as counter:
        out = kernels.flash_attention(q, k, v, backend=target[1])
    assert counter.get_total_flops() == 4 * 2 * 4 * 24 * 24 * 32
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 2 * 4 * 24 * 24 * 32
    qkv, angle = torch.cat((q, k, v), 2), torch.ones(24, 16, device=target[0])
    with FlopCounterMode(display=False) as counter:
        kernels.rotary_attention(qkv, 2, angle, angle, backend=target[1]).sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 4 * 24 * 24 * 32
