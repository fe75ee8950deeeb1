"""Liger-Kernel: its autograd Functions, which its modules and its tests take from liger_kernel.ops."""

from types import SimpleNamespace

import torch
from ours import refuse

REPOSITORY = "linkedin/Liger-Kernel"
PATHS = ("src", ".")
CUDA = True
TESTS = {
    "test/transformers/test_rms_norm.py": ("test_correctness", "test_correctness_functional"),
    "test/transformers/test_fused_add_rms_norm.py": ("test_correctness", "test_correctness_functional"),
    "test/transformers/test_rope.py": ("test_correctness", "test_functional_correctness", "test_vision_2d_cos_sin"),
    "test/transformers/test_swiglu.py": (
        "test_correctness_llamamlp",
        "test_correctness_phi3mlp",
        "test_correctness_functional",
        "test_correctness_silumul_with_multipliers",
        "test_silumul_default_multipliers_backward_compat",
        "test_correctness_falcon_h1_mlp",
    ),
    "test/transformers/test_fused_linear_cross_entropy.py": (
        "test_correctness",
        "test_correctness_with_forward_only",
        "test_correctness_functional",
        "test_correctness_with_token_accuracy",
        "test_amp",
        "test_liger_fused_linear_cross_entropy_structured_output",
        "test_correctness_with_predicted_tokens",
        "test_correctness_reduction_none_per_token_grad_output",
    ),
}


def avoids(params: dict, backend: str) -> bool:
    refused = any(params.get(name) for name in ("bias", "has_ce_weight", "ce_weight"))
    return refused or (backend == "triton" and max(params.get("seq_len", 0), params.get("T", 0)) > 128)


def install(ours, checkout) -> None:
    def rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        return ours.norm(x, weight, eps, offset)

    def add_rms_norm(x, residual, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
        return ours.add_rms_norm(x, residual, weight.float() + offset if offset else weight, eps)

    def rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        """q, k (B, H, T, K); cos, sin (1 or B, T, K) or (T, K), both halves the same."""
        if cos.ndim == 3:
            if not torch.equal(cos, cos[:1].expand_as(cos)):
                refuse("positions that differ by row")
            cos, sin = cos[0], sin[0]
        half = q.shape[-1] // 2
        tables = (table[:, :half].float() for table in (cos, sin))
        q, k = ours.rotary(q.transpose(1, 2), k.transpose(1, 2), *tables)
        return q.transpose(1, 2), k.transpose(1, 2)

    def silu_mul(gate, up, gate_multiplier=1.0, down_multiplier=1.0):
        return ours.swiglu(torch.cat([gate * gate_multiplier, up], -1)) * down_multiplier

    def cross_entropy(
        x, weight, targets, bias=None, ce_weight=None, ignore_index=-100, z_loss=0.0, label_smoothing=0.0, reduction="mean",
        softcap=None, return_z_loss=False, accum_dtype=None, token_scaling=False, token_accuracy=False, predicted=False,
    ):  # fmt: skip
        asked = {"bias": bias is not None, "weights of classes": ce_weight is not None, "label smoothing": label_smoothing}
        asked |= {"softcap": softcap, "returns the z-loss": return_z_loss, "scaling of tokens": token_scaling}
        asked |= {"returns accuracy": token_accuracy, "returns predictions": predicted}
        for reason in (reason for reason, wanted in asked.items() if wanted):
            refuse(reason)
        if torch.is_autocast_enabled():
            x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
        loss = ours.linear_cross_entropy(x, weight, targets, ignore_index, reduction, float(z_loss))
        return loss, None, None, None

    import liger_kernel.ops as ops
    from transformers.models.llama import modeling_llama

    theirs = modeling_llama.LlamaRotaryEmbedding  # transformers 5.24 makes it on the current device, and takes none
    modeling_llama.LlamaRotaryEmbedding = lambda config, device=None: theirs(config)

    for name, function in {
        "LigerRMSNormFunction": rms_norm,
        "LigerFusedAddRMSNormFunction": add_rms_norm,
        "LigerRopeFunction": rope,
        "LigerSiLUMulFunction": silu_mul,
        "LigerFusedLinearCrossEntropyFunction": cross_entropy,
    }.items():
        setattr(ops, name, SimpleNamespace(apply=function))
