"""When to grow, how much, and what it saves: `nanostack plan --params 7e9 --tokens 300e9 --gpu h200 --count 8`.

Or what a run will take: `nanostack plan --config config/70b.py --gpu h100 --count 64 --mfu 0.4`.

The paper ("Stacking Your Transformers", arXiv 2405.15319) fits the base's tokens d to the target's parameters N and its compute
C = 6·N·D:  log10 d = 0.88·log10 N + 163.27 / log10 C − 5.74,  on 410M to 3B parameters and C = 8e19 to 1.2e21 FLOPs, and fixes
the factor at g = 4. Small budgets break it (124M and 2.5B tokens give 20.8B), so d is never more than a fifth of the tokens.
What growth saves is the paper's speedup, an assumption about your run and no promise.
"""

from dataclasses import dataclass, replace

from nanostack.config import OptimizerName, describe_tokens, load
from nanostack.errors import UserError, command_line
from nanostack.flops import flops_per_token, n_params
from nanostack.growth.budget import MOST_OF_TOKENS, Budget, advise, hours, rate_of

MEASURED = {  # bench/results/study-quickstart-cpu.json; of AdamW study-muon-cpu.json
    "adamw": "stacking saved +51 ± 74 % over AdamW from scratch (three seeds)",
    "muon": "stacking saved +61 ± 16 % over Muon from scratch (five seeds), and Muon from scratch "
    "+31 ± 37 % over AdamW (three)",
}


ADVICE = {  # what docs/study.md found, in a line
    "adamw": "keep old moments, zero for new layers, no warm-up; 10 to 30 % of the FLOPs were equally good times to grow",
    "muon": "keep old momentum, zero for new layers, no warm-up; half the base's rate after growth, or twice; with one seed, "
    "growing after 5 to 10 % of the FLOPs was best, and after 30 % saved nothing",
}


@dataclass(frozen=True)
class Command(Budget):
    """Advice on growing: shapes, tokens, FLOPs, hours and the config to run; or the hours of a config that there is."""

    params: float = 0.0
    """Parameters of the model you want, embeddings included."""
    tokens: float = 0.0
    """Tokens you would train it for from scratch."""
    config: str | None = None
    """A run's config file, whose stages are counted; instead of params and tokens."""
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


def of_config(command: Command) -> dict:
    """FLOPs and hours of each stage of a config file, and of its last model from scratch for the last stage's tokens."""
    assert command.config is not None
    if command.params or command.tokens:
        raise UserError("--config has its own model and tokens: leave --params and --tokens out")
    config, rate = load(command.config, []), rate_of(command.gpu, command.count, command.mfu)
    stages = []
    for stage, shape in zip(config.stages, config.shapes(), strict=True):
        model = replace(shape, vocab_size=shape.vocab_size or command.vocab_size)
        tokens = config.steps_of((stage,)) * config.batch_tokens
        flops = {"n_params": n_params(model), "tokens": tokens, "flops": tokens * flops_per_token(model)}
        stages.append({"model": vars(model), "outline": model.outline()} | flops | {"hours": hours(tokens, model, rate)})
    return {"stages": stages, "hours": sum(stage["hours"] for stage in stages), "hours_scratch": stages[-1]["hours"]}


def tell_config(command: Command, found: dict) -> None:
    print(f"{command.config} on {command.count} × {command.gpu} at {command.mfu:.0%} MFU")
    for number, stage in enumerate(found["stages"]):
        print(
            f"stage {number}   {stage['outline']}, {stage['n_params'] / 1e9:.2f}B parameters: "
            f"{describe_tokens(stage['tokens'])} tokens, {stage['flops']:.3g} FLOPs, {stage['hours']:,.0f} h"
        )
    last = describe_tokens(found["stages"][-1]["tokens"])
    gpu_hours = found["hours"] * command.count
    print(f"together  {found['hours']:,.0f} h, which are {found['hours'] / 24:,.1f} days and {gpu_hours:,.0f} GPU hours")
    print(f"the last model alone, from scratch for {last} tokens, would take {found['hours_scratch']:,.0f} h")
    print("hours are estimates, by the FLOPs that MFU counts; evaluation, checkpoints and restarts are not in them")


def main(command: Command) -> dict:
    if command.config is not None:
        found = of_config(command)
        if not command.json:
            tell_config(command, found)
        return found
    if not (command.params and command.tokens):
        raise UserError("give --params and --tokens of the model you want, or --config of a run that there is")
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
    print(f"measured  {MEASURED[command.optim]}: 0.27M parameters, 20 tokens for each (docs/study.md)")
    print(f"advice    {ADVICE[command.optim]}")
    print("hours are estimates. A config to begin with:\n\n" + config_text(advice, command.optim))
    return advice


def run() -> None:
    command_line(Command, main, __doc__)
