"""How a benchmark's result is kept, a JSON file in bench/results/ that says with what and when it was made; and shown."""

import contextlib
import json
import os
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nanostack.metrics import git_commit, versions

RESULTS = Path(__file__).parent / "results"


def write_result(result: dict, stem: str, out: Path | None, packages: tuple[str, ...] = ()) -> Path:
    """Add versions (those of `packages` too, where installed), commit and date to `result`; write it to `out`, or to
    bench/results/ by the name of its device. A benchmark of minutes calls it after every part: what is measured is kept.
    """
    found = versions()
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    result |= {"versions": found, "git_commit": git_commit(), "date": date.today().isoformat()}
    device = "-".join(result["device"].split(",")[0].lower().replace("(r)", "").split())
    out = out or RESULTS / f"{stem}-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, out)
    return out


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table whose first column says what a row is of; the others hold numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
