"""A run in TensorBoard or wandb.

metrics.jsonl is the record of a run, and a tracker draws its picture anew whenever training starts: the records that the file
has come first, then every record as it is written. A resumed run, whose file is cut back to its checkpoint, therefore shows no
point twice, and tracking can begin in the middle of a run or after it. The x axis is tokens. A growth changes `layers`, has its
numbers under `growth/`, and its receipt as text; so has what the model wrote (--sample.interval).
"""

import contextlib
import importlib
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from nanostack import names
from nanostack.errors import UserError
from nanostack.growth import Receipt

EVENTS = "events.out.tfevents.{}.nanostack"  # the name by which TensorBoard knows its files, and we ours
WANDB_ID = "wandb_id"


class TensorBoard:
    """An event file. SummaryWriter would write it from a thread, where a full disk ends in a traceback and is noticed late."""

    def __init__(self, folder: Path, header: dict, seconds: float):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._text = Event, Summary, text_pb
        self._zero = time.time() - seconds
        for old in folder.glob(EVENTS.format("*")):  # emptied first: a TensorBoard that is reading one waits for it for ever
            os.truncate(old, 0) if old.stat().st_size else old.unlink()
        path = folder / EVENTS.format(time.time_ns())
        self._file = RecordWriter(open(path, "wb"))  # noqa: SIM115
        self._put(0.0, file_version="brain.Event:2")
        # A TensorBoard that has read the old file forgets it all.
        self._put(0.0, step=0, session_log=SessionLog(status=SessionLog.START))
        self._put(0.0, step=0, summary=text_pb("header", f"```json\n{json.dumps(header, indent=2)}\n```"))
        self.where = str(path)

    def add(self, number: int, values: dict[str, float], notes: dict[str, str]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        for name, note in notes.items():
            summary.MergeFrom(self._text(name, note))
        self._put(values["seconds"], step=values["tokens"], summary=summary)

    def _put(self, seconds: float, **what) -> None:
        self._file.write(self._event(wall_time=self._zero + seconds, **what).SerializeToString())
        self._file.flush()

    def close(self, failed: bool) -> None:
        self._file.close()


class Wandb:
    """A run of wandb. Its steps are the numbers of the records, by which it knows what it has."""

    def __init__(self, folder: Path, header: dict, seconds: float):
        import wandb

        file = folder / WANDB_ID
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanostack"),
            name=str(folder),
            id=file.read_text().strip(),
            resume="allow",
            config=header,
            allow_val_change=True,  # a resumed run may have another commit, or number of devices
            dir=str(folder),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self._next = self._run.step
        self.where = str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def add(self, number: int, values: dict[str, float], notes: dict[str, str]) -> None:
        if number >= self._next:
            self._run.log(values | notes, step=number, commit=True)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Tracker:
    """A run as one of TRACKERS shows it: the `records` so far, then each that is written. Raises what the library raises."""

    def __init__(self, name: str, folder: Path, header: dict, records: list[dict]):
        self._layers, self._number = header["config"]["model"]["n_layer"], 0
        self._shown = TRACKERS[name](folder, header, records[-1]["seconds"] if records else 0.0)
        self.where = self._shown.where
        for record in records:
            self.write(record)

    def write(self, record: dict) -> None:
        grown = record.get("growth", {})
        self._layers = len(grown["layers"]) if grown else self._layers
        values = record | {f"growth/{name}": value for name, value in grown.items()} | {"layers": self._layers}
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        notes = {"growth/receipt": str(Receipt.of(grown))} if grown else {}
        if texts := record.get("texts"):
            notes["texts"] = "\n\n".join(texts)
        self._shown.add(self._number, numbers, notes)
        self._number += 1

    def close(self, failed: bool = False) -> None:
        self._shown.close(failed)


class Tracking:
    """The tracker of a run in training, or none. One that fails is given up with a warning: it has cost a picture only."""

    def __init__(self, name: str, folder: Path):
        self._name, self._folder = name, folder
        self._tracker: Tracker | None = None

    def start(self, header: dict, records: list[dict]) -> None:
        if self._name != "none":
            with self._giving_up():
                self._tracker = Tracker(self._name, self._folder, header, records)

    def write(self, record: dict) -> None:
        if self._tracker is not None:
            with self._giving_up():
                self._tracker.write(record)

    def close(self, failed: bool) -> None:
        if self._tracker is not None:
            with self._giving_up():
                self._tracker.close(failed)

    @contextlib.contextmanager
    def _giving_up(self):
        try:
            yield
        except Exception as error:  # of the network, of the disk, of the library: it has many
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            later = f"nanostack track {self._folder} --to {self._name}"
            print(f"warning: {self._name} failed, training goes on: {reason}; later: {later}", file=sys.stderr, flush=True)


def check(name: str) -> None:
    """UserError where a tracker cannot be started: it is unknown, not installed, or wandb has no key."""
    if name == "none":
        return
    if name not in TRACKERS:
        raise UserError(f"there is no tracker {name}; there are {', '.join(TRACKERS)}")
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed ({error}); pip install 'nanostack[track]'") from error
    if name == "wandb":
        # A run that has ended waits so many seconds for a server that is away; `wandb sync` sends the rest.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
        try:
            if library.setup().settings.mode == "online":
                library.login(verify=False)
        except library.Error as error:
            raise UserError(f"wandb: {error} Or keep the run here: WANDB_MODE=offline") from error


def files(folder: Path) -> list[Path]:
    """What makes a tracker go on with the run in a folder."""
    return [*folder.glob(EVENTS.format("*")), *folder.glob(WANDB_ID)]


if __name__ == "__main__":
    names.refuse("nanostack.track")
