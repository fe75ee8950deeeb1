"""grow.py on real checkpoints."""

import json
import signal
import socket
import subprocess
import time

import pytest
import torch
from conftest import ROOT, Trainer, python, records, start_python

from nanostack import checkpoint, kept


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Trainer:
    trainer = Trainer(corpus, tmp_path_factory.mktemp("grow"))
    trainer.good("live")
    return trainer


def grow(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    return python(ROOT / "grow.py", *arguments, cwd=cwd)


@pytest.fixture
def ckpt(base, tmp_path):
    """The base as the live run left it just before it grew."""
    from shutil import copy

    files = {file.stem: file for file in kept.numbered_checkpoints(base.folder / "live" / "ckpt.pt")}
    if "ckpt-96" not in files:
        base.good("live", "--overwrite", "--keep", "10")
    return copy(base.folder / "live" / "ckpt-96.pt", tmp_path / "ckpt.pt")


def test_writes_the_deeper_checkpoint_beside_the_base_and_prints_the_receipt(ckpt):
    before = ckpt.read_bytes()
    done = grow(ckpt, "--g", "4")
    assert done.returncode == 0, done.stderr
    out = ckpt.with_name("ckpt-x4.pt")
    base, grown = checkpoint.load(ckpt), checkpoint.load(out)
    assert ckpt.read_bytes() == before
    assert grown["config"] == base["config"] | {"n_layer": 8} and grown["cursor"] == base["cursor"]
    assert len(grown["model"]) == 3 + 6 * 8
    for name, value in grown["model"].items():
        source = (
            name
            if not name.startswith("blocks.")
            else name.replace(f".{name.split('.')[1]}.", f".{int(name.split('.')[1]) % 2}.", 1)
        )
        assert torch.equal(value, base["model"][source])
    receipt = grown["growth"][-1]
    assert receipt["op"] == "stack" and receipt["g"] == 4 and receipt["layers"] == [0, 1] * 4
    assert "bytes_allocated" in done.stdout and str(receipt["bytes_allocated"]) in done.stdout


def test_two_steps_by_hand_equal_the_growth_inside_a_run(base, ckpt):
    assert grow(ckpt, "--g", "2").returncode == 0
    second = ("--model.n_layer", "4", "--init_from", str(ckpt.with_name("ckpt-x2.pt")), "--stages.1.growth.g", "2")
    stage = ("--stages.0.lr", "5e-3", "--stages.0.schedule", "cosine", "--stages.0.min_lr", "1e-3")
    trainer = Trainer(base.corpus, ckpt.parent)
    out = trainer.good("by_hand", *second, *stage, "--stages.1.tokens", "256", "--stages.1.warmup_tokens", "0")
    by_hand = [(r["samples"], r["flops"], r["loss"]) for r in records(out) if r["stage"] == 0 and r["loss"]]
    live = [(r["samples"], r["flops"], r["loss"]) for r in records(base.folder / "live") if r["stage"] == 1 and r["loss"]]
    assert by_hand == live


def test_layers_out_op_json_and_copied_moments(ckpt, tmp_path):
    out = tmp_path / "deep.pt"
    done = grow(ckpt, "--layers", "0,1*3", "--out", out, "--optimizer", "copy", "--json")
    receipt = json.loads(done.stdout)
    assert receipt["layers"] == [0, 1, 1, 1] and receipt["g"] is None and receipt["bytes_through_host"] == 0
    base, grown = checkpoint.load(ckpt), checkpoint.load(out)
    for key, value in grown["optimizer"]["blocks.3.mlp.down.weight"].items():
        assert torch.equal(value, base["optimizer"]["blocks.1.mlp.down.weight"][key])
    assert float(grown["optimizer"]["blocks.3.mlp.down.weight"]["step"]) == 12


def test_width_and_depth_in_one_command_and_training_goes_on(base, ckpt):
    done = grow(ckpt, "--width", "split", "--d_model", "96", "--n_kv_head", "3", "--op", "zero", "--g", "2", "--json")
    assert done.returncode == 0, done.stderr
    receipt, out = json.loads(done.stdout), ckpt.with_name("ckpt-x2-d96.pt")
    assert receipt["width"]["from"]["d_model"] == 64 and receipt["width"]["to"]["d_ff"] == 144 and len(receipt["layers"]) == 4
    grown = checkpoint.load(out)["config"]
    assert (grown["d_model"], grown["n_head"], grown["n_kv_head"], grown["n_layer"]) == (96, 6, 3, 4)
    said = done.stderr.splitlines()
    assert [line.split()[0] for line in said] == ["reading", "growing", "writing", "warning:"]
    assert "copies of an even split get equal gradients and stay alike" in said[-1]
    assert receipt["max_logit_change"] is None, "96 is not a whole number of times 64"
    shape = [
        word for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff") for word in (f"--model.{name}", grown[name])
    ]
    trainer = Trainer(base.corpus, ckpt.parent)
    options = ("--init_from", str(out), "--stages.0.tokens", "1024", "--stages.1.tokens", "1024")
    run = trainer.good("wide", *map(str, shape), *options)
    assert [r["loss"] for r in records(run) if r["loss"]][-1] < 6


def test_zero_width_keeps_the_logits_and_says_so(ckpt):
    receipt = json.loads(grow(ckpt, "--width", "zero", "--d_ff", "128", "--json").stdout)
    assert receipt["max_logit_change"] < 1e-5 and receipt["op"] is None
    assert checkpoint.load(ckpt)["optimizer"], "which is left behind, as the default is a reset"
    assert not checkpoint.load(ckpt.with_name("ckpt-kv2-ff128.pt"))["optimizer"]
    assert checkpoint.load(ckpt.with_name("ckpt-kv2-ff128.pt"))["config"]["d_ff"] == 128


def test_learn_reads_on_in_the_text_and_the_ledger_counts_it(base, ckpt):
    learn = ("--op", "learn", "--g", "2", "--learn_steps", "3", "--batch_tokens", "256", "--data", base.corpus, "--json")
    done = grow(ckpt, *learn)
    assert done.returncode == 0, done.stderr
    receipt, grown = json.loads(done.stdout), checkpoint.load(ckpt.with_name("ckpt-x2.pt"))
    assert receipt["learned"][0]["steps"] == 3 and receipt["loss_before"] > 0 and receipt["loss_after"] > 0
    before = checkpoint.load(ckpt)["cursor"]
    assert grown["cursor"]["tokens"] == before["tokens"] + 3 * 256 and grown["cursor"]["samples"] == before["samples"] + 24
    assert grown["cursor"]["flops"] > before["flops"]
    base.good("learned", "--stages.1.growth.op", "learn", "--stages.1.growth.learn_steps", "3", "--keep", "20")
    live = next(r["growth"] for r in records(base.folder / "learned") if "growth" in r)
    assert live["learned"][0] == pytest.approx(receipt["learned"][0], rel=1e-5), "the same batches as in a run"


def test_dry_run_says_what_would_happen_and_writes_nothing(ckpt):
    before = {file.name: file.read_bytes() for file in ckpt.parent.iterdir()}
    said = json.loads(grow(ckpt, "--op", "insert", "--dry_run", "--json").stdout)
    assert said["layers"] == [0, 0, 1, 1] and said["rules"] == ["kept", "zeroed"] * 2 and said["rc"] == 0.333333
    assert {file.name: file.read_bytes() for file in ckpt.parent.iterdir()} == before
    receipt = json.loads(grow(ckpt, "--op", "insert", "--json").stdout)
    assert receipt["n_params"] == said["n_params"] and receipt["rules"] == said["rules"]


def test_device_that_is_too_small_is_told_before_anything_is_touched(ckpt, monkeypatch):
    import grow as script
    from nanostack import device

    monkeypatch.setattr(device, "free_bytes", lambda device: 1000.0)
    monkeypatch.setattr(script, "free_bytes", lambda device: 1000.0)
    assert script.main(script.Command(ckpt, dry_run=True))["bytes_free"] == 1000
    with pytest.raises(ValueError, match=r"growing needs 0.00 GiB on cpu, which has 0.00 GiB free"):
        script.main(script.Command(ckpt))
    assert not ckpt.with_name("ckpt-x4.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_write_leaves_the_source_intact_and_no_half_checkpoint(ckpt, number):
    before, out = ckpt.read_bytes(), ckpt.with_name("ckpt-x64.pt")
    for _ in range(10):  # on a busy machine the write can be over before the signal is sent
        process = start_python(ROOT / "grow.py", ckpt, "--g", "64", "--optimizer", "copy")
        partial = ckpt.with_name(f"ckpt-x64.pt.{socket.gethostname()}.{process.pid}.partial")
        while not partial.exists():
            assert process.poll() is None, process.done().stderr
            time.sleep(0.0005)
        process.send_signal(number)
        done = process.done()
        said = done.stderr
        assert ckpt.read_bytes() == before
        if not out.exists():
            break
        out.unlink()
    else:
        pytest.fail("it was never killed in time")
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert said.endswith("error: interrupted\n") and "Traceback" not in said and not partial.exists()
    assert grow(ckpt, "--g", "64").returncode == 0 and checkpoint.load(out)["config"]["n_layer"] == 128
    assert not partial.exists()


def test_default_factor_is_4(ckpt):
    assert grow(ckpt).returncode == 0
    assert checkpoint.load(ckpt.with_name("ckpt-x4.pt"))["config"]["n_layer"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--g", "1"), "g must be a whole number of 2 or more, not 1"),
        (("--g", "two"), "two"),
        (("--g", "2", "--layers", "0-1*2"), "g and layers exclude each other"),
        (("--layers", "0-5"), "names layer 2, but the model has layers 0 to 1"),
        (("--layers", "nonsense"), "bad layer list 'nonsense'"),
        (("--op", "sideways"), "sideways"),
        (("--device", "cuda:7"), "cuda:7"),
        (("--out", "/dev/null/x.pt"), "could not save"),
        (("--op", "learn"), "give it prepared text, --data"),
        (("--d_model", "128"), "d_model belongs to a growth in width"),
        (("--width", "split", "--d_model", "100"), "d_model 100 is not a whole number of heads of 16 channels"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_leave_everything_as_it_was(ckpt, arguments, message):
    before = {file.name: file.read_bytes() for file in ckpt.parent.iterdir()}
    done = grow(ckpt, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert {file.name: file.read_bytes() for file in ckpt.parent.iterdir()} == before


def test_existing_output_and_the_base_itself_are_not_overwritten(ckpt):
    assert grow(ckpt, "--g", "2").returncode == 0
    done = grow(ckpt, "--g", "2")
    assert done.returncode == 2 and "exists already" in done.stderr
    assert grow(ckpt, "--g", "2", "--overwrite").returncode == 0
    done = grow(ckpt, "--g", "2", "--out", ckpt, "--overwrite")
    assert done.returncode == 2 and "is the checkpoint to grow" in done.stderr


def test_damaged_or_missing_checkpoint_is_named(ckpt, tmp_path):
    done = grow(tmp_path / "nowhere.pt")
    assert done.returncode == 2 and "there is no checkpoint" in done.stderr
    raw = bytearray(ckpt.read_bytes())
    raw[len(raw) // 2] ^= 4
    ckpt.write_bytes(raw)
    done = grow(ckpt, "--g", "2")
    assert done.returncode == 2 and "damaged" in done.stderr and not ckpt.with_name("ckpt-x2.pt").exists()
