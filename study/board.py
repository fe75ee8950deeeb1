"""What a person sees while a study runs."""

import time
from datetime import timedelta
from typing import Any, Protocol, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from study.plan import Job


class Board(Protocol):
    """What shows how a sweep goes on."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error) -> None: ...
    def tick(self, running: list[Job]) -> None:
        """Called about once a second, and when something has ended."""

    def ended(self, job: Job) -> None:
        """Its result is kept."""


class Sweep:
    """A bar, and a line for every run that has ended, with the time that is left for those to come. It takes a
    study.runner.Runner, which knows this module."""

    def __init__(self, runner: Any, jobs: list[Job], what: str):
        self.runner, self.began, self.spent, self.done, self.n_jobs = runner, time.monotonic(), 0.0, 0, len(jobs)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
        self.progress = Progress(*columns, console=runner.console)
        self.total = sum(job.flops for job in jobs)
        self.task = self.progress.add_task(what, total=self.total)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        self.progress.stop()

    def tick(self, running: list[Job]) -> None:
        pass

    def ended(self, job: Job) -> None:
        self.done += 1
        self.spent += job.flops
        self.progress.advance(self.task, job.flops)
        left = timedelta(seconds=round((time.monotonic() - self.began) * (self.total - self.spent) / self.spent))
        said = f"{self.done:>3} of {self.n_jobs} of this sweep, {left} left: {job.name} {self.runner.loss(job):.4f}"
        self.progress.console.print(said, highlight=False, soft_wrap=True)
