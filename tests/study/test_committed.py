"""Results in the repository stay those of the studies beside them: but for NUMERICS, no run would be made again."""

import json
import re
import shutil

import pytest
from conftest import ROOT
from rich.console import Console

from nanostack.commands.plan import MEASURED
from study import plan, runner
from study.__main__ import study_of
from study.results import at_best_pace, difference, gain_said, over_gains, plus_minus, summarise
from study.studies.quickstart import OTHER

RESULTS = sorted((ROOT / "bench/results").glob("study-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_every_run_that_a_committed_study_plans_is_in_its_results(path, tmp_path, monkeypatch):
    """Names of runs hold a hash of their config: a field that is renamed, or has another default, must not change it."""
    copy = tmp_path / path.name
    shutil.copyfile(path, copy)
    found = json.loads(path.read_text())
    monkeypatch.setattr(plan, "NUMERICS", found.get("numerics", 0))  # when they were made: what else is hashed is as it was
    manifest = {"tokenizer": {"n_vocab": 512}, "splits": {"train": {"tokens": 10**7}}}
    monkeypatch.setattr(plan, "load_manifest", lambda data: manifest)
    monkeypatch.setattr(plan, "manifest_sha256", lambda data: found["manifest_sha256"])
    study = study_of(ROOT / f"study/studies/{found['study']}.py")
    (size,) = (size for size in study.sizes[found["size"]] if size.model.d_model == found["model"]["d_model"])
    planned = plan.Plan(study, size, tmp_path / "data", tmp_path / "out")
    again = runner.Runner(planned, found["size"], copy, 1, Console(quiet=True))

    def nothing_is_missing(jobs, what):
        assert not (missing := [job.name for job in again.missing(jobs)]), missing

    monkeypatch.setattr(again, "run", nothing_is_missing)
    runner.run_target(planned, again)
    assert json.loads(copy.read_text()) == found and len(found["runs"]) > 50


def test_what_pages_and_commands_say_of_muon_is_in_the_results():
    results = at_best_pace(json.loads((ROOT / "bench/results/study-muon-cpu.json").read_text()))
    arms = summarise(results)["arms"]
    pairs = {"muon": ("stacked", "scratch"), "adamw": ("adamw stacked", "adamw"), "both": ("scratch", "adamw")}
    gains = {name: gain_said(*over_gains(results, arm, "flops", 9e12, control), 3) for name, (arm, control) in pairs.items()}
    muon, adamw = gains["muon"], gains["adamw"]
    five = at_best_pace(json.loads((ROOT / "bench/results/study-quickstart-cpu.json").read_text()))
    most = gain_said(*over_gains(five, "grown", "flops", 9e12, "scratch"), 5)
    assert most in MEASURED["muon"] and gains["both"] in MEASURED["muon"] and adamw in MEASURED["adamw"]
    answer = (ROOT / "study/answer.md").read_text().replace("\n  ", " ")
    assert all(gain.lstrip("+") in answer for gain in (most, muon, adamw))
    for control in ("scratch", "base4", "base"):
        assert plus_minus(difference(five, "grown", control, 9e12)).lstrip("-") in answer
    losses = [f"{arms[name]['losses'][1]['mean']:.3f}" for name in ("adamw", "scratch", "adamw stacked", "stacked")]
    assert "end at {} and {}, stacked at {} and {}".format(*losses) in OTHER
    means = study_of(ROOT / "study/studies/muon.py").means.replace("\n", " ")
    for arm, control, budget in (
        ("stacked", "scratch", 9e12),
        ("stacked", "base4", 9e12),
        ("stacked", "base", 9e12),
        ("stacked", "scratch", 4.5e12),
        ("stacked", "base4", 4.5e12),
        ("stacked", "base", 4.5e12),
        ("adamw stacked", "adamw", 9e12),
        ("adamw stacked", "adamw base", 9e12),
        ("scratch", "adamw", 9e12),
        ("stacked", "adamw stacked", 9e12),
        ("into muon", "stacked", 9e12),
    ):
        assert plus_minus(difference(results, arm, control, budget)).lstrip("+-") in means, (arm, control, budget)
    assert all(gain.lstrip("+").split(" %")[0] in means for gain in (muon, adamw))


@pytest.mark.parametrize(
    ("study", "texts", "most"), [("muon_growth", ("muon_growth", "muon"), 25), ("quickstart", ("quickstart",), 5)]
)
def test_losses_that_are_told_of_a_study_are_in_its_results(study, texts, most):
    """Every loss that its text names is that of a run, or a mean of seeds."""
    results = [json.loads((ROOT / f"bench/results/study-{name}-cpu.json").read_text())["arms"] for name in texts]
    sweeps = [
        losses for arms in results for arm in arms.values() for rates in arm["sweep"].values() for losses in rates.values()
    ]
    known = {f"{loss:.3f}" for losses in sweeps for loss in (*losses, sum(losses) / len(losses))}
    told = re.findall(r"\b2\.\d{3}\b", study_of(ROOT / f"study/studies/{study}.py").means)
    assert len(told) > most and not set(told) - known
