"""Draw runs: `nanostack plot RUN... [--x flops|tokens|time]`.

Validation loss (and the training loss, thin), learning rate and throughput of each run, growth marked by a dotted line and a
triangle. PNG and SVG. Runs differ in line and marker as well as in colour, so that it reads in black and white.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanostack.curves import AXES, draw
from nanostack.errors import UserError, command_line
from nanostack.runs import name_of, read_run


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
        draw({name_of(folder, list(runs)): records for folder, records in runs.items()}, command.x, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    if not command.json:
        print(f"wrote {out} and {out.with_suffix('.svg')}")
    return {"png": str(out), "svg": str(out.with_suffix(".svg"))}


def run() -> None:
    command_line(Command, main, __doc__)
