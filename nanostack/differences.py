"""What a run that goes on would do otherwise than its records say: field by field; it may not change what is over."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from nanostack.config import Position, Train
from nanostack.errors import UserError
from nanostack.old_fields import current_config

PAST = ("batch_tokens", "seed", "model", "data")  # what all that was trained depends on


def check(config: Train, cursor: Position) -> None:
    """Say on standard error what `config` changes in the run that its folder holds, which has come to `cursor`.

    UserError for what would change the past, unless config.resume_anyway. Without a header, only that is told.
    """
    path = Path(config.out) / "metrics.jsonl"
    then = header_config(path)
    if then is None:
        print(f"note: {path} does not tell with which options the run began, so none are compared", file=sys.stderr)
    changed = _differences(then, config.shaping()) if then else {}
    past = [name for name in changed if _is_past(name, *changed[name], cursor)]
    if past and not config.resume_anyway:
        raise UserError(
            f"{path.parent} was trained otherwise: {'; '.join(_told(name, *changed[name]) for name in past)}. Go on with the "
            "options of before, begin another run (--init_from), or go on nevertheless (--resume_anyway)"
        )
    for name, (old, new) in changed.items():
        print(f"note: {path.parent} goes on with another {_told(name, old, new)}", file=sys.stderr)


def header_config(path: Path) -> dict | None:
    """The config in the first record of a run; None where it cannot be read."""
    try:
        with open(path) as file:
            config = json.loads(file.readline())["config"]
        return current_config(config, str(path))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _told(name: str, old: Any, new: Any) -> str:
    return f"{name}: {json.dumps(new)} now, {json.dumps(old)} before"


def _differences(then: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted name: (old, new)} of all that differs. Fields that only one knows are of another version, and left out."""
    if isinstance(then, list) and isinstance(now, list) and any(isinstance(one, dict) for one in then + now):
        found: dict[str, tuple[Any, Any]] = {}
        for number, (old, new) in enumerate(itertools.zip_longest(then, now)):
            found |= _differences(old, new, f"{name}.{number}")
        return found
    if isinstance(then, dict) and isinstance(now, dict):
        found = {}
        for key in then.keys() & now.keys():
            found |= _differences(then[key], now[key], f"{name}.{key}".removeprefix("."))
        return dict(sorted(found.items()))
    return {} if then == now else {name: (then, now)}


def _is_past(name: str, old: Any, new: Any, cursor: Position) -> bool:
    """Whether what was done already depends on this field."""
    part, *rest = name.split(".")
    if part != "stages":
        return part in PAST and name != "data.val_tokens"
    number = int(rest[0])
    if number < cursor.stage:
        return True
    if number > cursor.stage:
        return False
    shorter = rest[1:] == ["tokens"] and new < cursor.stage_tokens
    return shorter or rest[1:2] == ["growth"]  # of a stage that has begun with it
