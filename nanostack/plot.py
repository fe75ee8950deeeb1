"""Draw runs: `python -m nanostack.plot RUN... [--x flops|tokens|time]`.

Validation loss (and the training loss, thin), learning rate and throughput of each run, growth marked by a dotted line and a
triangle. PNG and SVG. Runs differ in line and marker as well as in colour, so that it reads in black and white.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanostack.errors import UserError, command_line
from nanostack.growth import outcome
from nanostack.metrics import read_run

AXES = {  # of a record: its key, and what it says on the axis
    "flops": ("flops", "FLOPs (6·N per token), base included"),
    "tokens": ("tokens", "tokens, those of the base included"),
    "time": ("seconds", "seconds of training"),
}
COLOURS = ("#000000", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d5a97")
LINES, MARKS = ("-", "--", "-.", ":"), "osD^vP"


@dataclass(frozen=True)
class Command:
    """Draw the curves of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or their metrics.jsonl."""
    x: Literal["flops", "tokens", "time"] = "flops"
    out: Path | None = None
    """The PNG; the SVG stands beside it. Default: curves.png in the first run's folder."""
    json: bool = False
    """Print what was written as one JSON object; everything else goes to standard error."""


def main(command: Command) -> dict:
    if not command.runs:
        raise UserError("name at least one folder of a run")
    runs = {}
    for path in command.runs:
        folder = path.parent if path.name == "metrics.jsonl" else path
        runs[folder] = read_run(folder)[1]
        if any(not isinstance(record, dict) or AXES[command.x][0] not in record for record in runs[folder]):
            raise UserError(f"{folder} was not written by this version of train.py: its records lack {AXES[command.x][0]}")
        if not runs[folder]:
            raise UserError(f"{folder} has no record yet: nothing to draw")
    out = command.out or next(iter(runs)) / "curves.png"
    if not out.name:
        raise UserError(f"--out names a picture, not {str(out)!r}")
    out = out.with_suffix(".png") if out.suffix in (".png", ".svg") else out.with_name(out.name + ".png")
    try:
        draw({name(folder, list(runs)): records for folder, records in runs.items()}, command.x, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    if not command.json:
        print(f"wrote {out} and {out.with_suffix('.svg')}")
    return {"png": str(out), "svg": str(out.with_suffix(".svg"))}


def name(folder: Path, all_: list[Path]) -> str:
    """The folder's own name, or its whole path where others have the same."""
    return folder.name if sum(other.name == folder.name for other in all_) == 1 else str(folder)


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
                    said = outcome(grown)
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


if __name__ == "__main__":
    command_line(Command, main)
