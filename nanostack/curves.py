"""The curves of runs as PNG and SVG, drawn by matplotlib.

Three panels share an x axis: validation loss (and the training loss, thin), learning rate, throughput. A dotted line and a
triangle mark a growth. Runs differ in line and marker as well as in colour, and can be told apart in black and white.
"""

import itertools
import math
from pathlib import Path

from nanostack.growth import Receipt

AXES = {  # of a record: its key, and what it says on the axis
    "flops": ("flops", "FLOPs (6·N per token), base included"),
    "tokens": ("tokens", "tokens, those of the base included"),
    "time": ("seconds", "seconds of training"),
}
COLOURS = ("#000000", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d5a97")
LINES, MARKS = ("-", "--", "-.", ":"), "osD^vP"


def points(records: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """What was recorded of `y`, over `x`."""
    found = [(record[AXES[x][0]], record[y]) for record in records if record.get(y) is not None]
    return [a for a, _ in found], [b for _, b in found]


def draw(runs: dict[str, list[dict]], x: str, out: Path) -> None:
    """Three panels of all runs, by name, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, rate, speed) = plt.subplots(
        3, 1, figsize=(9, 8.5), dpi=140, sharex=True, layout="constrained", gridspec_kw={"height_ratios": (3, 1, 1)}
    )
    styles = zip(itertools.cycle(COLOURS), itertools.cycle(LINES), itertools.cycle(MARKS), strict=False)
    lows = []
    for (label, records), (colour, line, mark) in zip(runs.items(), styles, strict=False):
        loss.plot(*points(records, x, "loss"), line, color=colour, lw=0.7, alpha=0.5)
        at, losses = points(records, x, "val_loss")
        every = max(1, len(at) // 12)
        loss.plot(at, losses, line, color=colour, lw=1.8, marker=mark, ms=5, markevery=every, label=label)
        lows += losses or points(records, x, "loss")[1]
        rate.plot(*points(records, x, "lr"), line, color=colour, lw=1.4)
        speed.plot(*points(records, x, "tokens_per_s"), line, color=colour, lw=1.4)
        for record in records:
            if "growth" in record:
                grown = record["growth"]
                for panel in (loss, rate, speed):
                    panel.axvline(record[AXES[x][0]], color=colour, lw=0.8, ls=":")
                if record.get("val_loss") is not None:
                    said = Receipt.of(grown).outcome()
                    loss.plot([record[AXES[x][0]]], [record["val_loss"]], "^", color=colour, ms=8)
                    loss.annotate(
                        said, (record[AXES[x][0]], record["val_loss"]), (6, 8), textcoords="offset points", fontsize=8
                    )
    if lows:
        low, high = min(lows), sorted(lows)[math.floor(0.95 * (len(lows) - 1))]
        loss.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.25 * (high - low) + 0.1)
    loss.set(ylabel="loss, nats per token: validation, training thin")
    rate.set(ylabel="learning rate")
    speed.set(ylabel="tokens/s", xlabel=AXES[x][1])
    speed.set_ylim(bottom=0)
    loss.legend(frameon=False)
    for panel in (loss, rate, speed):
        panel.grid(alpha=0.25)
    for suffix in (".png", ".svg"):
        figure.savefig(out.with_suffix(suffix))
    plt.close(figure)
