"""Show a run in TensorBoard or wandb: `train.py CONFIG.py --track tensorboard`, or later `nanostack track RUN...`.

metrics.jsonl is the record of a run and a tracker its picture, drawn anew whenever training starts: what the file has comes
first, then every record as it is written. A resumed run, whose file is cut back to its checkpoint, therefore shows
no point twice, and tracking can begin in the middle of a run or after it. The x axis is tokens. A growth changes `layers`, has
its numbers under `growth/`, and its receipt as text; so has what the model wrote (--sample.interval).

TensorBoard's file lies in the run's folder: `tensorboard --logdir out`. Its "relative" axis is seconds of training. At a growth
there are two validation losses; its fast loader keeps the second only, `growth/loss_before` has the first.

wandb heeds WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE; FLOPs and seconds are there to be chosen as x axis. The run's folder
holds its id, under which it goes on. The server is sent what it lacks and keeps what it has, which a resumed run repeats in all
but its times. Offline, every start writes the whole run: `wandb sync` the newest folder of `wandb/` only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanostack.errors import UserError, command_line
from nanostack.runs import read_run
from nanostack.track import Tracker, check


@dataclass(frozen=True)
class Command:
    """Show runs in TensorBoard or wandb, from their metrics.jsonl."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    to: Literal["tensorboard", "wandb"] = "tensorboard"
    json: bool = False
    """Print where each run is to be seen as one JSON object; everything else goes to standard error."""


def main(command: Command) -> dict:
    if not command.runs:
        raise UserError("name at least one folder of a run")
    check(command.to)
    runs = {folder: read_run(folder) for folder in command.runs}
    shown = {}
    for folder, (header, records) in runs.items():
        try:
            tracker = Tracker(command.to, folder, header, records)
            tracker.close()
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder} was not written by this version of train.py: {error}") from error
        except Exception as error:  # of the network, of the disk, of the library: it has many
            raise UserError(f"{folder} could not be shown: {type(error).__name__}: {error}") from error
        shown[str(folder)] = {"where": tracker.where, "records": len(records)}
        if not command.json:
            print(f"{folder}: {len(records)} records in {tracker.where}")
    return {"to": command.to, "runs": shown}


def run() -> None:
    command_line(Command, main, __doc__)
