"""When to grow, how much, and what it saves: `nanostack plan --params 7e9 --tokens 300e9 --gpu h200 --count 8`.

The paper ("Stacking Your Transformers", arXiv 2405.15319) fits the base's tokens d to the target's parameters N and its compute
C = 6·N·D:  log10 d = 0.88·log10 N + 163.27 / log10 C − 5.74,  on 410M to 3B parameters and C = 8e19 to 1.2e21 FLOPs, and fixes
the factor at g = 4. Small budgets break it (124M and 2.5B tokens give 20.8B), so d is never more than a fifth of the tokens.
What growth saves is the paper's speedup, an assumption about your run and no promise.
"""

from dataclasses import dataclass

from nanostack.config import OptimizerName, describe_tokens
from nanostack.errors import command_line
from nanostack.growth.budget import MOST_OF_TOKENS, Budget, advise

MEASURED = {  # bench/results/study-muon-cpu.json
    "adamw": "stacking saved +51 ± 74 % over AdamW from scratch",
    "muon": "stacking saved +51 ± 62 % over Muon from scratch, and Muon from scratch +31 ± 37 % over AdamW",
}


ADVICE = {  # what docs/study.md found, in a line
    "adamw": "keep old moments, zero for new layers, no warm-up; 10 to 30 % of the FLOPs were equally good times to grow",
    "muon": "keep old momentum, zero for new layers, no warm-up; half the base's rate after growth; with one seed, growing "
    "after 5 to 10 % of the FLOPs was best, and after 30 % saved nothing",
}


@dataclass(frozen=True)
class Command(Budget):
    """Advice on growing: shapes, tokens, FLOPs, hours and the config to run."""

    optim: OptimizerName = "adamw"
    """What trains it: adamw, or muon, beside which growth was measured, too (docs/study.md)."""
    json: bool = False
    """Print one JSON object."""


def config_text(advice: dict, optim: OptimizerName = "adamw") -> str:
    """A file for config/ that follows the advice, with the paper's learning rates and batch.

    The rate is not warmed up again after growth, and old layers keep their moments. The paper does otherwise; docs/study.md
    compares twelve ways, of which this is the best, by little. An update of Muon has the size of AdamW's, so the base's rate
    serves both; after growth Muon's best was half of it.
    """
    base = advice["base"]
    batch = 2_097_152 // base["seq_len"] * base["seq_len"]
    stages = [max(1, -(-round(advice[name]) // batch)) * batch for name in ("d_tokens", "tokens_grown")]
    lr = 5e-4 if optim == "muon" else 3e-4 * (1.36e9 / advice["n_params"]) ** 0.5
    shape = ", ".join(f"{name}={base[name]!r}" for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff"))
    warmup = min(3000 * batch, stages[0] * 3 // 5)
    names, optimizer = ("Optim, ", '    optim=Optim("muon"),\n') if optim == "muon" else ("", "")
    return f"""from nanostack.config import Data, {names}Stage, Train, grow
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
{optimizer}    out="out/planned",
)
"""


def main(command: Command) -> dict:
    advice = advise(command) | {"optim": command.optim}
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
    print(f"measured  {MEASURED[command.optim]}: 0.27M parameters, 20 tokens for each, three seeds (docs/study.md)")
    print(f"advice    {ADVICE[command.optim]}")
    print("hours are estimates. A config to begin with:\n\n" + config_text(advice, command.optim))
    return advice


def run() -> None:
    command_line(Command, main, __doc__)
