"""What growth saves: FLOPs(scratch) / FLOPs(grown, base included) − 1 at equal validation loss.

    python bench/speedup.py config/study/operators.py --data data/stdlib     run a study (bench/study.py), or what is left of it
    python bench/speedup.py out/quickstart/scratch out/quickstart/grown ...  compare finished runs
    python bench/speedup.py --report                                         write docs/study.md anew from the results

Of a study, every point of every curve is the end of a fully decayed run, seeds are paired, and the interval is Student's t at
95 %. Between two points a curve is a straight line of loss over log FLOPs. A curve that does not come down to the target, or
does not stay below it, has not reached it: then there is no number.
"""

import itertools
import json
import math
import os
import runpy
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose kernels.py would stand before the package of that name

import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from nanostack.errors import UserError, command_line  # noqa: E402

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by number of seeds


@dataclass(frozen=True)
class Command:
    """How many FLOPs did growth save?"""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A study file, or folders of finished runs."""
    data: Path = Path("data/stdlib")
    """Prepared text of a study."""
    size: str | None = None
    """Of a study: cpu, gpu, ...; what this machine is, unless given."""
    jobs: int | None = None
    """Runs at a time; on a CPU as many as it has cores."""
    out: Path = Path("out/study")
    """Folder of a study's runs."""
    results: Path = Path("bench/results")
    """Folder of result files and pictures."""
    report: bool = False
    """Write docs/study.md anew from all studies in `results`."""
    json: bool = False
    """Print the summary as one JSON object; everything else goes to standard error."""


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """Header and records of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (no metrics.jsonl)")
    try:
        header, *records = map(json.loads, path.read_text().splitlines())
    except ValueError as error:
        raise UserError(f"{path} is not whole: the run died while it was written, or is under way; resume it first") from error
    return header, records


def curve(records: list[dict]) -> list[tuple[float, float]]:
    """(FLOPs spent, validation loss in nats per token) of every evaluation, in order. A growth costs no FLOPs."""
    return [(record["flops"], record["val_loss"]) for record in records if record["val_loss"] is not None]


def flops_to_reach(points: list[tuple[float, float]], loss: float) -> float | None:
    """FLOPs at which a curve first comes down to `loss`, linear between evaluations; None if it never does."""
    if points and points[0][1] <= loss:
        return points[0][0]
    for (flops_a, loss_a), (flops_b, loss_b) in itertools.pairwise(points):
        if loss_b <= loss < loss_a:
            return flops_a + (flops_b - flops_a) * (loss_a - loss) / (loss_a - loss_b)
    return None


def speedup(scratch: list[tuple[float, float]], grown: list[tuple[float, float]]) -> float | None:
    """Speedup as a fraction at the last loss of `scratch`; None if `grown` never reaches it."""
    flops, loss = scratch[-1]
    needed = flops_to_reach(grown, loss)
    return None if needed is None else flops / needed - 1


@dataclass(frozen=True)
class Crossing:
    """Where a curve of decayed points comes down to a loss, for good."""

    flops: float
    at_most: bool = False  # the first point is below already: it was reached with fewer FLOPs


def crossing(points: list[tuple[float, float]], loss: float) -> Crossing | None:
    """Of (FLOPs, loss) in order of FLOPs, by lines over log FLOPs; None where it is not reached, or not for good."""
    below = [one <= loss for _, one in points]
    if not any(below) or not all(below[below.index(True) :]):
        return None
    first = below.index(True)
    if first == 0:
        return Crossing(points[0][0], at_most=True)
    (flops_a, loss_a), (flops_b, loss_b) = points[first - 1 : first + 1]
    share = (loss_a - loss) / (loss_a - loss_b)
    return Crossing(math.exp(math.log(flops_a) + share * (math.log(flops_b) - math.log(flops_a))))


def mean_and_interval(values: list[float]) -> dict:
    """Mean, and the half-width of its 95 % interval by Student's t; None for a single value."""
    n, mean = len(values), statistics.mean(values)
    half = T_95.get(n, 1.96) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": mean, "half_width": half, "values": values}


def ends_of(results: dict, arm: str, seed: str) -> dict[float, tuple[str, dict]]:
    """{budget: (run, its last evaluation)} of an arm and seed, in order of budget: the fully decayed points."""
    named = {results["runs"][name]["budget"]: name for name in results["arms"][arm]["seeds"].get(seed, ())}
    return {b: (named[b], results["runs"][named[b]]["evaluations"][-1]) for b in sorted(named.keys() - {None})}


def path_of(results: dict, name: str) -> list[dict]:
    """The evaluations on the way to the end of a run, those of the runs it started from included; seconds are of all of it."""
    run = results["runs"][name]
    if run["needs"] is None:
        return run["evaluations"]
    before = [e for e in path_of(results, run["needs"]) if e["tokens"] <= run["begins"]]
    seconds = before[-1]["seconds"] if before else 0.0
    return before + [e | {"seconds": e["seconds"] + seconds} for e in run["evaluations"]]


def grown_after(results: dict, name: str | None) -> int:
    """Tokens before the last growth on the way to the end of a run; 0 if there is none."""
    while name is not None:
        run = results["runs"][name]
        if run["growth"]:
            return run["growth"]["tokens"]
        name = run["needs"]
    return 0


def gain(results: dict, arm: str, seed: str, count: str) -> dict | None:
    """Speedup of an arm at the last loss of scratch, as a fraction, and whether it may be more; None if it is not reached.

    Where the arm's first decayed point is below already, its undecayed curve on the way there gives a bound.
    """
    flops, target = [(end[count], end["val_loss"]) for _, end in ends_of(results, "scratch", seed).values()][-1]
    needed = crossing([(end[count], end["val_loss"]) for _, end in ends_of(results, arm, seed).values()], target)
    if needed is None:
        return None
    if needed.at_most and arm != "scratch":
        first = next(iter(ends_of(results, arm, seed).values()))[0]
        way = [e for e in path_of(results, first) if e["tokens"] > grown_after(results, first)]
        needed = replace(needed, flops=flops_to_reach([(e[count], e["val_loss"]) for e in way], target))
    return {"gain": flops / needed.flops - 1, "at_least": needed.at_most and arm != "scratch"}


def summarise(results: dict) -> dict:
    """What a study has found: per arm losses, speedups by both counts, and the difference to the base that never grew.

    Lists go by budget, with None where an arm has no point; all other numbers are means over seeds with their interval.
    """
    arms, seeds, budgets = results["arms"], list(results["arms"]["scratch"]["seeds"]), results["budgets"]
    base = next((name for name, arm in arms.items() if not arm["grows"] and name != "scratch"), None)
    losses = {
        name: {seed: {b: end["val_loss"] for b, (_, end) in ends_of(results, name, seed).items()} for seed in seeds}
        for name in arms
    }

    def over_seeds(value: Callable[[str, float], float], *needed: str) -> list[dict | None]:
        """Of every budget that the needed arms have in all seeds."""
        there = [all(b in losses[arm][seed] for arm in needed for seed in seeds) for b in budgets]
        values = [[value(seed, b) for seed in seeds] if ok else None for b, ok in zip(budgets, there, strict=True)]
        return [None if one is None else mean_and_interval(one) for one in values]

    answer = {}
    for name, arm in arms.items():
        found = {"label": arm["label"], "lr": arm["lr"], "grows": arm["grows"]}
        found["losses"] = over_seeds(lambda seed, b, name=name: losses[name][seed][b], name)
        for count in ("flops", "flops_exact"):
            gains = [gain(results, name, seed, count) for seed in seeds]
            reached = None not in gains
            bound = reached and any(one["at_least"] for one in gains)
            found[f"speedup_{count}"] = (
                mean_and_interval([one["gain"] for one in gains]) | {"at_least": bound} if reached else None
            )
        if base is not None and name != base:
            found["minus_base"] = over_seeds(
                lambda seed, b, name=name: losses[name][seed][b] - losses[base][seed][b], name, base
            )
        answer[name] = found
    best = []  # grown arm of every budget
    for i in range(len(budgets)):
        there = [name for name, arm in answer.items() if arm["grows"] and arm["losses"][i]]
        best.append(min(there, key=lambda name, i=i: answer[name]["losses"][i]["mean"]) if there else None)
    known = {}  # budget: whether the best grown model beats the base there
    for i, arm in enumerate(best):
        if base is not None and arm is not None and (difference := answer[arm]["minus_base"][i]) is not None:
            known[budgets[i]] = difference["mean"] < 0
    pays_from = next((budget for budget in known if all(won for later, won in known.items() if later >= budget)), None)
    about = ("study", "question", "size", "budgets", "model", "device", "date", "git_commit", "versions", "manifest_sha256")
    found = {"seeds": seeds, "arms": answer, "base": base, "best": best, "pays": known, "pays_from": pays_from}
    return {key: results[key] for key in about} | found


def percent(gain: dict | None) -> str:
    if gain is None:
        return "not reached"
    spread = "" if gain["half_width"] is None else f" ± {100 * gain['half_width']:.0f}"
    return f"{'≥ ' if gain['at_least'] else ''}{100 * gain['mean']:+.0f}{spread} %"


def pays(summary: dict) -> str:
    """The sentence that a critic looks for."""
    if not summary["pays"]:
        return "No base that never grew stands beside a grown model of the same FLOPs here: whether growth pays is not known."
    grown, base = ("“" + summary["arms"][name]["label"] + "”" for name in (summary["best"][-1], summary["base"]))
    if summary["pays_from"] is None:
        return f"Growth does not pay at these budgets: {base} ends lower than the best grown model at the largest, {grown}."
    if all(summary["pays"].values()):
        return f"Growth pays at all of these budgets: the best grown model ends lower than {base} (at the largest {grown})."
    begin = f"{summary['pays_from']:.3g} FLOPs"
    return (
        f"Growth pays from {begin} on: there the best grown model ({grown} at the largest) ends lower than {base}, below not."
    )


def rows(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a study's table; the last row says at which budgets growth pays."""
    head = ["arm", "lr", *(f"loss at {b:.3g}" for b in summary["budgets"]), "speedup", "exact count", "minus base"]
    found = []
    for arm in summary["arms"].values():
        losses = ["-" if one is None else f"{one['mean']:.3f}" for one in arm["losses"]]
        minus = arm.get("minus_base", [None])[-1]
        gains = [percent(arm["speedup_flops"]), percent(arm["speedup_flops_exact"])]
        found.append([arm["label"], f"{arm['lr']:g}", *losses, *gains, "" if minus is None else plus_minus(minus)])
    if summary["pays"]:
        best = [None if name is None else summary["arms"][name]["minus_base"][i] for i, name in enumerate(summary["best"])]
        verdicts = ["-" if m is None else ("pays " if m["mean"] < 0 else "does not pay ") + plus_minus(m) for m in best]
        found.append(["growth, the best arm minus base", "", *verdicts, "", "", ""])
    return head, found


def plus_minus(one: dict) -> str:
    return f"{one['mean']:+.3f}" + ("" if one["half_width"] is None else f" ± {one['half_width']:.3f}")


def table(summary: dict) -> Table:
    shown = Table(title=f"{summary['question']} ({summary['size']}, {len(summary['seeds'])} seeds)")
    head, found = rows(summary)
    for name in head:
        shown.add_column(name, justify="left" if name == "arm" else "right")
    for row in found:
        shown.add_row(*row)
    return shown


def draw(results: dict, summary: dict, path: Path) -> None:
    """Loss over FLOPs and over seconds: decayed points, the mean of the seeds on a line, every seed a dot; growth dotted.

    An arm that has a single point shows its undecayed curve on the way there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), dpi=140, sharey=True, layout="constrained")
    colours, marks = plt.cm.tab10.colors, "osD^vP*X<>ph"
    for number, (name, arm) in enumerate(results["arms"].items()):
        colour = {"scratch": "#222222", summary["base"]: "#888888"}.get(name, colours[number % 10])
        style = {"color": colour, "marker": marks[number % len(marks)], "ms": 5}
        seeds = [ends_of(results, name, seed) for seed in arm["seeds"]]
        ways = [{b: path_of(results, run) for b, (run, _) in ends.items()} for ends in seeds]
        for panel, axis in zip(panels, ("flops", "seconds"), strict=True):
            points = [[(way[-1][axis], way[-1]["val_loss"]) for way in of_seed.values()] for of_seed in ways]
            means = [[statistics.mean(values) for values in zip(*one, strict=True)] for one in zip(*points, strict=False)]
            panel.plot(*zip(*means, strict=True), **style, lw=1.4, label=arm["label"])
            for one in points:
                panel.plot(*zip(*one, strict=True), **style, ls="", alpha=0.25)
            if len(means) == 1:
                for way in (way for of_seed in ways for way in of_seed.values()):
                    panel.plot([e[axis] for e in way], [e["val_loss"] for e in way], color=colour, lw=0.8, alpha=0.6)
            begun = [e[axis] for e in ways[0][min(ways[0])] if e["tokens"] >= grown_after(results, seeds[0][min(ways[0])][0])]
            if arm["grows"]:
                panel.axvline(begun[0], color=colour, lw=0.8, ls=":")
    panels[0].set(
        xscale="log", xlabel="FLOPs (6·N per token), base included; growth dotted", ylabel="validation loss, nats per token"
    )
    panels[1].set(xscale="log", xlabel="seconds of training, base included; runs side by side on one machine")
    top = max(loss["mean"] for arm in summary["arms"].values() for loss in arm["losses"] if loss)
    low = min(loss["mean"] for arm in summary["arms"].values() for loss in arm["losses"] if loss)
    panels[0].set_ylim(low - 0.08 * (top - low), top + 0.08 * (top - low))
    panels[1].legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.25, which="both")
    figure.suptitle(f"{summary['question']} Every point is a fully decayed run.", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 170)
    if command.report:
        from bench.report import write_report

        return write_report(command.results, ROOT / "docs", console)
    if not command.paths:
        raise UserError("give a study file (config/study/*.py), folders of finished runs, or --report")
    if command.paths[0].suffix == ".py":
        return run_study(command, console)
    from bench.runs import collect

    results = collect(command.paths)
    stem = Path(os.path.commonpath([folder.resolve() for folder in command.paths])) / "speedup"
    summary = show(results, stem, console)
    stem.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def show(results: dict, stem: Path, console: Console) -> dict:
    """Table and verdict on the console, the picture beside `stem`. Returns the summary."""
    summary = summarise(results)
    console.print(table(summary))
    console.print(pays(summary))
    draw(results, summary, stem.with_name(stem.name + ".png"))
    console.print(f"wrote {stem}.png", soft_wrap=True)
    return summary


def run_study(command: Command, console: Console) -> dict:
    import torch

    from bench import study as running

    path, *others = command.paths
    if others or not path.is_file():
        raise UserError(f"there is no study file {path}" if not others else f"one study at a time: {path}")
    study = runpy.run_path(str(path)).get("study")
    if not isinstance(study, running.Study):
        raise UserError(f"{path} has no variable `study` of type bench.study.Study")
    cuda = torch.cuda.is_available()
    size = command.size or ("gpu" if cuda else "cpu")
    jobs = command.jobs or (1 if cuda else os.cpu_count())
    files = running.run(study, size, command.data.resolve(), command.out.resolve() / size, command.results, jobs, console)
    summaries = {}
    for file in files:
        console.print(f"results are in {file}", soft_wrap=True)
        summaries[file.stem] = show(json.loads(file.read_text()), file.with_suffix(""), console)
    return summaries[files[0].stem] if len(files) == 1 else summaries


if __name__ == "__main__":
    command_line(Command, main)
