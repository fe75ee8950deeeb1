"""When to grow, how much, and what it saves: `python -m nanostack.plan --params 7e9 --tokens 300e9 --gpu h200 --count 8`.

The paper ("Stacking Your Transformers", arXiv 2405.15319) fits the base's tokens d to the target's parameters N and its compute
C = 6·N·D:  log10 d = 0.88·log10 N + 163.27 / log10 C − 5.74,  on 410M to 3B parameters and C = 8e19 to 1.2e21 FLOPs, and fixes
the factor at g = 4. Small budgets break it (124M and 2.5B tokens give 20.8B), so d is never more than a fifth of the tokens.
What growth saves is the paper's speedup, an assumption about your run and no promise.
"""

import math
from dataclasses import dataclass, replace

from nanostack.config import describe_tokens
from nanostack.errors import UserError, command_line
from nanostack.flops import PEAK_BF16, flops_per_token, n_params
from nanostack.model import LlamaConfig

FITTED_PARAMS = (0.37e9, 3e9)  # the paper's 410M has 0.374B in all
FITTED_FLOPS = (8e19, 1.2e21)
MOST_OF_TOKENS = 0.2
FACTOR = 4


@dataclass(frozen=True)
class Command:
    """Advice on growing: shapes, tokens, FLOPs, hours and the config to run."""

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
    json: bool = False
    """Print one JSON object."""


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
    best, least = None, math.inf
    for n_layer in range(2 * FACTOR, 129, FACTOR):
        for d_model in range(128, 16385, 128):
            d_head = 64 if d_model <= 2048 else 128
            d_ff = 256 * round(8 / 3 * d_model / 256)
            n_head = d_model // d_head
            n_kv_head = 8 if d_model >= 4096 and n_head % 8 == 0 else n_head
            config = LlamaConfig(n_layer, n_head, n_kv_head, d_model, max(256, d_ff), vocab_size, seq_len)
            miss = abs(math.log(n_params(config) / params)) + 0.1 * abs(math.log(d_model / n_layer / aspect))
            if miss < least:
                best, least = config, miss
    if abs(math.log(n_params(best) / params)) > 0.3:
        raise UserError(f"no shape here has about {params:.3g} parameters with a vocabulary of {vocab_size}")
    return best


def advise(command: Command) -> dict:
    """Everything that the command reports. Raises UserError for budgets that are none."""
    if not (0 < command.params < 1e14 and 0 < command.tokens < 1e18 and command.count > 0):
        raise UserError("params must be from 0 to 1e14, tokens from 0 to 1e18, count positive")
    if not (0 < command.mfu <= 1 and 0 <= command.speedup <= 4):
        raise UserError("mfu must be from 0 to 1, speedup from 0 to 4")
    peaks = {name.lower(): peak for name, peak in PEAK_BF16.items()}
    if command.gpu.lower() not in peaks:
        raise UserError(f"there is no GPU {command.gpu!r} in the table of peak rates; there are {', '.join(PEAK_BF16)}")
    target = shape_for(command.params, command.vocab_size, command.seq_len)
    base = replace(target, n_layer=target.n_layer // FACTOR)
    formula = growth_tokens(command.params, command.tokens)
    d_tokens = min(formula, MOST_OF_TOKENS * command.tokens)
    flops = command.tokens * flops_per_token(target)
    base_flops = d_tokens * flops_per_token(base)
    grown_flops = max(flops / (1 + command.speedup), base_flops)
    rate = peaks[command.gpu.lower()] * command.count * command.mfu
    return {
        "d_tokens": d_tokens,
        "g": FACTOR,
        "n_params": n_params(target),
        "flops": flops,
        "in_range": in_range(command.params, command.tokens),
        "d_tokens_formula": formula,
        "capped": d_tokens < formula,
        "n_params_base": n_params(base),
        "flops_base": base_flops,
        "flops_grown": grown_flops,
        "tokens_grown": (grown_flops - base_flops) / flops_per_token(target),
        "hours": flops / rate / 3600,
        "hours_grown": grown_flops / rate / 3600,
        "target": vars(target),
        "base": vars(base),
    }


def config_text(advice: dict) -> str:
    """A file for config/ that follows the advice, with the paper's learning rates and batch. Unlike the paper's, the rate is
    not warmed up again after growth and old layers keep their moments: the best, by little, of twelve ways in docs/study.md."""
    base = advice["base"]
    batch = 2_097_152 // base["seq_len"] * base["seq_len"]
    stages = [max(1, -(-round(advice[name]) // batch)) * batch for name in ("d_tokens", "tokens_grown")]
    lr = 3e-4 * (1.36e9 / advice["n_params"]) ** 0.5
    shape = ", ".join(f"{name}={base[name]!r}" for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff"))
    warmup = min(3000 * batch, stages[0] * 3 // 5)
    return f"""from nanostack.config import Data, Stage, Train, grow
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/YOURS"),
    model=LlamaConfig({shape}, vocab_size={base["vocab_size"]}, seq_len={base["seq_len"]}),
    stages=(
        Stage(tokens={stages[0]:_}, warmup_tokens={warmup:_}, lr=1e-3, schedule="constant"),
        grow(
            "stack", g={advice["g"]}, moments_old="keep", moments_new="zero",
            tokens={stages[1]:_}, lr={lr:.1e}, min_lr={lr / 10:.1e},
        ),
    ),
    batch_tokens={batch:_},
    micro_batch=8,
    out="out/planned",
)
"""


def main(command: Command) -> dict:
    advice = advise(command)
    if command.json:
        return advice
    target, base = advice["target"], advice["base"]
    d_tokens, formula = (describe_tokens(advice[name]) for name in ("d_tokens", "d_tokens_formula"))
    machine = f"on {command.count} × {command.gpu} at {command.mfu:.0%} MFU"
    print(f"target    {target['n_layer']} layers × {target['d_model']}, {advice['n_params'] / 1e9:.2f}B parameters")
    print(
        f"base      {base['n_layer']} layers, {advice['n_params_base'] / 1e9:.2f}B parameters, grown ×{advice['g']} by stacking"
    )
    print(f"grow at   {d_tokens} tokens (the formula says {formula})")
    if advice["capped"]:
        print(f"          capped at {MOST_OF_TOKENS:.0%} of the tokens, as the formula breaks at small ones: try a pilot")
    if not advice["in_range"]:
        print("          outside the range that the formula was fitted on (0.4B to 3B parameters, 8e19 to 1.2e21 FLOPs)")
    print(f"scratch   {advice['flops']:.3g} FLOPs, {advice['hours']:,.0f} h {machine}")
    print(
        f"grown     {advice['flops_grown']:.3g} FLOPs, {advice['hours_grown']:,.0f} h, if the speedup is {command.speedup:.0%}"
    )
    print("hours are estimates. A config to begin with:\n\n" + config_text(advice))
    return advice


if __name__ == "__main__":
    command_line(Command, main)
