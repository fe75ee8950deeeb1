"""When to grow, how much, and what growth saves, for a budget of parameters and tokens.

The paper ("Stacking Your Transformers", arXiv 2405.15319) fits the base's tokens d to the target's parameters N and its compute
C = 6·N·D:  log10 d = 0.88·log10 N + 163.27 / log10 C − 5.74,  on 410M to 3B parameters and C = 8e19 to 1.2e21 FLOPs, and fixes
the factor at g = 4. Small budgets break the formula (124M and 2.5B tokens give 20.8B), so d is capped at a fifth of the tokens.
The saving is the paper's speedup: an assumption about a run, and no promise.
"""

import math
from dataclasses import dataclass, replace

from nanostack import gpus
from nanostack.errors import UserError
from nanostack.flops import flops_of_mfu_per_token, flops_per_token, n_params
from nanostack.model import LlamaConfig

FITTED_PARAMS = (0.37e9, 3e9)  # the paper's 410M has 0.374B in all
FITTED_FLOPS = (8e19, 1.2e21)
MOST_OF_TOKENS = 0.2
FACTOR = 4


def growth_tokens(params: float, tokens: float) -> float:
    """The paper's d, in tokens, before any cap."""
    flops = 6 * params * tokens
    return 10 ** (0.88 * math.log10(params) + 163.27 / math.log10(flops) - 5.74)


def in_range(params: float, tokens: float) -> bool:
    """Whether the formula was fitted on models and budgets like these."""
    flops = 6 * params * tokens
    return FITTED_PARAMS[0] <= params <= FITTED_PARAMS[1] and FITTED_FLOPS[0] <= flops <= FITTED_FLOPS[1]


def shape_for(params: float, vocab_size: int, seq_len: int) -> LlamaConfig:
    """A Llama of about that many parameters, in the proportions of the paper's models; its depth a multiple of the factor."""
    aspect = 43 * (params / 0.374e9) ** 0.4  # d_model / n_layer: 43 at 0.37B, 72 to 130 at 1.4B to 6B
    shapes = []
    for n_layer in range(2 * FACTOR, 129, FACTOR):
        for d_model in range(128, 16385, 128):
            d_head = 64 if d_model <= 2048 else 128
            d_ff = 256 * round(8 / 3 * d_model / 256)
            n_head = d_model // d_head
            n_kv_head = 8 if d_model >= 4096 and n_head % 8 == 0 else n_head
            config = LlamaConfig(n_layer, n_head, n_kv_head, d_model, max(256, d_ff), vocab_size, seq_len)
            miss = abs(math.log(n_params(config) / params)) + 0.1 * abs(math.log(d_model / n_layer / aspect))
            shapes.append((miss, config))
    _, best = min(shapes, key=lambda shape: shape[0])
    if abs(math.log(n_params(best) / params)) > 0.3:
        raise UserError(f"no shape here has about {params:.3g} parameters with a vocabulary of {vocab_size}")
    return best


@dataclass(frozen=True)
class Budget:
    """What someone wants to train, and on what."""

    params: float
    """Parameters of the model you want, embeddings included."""
    tokens: float
    """Tokens you would train it for from scratch."""
    gpu: str = "H200"
    count: int = 8
    mfu: float = 0.4
    """Share of the GPUs' peak you expect to reach: an estimate, as are the hours."""
    speedup: float = 0.5
    """FLOPs(scratch) / FLOPs(grown) − 1 you expect; the paper measured 0.41 to 0.55 at 1B to 7B."""
    vocab_size: int = 32000
    seq_len: int = 2048


def rate_of(gpu: str, count: int, mfu: float) -> float:
    """The FLOP/s of so many GPUs at this share of their peak. UserError for a GPU that the table lacks."""
    if count < 1:
        raise UserError(f"count must be at least 1, not {count}")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must be above 0 and at most 1, not {mfu:g}")
    if (known := gpus.find(gpu)) is None:
        raise UserError(f"there is no GPU {gpu!r} in the table of peak rates; there are {', '.join(g.name for g in gpus.GPUS)}")
    return known.peak_bf16 * count * mfu


def hours(tokens: float, model: LlamaConfig, rate: float) -> float:
    """How long that many tokens take at `rate`, by the FLOPs that MFU counts: the paper's 6·N leaves attention out."""
    return tokens * flops_of_mfu_per_token(model) / rate / 3600


def advise(budget: Budget) -> dict:
    """Shapes, tokens, FLOPs and hours. UserError for budgets that are none."""
    if not (0 < budget.params < 1e14 and 0 < budget.tokens < 1e18):
        raise UserError("params must be from 0 to 1e14, tokens from 0 to 1e18")
    if not 0 <= budget.speedup <= 4:
        raise UserError(f"speedup must be from 0 to 4, not {budget.speedup:g}")
    rate = rate_of(budget.gpu, budget.count, budget.mfu)
    target = shape_for(budget.params, budget.vocab_size, budget.seq_len)
    base = replace(target, n_layer=target.n_layer // FACTOR)
    formula = growth_tokens(budget.params, budget.tokens)
    d_tokens = min(formula, MOST_OF_TOKENS * budget.tokens)
    flops = budget.tokens * flops_per_token(target)
    base_flops = d_tokens * flops_per_token(base)
    grown_flops = max(flops / (1 + budget.speedup), base_flops)
    tokens_grown = (grown_flops - base_flops) / flops_per_token(target)
    return {
        "d_tokens": d_tokens,
        "g": FACTOR,
        "n_params": n_params(target),
        "flops": flops,
        "in_range": in_range(budget.params, budget.tokens),
        "d_tokens_formula": formula,
        "capped": d_tokens < formula,
        "n_params_base": n_params(base),
        "flops_base": base_flops,
        "flops_grown": grown_flops,
        "tokens_grown": tokens_grown,
        "hours": hours(budget.tokens, target, rate),
        "hours_grown": hours(d_tokens, base, rate) + hours(tokens_grown, target, rate),
        "target": vars(target),
        "base": vars(base),
    }
