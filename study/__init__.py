"""Does growing pay: studies of many small runs, planned, run, summarised and drawn."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
