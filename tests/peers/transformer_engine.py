"""TransformerEngine: its fused rotary, and RMSNorm as a module; the rest of the package needs its compiled extension.

tests/pytorch/test_numerics.py cannot be imported without that. Of it, the test of RMSNorm, its reference and what they use are
evaluated by themselves (CUT).
"""

import torch
from ours import module, refuse
from torch import nn

REPOSITORY = "NVIDIA/TransformerEngine"
PATHS = (".", "tests/pytorch")
CUDA = True
TESTS = {
    "tests/pytorch/test_fused_rope.py": ("test_fused_rope", "test_fused_rope_thd"),
    "tests/pytorch/test_numerics.py": ("test_rmsnorm_accuracy",),
}


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-5, params_dtype=None, zero_centered_gamma=False, device=None):
        super().__init__()
        first = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = nn.Parameter(first(width, dtype=params_dtype))
        self.eps, self.offset = eps, 1.0 if zero_centered_gamma else 0.0

    def forward(self, x):
        return self.ours.norm(x, self.weight, self.eps, self.offset)


class Config:
    """What the test of RMSNorm reads of the peer's model config "126m": batch, sequence, heads, d_head."""

    def __init__(self, batch_size, max_seqlen_q, num_heads, head_dim_qk, **options):
        self.batch_size, self.max_seqlen_q, self.hidden_size = batch_size, max_seqlen_q, num_heads * head_dim_qk


CUT = {
    "tests/pytorch/test_numerics.py": (
        (
            "model_configs",
            "batch_sizes",
            "all_boolean",
            "TorchRMSNorm",
            "dtype_tols",
            "assert_allclose",
            "_test_granular_accuracy",
            "test_rmsnorm_accuracy",
        ),
        "from contextlib import nullcontext\nfrom typing import Dict, List, Tuple\n"
        "import pytest\nimport torch\nfrom torch import nn\nfrom torch.nn import Parameter\n"
        "from nanostack_adapter import Config as ModelConfig, RMSNorm\n"
        "param_types = [torch.float32, torch.float16, torch.bfloat16]\n"
        "reset_rng_states = lambda: torch.manual_seed(1234)\n"
        "autocast = lambda enabled, recipe: nullcontext()\n",
    )
}


def avoids(params: dict, backend: str) -> bool:
    return params.get("cp_size", 1) > 1 or (backend == "triton" and params.get("seq_length", 0) > 2048)


def install(ours, checkout) -> None:
    RMSNorm.ours = ours
    folder = checkout / "transformer_engine"
    module("transformer_engine_torch")
    for name in ("", ".pytorch", ".pytorch.attention"):
        module(f"transformer_engine{name}", folder / name.replace(".", "/").lstrip("/"))
    module("transformer_engine.pytorch.cpp_extensions")
    module("transformer_engine.pytorch.cpp_extensions.fused_attn", QKVFormat={})
    torch.cuda.current_device = lambda: "cpu"  # rope.py makes its frequencies there
    from transformer_engine.pytorch.attention import rope

    class FusedRoPE:
        @staticmethod
        def apply(t, freqs, start_positions=None, tensor_format="sbhd", interleaved=False, cu_seqlens=None, size=1, rank=0):
            """t (T, B, H, K), (B, T, H, K) or packed (T, H, K); freqs (position, 1, 1, K), halves or neighbours alike."""
            if size > 1:
                refuse("context parallelism")
            angles = freqs[:, 0, 0]
            angles = angles[:, ::2] if interleaved else angles[:, : angles.shape[-1] // 2]
            if tensor_format == "sbhd":
                t = t.transpose(0, 1)
            starts = 0 if start_positions is None else start_positions
            if cu_seqlens is not None and start_positions is None:
                starts = torch.zeros(len(cu_seqlens) - 1, dtype=torch.int32)
            out = ours.rotate(t, angles.cos(), angles.sin(), interleaved, starts, cu_seqlens)
            return out.transpose(0, 1).contiguous() if tensor_format == "sbhd" else out.contiguous()

    rope.FusedRoPEFunc = FusedRoPE
