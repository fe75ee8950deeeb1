"""Results in the repository stay those of the studies beside them: but for NUMERICS, no run would be made again."""

import json
import shutil

import pytest
from conftest import ROOT
from rich.console import Console

from study import plan, runner
from study.__main__ import study_of

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
