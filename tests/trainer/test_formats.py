"""Files that an earlier version wrote, before the package had wings: commit 21520ac, tests/data/before_the_wings/."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, python, records

from nanostack import checkpoint, models
from nanostack.device import choose_device
from nanostack.growth import Receipt
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement

OLD = ROOT / "tests/data/before_the_wings"


def test_checkpoint_in_the_middle_of_a_ramp_is_restored():
    saved = models.read(OLD / "run/ckpt-64.pt")
    state = models.restore(saved, Placement(choose_device("cpu")), optimizer=True)
    receipt = state.growth[0]
    assert (receipt.op, receipt["op"], receipt.rules, receipt.ramp_tokens) == ("random", "random", ["kept", "random"], 768)
    assert state.model.ramp.item() == pytest.approx(512 / 768)
    packed = checkpoint.pack(state, saved["manifest_sha256"])
    assert packed is not None
    for name in ("cursor", "seed", "format"):
        assert packed[name] == saved[name]
    assert LlamaConfig(**packed["config"]) == LlamaConfig(**saved["config"]), "which has fewer fields"
    assert [Receipt.of(one) for one in packed["growth"]] == [Receipt.of(one) for one in saved["growth"]]
    for name, tensor in saved["model"].items():
        assert torch.equal(packed["model"][name], tensor)
        assert all(torch.equal(packed["optimizer"][name][key], value) for key, value in saved["optimizer"][name].items())


def test_run_goes_on_to_the_losses_that_it_had(tmp_path):
    """Its text, its checkpoint and its records are read. Its losses are those of another machine: they agree to rounding."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    shutil.copytree(OLD / "text", tmp_path / "text")
    done = python("train.py", OLD / "config.py", "--data.path", tmp_path / "text", "--out", tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    old, new = records(OLD / "run"), records(tmp_path / "run")
    assert [(r["step"], r["tokens"], r["flops"]) for r in new] == [(r["step"], r["tokens"], r["flops"]) for r in old]
    losses = [[r[name] or 0.0 for r in found for name in ("loss", "val_loss")] for found in (new, old)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(old) > 20
    header = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert header["config"]["optim"]["weight_decay"] == header["before"][0]["config"]["optim"]["decay"] == 0.1
