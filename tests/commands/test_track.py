"""Trackers: what TensorBoard and wandb show of a run is what its metrics.jsonl says."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Trainer, python, records

from nanostack import track
from nanostack.commands import track as command
from nanostack.config import load
from nanostack.errors import UserError
from nanostack.growth import Receipt
from nanostack.runs import read_run

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")

TIMES = ("seconds", "tokens_per_s", "mfu", "growth/seconds")
OFFLINE = {"WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Trainer:
    """A trainer whose folder holds the same run without a tracker (`plain`) and with one (`tensorboard`)."""
    trainer = Trainer(corpus, tmp_path_factory.mktemp("track"))
    trainer.good("plain")
    trainer.good("tensorboard", "--track", "tensorboard")
    return trainer


def numbers(out: Path) -> list[dict]:
    """The numbers of every record of metrics.jsonl, those of a growth among them."""
    found = []
    for record in read_run(out)[1]:
        record |= {f"growth/{name}": value for name, value in record.pop("growth", {}).items()}
        found.append({name: value for name, value in record.items() if isinstance(value, int | float)})
    return found


def points(found: list[dict]) -> dict[str, list[tuple]]:
    """Per name (tokens, number in single precision), as TensorBoard keeps them."""
    names = {name for record in found for name in record}
    return {name: [(record["tokens"], np.float32(record[name])) for record in found if name in record] for name in names}


def board(out: Path):
    """The folder as TensorBoard's own server reads it."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return EventAccumulator(str(out), size_guidance={"tensors": 0}).Reload()


def shown(board) -> dict[str, list[tuple]]:
    events = {name: board.Tensors(name) for name in board.PluginTagToContent("scalars")}
    return {name: [(event.step, np.float32(event.tensor_proto.float_val[0])) for event in events[name]] for name in events}


def text(board, name: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in board.Tensors(name)]


def records_in(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") - 1 if file.exists() else 0


def test_tensorboard_shows_every_number_of_metrics_jsonl(runs):
    out = runs.folder / "tensorboard"
    found = shown(board(out))
    layers = found.pop("layers")
    assert found == points(numbers(out)) and len(found["loss"]) == 24 and len(found["val_loss"]) == 7
    assert layers == [(record["tokens"], 2 + 2 * record["stage"]) for record in numbers(out)]


def test_growth_is_marked_in_tensorboard(runs):
    out = runs.folder / "tensorboard"
    receipt = next(record["growth"] for record in read_run(out)[1] if "growth" in record)
    found = board(out)
    assert text(found, "growth/receipt") == [(3072, str(Receipt.of(receipt)))]
    assert shown(found)["growth/loss_before"] == [(3072, np.float32(receipt["loss_before"]))]
    assert json.loads(text(found, "header")[0][1].removeprefix("```json").removesuffix("```")) == read_run(out)[0]


def test_what_the_model_wrote_is_shown(runs):
    out = runs.good(
        "texts", "--track", "tensorboard", "--sample.interval", "2048", "--sample.tokens", "4", "--sample.prompt", "def ", "a"
    )
    written = [(record["tokens"], "\n\n".join(record["texts"])) for record in read_run(out)[1] if "texts" in record]
    assert len(written) == 3 and written[0][1].startswith("def ") and text(board(out), "texts") == written


def test_tracking_changes_nothing_of_the_run(runs):
    plain, tracked = runs.folder / "plain", runs.folder / "tensorboard"
    assert records(plain) == records(tracked) and read_run(plain)[0] == read_run(tracked)[0]
    assert not list(plain.glob("events*"))


@pytest.mark.slow
def test_resumed_run_shows_no_point_twice(runs):
    """A TensorBoard that is open meanwhile shows none twice either; the growth lies at the very tokens of a checkpoint."""
    out = runs.folder / "killed"
    options = ("--track", "tensorboard", "--keep", "9")
    assert runs.kill_when(runs.start("killed", *options), lambda: records_in(out) >= 15)
    open_meanwhile = board(out)
    assert 14 <= len(shown(open_meanwhile)["layers"]) < 25  # the kill may fall between metrics.jsonl and the tracker
    for file in (*out.glob("ckpt-1[0-9]*.pt"), *([out / "ckpt.pt"] if (out / "ckpt-96.pt").exists() else [])):
        file.unlink()  # the last one left is that before the growth
    runs.good("killed", "--resume", *options)
    expected = points(numbers(runs.folder / "plain"))
    for found in (board(out), open_meanwhile.Reload()):
        seen = shown(found)
        assert len(seen.pop("layers")) == 25 and len(text(found, "growth/receipt")) == 1
        assert {name: seen[name] for name in seen if name not in TIMES} == {
            name: expected[name] for name in expected if name not in TIMES
        }
    assert shown(board(out))["seconds"] == points(numbers(out))["seconds"]


def test_run_can_be_shown_later(runs, tmp_path, capsys):
    out = shutil.copytree(runs.folder / "plain", tmp_path / "run")
    answer = command.main(command.Command((out,)))["runs"][str(out)]
    assert answer["records"] == 25 and Path(answer["where"]).parent == out and answer["where"] in capsys.readouterr().out
    found = shown(board(out))
    assert len(found.pop("layers")) == 25 and found == points(numbers(out))


def wandb_records(folder: Path) -> list:
    """All that wandb wrote to its newest folder: a log like LevelDB's, blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    file = max(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    raw, at, message, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        _, length, kind = struct.unpack_from("<IHB", raw, at)  # checksum, bytes, whole (1) or first, middle, last
        message += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(message))
            message = b""
        if -at % 32768 < 7:  # no room for a header: the block ends
            at += -at % 32768
    return found


def wandb_history(folder: Path) -> list[dict]:
    rows = [record.history.item for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def assert_shows_run(out: Path) -> None:
    """wandb's newest folder has the whole run, once, number by number, and the receipt of its growth."""
    history = wandb_history(out)
    assert [row.pop("layers") for row in history] == [2] * 12 + [4] * 13
    assert [row.pop("_step") for row in history] == list(range(25))
    receipt = next(record["growth"] for record in read_run(out)[1] if "growth" in record)
    assert [row.pop("growth/receipt") for row in history if "growth/receipt" in row] == [str(Receipt.of(receipt))]
    for row, record in zip(history, numbers(out), strict=True):
        assert {name: value for name, value in row.items() if not name.startswith("_")} == pytest.approx(record, rel=1e-12)


@pytest.mark.slow
def test_wandb_offline_holds_the_run_and_goes_on_under_its_id(runs):
    out = runs.folder / "wandb"
    options = ("--track", "wandb")
    assert runs.kill_when(runs.start("wandb", *options, env=OFFLINE), lambda: records_in(out) >= 15)
    name = (out / "wandb_id").read_text()
    runs.good("wandb", "--resume", *options, env=OFFLINE)
    assert records(out) == records(runs.folder / "plain")
    assert_shows_run(out)
    folders = list(out.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(name) for folder in folders)
    run = next(record.run for record in wandb_records(out) if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    header = read_run(out)[0]
    assert {key: config[key] for key in ("config", "text", "config_sha256")} == {
        key: header[key] for key in ("config", "text", "config_sha256")
    }
    metrics = [record.metric for record in wandb_records(out) if record.WhichOneof("record_type") == "metric"]
    assert ("*", "tokens") in [(metric.glob_name, metric.step_metric) for metric in metrics]


def test_run_can_be_sent_to_wandb_later(runs, tmp_path):
    out = shutil.copytree(runs.folder / "plain", tmp_path / "run")
    done = python("-m", "nanostack", "track", out, "--to", "wandb", "--json", env=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"][str(out)]["records"] == 25
    assert_shows_run(out)


def test_overwriting_a_run_ends_what_trackers_had_of_it(runs, tmp_path):
    trainer = Trainer(runs.corpus, tmp_path)
    shutil.copytree(runs.folder / "tensorboard", tmp_path / "run")
    (tmp_path / "run" / "wandb_id").write_text("before")
    trainer.good("run", "--overwrite", "--stages.0.tokens", "512")
    assert not list((tmp_path / "run").glob("events*")) and not (tmp_path / "run" / "wandb_id").exists()


FULL = """
import resource, signal, sys
from pathlib import Path
from nanostack.recorder import Metrics
from nanostack.track import Tracking

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
folder = Path(sys.argv[1])
with Metrics(folder / "metrics.jsonl", True, Tracking("tensorboard", folder)) as metrics:
    metrics.begin({"config": {"model": {"n_layer": 2}}})
    for step in range(200):
        metrics.write({"tokens": 256 * step, "seconds": 0.1 * step, "loss": 4.0, "lr": 1e-3})
"""


def test_tracker_that_fails_costs_one_warning(tmp_path):
    """A limit on the size of files stands for the full disk. The event file is the longer one, and passes it first."""
    done = python("-c", FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: tensorboard failed, training goes on: OSError") and done.stderr.count("\n") == 1
    assert len(read_run(tmp_path)[1]) == 200
    assert 10 < len(shown(board(tmp_path))["loss"]) < 200


def test_run_is_refused_before_its_folder_is_touched(runs, tmp_path):
    """The package is missing, or wandb has no key."""
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')")
    before = {file.name: file.read_bytes() for file in (runs.folder / "plain").iterdir()}
    missing = runs.refused("plain", "--overwrite", "--track", "wandb", env={"PYTHONPATH": str(tmp_path)})
    assert "wandb is not installed" in missing and "pip install 'nanostack[track]'" in missing
    no_key = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    assert "No API key" in runs.refused("plain", "--overwrite", "--track", "wandb", env=no_key)
    assert {file.name: file.read_bytes() for file in (runs.folder / "plain").iterdir()} == before


def test_unknown_tracker_is_refused():
    with pytest.raises(UserError, match=r"invalid choice 'mlflow'.*'tensorboard', 'wandb'"):
        load(TINY, ["--track", "mlflow"])
    with pytest.raises(UserError, match="there is no tracker mlflow; there are tensorboard, wandb"):
        track.check("mlflow")  # a config file can say anything


@pytest.mark.parametrize(
    ("folders", "message"),
    [(("nowhere",), "nowhere holds no run"), (("foreign",), "not written by this version"), ((), "at least one folder")],
)
def test_what_cannot_be_shown_is_named(folders, message, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(UserError, match=message):
        command.main(command.Command(tuple(tmp_path / folder for folder in folders)))
    assert not list(tmp_path.glob("*/events*"))
