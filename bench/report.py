"""docs/study.md, made from the result files of all studies: `python bench/speedup.py --report`."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
from rich.console import Console

from bench.speedup import cells, draw, pays, summarise
from nanostack.config import describe_tokens
from nanostack.errors import UserError
from nanostack.flops import flops_per_token, n_params
from nanostack.model import LlamaConfig
from nanostack.plan import growth_tokens

ORDER = ("operators", "timing", "factor", "optimizer", "scale")
HEAD = """# How many FLOPs does stacking really save?

This page is written by `python bench/speedup.py --report` from the result files in bench/results/.

Every point is a run whose learning rate has decayed to zero. An arm has one trunk at a constant rate and a branch per budget
(warm-up, stable, decay). The learning rate of every arm is tuned by the same sweep at the smallest budget; an optimum at the
edge of the sweep widens it. The arms of a seed share the order of the text, the base model and the validation tokens. FLOPs
are those of the base and of all growth, 6·N per token as the paper counts; the column beside it counts matrix products and
causal attention exactly. **Speedup** is FLOPs(scratch) / FLOPs(arm) − 1 at the loss that the model from scratch has at the
largest budget, mean and 95 % interval (Student's t) over paired seeds; ≥ means that the arm's first point is below already.
**Minus base** is the loss of an arm at the largest budget minus that of the base that never grew: below zero, growth paid.
"""


def write_report(results: Path, docs: Path, console: Console) -> dict:
    """Write the page and its pictures. Returns the summaries by study and size."""
    files = sorted(results.glob("study-*.json"), key=place)
    found = {path.stem.removeprefix("study-"): json.loads(path.read_text()) for path in files}
    finished = {name: one for name, one in found.items() if "arms" in one}
    if not finished:
        raise UserError(f"{results} has no finished study: run one, python bench/speedup.py config/study/NAME.py")
    text = HEAD
    summaries = {name: summarise(one) for name, one in finished.items()}
    for name, summary in summaries.items():
        picture = docs / f"study-{name}.png"
        draw(finished[name], summary, picture)
        text += section(summary, finished[name], picture.name)
    waiting = sorted(set(found) - set(finished))
    if waiting:
        text += f"\nNot finished yet, and not reported: {', '.join(waiting)}.\n"
    (docs / "study.md").write_text(text)
    console.print(f"wrote {docs / 'study.md'}", soft_wrap=True)
    return summaries


def place(path: Path) -> tuple:
    """Where a study stands on the page."""
    name = path.stem.split("-")[1]
    return (ORDER.index(name) if name in ORDER else len(ORDER), path.stem)


def timing(summary: dict, results: dict) -> str:
    """For arms that differ in when they grow: the best share of each budget, by a parabola over its logarithm."""
    shares = {name: arm["at"][0] for name, arm in results["arms"].items() if len(arm["at"]) == 1}
    if len(set(shares.values())) < 4:
        return ""
    text = "\n| budget, FLOPs | best arm grows at | parabola's optimum | in tokens of the base |\n|---|---:|---:|---:|\n"
    largest, base = summary["budgets"][-1], LlamaConfig(**results["model"])
    for i, budget in enumerate(summary["budgets"]):
        losses = {share * largest / budget: summary["arms"][name]["losses"][i]["mean"] for name, share in shares.items()}
        best = min(losses, key=losses.get)
        a, b, _ = numpy.polyfit(numpy.log(list(losses)), list(losses.values()), 2)
        optimum = math.exp(-b / (2 * a)) if a > 0 else None
        inside = optimum is not None and min(losses) <= optimum <= max(losses)
        n_layer = results["arms"][next(iter(shares))]["n_layer"]
        tokens = describe_tokens((optimum or 0) * budget / flops_per_token(replace(base, n_layer=n_layer)))
        said = f"{optimum:.0%}" if inside else "outside"
        text += f"| {budget:.3g} | {best:.0%} | {said} | {tokens if inside else '-'} |\n"
    target, tokens = n_params(base), largest / flops_per_token(base)
    advice = describe_tokens(growth_tokens(target, tokens))
    return text + f"\nThe paper's formula, far outside of its range here, says {advice} tokens for the largest budget.\n"


def section(summary: dict, results: dict, picture: str) -> str:
    """One study: what was asked, table, picture, verdict, what it was run with."""
    budgets = [f"loss at {budget:.3g}" for budget in summary["budgets"]]
    head = ["arm", "lr", *budgets, "speedup", "exact count", "minus base"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *(cells(arm) for arm in summary["arms"].values())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    model, runs = results["model"], results["runs"].values()
    epochs = max(run["evaluations"][-1]["epoch"] for run in runs)
    hours = sum(run["evaluations"][-1]["seconds"] for run in runs) / 3600
    shape = f"{model['n_layer']} layers × {model['d_model']}, vocabulary {model['vocab_size']}, context {model['seq_len']}"
    return f"""
## {summary["study"]} ({summary["size"]}): {summary["question"]}

{table}

![decayed loss over FLOPs and seconds]({picture})

{pays(summary)}
{timing(summary, results)}
Target: {shape}; {results["batch_tokens"]} tokens a step; {len(summary["seeds"])} seeds; up to {epochs:.1f} epochs of
the text; {len(results["runs"])} runs, {hours:.1f} hours of training in all, on {summary["device"]}, torch
{summary["versions"]["torch"]}.
"""
