"""Curves of runs: nanostack plot."""

import json

import pytest
from conftest import python

from nanostack.curves import LINES, MARKS, points
from nanostack.growth import Receipt
from nanostack.runs import read_run


def run(folder, losses, growth_at=None):
    """A run's metrics.jsonl with these validation losses."""
    folder.mkdir(parents=True)
    lines = [{"config": {}}]
    for i, loss in enumerate(losses):
        record = {"flops": 1e9 * i, "tokens": 1000 * i, "seconds": 2.0 * i, "loss": loss + 0.1, "val_loss": loss, "lr": 1e-3}
        lines.append(record | {"tokens_per_s": 500.0})
        if i == growth_at:
            rules = ["kept"] * 2 + ["copied"] * 6
            grown = Receipt("stack", 4, None, [0, 1] * 4, rules, rc=0.75, width=None, moments=None, noise=0.0).as_dict()
            lines.append(record | {"loss": None, "lr": None, "tokens_per_s": None, "growth": grown, "val_loss": loss + 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(*arguments):
    return python("-m", "nanostack", "plot", *arguments)


def test_draws_several_runs_as_png_and_svg(tmp_path):
    grown, flat = run(tmp_path / "a/run", [5, 4, 3, 2.5], growth_at=1), run(tmp_path / "b/run", [5, 4.5, 4])
    done = command(grown, flat / "metrics.jsonl", "--x", "tokens", "--out", tmp_path / "curves.png", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"png": str(tmp_path / "curves.png"), "svg": str(tmp_path / "curves.svg")}
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "curves.svg").read_text()[:500]


def test_axis_is_what_was_asked_for(tmp_path):
    records = read_run(run(tmp_path / "run", [5.0, 4.0]))[1]
    assert points(records, "time", "val_loss") == ([0.0, 2.0], [5.0, 4.0])
    assert points(records, "flops", "lr") == ([0.0, 1e9], [1e-3, 1e-3])


def test_lines_of_two_runs_differ_without_colour():
    styles = list(zip(LINES * 2, MARKS, strict=False))
    assert len(set(styles)) == len(styles) >= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere",), "nowhere holds no run"), (("empty",), "no record yet"), ((), "at least one folder")],
)
def test_what_cannot_be_drawn_is_named(arguments, message, tmp_path):
    run(tmp_path / "empty", [])
    done = command(*(tmp_path / argument for argument in arguments))
    assert (
        done.returncode == 2 and message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
