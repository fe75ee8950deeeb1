"""docs/study.md, made from the result files of all studies: `python bench/speedup.py --report`."""

import json
import math
import runpy
from dataclasses import replace
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
from matplotlib.ticker import NullFormatter
from rich.console import Console

from nanostack.config import describe_tokens
from nanostack.errors import UserError
from nanostack.flops import flops_per_token, n_params
from nanostack.growth.budget import growth_tokens
from nanostack.model import LlamaConfig
from study import ROOT
from study.draw import draw_curves, draw_frontier
from study.results import at_best_pace, by_budget, markdown, pays, percent, plus_minus, read_results, rows, summarise

OURS = ROOT / "bench/results"
ANSWER = ROOT / "study/answer.md"  # what a person in a hurry should know, written when the results were in
EARLIER = ("operators", "timing", "factor", "optimizer", "scale")  # at 7 tokens per parameter, where nothing is decided
ORDER = ("quickstart", "batch", "overtraining", "timing_20", "scale_20", "prose", "muon", "muon_growth", *EARLIER)
TITLE = "# How many FLOPs does stacking really save?\n"
HEAD = """
## How it was measured

This page is written by `python bench/speedup.py --report` from the result files in bench/results/ and the conclusions in
study/; every learning rate that was tried stands in [study-sweeps.md](study-sweeps.md).

Every point is a run whose learning rate has decayed to zero. An arm has one trunk at a constant rate and a branch per
budget (warm-up, stable, decay). The learning rate of every arm is tuned at every budget by the same sweep, that of a grown
arm after its growth; before that it is its base's best at the smallest budget. The sweep: a grid with the first seed,
widened where its best is at an edge, then its two best with all seeds, so a rate that the first seed puts third is not
tried with the others. Rates are chosen by the seeds and validation tokens that are then reported, for all arms alike. The
arms of a seed share the order of the text, the base model and the validation tokens.

FLOPs are those of the base and of all growth, 6·N per token as the paper counts; the column beside it counts matrix products
and causal attention exactly. **Speedup** is FLOPs(scratch) / FLOPs(arm) − 1 at the loss that the model from scratch has at the
largest budget, mean and 95 % interval (Student's t) over paired seeds; ≥ means that the arm's first point is below already.
Where a table has a line for every budget, it is at the loss that the model from scratch has there. Between two decayed points a
curve is a straight line of loss over log FLOPs, which lies above the true one and tells a speedup too low rather than too high.
**Minus base** is the loss of an arm at the largest budget minus that of the best base there, the best smaller model that never
grew. The last row is what decides: the best grown arm against the base that is hardest on it. Growth **pays** where it is below
every base by more than the interval, and does not where it is above one. Against the target itself growth is judged by the
speedup. The best of several grown arms is chosen by the seeds that it is judged by, which flatters growth a little.

**Seconds** are tokens at the pace at which each model trains with nothing beside (`--pace`), or, in studies where that was not
measured, at the pace of the fastest tenth of the runs with as many FLOPs per token: studies run beside other work, over hours.

Texts, with 512 tokens (`nanostack prepare SOURCE --out data/... --tokenizer bpe:512`): `packages:constraints.txt`, the Python
source of the packages that this repository pins, the same bytes wherever they are installed on Linux; `site-packages` for the
studies of Muon, the environment of bench/results/site-packages512.txt; `stdlib` for the earlier studies.
"""
SWEEPS = """# Every learning rate that was tried

Written by `python bench/speedup.py --report`, as [study.md](study.md) is, which says how rates are chosen.
"""
BEFORE = """
# Earlier studies, at 7 tokens per parameter

The target is far from the 20 tokens per parameter at which models are trained today, and in most of these nothing is decided
against smaller models that never grow. They compare ways to grow with each other.
"""


def write_report(results: Path, docs: Path, console: Console) -> dict:
    """Write the page and its pictures. Returns the summaries by result file."""
    files = sorted(results.glob("study-*.json"), key=place)
    found = {path.stem.removeprefix("study-"): read_results(path) for path in files}
    finished = {name: at_best_pace(one) for name, one in found.items() if "arms" in one}
    if not finished:
        raise UserError(f"{results} has no finished study: run one, python bench/speedup.py study/studies/NAME.py")
    docs.mkdir(parents=True, exist_ok=True)
    ours = results.resolve() == OURS
    text, summaries = TITLE, {name: summarise(one) for name, one in finished.items()}
    text += (f"\n{ANSWER.read_text()}" if ours else "") + HEAD
    sweeps_text = SWEEPS
    for name, summary in summaries.items():
        draw_curves(finished[name], summary, docs / f"study-{name}.png")
        text += BEFORE if summary["study"] in EARLIER and BEFORE not in text else ""
        text += section(name, summary, finished[name], docs)
        sweeps_text += f"\n## {name}\n\n{sweeps(finished[name], summary)}\n"
        of_study = {n: s for n, s in summaries.items() if s["study"] == summary["study"]}
        of_size = {n: s for n, s in of_study.items() if s["size"] == summary["size"]}
        text += scaling(of_size) if name == list(of_size)[-1] else ""
        text += meaning(summary["study"]) if name == list(of_study)[-1] and ours else ""
    text += anchor(results / "anchor.json") if ours else ""
    waiting = sorted(set(found) - set(finished))
    if waiting:
        text += f"\nNot finished yet, and not reported: {', '.join(waiting)}.\n"
    (docs / "study.md").write_text(text)
    (docs / "study-sweeps.md").write_text(sweeps_text)
    console.print(f"wrote {docs / 'study.md'}", soft_wrap=True)
    return summaries


def anchor(path: Path) -> str:
    """What study/anchor.py has measured."""
    found = json.loads(path.read_text())
    lines = [[found["published"]["label"], f"{found['published']['val_loss']}", "", "", ""]]
    for label, runs in found["arms"].items():
        losses = ", ".join(f"{run['val_loss']:.3f}" for run in runs)
        lines.append([label, losses, f"{runs[0]['tokens']:,}", f"{runs[0]['flops']:.3g}", f"{runs[0]['seconds']:.0f}"])
    return f"""
# An anchor from outside

nanoGPT's README trains 4 layers × 128 on the characters of Shakespeare, on a CPU: context 64, batch 12,
{found["steps"]:,} steps. Here are a Llama of ours of that size on the same split and as many tokens, and one that grew, at the
same FLOPs (`python -m study.anchor tinyshakespeare.txt`, {found["device"]}, fp32):

{markdown(["", "validation loss, nats per character", "tokens", "FLOPs", "seconds"], lines)}
"""


def place(path: Path) -> tuple:
    """Where a study stands on the page."""
    name = path.stem.split("-")[1]
    return (ORDER.index(name) if name in ORDER else len(ORDER), path.stem)


def section(name: str, summary: dict, results: dict, docs: Path) -> str:
    """One study: what was asked, table, picture, verdict, what it was run with."""
    model, runs = results["model"], results["runs"]
    ends = [run["evaluations"][-1] for run in runs.values()]
    epochs, hours = max(end["epoch"] for end in ends), results["seconds"] / 3600
    shape = f"{model['n_layer']} layers × {model['d_model']}, {n_params(LlamaConfig(**model)) / 1e6:.2f}M parameters"
    devices = ", ".join(sorted({f"{run['device']}, {run['dtype']}" for run in runs.values()}))
    commits = ", ".join(sorted({(run["git_commit"] or "unknown")[:7] for run in runs.values()}))
    return f"""
## {summary["study"]} ({name.partition("-")[2]}): {summary["question"]}

{markdown(*rows(summary))}

![decayed loss over FLOPs and over seconds](study-{name}.png)

{pays(summary)}
{more_budgets(results, summary)}{frontier(name, summary, results, docs)}{timing(name, summary, results, docs)}
Target: {shape}, vocabulary {model["vocab_size"]}, context {model["seq_len"]}; {results["batch_tokens"]} tokens a step;
{len(summary["seeds"])} seeds; up to {epochs:.1f} epochs of the text; {len(runs)} runs, some of them shared with other studies,
{hours:.1f} hours of training as they ran;
{devices}; torch {summary["versions"]["torch"]}; commits {commits}; {results["processes"]} runs side by side.
"""


def more_budgets(results: dict, summary: dict) -> str:
    """For arms that grow for a budget each: the table by budget."""
    if not any("budgets" in arm for arm in results["arms"].values()):
        return ""
    return f"\n{markdown(*by_budget(results, summary))}\n"


def frontier(name: str, summary: dict, results: dict, docs: Path) -> str:
    """For four sizes that never grow or more: where grown models lie against them."""
    flat = [arm for arm in results["arms"].values() if not arm["grows"] and "batch_tokens" not in arm]
    if len(flat) < 4 or summary["study"].startswith("timing") or not any("budgets" in a for a in results["arms"].values()):
        return ""
    draw_frontier(results, summary, docs / f"study-{name}-frontier.png")
    return f"\n![grown models against all that never grew](study-{name}-frontier.png)\n"


def sweeps(results: dict, summary: dict) -> str:
    """Every learning rate that was tried."""

    def shown(loss: float | None) -> str:
        return "diverged" if loss is None else f"{loss:.3f}"

    lines = []
    for name, arm in results["arms"].items():
        taken = {f"{budget:g}": lr for budget, lr in zip(summary["budgets"], summary["arms"][name]["lrs"], strict=True)}
        for budget, tried in arm["sweep"].items():
            said = [f"{lr}: {' '.join(map(shown, losses))}" for lr, losses in tried.items()]
            lines.append([arm["label"], f"{float(budget):.3g}", "; ".join(said), f"{taken[budget]:g}"])
    return markdown(["arm", "budget, FLOPs", "loss by rate, seed by seed", "taken"], lines)


def timing(name: str, summary: dict, results: dict, docs: Path) -> str:
    """For a study of when to grow: the best share of each budget for each base, by a parabola over its logarithm through the
    best arm and its two neighbours: over all arms the losses are no parabola, too early costs much and too late little."""
    grown = {arm: one for arm, one in results["arms"].items() if one["grows"]}
    bases = sorted({one["n_layer"] for one in grown.values()}, reverse=True)
    if not summary["study"].startswith("timing"):
        return ""
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=140, layout="constrained")
    largest, target = summary["budgets"][-1], LlamaConfig(**results["model"])
    lines = []
    for n_layer, (i, budget) in product(bases, enumerate(summary["budgets"])):
        shares = {arm: one["at"][0] for arm, one in grown.items() if one["n_layer"] == n_layer}
        base_flops = flops_per_token(replace(target, n_layer=n_layer))
        losses = {share: summary["arms"][arm]["losses"][i] for arm, share in shares.items()}
        losses = {share * largest / budget: loss["mean"] for share, loss in losses.items() if loss}
        if len(losses) < 4:
            continue
        base = f"{n_layer} layers" if n_layer > 1 else "1 layer"
        mark = "osD^v"[len(lines) % 5]
        near = neighbours(losses)
        optimum, bend = parabola(near)
        (line,) = axes.plot(losses.keys(), losses.values(), mark, label=f"{base}, {budget:.3g} FLOPs")
        over = numpy.geomspace(min(near), max(near), 50)
        axes.plot(over, numpy.polyval(bend, numpy.log(over)), color=line.get_color(), lw=1)
        tokens = describe_tokens(optimum * budget / base_flops) if optimum else "-"
        formula = describe_tokens(growth_tokens(n_params(target), budget / flops_per_token(target)))
        said = f"{optimum:.0%}" if optimum else "at the edge"
        lines.append([base, f"{budget:.3g}", f"{min(losses, key=losses.get):.0%}", said, tokens, formula])
    axes.set(xscale="log", xlabel="share of the budget's FLOPs before growth", ylabel="decayed validation loss, nats")
    axes.set_xticks((0.02, 0.05, 0.1, 0.2, 0.5), ("2 %", "5 %", "10 %", "20 %", "50 %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Curves of equal FLOPs: when to grow", fontsize=11)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    picture = f"study-{name}-isoflop.png"
    figure.savefig(docs / picture)
    plt.close(figure)
    head = [
        "base",
        "budget, FLOPs",
        "best arm grows at",
        "optimum of the parabola",
        "in tokens of the base",
        "the paper's formula",
    ]
    return f"""
{markdown(head, lines)}

![loss over the share of FLOPs before growth]({picture})

A base and budget at which fewer than four arms have a point is left out. The formula was fitted at 8e19 FLOPs and more, far
outside of what was run here; `nanostack plan` caps it at a share of the budget for that reason.
"""


def neighbours(losses: dict[float, float]) -> dict[float, float]:
    """The share with the lowest loss, and those beside it: the last three where it is at an edge."""
    shares = sorted(losses)
    middle = min(max(shares.index(min(losses, key=losses.get)), 1), len(shares) - 2)
    return {share: losses[share] for share in shares[middle - 1 : middle + 2]}


def parabola(losses: dict[float, float]) -> tuple[float | None, numpy.ndarray]:
    """Where a parabola through losses over log share is lowest, None where that is outside of them; and the parabola."""
    bend = numpy.polyfit(numpy.log(list(losses)), list(losses.values()), 2)
    optimum = math.exp(-bend[1] / (2 * bend[0])) if bend[0] > 0 else math.inf
    return (optimum if min(losses) <= optimum <= max(losses) else None), bend


def scaling(summaries: dict[str, dict]) -> str:
    """Over several targets: the speedup at each size, and L = a·C^b through the largest budgets of each arm."""
    if len(summaries) < 2:
        return ""
    size = {name: n_params(LlamaConfig(**one["model"])) for name, one in summaries.items()}
    order = sorted(summaries, key=size.get)
    first = summaries[order[0]]["arms"]
    common = [arm for arm in first if all(arm in one["arms"] and one["arms"][arm]["losses"][-1] for one in summaries.values())]
    grown = [arm for arm in common if first[arm]["grows"]]
    head = ["target, parameters", "largest budget", "seeds", *(first[arm]["label"] for arm in grown), "minus base"]
    lines = []
    for name in order:
        one, arms = summaries[name], summaries[name]["arms"]
        minus = [plus_minus(difference) if (difference := arms[arm]["minus_base"][-1]) else "-" for arm in grown]
        gains = [percent(arms[arm], "flops", len(one["seeds"])) for arm in grown]
        lines.append(
            [f"{size[name] / 1e6:.2f}M", f"{one['budgets'][-1]:.3g}", str(len(one["seeds"])), *gains, ", ".join(minus)]
        )
    text = f"\n### Over the sizes\n\n{markdown(head, lines)}\n\n"
    for arm in common:
        budgets = [summaries[name]["budgets"][-1] for name in order]
        losses = [summaries[name]["arms"][arm]["losses"][-1]["mean"] for name in order]
        b, log_a = numpy.polyfit(numpy.log(budgets), numpy.log(losses), 1)
        text += f"- {first[arm]['label']}: L = {math.exp(log_a):.3g} · C^{b:.4f}\n"
    return text


def meaning(study: str) -> str:
    """The conclusion that its study file draws from our results, if it is one of ours."""
    path = ROOT / f"study/studies/{study}.py"
    means = runpy.run_path(str(path))["study"].means if path.is_file() else ""
    return f"\n**What it means.**\n{means.strip()}\n" if means else ""
