"""How many FLOPs does growth save? `python bench/speedup.py` is another spelling of `python -m study`.

python -m study study/studies/operators.py                       run a study (study/plan.py), or go on with it
python -m study study/studies/operators.py --pace                measure how fast its models train, with nothing beside
python -m study out/1b_scratch out/1b_grown ...                  compare finished runs
python -m study --report                                         write docs/study.md anew from the results
"""

import json
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from nanostack.errors import UserError, command_line
from study import ROOT, runner
from study.draw import draw_curves
from study.pace import measure
from study.plan import CPU_PACE, GPU_PACE, Study, planned_cost
from study.report import write_report
from study.results import at_best_pace, pays, summarise, table
from study.runs import collect


@dataclass(frozen=True)
class Command:
    """How many FLOPs did growth save?"""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A study file, or folders of finished runs."""
    data: Path | None = None
    """Prepared text of a study; the folder that its size asks for (data/packages512, data/stdlib512, ...), unless given."""
    size: str | None = None
    """The size of a study: cpu, gpu, ...; what this machine is, unless given."""
    jobs: int | None = None
    """Runs at a time; on a CPU as many as it has cores, on a GPU 4."""
    seeds: tuple[int, ...] = ()
    """Seeds of a study instead of its own, beside those that have run already."""
    out: Path = Path("out/study")
    """Folder of a study's runs."""
    results: Path = Path("bench/results")
    """Folder of result files and pictures."""
    cost: bool = False
    """Tell what a study would cost at each of its sizes, and run nothing."""
    pace: bool = False
    """Measure how fast each model of a study trains with nothing beside, into its results."""
    report: bool = False
    """Write study.md in `docs` anew from all studies in `results`."""
    docs: Path = ROOT / "docs"
    json: bool = False
    """Print the summary as one JSON object; everything else goes to standard error."""


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 170)
    if command.report:
        return write_report(command.results, command.docs, console)
    if not command.paths:
        raise UserError("give a study file (study/studies/*.py), folders of finished runs, or --report")
    if command.paths[0].suffix == ".py":
        return run_study(command, console)
    results = collect(command.paths)
    stem = Path(os.path.commonpath([folder.resolve() for folder in command.paths])) / "compared"
    summary = show(results, stem, console)
    stem.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def show(results: dict, stem: Path, console: Console) -> dict:
    """Table and verdict on the console, the picture beside `stem`. Returns the summary."""
    summary = summarise(results)
    console.print(table(summary))
    console.print(pays(summary))
    draw_curves(results, summary, stem.with_name(stem.name + ".png"))
    console.print(f"wrote {stem}.png", soft_wrap=True)
    return summary


def study_of(path: Path) -> Study:
    """The study that a file defines."""
    if not path.is_file():
        raise UserError(f"there is no study file {path}")
    try:
        study = runpy.run_path(str(path)).get("study")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} is not a valid study: {type(error).__name__}: {error}") from error
    if not isinstance(study, Study):
        raise UserError(f"{path} has no variable `study` of type study.plan.Study")
    return study


def tell_cost(study: Study, console: Console) -> dict:
    """What a study takes if no grid of rates has to be widened: runs, FLOPs, and hours at a pace that is an estimate."""
    found = {}
    for name, targets in study.sizes.items():
        runs, flops = zip(*(planned_cost(study, size) for size in targets), strict=True)
        pace = GPU_PACE if targets[0].dtype == "bfloat16" else CPU_PACE
        found[name] = {"runs": sum(runs), "flops": sum(flops), "hours": sum(flops) / pace / 3600}
        told = f"{name}: {sum(runs)} runs, {sum(flops):.2g} FLOPs; about {found[name]['hours']:.1f} hours at {pace:.1g} FLOP/s"
        console.print(f"{told}, an estimate", soft_wrap=True)
    return found


def run_study(command: Command, console: Console) -> dict:
    path, *others = command.paths
    if others:
        raise UserError(f"one study at a time: {path}")
    study = study_of(path)
    if command.cost:
        return tell_cost(study, console)
    cuda = torch.cuda.is_available()
    size = command.size or ("gpu" if cuda else "cpu")
    jobs = (4 if cuda else os.cpu_count()) if command.jobs is None else command.jobs  # small models leave most of a GPU idle
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, not {jobs}")
    data = command.data and command.data.resolve()
    task = measure if command.pace else None
    files = runner.run(study, size, data, command.out.resolve() / size, command.results, jobs, console, command.seeds, task)
    if command.pace:
        return {file.stem: json.loads(file.read_text())["pace"] for file in files}
    summaries = {}
    for file in files:
        console.print(f"results are in {file}", soft_wrap=True)
        summaries[file.stem] = show(at_best_pace(json.loads(file.read_text())), file.with_suffix(""), console)
    return summaries[files[0].stem] if len(files) == 1 else summaries


if __name__ == "__main__":
    command_line(Command, main)
