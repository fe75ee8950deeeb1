"""The quickstart's four arms: what is planned, and what is said of results with a known answer."""

import pytest
from conftest import ROOT
from test_speedup import synthetic

from nanostack.config import load
from study import quickstart
from study.quickstart import ARMS, Command


@pytest.fixture
def ways(monkeypatch):
    monkeypatch.setattr("study.plan.manifest_sha256", lambda data: "m")
    monkeypatch.setattr("study.plan.load_manifest", lambda data: {"tokenizer": {"n_vocab": 512}})
    return quickstart.planned(Command(), "cpu", ROOT / "data/packages512")[1]


def test_arms_spend_the_same_flops_and_the_config_is_the_grown_one(ways):
    spent = [sum(job.flops for job in ways[arm][-1]) for arm in ARMS]
    assert max(spent) / min(spent) < 1.001
    config = load(str(ROOT / "config/quickstart.py"), [])
    base, *trunk, branch = [job.config for job in ways["grown"][-1]]
    first, second = config.stages
    assert first == base.stages[0] and config.optim == base.optim
    assert second.growth == trunk[0].stages[0].growth and second.decay_tokens == branch.stages[0].tokens
    assert second.tokens == sum(c.stages[0].tokens for c in (*trunk, branch)) and second.lr == branch.stages[0].lr
    names = ("batch_tokens", "micro_batch", "dtype", "seed", "data")
    assert {name: getattr(config, name) for name in names} == {
        name: getattr(base, name) if name != "data" else config.data for name in names
    }
    assert config.data.val_tokens == base.data.val_tokens


def results(grown: list[float]) -> dict:
    """Two seeds; the grown arm has these losses at half and all of the FLOPs, the others one point."""
    curves = {"scratch": [None, 2.4], "grown": grown, "base4": [None, 2.3], "base": [None, 2.5]}
    return synthetic({arm: [losses] * 2 for arm, losses in curves.items()}, budgets=(4.5e12, 9e12))


def test_speedup_is_read_off_the_decayed_curve_at_the_loss_of_each_control():
    summary = quickstart.summary_of(results([2.5, 2.2]))
    assert summary["speedup"] == pytest.approx(2 ** (2 / 3) - 1) and summary["flops_grown"] == pytest.approx(
        4.5e12 * 2 ** (1 / 3)
    )
    assert summary["speedups"]["base4"]["known"]["mean"] == pytest.approx(2 ** (1 / 3) - 1)
    assert summary["speedups"]["base"]["known"]["at_least"] and summary["val_loss"]["grown"] == 2.2
    assert "below both that never grew, by 0.100 nats" in quickstart.verdict(summary)
    bound = quickstart.summary_of(results([2.3, 2.2]))
    assert bound["speedup_at_least"] and "− 1 = ≥ +100 %, mean of 2 seeds" in quickstart.verdict(bound)


def test_it_is_said_plainly_that_stacking_does_not_pay():
    summary = quickstart.summary_of(results([2.6, 2.45]))
    assert summary["speedup"] is None and summary["flops_grown"] is None
    said = quickstart.verdict(summary)
    assert (
        "not reached" in said and "does not pay here: the model from scratch and 4 layers that never grew ended lower" in said
    )


def test_seeds_of_several_files_are_told_together_and_other_texts_refused():
    both, first, second = (results([2.5, 2.2]) for _ in range(3))
    for one, seed in ((first, "0"), (second, "1")):
        for arm in one["arms"].values():
            arm["seeds"] = {seed: arm["seeds"][seed]}
    assert quickstart.summary_of(quickstart.together([first, second])) == quickstart.summary_of(both)
    for name in ("manifest_sha256", "size", "numerics"):
        with pytest.raises(ValueError, match=f"cannot be told together: {name} differ"):
            quickstart.together([first, second | {name: "another"}])
    with pytest.raises(ValueError, match="seed 0 is in two"):
        quickstart.together([first, first])
    with pytest.raises(ValueError, match="it is unfinished, or of another study"):
        quickstart.together([{"runs": {}}])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"scale": 0}, "scale must be a positive number"),
        ({"scale": float("nan")}, "scale must be a positive number"),
        ({"text": "stdlib"}, "give --data, a folder for the tokens of stdlib"),
        ({"jobs": 0}, "jobs must be at least 1"),
    ],
)
def test_bad_options_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        quickstart.main(Command(**words))


def test_a_scale_too_small_for_one_step_is_refused(monkeypatch):
    monkeypatch.setattr("study.plan.manifest_sha256", lambda data: "m")
    monkeypatch.setattr("study.plan.load_manifest", lambda data: {"tokenizer": {"n_vocab": 512}})
    with pytest.raises(ValueError, match=r"have no room for a step of .* that decays"):
        quickstart.planned(Command(scale=1e-4), "cpu", ROOT)
