"""bench/speedup.py on finished run folders: what is compared, and what is refused."""

import json
from dataclasses import asdict, replace

import pytest
from conftest import TINY, Trainer, python

import train
from nanostack.config import Stage, load
from nanostack.model import LlamaConfig
from nanostack.runs import read_run
from study.results import curve, speedup
from study.runs import _grown, collect


@pytest.mark.slow
def test_finished_runs_are_compared_and_others_refused(corpus, tmp_path):
    trainer = Trainer(corpus, tmp_path)
    grown, scratch = trainer.good("grown", "--stages.1.min_lr", "0"), tmp_path / "scratch"
    for out, n_layer, steps in (("scratch", 4, 24), ("base", 2, 37)):
        flat = load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / out), "--model.n_layer", str(n_layer)])
        train.Run(replace(flat, stages=(Stage(steps * 256, 1e-2, "cosine", warmup_tokens=512),))).train()
    done = python("bench/speedup.py", tmp_path / "base", scratch, grown, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == json.loads((tmp_path / "compared.json").read_text()) and (tmp_path / "compared.png").stat().st_size > 10000
    assert [arm["label"] for arm in answer["arms"].values()] == [
        "4 layers",
        "2 layers",
        "2 → 4 layers, stack at 39% of the FLOPs",
    ]
    records = {out: read_run(tmp_path / out)[1] for out in ("scratch", "base", "grown")}
    ends = {out: (found[-1]["flops"], found[-1]["val_loss"]) for out, found in records.items()}
    assert sorted({arm["losses"].index(next(filter(None, arm["losses"]))) for arm in answer["arms"].values()}) == [0, 1]
    found = answer["arms"][str(grown)]["speedup_flops"]
    if ends["grown"][1] <= ends["scratch"][1]:
        after = [r for r in records["grown"] if r["stage"] == 1 and "growth" not in r]
        assert found["at_least"] and found["mean"] == speedup([ends["scratch"]], curve(after))
    else:
        assert found is None
    assert set(answer["bases"]) <= {str(tmp_path / "base"), None}
    longer = {out: with_twice_the_flops(tmp_path / out) for out in ("scratch", "grown")}
    both = collect((scratch, grown, *longer.values()))
    assert list(both["arms"]) == ["scratch", str(grown)], "another rate and share at another budget is no other recipe"
    assert [len(arm["seeds"]["0"]) for arm in both["arms"].values()] == [2, 2] and len(both["budgets"]) > 2
    with pytest.raises(ValueError, match=r"no run of the target \(4 layers × 64\) from scratch"):
        collect((tmp_path / "base", grown))
    other = trainer.good("other", "--stages.1.min_lr", "0", "--data.val_tokens", "512")
    with pytest.raises(ValueError, match="number of validation tokens is 512 in the first and 1024 in the second"):
        collect((scratch, other))
    constant = trainer.good("constant", "--stages.1.schedule", "constant", "--stages.1.min_lr", "0")
    with pytest.raises(ValueError, match="only decayed runs are compared"):
        collect((scratch, constant))
    with pytest.raises(ValueError, match="no run that grows"):
        collect((scratch,))
    seeded = trainer.good("seeded", "--stages.1.min_lr", "0", "--seed", "1")
    with pytest.raises(ValueError, match="do not pair: seeds 1 are missing"):
        collect((scratch, grown, seeded))
    lines = (grown / "metrics.jsonl").read_text().splitlines()
    (grown / "metrics.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(ValueError, match="grown is not finished"):
        collect((scratch, grown))
    (grown / "metrics.jsonl").write_text("\n".join(lines)[:-30])
    with pytest.raises(ValueError, match="is not whole"):
        collect((scratch, grown))


def with_twice_the_flops(folder):
    """A copy of a run, of another learning rate and a vocabulary that was given, whose records all tell twice the FLOPs."""
    copy = folder.with_name(f"{folder.name}-longer")
    copy.mkdir()
    header, *found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    header["config"]["model"]["vocab_size"] = 384
    for stage in header["config"]["stages"]:
        stage["lr"] *= 2
    lines = [header, *(record | {"flops": 2 * record["flops"]} for record in found)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


@pytest.mark.slow
def test_run_grown_on_disk_is_told_with_its_base(corpus, tmp_path):
    """grow.py between two runs: ledger, curve and seconds are those of both."""
    tiny = load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "base")])
    train.Run(replace(tiny, stages=(Stage(12 * 256, 1e-2, "constant"),))).train()
    assert python("grow.py", tmp_path / "base/ckpt.pt", "--g", 2).returncode == 0
    deep = replace(tiny, model=replace(tiny.model, n_layer=4))
    decayed = (Stage(12 * 256, 1e-2, "cosine"),)
    train.Run(replace(deep, stages=decayed, out=str(tmp_path / "scratch"))).train()
    start = str(tmp_path / "base/ckpt-x2.pt")
    train.Run(replace(deep, stages=decayed, out=str(tmp_path / "grown"), init_from=start)).train()
    results = collect((tmp_path / "scratch", tmp_path / "grown"))
    run, own = results["runs"][str(tmp_path / "grown")], read_run(tmp_path / "grown")[1]
    of_base = [record for record in read_run(tmp_path / "base")[1] if record["val_loss"] is not None]
    assert results["arms"][str(tmp_path / "grown")]["label"] == "2 → 4 layers, stack at 39% of the FLOPs"
    assert run["evaluations"][: len(of_base)] == of_base and len(run["evaluations"]) > len(of_base)
    assert run["evaluations"][-1]["seconds"] == own[-1]["seconds"] + of_base[-1]["seconds"]
    assert run["growth"]["tokens"] == of_base[-1]["tokens"] == 12 * 256


def test_shape_after_growths_has_their_loops_and_scale():
    """Also of a run from before there were any."""
    old = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "d_model": 8, "d_ff": 8, "vocab_size": 8, "seq_len": 8}
    stacked = {"op": "stack", "rules": ["kept"] * 2 + ["copied"] * 2, "width": None}
    assert _grown(old, [stacked]) == asdict(LlamaConfig(**old | {"n_layer": 4}))
    looped = _grown(old | {"loops": 4, "residual_scale": 1.0}, [stacked | {"op": "untie", "residual": "rescale"}])
    assert (looped["n_layer"], looped["loops"], looped["residual_scale"]) == (4, 2, 1.0)
    assert _grown(old | {"residual_scale": 1.0}, [stacked | {"residual": "keep"}])["residual_scale"] == 2.0
