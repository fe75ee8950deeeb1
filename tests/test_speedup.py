"""The speedup computation on curves with a known answer, and a study of seconds from end to end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, TINY, Trainer

import train
from bench.speedup import (
    Crossing,
    compare,
    crossing,
    curve,
    flops_to_reach,
    mean_and_interval,
    pays,
    read_run,
    seconds_of,
    speedup,
    summarise,
)
from nanostack.config import Stage, load

SCRATCH = [(10.0, 5.0), (20.0, 4.0), (30.0, 3.0)]


def test_crossing_is_interpolated_between_evaluations():
    assert flops_to_reach([(10.0, 5.0), (20.0, 3.0)], 3.5) == 17.5
    assert speedup(SCRATCH, [(10.0, 4.0), (20.0, 2.0)]) == pytest.approx(30 / 15 - 1)


def test_first_of_several_crossings_counts():
    assert flops_to_reach([(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (4.0, 2.0)], 3.5) == 1.75


def test_jump_at_growth_is_no_crossing():
    assert flops_to_reach([(1.0, 5.0), (2.0, 4.0), (2.0, 4.5), (4.0, 3.5)], 3.75) == pytest.approx(3.5)


def test_curve_that_never_gets_there_gives_none():
    assert flops_to_reach(SCRATCH, 2.9) is None
    assert speedup(SCRATCH, [(10.0, 4.0), (20.0, 3.1)]) is None


def test_slower_is_negative_and_equal_is_zero():
    assert speedup(SCRATCH, [(20.0, 4.0), (60.0, 3.0)]) == -0.5
    assert speedup(SCRATCH, SCRATCH) == 0


def test_curve_that_starts_below_is_reached_at_its_first_point():
    assert flops_to_reach([(7.0, 2.0), (8.0, 1.0)], 3.0) == 7.0


def test_only_evaluations_are_read(tmp_path):
    lines = [{"config_sha256": "x"}, {"flops": 1.0, "val_loss": None}, {"flops": 2.0, "val_loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    header, records = read_run(tmp_path)
    assert header == lines[0] and curve(records) == [(2.0, 3.0)]
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path / "nowhere")


def test_decayed_curve_is_crossed_on_a_line_over_log_flops():
    points = [(1e12, 3.0), (4e12, 2.0)]
    assert crossing(points, 2.5) == Crossing(pytest.approx(2e12))
    assert crossing(points, 2.0) == Crossing(pytest.approx(4e12))


@pytest.mark.parametrize(
    ("losses", "why"),
    [([3.0, 2.6, 2.55], "never meets"), ([3.0, 2.4, 2.6], "crosses twice"), ([2.4, 2.6, 2.4], "starts below, leaves, returns")],
)
def test_curve_that_does_not_stay_below_has_not_reached_it(losses, why):
    assert crossing(list(zip((1e12, 2e12, 4e12), losses, strict=True)), 2.5) is None, why


def test_curve_below_from_its_first_point_gives_a_bound():
    assert crossing([(1e12, 2.4), (2e12, 2.3)], 2.5) == Crossing(1e12, at_most=True)


def test_interval_is_students():
    found = mean_and_interval([0.5, 0.6, 0.7])
    assert found["mean"] == pytest.approx(0.6) and found["half_width"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert mean_and_interval([0.5])["half_width"] is None


def synthetic(curves: dict[str, list[list[float]]], budgets=(1e12, 2e12, 4e12)) -> dict:
    """Results of a study with these losses by arm and seed; names that start with g grow."""
    arms, runs = {}, {}
    for name, seeds in curves.items():
        arms[name] = {"label": name, "lr": 1e-3, "grows": name.startswith("g"), "seeds": {}}
        for seed, losses in enumerate(seeds):
            arms[name]["seeds"][str(seed)] = names = [f"{name}-{seed}-{i}" for i in range(len(losses))]
            for run, budget, loss in zip(names, budgets, losses, strict=True):
                end = {"flops": budget, "flops_exact": 2 * budget, "val_loss": loss, "seconds": 1.0, "tokens": 1, "epoch": 0.1}
                runs[run] = {"evaluations": [end], "budget": budget, "needs": None, "growth": None}
    about = dict.fromkeys(("study", "question", "size", "device", "date", "git_commit", "versions", "manifest_sha256"))
    return {"arms": arms, "runs": runs, "budgets": list(budgets)} | about


def test_summary_of_a_study_with_a_known_answer():
    """Grown losses are those of scratch at half of the FLOPs, so the speedup is 100 % for every seed."""
    scratch = [[3.0, 2.5, 2.0], [3.1, 2.6, 2.1]]
    grown = [[2.5, 2.0, 1.5], [2.6, 2.1, 1.6]]
    base = [[2.4, 2.2, 2.1], [2.5, 2.2, 2.1]]
    summary = summarise(synthetic({"scratch": scratch, "base": base, "grown": grown}))
    found = summary["arms"]["grown"]
    for count in ("flops", "flops_exact"):
        assert found[f"speedup_{count}"]["mean"] == pytest.approx(1.0) and not found[f"speedup_{count}"]["at_least"]
        assert found[f"speedup_{count}"]["half_width"] == pytest.approx(0.0, abs=1e-9)
    assert summary["arms"]["base"]["speedup_flops"] is None, "2.1 is not below 2.0"
    assert [round(one["mean"], 6) for one in found["minus_base"]] == [0.1, -0.15, -0.55]
    assert summary["pays_from"] == 2e12 and "pays from 2e+12 FLOPs on" in pays(summary)


def test_noisy_arm_of_which_one_seed_is_not_reached_has_no_number():
    curves = {"scratch": [[3.0, 2.5, 2.0]] * 2, "base": [[2.0, 1.9, 1.8]] * 2, "grown": [[2.5, 1.9, 2.1], [2.5, 1.9, 1.8]]}
    summary = summarise(synthetic(curves))
    assert summary["arms"]["grown"]["speedup_flops"] is None
    assert summary["pays_from"] is None and "does not pay" in pays(summary)
    assert summary["arms"]["base"]["speedup_flops"]["at_least"]


STUDY = """
from bench.study import Arm, Jump, Size, Study
from nanostack.config import Growth
from nanostack.model import LlamaConfig

study = Study(
    "toy",
    "Does it run?",
    {
        "scratch": Arm("4 layers", 4),
        "base": Arm("2 layers", 2),
        "stack": Arm("2 to 4", 2, (Jump(0.15, Growth("stack", 2)),)),
        "learn": Arm("2 to 4, learned", 2, (Jump(0.15, Growth("learn", 2, learn_steps=2)),)),
    },
    {"cpu": Size(LlamaConfig(4, 2, 2, 32, 48, None, 32), (2e9, 4e9), 256, 8, 512, lrs=(8e-3,), seeds=(0, 1), val_tokens=512)},
)
"""


@pytest.mark.slow
def test_study_of_seconds_goes_on_after_a_kill_and_ends_in_a_report(corpus, tmp_path):
    (tmp_path / "toy.py").write_text(STUDY)
    command = [sys.executable, "bench/speedup.py", tmp_path / "toy.py", "--data", corpus, "--size", "cpu", "--jobs", "2"]
    command += ["--out", tmp_path / "out", "--results", tmp_path / "results", "--json"]
    results = tmp_path / "results/study-toy-cpu.json"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options, start_new_session=True)
    while not (results.exists() and len(json.loads(results.read_text())["runs"]) >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    second = subprocess.run(command, **options)
    assert second.returncode == 2 and "another process is running the study" in second.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = json.loads(results.read_text())["runs"]
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    found, summary = json.loads(results.read_text()), json.loads(done.stdout)
    assert before.items() <= found["runs"].items(), "what had been run was run again"
    assert summary == json.loads(json.dumps(summarise(found)))
    for name, run in found["runs"].items():
        assert run["evaluations"][-1]["lr"] == 0 or run["budget"] is None, name
        assert run["budget"] is None or run["evaluations"][-1]["flops"] == pytest.approx(run["budget"], rel=0.05)
        assert seconds_of(found, name) >= run["evaluations"][-1]["seconds"] > 0
    stack, learn = (found["arms"][arm]["seeds"]["0"] for arm in ("stack", "learn"))
    assert stack[0] == learn[0], "arms of a seed share their base"
    assert found["runs"][stack[1]]["growth"]["op"] == "stack" and found["runs"][learn[1]]["growth"]["learned"]
    assert results.with_suffix(".png").stat().st_size > 10000
    again = subprocess.run(command, **options)
    assert again.returncode == 0 and json.loads(again.stdout)["arms"] == summary["arms"]
    refused = subprocess.run([*command[:2], *command[2:-5], "--size", "gpu", *command[-5:]], **options)
    assert refused.returncode == 2 and "has sizes cpu, not gpu" in refused.stderr


@pytest.mark.slow
def test_finished_runs_are_compared_and_others_refused(corpus, tmp_path):
    trainer = Trainer(corpus, tmp_path)
    grown, scratch = trainer.good("grown", "--stages.1.min_lr", "0"), tmp_path / "scratch"
    deep = load(TINY, ["--data.path", str(corpus), "--out", str(scratch), "--model.n_layer", "4"])
    train.Run(replace(deep, stages=(Stage(24 * 256, 1e-2, "cosine", warmup_tokens=512),))).train()
    answer = compare((scratch, grown))
    assert len(answer["runs"]) == 1 and answer["runs"][0]["seed"] == 0
    assert answer["runs"][0]["speedup"] == speedup(*(curve(read_run(folder)[1]) for folder in (scratch, grown)))
    other = trainer.good("other", "--stages.1.min_lr", "0", "--data.val_tokens", "512")
    with pytest.raises(ValueError, match="validation tokens is 512 there and 1024 here"):
        compare((scratch, other))
    constant = trainer.good("constant", "--stages.1.schedule", "constant", "--stages.1.min_lr", "0")
    with pytest.raises(ValueError, match="only decayed runs are compared"):
        compare((scratch, constant))
    with pytest.raises(ValueError, match="at least one that grows"):
        compare((scratch,))
    lines = (grown / "metrics.jsonl").read_text().splitlines()
    (grown / "metrics.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(ValueError, match="grown is not finished"):
        compare((scratch, grown))
