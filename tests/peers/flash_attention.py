"""flash-attention: the public functions of flash_attn and its rotary layer; the compiled extension is an empty module."""

import torch
from ours import module, refuse

REPOSITORY = "Dao-AILab/flash-attention"
PATHS = (".",)
CUDA = True
TESTS = {
    "tests/test_flash_attn.py": (
        "test_flash_attn_qkvpacked",
        "test_flash_attn_varlen_qkvpacked",
        "test_flash_attn_output",
        "test_flash_attn_varlen_output",
        "test_flash_attn_causal",
        "test_flash_attn_varlen_causal",
        "test_flash_attn_race_condition",
        "test_flash_attn_bwd_overflow",
        "test_flash_attn_bwd_transpose",
        "test_flash_attn_bwd_varlen_overflow",
        "test_flash_attn_deterministic",
        "test_flash_attn_varlen_deterministic",
    ),
    "tests/test_rotary.py": (
        "test_rotary_emb_func",
        "test_rotary_emb_qkv",
        "test_rotary_emb_kv",
        "test_rotary_emb_varlen_func",
    ),
}


LARGEST = {"torch": 1024, "c": 1024, "triton": 256}  # sequences


def avoids(params: dict, backend: str) -> bool:
    asked = (params.get(name) for name in ("dropout_p", "local", "alibi", "softcap", "paged_kv_block_size", "compiled"))
    lengths = [params[name] for name in ("seqlen_q", "seqlen_k", "seqlen") if name in params]
    unequal = params.get("causal") and len(set(lengths)) > 1
    return any(asked) or bool(unequal) or max(lengths, default=0) > LARGEST[backend]


def install(ours, checkout) -> None:
    module("flash_attn_2_cuda")
    import flash_attn
    from flash_attn.layers import rotary

    def attend(q, k, v, cu_seqlens, dropout, scale, causal, window, softcap, alibi, probs):
        asked = {"dropout": dropout, "softcap": softcap, "alibi": alibi is not None}
        asked["sliding windows"] = [int(edge) for edge in window] != [-1, -1]
        for reason in (reason for reason, wanted in asked.items() if wanted):
            refuse(reason)
        out, lse = ours.flash_attention(q, k, v, causal, scale, cu_seqlens, return_lse=True)
        return (out, lse, None) if probs else out

    def dense(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
        return attend(q, k, v, None, *options)

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        if block_table is not None:
            refuse("paged keys and values")
        if not torch.equal(cu_seqlens_q, cu_seqlens_k):
            refuse("documents with different lengths of q and k")
        options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
        found = attend(q[None], k[None], v[None], cu_seqlens_q, *options)
        return (found[0][0], found[1][0], None) if return_attn_probs else found[0]

    def packed(qkv, *arguments, **options):
        return dense(*qkv.unbind(2), *arguments, **options)

    def kv_packed(q, kv, *arguments, **options):
        return dense(q, *kv.unbind(2), *arguments, **options)

    def varlen_packed(qkv, cu_seqlens, max_seqlen, *arguments, **options):
        return varlen(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *arguments, **options)

    def varlen_kv_packed(q, kv, *arguments, **options):
        return varlen(q, *kv.unbind(1), *arguments, **options)

    def rotate(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
        return ours.rotate(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens)

    for name, function in {
        "func": dense,
        "kvpacked_func": kv_packed,
        "qkvpacked_func": packed,
        "varlen_func": varlen,
        "varlen_kvpacked_func": varlen_kv_packed,
        "varlen_qkvpacked_func": varlen_packed,
    }.items():
        setattr(flash_attn, f"flash_attn_{name}", function)
    rotary.apply_rotary_emb, rotary.apply_rotary_emb_qkv_, rotary.apply_rotary_emb_kv_ = (
        rotate,
        ours.rotate_qkv,
        ours.rotate_kv,
    )
