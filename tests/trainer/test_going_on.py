"""What a run that goes on changes, where it goes back to, and what it finds in its folder."""

import errno
import json
import os
import shutil
from unittest.mock import Mock

import pytest
from conftest import TINY, Trainer, assert_same_state, python, records
from test_checkpoint import trained

import train
from nanostack import checkpoint, kept, lock, parts
from nanostack.config import load

SHORT = ("--stages.0.tokens", "1024", "--stages.1.tokens", "1024", "--save_interval", "512", "--keep", "9")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Trainer:
    """A trainer whose folder `done` holds a run of 4 steps and, after growing, 4 more."""
    trainer = Trainer(corpus, tmp_path_factory.mktemp("going_on"))
    trainer.good("done", *SHORT)
    return trainer


@pytest.fixture
def copy(finished, tmp_path) -> Trainer:
    shutil.copytree(finished.folder / "done", tmp_path / "done")
    return Trainer(finished.corpus, tmp_path)


@pytest.fixture
def go_on(copy, capfd):
    """Go on with the copy in this process; returns what is said on standard error."""

    def call(*overrides: str) -> str:
        options = ("--data.path", str(copy.corpus), "--out", str(copy.folder / "done"), *SHORT, *overrides)
        train.Run(load(TINY, [*options, *([] if "--overwrite" in overrides else ["--resume"])])).train()
        return capfd.readouterr().err

    return call


def numbered(copy: Trainer) -> list[str]:
    return sorted(path.name for path in (copy.folder / "done").glob("ckpt*"))


def test_same_options_say_nothing(go_on):
    assert go_on() == ""


def test_each_field_that_differs_is_a_line_and_the_run_goes_on(go_on, copy):
    said = go_on("--stages.1.lr", "1e-3", "--stages.1.tokens", "1536", "--optim.betas", "0.8", "0.9", "--save_interval", "256")
    start = f"note: {copy.folder / 'done'} goes on with another "
    assert said.splitlines() == [
        f"{start}optim.betas: [0.8, 0.9] now, [0.9, 0.95] before",
        f"{start}stages.1.lr: 0.001 now, 0.005 before",
        f"{start}stages.1.tokens: 1536 now, 1024 before",
    ]
    assert checkpoint.load(copy.folder / "done/ckpt.pt")["cursor"]["tokens"] == 1024 + 1536


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("--batch_tokens", "512"), "batch_tokens: 512 now, 256 before"),
        (("--stages.0.tokens", "2048"), "stages.0.tokens: 2048 now, 1024 before"),
        (("--stages.0.lr", "1e-3"), "stages.0.lr: 0.001 now, 0.01 before"),
        (("--stages.1.tokens", "512"), "stages.1.tokens: 512 now, 1024 before"),
        (("--stages.1.growth.op", "interleave"), 'stages.1.growth.op: "interleave" now, "stack" before'),
        (("--data.document_mask",), "data.document_mask: true now, false before"),
    ],
)
def test_what_would_change_the_past_is_refused_and_touches_nothing(go_on, copy, overrides, field):
    before = {path.name: path.read_bytes() for path in (copy.folder / "done").iterdir() if path.name != ".lock"}
    with pytest.raises(ValueError, match=r"was trained otherwise: .*--resume_anyway") as told:
        go_on(*overrides)
    assert field in str(told.value)
    assert {path.name: path.read_bytes() for path in (copy.folder / "done").iterdir() if path.name != ".lock"} == before


def test_past_can_be_changed_by_who_says_so(go_on, copy):
    said = go_on("--stages.0.lr", "1e-3", "--resume_anyway")
    assert said.count("\n") == 1 and "stages.0.lr: 0.001 now, 0.01 before" in said
    header = json.loads((copy.folder / "done/metrics.jsonl").read_text().splitlines()[0])
    assert header["config"]["stages"][0]["lr"] == 1e-3 and header["before"][0]["config"]["stages"][0]["lr"] == 1e-2


def test_going_back_sets_the_later_checkpoints_and_the_records_aside_and_ends_the_same(go_on, copy, finished):
    out = copy.folder / "done"
    with pytest.raises(ValueError, match=r"nowhere.pt is no checkpoint; there are .*ckpt-16.pt, .*ckpt.pt"):
        go_on("--resume_from", "nowhere.pt")
    with pytest.raises(ValueError, match=r"--resume_from: .*done is no checkpoint; there are .*ckpt-16.pt"):
        go_on("--resume_from", str(out))
    said = go_on("--resume_from", str(out / "ckpt-16.pt"))
    assert said.endswith(
        "goes on from 16 samples; what it leaves behind is kept as ckpt-32.pt.left, ckpt-48.pt.left, ckpt-64.pt.left\n"
    )
    assert records(out) == records(finished.folder / "done")
    assert_same_state(checkpoint.load(out / "ckpt.pt"), checkpoint.load(out / "ckpt-64.pt.left"))
    assert (out / "metrics.jsonl.left").read_bytes() == (finished.folder / "done/metrics.jsonl").read_bytes()
    assert {"ckpt-16.pt", "ckpt-32.pt", "ckpt-48.pt", "ckpt.pt"} <= set(numbered(copy))
    first = {path: path.read_bytes() for path in out.glob("*.left")}
    assert "kept as ckpt-48.pt.2.left, ckpt-64.pt.2.left" in go_on("--resume_from", str(out / "ckpt-32.pt"))
    assert all(path.read_bytes() == content for path, content in first.items()), "what was left the first time is kept too"
    go_on("--overwrite")
    assert not list(out.glob("*.left"))


def test_records_are_set_aside_before_anything_else_and_with_a_damaged_checkpoint(go_on, copy, monkeypatch):
    """A kill in the midst of going back, and a later checkpoint that cannot be read."""
    out = copy.folder / "done"
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "ckpt-48.pt").write_bytes(b"torn")
    with monkeypatch.context() as killed:
        killed.setattr(kept, "go_back", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            go_on("--resume_from", str(out / "ckpt-16.pt"))
    assert (out / "metrics.jsonl.left").read_bytes() == whole
    assert "ckpt-48.pt.left" in go_on("--resume_from", str(out / "ckpt-16.pt"))
    assert (out / "ckpt-48.pt.left").read_bytes() == b"torn"


@pytest.mark.parametrize("source", ["ckpt-64.pt", "ckpt-32.pt", "best.pt"])
def test_a_run_never_deletes_what_it_starts_from(go_on, copy, source):
    """The last one by its number, an earlier one, and a copy of the pointer to a folder."""
    out = copy.folder / "done"
    if source == "best.pt":
        parts.to_shards(checkpoint.load(out / "ckpt.pt"), out / "ckpt-4.pt")
        shutil.copy(out / "ckpt-4.pt", out / "best.pt")
    before = numbered(copy)
    with pytest.raises(ValueError, match=f"--overwrite would delete .*{source}, from which the run starts"):
        go_on("--overwrite", "--init_from", str(out / source), "--model.n_layer", "2" if source == "ckpt-32.pt" else "4")
    assert numbered(copy) == before


def test_what_grows_beside_a_run_is_left_alone(go_on, copy):
    for name in ("ckpt-x2.partial", "ckpt-64.partial"):
        (copy.folder / "done" / name).mkdir()
    go_on()
    assert [name for name in numbered(copy) if "partial" in name] == ["ckpt-x2.partial"]


def test_damaged_ckpt_is_kept_by_who_goes_back_behind_it(go_on, copy):
    out = copy.folder / "done"
    (out / "ckpt.pt").write_bytes(b"torn")
    go_on("--resume_from", str(out / "ckpt-48.pt"))
    assert (out / "ckpt.pt.left").read_bytes() == b"torn" and checkpoint.load(out / "ckpt.pt")["cursor"]["samples"] == 64


def test_going_back_to_a_folder_elsewhere_takes_no_other_one_of_that_name(tmp_path):
    (mine := tmp_path / "mine").mkdir()
    for path, steps in ((mine / "ckpt-4.pt", 1), (tmp_path / "ckpt-4.pt", 2)):
        checkpoint.save_sharded(trained(steps), path)
    with pytest.raises(ValueError, match="is in the way of a copy"):
        kept.go_back(tmp_path / "ckpt-4", mine / "ckpt.pt")
    assert not (mine / "ckpt.pt").exists()


def test_link_to_a_pointer_leads_to_the_folder_beside_the_pointer(tmp_path):
    (run := tmp_path / "run").mkdir()
    checkpoint.save_sharded(trained(), run / "ckpt.pt")
    (tmp_path / "best.pt").symlink_to(run / "ckpt.pt")
    assert checkpoint.load(tmp_path / "best.pt")["cursor"]["samples"] == 4


def test_folder_that_is_no_checkpoint_is_none_whatever_its_name(tmp_path):
    (tmp_path / "ckpt-100").mkdir()
    (tmp_path / "ckpt-100" / "config.json").write_text("{}")
    checkpoint.save(trained(), tmp_path / "ckpt.pt", keep=1)
    assert (tmp_path / "ckpt-100" / "config.json").exists() and not kept.numbered_checkpoints(tmp_path / "ckpt.pt")


def test_copy_over_one_checkpoint_leaves_the_others(copy, go_on):
    out = copy.folder / "done"
    before = {path.name: path.read_bytes() for path in out.glob("ckpt-*.pt")}
    assert len(before) == 3 and all(path.stat().st_nlink == 1 for path in out.glob("ckpt*"))
    with open(out / "ckpt-16.pt", "rb") as source, open(out / "ckpt.pt", "r+b") as target:  # as cp does
        shutil.copyfileobj(source, target)
        target.truncate()
    assert {path.name: path.read_bytes() for path in out.glob("ckpt-*.pt")} == before
    assert "ckpt-32.pt.left, ckpt-48.pt.left" in go_on(), "ckpt.pt is where the run goes on from"


@pytest.mark.parametrize("clock", ["equal", "set back"])
def test_last_checkpoint_is_the_one_that_has_seen_most_whatever_the_clock_said(copy, go_on, clock):
    out = copy.folder / "done"
    (out / "ckpt.pt").unlink()
    for path in out.glob("ckpt*"):
        os.utime(path, (1e9,) * 2 if clock == "equal" else (1e9 - kept.samples_of(path),) * 2)
    go_on("--keep", "2")
    assert numbered(copy) == ["ckpt-48.pt", "ckpt.pt"] and kept.samples_of(out / "ckpt.pt") == 64


def test_records_after_a_torn_line_are_kept_and_the_line_is_named(copy, go_on, finished):
    path = copy.folder / "done/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:], lines[-1][:9]]))
    said = go_on().splitlines()
    assert [line.partition(": line ")[2].split()[0] for line in said] == ["4", str(len(lines) + 1)]
    assert path.read_text().splitlines()[1:] == [line.rstrip("\n") for line in (*lines[1:3], *lines[4:])]


def test_records_that_are_none_are_told(copy, go_on):
    records = copy.folder / "done/metrics.jsonl"
    records.write_text(records.read_text() + '"config"\n')
    assert "metrics.jsonl: line " in go_on()
    records.unlink()
    records.mkdir()
    with pytest.raises(ValueError, match=r"could not write .*metrics.jsonl: Is a directory"):
        go_on()


def test_torn_header_costs_no_record(copy, go_on):
    path = copy.folder / "done/metrics.jsonl"
    header, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([header[:100] + "\n", *lines]))
    said = go_on()
    assert "line 1 is torn" in said and "does not tell with which options the run began" in said
    first, *rest = path.read_text().splitlines(keepends=True)
    assert rest == lines and json.loads(first)["config"] == json.loads(header)["config"]


def test_out_folder_that_is_a_link_is_the_folder_it_leads_to(copy, tmp_path, go_on):
    (tmp_path / "link").symlink_to(tmp_path / "done")
    assert go_on("--out", str(tmp_path / "link")) == "" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["name", "dangling", "file", "no right"])
def test_out_folder_that_cannot_be_is_one_line(copy, tmp_path, kind):
    out = tmp_path / ("x" * 300 if kind == "name" else "out")
    if kind == "dangling":
        out.symlink_to(tmp_path / "nowhere/at/all")
    elif kind == "file":
        out.write_text("")
    elif kind == "no right":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        out.mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot write to"):
        train.Run(load(TINY, ["--data.path", str(copy.corpus), "--out", str(out), "--resume"]))


LIMITED = """
import resource, runpy, signal, sys
_, limit, *sys.argv = sys.argv
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_full_disk_at_resume_is_one_line_and_loses_nothing(copy, go_on, monkeypatch):
    """A limit on the size of files stands for it: there is no room for the records. Or there is none for the lock."""
    records = (copy.folder / "done/metrics.jsonl").read_bytes()
    done = python("-c", LIMITED, 300, *copy.command("done", *SHORT, "--resume")[1:])
    assert done.returncode == 2 and "could not write" in done.stderr and "Traceback" not in done.stderr, done.stderr

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.os, "pwrite", full)
    with pytest.raises(ValueError, match=r"cannot write to .*: No space left on device"):
        go_on()
    assert (copy.folder / "done/metrics.jsonl").read_bytes() == records and len(numbered(copy)) == 4


def test_last_checkpoint_is_found_by_its_number_too(trainer):
    out = trainer.good("run", "--stages.0.tokens", "1024", "--stages.1.tokens", "1024")
    assert not (out / "ckpt-64.pt").exists() and checkpoint.load(out / "ckpt-64.pt")["cursor"]["samples"] == 64
    with pytest.raises(ValueError, match=r"there is no checkpoint .*ckpt-65\.pt"):
        checkpoint.load(out / "ckpt-65.pt")
