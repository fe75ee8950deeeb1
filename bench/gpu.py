"""All that only a GPU can tell, in one command of less than nine minutes: `make gpu`.

    make gpu                              or, with the Python and torch that are there: make gpu VENV= PYTHON=python3
    python bench/gpu.py --only tests,1b   some of the parts
    python bench/gpu.py --rehearse        without a GPU: the same parts at sizes of seconds, to see that they work

    tests     the tests that need a GPU
    1b, 3b    bench/throughput.py: the whole step at both presets beside torch.compile
    kernels   bench/kernels.py: every operation beside its peers
    growth    bench/growth.py: growing in place beside a trip through the host
    timeline  bench/timeline.py: where the step of 1b goes, by operation
    run       a stacked run of three minutes, with its curve
    1b-4096   if time is left: 1b at twice the context, two micro-batches a step
    large     if time is left: the tests at full size

The clock starts with the command. Each part is a process with a time of its own: one that fails or is late costs only itself,
and what it had measured until then is kept. What it printed goes to bench/results/GPU-DATE/ as soon as it ends, and README.md
there is the summary. Nothing comes from the network.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from string import Formatter

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose kernels.py would stand before the package of that name

from bench import growth, throughput  # noqa: E402
from bench.results import markdown  # noqa: E402
from nanostack.config import load  # noqa: E402
from nanostack.errors import UserError, command_line  # noqa: E402
from nanostack.fit import RESERVED, need, scratch_of  # noqa: E402
from nanostack.metrics import device_name, git_commit, read_run, versions  # noqa: E402

DATA = ROOT / "data" / "gpu"
ALLOWED = 500  # seconds until the last part must end; it may take PATIENCE to do so
PATIENCE = 30  # seconds that a part which is told to stop may take: a run saves first


@dataclass(frozen=True)
class Command:
    """Test and measure everything on this GPU."""

    only: str = ""
    """These parts, by comma; see above. Default: all."""
    rehearse: bool = False
    """At sizes of seconds, on whatever device there is; results go to a folder that says so."""
    out: Path | None = None
    """Folder of the results. Default: bench/results/GPU-DATE"""
    json: bool = False
    """Print the summary as one JSON object; everything else goes to standard error."""


@dataclass(frozen=True)
class Part:
    """A command line behind `python`, and how long it may take; {out} is the folder of results, {data} prepared text."""

    name: str
    seconds: int
    arguments: tuple[str, ...]
    ends: bool = True  # else its limit ends it, as it should


TESTS = (
    "kernels",
    "kernels_attention",
    "kernels_extremes",
    "kernels_compiled",
    "data",
    "fit",
    "parallel",
    "growth",
    "train",
    "step",
)
TESTS = [f"tests/test_{name}.py" for name in TESTS]
# Two micro-batches: the gradients of the second are added in place, as in a real step.
STEP = ("--rounds", "1", "--steps", "8", "--warmup", "2", "--accumulate", "2", "--against", "compile", "--data.path", "{data}")
STEP += ("--model.vocab_size", "32000")
RUN = ("--data.path", "{data}", "--out", "{work}/run", "--overwrite", "--batch_tokens", "131072", "--micro_batch", "16")
PARTS = (
    Part("tests", 70, ("-m", "pytest", "-q", "-m", "gpu", *TESTS)),
    Part("1b", 75, ("bench/throughput.py", "config/1b.py", "--out", "{out}/1b.json", *STEP, "--micro_batch", "{1b}")),
    Part("kernels", 50, ("bench/kernels.py", "--samples", "20", "--out", "{out}/kernels.json")),
    Part("3b", 75, ("bench/throughput.py", "config/3b.py", "--out", "{out}/3b.json", *STEP, "--micro_batch", "{3b}")),
    Part("growth", 25, ("bench/growth.py", "--shapes", "1b", "--samples", "1", "--out", "{out}/growth.json")),
    Part("timeline", 20, ("bench/timeline.py", "config/1b.py", "--accumulate", "1", "--steps", "3", "--data.path", "{data}",
                          "--model.vocab_size", "32000", "--micro_batch", "{1b}", "--out", "{out}/timeline.json")),
    # 410M, tokens for three minutes at 40 % of an H100's peak: an estimate; at its limit it saves and the curve is drawn
    Part("run", 180, ("train.py", "config/410m.py", *RUN, "--stages.0.tokens", "13107200",
                      "--stages.0.warmup_tokens", "1310720", "--stages.1.tokens", "15728640",
                      "--stages.1.warmup_tokens", "1310720", "--stages.1.lr", "1e-3", "--log_interval", "655360",
                      "--eval_interval", "2621440", "--data.val_tokens", "262144"), ends=False),
    Part("1b-4096", 80, ("bench/throughput.py", "config/1b.py", "--out", "{out}/1b-4096.json", *STEP,
                         "--model.seq_len", "4096", "--micro_batch", "{1b-4096}")),
    Part("large", 60, ("-m", "pytest", "-q", "-m", "gpu", "tests/test_kernels_full_size.py")),
)  # fmt: skip
SMALL = ("--rounds", "1", "--steps", "2", "--warmup", "1", "--data.path", "{data}", "--against", "eager")
SHORT = ("-m", "pytest", "-q", "tests/test_flops.py")
REHEARSAL = {
    "tests": SHORT,
    "kernels": ("bench/kernels.py", "--op", "swiglu", "--samples", "4", "--out", "{out}/kernels.json"),
    "1b": ("bench/throughput.py", "config/quickstart_scratch.py", "--out", "{out}/1b.json", *SMALL),
    "growth": ("bench/growth.py", "--shapes", "tiny", "--samples", "1", "--out", "{out}/growth.json"),
    "timeline": ("bench/timeline.py", "config/quickstart_base.py", "--steps", "1", "--data.path", "{data}",
                 "--out", "{out}/timeline.json"),
    "run": ("train.py", "config/quickstart.py", "--data.path", "{data}", "--out", "{work}/run", "--overwrite",
            "--stages.0.tokens", "16384", "--stages.0.warmup_tokens", "0", "--stages.1.tokens", "16384",
            "--stages.1.warmup_tokens", "0", "--data.val_tokens", "4096", "--log_interval", "4096"),
    "3b": ("bench/throughput.py", "config/quickstart_base.py", "--out", "{out}/3b.json", *SMALL),
    "1b-4096": ("bench/throughput.py", "config/quickstart_base.py", "--out", "{out}/1b-4096.json", *SMALL,
                "--model.seq_len", "512", "--micro_batch", "8"),
    "large": SHORT,
}  # fmt: skip


def name_of_device() -> str:
    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")).split(",")[0]


def sequences_that_fit() -> dict[str, str]:
    """{part: sequences in a micro-batch}: a power of two that leaves a third of the GPU to the peers, which need more."""
    if not torch.cuda.is_available():
        return {}
    found, room = {}, torch.cuda.mem_get_info()[0] - RESERVED
    for part, preset, seq_len in (("1b", "1b", 2048), ("3b", "3b", 2048), ("1b-4096", "1b", 4096)):
        config = load(str(ROOT / f"config/{preset}.py"), ["--model.seq_len", str(seq_len)])
        model = replace(config.shapes()[-1], vocab_size=32000)
        fixed = need(config, model, torch.bfloat16, on_triton=True)
        most = fixed.sequences(room, scratch_of(model, torch.bfloat16, on_triton=True))
        found[part] = str(2 ** int(math.log2(max(1.0, min(16.0, most / 1.5)))))
    return found


def heed_sigint() -> None:
    """What a shell starts in the background ignores it, and so would the parts, which are stopped by it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_part(part: Part, places: dict[str, str], seconds: float) -> dict:
    """Run it to its end or its limit. What it prints goes to {out}/NAME.txt."""
    arguments = [argument.format(**places) for argument in part.arguments]
    began, late = time.monotonic(), False
    log = Path(places["out"]) / f"{part.name}.txt"
    for old in (".json", ".png", ".jsonl"):
        log.with_suffix(old).unlink(missing_ok=True)
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True, "preexec_fn": heed_sigint}
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, **options)
        try:
            # SIGINT lets pytest tell what has failed so far, and a run save.
            for number, patience in ((signal.SIGINT, seconds), (signal.SIGKILL, PATIENCE)):
                try:
                    process.wait(max(1.0, patience))
                    break
                except subprocess.TimeoutExpired:
                    late = True
                    os.killpg(process.pid, number)
        finally:  # whoever is left of it, and where Ctrl-C ended the waiting, must not run beside the next part
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    late = late and (part.ends or process.returncode != 0)
    state = "late" if late else "passed" if process.returncode == 0 else f"failed (exit {process.returncode})"
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return {"state": state, "seconds": round(time.monotonic() - began, 1), "last_line": last[:300]}


def finish_run(out: Path, work: Path) -> None:
    """Keep the records of the stacked run, and draw them."""
    from nanostack.plot import draw

    folder = work / "run"
    records = read_run(folder)[1]
    (out / "run.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    draw({"stacked": records}, "time", out / "run.png")
    (out / "run.svg").unlink()


def main(command: Command) -> dict:
    began = time.monotonic()
    console = Console(stderr=command.json, highlight=False, soft_wrap=True)
    cuda = torch.cuda.is_available()
    if not cuda and not command.rehearse:
        raise UserError("there is no GPU here; --rehearse runs the same parts at sizes of seconds")
    wanted = [name.strip() for name in command.only.split(",") if name.strip()] or [part.name for part in PARTS]
    if unknown := set(wanted) - {part.name for part in PARTS}:
        raise UserError(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    parts = [part for part in PARTS if part.name in wanted]
    if command.rehearse:
        parts = [replace(part, seconds=300, arguments=REHEARSAL[part.name]) for part in parts]
    device = growth.alone(name_of_device)
    stem = "-".join([*device.lower().split(), date.today().isoformat()]) + ("-rehearsal" if command.rehearse else "")
    out = (command.out or ROOT / "bench/results" / stem).resolve()
    work = ROOT / "out" / "gpu"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    places = {"out": str(out), "work": str(work)}
    for what, way in (("text", prepare_text), ("sequences that fit", lambda: growth.alone(sequences_that_fit))):
        console.print(f"preparing {what}")
        try:
            places |= way()
        except Exception as error:  # costs the parts that name it
            console.print(f"  failed: {error}")
    about = {"device": device, "driver": driver(), "versions": versions(), "python": platform.python_version()}
    about |= {"git_commit": git_commit(), "date": date.today().isoformat(), "rehearsal": command.rehearse}
    shutil.rmtree(work / "run", ignore_errors=True)
    summary = {"about": about, "parts": {}}
    if command.only and (out / "summary.json").is_file():
        summary["parts"] = json.loads((out / "summary.json").read_text())["parts"]
    allowed = ALLOWED if not command.rehearse else 3600
    for part in parts:
        left = allowed - (time.monotonic() - began)
        console.print(f"{part.name}: at most {min(part.seconds, left):.0f} s, {left:.0f} s left in all")
        missing = {name for argument in part.arguments for _, name, *_ in Formatter().parse(argument) if name} - places.keys()
        if missing or left < 5:
            state = f"{', '.join(sorted(missing))} could not be prepared" if missing else "no time left"
            summary["parts"][part.name] = {"state": state}
        else:
            summary["parts"][part.name] = run_part(part, places, min(part.seconds, left))
        if part.name == "run" and "seconds" in summary["parts"]["run"]:
            try:
                finish_run(out, work)
            except Exception as error:  # whatever it is, the parts behind go on
                summary["parts"]["run"]["state"] += f"; no curve: {error}"
        console.print(f"  {summary['parts'][part.name]['state']}")
        write(summary, out)
    console.print(f"wrote {out / 'README.md'}")
    return summary


def prepare_text() -> dict[str, str]:
    """{"data": folder} of the standard library, and of the Python source that is installed beside us what takes seconds."""
    if (DATA / "manifest.json").is_file():
        return {"data": str(DATA)}
    command = [sys.executable, "-m", "nanostack.prepare", "stdlib", "site-packages", "--out", str(DATA), "--overwrite"]
    command += ["--max_bytes", "60_000_000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"no text could be prepared: {done.stderr.strip().splitlines()[-1]}")
    return {"data": str(DATA)}


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def write(summary: dict, out: Path) -> None:
    """summary.json, and README.md for people."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    about = summary["about"]
    text = f"# {about['device']}, {about['date']}" + (" (a rehearsal, no measurement)" if about["rehearsal"] else "") + "\n\n"
    text += f"Commit {(about['git_commit'] or 'unknown')[:7]}, {', '.join(f'{k} {v}' for k, v in about['versions'].items())}"
    text += (f", driver {about['driver']}" if about["driver"] else "") + ". Written by `make gpu`.\n\n"
    parts = summary["parts"].items()
    said = {name: part.get("last_line", "").replace("|", "\\|") for name, part in parts}
    rows = [[f"[{name}]({name}.txt)", part["state"], str(part.get("seconds", "")), said[name]] for name, part in parts]
    text += markdown(["part", "state", "seconds", "last line"], rows) + "\n"
    tables = {name: (f"The step of {name}", throughput.HEAD, throughput.cells) for name in ("1b", "3b", "1b-4096")}
    tables["growth"] = ("Growing in place beside a trip through the host", growth.HEAD, growth.cells)
    tables["timeline"] = ("Where the step of 1b goes", ("operation", "ms", "%"), by_kind)
    for name, (title, head, cells) in tables.items():
        if (out / f"{name}.json").is_file():
            text += f"\n## {title}\n\n{markdown(list(head), cells(json.loads((out / f'{name}.json').read_text())))}\n"
    for name, what in (("kernels", "Kernels beside their peers"), ("run", "A stacked run")):
        if (out / f"{name}.png").is_file():
            text += f"\n## {what}\n\n![{what}]({name}.png)\n"
    (out / "README.md").write_text(text)


def by_kind(result: dict) -> list[list[str]]:
    return [[name, f"{ms:.1f}", f"{100 * ms / result['ms']:.1f}"] for name, ms in result["by_kind"].items()]


if __name__ == "__main__":
    command_line(Command, main)
