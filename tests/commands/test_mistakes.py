"""Every mistake a user can make at the command line: one message, exit code 2, no traceback, nothing lost."""

import json
import shutil

import pytest
import torch
from conftest import Trainer, python

from nanostack import checkpoint, kept


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Trainer:
    """A trainer whose folder `done` holds a finished run."""
    trainer = Trainer(corpus, tmp_path_factory.mktemp("mistakes"))
    trainer.good("done")
    return trainer


def everything(out) -> dict:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != ".lock"}


def test_missing_data_names_the_prepare_command(run):
    message = run.refused("new", "--data.path", "data/nowhere")
    assert "nanostack prepare" in message and "data/nowhere" in message
    assert not (run.folder / "new").exists()


def test_missing_stdlib_names_the_exact_prepare_command(run, tmp_path):
    message = run.refused("new", "--data.path", str(tmp_path / "stdlib"))
    assert f"nanostack prepare stdlib --out {tmp_path / 'stdlib'}" in message


@pytest.mark.parametrize("damage", ["size", "content"])
def test_shard_that_does_not_fit_its_manifest_is_named(run, corpus, tmp_path, damage):
    data = shutil.copytree(corpus, tmp_path / "data")
    (data / ".verified.json").unlink(missing_ok=True)
    shard = next(data.glob("train*.bin"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw[:-2] if damage == "size" else raw)
    message = run.refused("new", "--data.path", str(data))
    assert shard.name in message and not (run.folder / "new").exists()


def test_token_ids_outside_the_vocabulary(run):
    assert "model.vocab_size 200 is too small" in run.refused("new", "--model.vocab_size", "200")


def test_folder_that_holds_a_run_is_not_touched(run):
    before = everything(run.folder / "done")
    message = run.refused("done")
    assert "--resume" in message and "--overwrite" in message
    assert everything(run.folder / "done") == before


def test_overwrite_deletes_nothing_while_something_else_is_wrong(run):
    before = everything(run.folder / "done")
    run.refused("done", "--overwrite", "--init_from", "nowhere.pt")
    run.refused("done", "--overwrite", "--resume")
    own = run.folder / "done" / "ckpt.pt"
    assert "would delete" in run.refused("done", "--overwrite", "--model.n_layer", "4", "--init_from", str(own))
    assert everything(run.folder / "done") == before


def test_resuming_with_other_text_is_refused(run, corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"sources": ["other"]}))
    assert "trained on other data" in run.refused("done", "--resume", "--data.path", str(data))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--model.seq_len", "16"), "model.seq_len is 32 there, 16 here"),
        (("--model.d_ff", "128"), "model.d_ff is 96 there, 128 here"),
        (("--stages.1.growth.g", "3"), "model.n_layer is 4 there, 6 here"),
        (("--seed", "1"), "trained with seed 0, not 1"),
    ],
)
def test_resuming_another_run_is_refused(run, overrides, message):
    before = everything(run.folder / "done")
    assert message in run.refused("done", "--resume", *overrides)
    assert everything(run.folder / "done") == before


def test_checkpoint_of_another_shape_cannot_be_started_from(run):
    source = str(run.folder / "done" / "ckpt.pt")
    assert "model.n_layer is 4 there, 2 here" in run.refused("new", "--init_from", source)


@pytest.mark.parametrize("damage", ["flip", "truncate", "foreign"])
def test_damaged_checkpoint_is_refused_and_kept(run, tmp_path, damage):
    shutil.copytree(run.folder / "done", tmp_path / "done")
    path = tmp_path / "done" / "ckpt.pt"
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
    path.unlink()
    path.write_bytes({"flip": raw, "truncate": raw[: len(raw) // 3], "foreign": b"PK nothing of ours"}[damage])
    before = everything(tmp_path / "done")
    assert "ckpt.pt" in Trainer(run.corpus, tmp_path).refused("done", "--resume")
    assert everything(tmp_path / "done") == before


LIMITED = """
import resource
import runpy
import signal
import sys

_, limit, *sys.argv = sys.argv
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_full_disk_ends_the_run_with_the_previous_checkpoint_intact(run, tmp_path):
    """A limit on the size of files stands for the full disk: the checkpoint after growth is the first to pass it."""
    small = next(iter(kept.numbered_checkpoints(run.folder / "done" / "ckpt.pt"))).stat().st_size * 3 // 4
    trainer = Trainer(run.corpus, tmp_path)
    done = python("-c", LIMITED, small, *trainer.command("run")[1:])
    assert done.returncode == 2 and "could not save" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["cursor"]["samples"] == 96
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--stages.0.lrr", "1"), "Perhaps you meant"),
        (("--micro_batch", "3"), "nearest legal micro_batch: [2, 4]"),
        (("--batch_tokens", "288"), "nearest legal batch_tokens: [256, 384]"),
        (("--parallel.shard", "2"), "does not make the number of processes, 1"),
        (("--model.seq_len", "100000", "--batch_tokens", "400000"), "choose a smaller seq_len"),
        (("--init_from", "nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (("--out", "/dev/null/run"), "cannot write to /dev/null/run"),
    ],
)
def test_options_that_cannot_be(run, overrides, message):
    assert message in run.refused("new", *overrides)
    assert not (run.folder / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there torch.compile needs another compiler")
def test_compile_without_a_compiler_is_refused_before_anything_is_deleted(run):
    before = everything(run.folder / "done")
    message = run.refused("done", "--overwrite", "--compile", env={"CXX": "/nowhere/g++"})
    assert "torch.compile needs a C++ compiler" in message and everything(run.folder / "done") == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_triton_where_it_cannot_run_says_why(run):
    assert "needs a CUDA device" in run.refused("new", "--kernels", "triton")
