"""Reads the records of a run."""

import json
from pathlib import Path

from nanostack.errors import UserError
from nanostack.old_fields import current_config


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """Header and records of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (no metrics.jsonl)")
    try:
        header, *records = map(json.loads, path.read_text().splitlines())
    except ValueError as error:
        raise UserError(f"{path} is not whole: the run died while it was written, or is under way; resume it first") from error
    if isinstance(header, dict) and isinstance(header.get("config"), dict):
        header["config"] = current_config(header["config"], str(path))
    return header, records
