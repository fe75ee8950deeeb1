"""The trainer as a user meets it: real processes, real files, real signals."""

import json
import os
import signal

import pytest
import torch
from conftest import TINY, assert_same_state, records, run_in_process
from torch.distributed import TCPStore

import train
from nanostack import checkpoint, device
from nanostack.config import Growth, Optim, load
from nanostack.flops import flops_per_token
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """An uninterrupted run to compare with."""
    from conftest import Trainer

    return Trainer(corpus, tmp_path_factory.mktemp("finished")).good("run")


def test_loss_falls_through_both_stages_and_growth_is_recorded(finished):
    found = records(finished)
    assert [record["step"] for record in found if record["loss"]] == list(range(1, 25))
    losses = [record["loss"] for record in found if record["loss"]]
    assert losses[11] < losses[0] - 0.5 and losses[23] < losses[11]
    growth = next(record for record in found if "growth" in record)
    assert growth["stage"] == 1 and growth["step"] == 12
    receipt = growth["growth"]
    assert receipt["layers"] == [0, 1, 0, 1] and receipt["op"] == "stack" and receipt["g"] == 2
    assert receipt["loss_before"] == next(r["val_loss"] for r in found if r["step"] == 12) != receipt["loss_after"]
    header = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert header.keys() >= {"config_sha256", "manifest_sha256", "git_commit", "versions", "device", "world_size"}


def test_ledger_counts_the_base_and_every_trained_token(finished):
    from nanostack.flops import flops_exact_per_token

    cursor = checkpoint.load(finished / "ckpt.pt")["cursor"]
    base, grown = (LlamaConfig(n, 4, 2, 64, 96, 384, 32) for n in (2, 4))
    assert cursor["tokens"] == 24 * 256 and cursor["samples"] == 24 * 8
    assert cursor["flops"] == 12 * 256 * (flops_per_token(base) + flops_per_token(grown))
    assert cursor["flops_exact"] == 12 * 256 * (flops_exact_per_token(base) + flops_exact_per_token(grown))


def test_validation_loss_per_byte_is_the_loss_per_token_in_other_units(finished, corpus):
    import numpy as np

    from nanostack.text.dataset import Tokens

    val = Tokens(corpus, "val", 32)
    text_bytes = val.token_bytes[val.blocks(0, 32)[:, 1:]].sum()
    for record in records(finished):
        if record["val_loss"]:
            assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] * 1024 / np.log(2) / text_bytes, rel=1e-9)


def test_run_is_deterministic(trainer, finished):
    again = trainer.good("again")
    assert records(again) == records(finished)
    assert_same_state(checkpoint.load(again / "ckpt.pt"), checkpoint.load(finished / "ckpt.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first_record", "between_checkpoints", "after_growth", "while_saving", "first_partial"])
def test_resume_after_kill_equals_uninterrupted_run(trainer, finished, moment):
    out = trainer.folder / "run"

    def lines() -> int:
        file = out / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    reached = {
        "first_record": lambda: lines() >= 2,
        "between_checkpoints": lambda: lines() >= 8,
        "after_growth": lambda: lines() >= 17,
        "while_saving": lambda: lines() >= 12 and any(out.glob("*.partial")),
        "first_partial": lambda: any(out.glob("*.partial")),
    }[moment]
    trainer.kill_when(trainer.start("run"), reached)
    assert lines() < 26, "the run was not interrupted"
    trainer.good("run", "--resume")
    assert records(out) == records(finished)
    assert_same_state(checkpoint.load(out / "ckpt.pt"), checkpoint.load(finished / "ckpt.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_exits_cleanly_and_resume_goes_on_exactly(trainer, finished, number):
    out = trainer.folder / "run"
    process = trainer.start("run", "--save_interval", "1000000")
    assert trainer.kill_when(process, lambda: (out / "metrics.jsonl").exists(), number)
    said = process.stdout.read()
    assert process.returncode == 128 + number and "stopped by a signal" in said, said
    assert checkpoint.load(out / "ckpt.pt")["cursor"]["samples"] < 192
    trainer.good("run", "--resume")
    assert records(out) == records(finished)
    assert_same_state(checkpoint.load(out / "ckpt.pt"), checkpoint.load(finished / "ckpt.pt"))


def test_restart_by_torchrun_resumes_and_never_wipes(trainer, finished):
    """A second attempt of one launch, whose command says --overwrite: they share the store."""
    out = trainer.folder / "run"
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    launch |= {"MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    trainer.kill_when(trainer.start("run", "--overwrite", env=launch), lambda: (out / "ckpt.pt").exists())
    trainer.good("run", "--overwrite", env=launch)
    assert records(out) == records(finished)
    assert_same_state(checkpoint.load(out / "ckpt.pt"), checkpoint.load(finished / "ckpt.pt"))


def test_model_too_large_for_the_device_is_refused_before_anything_is_touched(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "free_bytes", lambda device: 2e6)
    with pytest.raises(ValueError, match=r"the largest stage, weights, gradients and moments, needs 0.00 GiB on cpu"):
        run_in_process(corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    state = State.create(load(TINY, ["--model.vocab_size", "64"]).model, Optim(), Placement(torch.device("cpu")), seed=0)
    monkeypatch.setattr(device, "free_bytes", lambda device: 1e3)
    with pytest.raises(ValueError, match=r"growing needs 0.00 GiB on cpu"):
        state.grow(Growth("stack", 2))
    assert len(state.model.blocks) == 2


def test_resume_without_ckpt_goes_on_from_the_newest_numbered_one_and_deletes_nothing(trainer, finished):
    out = trainer.good("run")
    for name in ("ckpt.pt", "metrics.jsonl"):
        (out / name).unlink()
    assert "ckpt-160.pt" in trainer("run", "--resume").stdout
    assert_same_state(checkpoint.load(out / "ckpt.pt"), checkpoint.load(finished / "ckpt.pt"))
    assert records(out) == records(finished)[-4:] and "config_sha256" in (out / "metrics.jsonl").read_text()


def test_stage_made_shorter_on_resume_ends_at_once_and_the_next_is_whole(trainer):
    out = trainer.good("run", "--stages.0.tokens", "2048", "--stages.1.tokens", "512")
    (out / "ckpt.pt").unlink()
    planned = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    trainer.good("run", "--resume_anyway", "--stages.0.tokens", "1024", "--stages.1.tokens", "1024")
    assert checkpoint.load(out / "ckpt.pt")["cursor"]["tokens"] == 2048 + 1024
    header = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert header["before"] == [planned] and header["config_sha256"] != planned["config_sha256"]


def test_resuming_a_finished_run_changes_nothing(trainer):
    out = trainer.good("run")
    before = (out / "metrics.jsonl").read_text(), (out / "ckpt.pt").read_bytes()
    trainer.good("run", "--resume")
    assert ((out / "metrics.jsonl").read_text(), (out / "ckpt.pt").read_bytes()) == before


def test_only_the_last_checkpoints_are_kept_and_are_whole(finished):
    assert sorted(file.name for file in finished.glob("ckpt*")) == ["ckpt-160.pt", "ckpt.pt"]
    for file, samples in (("ckpt-160.pt", 160), ("ckpt.pt", 192)):
        assert checkpoint.load(finished / file)["cursor"]["samples"] == samples


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("on_the_cpu")
def test_accumulation_gives_the_losses_of_one_large_batch(corpus, tmp_path):
    whole = run_in_process(corpus, tmp_path / "whole", "--micro_batch", "8")
    parts = run_in_process(corpus, tmp_path / "parts", "--micro_batch", "2")
    assert parts.micro_step.micro_steps == 4 and whole.micro_step.micro_steps == 1
    whole, parts = ([r["loss"] or r["val_loss"] for r in records(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_no_loss(corpus, tmp_path, how, dtype):
    run_in_process(corpus, tmp_path / "plain", "--dtype", dtype)
    run_in_process(corpus, tmp_path / "checkpointed", "--dtype", dtype, "--parallel.activation_checkpointing", how)
    for a, b in zip(records(tmp_path / "plain"), records(tmp_path / "checkpointed"), strict=True):
        assert a["loss"] == b["loss"] and a["val_loss"] == b["val_loss"]


class Poison:
    """A model whose loss is not finite in chosen micro-batches."""

    def __init__(self, run: train.Run, bad_steps: set[int]):
        self.run, self.bad, self.calls = run, bad_steps, 0
        run.state.model.register_forward_hook(self)

    def __call__(self, model, arguments, output):
        if torch.is_grad_enabled():
            self.calls += 1
            return output * float("nan") if (self.calls - 1) // self.run.micro_step.micro_steps + 1 in self.bad else output


@pytest.mark.usefixtures("on_the_cpu")
def test_non_finite_step_never_reaches_weights_or_moments(corpus, tmp_path):
    run = train.Run(load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "run"), "--stages.0.tokens", "1024"]))
    before = {}

    def remember(optimizer, *_):
        before.setdefault(run.recorder.step + 1, [p.detach().clone() for p in run.state.model.parameters()])

    run.state.optimizer.register_step_pre_hook(remember)
    Poison(run, {3})
    run.train()
    for old, new in zip(before[3], before[4], strict=True):
        assert torch.equal(old, new)
    assert any(not torch.equal(old, new) for old, new in zip(before[2], before[3], strict=True))
    steps = {int(state["step"]) for state in run.state.optimizer.state.values()}
    assert steps == {12} and all(p.isfinite().all() for p in run.state.model.parameters())


@pytest.mark.usefixtures("on_the_cpu")
def test_several_non_finite_steps_in_a_row_end_the_run_and_name_the_samples(corpus, tmp_path):
    run = train.Run(load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "run")]))
    Poison(run, set(range(4, 100)))
    with pytest.raises(ValueError, match="in samples 24 to 63"):
        run.train()
    assert all(p.isfinite().all() for p in run.state.model.parameters())


def test_init_from_carries_weights_cursor_and_ledger(trainer, finished):
    out = trainer.good(
        "next", "--model.n_layer", "4", "--init_from", str(finished / "ckpt.pt"), "--stages.0.warmup_tokens", "0"
    )
    first = records(out)[0]
    before = checkpoint.load(finished / "ckpt.pt")
    assert first["samples"] == before["cursor"]["samples"] + 8
    assert first["flops"] > before["cursor"]["flops"]
    assert first["loss"] < 4.5  # a fresh model is at ln 384 = 5.95
    assert checkpoint.load(out / "ckpt.pt")["growth"][0] == before["growth"][0]


def test_profile_writes_a_trace(trainer):
    """The trace has as many steps as the run, which has fewer than were asked for."""
    out = trainer.good("run", "--profile", "20", "--stages.0.tokens", "2048", "--stages.1.tokens", "512")
    assert any("linear" in event.get("name", "") for event in json.loads((out / "trace.json").read_text())["traceEvents"])


CHECKPOINTING = [("--parallel.activation_checkpointing", how) for how in ("selective", "full")]


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("options", [(), *CHECKPOINTING, ("--stages.1.growth.op", "zero")])
def test_compiled_blocks_give_the_losses_of_eager_and_growth_compiles_no_new_graph(corpus, tmp_path, finished, options):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    run = train.Run(load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "run"), "--compile", *options]))
    graphs = []
    grow = run.state.grow
    run.state.grow = lambda *how: (graphs.append(counters["stats"]["unique_graphs"]), grow(*how))[1]
    run.train()
    assert graphs[0] > 0 and counters["stats"]["unique_graphs"] == graphs[0]
    if "zero" in options:
        assert run.state.growth[0]["max_logit_change"] < 1e-5
        return
    expected = [r["loss"] and pytest.approx(r["loss"], rel=1e-4) for r in records(finished)]
    assert [r["loss"] for r in records(tmp_path / "run")] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_compiled_blocks_see_a_ramp_come_and_go(corpus, tmp_path):
    """torch.compile by default does not look whether a module has got or lost a hook since it was compiled."""
    changes = ["--data.path", str(corpus), "--stages.1.growth.op", "random", "--stages.1.growth.ramp_tokens", "1024"]
    torch._dynamo.reset()
    for name, compile in (("eager", ()), ("compiled", ("--compile",))):
        train.Run(load(TINY, [*changes, *compile, "--out", str(tmp_path / name)])).train()
    eager, compiled = (records(tmp_path / name) for name in ("eager", "compiled"))
    assert [r["loss"] for r in compiled] == [r["loss"] and pytest.approx(r["loss"], rel=1e-4) for r in eager]


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_run_through_triton_follows_the_torch_path_and_resumes(trainer):
    heads = ("--model.n_head", "2", "--model.n_kv_head", "1", "--dtype", "bfloat16")
    device = {"env": {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}}
    plain = records(trainer.good("torch", *heads, "--kernels", "torch", **device))
    triton = records(trainer.good("triton", *heads, "--kernels", "triton", **device))
    assert [r["loss"] for r in triton] == [r["loss"] and pytest.approx(r["loss"], rel=2e-2) for r in plain]
    (trainer.folder / "triton" / "ckpt.pt").unlink()
    resumed = records(trainer.good("triton", *heads, "--kernels", "triton", "--resume", **device))
    assert [r["loss"] for r in resumed] == [r["loss"] and pytest.approx(r["loss"], rel=1e-3) for r in triton]
