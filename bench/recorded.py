"""A plugin of pytest: keep, after every test, what passed, what failed and why, and what is left to do.

    python -m pytest -p bench.recorded --recorded right.json#tests ...

A run that is cut has said by then what it could; with pytest-xdist, too.
"""

from pathlib import Path

import pytest

from bench import sections


def pytest_addoption(parser):
    parser.addoption("--recorded", metavar="FILE#KEY", help="keep the outcome of every test in this JSON file")


def pytest_configure(config):
    if config.option.recorded and not hasattr(config, "workerinput"):  # a worker of xdist reports to the one that started it
        config.pluginmanager.register(Recorder(Path(config.option.recorded)), "recorder")


class Recorder:
    def __init__(self, place: Path):
        self.place = place
        self.found = {"passed": 0, "skipped": {}, "failed": {}, "left": []}

    def write(self) -> None:
        sections.write(self.place, self.found)

    def collected(self, ids: list[str]) -> None:
        if not self.found["left"] and not self.found["passed"]:
            self.found["left"] = list(ids)
            self.write()

    def pytest_collection_finish(self, session) -> None:
        self.collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self.collected(ids)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed(report)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed(report)
        elif report.skipped:
            expected = getattr(report, "wasxfail", None)
            self.found["skipped"][report.nodeid] = report.longrepr[2] if expected is None else f"fails as expected: {expected}"
        if report.when == "teardown":
            self.found["passed"] += not any(report.nodeid in self.found[how] for how in ("skipped", "failed"))
            self.ended(report)

    def ended(self, report) -> None:
        self.found["left"] = [name for name in self.found["left"] if name != report.nodeid]
        self.write()

    def failed(self, report) -> None:
        """One line: what the test, or its file, ended with."""
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr)).splitlines() or [""]
        self.found["skipped"].pop(report.nodeid, None)  # where it was skipped, and failed in its teardown
        self.found["failed"].setdefault(report.nodeid, (lines[0] if crash else lines[-1])[:300])
        self.ended(report)  # a test whose process dies has no teardown
