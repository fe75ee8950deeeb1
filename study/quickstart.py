"""Does stacking pay? Four arms at the same FLOPs on the same text, one table, one picture. `make quickstart` runs it.

    scratch   the 8-layer model from scratch
    grown     2 layers, stacked ×4 in place after a tenth of the FLOPs, trained on
    base4     4 layers, never grown: a control that asks whether a smaller model is not the better buy
    base      the same 2 layers as those that grow, never grown

They are one seed of study/studies/quickstart.py, at learning rates that were tuned for each (RATES there), every point the end
of a decayed run. The grown arm decays at half of the budget, too: where that curve comes down to the last loss of a control,
the FLOPs are read off. It prints and keeps what it measured, whatever that is. Interrupted, it goes on where it was.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Self

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nanostack.errors import UserError, command_line
from nanostack.flops import flops_per_token, n_params
from nanostack.model import LlamaConfig
from nanostack.runs import read_run
from nanostack.text.manifest import load_manifest
from study import ROOT
from study.plan import Job, Plan
from study.results import difference, ends_of, gain_said, grown_after, over_gains, path_of, plus_minus, read_results, summarise
from study.runner import Runner, about_now, arms_of, locked
from study.studies.quickstart import BASE_THAT_GROWS, OTHER, RATES, study

ARMS = {"scratch": ("#555555", "--"), "grown": ("#d1495b", "-"), "base4": ("#e0a030", "-."), "base": ("#2e86ab", ":")}
# What is the same in results that are told together.
ALIKE = ("size", "manifest_sha256", "model", "budgets", "numerics", "decay", "batch_tokens", "scale")
CONTROLS = [arm for arm in ARMS if arm != "grown"]


@dataclass(frozen=True)
class Command:
    """Train the four arms and compare them."""

    out: Path = ROOT / "out/quickstart"
    text: str = f"packages:{ROOT}/constraints.txt"
    """Source of the text, as `nanostack prepare` takes it; another one needs another `data`."""
    data: Path = ROOT / study.sizes["cpu"][0].folder
    """Folder of the prepared text, which is taken as it is if it is there."""
    seed: int = 0
    scale: float = 1.0
    """Multiplies the FLOPs; a small one is a fast test."""
    jobs: int | None = None
    """Arms at a time; on a CPU one for each core up to 2, with a thread each; on a GPU all 4."""
    results: tuple[Path, ...] = ()
    """Instead of running: tell and draw these result files together, of one seed or several each, into `out`."""
    json: bool = False
    """Print the summary as one JSON object; everything else goes to standard error."""


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False)
    if command.results:
        return conclude(together([read_results(path) for path in command.results]), command, console)
    if not 0 < command.scale < math.inf:
        raise UserError(f"scale must be a positive number, not {command.scale}")
    if command.text != Command.text and command.data == Command.data:
        raise UserError(f"{command.data} is for {Command.text}: give --data, a folder for the tokens of {command.text}")
    if command.jobs is not None and command.jobs < 1:
        raise UserError(f"jobs must be at least 1, not {command.jobs}")
    began, command = time.monotonic(), replace(command, out=command.out.resolve(), data=command.data.resolve())
    results = train(command, console)
    summary = conclude(results, command, console)
    console.print(f"all of it took {timedelta(seconds=round(time.monotonic() - began))} on {results['device']}")
    checkpoint = command.out / "grown/ckpt.pt"
    if checkpoint.exists():
        console.rule("the grown model writes")
        say([sys.executable, "-m", "nanostack", "sample", checkpoint, "--data", command.data], command)
    return summary


def prepare(command: Command, console: Console) -> None:
    """Make the folder of the prepared text if it is not there."""
    if not (command.data / "manifest.json").exists():
        console.rule(f"text: {command.text}")
        arguments = [command.text, "--out", command.data, "--tokenizer", "bpe:512"]
        say([sys.executable, "-m", "nanostack", "prepare", *arguments], command)


def say(arguments: list, command: Command) -> None:
    """Run a command whose output the user should see. Its own message explains a failure, so nothing is added."""
    output = sys.stderr if command.json else None
    process = subprocess.Popen([str(a) for a in arguments], stdout=output)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the child has it too: let it save
        process.wait()
        code = 130
    if code:
        sys.exit(code)


def train(command: Command, console: Console) -> dict:
    """Train the arms, or what is left of them. Returns results as a study's, of one seed."""
    gpu = torch.cuda.is_available()
    name, jobs = ("gpu", command.jobs or 4) if gpu else ("cpu", command.jobs or min(2, torch.get_num_threads()))
    planned(command, name, None)  # whether it can be, before the text is made
    for arm in ARMS:
        if (command.out / arm).exists() and not (command.out / arm).is_symlink():
            raise UserError(f"{command.out / arm} is of an earlier version of the quickstart: move it away")
    prepare(command, console)
    plan, ways = planned(command, name, command.data)
    read = readings(plan, ways)
    said = ", ".join(f"{plan.study.arms[arm].label} {times:.2f} times" for arm, times in read.items())
    console.print(f"text {command.data}, manifest {plan.manifest[:12]}, is read by: {said}", soft_wrap=True)
    if max(read.values()) > 1:
        console.print("caution: it is too short for this budget: what is read again teaches less, and the shallow read most")
    command.out.mkdir(parents=True, exist_ok=True)
    path = command.out / f"study-quickstart-{name}.json"
    with locked(command.out):
        runner = Runner(plan, name, path, jobs, console, lambda runner, waiting, what: Arms(runner, waiting, ways))
        runner.run([job for of_arm in ways.values() for one in of_arm for job in one], "the four arms")
        arms = arms_of(plan, {(arm, command.seed): of_arm for arm, of_arm in ways.items()})
        runner.check_finite(ways.values())
        if runner.ran or "arms" not in runner.results:
            runner.results |= about_now(jobs) | {"scale": command.scale}
        runner.results["arms"] = arms
        runner.write()
    for arm, of_arm in ways.items():
        (command.out / arm).unlink(missing_ok=True)
        (command.out / arm).symlink_to(Path(of_arm[-1][-1].config.out).relative_to(command.out))
    return runner.results


def planned(command: Command, name: str, data: Path | None) -> tuple[Plan, dict[str, list[list[Job]]]]:
    """The plan of one seed at this scale, and for each arm the jobs to the end of each of its budgets. Without data they cannot
    be run. UserError for a scale at which there is no room for a step."""
    size, scale = study.sizes[name][0], command.scale
    size = replace(size, text=command.text, seeds=(command.seed,), budgets=tuple(b * scale for b in size.budgets))
    if scale != 1:
        size = replace(
            size, warmup_tokens=round(size.warmup_tokens * scale), val_tokens=max(2048, round(size.val_tokens * min(1, scale)))
        )
    plan = Plan(study, size, data, command.out.resolve() / "runs", vocab=None if data else 512)
    return plan, {
        arm: [plan.jobs(arm, command.seed, RATES[arm], BASE_THAT_GROWS, budget) for budget in plan.budgets(arm)] for arm in ARMS
    }


def readings(plan: Plan, ways: dict[str, list[list[Job]]]) -> dict[str, float]:
    """How often each arm reads the text."""
    tokens = load_manifest(plan.data)["splits"]["train"]["tokens"]
    return {arm: (of_arm[-1][-1].begins + of_arm[-1][-1].config.stages[0].tokens) / tokens for arm, of_arm in ways.items()}


class Arms:
    """A live table: for each arm a bar, its last loss and the time that all of it will take. Without a terminal, a line now and
    then."""

    def __init__(self, runner: Runner, waiting: Sequence[Job], ways: dict[str, list[list[Job]]]):
        self.runner, self.began, self.said = runner, time.monotonic(), 0
        self.jobs = {arm: list({job.name: job for one in of_arm for job in one}.values()) for arm, of_arm in ways.items()}
        self.ahead = {job.name for job in waiting}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %  {task.fields[said]}"))
        self.progress = Progress(*columns, console=runner.console, disable=not runner.console.is_terminal)
        self.tasks = {
            arm: self.progress.add_task(runner.plan.study.arms[arm].label, total=sum(job.flops for job in jobs), said="")
            for arm, jobs in self.jobs.items()
        }
        self.total = self.progress.add_task("all", total=sum(job.flops for jobs in self.jobs.values() for job in jobs), said="")
        self.at_start = self.done({job.name: latest(job)[0] for job in waiting})  # what is there of runs that were broken off

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        self.progress.stop()

    def ended(self, job: Job) -> None:
        self.ahead.discard(job.name)

    def done(self, now: dict[str, float], arm: str | None = None) -> float:
        """FLOPs spent so far, by an arm or by all, where these shares of running jobs are done."""
        jobs = self.jobs[arm] if arm else [job for jobs in self.jobs.values() for job in jobs]
        return sum(job.flops * (now.get(job.name, 0.0) if job.name in self.ahead else 1.0) for job in jobs)

    def tick(self, running: list[Job]) -> None:
        now = {job.name: latest(job) for job in running}
        shares = {name: share for name, (share, _) in now.items()}
        spent = {arm: self.done(shares, arm) for arm in self.jobs}
        for arm, task in self.tasks.items():
            mine = next((job.name for job in self.jobs[arm] if job.name in now), None)
            loss = f"loss {now[mine][1]:.3f}" if mine and now[mine][1] else ""
            layers = f"{mine.partition('-')[0]} layers, " if mine else ""
            self.progress.update(task, completed=spent[arm], said=layers + loss)
        done, total = self.done(shares), self.progress.tasks[self.total].total or 1.0
        pace = (done - self.at_start) / (time.monotonic() - self.began + 1e-9)
        left = f"{timedelta(seconds=round((total - done) / pace))} left" if pace > 0 else ""
        self.progress.update(self.total, completed=done, said=left)
        tenth = int(10 * done / total)
        if self.progress.disable and tenth > self.said:
            self.said = tenth
            by_arm = ", ".join(f"{arm} {spent[arm] / self.progress.tasks[task].total:.0%}" for arm, task in self.tasks.items())
            self.runner.console.print(f"{done / total:.0%} ({by_arm}), {left}", soft_wrap=True)


def latest(job: Job) -> tuple[float, float | None]:
    """What share of a running job is done, and its last training loss."""
    try:
        _, records = read_run(Path(job.config.out))
        last = records[-1]
        return (last["tokens"] - job.begins) / job.config.stages[0].tokens, last["loss"]
    except (UserError, LookupError):
        return 0.0, None


def together(several: list[dict]) -> dict:
    """Results of several seeds as one. UserError where they are not of one kind, or a seed is in two of them."""
    first = several[0]
    for one in several:
        if not set(ARMS) <= set(one.get("arms", ())):
            raise UserError("a result file has not all arms of the quickstart: it is unfinished, or of another study")
        if differ := [key for key in ALIKE if one.get(key) != first.get(key)]:
            raise UserError(f"these results cannot be told together: {', '.join(differ)} differ")
    arms = {arm: first["arms"][arm] | {"seeds": {}} for arm in ARMS}
    for one in several:
        for arm in ARMS:
            if twice := arms[arm]["seeds"].keys() & one["arms"][arm]["seeds"].keys():
                raise UserError(f"seed {', '.join(sorted(twice))} is in two of these results")
            arms[arm]["seeds"] |= one["arms"][arm]["seeds"]
    return first | {"arms": arms, "runs": {name: run for one in several for name, run in one["runs"].items()}}


def conclude(results: dict, command: Command, console: Console) -> dict:
    """Table, picture and summary of results of one seed or several."""
    summary = summary_of(results)
    command.out.mkdir(parents=True, exist_ok=True)
    (command.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(results, summary, command.out / "speedup.png")
    console.print(table(results, summary))
    console.print(verdict(summary), soft_wrap=True)
    console.print(f"wrote {command.out / 'speedup.png'} and {command.out / 'summary.json'}", soft_wrap=True)
    return summary


def mean(one: dict | None) -> float | None:
    return None if one is None else one["mean"]


def summary_of(results: dict) -> dict:
    found = summarise(results)
    seeds, budget = found["seeds"], results["budgets"][-1]
    losses = {arm: found["arms"][arm]["losses"][-1] for arm in ARMS}
    speedups = {
        arm: dict(zip(("known", "reached"), over_gains(results, "grown", "flops", budget, arm), strict=True))
        for arm in CONTROLS
    }
    speedup = mean(speedups["scratch"]["known"])
    spent = [path_of(results, ends_of(results, "scratch", seed)[budget][0])[-1] for seed in seeds]
    flops = sum(end["flops"] for end in spent) / len(spent)
    runs = {
        name: run
        for name, run in results["runs"].items()
        if any(name in of for a in ARMS for of in results["arms"][a]["seeds"].values())
    }
    about = ("device", "versions", "git_commit", "date", "manifest_sha256", "processes")
    return {
        "speedup": speedup,
        "speedup_at_least": bool(speedups["scratch"]["known"] and speedups["scratch"]["known"]["at_least"]),
        "speedups": speedups,
        "loss_target": mean(losses["scratch"]),
        "flops_scratch": flops,
        "flops_grown": None if speedup is None else flops / (1 + speedup),
        "val_loss": {arm: mean(loss) for arm, loss in losses.items()},
        "losses": losses,
        "grown_minus": {arm: difference(results, "grown", arm, budget) for arm in CONTROLS},
        "seconds": round(sum(run["evaluations"][-1]["seconds"] for run in runs.values()), 1),  # of training, all arms
        "epochs": {
            arm: results["runs"][ends_of(results, arm, seeds[0])[budget][0]]["evaluations"][-1]["epoch"] for arm in ARMS
        },
        "lrs": {arm: found["arms"][arm]["lrs"][-1] for arm in ARMS},
        "seeds": [int(seed) for seed in seeds],
        "scale": results.get("scale", 1.0),
        "dtype": next(iter(runs.values()))["dtype"],
        "arms": {arm: results["arms"][arm] for arm in ARMS},
    } | {key: results[key] for key in about}


def table(results: dict, summary: dict) -> Table:
    target, seeds = LlamaConfig(**results["model"]), summary["seeds"]
    each = summary["flops_scratch"] / flops_per_token(target) / n_params(target)
    shown = Table(
        title=f"{summary['flops_scratch']:.3g} FLOPs (6·N per token) for every arm, {each:.0f} tokens for each parameter of "
        f"the target, {told(seeds)}",
        caption=OTHER,
    )
    for name in ("arm", "lr", "loss", "stacked minus it", "speedup over it", "text read"):
        shown.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name == "arm")
    for arm in ARMS:
        minus = summary["grown_minus"].get(arm)
        shown.add_row(
            results["arms"][arm]["label"],
            f"{summary['lrs'][arm]:g}",
            f"{summary['val_loss'][arm]:.3f}",
            "" if minus is None else plus_minus(minus),
            gained(summary, arm) if arm in CONTROLS else "",
            f"{summary['epochs'][arm]:.2f} times",
        )
    return shown


def told(seeds: list[int]) -> str:
    return f"mean of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def gained(summary: dict, control: str) -> str:
    """The speedup of stacking over a control, as a study tells it."""
    gain = summary["speedups"][control]
    return gain_said(gain["known"], gain["reached"], len(summary["seeds"]))


def verdict(summary: dict) -> str:
    """In one sentence whether stacking paid."""
    better = [arm for arm in CONTROLS if summary["grown_minus"][arm]["mean"] >= 0]
    by = min(-summary["grown_minus"][arm]["mean"] for arm in CONTROLS)
    gain = f"speedup FLOPs(scratch) / FLOPs(grown) − 1 = {gained(summary, 'scratch')}, {told(summary['seeds'])}; stacking "
    if not better:
        return gain + f"ends below the model from scratch and below both that never grew, by {by:.3f} nats or more"
    labels = {"scratch": "the model from scratch", "base4": "4 layers that never grew", "base": "2 layers that never grew"}
    return gain + f"does not pay here: {' and '.join(labels[arm] for arm in better)} ended lower"


def draw(results: dict, summary: dict, path: Path) -> None:
    """Validation loss against FLOPs for all arms and seeds: the way to the end of each run, growth marked, decayed ends
    as dots, and an arrow for what stacking saves."""
    figure, axes = plt.subplots(figsize=(9, 5.4), dpi=150, layout="constrained")
    lows, budget = [], results["budgets"][-1]
    for arm, (colour, line) in ARMS.items():
        for number, seed in enumerate(results["arms"][arm]["seeds"]):
            ends = ends_of(results, arm, seed)
            way = path_of(results, ends[budget][0])
            label = None if number else results["arms"][arm]["label"]
            axes.plot(
                [e["flops"] for e in way], [e["val_loss"] for e in way], line, color=colour, lw=1.6, alpha=0.8, label=label
            )
            dots = [(path_of(results, run)[-1]["flops"], end["val_loss"]) for run, end in ends.values()]
            axes.plot(*zip(*dots, strict=True), "o", color=colour, ms=4, alpha=0.8)
            lows += [loss for _, loss in dots]
            if results["arms"][arm]["grows"] and not number:
                place = grown_after(results, ends[budget][0])
                at = next(e["flops"] for e in way if e["tokens"] >= place)
                axes.axvline(at, color=colour, lw=1, ls=":")
                axes.annotate(
                    "2 → 8 layers",
                    (at, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(4, -14),
                    textcoords="offset points",
                    color=colour,
                )
    target, full, needed = summary["loss_target"], summary["flops_scratch"], summary["flops_grown"]
    if needed is not None:
        axes.annotate("", (needed, target), (full, target), arrowprops={"arrowstyle": "->", "lw": 1.5, "color": "black"})
    axes.axhline(target, color="black", lw=0.6, alpha=0.5)
    low = min(lows)
    axes.set_ylim(low - 0.06, low + 1.0)
    axes.set(xlabel="FLOPs spent (6·N per token), base included", ylabel="validation loss, nats per token")
    title = f"to the loss of the model from scratch, speedup of stacking in FLOPs: {gained(summary, 'scratch')}"
    axes.set_title(f"{title} ({told(summary['seeds'])})", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="dots: the end of a decayed run")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    command_line(Command, main)
