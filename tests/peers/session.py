"""The child of run.py: one peer's own test files, under pytest, with the kernels of one backend in place of the peer's.

An adapter is a module with REPOSITORY, PATHS (folders of the checkout that its files import from), TESTS ({file: names of the
test functions that are about an operation of ours}), CUDA (whether its files ask for a GPU) and install(ours, checkout), which
puts the operations of `ours` where the peer's would be imported from. It may have CUT ({file: (names, imports)}), for files
that cannot be imported whole, and avoids(params, backend): whether a case's parameters tell that it is refused or too large.
"""

import contextlib
import importlib.util
import inspect
import json
import random
import re
import resource
import signal
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from ours import Ours, cut
from torch.overrides import TorchFunctionMode

TRIES = 4  # candidates for each case that shall run, as some are refused
REST = 3  # of each test's other cases
MEMORY = 12 << 30  # bytes of address space: some cases are made for the memory of a GPU


class OnCpu(TorchFunctionMode):
    """Where a peer's file says "cuda", the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        here = lambda x: "cpu" if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x  # noqa: E731
        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


def pretend_cuda() -> None:
    """A GPU of compute capability 9.0, as far as imports and skip conditions ask; its tensors are the CPU's."""
    OnCpu().__enter__()
    gpu = types.SimpleNamespace(total_memory=80 << 30, multi_processor_count=132, major=9, minor=0, name="none")
    nothing = lambda *args, **options: None  # noqa: E731
    answers = {"is_available": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0}
    answers |= {"get_device_capability": (9, 0), "get_device_properties": gpu, "get_device_name": "none"}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    for name in ("synchronize", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, nothing)
    torch.cuda.device = lambda *args: contextlib.nullcontext()


class Cases:
    """pytest's plugin: takes the tests that are about our operations, a seeded sample of their cases, and counts what comes."""

    def __init__(self, ours: Ours, adapter: types.ModuleType, job: dict):
        self.ours, self.tests, self.job = ours, adapter.TESTS, job
        self.avoids = getattr(adapter, "avoids", None)
        self.run, self.failures, self.left_out, self.other_tests = Counter(), [], 0, 0
        self.counts = {"passed": 0, "failed": 0, "refused": Counter(), "skipped": Counter()}

    def pytest_pycollect_makeitem(self, collector, name, obj):
        names = next((names for file, names in self.tests.items() if str(collector.path).endswith(file)), ())
        if name.startswith("test") and inspect.isroutine(obj) and name not in names:
            self.other_tests += 1
            return []

    def pytest_collection_modifyitems(self, items):
        """Keep a seeded sample: TRIES for each case that shall run, and a few of those that are refused or too large."""
        random.Random(self.job["seed"]).shuffle(items)
        items.sort(key=self.avoided)  # stable
        seen, kept = Counter(), []
        for item in items:
            kind = item.path, item.originalname, self.avoided(item)
            seen[kind] += 1
            if seen[kind] <= (REST if self.avoided(item) else TRIES * self.job["cases"]):
                kept.append(item)
        self.left_out = len(items) - len(kept)
        items[:] = kept

    def avoided(self, item) -> bool:
        """Whether the parameters alone tell that the case is refused, or too large for this backend on a CPU."""
        params = item.callspec.params if hasattr(item, "callspec") else {}
        dtypes = {value for name, value in params.items() if name in ("dtype", "input_dtype", "x_dtype")}
        wrong = {"c": torch.float16, "triton": torch.bfloat16}.get(self.ours.backend)
        return wrong in dtypes or bool(self.avoids and self.avoids(params, self.ours.backend))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if self.run[item.path, item.originalname] >= self.job["cases"]:
            pytest.skip("left out")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        def late(*_):
            pytest.skip(f"not run: longer than {self.job['seconds']} s")

        def compiled(*_, **__):
            pytest.skip("not run: torch.compile")

        torch.manual_seed(self.job["seed"])
        self.ours.calls = 0
        signal.signal(signal.SIGALRM, late)
        signal.alarm(self.job["seconds"])
        compile_, torch.compile = torch.compile, compiled
        try:
            return (yield)
        finally:
            signal.alarm(0)
            torch.compile = compile_

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" or report.outcome != "passed":
            self.count(item, call, report)
        return report

    def count(self, item, call, report) -> None:
        said = str(call.excinfo.value) if call.excinfo else ""
        if hasattr(report, "wasxfail") and report.outcome == "skipped":
            self.counts["skipped"]["the peer expects a failure"] += 1
        elif said == "left out":
            self.left_out += 1
        elif report.outcome == "skipped" and said.startswith("refused: "):
            self.counts["refused"][said.removeprefix("refused: ")] += 1
        elif report.outcome == "skipped":
            self.counts["skipped"][said if said.startswith("not run: ") else "the peer skips it"] += 1
            self.run[item.path, item.originalname] += "longer" in said  # or a test of large cases would take hours
        elif report.outcome == "failed" and re.search("can't allocate memory|MemoryError", said):
            self.counts["skipped"]["not run: more memory than 12 GiB"] += 1
        elif report.outcome == "passed" and not self.ours.calls:
            self.counts["skipped"]["no call of our operations"] += 1
        elif report.outcome == "failed" and not self.ours.calls and call.when == "call":
            self.counts["skipped"][f"the peer's own part fails: {type(call.excinfo.value).__name__}"] += 1
        else:
            self.run[item.path, item.originalname] += 1
            self.counts[report.outcome] += 1
            if report.outcome == "failed":
                self.failures.append(
                    f"{item.path.name}::{item.name}: {type(call.excinfo.value).__name__}: {' '.join(said.split())[:300]}"
                )


def main(job: dict) -> None:
    here = Path(__file__).resolve().parent
    checkout = Path(job["checkout"]).resolve()
    spec = importlib.util.spec_from_file_location("nanostack_adapter", here / f"{job['adapter']}.py")
    adapter = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = adapter
    spec.loader.exec_module(adapter)
    sys.path[:] = [str(checkout / path) for path in adapter.PATHS] + [p for p in sys.path if Path(p) != here]
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # for what the peer's references compile
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if adapter.CUDA:
        pretend_cuda()
    ours = Ours(job["backend"])
    adapter.install(ours, checkout)
    cases = Cases(ours, adapter, job)
    options = ["-q", "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", "/dev/null", "-W", "ignore"]
    cuts = getattr(adapter, "CUT", {})
    whole = {file: checkout / file for file in adapter.TESTS}
    files = [cut(path, *cuts[file], Path(job["out"]).parent / file) if file in cuts else path for file, path in whole.items()]
    status = int(pytest.main([*map(str, files), "--rootdir", str(checkout), "--tb=short", *options], plugins=[cases]))
    found = cases.counts | {"failures": cases.failures, "left_out": cases.left_out, "other_tests": cases.other_tests}
    Path(job["out"]).write_text(json.dumps(found | {"status": status}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
