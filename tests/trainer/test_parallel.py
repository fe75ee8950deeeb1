"""One process against two: the same losses, the same growth. gloo stands for nccl."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, ranks, records
from sharded_growth import CONFIG, gradients, train

from nanostack import checkpoint
from nanostack.config import Growth, Optim, Parallel
from nanostack.parallel import Placement, mesh_shape
from nanostack.state import State

MESHES = {"data_parallel": ("--parallel.dp_shard", "1"), "fully_sharded": ("--parallel.dp_replicate", "1")}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_give_the_losses_of_one_growth_included(trainer, mesh):
    small = ("--micro_batch", "2")  # so that both add up gradients of several in a step
    one, two = trainer.good("one", *small), trainer.good("two", *small, *MESHES[mesh], processes=2)
    a, b = records(one), records(two)
    for name in ("loss", "val_loss", "val_bits_per_byte", "grad_norm"):
        expected = [r[name] and pytest.approx(r[name], rel=1e-5) for r in a]
        assert [r[name] for r in b] == expected
    assert [(r["samples"], r["flops"], r["stage"]) for r in a] == [(r["samples"], r["flops"], r["stage"]) for r in b]


@pytest.mark.distributed
@pytest.mark.slow
def test_run_of_two_processes_goes_on_as_one(trainer):
    trainer.good("whole")
    out = trainer.good("parts", "--stages.1.tokens", "256", "--stages.1.warmup_tokens", "0", processes=2)
    first, second = records(trainer.folder / "whole"), records(out)
    assert len(second) < len(first)
    # The first stage was whole; go on from its end on one process, where the growth still lies ahead.
    trainer.good("parts", "--resume_from", str(out / "ckpt-96"))
    expected = [r["loss"] and pytest.approx(r["loss"], rel=1e-5) for r in first]
    assert [r["loss"] for r in records(out)] == expected


UNTIL = """
import json, os, signal, sys, torch, train
from nanostack import parallel
from nanostack.config import load
until, to, *options = sys.argv[1:]
run = train.Run(load(*options[:1], options[1:]))
def note(_, inputs):
    step = run.recorder.step + 1
    if not torch.is_grad_enabled() or step > int(until):
        return
    with open(f"{to}.{parallel.rank()}", "a") as file:
        print(json.dumps([step, inputs[0].tolist()]), file=file)
    if step == int(until):
        os.kill(os.getpid(), signal.SIGTERM)
run.state.model.register_forward_pre_hook(note)
run.train()
parallel.leave(run.stop.exit_code)
"""


def by_step(folder, name: str) -> dict[int, list]:
    """Which samples all ranks together saw in each step."""
    seen = collections.defaultdict(list)
    for path in folder.glob(f"{name}.samples.*"):
        for step, rows in map(json.loads, path.read_text().splitlines()):
            seen[step] += rows
    return {step: sorted(rows) for step, rows in sorted(seen.items())}


@pytest.mark.distributed
@pytest.mark.slow
def test_number_of_ranks_may_change_at_every_resume(trainer):
    """1, 2, 4, 3 ranks and 1 again, with a growth among 4: every step has the same samples, and its loss but for rounding."""
    options = (TINY, "--data.path", trainer.corpus, "--batch_tokens", 12 * 32, "--micro_batch", 1, "--log_interval", 12 * 32)

    def samples(name: str, number: int, until: int, *more: str) -> None:
        out = trainer.folder / name
        done = ranks("-c", UNTIL, until, f"{out}.samples", *options, "--out", out, *more, number=number)
        assert done.returncode == (0 if until == 99 else 143), done.stdout + done.stderr

    samples("whole", 1, 99)
    for number, until in ((1, 3), (2, 6), (4, 10), (3, 13), (1, 99)):
        samples("changed", number, until, *(() if until == 3 else ("--resume",)))
    of_whole, of_changed = (by_step(trainer.folder, name) for name in ("whole", "changed"))
    assert list(map(len, of_whole.values())) == [12] * 16 and of_whole == of_changed
    whole, changed = (records(trainer.folder / name) for name in ("whole", "changed"))
    assert [record["step"] for record in whole] == [record["step"] for record in changed]
    for name in ("loss", "grad_norm", "val_loss"):
        assert [r[name] for r in changed] == [r[name] and pytest.approx(r[name], rel=1e-5) for r in whole]


QWEN3 = {"d_head": 12, "qk_norm": True, "qkv_bias": True, "out_bias": True}
ZERO = {"op": "zero", "g": 3, "moments_old": "keep", "moments_new": "scale", "moments_factor": 0.5}
SHARDED = {  # how many shards, how it grows, by which optimizer it is trained, and its shape
    "stack": (2, {"g": 2, "optimizer": "copy"}, "adamw", {}),
    "muon stack": (2, {"g": 2, "optimizer": "copy"}, "muon", QWEN3),
    "noise": (1, {"g": 2, "optimizer": "reset", "noise": 0.2}, "adamw", {}),
    "muon noise": (1, {"op": "interleave", "g": 2, "moments_old": "keep", "noise": 0.2}, "muon", {}),
    "zero": (2, ZERO, "adamw", QWEN3 | {"mlp_bias": True}),
    "random": (2, {"op": "random", "g": 2, "moments_old": "keep", "ramp_tokens": 64}, "adamw", {}),
    "insert and freeze": (2, {"op": "insert", "optimizer": "copy"}, "adamw", {}),
    "learn": (2, {"op": "learn", "g": 2, "learn_steps": 3}, "adamw", QWEN3),
    "untie": (2, {"op": "untie", "optimizer": "copy"}, "muon", {"loops": 2, "residual_scale": 1.0}),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """All of them, one after the other, by two ranks that torchrun starts."""
    folder = tmp_path_factory.mktemp("sharded")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests/sharded_growth.py"), str(folder), json.dumps(SHARDED)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_growth_equals_growth_in_one_process(sharded, name):
    """Bit for bit, from the same base, but for what is learned: there sums are taken in another order. Also, inside the
    worker: base shards stay, no collective, one FSDP root, new blocks reshard."""
    _, how, optim, _ = SHARDED[name]
    base, grown = (checkpoint.load(sharded / f"{name} {stage}.pt") for stage in ("base", "grown"))
    state = State.restore(base, Optim(optim), Placement(torch.device("cpu")))
    receipt = state.grow(Growth(**how), gradients=lambda: gradients(state))
    model, optimizer = state.whole_tensors(lambda name, value: value)
    assert model.keys() == grown["model"].keys() and optimizer.keys() == grown["optimizer"].keys()
    if receipt["learned"]:
        for name, value in model.items():
            torch.testing.assert_close(value, grown["model"][name], rtol=1e-5, atol=1e-7)
        losses = [pytest.approx(receipt["learned"][0][name], rel=1e-5) for name in ("loss_first", "loss_last")]
        assert [grown["growth"][0]["learned"][0][name] for name in ("loss_first", "loss_last")] == losses
        return
    assert all(torch.equal(value, grown["model"][name]) for name, value in model.items())
    for name, moments in optimizer.items():
        assert all(torch.equal(value, grown["optimizer"][name][key]) for key, value in moments.items()), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_optimizer_makes_the_steps_of_one_process(sharded, name):
    """Two steps, from the same first values, in which no gradient is so small that rounding decides about its sign."""
    saved = checkpoint.load(sharded / f"{name} base.pt")
    _, _, optim, shape = SHARDED[name]
    state = State.create(replace(CONFIG, **shape), Optim(optim), Placement(torch.device("cpu")), seed=3)
    train(state, 2)
    model, optimizer = state.whole_tensors(lambda name, value: value)
    for name, value in model.items():
        torch.testing.assert_close(saved["model"][name], value, rtol=1e-4, atol=1e-5)
        assert optimizer[name].keys() == saved["optimizer"][name].keys()
        for key, moment in optimizer[name].items():
            torch.testing.assert_close(saved["optimizer"][name][key], moment, rtol=1e-3, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_mesh(trainer):
    few = ("--stages.0.tokens", "256", "--stages.0.lr", "1e-30", "--stages.0.warmup_tokens", "0")
    rest = ("--stages.1.tokens", "256", "--stages.1.lr", "1e-30", "--stages.1.min_lr", "0", "--stages.1.warmup_tokens", "0")
    states = [trainer.good(f"p{n}", *few, *rest, "--optim.weight_decay", "0", processes=n) for n in (0, 2)]
    a, b = (checkpoint.load(out / "ckpt.pt") for out in states)
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.distributed
@pytest.mark.slow
def test_signal_to_one_rank_stops_all_and_resume_goes_on(trainer):
    """Only one of the ranks is told; a second signal follows and does no harm."""
    out = trainer.folder / "run"
    long = ("--stages.0.tokens", "2560000")
    process = trainer.start("run", *long, processes=2)

    def ranks() -> list[int]:
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        return [int(pid) for pid in children.split()]

    def training() -> bool:
        return (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 3

    while not training():
        assert process.poll() is None, process.stdout.read()
    victim = ranks()[-1]
    os.kill(victim, signal.SIGTERM)
    os.kill(victim, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "stopped by a signal" in said and "exitcode  : 143" in said, said
    stopped_at = checkpoint.load(out / "ckpt.pt")["cursor"]["tokens"]
    assert 0 < stopped_at < 2560000
    trainer.good("run", "--stages.0.tokens", str(stopped_at + 512), "--resume", processes=2)


def with_restart(command: list[str]) -> list[str]:
    place = command.index("train.py")
    return [*command[:place], "--max_restarts=1", *command[place:]]


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_run_ends_as_if_nothing_had_happened(monkeypatch, trainer):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = trainer.folder / "run"
    command = with_restart(trainer.command("run", processes=2))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "ckpt.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert records(out) == records(trainer.good("whole", processes=2))


@pytest.mark.distributed
@pytest.mark.slow
def test_restart_does_not_adopt_a_run_that_the_first_attempt_was_refused(trainer):
    before = (trainer.good("run", "--stages.0.tokens", "1024") / "metrics.jsonl").read_text()
    command = with_restart(trainer.command("run", processes=2))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("holds a run already") >= 2
    assert (trainer.folder / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.distributed
@pytest.mark.slow
def test_mistake_is_told_once_by_rank_0(trainer):
    done = trainer("run", "--micro_batch", "3", processes=2, torchrun=True)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "nearest legal micro_batch: [2, 4]" in done.stderr
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]


@pytest.mark.distributed
def test_width_does_not_grow_on_several_ranks(trainer):
    done = trainer("run", "--stages.1.growth.width", "zero", "--stages.1.growth.d_ff", "128", processes=2)
    by_rank_0 = done.stderr.split("[rank1]")[0]  # the other may tell that rank 0 has gone
    assert done.returncode == 2 and by_rank_0.startswith("error: width grows on one device only"), done.stderr
    assert "Traceback" not in by_rank_0


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "shape"),
    [(None, None, 8, (1, 8)), (2, None, 8, (2, 4)), (None, 2, 8, (4, 2)), (8, 1, 8, (8, 1)), (None, None, 1, (1, 1))],
)
def test_mesh_takes_what_is_left(replicate, shard, world, shape):
    assert mesh_shape(Parallel(replicate, shard), world) == shape


@pytest.mark.parametrize(("replicate", "shard", "world"), [(3, None, 8), (2, 2, 8), (None, 16, 8), (0, None, 8)])
def test_mesh_that_does_not_fit_is_refused(replicate, shard, world):
    with pytest.raises(ValueError, match="number of processes"):
        mesh_shape(Parallel(replicate, shard), world)


@pytest.mark.gpu
def test_segments_of_a_run_can_grow():
    program = """if True:
        import torch
        from nanostack import parallel
        from nanostack.config import Parallel
        parallel.start(Parallel(), "auto", compile=False)
        x = torch.zeros(2**22, device="cuda")
        print([segment["is_expandable"] for segment in torch.cuda.memory._snapshot()["segments"]])
    """
    environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[True]", done.stdout + done.stderr
