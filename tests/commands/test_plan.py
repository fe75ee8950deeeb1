"""Advice: the paper's table, the range of its formula, and a config that loads."""

import json

import pytest
from conftest import python

from nanostack.commands.plan import Command, config_text
from nanostack.config import load
from nanostack.growth.budget import advise, growth_tokens, in_range


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
    assert advice["flops"] / advice["flops_grown"] == pytest.approx(1.5) == advice["hours"] / advice["hours_grown"]
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
    assert advice["hours"] == pytest.approx(advice["flops"] / (tera * 1e12 * 2 * 0.5) / 3600)


BAD = [("--params", "-1"), ("--gpu", "abacus"), ("--params", "1e3"), ("--mfu", "2"), ("--params", "inf"), ("--speedup", "100")]


@pytest.mark.parametrize("arguments", BAD)
def test_impossible_budgets_are_named(arguments):
    done = run("--params", "7e9", "--tokens", "300e9", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
