"""Run a study: many small runs with one question, every point fully decayed.

Warm-up, stable, decay: an arm has one trunk at a constant learning rate, and from it a branch per budget that decays linearly
to zero over the last fifth of the budget's FLOPs. A grown arm's trunk starts from a trunk of its base, which all arms that grow
there share. Seeds change weights and order of the text; the arms of a seed share both.

Learning rates are tuned for every arm by the same sweep at the smallest budget with the first seed: a grid, widened by factors
of 2 until the best is not at its edge. A grown arm keeps the tuned rate of its base until it grows; then its own is swept.

Each run is train.py's, on a CPU with one thread. What was run is in the result file: interrupted, the same command goes on.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.speedup import read_run
from nanostack.config import Data, Growth, Stage, Train
from nanostack.data import load_manifest, manifest_sha256
from nanostack.errors import UserError
from nanostack.flops import flops_per_token
from nanostack.metrics import device_name, git_commit, versions
from nanostack.model import LlamaConfig


@dataclass(frozen=True)
class Jump:
    """A growth of an arm, when it has spent so many FLOPs."""

    at: float  # as a share of the largest budget
    growth: Growth
    stage: dict = field(default_factory=dict)  # further fields of its Stage, such as rewarm_tokens
    restart: bool = True  # warm up again from 0; else the rate goes on


@dataclass(frozen=True)
class Arm:
    """One way to spend the FLOPs."""

    label: str
    n_layer: int  # to begin with
    jumps: tuple[Jump, ...] = ()


@dataclass(frozen=True)
class Size:
    """A study at one size of machine."""

    model: LlamaConfig  # the target; vocab_size None: the data's
    budgets: tuple[float, ...]  # FLOPs by the paper's count
    batch_tokens: int
    micro_batch: int
    warmup_tokens: int
    lrs: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    decay: float = 0.2  # of a budget's FLOPs
    val_tokens: int = 65536


CPU = Size(  # two cores, an hour or two a study
    model=LlamaConfig(n_layer=8, n_head=2, n_kv_head=2, d_model=64, d_ff=176, vocab_size=None, seq_len=256),
    budgets=(4e12, 8e12, 1.5e13),
    batch_tokens=4096,
    micro_batch=16,
    warmup_tokens=122_880,
)
GPU = Size(  # meant for one H200 and ten minutes a study; not run yet
    model=LlamaConfig(n_layer=8, n_head=4, n_kv_head=4, d_model=256, d_ff=704, vocab_size=None, seq_len=512),
    budgets=(1e15, 2e15, 4e15),
    batch_tokens=65_536,
    micro_batch=128,
    warmup_tokens=1_966_080,
)


@dataclass(frozen=True)
class Study:
    name: str
    question: str
    arms: dict[str, Arm]  # "scratch" among them, and every base without jumps
    sizes: dict[str, Size]  # "cpu", "gpu", ...


@dataclass(frozen=True)
class Job:
    """One run of train.py."""

    name: str
    config: Train
    needs: str | None  # the job from whose checkpoint it starts
    flops: float  # it will spend, to show progress
    budget: float | None = None  # of a branch

    def key(self, manifest: str) -> str:
        """Hash of all that shapes the run's records."""
        values = self.config.shaping() | {"init_from": self.needs, "manifest": manifest}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Plan:
    """The jobs of a study on one prepared text. All tokens are whole batches."""

    def __init__(self, study: Study, size: Size, data: Path, out: Path):
        vocab = load_manifest(data)["tokenizer"]["n_vocab"]
        model = replace(size.model, vocab_size=size.model.vocab_size or -(-vocab // 128) * 128)
        self.study, self.size, self.model, self.data, self.out = study, size, model, data, out
        if "scratch" not in study.arms or study.arms["scratch"].jumps:
            raise UserError(f"study {study.name} needs an arm `scratch` that never grows")
        for name, arm in study.arms.items():
            if arm.jumps and self.base_of(arm) is None:
                raise UserError(f"study {study.name}: arm {name} begins with {arm.n_layer} layers, which no arm keeps for good")

    def base_of(self, arm: Arm) -> str | None:
        """Name of the arm that never grows and begins as this one."""
        return next((n for n, a in self.study.arms.items() if not a.jumps and a.n_layer == arm.n_layer), None)

    def jobs(self, arm: str, seed: int, lr: float, base_lr: float, budgets: tuple[float, ...]) -> list[Job]:
        """Trunks and branches of an arm. A trunk's name tells all that shapes it, so that arms share what is the same."""
        jumps, model = self.study.arms[arm].jumps, replace(self.model, n_layer=self.study.arms[arm].n_layer)
        jobs, parent, start, spent, samples = [], None, None, 0.0, 0
        for number in range(len(jumps) + 1):
            last = number == len(jumps)
            if number:
                start = self.checkpoint(parent, samples)
                growth = jumps[number - 1].growth
                model = growth.shape(model).config
                learned = growth.learning_steps() * self.size.batch_tokens
                spent, samples = spent + learned * flops_per_token(model), samples + learned // model.seq_len
            rate = lr if last else base_lr
            until = [(1 - self.size.decay) * b for b in budgets] if last else [jumps[number].at * self.size.budgets[-1]]
            points = [self.tokens(flops - spent, model) for flops in until]
            if points[0] <= self.size.warmup_tokens:
                raise UserError(f"study {self.study.name}: arm {arm} has no room between its warm-up and {until[0]:.3g} FLOPs")
            parent = self.trunk(self.study.arms[arm], number, model, seed, rate, points, parent, start)
            jobs.append(parent)
            if last:
                jobs += [self.branch(parent, model, seed, rate, *at, samples) for at in zip(points, budgets, strict=True)]
            spent, samples = spent + points[-1] * flops_per_token(model), samples + points[-1] // model.seq_len
        return jobs

    def tokens(self, flops: float, model: LlamaConfig) -> int:
        return max(1, round(flops / flops_per_token(model) / self.size.batch_tokens)) * self.size.batch_tokens

    def trunk(self, arm: Arm, number: int, model, seed: int, lr: float, points: list[int], parent: Job | None, start) -> Job:
        """The run at a constant rate before (0) or after the jump of that number, cut into stages at `points`."""
        size, jump = self.size, arm.jumps[number - 1] if number else None
        warmup = size.warmup_tokens if jump is None or jump.restart else 0
        more = {} if jump is None else {"growth": jump.growth, **jump.stage}
        stages = [Stage(points[0], lr, "constant", warmup_tokens=warmup, **more)]
        stages += [Stage(b - a, continues=True) for a, b in itertools.pairwise(points)]
        needs = parent.name if parent else None
        about = json.dumps([[asdict(stage) for stage in stages], seed, needs], sort_keys=True)
        name = f"trunk-{model.n_layer}-layers-lr{lr:g}-s{seed}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
        began = model if parent is None else parent.config.largest()
        return Job(name, self.config(name, began, tuple(stages), seed, start), needs, points[-1] * flops_per_token(model))

    def branch(self, trunk: Job, model, seed: int, lr: float, point: int, budget: float, samples: int) -> Job:
        tokens = self.tokens(self.size.decay * budget, model)
        name = f"{trunk.name}-b{budget:.3g}"
        stage = Stage(tokens, lr, "wsd", decay_tokens=tokens)
        start = self.checkpoint(trunk, samples + point // model.seq_len)
        return Job(name, self.config(name, model, (stage,), seed, start), trunk.name, tokens * flops_per_token(model), budget)

    def checkpoint(self, job: Job, samples: int) -> str:
        return str(Path(job.config.out) / f"ckpt-{samples}.pt")

    def config(self, name: str, model: LlamaConfig, stages: tuple[Stage, ...], seed: int, init_from: str | None) -> Train:
        total = sum(stage.tokens for stage in stages)
        return Train(
            data=Data(str(self.data), val_tokens=self.size.val_tokens),
            model=model,
            stages=stages,
            batch_tokens=self.size.batch_tokens,
            micro_batch=self.size.micro_batch,
            out=str(self.out / name),
            seed=seed,
            init_from=init_from,
            keep=1000,
            log_interval=max(1, total // 20),
            eval_interval=max(1, total // 4),
            save_interval=2**62,
        )


def execute(config: Train) -> dict:
    """Run or finish one run in this process. Returns its evaluations and what the report needs of its header."""
    import train

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    going_on = (out / "metrics.jsonl").exists()
    with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train.Run(replace(config, resume=going_on)).train()
    header, records = read_run(out)
    planned = sum(-(-stage.tokens // config.batch_tokens) * config.batch_tokens for stage in config.stages)
    steps = [record for record in records if record["loss"] is not None]
    if not steps or steps[-1]["step"] * config.batch_tokens < planned:
        raise KeyboardInterrupt
    names = ("tokens", "flops", "flops_exact", "val_loss", "val_bits_per_byte", "seconds", "epoch", "lr")
    evaluations = [{name: record[name] for name in names} for record in records if record["val_loss"] is not None]
    growth = next((record["growth"] for record in records if "growth" in record), None)
    return {"evaluations": evaluations, "growth": growth} | {name: header[name] for name in ("device", "dtype", "git_commit")}


class Runner:
    """Runs jobs that are not in the result file yet, several at a time, and keeps the file up to date."""

    def __init__(self, plan: Plan, name: str, results: Path, jobs: int, console: Console):
        self.plan, self.path, self.workers, self.console = plan, results, jobs, console
        results.parent.mkdir(parents=True, exist_ok=True)
        plan.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(plan.out / "lock", "w")  # noqa: SIM115  held to the end of the process
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is running the study in {plan.out}") from error
        self.manifest = manifest_sha256(plan.data)
        self.results = json.loads(results.read_text()) if results.exists() else {"runs": {}}
        about = {"study": plan.study.name, "question": plan.study.question, "size": name, "manifest_sha256": self.manifest}
        differ = [k for k, v in about.items() if k in self.results and self.results[k] != v and k != "question"]
        if differ:
            raise UserError(f"{results} has results of another study, size or text ({', '.join(differ)} differ): move it away")
        self.results |= about | {"model": asdict(plan.model), "budgets": list(plan.size.budgets), "decay": plan.size.decay}
        self.results |= {"batch_tokens": plan.size.batch_tokens, "versions": versions()}

    def missing(self, jobs: list[Job]) -> list[Job]:
        """Those to run, in order: jobs without a result, and trunks whose checkpoint one of them needs and is gone."""
        named, wanted = {job.name: job for job in jobs}, {}
        for job in reversed(jobs):
            done = self.results["runs"].get(job.name, {}).get("key") == job.key(self.manifest)
            needed = any(w.needs == job.name and not Path(w.config.init_from).exists() for w in wanted.values())
            if not done or needed:
                wanted[job.name] = job
        return [job for name, job in named.items() if name in wanted]

    def run(self, jobs: list[Job], what: str) -> None:
        """Run what is missing of `jobs`, each after the one it needs."""
        waiting = self.missing(list({job.name: job for job in jobs}.values()))
        if not waiting:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
        names = {job.name for job in waiting}
        with (
            Progress(*columns, TimeRemainingColumn(), console=self.console) as progress,
            ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=_worker) as pool,
        ):
            task = progress.add_task(what, total=sum(job.flops for job in waiting))
            running = {}
            try:
                while waiting or running:
                    for job in [j for j in waiting if j.needs not in names][: self.workers - len(running)]:
                        waiting.remove(job)
                        running[pool.submit(execute, job.config)] = job
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        self.keep(job, future.result())
                        names.discard(job.name)
                        progress.advance(task, job.flops)
                        progress.console.print(f"{job.name}: {self.loss(job):.4f}", highlight=False)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def keep(self, job: Job, result: dict) -> None:
        self.results["runs"][job.name] = result | {"key": job.key(self.manifest), "needs": job.needs, "budget": job.budget}
        self.write()

    def write(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.results, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")
        os.replace(partial, self.path)

    def loss(self, job: Job) -> float:
        return self.results["runs"][job.name]["evaluations"][-1]["val_loss"]


def _worker() -> None:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def run(study: Study, name: str, data: Path, out: Path, results: Path, jobs: int, console: Console) -> dict:
    """Tune every arm, run every seed, and return all of it. Raises UserError for a study that cannot be."""
    if name not in study.sizes:
        raise UserError(f"study {study.name} has sizes {', '.join(study.sizes)}, not {name}")
    size = study.sizes[name]
    plan = Plan(study, size, data, out)
    runner = Runner(plan, name, results, jobs, console)
    tuned: dict[str, float] = {}
    sweep: dict[str, dict[str, float]] = {}
    order = sorted(study.arms, key=lambda arm: len(study.arms[arm].jumps) > 0)

    def smallest_run(arm: str, lr: float) -> list[Job]:
        return plan.jobs(arm, size.seeds[0], lr, base_rate(plan, arm, tuned), size.budgets[:1])

    for group in ([a for a in order if not study.arms[a].jumps], [a for a in order if study.arms[a].jumps]):
        tune(group, size.lrs, smallest_run, runner, sweep)
        tuned |= {arm: float(min(sweep[arm], key=sweep[arm].get)) for arm in group}
    work = [(arm, seed) for seed in size.seeds for arm in order]
    of_arm = {pair: plan.jobs(*pair, tuned[pair[0]], base_rate(plan, pair[0], tuned), size.budgets) for pair in work}
    runner.run([job for jobs_ in of_arm.values() for job in jobs_], "all arms and seeds")
    arms = {arm: {"label": study.arms[arm].label, "lr": tuned[arm], "sweep": sweep[arm], "seeds": {}} for arm in order}
    for (arm, seed), jobs_ in of_arm.items():
        arms[arm] |= {"at": [jump.at for jump in study.arms[arm].jumps], "n_layer": study.arms[arm].n_layer}
        arms[arm]["grows"] = bool(study.arms[arm].jumps)
        arms[arm]["seeds"][str(seed)] = [job.name for job in jobs_]
    runner.results |= {"arms": arms, "git_commit": git_commit(), "date": date.today().isoformat()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner.results |= {"device": device_name(device), "processes": jobs}
    runner.write()
    return runner.results


def base_rate(plan: Plan, arm: str, tuned: dict[str, float]) -> float:
    """Learning rate of an arm until it grows."""
    return tuned.get(plan.base_of(plan.study.arms[arm]), 0.0)


def tune(
    arms: list[str], lrs: tuple[float, ...], jobs_of: Callable[[str, float], list[Job]], runner: Runner, sweep: dict
) -> None:
    """Fill `sweep[arm]` with {rate: loss at the smallest budget} until the best rate of each arm lies inside.

    A single rate is taken as it is.
    """
    todo = {arm: set(lrs) for arm in arms}
    while todo:
        jobs = {(arm, lr): jobs_of(arm, lr) for arm, rates in todo.items() for lr in sorted(rates)}
        runner.run([job for jobs_ in jobs.values() for job in jobs_], f"learning rates of {', '.join(todo)}")
        for (arm, lr), jobs_ in jobs.items():
            sweep.setdefault(arm, {})[f"{lr:g}"] = runner.loss(jobs_[-1])
        todo = {}
        for arm in arms:
            rates = sorted(map(float, sweep[arm]))
            best = float(min(sweep[arm], key=sweep[arm].get))
            if len(lrs) > 1 and best in (rates[0], rates[-1]) and len(rates) < len(lrs) + 4:
                todo[arm] = {best / 2 if best == rates[0] else best * 2}
