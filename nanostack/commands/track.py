"""Track."""

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
    command_line(Command, main)
