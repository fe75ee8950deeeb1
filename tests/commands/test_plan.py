"""Advice: the paper's table, the range of its formula, and a config that loads."""

import json

import pytest
from conftest import ROOT, python

from nanostack.commands.plan import Command, config_text, of_config
from nanostack.config import load
from nanostack.flops import mfu
from nanostack.growth.budget import advise, growth_tokens, in_range
from nanostack.model import LlamaConfig


@pytest.mark.parametrize(
    ("params", "tokens", "billions"), [(8e9, 15e12, 6.58), (7e9, 2e12, 11.11), (13e9, 2e12, 15.84), (70e9, 2e12, 42.48)]
)
def test_growth_point_is_the_papers(params, tokens, billions):
    assert round(growth_tokens(params, tokens) / 1e9, 2) == billions


def run(*arguments):
    return python("-m", "nanostack", "plan", *arguments)


def test_advice_is_capped_and_says_so_where_the_formula_breaks():
    assert round(growth_tokens(124e6, 2.5e9) / 1e9, 1) == 20.8
    advice = json.loads(run("--params", "124e6", "--tokens", "2.5e9", "--json").stdout)
    assert advice["d_tokens"] == 0.2 * 2.5e9 and advice["capped"] and not advice["in_range"] and advice["g"] == 4
    said = run("--params", "124e6", "--tokens", "2.5e9").stdout
    assert "capped at 20% of the tokens" in said and "outside the range" in said


def test_flops_include_the_base_and_the_saving_is_the_assumed_one():
    advice = json.loads(run("--params", "1.4e9", "--tokens", "100e9", "--speedup", "0.5", "--json").stdout)
    assert advice["in_range"] == in_range(1.4e9, 100e9) and abs(advice["n_params"] / 1.4e9 - 1) < 0.15
    assert advice["flops"] / advice["flops_grown"] == pytest.approx(1.5)
    assert advice["hours"] / advice["hours_grown"] == pytest.approx(1.5, rel=0.02)  # which count attention, too
    after = advice["flops_grown"] - advice["flops_base"]
    assert after == pytest.approx(6 * advice["n_params"] * advice["tokens_grown"])
    assert advice["base"]["n_layer"] * advice["g"] == advice["target"]["n_layer"]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_printed_config_loads(optim, tmp_path):
    said = run("--params", "7e9", "--tokens", "300e9", "--optim", optim).stdout
    (tmp_path / "planned.py").write_text(said[said.index("from nanostack") :])
    config = load(str(tmp_path / "planned.py"), [])
    assert len(config.stages) == 2 and config.stages[1].growth.g == 4
    assert config.optim.name == optim


def test_config_text_is_a_run_whatever_the_numbers(tmp_path):
    for arguments in ({"seq_len": 3000}, {"speedup": 4.0}, {"tokens": 1e9, "params": 1e9}):
        text = config_text(advise(Command(**{"params": 7e9, "tokens": 300e9} | arguments)))
        (tmp_path / "planned.py").write_text(text)
        stages = load(str(tmp_path / "planned.py"), []).stages
        assert all(stage.warmup_tokens < stage.tokens for stage in stages)


@pytest.mark.parametrize(("gpu", "tera"), [("h200", 989), ("H100 PCIe", 756), ("h100-pcie", 756), ("rtx4090", 165)])
def test_hours_are_those_at_the_peak_of_the_gpu(gpu, tera):
    advice = advise(Command(7e9, 3e11, gpu=gpu, count=2, mfu=0.5))
    tokens_per_s, target = 3e11 / (advice["hours"] * 3600), LlamaConfig(**advice["target"])
    assert mfu(target, tokens_per_s, 2 * tera * 1e12) == pytest.approx(0.5)  # as a run reports it


@pytest.mark.parametrize(("name", "layers", "billions", "days"), [("7b", (8, 32), 5.93, 5.3), ("70b", (20, 80), 70.55, 413)])
def test_config_is_told_in_hours_of_each_stage_at_its_mfu(name, layers, billions, days):
    command = Command(config=str(ROOT / f"config/{name}.py"), gpu="h100", count=64, mfu=0.4)
    told = of_config(command)
    shapes = [LlamaConfig(**stage["model"]) for stage in told["stages"]]
    assert tuple(shape.n_layer for shape in shapes) == layers
    for stage, shape in zip(told["stages"], shapes, strict=True):
        assert mfu(shape, stage["tokens"] / (3600 * stage["hours"]), 64 * 989e12) == pytest.approx(0.4)
        assert stage["flops"] == 6 * stage["n_params"] * stage["tokens"]
    assert round(told["stages"][-1]["n_params"] / 1e9, 2) == billions
    assert told["hours"] / 24 == pytest.approx(days, rel=0.01) and told["hours_scratch"] < told["hours"]
    said = run("--config", f"config/{name}.py", "--gpu", "h100", "--count", "64").stdout
    assert f"config/{name}.py on 64 × h100 at 40% MFU" in said and f"which are {told['hours'] / 24:,.1f} days" in said


def test_config_has_its_own_budget_and_one_of_both_is_needed():
    for arguments, said in (
        (("--config", "config/7b.py", "--params", "7e9"), "leave --params and --tokens out"),
        (("--config", "config/none.py"), "there is no config file config/none.py"),
        (("--config", "config/7b.py", "--count", "0"), "count must be at least 1"),
        (("--params", "7e9"), "give --params and --tokens of the model you want, or --config"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr


BAD = [("--params", "-1"), ("--gpu", "abacus"), ("--params", "1e3"), ("--mfu", "2"), ("--params", "inf"), ("--speedup", "100")]


@pytest.mark.parametrize("arguments", BAD)
def test_impossible_budgets_are_named(arguments):
    done = run("--params", "7e9", "--tokens", "300e9", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
