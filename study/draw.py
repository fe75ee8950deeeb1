"""The picture of a study, or of finished runs: loss over FLOPs and over seconds."""

import itertools
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nanostack.flops import flops_per_token
from nanostack.model import LlamaConfig
from study.results import ends_of, grown_after, path_of


def draw_curves(results: dict, summary: dict, path: Path) -> None:
    """Loss over FLOPs and over seconds: decayed points, the mean of the seeds on a line, every seed a dot; growth dotted.

    An arm that has a single point shows its undecayed curve on the way there.
    """
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), dpi=140, sharey=True, layout="constrained")
    colours, marks = [*plt.cm.tab10.colors[:7], *plt.cm.tab10.colors[8:]], "osD^vP*X<>ph"  # the grey is that of the bases
    flat = itertools.cycle(("#888888", "#aa9977", "#7799aa"))
    for number, (name, arm) in enumerate(results["arms"].items()):
        colour = "#222222" if name == "scratch" else colours[number % len(colours)] if arm["grows"] else next(flat)
        style = {"color": colour, "marker": marks[number % len(marks)], "ms": 5}
        seeds = [ends_of(results, name, seed) for seed in arm["seeds"]]
        common = [b for b in seeds[0] if all(b in ends for ends in seeds)]
        ways = {b: [path_of(results, ends[b][0]) for ends in seeds] for b in common}
        for panel, axis in zip(panels, ("flops", "seconds"), strict=True):
            points = [[(way[-1][axis], way[-1]["val_loss"]) for way in ways[b]] for b in common]
            means = [[statistics.mean(values) for values in zip(*one, strict=True)] for one in points]
            panel.plot(*zip(*means, strict=True), **style, lw=1.4, label=arm["label"])
            panel.plot(*zip(*itertools.chain(*points), strict=True), **style, ls="", alpha=0.25)
            if len(common) == 1:
                for way in ways[common[0]]:
                    panel.plot([e[axis] for e in way], [e["val_loss"] for e in way], color=colour, lw=0.8, alpha=0.6)
            if arm["grows"]:
                place = grown_after(results, seeds[0][common[0]][0])
                panel.axvline(next(e[axis] for e in ways[common[0]][0] if e["tokens"] >= place), color=colour, lw=0.8, ls=":")
    panels[0].set(
        xscale="log", xlabel="FLOPs (6·N per token), base included; growth dotted", ylabel="validation loss, nats per token"
    )
    pace = "at the pace of each depth's fastest tenth" if results.get("best_pace") else "as they ran"
    pace = "at the pace of each model with nothing beside" if "pace" in results else pace
    panels[1].set(xscale="log", xlabel=f"seconds of training, base included; {pace}")
    top = max(loss["mean"] for arm in summary["arms"].values() for loss in arm["losses"] if loss)
    low = min(loss["mean"] for arm in summary["arms"].values() for loss in arm["losses"] if loss)
    panels[0].set_ylim(low - 0.08 * (top - low), top + 0.08 * (top - low))
    panels[1].legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.25, which="both")
    figure.suptitle(f"{summary['question']} Every point is the end of a decayed run.", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def draw_frontier(results: dict, summary: dict, path: Path) -> None:
    """Where grown models lie against models of every size that never grew, decayed losses, the mean of the seeds: at equal
    FLOPs of training with the lower envelope of these, and at an equal cost of inference for each budget."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), dpi=140, sharey=True, layout="constrained")
    arms, budgets = summary["arms"], summary["budgets"]
    shared = [i for i, loss in enumerate(arms["scratch"]["losses"]) if loss]
    models = {
        name: LlamaConfig(**results["model"] | arm.get("model", {"n_layer": arm["n_layer"]}))
        for name, arm in results["arms"].items()
        if not arm["grows"] and "batch_tokens" not in arm
    }
    flat = sorted(models, key=lambda name: models[name].depth)
    greys = plt.cm.Greys([0.35 + 0.6 * i / max(1, len(flat) - 1) for i in range(len(flat))])
    for name, colour in zip(flat, greys, strict=True):
        points = [(budgets[i], loss["mean"]) for i, loss in enumerate(arms[name]["losses"]) if loss]
        left.plot(*zip(*points, strict=True), "o-", color=colour, lw=1, ms=4, label=arms[name]["label"])
    lowest = [min(loss["mean"] for name in flat if (loss := arms[name]["losses"][i])) for i in shared]
    left.plot([budgets[i] for i in shared], lowest, color="black", lw=3, alpha=0.25, label="the best that never grew")
    colours = itertools.cycle(plt.cm.tab10.colors)
    of_budget = {i: next(colours) for i in shared}
    for i, colour in of_budget.items():
        costs = [(flops_per_token(models[name]) / 3, loss["mean"]) for name in flat if (loss := arms[name]["losses"][i])]
        right.plot(*zip(*costs, strict=True), "o-", color=colour, lw=1, ms=4, label=f"never grown, {budgets[i]:.3g} FLOPs")
    marks = itertools.cycle("*PXD^v")
    for arm in arms.values():
        found = [(budgets[i], loss["mean"]) for i, loss in enumerate(arm["losses"]) if loss] if arm["grows"] else []
        if not found:
            continue
        mark = next(marks)
        left.plot(*zip(*found, strict=True), mark, color="#d1495b", ms=9, ls=":", lw=0.8, label=arm["label"])
        for i, colour in of_budget.items():
            if arm["losses"][i]:
                cost = flops_per_token(models["scratch"]) / 3
                right.plot(cost, arm["losses"][i]["mean"], mark, color=colour, ms=12, mec="black", mew=0.6)
    left.set(xscale="log", xlabel="FLOPs of training (6·N per token), base included", ylabel="validation loss, nats per token")
    right.set(xscale="log", xlabel="FLOPs of inference (2·N per token); dark edges: grown, at the target's size")
    for panel in (left, right):
        panel.grid(alpha=0.25, which="both")
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle("Grown models against all sizes that never grew. Every point is the end of a decayed run.", fontsize=11)
    figure.savefig(path)
    plt.close(figure)
