"""The README's commands, run as they stand there but for their size."""

import json
import re
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, python
from pages import Shell, commands, lines_of, workshop

from bench import growth
from nanostack.runs import read_run
from study import quickstart
from study.results import read_results
from study.studies.quickstart import RATES

PAGE = ROOT / "README.md"
README = PAGE.read_text()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_commands_from_text_to_a_grown_model_work_in_order(tmp_path):
    workshop(tmp_path)
    workflow = [line for line in commands(PAGE) if not line.startswith("make ")]
    assert len(workflow) == 12
    shell = Shell(tmp_path, launches=True)
    for line in workflow:
        shell(line)
    grown = [json.loads(line) for line in (tmp_path / "out/1b_grown/metrics.jsonl").read_text().splitlines()][1:]
    assert grown[0]["tokens"] == 4096 + 1024 and (tmp_path / "out/1b_base/ckpt-x4.pt").exists()


@pytest.mark.slow
def test_quickstart_trains_grows_compares_and_draws(tmp_path):
    """`make quickstart` in a tiny setting, in the environment that runs this test."""
    assert lines_of(PAGE)[:2] == ["make quickstart", "make test"]
    size = f"--scale 0.003 --out {tmp_path / 'out'} --text stdlib --data {tmp_path / 'data'}"
    make = ["make", "quickstart", "VENV=", f"PYTHON={sys.executable}", f"ARGS={size}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "speedup FLOPs(scratch) / FLOPs(grown) − 1 = " in said and "the grown model writes" in said
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary.keys() >= {"speedup", "loss_target", "flops_scratch", "flops_grown", "val_loss", "seconds"}
    assert summary["val_loss"].keys() == {"scratch", "grown", "base4", "base"}
    assert summary["loss_target"] == summary["val_loss"]["scratch"]
    assert (tmp_path / "out/speedup.png").read_bytes().startswith(b"\x89PNG")
    for arm, layers in (("scratch", 8), ("grown", 8), ("base4", 4), ("base", 2)):
        assert f"{layers} layers" in said and (tmp_path / f"out/{arm}/ckpt.pt").is_file()
        assert read_run(tmp_path / f"out/{arm}")[0]["config"]["model"]["n_layer"] == layers
    # A second call finds everything done and reports the same.
    done = python("-m", "study.quickstart", *size.split(), "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["val_loss"] == summary["val_loss"] and again["speedup"] == summary["speedup"]


def test_table_of_the_quickstart_is_its_committed_result():
    summary = quickstart.summary_of(read_results(ROOT / "bench/results/study-quickstart-cpu.json"))
    section = README.split("## Two commands")[0]
    for arm, label in (
        ("scratch", "8 layers from scratch"),
        ("base4", "4 layers, never grown"),
        ("base", "2 layers, never grown"),
    ):
        below = quickstart.plus_minus(summary["grown_minus"][arm]).lstrip("-")
        assert f"| {label} | {summary['val_loss'][arm]:.3f} | {below} | {quickstart.gained(summary, arm)} |" in section
    assert f"**{summary['val_loss']['grown']:.3f}**" in section and summary["seeds"] == [0, 1, 2, 3, 4]
    assert summary["lrs"] == RATES and summary["epochs"]["base"] < 1


def test_pictures_and_files_named_in_the_readme_exist():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path.partition("#")[0]).exists(), path  # `make docs` looks for the place in it


def test_tree_in_the_readme_is_the_one_of_the_repository():
    """Each line names what is there; no folder of the root, nor of the package, is left out."""
    (tree,) = re.findall(r"```\n(train\.py .*?)```", README, re.S)
    found = []
    for indent, name in re.findall(r"^( *)(\S+)  ", tree, re.M) + re.findall(r"^( *)(nanostack/)$", tree, re.M):
        found.append((ROOT / "nanostack" if indent else ROOT) / name)
    assert all(path.is_dir() if path.suffix == "" else path.is_file() for path in found), found
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for parent in (ROOT, ROOT / "nanostack"):
        inside = {path.relative_to(parent).parts[0] for name in tracked if (path := ROOT / name).is_relative_to(parent)}
        folders = {parent / name for name in inside if (parent / name).is_dir() and not name.startswith(".")}
        assert folders - {ROOT / "nanostack/kernels", ROOT / "nanostack/presets"} <= set(found), parent  # links


def test_floors_in_the_kernel_notes_are_the_benchmarks():
    done = python("bench/kernel_ops.py", "--floor")
    assert done.returncode == 0 and done.stdout.strip() in (ROOT / "docs/kernels.md").read_text()


def test_costs_in_the_growth_page_are_the_measured_ones():
    page = (ROOT / "docs/growth.md").read_text().split("## What it costs")[1]
    measured = json.loads((ROOT / "bench/results/growth-intel-xeon-processor.json").read_text())
    rows = [row for row in measured["rows"] if row["shape"] == "1b"]
    for row, line in zip(rows, [line for line in page.splitlines() if "GiB |" in line], strict=True):
        assert line.endswith(f"| {row['seconds']:.1f} | {row['peak_bytes'] / 2**30:.1f} GiB |"), line
    assert max(row["layers_beyond"] for row in measured["rows"] if row["way"].startswith("in place")) <= 0.15


def test_growth_is_timed_beside_the_way_through_the_host(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "copy_rate", partial(growth.copy_rate, size=2**20))
    monkeypatch.setattr(growth, "alone", lambda function, *job: function(*job))  # one process will do here
    monkeypatch.setattr(growth.torch.cuda, "is_available", lambda: False)
    answer = growth.main(growth.Command(("tiny",), samples=2, out=tmp_path / "growth.json"))
    assert json.loads((tmp_path / "growth.json").read_text()) == answer
    assert [row["way"] for row in answer["rows"]] == list(growth.WAYS)
    weights, moments, host = answer["rows"]
    assert weights["state_bytes"] == host["state_bytes"] and moments["state_bytes"] > 2.9 * weights["state_bytes"]
    assert all(row["seconds"] > 0 and row["of_copy_rate"] > 0 for row in answer["rows"])
    with pytest.raises(ValueError, match="there is no shape 9b"):
        growth.main(growth.Command(("9b",)))
