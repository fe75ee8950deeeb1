"""The README's commands, run as they stand there but for their size."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, python

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
SMALL = (
    "--model.d_model 32 --model.n_head 2 --model.n_kv_head 2 --model.d_ff 48 --model.seq_len 32 --batch_tokens 1024 "
    "--micro_batch 4 --log_interval 1024 --save_interval 4096 --data.val_tokens 512 --dtype float32"
)
STAGE = "--stages.{0}.tokens 4096 --stages.{0}.warmup_tokens 1024"


def run(command: list[str], cwd) -> str:
    if command[0] == sys.executable and re.match(r"nanostack\.|train\.py|grow\.py", command[2 if command[1] == "-m" else 1]):
        done = python(*command[1:], cwd=cwd)
    else:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def small(line: str) -> list[str]:
    """The same command at toy size: two processes instead of eight, tiny shapes."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        processes = "2" if "--nproc_per_node" in words else "1"
        script = words[words.index("train.py") :]
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *script]
        config = next(word for word in words if word.startswith("config/"))
        stages = range(2 if config == "config/1b.py" else 1)
        return words + SMALL.split() + " ".join(STAGE.format(i) for i in stages).split()
    words[0] = sys.executable
    if "nanostack.sample" in words:
        words += ["--tokens", "8"]
    if "nanostack.prepare" in words:
        words = ["texts/" if word in ("stdlib", "site-packages") else word for word in words]
    return [re.sub("bpe:[0-9]+", "bpe:300", word) for word in words]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_commands_from_text_to_a_grown_model_work_in_order(tmp_path):
    for name in ("train.py", "grow.py", "config", "nanostack", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "texts").mkdir()
    for name in ("argparse.py", "ast.py", "bdb.py", "code.py", "copy.py"):
        (tmp_path / "texts" / name).symlink_to(os.path.join(os.path.dirname(os.__file__), name))
    workflow = [line for line in COMMANDS if not line.startswith("make ") and " # needs " not in line]
    assert len(workflow) == 12
    for line in workflow:
        run(small(line), tmp_path)
    grown = [json.loads(line) for line in (tmp_path / "out/1b_grown/metrics.jsonl").read_text().splitlines()][1:]
    assert grown[0]["tokens"] == 4096 + 1024 and (tmp_path / "out/1b_base/ckpt-x4.pt").exists()


@pytest.mark.slow
def test_quickstart_trains_grows_compares_and_draws(tmp_path):
    """`make quickstart` in a tiny setting, in the environment that runs this test."""
    assert COMMANDS[:2] == ["make quickstart", "make test"]
    size = f"--scale 0.004 --out {tmp_path / 'out'} --data {tmp_path / 'data'}"
    said = run(["make", "quickstart", "VENV=", f"PYTHON={sys.executable}", f"ARGS={size}"], ROOT)
    assert "speedup FLOPs(scratch) / FLOPs(grown) − 1 = " in said and "the grown model writes" in said
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary.keys() >= {"speedup", "loss_target", "flops_scratch", "flops_grown", "val_loss", "seconds"}
    assert summary["val_loss"].keys() == {"scratch", "grown", "base"}
    assert summary["loss_target"] == summary["val_loss"]["scratch"]
    assert (tmp_path / "out/speedup.png").read_bytes().startswith(b"\x89PNG")
    spent = [arm["flops"] for arm in summary["arms"].values()]
    assert max(spent) / min(spent) < 2 and summary["arms"]["grown"]["growth"]["layers"] == [0, 1] * 4
    # A second call finds everything done and reports the same.
    command = [sys.executable, "study/quickstart.py", *size.split(), "--json"]
    again = json.loads(run(command, ROOT))
    assert again["val_loss"] == summary["val_loss"] and again["speedup"] == summary["speedup"]


def test_pictures_and_files_named_in_the_readme_exist():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README) + re.findall(r"^\| `([\w./]+)`", README, re.M):
        assert (ROOT / path).exists(), path


def test_floors_in_the_kernel_notes_are_the_benchmarks():
    done = subprocess.run(
        [sys.executable, "bench/kernel_ops.py", "--floor"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in (ROOT / "docs/kernels.md").read_text()


def test_costs_in_the_growth_page_are_the_measured_ones():
    page = (ROOT / "docs/growth.md").read_text().split("## What it costs")[1]
    measured = json.loads((ROOT / "bench/results/growth-intel-xeon-processor.json").read_text())
    rows = [row for row in measured["rows"] if row["shape"] == "1b"]
    for row, line in zip(rows, [line for line in page.splitlines() if "GiB |" in line], strict=True):
        assert line.endswith(f"| {row['seconds']:.1f} | {row['peak_bytes'] / 2**30:.1f} GiB |"), line
    assert max(row["layers_beyond"] for row in measured["rows"] if row["way"].startswith("in place")) <= 0.15


def test_growth_is_timed_beside_the_way_through_the_host(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts the root first
    from bench import growth

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
