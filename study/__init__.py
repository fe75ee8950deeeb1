"""Does growing pay: studies of many small runs, planned, run, summarised and drawn."""

import runpy
from pathlib import Path
from typing import Any

from nanostack.config import Train

ROOT = Path(__file__).resolve().parent.parent


def training_run(config: Train) -> Any:
    """A `Run` of train.py. That is a script: it is loaded from its place at the top, and nobody imports it."""
    return runpy.run_path(str(ROOT / "train.py"))["Run"](config)
