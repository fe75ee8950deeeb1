"""The records of a run: `metrics.jsonl`, one console line per log, a bar where there is a terminal, a tracker.

Numbers of a step stay on the device until they are asked for: `DeferredScalars` hands them out when they have arrived.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import FileIO
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor
from torch.profiler import profile, schedule

from nanostack.config import Train, describe_tokens
from nanostack.errors import UserError
from nanostack.files import replacing
from nanostack.flops import mfu, peak_flops
from nanostack.growth import Receipt
from nanostack.parallel import Placement, is_main_rank, on_rank_0, world_size
from nanostack.provenance import device_name, git_commit, tokenizer_name, versions
from nanostack.state import State
from nanostack.track import Tracking

PATIENCE_SECONDS = 10.0  # how long a run that ends goes on trying to write its records
NOT_SEEN = {"val_loss": None, "val_bits_per_byte": None}  # of a record whose model was not looked at
MAX_SKIPPED = 5  # steps in a row that were not finite: more than bad luck


class Diverged(UserError):
    """MAX_SKIPPED steps in a row were not finite."""


class DeferredScalars:
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

    Only rank 0 `writes`. A record that cannot be written is kept until it can be, while the run goes on. In use as a context,
    the tracker is told how it ended, and what is kept is written, or else a `UserError` is raised.
    """

    def __init__(self, path: Path, writes: bool, tracking: Tracking):
        self.path = path
        self._file: FileIO | None = None
        self._unwritten: list[bytes] = []
        self._told = False
        self._writes = writes
        self._tracking = tracking
        self.unfinished: dict | None = None  # the last record, where a signal left no time to look at the model

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind, *_) -> None:
        self._tracking.close(failed=kind is not None)
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self._unwritten and time.monotonic() < give_up and kind is None:
            time.sleep(1)
            self._write()
        if self._unwritten and kind is None:
            raise UserError(f"could not write the last {len(self._unwritten)} records to {self.path}; checkpoints are intact")

    def begin(self, header: dict) -> float:
        """Start the file anew. Returns the seconds of training in it: none."""
        if self._writes:
            self._replace([_line(header).decode()])
            self._tracking.start(header, [])
        return 0.0

    def resume(self, stage: int, samples: int, header: dict) -> float:
        """Cut back to the checkpoint's cursor and append after it. Returns the seconds of training recorded so far.

        Where `header` differs (another config, commit or number of devices) it takes the place of the old one, which it keeps
        in its list `before`.
        """
        if not self._writes:
            return 0.0
        lines: list[str] = []
        records: list[dict] = []
        old: dict = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                record = json.loads(line)
                if isinstance(record, dict) and "config" in record:
                    old = record
                elif (record["stage"], record["samples"]) <= (stage, samples):
                    lines.append(line + "\n")
                    records.append(record)
            except (ValueError, KeyError, TypeError):  # the process died in the middle of it
                print(f"note: {self.path}: line {number} is torn, and left out; what follows it stays", file=sys.stderr)
        if records and "due" in records[-1]:
            self.unfinished = records.pop()  # in the file it stays until it is finished
        before = old.pop("before", []) + ([old] if old and old != header else [])
        first = json.dumps(header | ({"before": before} if before else {})) + "\n"
        self._replace([first, *lines])
        self._tracking.start(header, records)
        return max((record.get("seconds") or 0.0 for record in (*records, self.unfinished or {})), default=0.0)

    def _replace(self, lines: list[str]) -> None:
        """Put these lines in the place of the file, at once, to append after them."""
        with _written(self.path):
            with replacing(self.path) as file:
                file.write("".join(lines))
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def _lines(self) -> list[str]:
        with _written(self.path):
            return self.path.read_text(errors="replace").splitlines() if self.path.exists() else []

    def write(self, record: dict) -> None:
        """Append a record; the first one after an `unfinished` record takes its place."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if self.unfinished:
            self.unfinished = None
            self._replace([*(f"{line}\n" for line in self._lines()[:-1]), _line(finite).decode()])
        else:
            self._unwritten.append(_line(finite))
            self._write()
        self._tracking.write(finite)

    def _write(self) -> None:
        """Write what is kept, whole or not at all."""
        assert self._file is not None  # begin or resume opened it
        end, data = os.fstat(self._file.fileno()).st_size, b"".join(self._unwritten)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            try:
                self._file.truncate(end)
            except OSError:  # half a line stays
                self._unwritten[0] = b"\n" + self._unwritten[0].lstrip()
            if not self._told:
                kept = "records are kept until it can be"
                print(f"warning: could not write {self.path}: {error.strerror}; {kept}", file=sys.stderr)
            self._told = True
        else:
            self._unwritten.clear()
            self._told = False


def _line(record: dict) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn what the system refuses into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror}; checkpoints are intact") from error


def header_of(config: Train, manifest: dict, manifest_sha256: str, world_size: int, placement: Placement) -> dict:
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
        if speed := record["tokens_per_s"]:
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
        left = max(0, self._total - run_tokens)
        return str(timedelta(seconds=round(left / self._speed))) if self._speed else "-"


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


class Recorder:
    """Console, metrics.jsonl, tracker, trace and clock of a run. Only rank 0 shows and writes.

    In use as a context. `header` is the first record; an epoch has `epoch_blocks` samples. A run that is `resuming` appends
    after the last record before the state's cursor.
    """

    def __init__(self, config: Train, state: State, header: dict, epoch_blocks: int, resuming: bool):
        self.config, self.state, self.epoch_blocks, self.step = config, state, epoch_blocks, config.steps_done(state.cursor)
        out, placement, cursor = Path(config.out), state.placement, state.cursor
        total_steps = self.step + config.steps_left(cursor)
        self._display = Display(total_steps * config.batch_tokens, self.step * config.batch_tokens, is_main_rank())
        self._metrics = Metrics(out / "metrics.jsonl", is_main_rank(), Tracking(config.track, out))
        at = (cursor.stage, cursor.samples)
        self._clock = Clock(self._metrics.resume(*at, header) if resuming else self._metrics.begin(header))
        self._peak = peak_flops(placement.device, placement.dtype)
        self._scalars = DeferredScalars()
        self._skipped: list[int] = []  # first samples of the last consecutive skipped steps
        self._trace = profiler(config.profile if is_main_rank() else 0, total_steps - self.step, out / "trace.json")
        self._contexts = contextlib.ExitStack()
        self.say, self.paused = self._display.say, self._clock.paused
        self._last_record = self._now()

    def __enter__(self) -> "Recorder":
        for context in (self._display, self._metrics):
            self._contexts.enter_context(context)
        self._tracer = self._contexts.enter_context(self._trace)
        return self

    def __exit__(self, *error) -> None:
        self._contexts.__exit__(*error)

    def record_step(self, lr: float, wait: bool, loss: Tensor, norm: Tensor, skipped: Tensor) -> dict:
        """A step was made, at this rate, with these scalars on the device. Returns loss, lr and grad_norm of the last step
        whose numbers have arrived, which with `wait` is this one; nothing where none has.

        Raises `Diverged` after MAX_SKIPPED steps in a row that were not finite.
        """
        self.step += 1
        first_sample = self.state.cursor.samples - self.config.batch_tokens // self.config.model.seq_len
        self._scalars.push(first_sample, loss, norm, skipped)
        measured = {}
        for sample, loss_, norm_, skipped_ in self._scalars.pop(wait=wait):
            self._count_skipped(sample, skipped_)
            measured = {"loss": loss_, "lr": lr, "grad_norm": norm_}
        self._display.advance(self.step * self.config.batch_tokens, f"stage {self.state.cursor.stage}")
        self._tracer.step()
        return measured

    def speed(self) -> float | None:
        """Tokens per second of training since the last record."""
        tokens, seconds = (now - then for now, then in zip(self._now(), self._last_record, strict=True))
        return tokens / seconds if seconds > 0 else None

    def log(self, values: dict, speed: float | None = None) -> None:
        """Write a record and a console line: where the run is, and these values."""
        state, cursor = self.state, self.state.cursor
        share = mfu(state.model.config, speed / world_size(), self._peak) if speed else None
        position = {"stage": cursor.stage, "step": self.step, "samples": cursor.samples, "tokens": cursor.tokens}
        epoch = cursor.samples / self.epoch_blocks
        ledger = {"flops": cursor.flops, "flops_exact": cursor.flops_exact, "epoch": epoch}
        timing = {"tokens_per_s": speed, "mfu": share, "seconds": self._clock.seconds()}
        self._write(position | ledger | NOT_SEEN | values | timing)

    def complete(self, look: Callable[[bool, bool], dict]) -> None:
        """Write the record that a signal left unfinished, if one did, with what `look(evaluating, sampling)` finds."""
        if record := on_rank_0(lambda: self._metrics.unfinished):
            self._write({name: value for name, value in record.items() if name != "due"} | look(*record["due"]))

    def _write(self, record: dict) -> None:
        self._metrics.write(record)
        self._display.log(record, self.step * self.config.batch_tokens)
        self._last_record = self._now()

    def record_growth(self, receipt: Receipt, losses: dict) -> None:
        """Write the record of a growth, and say what it made."""
        self.log({"loss": None, "lr": None, "grad_norm": None} | losses | {"growth": receipt.as_dict()})
        self.say(str(receipt))
        if caution := receipt.caution():
            self.say(f"warning: {caution}")

    def warn_of_dead(self, names: list[str]) -> None:
        if names:
            self.say(f"warning: in the second step after growth these have no gradient: {', '.join(names)}")

    def _now(self) -> tuple[int, float]:
        return self.state.cursor.tokens, self._clock.seconds()

    def _count_skipped(self, first_sample: int, skipped: float) -> None:
        """A step whose loss or gradient was not finite has changed nothing; several in a row end the run."""
        if not skipped:
            self._skipped.clear()
            return
        self._skipped.append(first_sample)
        last_sample = first_sample + self.config.batch_tokens // self.config.model.seq_len - 1
        self.say(f"step skipped: loss or gradient not finite in samples {first_sample} to {last_sample}")
        if len(self._skipped) >= MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row had a loss or gradient that is not finite, in samples {self._skipped[0]} to "
                f"{last_sample}. They left the weights alone; look at those samples, or lower the learning rate"
            )
