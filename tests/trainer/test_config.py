"""Config files and overrides."""

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from nanostack import old_fields
from nanostack.config import Growth, Optim, Stage, Train, config_file, grow, load

PRESETS = sorted(str(path) for path in (ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.rsplit("/")[-1])
def test_every_preset_loads_and_divides_over_one_to_32_devices(path):
    config = load(path, [])
    one_device = "quickstart" in path or "50m" in path
    given = {"50m": 8192, "70b": 128256}
    assert isinstance(config, Train) and config.model.vocab_size == given.get(Path(path).stem)
    sequences = config.batch_tokens // config.model.seq_len
    worlds = (1,) if one_device else (1, 8, 32)
    assert all(sequences % (config.micro_batch * world) == 0 for world in worlds)


def test_overrides_reach_every_level():
    overrides = (
        "--data.path elsewhere --stages.1.lr 2e-3 --stages.1.growth.g 3 --optim.betas 0.8 0.9 --parallel.dp_shard 2 --compile"
    )
    config = load(TINY, overrides.split())
    assert config.data.path == "elsewhere" and config.stages[1].growth == Growth("stack", 3)
    assert config.stages[1].lr == 2e-3 and config.stages[0] == load(TINY, []).stages[0]
    assert config.optim.betas == (0.8, 0.9) and config.parallel.dp_shard == 2 and config.compile


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--stages.1.lrr 1e-4", r"--stages\.1\.lrr.*Perhaps you meant: --stages\.\d\.lr"),
        ("--modle.n_layer 3", "--modle.n_layer"),
        ("--stages.9.lr 1", "--stages.9.lr"),
        ("--stages.1.lr fast", "--stages.1.lr.*fast"),
        ("--micro_batch 0", "micro_batch must be at least 1"),
        ("--batch_tokens 100", "nearest legal values are 96 and 128"),
        ("--model.n_kv_head 3", "n_head 4 is not divisible by model.n_kv_head 3"),
        ("--stages.1.growth.g 1", "stages.1.growth: g must be a whole number of 2 or more"),
        ("--stages.1.growth.layers 0-1*3", "g and layers exclude each other"),
        ("--stages.1.growth.g None --stages.1.growth.layers 0-3", "names layer 2, but the model has layers 0 to 1"),
        ("--stages.1.growth.g None --stages.1.growth.layers 0:1", "bad layer list '0:1'"),
        ("--stages.1.growth.d_model 128", "stages.1.growth: d_model belongs to a growth in width"),
        ("--stages.1.growth.width zero --stages.1.growth.d_model 72", "72 is not a whole number of heads of 16 channels"),
        ("--stages.1.growth.ramp_tokens 0", "ramp_tokens 0 must be at least 1"),
        ("--stages.1.growth.op learn --stages.1.growth.optimizer copy", "learn mixes weights"),
        ("--stages.1.growth.op learn --stages.1.growth.learn_steps 0", "at least 1 step"),
        ("--stages.1.growth.moments_old scale --stages.1.growth.moments_factor inf", "a factor of 0 or more"),
        ("--stages.1.growth.moments_factor 0.5", "moments_factor 0.5 is for moments that are scaled"),
        ("--stages.1.growth.ramp_tokens 512", "ramp_tokens 512 must be at least 1, and be for random"),
        ("--stages.1.growth.g 100000000", "no model is made of a thousand times its layers"),
        ("--stages.0.freeze", "stages.0: to freeze all but new layers, or to re-warm new ones, a growth must make some"),
        ("--dtype float16", "invalid choice 'float16'"),
        ("--optim.name moun", "invalid choice 'moun' for argument '--optim.name'.*Perhaps you meant: muon"),
        ("stray", "stray"),
        ("--optim.betas 2 3", "betas and momentum in"),
        ("--optim.grad_clip 0", "grad_clip > 0"),
        ("--data.val_tokens -3", "val_tokens must be at least 1"),
        ("--seed -1", "seed"),
    ],
)
def test_wrong_overrides_raise_one_line_that_names_them(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(TINY, overrides.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no variable `config`"),
        ("config = 3", "has no variable `config`"),
        ("from nanostack.config import Train\nconfig = Train(modle=3)", "unexpected keyword argument 'modle'"),
        ("config = (", "SyntaxError"),
        ("import missing_module", "missing_module"),
    ],
)
def test_broken_config_file_is_named(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(tmp_path / "config.py"), [])
    assert "config.py" in str(caught.value)


def test_config_is_a_file_or_a_preset_and_nothing_between(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load("1b", []) == load(str(ROOT / "config/1b.py"), [])
    (tmp_path / "3b.py").write_text("broken")
    for name, message in (
        ("config/2b.py", r"there is no config file config/2b\.py, and no preset .*; the presets are 1b, 1b_base, "),
        ("1b_bas", r"did you mean 1b_base\?"),
        ("1B", r"did you mean 1b\?"),
        ("3b", r"3b is a preset, and 3b\.py is here: say \./3b\.py, or /.*3b\.py for the preset"),
        ("./3b.py", "NameError"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name, [])
    monkeypatch.chdir(ROOT / "config")
    assert config_file("1b").samefile("1b.py")


def test_run_must_not_start_by_growing_nothing():
    with pytest.raises(ValueError, match="no model before it"):
        dataclasses.replace(load(TINY, []), stages=(grow("stack", 2, tokens=100, lr=1.0),))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one stage"),
        ((Stage(100, None, continues=True),), "the first stage cannot continue"),
        ((Stage(100, 1.0, "wsd", warmup_tokens=60, decay_tokens=50),), "decay_tokens 50 does not fit into stage 0"),
    ],
)
def test_stages_that_cannot_be_are_named(stages, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(load(TINY, []), stages=stages)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_former_name_of_a_field_is_read_and_one_rank_says_so_once(rank, monkeypatch, capsys):
    monkeypatch.setattr(old_fields, "_said", set())
    monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        optim = Optim(decay=0.3)
    assert optim == Optim(weight_decay=0.3) and optim.decay == 0.3
    said = "note: Optim(decay=...) is now called weight_decay\n" if rank == "0" else ""
    assert capsys.readouterr().err == said
    with pytest.raises(TypeError, match="Optim is given decay and weight_decay, which are one"):
        Optim(decay=0.3, weight_decay=0.3)


@pytest.mark.parametrize(("old", "new"), old_fields.RENAMED.items())
def test_former_name_is_read_in_overrides_and_headers_and_the_new_one_is_said(old, new, monkeypatch, capsys):
    monkeypatch.setattr(old_fields, "_said", set())
    part, _, field = new.partition(".")
    config = load(TINY, [f"--{old}", "1", f"--{old}=2"] if part == "parallel" else [f"--{old}", "0.25"])
    assert getattr(getattr(config, part), field) == (2 if part == "parallel" else 0.25)
    assert capsys.readouterr().err == f"note: --{old} is now called --{new}\n"
    with pytest.raises(ValueError, match=rf"{TINY}: .*Error parsing --{new}: "):
        load(TINY, [f"--{old}", "many"])
    header = {part: {old.partition(".")[2]: 3}, "seed": 1}
    assert old_fields.current_config(header, "metrics.jsonl") == {part: {field: 3}, "seed": 1}
    added = {"model": {"loops": 1}, "stages": [{"growth": {"op": "zero", "residual": "rescale"}}, {"growth": None}]}
    former = old_fields.former_config({part: {field: 3}, "seed": 1} | added)
    assert former == header | {"model": {}, "stages": [{"growth": {"op": "zero"}}, {"growth": None}]}
    assert capsys.readouterr().err == f"note: {old} in metrics.jsonl is now called {new}\n"


def test_ramp_must_end_before_the_next_growth_begins():
    config = load(TINY, [])
    first, later = grow("random", 2, tokens=100, lr=1.0, ramp_tokens=250), grow("stack", 2, tokens=100, lr=1.0)
    between = Stage(100, 1.0)
    dataclasses.replace(config, stages=(config.stages[0], first, between, between, later))
    dataclasses.replace(config, stages=(config.stages[0], first))
    with pytest.raises(ValueError, match=r"stages.1.growth.ramp_tokens 250 ends after the next growth begins"):
        dataclasses.replace(config, stages=(config.stages[0], first, between, later))


def test_hash_follows_the_result_not_the_place():
    config = load(TINY, [])
    same = ("--out", "elsewhere", "--data.path", "elsewhere", "--resume", "--keep", "5")
    assert load(TINY, list(same)).sha256() == config.sha256()
    assert load(TINY, ["--stages.0.lr", "0.5"]).sha256() != config.sha256()
    assert dataclasses.replace(config, stages=(Stage(5120, 1.0),)).sha256() != config.sha256()
