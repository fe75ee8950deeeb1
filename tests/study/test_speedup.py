"""The speedup computation on curves with a known answer, and the report on studies."""

import json
import math
from dataclasses import asdict

import pytest
from conftest import python

from nanostack.model import LlamaConfig
from nanostack.runs import read_run
from study.report import parabola
from study.results import (
    Crossing,
    at_best_pace,
    by_budget,
    crossing,
    curve,
    flops_to_reach,
    gain,
    mean_and_interval,
    path_of,
    pays,
    rows,
    speedup,
    summarise,
    t_95,
)

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
    assert [t_95(n) for n in (1, 10, 11, 30)] == pytest.approx([12.706, 2.228, 2.201, 2.042], abs=3e-3)


def synthetic(curves: dict[str, list[list[float]]], budgets=(1e12, 2e12, 4e12)) -> dict:
    """Results of a study with these losses by arm and seed; names that start with g grow."""
    arms, runs = {}, {}
    for name, seeds in curves.items():
        grows, n_layer = name.startswith("grown"), {"scratch": 8, "base": 2, "base4": 4}.get(name, 2)
        arms[name] = {"label": name, "grows": grows, "n_layer": n_layer, "seeds": {}, "at": [0.1] if grows else []}
        arms[name]["sweep"] = {f"{budgets[0]:g}": {"0.001": [2.0, 2.1], "0.002": [None]}}
        for seed, losses in enumerate(seeds):
            named = {f"{name}-{seed}-{i}": point for i, point in enumerate(zip(budgets, losses, strict=True))}
            arms[name]["seeds"][str(seed)] = [run for run, (_, loss) in named.items() if loss is not None]
            for run, (budget, loss) in named.items():
                end = {"flops": budget, "flops_exact": 2 * budget, "val_loss": loss, "seconds": 1.0, "tokens": 9, "epoch": 0.1}
                runs[run] = {"evaluations": [end], "budget": budget, "needs": None, "begins": 0, "growth": None}
                runs[run] |= {
                    "device": "a machine",
                    "git_commit": None,
                    "dtype": "float32",
                    "stage": {"lr": 1e-3 * (1 + (budget < 2e12))},
                }
    model = asdict(LlamaConfig(8, 2, 2, 64, 176, 512, 128))
    about = {"study": "toy", "question": "What?", "size": "cpu", "model": model, "device": "a machine", "date": None}
    about |= {"git_commit": None, "versions": {"torch": "2"}, "manifest_sha256": "m", "batch_tokens": 1024, "processes": 2}
    return about | {"arms": arms, "runs": runs, "budgets": list(budgets)}


def test_summary_of_a_study_with_a_known_answer():
    """Grown losses are those of scratch at half of the FLOPs, so the speedup is 100 % for every seed."""
    scratch = [[3.0, 2.5, 2.0], [3.1, 2.6, 2.1]]
    grown = [[2.5, 2.0, 1.5], [2.6, 2.1, 1.6]]
    base = [[2.4, 2.2, 2.1], [2.5, 2.2, 2.2]]
    summary = summarise(synthetic({"scratch": scratch, "base": base, "grown": grown}))
    found = summary["arms"]["grown"]
    for count in ("flops", "flops_exact"):
        assert found[f"speedup_{count}"]["mean"] == pytest.approx(1.0) and not found[f"speedup_{count}"]["at_least"]
        assert found[f"speedup_{count}"]["half_width"] == pytest.approx(0.0, abs=1e-9)
    assert summary["arms"]["base"]["speedup_flops"] is None, "2.1 is not below 2.0"
    assert [round(one["mean"], 6) for one in found["minus_base"]] == [0.1, -0.15, -0.6]
    assert [one["pays"] for one in summary["verdicts"]] == [False, None, True], "at the second the seeds are 0.1 apart"
    assert found["lrs"] == [2e-3, 1e-3, 1e-3] and rows(summary)[1][0][1] == "0.002, 0.001, 0.001"
    assert summary["pays_from"] == 4e12 and pays(summary).endswith("It pays from 4e+12 FLOPs on, as far as was run.")
    assert [cell.split(":")[0] for cell in rows(summary)[1][-1][2:5]] == ["does not pay", "not decided", "pays"]


def test_growth_is_judged_against_the_best_base_of_each_budget():
    """A second base, and a second recipe from scratch, which is none."""
    curves = {"scratch": [3.0, 2.5, 2.0], "base": [2.4, 2.2, 2.1], "base4": [2.6, 2.0, 1.7], "grown": [2.5, 2.1, 1.8]}
    results = synthetic({name: [losses] * 2 for name, losses in curves.items()})
    summary = summarise(results)
    assert summary["bases"] == ["base", "base4", "base4"] and summary["pays_from"] is None
    assert [one["pays"] for one in summary["verdicts"]] == [False, False, False] and "not seen here" in pays(summary)
    results["arms"]["base4"]["n_layer"] = 8
    assert summarise(results)["bases"] == ["base"] * 3


def test_growth_pays_only_where_it_beats_every_base():
    """At the first budget the base with the lower mean is beaten beyond doubt, the other one, whose seeds differ, is not; at
    the second neither is the lower, and the other is better beyond doubt."""
    base, base4 = [[2.4, 2.0, 2.1], [2.4, 2.2, 2.1], [2.4, 1.8, 2.1]], [[2.2, 2.01, 2.1], [2.6, 2.01, 2.1], [2.5, 2.01, 2.1]]
    curves = {"scratch": [[3.0, 2.5, 2.3]] * 3, "base": base, "base4": base4, "grown": [[2.3, 2.03, 2.0]] * 3}
    summary = summarise(synthetic(curves))
    assert summary["bases"] == ["base", "base", "base"]
    assert [(one["base"], one["pays"]) for one in summary["verdicts"]] == [("base4", None), ("base4", False), ("base", True)]
    assert summary["pays_from"] == 4e12


def test_it_is_not_said_to_pay_from_a_budget_on_that_has_no_grown_model_behind_it():
    curves = {"scratch": [[3.0, 2.5, 2.0]] * 2, "base": [[2.4, 2.3, 2.2]] * 2, "grown": [[2.3, 2.2, None]] * 2}
    summary = summarise(synthetic(curves))
    assert [one and one["pays"] for one in summary["verdicts"]] == [True, True, None] and summary["pays_from"] is None


def test_scratch_counts_from_where_it_came_down_to_its_last_loss_for_good():
    """1.9 at twice the FLOPs is below the 2.0 that it ends with: the target was reached there, by its own curve."""
    curves = {"scratch": [[3.0, 1.9, 2.0]], "base": [[3.0, 2.9, 2.8]], "grown": [[3.0, 1.9, 1.8]]}
    summary = summarise(synthetic(curves))
    assert summary["arms"]["scratch"]["speedup_flops"]["mean"] == summary["arms"]["grown"]["speedup_flops"]["mean"] == 0
    for no_target in ([2.0, 2.1, 2.0], [2.0, 1.9, 2.0]):  # left again; below from its first point, so nobody knows since when
        arms = summarise(synthetic(curves | {"scratch": [no_target]}))["arms"]
        assert arms["scratch"]["speedup_flops"] is arms["grown"]["speedup_flops"] is None


def between() -> dict:
    """Scratch, and four sizes that never grow, at 2e12 and 8e12 FLOPs; an arm that grows for each, measured before it, too."""
    budgets = [1e12, 2**0.5 * 1e12, 2e12, 4e12, 2**0.5 * 4e12, 8e12]
    curves = {name: [None, None, 3.0 + more, None, None, 2.5 + more] for name, more in FLAT.items()}
    curves["grown2"], curves["grown8"] = [3.2, 3.0, 2.8, None, None, None], [None, None, None, 2.4, 2.35, 2.3]
    results = synthetic({name: [losses] * 2 for name, losses in curves.items()}, tuple(budgets))
    for name, arm in results["arms"].items():
        arm["budgets"] = [budget for budget, loss in zip(budgets, curves[name], strict=True) if loss]
        arm["sweep"] = {f"{budget:g}": {"0.001": [2.0, 2.1]} for budget in arm["budgets"]}
        arm["n_layer"] = {"base1": 1}.get(name, arm["n_layer"])
    return results


FLAT = {"scratch": 0.0, "base4": -0.1, "base": 0.1, "base1": 0.2}


def test_every_budget_has_its_speedup_over_scratch_and_its_differences_to_all_that_never_grew():
    """Grown for 2e12, the loss of scratch there is met at 1.41e12; grown for 8e12, scratch's is passed before 4e12."""
    results = between()
    summary = summarise(results)
    head, found = by_budget(results, summary)
    assert head[2:6] == ["grown", "speedup", "exact count", "in seconds"] and head[6:] == [f"minus {name}" for name in FLAT][1:]
    assert [row[2] for row in found] == ["grown2", "grown8"] and [row[0] for row in found] == ["2e+12", "8e+12"]
    assert found[0][3:5] == ["+41 ± 0 %"] * 2 and found[1][3:5] == ["≥ +100 %"] * 2
    assert found[0][6:] == ["-0.100 ± 0.000", "-0.300 ± 0.000", "-0.400 ± 0.000"]
    assert rows(summary)[0][2:4] == ["loss at 2e+12", "loss at 8e+12"], "at which scratch was measured"
    assert summary["pays_from"] == 2e12, "points of grown arms alone decide nothing"
    assert gain(results, "grown2", "0", "flops", 2e12, "base4")["gain"] == pytest.approx(2 / 2**0.75 - 1)
    assert gain(results, "grown2", "0", "flops", 4e12) is None, "scratch has no point there"


def test_noisy_arm_of_which_one_seed_is_not_reached_has_no_number():
    curves = {"scratch": [[3.0, 2.5, 2.0]] * 2, "base": [[2.0, 1.9, 1.8]] * 2, "grown": [[2.5, 1.9, 2.1], [2.5, 1.9, 1.8]]}
    summary = summarise(synthetic(curves))
    assert summary["arms"]["grown"]["speedup_flops"] is None
    assert rows(summary)[1][2][5] == "1 of 2 seeds reach it: +124 %"  # at 2^(5/6) of 4
    assert summary["pays_from"] is None and "does not pay" in pays(summary)
    bound = summary["arms"]["base"]["speedup_flops"]
    assert bound["at_least"] and bound["half_width"] is None, "a mean of bounds has no interval"


def test_one_seed_decides_nothing():
    curves = {"scratch": [[3.0, 2.5, 2.0]], "base": [[2.4, 2.2, 2.1]], "grown": [[2.5, 2.1, 1.8]]}
    summary = summarise(synthetic(curves))
    assert [one["pays"] for one in summary["verdicts"]] == [None] * 3 and summary["pays_from"] is None


def test_arm_without_a_point_at_the_smallest_budget_is_judged_by_the_others():
    curves = {"scratch": [[3.0, 2.5, 2.0]] * 2, "base": [[2.4, 2.3, 2.2]] * 2, "grown": [[None, 2.2, 1.8]] * 2}
    summary = summarise(synthetic(curves))
    grown = summary["arms"]["grown"]
    assert grown["losses"][0] is None and grown["minus_base"][0] is None and summary["verdicts"][0] is None
    assert grown["speedup_flops"]["mean"] == pytest.approx(2**0.5 - 1) and summary["pays_from"] == 2e12
    assert rows(summary)[1][-1][2] == "-"


def test_arm_below_from_its_first_point_is_bounded_by_its_curve_after_growth():
    """The base met the target at 0.2e12 before it grew; that is no merit of growth. Its curve after growth does at 0.75e12."""
    results = synthetic({"scratch": [[3.0, 2.5, 2.0]], "base": [[3.0, 2.5, 2.2]], "grown": [[1.9, 1.8, 1.7]]})
    run, end = results["runs"]["grown-0-0"], results["runs"]["grown-0-0"]["evaluations"][0]
    results["runs"]["trunk"] = {
        "evaluations": [end | {"flops": 0.2e12, "val_loss": 2.0, "tokens": 2, "seconds": 5.0}],
        "needs": None,
    }
    results["runs"]["trunk"] |= {"growth": None, "begins": 0, "budget": None}
    after = [end | {"flops": f, "val_loss": loss, "tokens": t} for f, loss, t in ((0.5e12, 2.2, 3), (1e12, 1.8, 9))]
    run |= {"evaluations": after, "needs": "trunk", "begins": 2, "growth": {"tokens": 2}}
    results["runs"]["trunk"]["evaluations"].append(
        end | {"val_loss": 0.1, "tokens": 5, "seconds": 7.0}
    )  # after the run has left
    found = summarise(results)["arms"]["grown"]["speedup_flops"]
    assert found["at_least"] and found["mean"] == pytest.approx(4e12 / 0.75e12 - 1)
    assert [e["seconds"] for e in path_of(results, "grown-0-0")] == [5.0, 6.0, 6.0]


def test_pauses_of_single_runs_do_not_count_in_seconds():
    """Three runs of one FLOPs per token took 1, 3 and 100 s: all are told with the pace of the first, behind their base's."""
    results = synthetic({"scratch": [[3.0, 2.5, 2.0]]}, budgets=(9e9, 9e9 + 1, 9e9 + 2))
    runs = results["runs"]
    for name, seconds in zip(runs, (1.0, 3.0, 100.0), strict=True):
        runs[name]["evaluations"][0]["seconds"] = seconds
    base = runs["scratch-0-2"] | {
        "evaluations": [runs["scratch-0-2"]["evaluations"][0] | {"flops": 2e9, "tokens": 4, "seconds": 8.0}]
    }
    later = base | {
        "evaluations": [base["evaluations"][0] | {"flops": 7e9, "tokens": 9, "seconds": 5 / 3}],
        "needs": "base",
        "begins": 4,
    }
    results["runs"] = runs | {"base": base, "later": later}
    paced = at_best_pace(results)
    assert [path_of(paced, name)[-1]["seconds"] for name in results["runs"]] == pytest.approx([1.0, 1.0, 1.0, 8.0, 8.0 + 5 / 9])
    assert runs["scratch-0-2"]["evaluations"][0]["seconds"] == 100.0, "results on disk stay as measured"


def test_optimum_of_a_parabola_is_told_where_it_lies_inside():
    losses = {share: 2 + (math.log(share) - math.log(0.1)) ** 2 for share in (0.02, 0.05, 0.2, 0.3)}
    assert parabola(losses)[0] == pytest.approx(0.1)
    assert parabola({share: loss for share, loss in losses.items() if share > 0.1} | {0.5: 4.6, 0.6: 5.2})[0] is None


def test_report_tells_of_all_finished_studies_and_names_the_others(tmp_path):
    curves = {"scratch": [[3.0, 2.5, 2.0]] * 2, "base": [[2.4, 2.3, 2.2]] * 2}
    curves |= {f"grown{share}": [[2.5, 2.2 - share, 1.8 + share**2]] * 2 for share in (0.05, 0.1, 0.2, 0.4)}
    results = synthetic(curves) | {"study": "timing"}
    for name, arm in results["arms"].items():
        arm["at"] = [float(name.removeprefix("grown"))] if arm["grows"] else []
    later = {f"one{share}": [[2.5, 2.2 - share, 1.9 + (share - 0.4) ** 2]] * 2 for share in (0.05, 0.2, 0.4, 0.8)}
    other = synthetic({f"grown{name}": losses for name, losses in later.items()})
    for name, arm in other["arms"].items():  # from one layer, best at 0.4
        results["arms"][name] = arm | {"at": [float(name.removeprefix("grownone"))], "n_layer": 1}
    results["runs"] |= other["runs"]
    wide = synthetic(curves) | {"model": asdict(LlamaConfig(8, 2, 2, 128, 352, 512, 128))}
    gpu = wide | {"size": "gpu"}
    for name, one in (
        ("timing-cpu", results),
        ("toy-cpu", synthetic(curves)),
        ("toy-cpu-wide", wide),
        ("toy-gpu", gpu),
        ("half-cpu", {"study": "half", "runs": {}}),
        ("sizes-cpu", between() | {"study": "sizes", "seconds": 1.0}),
    ):
        (tmp_path / f"study-{name}.json").write_text(json.dumps(one))
    (tmp_path / "docs").mkdir()
    command = ["bench/speedup.py", "--report", "--results", tmp_path, "--docs", tmp_path / "docs"]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs/study.md").read_text()
    for said in ("| scratch |", "Not finished yet, and not reported: half-cpu", "optimum of the parabola", "L = "):
        assert said in page
    assert "| 2e+12 |" in page and "study-sizes-cpu-frontier.png" in page
    assert (tmp_path / "docs/study-sizes-cpu-frontier.png").stat().st_size > 10000
    assert "diverged" in (tmp_path / "docs/study-sweeps.md").read_text()
    assert page.count("L = ") == len(curves), "two targets of the cpu make a law, one of the gpu does not belong to it"
    assert "| 2 layers | 4e+12 | 5% |" in page and "| 1 layer | 4e+12 | 40% |" in page, "each base has its own best"
    for picture in ("study-toy-cpu.png", "study-toy-cpu-wide.png", "study-timing-cpu-isoflop.png"):
        assert picture in page and (tmp_path / "docs" / picture).stat().st_size > 10000
    lost = results | {"runs": {name: run for name, run in results["runs"].items() if name != "base-1-2"}}
    for damaged in ("{", json.dumps({"runs": None}), json.dumps(lost)):
        (tmp_path / "study-half-cpu.json").write_text(damaged)
        refused = python(*command)
        assert refused.returncode == 2 and "study-half-cpu.json does not hold results of a study" in refused.stderr
