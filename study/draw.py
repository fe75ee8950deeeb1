"""The picture of a study, or of finished runs: loss over FLOPs and over seconds."""

import itertools
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
