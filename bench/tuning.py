"""Tune attention's rows for this GPU, and write them as a patch of kernels/configs.py that `git apply` takes.

    python bench/tuning.py [--seconds 200] [--size 64 128] [--out FILE.json#rows] [--patch tune.patch]

After every row that is tuned, the result file and the patch hold all rows so far. The search is kernels/tune.py's. d_head 64,
the 1B model's, comes first.
"""

import difflib
import json
import math
import re
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console

from bench import ROOT
from bench.results import place, write_result
from nanostack import kernels
from nanostack.errors import UserError, command_line
from nanostack.kernels import tune
from nanostack.kernels.configs import ANY, TABLE, Config
from nanostack.kernels.dispatch import Arch
from nanostack.provenance import device_name, versions

CONFIGS = "kernels/configs.py"


@dataclass(frozen=True)
class Command:
    """Measure rows and write a patch."""

    kernel: tuple[str, ...] = ("attention_forward", "attention_dq", "attention_dk_dv")
    size: tuple[int, ...] = (64, 128)
    samples: int = 20
    seconds: float = math.inf
    """Begin no row after so many."""
    patch: Path | None = None
    """The patch. Default: out/tune.patch"""
    rehearse: bool = False
    """Two candidates of a small kernel that Triton interprets: TRITON_INTERPRET=1 in the environment, and no GPU."""
    out: Path | None = None
    """The JSON file. Default: bench/results/tune-DEVICE.json"""
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def small(kernel: str, size: int, device: torch.device):
    """A call that an interpreter can make in a second."""
    gate_up = torch.linspace(-2, 2, 4 * 64, device=device).view(4, 64)
    return lambda: (torch.ops.nanostack.swiglu(gate_up),)


def few(kernel: str, arch: Arch) -> list:
    return tune.candidates(kernel, arch)[:2]


def passes(kernel: str, size: int, arch: Arch, config: Config) -> None:
    """The gate, which an interpreted kernel cannot go through."""


def finished(kernel: str, size: int, arch: Arch, config: Config, seconds: float) -> Config:
    return config


def patched(source: str, rows: list[dict], measured: str) -> str:
    """The source of kernels/configs.py with these rows in place of its own, each below a line that says what was measured, and
    on what. Rows that stay are left alone. Raises ValueError where a row is not found."""
    for row in rows:
        if row["row"] == row["row_before"]:
            continue
        kernel, size = f'\n    "{row["kernel"]}": {{', "ANY" if row["size"] == ANY else row["size"]
        begin = source.find(kernel)
        end = source.find('\n    "', begin + 1) if source.find('\n    "', begin + 1) > 0 else len(source)
        rows_of = re.compile(rf"(?<!\w){json.dumps(row['arch'])}: {{").search(source, max(begin, 0), end)
        old = rows_of and re.compile(rf"\b{size}: (attention|row)\((\([^()]*\)|[^()])*\)").search(source, rows_of.end(), end)
        if begin < 0 or not old:
            raise ValueError(f"{CONFIGS} has no row of {row['kernel']}, {row['arch']}, {size}")
        line = source.rfind("\n", 0, old.start()) + 1
        indent = re.compile(" *").match(source, line)[0]
        gain = f"{row['timed']} {1e6 * row['seconds']:.0f} µs, {row['seconds_before'] / row['seconds']:.2f} × as fast as before"
        note = f"{indent}# {measured}: {gain}\n"
        source = source[:line] + note + source[line : old.start()] + f"{size}: {row['row']}" + source[old.end() :]
    return source


def difference(source: str, new: str) -> str:
    """A unified diff that `git apply` takes; empty where nothing changed."""
    names = {"fromfile": f"a/{CONFIGS}", "tofile": f"b/{CONFIGS}"}
    return "".join(difflib.unified_diff(source.splitlines(keepends=True), new.splitlines(keepends=True), **names))


def main(command: Command) -> dict:
    cuda = torch.cuda.is_available()
    reason = kernels.unavailable_reason("cuda" if cuda or not command.rehearse else "cpu")
    if reason:
        raise UserError(f"nothing to tune here: {reason}")
    if unknown := set(command.kernel) - set(TABLE):
        raise UserError(f"there is no kernel {', '.join(sorted(unknown))}; there are {', '.join(TABLE)}")
    device = torch.device("cuda" if cuda else "cpu")
    out, console = (
        place("tune", device_name(device), command.out),
        Console(stderr=command.json, highlight=False, soft_wrap=True),
    )
    patch = command.patch or ROOT / "out/tune.patch"
    patch.parent.mkdir(parents=True, exist_ok=True)
    todo, options = [(name, size) for size in command.size for name in command.kernel], {}
    if command.rehearse:
        todo, options = [("swiglu_forward", ANY)], {"device": device, "make": small, "grid": few}
        options |= {"judge": passes, "finish": finished}
    source, rows = (ROOT / CONFIGS).read_text(), []
    measured = f"{device_name(device)}, triton {versions().get('triton')}, {date.today().isoformat()}"
    result = {"device": device_name(device), "rows": rows, "left": [list(job) for job in todo], "patch": patch.name}
    write_result(result, out)
    for found in tune.tuned(todo, command.samples, command.seconds, **options):
        rows.append(asdict(found))
        result["left"].pop(0)
        patch.write_text(difference(source, patched(source, rows, measured)))
        write_result(result, out)
        size = "ANY" if found.size == ANY else found.size
        gain = f"{found.seconds_before / found.seconds:.2f} × as fast as with the row in use ({found.timed})"
        console.print(f"{found.kernel} {size}: {found.row}, {gain}, of {found.candidates} candidates")
    console.print(f"wrote {out} and {patch}; git apply {patch} puts the rows in place; before they are committed, run")
    console.print("python -m kernels.aot and make dry-gpu")
    return result


if __name__ == "__main__":
    command_line(Command, main)
