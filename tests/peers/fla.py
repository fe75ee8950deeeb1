"""flash-linear-attention: its functions for norm, rotary, SwiGLU, linear cross entropy and softmax attention.

The reference of its linear cross entropy is a Triton kernel of its own; torch's cross entropy stands in for that. All those
tests have a bias: here it is one more column of weight, beside a column of ones in x.
"""

import torch
import torch.nn.functional as F
from ours import module, refuse

REPOSITORY = "fla-org/flash-linear-attention"
PATHS = (".",)
CUDA = True
TESTS = {
    "tests/modules/test_layernorm.py": ("test_rmsnorm", "test_rmsnorm_linear", "test_rmsnorm_small_t"),
    "tests/modules/test_rotary.py": (
        "test_rotary",
        "test_rotary_with_offsets",
        "test_rotary_varlen",
        "test_rotary_left_padding",
        "test_rotary_partial",
    ),
    "tests/modules/test_activation.py": ("test_swiglu", "test_swiglu_linear"),
    "tests/modules/test_cross_entropy.py": ("test_fused_linear_cross_entropy", "test_fused_linear_cross_entropy_softcap"),
    "tests/ops/test_attn.py": (
        "test_parallel",
        "test_parallel_bwd_full_value_reduction",
        "test_parallel_with_g",
        "test_parallel_varlen",
        "test_parallel_swa",
        "test_parallel_sink",
        "test_parallel_swa_varlen",
        "test_varlen_d_debug",
    ),
}


def avoids(params: dict, backend: str) -> bool:
    most = {"V": 0, "D": 128, "T": 512} if backend == "triton" else {"V": 32000, "D": 1200}
    return bool(
        params.get("compile")
        or (params.get("V") and params["T"] > 512)
        or any(params.get(name, 0) > size for name, size in most.items())
    )


def install(ours, checkout) -> None:
    for package in ("fla", "fla.modules", "fla.ops", "fla.ops.attn"):
        module(package, checkout / package.replace(".", "/"), __version__="")
    import fla.modules as modules
    from fla.modules import activations, fused_cross_entropy, fused_linear_cross_entropy, layernorm, rotary
    from fla.ops.attn import parallel

    def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
        if bias is not None:
            refuse("norm with a bias")
        if residual is None:
            return ours.norm(x, weight, eps)
        both = ours.add_rms_norm(x, residual, weight, eps)
        return both if prenorm else both[0]

    def layer_norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, is_rms_norm, **options):
        return F.linear(rms_norm(x, norm_weight, norm_bias, **options), linear_weight, linear_bias)

    def rotate(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, chunk_indices=None):
        if cu_seqlens is not None and x.ndim == 4:
            return ours.rotate(x[0], cos, sin, interleaved, seqlen_offsets, cu_seqlens)[None]
        return ours.rotate(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens)

    def swiglu(gate, up):
        return ours.swiglu(torch.cat([gate, up], -1))

    def cross_entropy(x, target, weight, bias=None, logit_scale=1.0, logit_softcapping=None, **options):
        if logit_softcapping:
            refuse("softcap")
        x = x * logit_scale
        if bias is not None:
            x = torch.cat([x, torch.full_like(x[:, :1], logit_scale)], 1)
            weight = torch.cat([weight, bias[:, None]], 1)
        return ours.linear_cross_entropy(x, weight, target, options["ignore_index"], options["reduction"])

    def attention(q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None, chunk_indices=None, *, sink_bias=None):
        asked = {"gates": g, "sliding windows": window_size, "attention sinks": sink_bias}
        for reason in (reason for reason, wanted in asked.items() if wanted is not None):
            refuse(reason)
        return ours.flash_attention(q, k, v, True, scale, cu_seqlens)

    def torch_loss(logit_scale=1.0, logit_softcapping=None, reduction="mean"):
        return lambda logits, target: F.cross_entropy(logits.float() * logit_scale, target, reduction=reduction)

    layernorm.rms_norm, layernorm.layer_norm_linear, rotary.rotary_embedding = rms_norm, layer_norm_linear, rotate
    activations.swiglu = swiglu
    activations.swiglu_linear = lambda gate, up, weight, bias: F.linear(swiglu(gate, up), weight, bias)
    fused_linear_cross_entropy.fused_linear_cross_entropy_loss = cross_entropy
    fused_cross_entropy.FusedCrossEntropyLoss = torch_loss
    parallel.parallel_attn = attention
    for theirs in (layernorm, fused_cross_entropy, fused_linear_cross_entropy):
        vars(modules).update({name: value for name, value in vars(theirs).items() if name[0].isupper()})
