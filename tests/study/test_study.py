"""Studies: the sweep of learning rates, what is refused, and one of seconds from end to end."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, python
from rich.console import Console

from nanostack.config import Growth
from nanostack.errors import UserError
from nanostack.model import LlamaConfig
from study.pace import kinds_of
from study.plan import Arm, Jump, Plan, Size, Study, planned_cost
from study.results import path_of, read_results, summarise
from study.runner import Runner, all_seeds, execute, tune

STUDY_WITH = """
from dataclasses import replace
from study.plan import Arm, Jump, Size, Study
from nanostack.config import Growth
from nanostack.model import LlamaConfig

JUMP = Jump(0.15, Growth("stack", 2))
MODEL = LlamaConfig(4, 2, 2, 32, 48, None, 32)
study = Study("bad", "?", {{{arms}}}, {{"cpu": (Size(MODEL, {budgets}, 256, 8, 512, "float32"),)}})
"""


class Losses:
    """Stands where the runs of a sweep would be made: a run is its arm and rate, its loss a function of the rate."""

    def __init__(self, loss):
        self.ran, self._loss = [], loss

    def run(self, jobs, what):
        self.ran += jobs

    def loss(self, job):
        return self._loss(job[2])


def test_sweep_is_widened_until_the_best_rate_lies_inside():
    def sweep(loss, lrs=(4e-3, 8e-3)):
        losses = Losses(loss)
        point = ("a", 1e12)
        return sorted(tune([point], lrs, (0, 1), lambda *job: [job], losses)[point]), losses

    assert sweep(lambda lr: abs(math.log(lr / 4e-3)))[0] == [2e-3, 4e-3, 8e-3]
    assert sweep(lambda lr: abs(math.log(lr / 1.5e-2)))[0] == [4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert sweep(lambda lr: math.inf if lr > 1e-2 else -lr)[0] == [4e-3, 8e-3, 1.6e-2], "a rate that diverges bounds it"
    assert sweep(lambda lr: lr, (4e-3,))[0] == [4e-3], "a single rate is taken as it is"
    with pytest.raises(ValueError, match="no best learning rate of arm a between"):
        sweep(lambda lr: -lr)


def test_rate_that_all_seeds_take_lies_inside_too():
    """The first seed is best at 8e-3; all together at 1.6e-2, the widest that was tried: 3.2e-2 is tried then."""
    best = {0: 8e-3, 1: 2e-2}
    ran = Losses(None)
    ran.loss = lambda job: abs(math.log(job[2] / best[job[3]])) * (1 + job[3])
    (tried,) = tune([("a", 1e12)], (8e-3, 1.6e-2), (0, 1), lambda *job: [job], ran).values()
    assert {lr: len(jobs) for lr, jobs in tried.items()} == {4e-3: 1, 8e-3: 2, 1.6e-2: 2, 3.2e-2: 1}


def test_every_budget_has_its_own_rate():
    """The best rate falls with the budget: each is widened for itself, and no more than it needs."""
    ran = Losses(lambda job: 0.0)
    ran.loss = lambda job: abs(math.log(job[2] / (4e-3 if job[1] < 1e12 else 1e-3)))
    sweep = tune([("a", 5e11), ("a", 2e12)], (4e-3, 8e-3), (0,), lambda *job: [job], ran)
    assert {point: sorted(tried) for point, tried in sweep.items()} == {
        ("a", 5e11): [2e-3, 4e-3, 8e-3],
        ("a", 2e12): [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
    }
    assert len(ran.ran) == 8


BAD = {
    "1 / 0": "is not a valid study: ZeroDivisionError",
    "study = 3": "has no variable `study`",
    STUDY_WITH.format(arms='"base": Arm("2", 2)', budgets="(2e9, 4e9)"): "needs an arm `scratch`",
    STUDY_WITH.format(arms='"scratch": Arm("4", 4)', budgets="(4e9, 2e9)"): "budgets that rise",
    STUDY_WITH.format(
        arms='"scratch": Arm("4", 4), "stack": Arm("", 2, (JUMP,))', budgets="(2e9, 4e9)"
    ): "no arm keeps for good",
    STUDY_WITH.format(arms='"scratch": Arm("8", 8), "base": Arm("2", 2), "stack": Arm("", 2, (JUMP,))', budgets="(2e9,)"): (
        "grows to 4 layers"
    ),
    STUDY_WITH.format(arms='"scratch": Arm("4", 4)', budgets="(2e7,)"): "2e+07 FLOPs have no room for a step of 4 that decays",
    STUDY_WITH.format(
        arms='"scratch": Arm("4", 4), "base": Arm("2", 2), "stack": Arm("", 2, (replace(JUMP, at=0.9),))', budgets="(2e9,)"
    ): "no room to train",
    STUDY_WITH.format(arms='"scratch": Arm("4", 4)', budgets="(2e9)"): "a Size has no valid budgets",
    STUDY_WITH.format(arms='"scratch": Arm("4", 4)', budgets="(-2e9, 2e9)"): "a Size has no valid budgets",
    STUDY_WITH.format(arms='"scratch": Arm("4", "4")', budgets="(2e9,)"): "arm '4' has no valid n_layer",
    STUDY_WITH.format(arms='"scratch": Arm("4", 4, (JUMP))', budgets="(2e9,)"): "arm '4' has no valid jumps",
    STUDY_WITH.format(arms='"scratch": Arm("4", 4)', budgets="(2e9,)"): "its base never grown, and an arm that grows",
    STUDY_WITH.format(
        arms='"scratch": Arm("4", 4), "base": Arm("2", 2), "stack": Arm("", 2, (replace(JUMP, at=0.001),))', budgets="(2e9,)"
    ): "2 layers have no room to warm up before 2e+06 FLOPs",
    "raise SystemExit": "is not a valid study: SystemExit",
}


@pytest.mark.parametrize("text", BAD, ids=BAD.values())
def test_study_that_cannot_be_is_refused_in_one_line(text, corpus, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    command = ["bench/speedup.py", tmp_path / "bad.py", "--data", corpus, "--size", "cpu"]
    done = python(*command, "--out", tmp_path, "--results", tmp_path)
    assert done.returncode == 2 and BAD[text] in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


TARGET = LlamaConfig(4, 2, 2, 32, 48, None, 32)
FLAT = Study(
    "flat", "?", {"scratch": Arm("4 layers", 4)}, {"cpu": (Size(TARGET, (2e9,), 256, 8, 512, "float32", val_tokens=512),)}
)


def test_arms_say_how_they_begin_and_what_trains_them(corpus, tmp_path, capsys):
    """2 layers run twice, by AdamW, become 4 that Muon trains: the chain of its runs, run."""
    looped = {"loops": 2}
    arms = {
        "scratch": Arm("4 layers", 4, optim="muon"),
        "shallow": Arm("2 layers", 2),
        "looped": Arm("2 layers, twice", 2, model=looped),
        "untied": Arm("2 layers, twice → 4", 2, (Jump(0.3, Growth("untie"), restart=False, optim="muon"),), model=looped),
    }
    plan = Plan(replace(FLAT, arms=arms), FLAT.sizes["cpu"][0], corpus, tmp_path)
    assert plan.base_of(arms["untied"]) == "looped" and plan.base_of(arms["scratch"]) == "scratch"
    jobs = plan.jobs("untied", 0, 4e-3, 8e-3, 2e9)
    told = [(job.config.optim.name, job.config.model.n_layer, job.config.model.loops, bool(job.needs)) for job in jobs]
    assert told == [("adamw", 2, 2, False), ("muon", 2, 2, True), ("muon", 4, 1, True)]
    assert ["2-loops" in job.name for job in jobs] == [True, False, False] and ["muon" in j.name for j in jobs[1:]] == [
        True
    ] * 2
    results = [execute(job.config) for job in jobs]
    assert results[1]["growth"]["op"] == "untie" and [bool(r["growth"]) for r in results] == [False, True, False]
    assert "the state of adamw; muon begins anew" in (Path(jobs[1].config.out) / "log.txt").read_text()
    last = results[-1]["evaluations"][-1]
    assert last["val_loss"] < results[0]["evaluations"][-1]["val_loss"]
    with pytest.raises(UserError, match="arm 'wide' has no valid model"):
        Arm("wide", 2, model={"d_model": 64})
    with pytest.raises(UserError, match="arm 'sgd' has no valid optim"):
        Arm("sgd", 2, optim="sgd")


def test_growth_just_when_the_rate_decays_is_in_the_branch_and_takes_nothing_from_it(corpus, tmp_path):
    at_decay = Jump(0.8, Growth("stack", 2), restart=False)
    learning = replace(at_decay, growth=Growth("learn", 2, learn_steps=5))
    arms = {"scratch": Arm("4", 4), "base": Arm("2", 2), "late": Arm("late", 2, (at_decay,))}
    size = replace(FLAT.sizes["cpu"][0], budgets=(1e9, 2e9))
    plan = Plan(replace(FLAT, arms=arms), size, corpus, tmp_path)
    assert plan.budgets("late") == (2e9,)
    trunk, branch = plan.jobs("late", 0, 4e-3, 4e-3, 2e9)
    assert (branch.config.stages[0].growth, branch.config.stages[0].schedule) == (at_decay.growth, "wsd")
    assert trunk.flops + branch.flops == pytest.approx(2e9, rel=0.02) and branch.flops == pytest.approx(0.4e9, rel=0.1)
    assert execute(trunk.config) and execute(branch.config)["growth"]["layers"] == [0, 1, 0, 1]
    with pytest.raises(UserError, match="arm late has no room to train"):
        Plan(replace(FLAT, arms=arms | {"late": replace(arms["late"], jumps=(learning,))}), size, corpus, tmp_path)


def test_arms_have_budgets_and_batches_of_their_own(corpus, tmp_path):
    arms = {"scratch": Arm("4", 4, budgets=(1.0,)), "base": Arm("2", 2), "small": Arm("4, 128", 4, batch_tokens=128)}
    size = replace(FLAT.sizes["cpu"][0], budgets=(1e9, 2e9), lrs=(1e-3, 2e-3, 4e-3), seeds=(0, 1))
    flat = replace(FLAT, arms=arms)
    plan = Plan(flat, size, corpus, tmp_path)
    assert [plan.budgets(name) for name in arms] == [(2e9,), (1e9, 2e9), (1e9, 2e9)]
    (trunk, branch), (small, *_) = (plan.jobs(name, 0, 1e-3, 1e-3, 2e9) for name in ("scratch", "small"))
    assert (trunk.config.batch_tokens, small.config.batch_tokens, small.config.micro_batch) == (256, 128, 4)
    assert branch.needs == trunk.name
    kinds = kinds_of(plan)
    assert {name: (c.model.n_layer, c.batch_tokens) for name, c in kinds.items()} == {
        name: shape for name, shape in zip(kinds, ((4, 256), (2, 256), (4, 128)), strict=True)
    }
    # Of each arm a trunk and a branch for a budget, base and small two: at 3 rates with one seed, at 2 with the other.
    runs, flops = planned_cost(flat, size, plan.model.vocab_size)
    assert runs == (3 + 2) * (2 + 4 + 4)
    longest = sum(job.flops for name in arms for job in plan.jobs(name, 0, 1e-3, 1e-3, 2e9))
    assert flops == pytest.approx(5 * (longest + 2 * 0.2e9), rel=0.05)
    with pytest.raises(UserError, match="arm odd is measured at none of the budgets"):
        Plan(replace(flat, arms=arms | {"odd": Arm("odd", 2, budgets=(0.3,))}), size, corpus, tmp_path)


def test_seeds_that_have_run_stay_beside_new_ones(tmp_path):
    path = tmp_path / "study-toy-cpu.json"
    assert all_seeds(path, (3, 1)) == (3, 1)
    run = {"evaluations": [{"val_loss": 1.0}], "needs": None}
    path.write_text(json.dumps({"runs": {"a": run}, "arms": {"scratch": {"seeds": {"0": ["a"], "1": ["a"]}}}}))
    assert all_seeds(path, (1, 5)) == (0, 1, 5)


@pytest.mark.slow
def test_rate_that_diverges_is_recorded_and_other_losses_than_before_are_refused(corpus, tmp_path):
    plan, path = Plan(FLAT, FLAT.sizes["cpu"][0], corpus, tmp_path / "out"), tmp_path / "study-flat-cpu.json"
    runner = Runner(plan, "cpu", path, 2, Console(quiet=True))
    good, wild = (plan.jobs("scratch", 0, lr, 0.0, 2e9) for lr in (8e-3, 1e20))
    runner.run(good + wild, "two rates")
    assert math.isfinite(runner.loss(good[-1])) and [runner.loss(job) for job in wild] == [math.inf] * 2
    assert "had a loss or gradient that is not finite" in (tmp_path / "out" / wild[0].name / "log.txt").read_text()
    assert not (tmp_path / "out" / wild[1].name).exists(), "a branch of what has diverged needs no run"
    again = Runner(plan, "cpu", path, 2, Console(quiet=True))
    again.run(good + wild, "known")
    assert not again.ran
    results = read_results(path)
    results["runs"][good[0].name]["evaluations"][-1]["val_loss"] += 1e-4
    path.write_text(json.dumps(results))
    shutil.rmtree(tmp_path / "out")  # checkpoints are gone: the trunk must be run anew for another branch
    longer = replace(plan.size, budgets=(2e9, 4e9))
    other = Runner(Plan(FLAT, longer, corpus, tmp_path / "out"), "cpu", path, 1, Console(quiet=True))
    with pytest.raises(UserError, match=f"{good[0].name} ends at other losses than in the results"):
        other.run(other.plan.jobs("scratch", 0, 8e-3, 0.0, 4e9), "another budget")


STUDY = """
from study.plan import Arm, Jump, Size, Study
from nanostack.config import Growth
from nanostack.model import LlamaConfig

TARGET = LlamaConfig(4, 2, 2, 32, 48, None, 32)
study = Study(
    "toy",
    "Does it run?",
    {
        "scratch": Arm("4 layers", 4),
        "base": Arm("2 layers", 2),
        "stack": Arm("2 to 4", 2, (Jump(0.15, Growth("stack", 2)),)),
        "learn": Arm("2 to 4, learned", 2, (Jump(0.15, Growth("learn", 2, learn_steps=2)),)),
    },
    {"cpu": (Size(TARGET, (2e9, 4e9), 256, 8, 512, "float32", lrs=(8e-3,), seeds=(0, 1), val_tokens=512),)},
)
"""


@pytest.mark.slow
def test_study_of_seconds_goes_on_after_a_kill_and_ends_in_a_report(corpus, tmp_path):
    (tmp_path / "toy.py").write_text(STUDY)
    command = ["bench/speedup.py", tmp_path / "toy.py", "--data", corpus, "--size", "cpu", "--jobs", "2"]
    command += ["--out", tmp_path / "out", "--results", tmp_path / "results", "--json"]
    results = tmp_path / "results/study-toy-cpu.json"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, *command], **options)
    while not (results.exists() and len(json.loads(results.read_text())["runs"]) >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    second = python(*command)
    assert second.returncode == 2 and "another process is running a study" in second.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = json.loads(results.read_text())["runs"]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert "0:00:00 left" in done.stderr
    found, summary = json.loads(results.read_text()), json.loads(done.stdout)
    assert before.items() <= found["runs"].items(), "what had been run was run again"
    assert summary == json.loads(json.dumps(summarise(found)))
    for name, run in found["runs"].items():
        assert run["evaluations"][-1]["lr"] == 0 or run["budget"] is None, name
        assert run["budget"] is None or run["evaluations"][-1]["flops"] == pytest.approx(run["budget"], rel=0.05)
        assert path_of(found, name)[-1]["seconds"] >= run["evaluations"][-1]["seconds"] > 0
        assert run["begins"] == (path_of(found, run["needs"])[-1]["tokens"] if run["needs"] else 0)
    stack, learn = (found["arms"][arm]["seeds"]["0"] for arm in ("stack", "learn"))
    assert stack[0] == learn[0], "arms of a seed share their base"
    assert found["runs"][stack[1]]["growth"]["op"] == "stack" and found["runs"][learn[1]]["growth"]["learned"]
    assert results.with_suffix(".png").stat().st_size > 10000
    (tmp_path / "toy.py").write_text(STUDY[: STUDY.index('        "learn"')] + STUDY[STUDY.index("    },") :])
    edited = python(*command)
    assert edited.returncode == 0 and list(json.loads(edited.stdout)["arms"]) == ["scratch", "base", "stack"], edited.stderr
    assert json.loads(results.read_text())["runs"].items() < found["runs"].items(), "a finished study without an arm"
    (tmp_path / "toy.py").write_text(STUDY.replace("seeds=(0, 1)", "seeds=(0, 1, 2)"))
    process = subprocess.Popen([sys.executable, *command], **options)
    while "arms" in json.loads(results.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "arms" not in json.loads(results.read_text()), "two seeds are no answer to a study of three"
    (tmp_path / "toy.py").write_text(STUDY)
    assert python(*command).returncode == 0
    (tmp_path / "toy.py").write_text(STUDY.replace('"toy"', '"other"'))
    other = python(*command)
    assert other.returncode == 0 and json.loads(other.stdout)["arms"] == summary["arms"]
    shared = json.loads(results.with_name("study-other-cpu.json").read_text())["runs"]
    assert shared == found["runs"], "what one study has run, another ran again"
    refused = python(*command, "--size", "gpu")
    assert refused.returncode == 2 and "has sizes cpu, not gpu" in refused.stderr


@pytest.mark.slow
def test_run_whose_records_are_torn_is_made_anew_and_an_edited_study_is_unfinished(corpus, tmp_path):
    """As a machine leaves them that went down: the checkpoint is whole, the end of metrics.jsonl is not."""
    plan = Plan(FLAT, FLAT.sizes["cpu"][0], corpus, tmp_path / "out")
    first = plan.jobs("scratch", 0, 8e-3, 0.0, 2e9)[0].config
    whole = execute(first)
    metrics = tmp_path / "out" / Path(first.out).name / "metrics.jsonl"
    for damage in (lambda text: text[:-50], lambda text: b"", lambda text: b"\xff" + text[1:]):
        metrics.write_bytes(damage(metrics.read_bytes()))
        again = execute(first)
        losses = [[e["val_loss"] for e in one["evaluations"]] for one in (whole, again)]
        assert losses[0] == losses[1]
    path = tmp_path / "study-flat-cpu.json"
    path.write_text(json.dumps(Runner(plan, "cpu", path, 1, Console(quiet=True)).results | {"arms": {}}))
    assert "arms" in Runner(plan, "cpu", path, 1, Console(quiet=True)).results
    wider = Plan(FLAT, replace(plan.size, budgets=(2e9, 4e9)), corpus, tmp_path / "out")
    assert "arms" not in Runner(wider, "cpu", path, 1, Console(quiet=True)).results
