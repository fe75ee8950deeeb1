"""Learning rates against hand-computed ones."""

import pytest

from nanostack.config import Stage, grow
from nanostack.schedule import learning_rate, rewarming


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warmup_is_linear_from_zero(schedule):
    stage = Stage(1000, 4e-3, schedule, warmup_tokens=100, decay_tokens=200 if schedule == "wsd" else None)
    assert [learning_rate((stage,), 0, tokens) for tokens in (10, 50, 100)] == pytest.approx([4e-4, 2e-3, 4e-3])


def test_cosine_passes_the_middle_and_ends_at_min_lr():
    stage = Stage(1100, 1.0, "cosine", min_lr=0.2, warmup_tokens=100)
    assert [learning_rate((stage,), 0, tokens) for tokens in (100, 600, 1100, 1150)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_wsd_is_stable_then_decays_linearly():
    stage = Stage(1000, 1.0, "wsd", min_lr=0.5, decay_tokens=400)
    assert [learning_rate((stage,), 0, tokens) for tokens in (10, 600, 800, 1000, 1050)] == pytest.approx(
        [1, 1, 0.75, 0.5, 0.5]
    )


def test_constant_stays():
    assert learning_rate((Stage(1000, 0.3, "constant"),), 0, 990) == 0.3


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_stages_that_continue_are_one_stretch(schedule):
    options = {"warmup_tokens": 100, "min_lr": 0.1, "decay_tokens": 700 if schedule == "wsd" else None}
    if schedule == "constant":
        options["min_lr"] = 0.0
    whole = (Stage(1000, 1.0, schedule, **options),)
    parts = (Stage(300, 1.0, schedule, **options), Stage(500, continues=True), Stage(200, continues=True), Stage(50, 0.5))
    for number, start, tokens in ((0, 0, 50), (0, 0, 300), (1, 300, 10), (1, 300, 500), (2, 800, 1), (2, 800, 200)):
        assert learning_rate(parts, number, tokens) == learning_rate(whole, 0, start + tokens)
    assert learning_rate(parts, 3, 0) == 0.5


def test_new_parameters_rise_above_the_others_and_come_back():
    stage = grow("stack", 2, tokens=1000, lr=1.0, rewarm_tokens=100)
    factors = [rewarming(stage, tokens) for tokens in (10, 50, 100, 150, 200, 900)]
    assert factors == pytest.approx([0.13, 0.65, 1.3, 1.15, 1.0, 1.0])
    assert rewarming(grow("stack", 2, tokens=1000, lr=1.0), 10) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0, "lr": 1.0}, "tokens > 0"),
        ({"tokens": 10, "lr": 1.0, "warmup_tokens": 11}, "warmup_tokens within"),
        ({"tokens": 10, "lr": 0.0}, "lr > 0"),
        ({"tokens": 10, "lr": 1.0, "min_lr": 2.0}, "min_lr between"),
        ({"tokens": 10, "lr": 1.0, "schedule": "wsd"}, "decay_tokens"),
        ({"tokens": 10, "lr": 1.0, "decay_tokens": 5}, "decay_tokens"),
        ({"tokens": 10, "lr": 1.0, "schedule": "wsd", "decay_tokens": 0}, "decay_tokens must be positive"),
        ({"tokens": 10, "lr": 1.0, "continues": True}, "a stage that continues has"),
        ({"tokens": 10, "lr": 1.0, "rewarm_tokens": 5}, "belong to a stage that grows"),
        ({"tokens": 10, "continues": True, "rewarm_tokens": 5}, "belong to a stage that grows"),
    ],
)
def test_stages_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stage(**arguments)
