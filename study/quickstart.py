"""Does stacking pay? Three arms at the same FLOPs on the same text, one table, one picture. `make quickstart` runs it.

    scratch   the 8-layer model from scratch, its learning rate tuned and fully decayed
    grown     2 layers, stacked ×4 in place, trained on
    base      the same 2 layers, never grown: the control that asks whether the target was worth its size at all

Each arm is `train.py config/quickstart*.py`; data order, validation tokens and, for grown and base, initial weights are the
same. It prints and keeps what it measured, whatever that is. Interrupted, it goes on where it was.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from nanostack.config import Train, load
from nanostack.errors import UserError, command_line
from nanostack.provenance import git_commit
from nanostack.runs import read_run
from nanostack.text.manifest import manifest_sha256
from study import ROOT
from study.results import curve, flops_to_reach, speedup

ARMS = {  # config file, colour, line, what the picture says
    "scratch": ("quickstart_scratch.py", "#555555", "--", "8 layers from scratch"),
    "grown": ("quickstart.py", "#d1495b", "-", "2 layers, stacked ×4"),
    "base": ("quickstart_base.py", "#2e86ab", ":", "2 layers, never grown"),
}


@dataclass(frozen=True)
class Command:
    """Train the three arms and compare them."""

    out: Path = ROOT / "out/quickstart"
    data: Path = ROOT / "data/stdlib"
    seed: int = 0
    scale: float = 1.0
    """Multiplies every number of tokens; a small one is a fast test."""
    sweep: tuple[float, ...] = ()
    """Instead of comparing: run every arm at each of these learning rates and write the table to `out`/sweep.json."""
    results: tuple[Path, ...] = ()
    """Instead of running: summarise these summary.json files, one per seed, and draw them together into `out`."""
    json: bool = False
    """Print the summary as one JSON object; everything else goes to standard error."""


def main(command: Command) -> dict:
    console = Console(stderr=command.json, highlight=False)
    if command.results:
        return combine(command, console)
    if command.scale <= 0 or any(lr <= 0 for lr in command.sweep):
        raise UserError("scale and learning rates must be positive")
    prepare(command, console)
    if command.sweep:
        return sweep(command, console)
    arms = {}
    for number, arm in enumerate(ARMS, 1):
        console.rule(f"arm {number} of {len(ARMS)}: {ARMS[arm][3]}")
        arms[arm] = train(arm, command.out / arm, overrides(arm, command), command)
    summary = summarise(arms, command)
    command.out.mkdir(parents=True, exist_ok=True)
    (command.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw([summary], command.out / "speedup.png")
    report(summary, command, console)
    console.rule("the grown model writes")
    say(console, [sys.executable, "-m", "nanostack", "sample", command.out / "grown/ckpt.pt", "--data", command.data], command)
    return summary


def prepare(command: Command, console: Console) -> None:
    if (command.data / "manifest.json").exists():
        return
    console.rule("text: the Python standard library of this machine")
    source = ["stdlib", "--out", command.data, "--tokenizer", "bpe:1024"]
    say(console, [sys.executable, "-m", "nanostack", "prepare", *source], command)


def say(console: Console, arguments: list, command: Command) -> None:
    """Run a command whose output the user should see. Its own message explains a failure, so nothing is added."""
    output = sys.stderr if command.json else None
    process = subprocess.Popen([str(a) for a in arguments], cwd=ROOT, stdout=output)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the child has it too: let it save
        process.wait()
        code = 130
    if code:
        sys.exit(code)


def overrides(arm: str, command: Command, lr: float | None = None) -> list[str]:
    """What of the arm's config this command changes."""
    config = load(str(ROOT / "config" / ARMS[arm][0]), [])
    changes = {"data.path": command.data.resolve(), "seed": command.seed}
    if command.scale != 1:
        scaled = {name: getattr(config, name) for name in ("log_interval", "eval_interval", "save_interval")}
        scaled["data.val_tokens"] = config.data.val_tokens
        for i, stage in enumerate(config.stages):
            scaled |= {f"stages.{i}.tokens": stage.tokens, f"stages.{i}.warmup_tokens": stage.warmup_tokens}
        changes |= {name: max(1, round(tokens * command.scale)) for name, tokens in scaled.items()}
    if lr is not None:
        for i, stage in enumerate(config.stages):
            changes |= {f"stages.{i}.lr": lr} | ({f"stages.{i}.min_lr": lr / 20} if stage.min_lr else {})
    return [word for name, value in changes.items() for word in (f"--{name}", str(value))]


def train(arm: str, out: Path, changes: list[str], command: Command) -> dict:
    """Train one arm, or what is left of it, and return its result."""
    path = str(ROOT / "config" / ARMS[arm][0])
    config = load(path, [*changes, "--out", str(out)])
    arguments = [sys.executable, "train.py", path, *changes, "--out", out.resolve()]
    if (out / "metrics.jsonl").exists():
        arguments.append("--resume" if same_run(out, config) else "--overwrite")
    planned = sum(-(-stage.tokens // config.batch_tokens) * config.batch_tokens for stage in config.stages)
    if not finished(out, config, planned):
        say(Console(), arguments, command)
    header, records = read_run(out)
    if not records or records[-1]["tokens"] < planned:
        raise UserError(f"{out} was interrupted; the same command goes on from there")
    points = curve(records)
    growth = next((record["growth"] for record in records if "growth" in record), None)
    return {
        "config": ARMS[arm][0],
        "lr": config.stages[-1].lr,
        "points": points,
        "val_loss": points[-1][1],
        "val_bits_per_byte": next(r["val_bits_per_byte"] for r in reversed(records) if r["val_loss"] is not None),
        "flops": records[-1]["flops"],
        "flops_exact": records[-1]["flops_exact"],
        "tokens": records[-1]["tokens"],
        "epochs": records[-1]["epoch"],
        "seconds": records[-1]["seconds"],
        "growth": growth,
        "git_commit": header["git_commit"],  # of the code that ran; null outside a repository
        "grown_at_flops": next((record["flops"] for record in records if "growth" in record), None),
        "header": header,
    }


def same_run(out: Path, config: Train) -> bool:
    try:
        return read_run(out)[0]["config_sha256"] == config.sha256()
    except (ValueError, KeyError):  # cut off while its first line was written
        return False


def finished(out: Path, config: Train, planned: int) -> bool:
    """Whether nothing is left to train: records and checkpoint of this run, on this text, reach its end."""
    if not same_run(out, config):
        return False
    header, records = read_run(out)
    at_end = bool(records) and records[-1]["tokens"] >= planned and (out / f"ckpt-{records[-1]['samples']}.pt").exists()
    return at_end and header["manifest_sha256"] == manifest_sha256(config.data.path)


def summarise(arms: dict, command: Command) -> dict:
    scratch, target = arms["scratch"], arms["scratch"]["val_loss"]
    header = scratch["header"]
    reached = {arm: flops_to_reach(result["points"], target) for arm, result in arms.items()}
    return {
        "speedup": speedup(scratch["points"], arms["grown"]["points"]),
        "speedup_base": speedup(scratch["points"], arms["base"]["points"]),
        "loss_target": target,
        "flops_scratch": scratch["flops"],
        "flops_grown": reached["grown"],
        "flops_base": reached["base"],
        "val_loss": {arm: result["val_loss"] for arm, result in arms.items()},
        "seconds": round(sum(result["seconds"] for result in arms.values()), 1),  # of training, all arms
        "seed": command.seed,
        "scale": command.scale,
        "device": header["device"],
        "dtype": header["dtype"],
        "versions": header["versions"],
        "git_commit": git_commit(),
        "date": date.today().isoformat(),
        "manifest_sha256": header["manifest_sha256"],
        "arms": {arm: {k: v for k, v in result.items() if k != "header"} for arm, result in arms.items()},
    }


def report(summary: dict, command: Command, console: Console) -> None:
    table = Table(title=f"the same {summary['flops_scratch']:.3g} FLOPs (6·N per token) for every arm, seed {summary['seed']}")
    for name in ("arm", "val loss", "FLOPs to scratch's loss", "speedup", "epochs", "seconds"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    needed = {"scratch": summary["flops_scratch"], "grown": summary["flops_grown"], "base": summary["flops_base"]}
    for arm, result in summary["arms"].items():
        flops = needed[arm]
        gain = "" if arm == "scratch" else percent(None if flops is None else summary["flops_scratch"] / flops - 1)
        cells = f"{result['val_loss']:.4f}", "-" if flops is None else f"{flops:.3g}", gain
        table.add_row(ARMS[arm][3], *cells, f"{result['epochs']:.2f}", f"{result['seconds']:.0f}")
    console.print(table)
    console.print(f"speedup FLOPs(scratch) / FLOPs(grown) − 1 = {percent(summary['speedup'])}, one seed")
    losses = summary["val_loss"]
    if losses["base"] <= losses["grown"]:
        console.print("the never-grown base ends lower than the grown model: at this budget growing does not pay")
    console.print(f"wrote {command.out / 'speedup.png'} and {command.out / 'summary.json'}", soft_wrap=True)


def percent(fraction: float | None) -> str:
    return "not reached" if fraction is None else f"{100 * fraction:+.1f} %"


def draw(summaries: list[dict], path: Path) -> None:
    """Validation loss against FLOPs for all arms and seeds, growth marked, the saving as an arrow."""
    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=150)
    for arm, (_, colour, line, label) in ARMS.items():
        for number, summary in enumerate(summaries):
            result = summary["arms"][arm]
            points = result["points"]
            axes.plot(*zip(*points, strict=True), line, color=colour, lw=2, label=None if number else label, alpha=0.9)
            if result["grown_at_flops"] is not None:
                before, after = result["growth"]["loss_before"], result["growth"]["loss_after"]
                at = result["grown_at_flops"]
                axes.plot([at, at], [before, after], "^", color=colour, ms=6, label=None if number else "growth: before, after")
    targets = [summary["loss_target"] for summary in summaries]
    needed = [summary["flops_grown"] for summary in summaries]
    target, full = statistics.mean(targets), statistics.mean(summary["flops_scratch"] for summary in summaries)
    title = "the grown model did not reach the loss of the model from scratch"
    if None not in needed:
        gains = [100 * summary["speedup"] for summary in summaries]
        spread = "" if len(gains) == 1 else f"\n(FLOPs; mean of {len(gains)} seeds, {min(gains):.1f} to {max(gains):.1f} %)"
        title = f"stacking reaches the loss of the model from scratch with a speedup of {statistics.mean(gains):.1f} %{spread}"
        reach = statistics.mean(needed)
        axes.annotate("", (reach, target), (full, target), arrowprops={"arrowstyle": "->", "lw": 1.5, "color": "black"})
    axes.axhline(target, color="black", lw=0.6, alpha=0.5)
    lows = [loss for summary in summaries for result in summary["arms"].values() for _, loss in result["points"]]
    axes.set_ylim(min(lows) - 0.08, min(max(lows), target + 1.3))
    axes.set(xlabel="FLOPs spent (6·N per token), base included", ylabel="validation loss, nats per token", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def sweep(command: Command, console: Console) -> dict:
    """Every arm at every learning rate; stages of an arm share theirs, the last decays to a twentieth."""
    losses = {arm: {} for arm in ARMS}
    for arm in ARMS:
        for lr in sorted(command.sweep):
            console.rule(f"sweep: {arm}, learning rate {lr:g}")
            result = train(arm, command.out / f"sweep-{arm}-{lr:g}", overrides(arm, command, lr), command)
            losses[arm][f"{lr:g}"] = result["val_loss"]
    table = Table(title="validation loss at the end of each run")
    for name in ("arm", *(f"lr {lr:g}" for lr in sorted(command.sweep))):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm, row in losses.items():
        table.add_row(arm, *(f"{loss:.4f}" for loss in row.values()))
    console.print(table)
    header = read_run(command.out / f"sweep-scratch-{min(command.sweep):g}")[0]
    about = {key: header[key] for key in ("device", "dtype", "versions", "manifest_sha256")}
    answer = {"val_loss": losses, "seed": command.seed, "scale": command.scale, "git_commit": git_commit()} | about
    answer["date"] = date.today().isoformat()
    (command.out / "sweep.json").write_text(json.dumps(answer, indent=1) + "\n")
    return answer


def combine(command: Command, console: Console) -> dict:
    summaries = [json.loads(path.read_text()) for path in command.results]
    command.out.mkdir(parents=True, exist_ok=True)
    draw(summaries, command.out / "speedup.png")
    gains = [summary["speedup"] for summary in summaries]
    answer = {"seeds": [summary["seed"] for summary in summaries], "speedup": gains}
    console.print(f"speedups {[percent(gain) for gain in gains]}; wrote {command.out / 'speedup.png'}")
    return answer


if __name__ == "__main__":
    command_line(Command, main)
