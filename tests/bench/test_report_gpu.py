"""The report on what the commands for a GPU have found: all that they write is read, and stands on the page."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from conftest import ROOT

from bench import anchors, options, report_gpu, throughput, wheels
from bench.recorded import Recorder
from kernels.tune import Tuned
from nanostack.config import load

H100 = "NVIDIA H100 80GB HBM3"


class Read(dict):
    """A dict that knows which of its keys were read, and so on in what it holds."""

    def __init__(self, values):
        super().__init__({key: readable(value) for key, value in values.items()})
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def items(self):
        self.seen |= set(self)
        return super().items()

    def values(self):
        self.seen |= set(self)
        return super().values()

    def fields(self):
        """(name of a field, whether it was read), of this and all it holds."""
        for key, value in super().items():
            yield key, key in self.seen
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, Read):
                    yield from inner.fields()


def readable(value):
    if isinstance(value, dict):
        return Read(value)
    return [readable(inner) for inner in value] if isinstance(value, list) else value


def written() -> dict[str, dict]:
    """What the three commands write, made by the functions that make it there, with numbers of no measurement."""
    results = ROOT / "bench/results"
    about = {"device": H100, "git_commit": "a" * 40, "date": "2026-11-28", "versions": wheels.versions()}
    about |= {"rehearsal": False, "lacking": ["liger-kernel"], "compiled_before": 17, "compiled_now": 3}
    recorder = Recorder(Path("unused"))
    recorder.found |= {
        "passed": 3,
        "failed": {"tests/test_a.py::test_b": "AssertionError: not | the same"},
        "left": ["test_c"],
        "skipped": {"test_d": "needs two"},
    }
    ran = {"losses": [2.0, 1.0], "dtype": "bfloat16", "kernels": "triton"}
    found = {"torch": options.judged(options.OPTIONS["torch"], ran, ran)}
    found["plain"] = options.judged(options.OPTIONS["plain"], ran | {"losses": [2.0, 1.5]}, ran)
    found["graph"] = {"state": "failed", "said": "exit 1: no graph"}
    kept = {"device": H100, "steps": 20, "options": found, "left": ["compile"]}
    config = load(str(ROOT / "config/1b.py"), [])
    config = replace(config, model=replace(config.shapes()[-1], vocab_size=32000))
    turns = [{"seconds": [1.0, 1.1], "first_step": 9.0, "peak_bytes": 2**35, "kernels": "triton"}]
    step = {"config": "1b.py", "overrides": ["--micro_batch", "8"], "dtype": "bfloat16", "rounds": 1, "steps": 2, "warmup": 1}
    step |= {"liger": False, "device": H100, "random_ids": True, "failed": {"hf": "out of memory"}}
    step |= throughput.summarise({"nanostack": turns, "compile": turns}, config, torch.device("cpu"))
    step["anchors"] = anchors.beside("config/1b.py", (), config.model, {"nanostack": 5e4})
    kernel, grown = (
        json.loads((results / name).read_text()) for name in ("kernels-amd-epyc.json", "growth-intel-xeon-processor.json")
    )
    for added in ("versions", "git_commit", "date"):  # of a file of its own
        del kernel[added], grown[added]
    rows = [
        asdict(
            Tuned(
                "attention_dq",
                64,
                90,
                "attention(64, 64, 4, 2)",
                "attention(128, 128, 8, 2)",
                1e-3,
                2e-3,
                40,
                "the whole backward",
            )
        )
    ]
    tuned = {"device": H100, "rows": rows, "left": [["attention_dq", 128]], "patch": "tune.patch"}
    parts = {"tests": {"state": "cut", "seconds": 60.0, "limit": 60, "said": "interrupted", "git_commit": "c" * 40}}
    whole = {"about": about, "parts": parts}
    fast = {"step": step, "start": step, "attention": kernel, "memory_bound": kernel, "growth": grown}
    return {"right": whole | {"tests": recorder.found, "options": kept}, "fast": whole | fast, "tune": whole | {"rows": tuned}}


def test_every_field_that_the_commands_write_is_read_by_the_report():
    files = {name: readable(of) for name, of in written().items()}
    text = report_gpu.page_of([files | {"kernels": {}}])
    for file in files.values():
        for part in [file, *(of for _, of in dict.items(file))]:
            found = list(part.fields())
            assert {name for name, _ in found} == {name for name, read in found if read}, "in one place or another"
    for said in (
        "### gpu-right, " + H100,
        "not \\| the same",
        "- cut: `test_c`",
        "- skipped: `test_d`: needs two",
        "1.000, the whole backward",
        "cccccccccccc",
        "| plain | APART |",
        "Cut: compile.",
        "published",
    ):
        assert said in text
    assert "| attention_dq 64 (90) | `attention(64, 64, 4, 2)` |" in text and "hf failed: out of memory" in text


def test_page_says_where_there_is_no_result_and_leaves_rehearsals_out(tmp_path):
    files = written() | {"kernels": {}}
    for of in files.values():
        if of:
            of["about"] = of["about"] | {"rehearsal": True}
    assert "###" not in report_gpu.page_of([files])
    assert report_gpu.page_of([]) == report_gpu.NOTHING
    page = (ROOT / "docs/performance.md").read_text()
    tables = report_gpu.page_of([report_gpu.files_of(folder) for folder in report_gpu.folders(ROOT / "bench/results")])
    assert report_gpu.placed(page, tables) == page, "python bench/report_gpu.py writes the page's tables"


def test_report_of_a_folder_without_results_leaves_the_page_alone(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("the page")
    monkeypatch.setattr(report_gpu, "PAGE", page)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/right.json").write_text("{")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/right.json").write_text('{"about": {}}')
    for folder, said in (("typo", "holds no right, fast, tune or kernels.json"), ("bad", "is damaged"), ("old", "is damaged")):
        monkeypatch.setattr(sys, "argv", ["report_gpu.py", str(tmp_path / folder)])
        assert report_gpu.main() == 2 and page.read_text() == "the page"
        errors = capsys.readouterr().err
        assert said in errors and len(errors.splitlines()) == 1
