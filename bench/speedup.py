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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose kernels.py would stand before the package of that name

import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from nanostack.errors import UserError, exits_cleanly  # noqa: E402

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
    header, *records = map(json.loads, path.read_text().splitlines())
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


def points_of(results: dict, arm: str, seed: str, count: str = "flops") -> list[tuple[float, float]]:
    """The decayed points of an arm and seed, in order of FLOPs."""
    ends = [results["runs"][name]["evaluations"][-1] for name in branches_of(results, arm, seed)]
    return sorted((end[count], end["val_loss"]) for end in ends)


def branches_of(results: dict, arm: str, seed: str) -> list[str]:
    return [name for name in results["arms"][arm]["seeds"][seed] if results["runs"][name]["budget"] is not None]


def seconds_of(results: dict, name: str) -> float:
    """Of training from the first token to the end of a run, the runs it started from included."""
    run, total = results["runs"][name], 0.0
    total += run["evaluations"][-1]["seconds"]
    while run["needs"] is not None:
        begun = run["evaluations"][0]["flops"] if run["growth"] else None
        tokens = run["evaluations"][0]["tokens"]
        run = results["runs"][run["needs"]]
        before = [e for e in run["evaluations"] if (e["flops"] <= begun if begun else e["tokens"] <= tokens)]
        total += before[-1]["seconds"] if before else 0.0
    return total


def summarise(results: dict) -> dict:
    """What a study has found: per arm losses, speedups by both counts, and the difference to the base that never grew."""
    arms, seeds = results["arms"], list(next(iter(results["arms"].values()))["seeds"])
    base = next((name for name, arm in arms.items() if not arm["grows"] and name != "scratch"), None)
    answer = {}
    for name, arm in arms.items():
        losses = [[loss for _, loss in points_of(results, name, seed)] for seed in seeds]
        found = {
            "label": arm["label"],
            "lr": arm["lr"],
            "losses": [mean_and_interval(list(one)) for one in zip(*losses, strict=True)],
        }
        for count in ("flops", "flops_exact"):
            gains, bound = [], False
            for seed in seeds:
                flops, target = points_of(results, "scratch", seed, count)[-1]
                needed = crossing(points_of(results, name, seed, count), target)
                gains.append(None if needed is None else flops / needed.flops - 1)
                bound = bound or (needed is not None and needed.at_most)
            found[f"speedup_{count}"] = None if None in gains else mean_and_interval(gains) | {"at_least": bound}
        if base is not None and name != base:
            other = [[loss for _, loss in points_of(results, base, seed)] for seed in seeds]
            differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(losses, other, strict=True)]
            found["minus_base"] = [mean_and_interval(list(one)) for one in zip(*differences, strict=True)]
        answer[name] = found
    grown = [name for name, arm in arms.items() if arm["grows"]]
    best = min(grown, key=lambda name: answer[name]["losses"][-1]["mean"]) if grown else None
    pays = None
    if base is not None and best is not None:
        wins = [difference["mean"] < 0 for difference in answer[best]["minus_base"]]
        pays = next((budget for i, budget in enumerate(results["budgets"]) if all(wins[i:])), None)
    about = ("study", "question", "size", "budgets", "device", "date", "git_commit", "versions", "manifest_sha256")
    return {key: results[key] for key in about} | {
        "seeds": seeds,
        "arms": answer,
        "base": base,
        "best": best,
        "pays_from": pays,
    }


def percent(gain: dict | None) -> str:
    if gain is None:
        return "not reached"
    spread = "" if gain["half_width"] is None else f" ± {100 * gain['half_width']:.0f}"
    return f"{'≥ ' if gain['at_least'] else ''}{100 * gain['mean']:+.0f}{spread} %"


def pays(summary: dict) -> str:
    """The sentence that a critic looks for."""
    if summary["base"] is None or summary["best"] is None:
        return "There is no base that never grew beside a grown model here."
    grown, base = (summary["arms"][summary[name]]["label"] for name in ("best", "base"))
    if summary["pays_from"] is None:
        return f"Growing does not pay at any of these budgets: “{base}” ends lower than the best grown model, “{grown}”."
    if summary["pays_from"] == summary["budgets"][0]:
        return f"Growing pays at all of these budgets: “{grown}” ends lower than “{base}”."
    return f"Growing pays from {summary['pays_from']:.3g} FLOPs on: there “{grown}” ends lower than “{base}”."


def table(summary: dict) -> Table:
    shown = Table(title=f"{summary['question']} ({summary['size']}, {len(summary['seeds'])} seeds)")
    for name in (
        "arm",
        "lr",
        *(f"loss at {budget:.3g}" for budget in summary["budgets"]),
        "speedup",
        "exact count",
        "minus base",
    ):
        shown.add_column(name, justify="left" if name == "arm" else "right")
    for arm in summary["arms"].values():
        shown.add_row(*cells(arm))
    return shown


def cells(arm: dict) -> list[str]:
    minus = f"{arm['minus_base'][-1]['mean']:+.3f}" if "minus_base" in arm else ""
    losses = [f"{loss['mean']:.3f}" for loss in arm["losses"]]
    return [arm["label"], f"{arm['lr']:g}", *losses, percent(arm["speedup_flops"]), percent(arm["speedup_flops_exact"]), minus]


def draw(results: dict, summary: dict, path: Path) -> None:
    """Decayed points over FLOPs and over seconds, every seed, with the growth marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5), dpi=140, sharey=True, layout="constrained")
    colours, marks = plt.cm.tab10.colors, "osD^vP*X<>"
    for number, (name, arm) in enumerate(results["arms"].items()):
        colour = {"scratch": "#333333", summary["base"]: "#999999"}.get(name, colours[number % 10])
        for turn, seed in enumerate(arm["seeds"]):
            branches = branches_of(results, name, seed)
            points = [(results["runs"][run]["evaluations"][-1], seconds_of(results, run)) for run in branches]
            line = {"color": colour, "marker": marks[number % 10], "ms": 4, "lw": 1.2, "alpha": 0.85}
            line["label"] = None if turn else arm["label"]
            panels[0].plot([end["flops"] for end, _ in points], [end["val_loss"] for end, _ in points], **line)
            panels[1].plot([seconds for _, seconds in points], [end["val_loss"] for end, _ in points], **line)
            grown = next((results["runs"][run] for run in arm["seeds"][seed] if results["runs"][run]["growth"]), None)
            if grown is not None:
                panels[0].axvline(grown["evaluations"][0]["flops"], color=colour, lw=0.5, ls=":")
    panels[0].set(
        xscale="log", xlabel="FLOPs (6·N per token), base included; growth dotted", ylabel="validation loss, nats per token"
    )
    panels[1].set(xscale="log", xlabel="seconds of training, runs side by side on one machine")
    panels[0].legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.25, which="both")
    figure.suptitle(f"{summary['question']} Every point is a fully decayed run.", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def compare(folders: tuple[Path, ...]) -> dict:
    """The speedup among finished runs of one text: the deepest that never grew is scratch, a shallower one the base."""
    runs = {}
    for folder in folders:
        header, records = read_run(folder)
        if "config" not in header:
            raise UserError(f"{folder} was trained before headers told the config: train it anew")
        config = header["config"]
        planned = sum(-(-stage["tokens"] // config["batch_tokens"]) * config["batch_tokens"] for stage in config["stages"])
        steps = [record["step"] for record in records if record["loss"] is not None]
        if not steps or steps[-1] * config["batch_tokens"] < planned:
            raise UserError(f"{folder} is not finished: resume it first")
        last, rates = records[-1]["lr"], [record["lr"] for record in records if record["lr"]]
        if last is None or last > 0.2 * max(rates):
            raise UserError(f"{folder} ends at a learning rate of {last}, {max(rates)} at most: only decayed runs are compared")
        grows = any("growth" in record for record in records)
        runs[folder] = {"header": header, "curve": curve(records), "grows": grows, "seed": config["seed"]}
        runs[folder]["n_layer"] = None if grows else config["model"]["n_layer"]
    first = next(iter(runs.values()))["header"]
    for folder, run in runs.items():
        theirs, ours = run["header"], first
        for what, a, b in (
            ("text or tokenizer (manifest)", theirs["manifest_sha256"], ours["manifest_sha256"]),
            ("validation tokens", theirs["config"]["data"]["val_tokens"], ours["config"]["data"]["val_tokens"]),
            ("context", theirs["config"]["model"]["seq_len"], ours["config"]["model"]["seq_len"]),
        ):
            if a != b:
                raise UserError(f"{folder} and {folders[0]} cannot be compared: {what} is {a} there and {b} here")
    depths = [run["n_layer"] for run in runs.values() if not run["grows"]]
    answer = []
    for seed in sorted({run["seed"] for run in runs.values()}):
        mine = [run for run in runs.values() if run["seed"] == seed]
        scratch = [run for run in mine if not run["grows"] and run["n_layer"] == max(depths, default=None)]
        grown = [run for run in mine if run["grows"]]
        if len(scratch) != 1 or not grown:
            raise UserError(f"seed {seed} needs one run of the target from scratch and at least one that grows")
        for run in grown:
            answer.append({"seed": seed, "speedup": speedup(scratch[0]["curve"], run["curve"])})
    gains = [one["speedup"] for one in answer]
    found = None if None in gains else mean_and_interval(gains)
    return {
        "what": "speedup at the loss of scratch's end; the grown curve is undecayed before its end",
        "runs": answer,
        "speedup": found,
    }


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 170)
    if command.report:
        from bench.report import write_report

        return write_report(command.results, ROOT / "docs", console)
    if not command.paths:
        raise UserError("give a study file (config/study/*.py), folders of finished runs, or --report")
    if command.paths[0].suffix != ".py":
        answer = compare(command.paths)
        found = answer["speedup"]
        console.print("speedup not reached" if found is None else f"speedup {percent(found | {'at_least': False})}")
        return answer
    import torch

    from bench import study as running

    if not command.paths[0].is_file():
        raise UserError(f"there is no study file {command.paths[0]}")
    study = runpy.run_path(str(command.paths[0])).get("study")
    if not isinstance(study, running.Study):
        raise UserError(f"{command.paths[0]} has no variable `study` of type bench.study.Study")
    cuda = torch.cuda.is_available()
    size = command.size or ("gpu" if cuda else "cpu")
    jobs = command.jobs or (1 if cuda else os.cpu_count())
    path = command.results / f"study-{study.name}-{size}.json"
    results = running.run(
        study, size, command.data.resolve(), command.out.resolve() / f"{study.name}-{size}", path, jobs, console
    )
    summary = summarise(results)
    console.print(table(summary))
    console.print(pays(summary))
    draw(results, summary, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}", soft_wrap=True)
    return summary


if __name__ == "__main__":
    with exits_cleanly():
        command = tyro.cli(Command, use_underscores=True)
        answer = main(command)
        if command.json:
            print(json.dumps(answer))
