"""How a benchmark's result is kept, a JSON file in bench/results/ that says with what and when it was made; and shown."""

import contextlib
import functools
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

from bench import sections
from nanostack.errors import UserError
from nanostack.provenance import git_commit, versions

RESULTS = Path(__file__).parent / "results"


def place(stem: str, device: str, out: Path | None) -> Path:
    """Where a result goes: `out` (of bench/sections.py: FILE, or FILE#KEY), or bench/results/ by the name of the device.
    UserError, before anything is measured, for a place where no JSON file can be."""
    commit()
    name = "-".join(device.split(",")[0].lower().replace("(r)", "").split())
    out = out or RESULTS / f"{stem}-{name}.json"
    file, _ = sections.split(out)
    if file.suffix != ".json" or file.is_dir():
        raise UserError(f"--out is the name of a .json file, not {out}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"--out: nothing can be written in {file.parent}: {error.strerror}") from error
    if sections.split(out)[1]:  # what else the file holds is kept
        try:
            sections.read(file)
        except sections.Damaged as error:
            raise UserError(f"--out: {error}") from error
    return out


def picture(out: Path) -> Path | None:
    """Where the picture of a result goes; a part of a file has none."""
    file, key = sections.split(out)
    return None if key else file.with_suffix(".png")


@functools.cache
def warn_of_changes() -> None:
    """Say once where a result names a commit that is not what was measured."""
    if (commit() or "").endswith("-dirty"):
        print("note: files differ from the commit that the result names: measure in a clean clone to keep it", file=sys.stderr)


@functools.cache
def commit() -> str | None:
    """The commit before the first result is written, which makes the tree differ from it."""
    return git_commit()


def write_result(result: dict, out: Path, packages: tuple[str, ...] = ()) -> None:
    """Add versions (those of `packages` too, where installed), commit and date to `result` and write it to `out`. A benchmark
    of minutes calls it after every part: what is measured is kept. A part of a file is written as it is: whoever began that
    file has said these of the whole."""
    if sections.split(out)[1]:
        sections.write(out, result)
        return
    found = versions()
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    result |= {"versions": found, "git_commit": commit(), "date": date.today().isoformat()}
    sections.write(out, result)
    warn_of_changes()
