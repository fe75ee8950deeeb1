"""The speedup computation on curves with a known answer."""

import json

import pytest

from bench.speedup import curve, flops_to_reach, read_run, speedup

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
