"""Growth in the midst of a run: every operator, several in a row, ramps, and what a resume after them gives."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_same_state, records, run_in_process

import train
from nanostack import checkpoint, growth, kept
from nanostack.config import Growth, Optim, Stage, grow, load
from nanostack.flops import flops_per_token
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State

CONTINUES = ("--stages.1.continues", "--stages.1.lr", "0", "--stages.1.min_lr", "0", "--stages.1.warmup_tokens", "0")


WIDER = ("--stages.1.growth.d_model", "96", "--stages.1.growth.n_kv_head", "3")
MUON = ("--optim.name", "muon", "--optim.moments", "bfloat16")
NO_DEPTH = ("--stages.1.growth.op", "None", "--stages.1.growth.g", "None")
OPERATORS = {
    "random": ("--stages.1.growth.ramp_tokens", "2048", "--stages.1.growth.optimizer", "copy"),
    "zero": ("--stages.1.growth.moments_old", "keep", *MUON),
    "insert": ("--stages.1.growth.g", "None", "--stages.1.freeze"),
    "interleave": ("--stages.1.growth.noise", "0.2"),
    "stack": ("--stages.1.rewarm_tokens", "1024"),
    "middle": ("--stages.1.growth.g", "None", "--stages.1.growth.k", "2", *CONTINUES),
    "learn": ("--stages.1.growth.learn_steps", "4"),
    "width split": (*NO_DEPTH, *WIDER, "--stages.1.growth.alpha", "0.7", "--stages.1.growth.optimizer", "copy", *MUON),
    "width random": (*WIDER, "--stages.1.growth.ramp_tokens", "2048", "--stages.1.growth.op", "zero"),
    "width learn": (*NO_DEPTH, *WIDER, "--stages.1.growth.learn_steps", "4"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_grow_live_and_resume_exactly(trainer, name):
    """Also from the middle of a ramp: the checkpoint after 16 of 24 steps is half-way through that of what is random."""
    kind, op = name.split() if " " in name else ("op", name)
    options = (f"--stages.1.growth.{kind}", op, *OPERATORS[name], "--keep", "9")
    out = trainer.good("run", *options)
    found, whole = records(out), checkpoint.load(out / "ckpt.pt")
    receipt = next(record["growth"] for record in found if "growth" in record)
    assert (receipt["width"] or {}).get("op") == op if kind == "width" else receipt["op"] == op
    assert whole["config"]["n_layer"] == (2 if NO_DEPTH[0] in options and receipt["op"] is None else 4)
    assert whole["config"]["d_model"] == (96 if kind == "width" else 64)
    if name in ("random", "zero", "insert", "width random"):
        assert receipt["max_logit_change"] < 1e-5
        assert receipt["loss_after"] == pytest.approx(receipt["loss_before"], rel=1e-6)
    assert [r["loss"] for r in found if r["loss"]][-1] < receipt["loss_before"]
    if CONTINUES[0] in options:
        assert {r["lr"] for r in found if r["lr"] and r["step"] > 2} == {1e-2}
    if "--stages.1.freeze" in options:
        base, grown = (checkpoint.load(out / name)["model"] for name in ("ckpt-96.pt", "ckpt.pt"))
        same = {name for name in grown if name in base and torch.equal(grown[name], base[name])}
        assert {"embed.weight", "head.weight", "norm.weight", "blocks.0.attn.qkv.weight"} <= same
        assert not torch.equal(grown["blocks.1.mlp.down.weight"], torch.zeros(64, 96))
    learned = 4 * 256 if op == "learn" else 0
    assert whole["cursor"]["tokens"] == 24 * 256 + learned and whole["cursor"]["stage_tokens"] == 12 * 256
    before_growth = [r for r in found if r["stage"] == 0][-1]
    shape = LlamaConfig(**whole["config"])
    assert whole["cursor"]["flops"] == before_growth["flops"] + flops_per_token(shape) * (12 * 256 + learned)
    for file in (*kept.numbered_checkpoints(out / "ckpt.pt")[-1:], out / "ckpt.pt"):
        file.unlink()
    trainer.good("run", *options, "--resume")
    assert records(out) == found
    assert_same_state(checkpoint.load(out / "ckpt.pt"), whole)


def test_several_growths_in_one_run_each_in_place(corpus, tmp_path):
    """Stack, then insert, then width and a ramp in depth: every growth starts from what the last one trained."""
    first = load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "run"), "--keep", "20", "--eval_interval", "99999"])
    more = [
        grow("insert", k=2, tokens=1024, lr=2e-3, warmup_tokens=256),
        grow("random", g=2, width="zero", d_model=80, n_kv_head=5, d_ff=100, tokens=1024, lr=2e-3, ramp_tokens=512),
    ]
    stages = tuple(replace(stage, tokens=1024) for stage in first.stages)
    with pytest.raises(ValueError, match=r"stages.3.growth: 5 key/value heads for 5 leave no place"):
        replace(first, stages=(*stages, *more))
    more[1] = replace(more[1], growth=replace(more[1].growth, d_model=96, n_kv_head=3))
    run = train.Run(replace(first, stages=(*stages, *more)))
    addresses = {}

    def remember(how, probe, gradients, grow=run.state.grow):
        before = {p.data_ptr() for p in run.state.model.parameters()}
        receipt = grow(how, probe, gradients)
        addresses[len(run.state.growth)] = before, {p.data_ptr() for p in run.state.model.parameters()}
        return receipt

    run.state.grow = remember
    run.train()
    assert [len(r["layers"]) for r in run.state.growth] == [4, 6, 12] and run.state.model.config.d_model == 96
    assert all(before <= after for before, after in (addresses[1], addresses[2]))
    assert [r["tokens"] for r in run.state.growth] == [1024, 2048, 3072]
    assert max(r["max_logit_change"] for r in run.state.growth[1:]) < 1e-5
    losses = [r["loss"] for r in records(tmp_path / "run") if r["loss"]]
    assert len(losses) == 16 and losses[-1] < losses[0] - 0.5


def test_a_ramp_as_long_as_its_stage_is_over_when_the_next_growth_comes():
    """The last step of the stage begins before the end of the ramp, and no step comes after it."""
    model = LlamaConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, vocab_size=32, seq_len=8)
    state = State.create(model, Optim(), Placement(torch.device("cpu")), seed=0)
    state.grow(Growth("random", 2, ramp_tokens=16))
    state.cursor.advance(1, state.model.config)
    with pytest.raises(ValueError, match="still being ramped in"):
        state.grow(Growth("stack", 2))
    state.cursor.advance(1, state.model.config)
    state.grow(Growth("stack", 2))
    assert [len(receipt["layers"]) for receipt in state.growth] == [2, 4] and state.model.ramp is None


def test_checkpoint_in_a_ramp_is_refused_by_a_run_that_grows_before_its_end(corpus, tmp_path):
    """The run is refused before anything is deleted or trained, and so is one that freezes a checkpoint which never grew."""
    growing = ("--stages.1.growth.op", "random", "--stages.1.tokens", "1024", "--stages.1.growth.ramp_tokens", "4096")
    run_in_process(corpus, tmp_path / "base", *growing, "--stages.0.tokens", "1024", "--keep", "9")
    ckpt = tmp_path / "base/ckpt.pt"
    held = checkpoint.load(ckpt)["cursor"]["tokens"]
    again = ("--init_from", str(ckpt), "--model.n_layer", "4", "--out", str(tmp_path / "base"), "--overwrite")
    with pytest.raises(ValueError, match=r"is still ramping in its last growth, for 3072 tokens; stage 1 grows after 1024"):
        run_in_process(corpus, tmp_path / "base", *again, "--stages.0.tokens", "1024")
    never = ("--init_from", str(tmp_path / "base/ckpt-32.pt"), "--stages.0.freeze", "--out", str(tmp_path / "next"))
    with pytest.raises(ValueError, match=r"freeze trains new layers only, and .*ckpt-32.pt has none"):
        run_in_process(corpus, tmp_path / "next", *never)
    assert checkpoint.load(ckpt)["cursor"]["tokens"] == held == 2048
    run = run_in_process(corpus, tmp_path / "next", *again[:4], "--stages.0.tokens", "4096", "--stages.0.freeze")
    assert run.state.growth[0]["ramp_tokens"] == 4096 and len(run.state.growth) == 2


def test_resume_from_the_end_of_a_ramp_and_its_stage_is_exact(corpus, tmp_path):
    """The next growth looks at the loss of what the ramp has become, not of what it was in the last step."""
    first = load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "run"), "--keep", "20"])
    ramped = grow("random", g=2, tokens=1024, lr=2e-3, ramp_tokens=1024)
    config = replace(first, stages=(Stage(1024, lr=5e-3), ramped, grow("zero", g=2, tokens=512, lr=2e-3)))
    train.Run(config).train()
    found, ckpt = records(tmp_path / "run"), tmp_path / "run/ckpt.pt"
    whole = checkpoint.load(ckpt)
    for file in [ckpt, *kept.numbered_checkpoints(ckpt)]:
        if file.name != "ckpt-64.pt":
            file.unlink()
    train.Run(replace(config, resume=True)).train()
    assert records(tmp_path / "run") == found
    assert_same_state(checkpoint.load(ckpt), whole)


def test_resume_after_a_stage_that_re_warmed_its_new_layers_is_exact(corpus, tmp_path):
    """Norms are sums over the optimizer's groups, whose order is the model's again when the new layers have come home."""
    options = ["--data.path", str(corpus), "--out", str(tmp_path / "run"), "--keep", "20", "--save_interval", "512"]
    rewarmed = grow("stack", g=2, tokens=1024, lr=5e-3, rewarm_tokens=256, optimizer="copy")
    stages = (Stage(512, lr=5e-3), rewarmed, Stage(4096, lr=5e-3))
    config = replace(load(TINY, [*options, "--optim.grad_clip", "0.1"]), stages=stages)
    train.Run(config).train()
    found, ckpt = records(tmp_path / "run"), tmp_path / "run/ckpt.pt"
    whole = checkpoint.load(ckpt)
    for file in [ckpt, *kept.numbered_checkpoints(ckpt)]:
        if kept.samples_of(file) > (512 + 1024 + 512) // 32:
            file.unlink()
    train.Run(replace(config, resume=True)).train()
    assert records(tmp_path / "run") == found
    assert_same_state(checkpoint.load(ckpt), whole)


def test_each_growth_draws_something_else():
    """Two at the same place in a run, and the same growth in runs of two seeds."""
    noises = []
    for seed in (0, 1):
        model = LlamaConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, vocab_size=32, seq_len=8)
        state = State.create(model, Optim(), Placement(torch.device("cpu")), seed=seed)
        for _ in range(2):
            before = 0.5 * state.model.embed.weight.detach()
            state.grow(Growth("stack", 2, noise=0.5))
            noises.append((state.model.embed.weight.detach() - before).flatten())
    assert torch.corrcoef(torch.stack(noises)).fill_diagonal_(0).abs().max() < 0.2


def test_parameters_that_stay_dead_after_growth_are_named(trainer, monkeypatch, tmp_path, corpus):
    """Here because the ramp holds the new layers at zero for good; no operator does that."""
    monkeypatch.setattr(growth, "set_ramp", lambda model, scale: None)
    changes = ["--stages.1.growth.op", "random", "--stages.1.tokens", "1024", "--data.path", str(corpus)]
    run = train.Run(load(TINY, [*changes, "--out", str(tmp_path / "run")]))
    said = []
    monkeypatch.setattr(run.recorder, "say", said.append)
    run.train()
    (warning,) = (line for line in said if line.startswith("warning: in the second step after growth"))
    assert "blocks.2.attn.qkv.weight" in warning and "blocks.1." not in warning
