"""A JSON file that several processes fill one after the other: `FILE#KEY` names one value in the object that it holds.

Nothing but the standard library: bench/gpu.py uses it before it knows what is installed.
"""

import json
from pathlib import Path

from nanostack import files


def split(place: Path) -> tuple[Path, str | None]:
    """`results/fast.json#step` → the file, and the key in it, if one is named."""
    file, _, key = str(place).partition("#")
    return Path(file), key or None


class Damaged(ValueError):
    """A file holds something else. The message is one line that says what to do."""


def read(file: Path) -> dict:
    """What the file holds; nothing where there is none. Raises Damaged."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:  # no JSON, or no text
        raise Damaged(f"{file} is damaged ({error}): move it away") from error
    if not isinstance(found, dict):
        raise Damaged(f"{file} holds no JSON object: move it away")
    return found


def write(place: Path, value: dict) -> None:
    """Put `value` where `place` says. Whoever is killed leaves the file as it was before, or as it is after."""
    file, key = split(place)
    whole = value if key is None else read(file) | {key: value}
    with files.replacing(file) as new:
        new.write(json.dumps(whole, indent=1) + "\n")
