"""What a run says of itself: `metrics.jsonl`, one console line per log, a bar where there is a terminal.

Numbers of a step stay on the device until they are asked for: `Late` hands them out when they have arrived.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor
from torch.profiler import profile, schedule

from nanostack.config import Train, describe_tokens
from nanostack.errors import UserError
from nanostack.parallel import Placement

if TYPE_CHECKING:
    from nanostack.track import Tracking  # which reads runs by this module


class Late:
    """Device values of past steps, read without making the loop wait for the step in flight."""

    def __init__(self):
        self._pending: deque = deque()

    def push(self, tag, *values: Tensor) -> None:
        stacked = torch.stack([value.detach().float() for value in values])
        event = None
        if stacked.is_cuda:
            stacked = stacked.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((tag, stacked, event))

    def pop(self, wait: bool = False):
        """Yield (tag, *floats) of every step that has arrived; with `wait`, of every step."""
        while self._pending:
            tag, stacked, event = self._pending[0]
            if event is not None:
                if not wait and not event.query():
                    return
                event.synchronize()
            self._pending.popleft()
            yield tag, *stacked.tolist()


class Metrics:
    """The file `metrics.jsonl` of a run: a header record, then one record per log, each shown by the run's tracker as well.

    Only rank 0 `writes`. In use as a context, the tracker is told how it ended.
    """

    def __init__(self, path: Path, writes: bool, tracking: "Tracking"):
        self.path = path
        self._file = None
        self._writes = writes
        self._tracking = tracking

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind, *_) -> None:
        self._tracking.close(failed=kind is not None)

    def begin(self, header: dict) -> float:
        """Start the file anew. Returns the seconds of training in it: none."""
        if self._writes:
            self._file = open(self.path, "w")  # noqa: SIM115
            self._append(header)
            self._tracking.start(header, [])
        return 0.0

    def resume(self, stage: int, samples: int, header: dict) -> float:
        """Cut back to the checkpoint's cursor and go on behind it. Returns the seconds of training recorded so far.

        Where `header` differs (another config, commit or number of devices) it takes the place of the old one, which it keeps
        in its list `before`.
        """
        if not self._writes:
            return 0.0
        lines, records, seconds = [], [], 0.0
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
                position = (record["stage"], record["samples"]) if lines else (0, 0)
            except (ValueError, KeyError, TypeError):
                break  # the process died in the middle of this line
            if position > (stage, samples):
                break
            seconds = record.get("seconds", seconds)
            lines.append(line + "\n")
            records.append(record)
        old = json.loads(lines[0]) if lines else {}
        before = old.pop("before", []) + ([old] if old and old != header else [])
        first = json.dumps(header | ({"before": before} if before else {})) + "\n"
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(first + "".join(lines[1:]))
        os.replace(partial, self.path)
        self._file = open(self.path, "a")  # noqa: SIM115
        self._tracking.start(header, records[1:])
        return seconds

    def write(self, record: dict) -> None:
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._append(finite)
        self._tracking.write(finite)

    def _append(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"could not write {self.path}: {error.strerror}; checkpoints are intact") from error


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


def header(config: Train, manifest: dict, manifest_sha256: str, world_size: int, placement: Placement) -> dict:
    """The first record of metrics.jsonl: what is needed to tell whether two runs can be compared."""
    text = {"tokenizer": tokenizer_name(manifest)}
    for split, what in (("train", "training text"), ("val", "validation text")):
        of_shards = "".join(shard["sha256"] for shard in manifest["splits"][split]["shards"])
        text[what] = hashlib.sha256(of_shards.encode()).hexdigest()[:12]
    return {
        "config_sha256": config.sha256(),
        "config": config.shaping(),
        "manifest_sha256": manifest_sha256,
        "text": text,
        "git_commit": git_commit(),
        "versions": versions(),
        "device": device_name(placement.device),
        "dtype": str(placement.dtype).removeprefix("torch."),
        "world_size": world_size,
    }


def tokenizer_name(manifest: dict) -> str:
    """What tells the tokenizer of prepared data from others."""
    return f"{manifest['tokenizer']['name']} {manifest['tokenizer']['sha256'][:12]}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    """The commit of this repository, with -dirty where tracked files differ from it; None where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Display:
    """The console of a run; silent on every rank but 0."""

    def __init__(self, total_tokens: int, done_tokens: int, speak: bool):
        self._console = Console(quiet=not speak, highlight=False, soft_wrap=True)
        self._total = total_tokens
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>4.1f} %  {task.fields[eta]}"),
        )
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not (speak and self._console.is_terminal))
        self._task = self._bar.add_task("", total=total_tokens, completed=done_tokens, eta="")
        self._speed = 0.0  # tokens/s, smoothed for the ETA only

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def advance(self, run_tokens: int, label: str) -> None:
        self._bar.update(self._task, completed=run_tokens, description=label, eta=self._eta(run_tokens))

    def log(self, record: dict, run_tokens: int) -> None:
        """One aligned line per log record, and below it what the model wrote."""
        if record["tokens_per_s"]:
            speed = record["tokens_per_s"]
            self._speed = speed if not self._speed else 0.7 * self._speed + 0.3 * speed
        cells = [
            f"stage {record['stage']}",
            f"step {record['step']:>6}",
            f"{describe_tokens(record['tokens']):>6} tok",
            f"epoch {record['epoch']:5.2f}",
            _cell("loss", record["loss"], "7.4f"),
            _cell("val", record["val_loss"], "7.4f"),
            _cell("lr", record["lr"], "8.2e"),
            _cell("grad", record["grad_norm"], "7.3f"),
            _cell("tok/s", record["tokens_per_s"], "9,.0f"),
            _cell("mfu", record["mfu"] and 100 * record["mfu"], "4.1f"),
            f"eta {self._eta(run_tokens)}",
        ]
        self.say("  ".join(cells))
        for text in record.get("texts", ()):
            self.say(indent(text, "    | ", lambda line: True))

    def _eta(self, run_tokens: int) -> str:
        if not self._speed:
            return "-"
        return str(timedelta(seconds=round(max(0, self._total - run_tokens) / self._speed)))


def _cell(name: str, value: float | None, form: str) -> str:
    width = int(form.split(".")[0].rstrip(","))
    return f"{name} {value:{form}}" if value is not None else f"{name} {'-':>{width}}"


def profiler(steps: int, steps_left: int, path: Path):
    """A torch profiler that writes a trace of `steps` steps after two of warm-up; for 0 steps one that does nothing."""
    if steps < 1:
        return contextlib.nullcontext(SimpleNamespace(step=lambda: None))
    return profile(
        schedule=schedule(wait=1, warmup=1, active=max(1, min(steps, steps_left - 2)), repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
    )


class Clock:
    """Seconds spent training: evaluation, growth and saving are left out."""

    def __init__(self, seconds: float = 0.0):
        self._zero = time.perf_counter() - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._zero

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self._zero += time.perf_counter() - began
