"""Run a study: tune the learning rates of all its arms, run all seeds, keep what came out.

Learning rates are tuned for every arm and budget by the same sweep: a grid with the first seed, then the two best rates with
every seed, of which the better in the mean is taken; the grid is widened by factors of 2 until what is taken is not at its
edge. Tuned at the smallest budget alone, the target from scratch had too high a rate at the largest; tuned with one seed, its
losses were up to 0.04 nats worse than they need be. A grown arm keeps its base's rate of the smallest budget until it grows;
then its own is swept.

What is in a result file, of this study or another, is not run again, unless something needs a checkpoint of it that is gone.
Interrupted, the same command goes on. On a CPU each run has one thread.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import statistics
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields, replace
from datetime import date
from itertools import product
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import torch
from rich.console import Console

from nanostack.config import Stage, Train
from nanostack.device import choose_device
from nanostack.errors import UserError
from nanostack.files import replacing
from nanostack.model import LlamaConfig
from nanostack.provenance import device_name, git_commit, versions
from nanostack.recorder import Diverged
from nanostack.runs import read_run
from study import training_run
from study.board import Board, Sweep
from study.plan import NUMERICS, Job, Plan, Study
from study.results import read_results

WIDEST = 6  # rates beyond those given, each twice or half of the last
STAGE = {f.name: f.default for f in fields(Stage)}  # what a result need not say of a run
EVALUATION = ("tokens", "flops", "flops_exact", "val_loss", "val_bits_per_byte", "seconds", "epoch", "lr")
DIVERGED = {"val_loss": None, "val_bits_per_byte": None}


def execute(config: Train) -> dict:
    """Run or finish one run in this process. Returns its evaluations and what the report needs of its header."""
    result = attempt(config)
    if result is None:
        shutil.rmtree(config.out)
        result = attempt(config)
    if result is None:
        raise UserError(f"{config.out}: metrics.jsonl does not reach the end of the run")
    return result


def attempt(config: Train) -> dict | None:
    """What `execute` returns; None where the records of a finished run are torn, as a machine leaves them that went down."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    diverged = False
    with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            run = training_run(replace(config, resume=True))
            run.train()
        except Diverged as error:
            diverged = True
            print(f"error: {error}")
    try:
        header, records = read_run(out)
    except UserError:
        return None
    steps = [record for record in records if record["lr"] is not None]
    if not diverged and (not steps or steps[-1]["step"] * config.batch_tokens < config.stages[0].tokens):
        if run.stop.number:
            raise KeyboardInterrupt
        return None
    evaluated = [record for record in records if record["val_loss"] is not None or record is records[-1]]
    evaluations = [{name: record[name] for name in EVALUATION} for record in evaluated]
    if diverged:
        evaluations = [*evaluations, (evaluations[-1] if evaluations else dict.fromkeys(EVALUATION, 0)) | DIVERGED]
    growth = next((record["growth"] for record in records if "growth" in record), None)
    return {"evaluations": evaluations, "growth": growth} | {name: header[name] for name in ("device", "dtype", "git_commit")}


class Runner:
    """Runs jobs that are not in any result file yet, several at a time, and keeps its own up to date."""

    def __init__(self, plan: Plan, name: str, path: Path, jobs: int, console: Console, board: "Callable[..., Board]" = Sweep):
        self.plan, self.path, self.workers, self.console, self.board = plan, path, jobs, console, board
        path.parent.mkdir(parents=True, exist_ok=True)
        self.results = read_results(path) if path.exists() else {"runs": {}}
        about = {"study": plan.study.name, "question": plan.study.question, "size": name, "manifest_sha256": plan.manifest}
        differ = [k for k, v in about.items() if k in self.results and self.results[k] != v and k != "question"]
        if differ:
            raise UserError(f"{path} has results of another study, size or text ({', '.join(differ)} differ): move it away")
        before = self.results.get("model")  # which may have fewer fields
        same = before is not None and LlamaConfig(**before) == plan.model
        about |= {"model": before if same else asdict(plan.model), "budgets": list(plan.size.budgets), "decay": plan.size.decay}
        about["batch_tokens"] = plan.size.batch_tokens
        if any(self.results.get(k) != v for k, v in about.items() if k != "question"):
            self.results.pop("arms", None)  # an edited study is not finished any more
        self.results |= about
        self.runs = {}  # of all studies in the folder
        for file in sorted(path.parent.glob("study-*.json")):
            self.runs |= read_results(file)["runs"]
        self.runs |= self.results["runs"]
        self.ran = False
        self.processes = get_context("forkserver")
        self.processes.set_forkserver_preload(["train"])  # so that torch is imported once, and not by every worker

    def missing(self, jobs: list[Job]) -> list[Job]:
        """Those to run, in order: jobs without a result, and those whose checkpoint one of them needs and is gone."""
        wanted = {}
        for job in reversed(jobs):
            done = job.name in self.runs
            needed = any(w.needs == job.name and not Path(w.config.init_from).exists() for w in wanted.values())
            if not done or needed:
                wanted[job.name] = job
            else:
                self.results["runs"][job.name] = self.runs[job.name]
        return list(reversed(wanted.values()))

    def run(self, jobs: list[Job], what: str) -> None:
        """Run what is missing of `jobs`, each after the one it needs."""
        waiting = self.missing(list({job.name: job for job in jobs}.values()))
        if not waiting:
            return
        self.ran = True
        self.results.pop("arms", None)  # what an edited study had found before is not what it will find
        names = {job.name for job in waiting}
        with (
            self.board(self, waiting, what) as board,
            ProcessPoolExecutor(self.workers, mp_context=self.processes, initializer=_worker) as pool,
        ):
            running: dict[Future, Job] = {}
            try:
                while waiting or running:
                    for job in [j for j in waiting if j.needs not in names][: self.workers - len(running)]:
                        waiting.remove(job)
                        parent = self.runs.get(job.needs)
                        lost = parent and parent["evaluations"][-1]["val_loss"] is None
                        running[pool.submit(dict, parent) if lost else pool.submit(execute, job.config)] = job
                    for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        try:
                            self.keep(job, future.result())
                        except BrokenProcessPool as error:
                            raise UserError(f"{job.name} was killed (out of memory?); the same command goes on") from error
                        names.discard(job.name)
                        board.ended(job)
                    board.tick(list(running.values()))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def keep(self, job: Job, result: dict) -> None:
        stage = {k: v for k, v in job.config.shaping()["stages"][0].items() if v != STAGE[k]}
        about = {"needs": job.needs, "begins": job.begins, "budget": job.budget, "stage": stage}
        about |= {"batch_tokens": batch} if (batch := job.config.batch_tokens) != self.plan.size.batch_tokens else {}
        known = self.runs.get(job.name)
        if known and known["evaluations"][-1]["val_loss"] != result["evaluations"][-1]["val_loss"]:
            raise UserError(
                f"{job.name} ends at other losses than in the results that there are: code or machine have changed since. "
                f"Move {self.path.parent}/study-*.json away, or give other --results, to run the study anew"
            )
        self.runs[job.name] = self.results["runs"][job.name] = result | about
        self.write()

    def write(self) -> None:
        with replacing(self.path) as file:
            file.write(json.dumps(self.results, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")

    def loss(self, job: Job) -> float:
        """At the end of a run; infinite where it has diverged."""
        loss = self.results["runs"][job.name]["evaluations"][-1]["val_loss"]
        return math.inf if loss is None else loss

    def check_finite(self, ways: Iterable[list[list[Job]]]) -> None:
        """Raise `UserError` where the loss at the end of a budget is not finite."""
        diverged = [one[-1].name for of_arm in ways for one in of_arm if math.isinf(self.loss(one[-1]))]
        if diverged:
            raise UserError(f"the loss of {', '.join(diverged)} is not finite, at rates that were tuned: give smaller ones")


def _worker() -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed must not go on writing where the next one resumes."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def run(
    study: Study,
    name: str,
    data: Path | None,
    out: Path,
    results: Path,
    jobs: int,
    console: Console,
    seeds: tuple[int, ...] = (),
    task: "Callable[[Plan, Runner], object] | None" = None,
) -> list[Path]:
    """Tune every arm and run every seed, target by target, or do another `task`. Returns the result files. UserError for a
    study that cannot be.

    Without `data` the text is what the size asks for, in data/TEXT512; without `seeds` they are the study's. Seeds that are in
    the result file already stay.
    """
    if name not in study.sizes:
        raise UserError(f"study {study.name} has sizes {', '.join(study.sizes)}, not {name}")
    out.mkdir(parents=True, exist_ok=True)
    targets = study.sizes[name]
    if data is None:
        text, data = targets[0].text, targets[0].folder.resolve()
        if not data.is_dir():
            folder = targets[0].folder
            raise UserError(f"there is no {folder}: nanostack prepare {text} --out {folder} --tokenizer bpe:512")
    stem = f"study-{study.name}-{name}"
    files = [results / (f"{stem}-d{size.model.d_model}.json" if len(targets) > 1 else f"{stem}.json") for size in targets]
    if len(set(files)) < len(files):
        raise UserError(f"study {study.name}: two targets of one d_model would share a result file")
    plans = [
        Plan(study, replace(size, seeds=all_seeds(path, seeds or size.seeds)), data, out)
        for size, path in zip(targets, files, strict=True)
    ]
    flat, grown = (sum(bool(arm.jumps) is grows for arm in study.arms.values()) for grows in (False, True))
    if flat < 2 or not grown:
        raise UserError(f"study {study.name} needs the target from scratch, its base never grown, and an arm that grows")
    if (most := max(plan.epochs() for plan in plans)) > 1:
        console.print(f"caution: the shallowest arm reads the text {most:.1f} times; more text would be fairer to it")
    results.mkdir(parents=True, exist_ok=True)
    with locked(out), locked(results):
        for plan, path in zip(plans, files, strict=True):
            (task or run_target)(plan, Runner(plan, name, path, jobs, console))
    return files


def all_seeds(path: Path, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Those that a result file has, then the others of `seeds`."""
    arms = read_results(path).get("arms", {}) if path.exists() else {}
    known = tuple(int(seed) for seed in arms.get("scratch", {}).get("seeds", ()))
    return known + tuple(seed for seed in seeds if seed not in known)


@contextlib.contextmanager
def locked(folder: Path):
    """Keep others from running a study there: they would write over each other's results."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another process is running a study in {folder}") from error
    finally:
        os.close(handle)


def run_target(plan: Plan, runner: Runner) -> None:
    study, size = plan.study, plan.size
    taken: dict[tuple[str, float], float] = {}  # learning rates by arm and budget
    sweep: dict[tuple[str, float], Tried] = {}
    order = sorted(study.arms, key=lambda arm: len(study.arms[arm].jumps) > 0)

    def way(arm: str, budget: float, lr: float, seed: int) -> list[Job]:
        """The runs to the end of one budget."""
        base = plan.base_of(study.arms[arm])
        base_rate = taken[base, plan.budgets(base)[0]] if study.arms[arm].jumps else 0.0
        return plan.jobs(arm, seed, lr, base_rate, budget)

    for grows in (False, True):  # the bases' rates first
        points = [(arm, b) for arm in order if bool(study.arms[arm].jumps) is grows for b in plan.budgets(arm)]
        tried = tune(points, size.lrs, size.seeds, way, runner)
        sweep |= tried
        taken |= {point: best(losses(runs, runner)) for point, runs in tried.items()}
    ways = {
        (arm, seed): [way(arm, b, taken[arm, b], seed) for b in plan.budgets(arm)] for arm, seed in product(order, size.seeds)
    }
    runner.check_finite(ways.values())
    arms = arms_of(plan, ways)
    for name in order:
        told = {b: losses(sweep[name, b], runner) for b in plan.budgets(name)}
        arms[name]["sweep"] = {
            f"{b:g}": {f"{lr:g}": [None if math.isinf(x) else x for x in found[lr]] for lr in sorted(found)}
            for b, found in told.items()
        }
    all_ways = [
        way(*point, lr, seed) for point, runs in sweep.items() for lr, jobs in runs.items() for seed in size.seeds[: len(jobs)]
    ]
    used = {job.name for one in all_ways for job in one}
    runner.results["runs"] = {name: run for name, run in runner.results["runs"].items() if name in used}
    if runner.ran or "arms" not in runner.results:
        runner.results |= about_now(runner.workers)
    runner.results["arms"] = arms
    runner.write()


def about_now(processes: int) -> dict:
    """What results say of the code and the machine that made them."""
    about = {"git_commit": git_commit(), "date": date.today().isoformat(), "device": device_name(choose_device("auto"))}
    return about | {"processes": processes, "versions": versions(), "numerics": NUMERICS}


def arms_of(plan: Plan, ways: dict[tuple[str, int], list[list[Job]]]) -> dict:
    """The arms as results tell them, with the names of the runs of `ways` {(arm, seed): [jobs to the end of each budget]}."""
    arms: dict[str, dict] = {}
    for (name, seed), of_seed in ways.items():
        if name not in arms:
            arm = plan.study.arms[name]
            arms[name] = {"label": arm.label, "n_layer": arm.n_layer, "grows": bool(arm.jumps), "at": [j.at for j in arm.jumps]}
            arms[name] |= {"model": {"n_layer": arm.n_layer, **arm.model}} if arm.model else {}
            arms[name] |= {"budgets": list(plan.budgets(name))} if arm.budgets else {}
            arms[name] |= {"batch_tokens": arm.batch_tokens} if arm.batch_tokens else {}
            arms[name]["seeds"] = {}
        arms[name]["seeds"][str(seed)] = list(dict.fromkeys(job.name for one in of_seed for job in one))
    return arms


Tried = dict[float, list[Job]]  # by learning rate the runs that end there, of the first seed or of all


def losses(tried: Tried, runner: Runner) -> dict[float, list[float]]:
    return {lr: [runner.loss(job) for job in jobs] for lr, jobs in tried.items()}


def best(losses: dict[float, list[float]]) -> float:
    """The rate with the lowest mean, of those tried with the most seeds."""
    most = max(map(len, losses.values()))
    return min((lr for lr, found in losses.items() if len(found) == most), key=lambda lr: statistics.mean(losses[lr]))


def tune(
    points: list[tuple[str, float]],
    lrs: tuple[float, ...],
    seeds: tuple[int, ...],
    way: Callable[[str, float, float, int], list[Job]],
    runner: Runner,
) -> dict[tuple[str, float], Tried]:
    """What was tried of each (arm, budget): rates with the first seed, the two best with all, until the best lies inside.

    A single rate is taken as it is. Raises `UserError` where the best rate runs away.
    """
    sweep: dict[tuple[str, float], Tried] = {point: {} for point in points}
    todo = {(point, lr): seeds[:1] for point in points for lr in sorted(lrs)}
    while todo:
        ways = {(point, lr): [way(*point, lr, seed) for seed in of_rate] for (point, lr), of_rate in todo.items()}
        arms = ", ".join(dict.fromkeys(arm for (arm, _), _ in todo))
        what = "first seed" if len(max(todo.values(), key=len)) == 1 else "all seeds"
        runner.run([job for of_rate in ways.values() for one in of_rate for job in one], f"learning rates of {arms}: {what}")
        for (point, lr), of_rate in ways.items():
            sweep[point][lr] = [one[-1] for one in of_rate]
        todo = {}
        for point, tried in sweep.items() if len(lrs) > 1 else ():
            first = {lr: found[:1] for lr, found in losses(tried, runner).items()}
            wider = beyond(first) or beyond(losses(tried, runner))
            if wider and len(tried) > len(lrs) + WIDEST:
                raise UserError(f"no best learning rate of arm {point[0]} between {min(tried):g} and {max(tried):g}")
            if wider:
                todo[point, wider] = seeds[:1]
        if not todo:
            two = {
                point: sorted(tried, key=lambda lr, tried=tried: runner.loss(tried[lr][0]))[:2]
                for point, tried in sweep.items()
            }
            todo = {(point, lr): seeds for point in points for lr in two[point] if len(sweep[point][lr]) < len(seeds)}
    return sweep


def beyond(losses: dict[float, list[float]]) -> float | None:
    """The next rate to try where the best is at the edge."""
    lr = best(losses)
    return lr / 2 if lr == min(losses) else lr * 2 if lr == max(losses) else None
