"""tests/peers: what the runner says when something is missing, and that an adapter reaches our kernels."""

import json

import pytest
from conftest import ROOT, python
from peers import run as runner
from peers.run import Options, adapters, main, table

from nanostack.errors import UserError

FAKE_PACKAGE = """
def linear_cross_entropy(*args, **options):
    raise NotImplementedError("the peer's own")
"""
FAKE_TESTS = """
import pytest, torch
from cut_cross_entropy import linear_cross_entropy

@pytest.mark.parametrize("shift, bias, wanted", [(0, None, None), (1, None, None), (0, "some", None), (0, None, 0.0)])
def test_loss_forward(shift, bias, wanted):
    e, c = torch.randn(2, 3, 8, device="cuda"), torch.randn(5, 8, device="cuda")
    targets = torch.tensor([[0, 1, -100], [4, 3, 2]]).cuda()
    logits = (e @ c.T)[:, : 3 - shift].reshape(-1, 5)
    expected = torch.nn.functional.cross_entropy(logits, targets[:, shift:].reshape(-1)) if wanted is None else wanted
    assert abs(linear_cross_entropy(e, c, targets, bias=bias, shift=shift) - expected) < 1e-5

def test_of_something_else():
    assert False
"""


def test_missing_things_are_named_in_one_line(tmp_path, monkeypatch):
    for options, said in (
        (Options(), "give the folder that holds checkouts"),
        (Options(peers=tmp_path / "nowhere"), "give the folder that holds checkouts"),
        (Options(table=tmp_path / "nowhere"), "--out writes such a file"),
        (Options(peers=tmp_path, only=("nothing",)), "choose from"),
        (Options(peers=tmp_path, backend=("cuda",)), "choose from torch, c, triton"),
        (Options(peers=tmp_path, only=("liger",)), "git clone https://github.com/linkedin/Liger-Kernel"),
    ):
        with pytest.raises(UserError, match=said) as error:
            main(options)
        assert "\n" not in str(error.value)
    (tmp_path / "Liger-Kernel").mkdir()
    (tmp_path / "damaged.json").write_text("{")
    for options, said in (
        (Options(table=tmp_path / "damaged.json"), "--table .* is no file of results"),
        (Options(peers=tmp_path, only=("liger",), out=tmp_path / "damaged.json"), "--out .* is no file of results"),
        (Options(peers=tmp_path, only=("liger",), out=tmp_path / "damaged.json/a.json"), "nothing can be written there"),
    ):
        with pytest.raises(UserError, match=said) as error:
            main(options)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pytest"):
        main(Options(peers=tmp_path, only=("liger",)))


def test_an_adapter_runs_the_peers_test_on_our_kernel(tmp_path):
    peer = tmp_path / "ml-cross-entropy"
    for name, text in {
        "cut_cross_entropy/__init__.py": FAKE_PACKAGE,
        "tests/test_cce_loss_forward.py": FAKE_TESTS,
        "tests/test_cce_loss_backward.py": "",
    }.items():
        (peer / name).parent.mkdir(parents=True, exist_ok=True)
        (peer / name).write_text(text)
    job = {"adapter": "cce", "checkout": str(peer), "backend": "torch", "out": str(tmp_path / "counts.json")}
    done = python(ROOT / "tests/peers/session.py", json.dumps(job | {"cases": 9, "seconds": 20, "seed": 0}))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["passed"], counts["failed"], counts["refused"]) == (2, 1, {"bias": 1})
    assert counts["other_tests"] == 1 and not counts["skipped"]
    assert "test_loss_forward[0-None-0.0]" in counts["failures"][0]
    lines = table({"cce torch": counts | {"peer": "apple/ml-cross-entropy", "commit": "abc", "backend": "torch"}}).splitlines()
    assert lines[2] == "| apple/ml-cross-entropy | abc | torch | 4 of 4 | 2 | 1 | 1: bias 1 | – |"


def test_only_pairs_that_were_run_now_decide_and_the_file_keeps_the_others(tmp_path, monkeypatch):
    (tmp_path / "Liger-Kernel").mkdir()
    counts = {"passed": 1, "failed": 0, "refused": {}, "skipped": {}, "left_out": 0}
    before = {"cce torch": {"peer": "a/b", "commit": "c", "backend": "torch", **counts, "failed": 1}}
    before["fla c"] = {"peer": "a/b", "commit": "c", "backend": "c", "broken": "it broke"}
    out = tmp_path / "new/peers.json"
    monkeypatch.setattr(runner, "run", lambda *_: counts)
    options = Options(peers=tmp_path, only=("liger",), backend=("torch",), out=out, json=True)
    assert set(main(options)) == {"liger torch"} and out.exists(), "a folder that is missing is made"
    out.write_text(json.dumps(before))
    assert not runner.failed(main(options)) and set(json.loads(out.read_text())) == {*before, "liger torch"}
    counts["failed"] = 1
    assert runner.failed(main(options))


def test_there_is_an_adapter_for_each_peer():
    assert len(adapters()) == 7


def test_the_page_shows_the_recorded_counts():
    assert table(json.loads((ROOT / "bench/results/peers.json").read_text())) in (ROOT / "docs/kernels.md").read_text()
