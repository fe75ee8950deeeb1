"""What training costs, counted in FLOPs; and what share of the device's peak a run reaches (MFU).

Two counts per trained token, forward and backward together:
  paper   6·N_total                                           (every parameter, no attention; arXiv 2405.15319 eq. 48)
  exact   6·N_matmul + 6·depth·d_attn·(seq_len + 1)           (matrix products and causal attention as computed)
N_matmul is every parameter but the embedding look-up, gains and biases; d_attn the channels of all query heads, d_model in most
models. A causal query sees (seq_len + 1)/2 keys on average; per key and layer, scores and values cost 4·d_attn forward and
twice that backward. Layers that are run in loops count, in both, once for each loop.
"""

import torch

from nanostack import gpus
from nanostack.model import LlamaConfig

NEWTON_SCHULZ_STEPS = 5


def n_matrices(config: LlamaConfig) -> int:
    """Parameters in the blocks' matrices."""
    qkv = config.d_model * (config.n_head + 2 * config.n_kv_head) * config.head_dim
    out = config.n_head * config.head_dim * config.d_model
    mlp = 3 * config.d_model * config.d_ff
    return config.n_layer * (qkv + out + mlp)


def n_matmul(config: LlamaConfig) -> int:
    """Parameters that take part in matrix products, as often as they do; a tied head computes once."""
    return config.loops * n_matrices(config) + config.vocab_size * config.d_model


def n_params(config: LlamaConfig) -> int:
    """All parameters of `Llama(config)`."""
    norms = (2 * config.n_layer + 1) * config.d_model + _n_optional(config)
    return n_matrices(config) + norms + (1 if config.tie_embeddings else 2) * config.vocab_size * config.d_model


def _n_optional(config: LlamaConfig) -> int:
    """Biases, and gains of q and k."""
    heads, each = config.n_head + 2 * config.n_kv_head, 2 * config.head_dim * config.qk_norm
    each += config.qkv_bias * heads * config.head_dim + config.out_bias * config.d_model
    return config.n_layer * (each + config.mlp_bias * (2 * config.d_ff + config.d_model))


def d_attn(config: LlamaConfig) -> int:
    """Channels of all query heads."""
    return config.n_head * config.head_dim


def flops_per_token(config: LlamaConfig) -> int:
    """The paper's count: 6·N_total, of the model without loops that computes the same."""
    return 6 * n_params(config.unrolled())


def flops_exact_per_token(config: LlamaConfig) -> int:
    """Matrix products and causal attention, forward and backward."""
    return 6 * n_matmul(config) + 6 * config.depth * d_attn(config) * (config.seq_len + 1)


def orthogonalising_flops(rows: int, columns: int) -> int:
    """Of a matrix by Newton–Schulz (muon.py): X·Xᵀ, its square, and that times X, five times over."""
    small, large = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * small * small * large + 2 * small**3)


def newton_schulz_flops(config: LlamaConfig) -> int:
    """What Muon costs in a step, whatever the batch; in neither of the counts per token."""
    d, q, kv = config.d_model, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    shapes = [(q, d), (kv, d), (kv, d), (d, q), (config.d_ff, d), (config.d_ff, d), (d, config.d_ff)]
    return config.n_layer * sum(orthogonalising_flops(*shape) for shape in shapes)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known or not what the run computes in."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """The dense bf16 peak, in FLOP/s, of a device by the name that it gives itself; None for one that nanostack.gpus lacks."""
    gpu = gpus.find(name)
    return gpu.peak_bf16 if gpu else None


MFU = (
    "MFU = (6·N_matmul + a·depth·d_attn·seq_len) · tokens/s / peak, N_matmul all parameters but the embedding look-up, gains "
    "and biases, d_attn the channels of all query heads, peak the device's dense bf16 FLOP/s; full: a = 12, causal: a = 6"
)


def mfu(config: LlamaConfig, tokens_per_s: float, peak: float | None, causal: bool = False) -> float | None:
    """Model FLOPs utilisation, a fraction; see MFU. "full" counts the whole attention matrix, `causal` half of it.

    `tokens_per_s` and `peak` are those of one device, or both of all devices.
    """
    return None if peak is None else flops_of_mfu_per_token(config, causal) * tokens_per_s / peak


def flops_of_mfu_per_token(config: LlamaConfig, causal: bool = False) -> int:
    """What MFU counts for a token: see MFU."""
    return 6 * n_matmul(config) + (6 if causal else 12) * config.depth * d_attn(config) * config.seq_len
