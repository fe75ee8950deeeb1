"""Seconds per token of every model of a study, each trained alone on the machine: `python -m study STUDY --pace`.

A study's runs share the machine with each other and with other work, for hours. These are short runs of the same configs with
nothing beside, in turns, so that what slows the machine for a minute slows all alike. The medians go into the result file.
"""

import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

from nanostack.config import Data, Optim, Stage, Train
from nanostack.device import choose_device
from nanostack.flops import flops_per_token
from nanostack.provenance import device_name
from nanostack.runs import read_run
from study.plan import Plan
from study.results import pace_name
from study.runner import Runner, execute

ROUNDS, STEPS = 5, 120  # the first third of a run's steps is left out


def measure(plan: Plan, runner: Runner) -> None:
    """Write {kind of run: seconds per token} to the runner's result file."""
    kinds = kinds_of(plan)
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(ROUNDS):
        for name, config in kinds.items():
            with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:  # a process of its own, as in the study
                found[name].append(pool.submit(timed, config).result())
            runner.console.print(
                f"round {number + 1} of {ROUNDS}: {name} {found[name][-1] * 1e6:.2f} µs a token", highlight=False
            )
    paces = {name: statistics.median(values) for name, values in found.items()}
    about = {"device": device_name(choose_device("auto")), "date": date.today().isoformat(), "rounds": found}
    runner.results |= {"pace": paces, "pace_about": about}
    runner.write()


def kinds_of(plan: Plan) -> dict[str, Train]:
    """A short run of each model and optimizer that the arms of a study go through."""
    found: dict[str, Train] = {}
    for arm in plan.study.arms.values():
        model, optim = arm.begins(plan.model), arm.optim
        for jump in (None, *arm.jumps):
            if jump is not None:
                model, optim = jump.growth.plan(model).config, jump.optim or optim
            batch = plan.batch_of(arm)
            name = pace_name(flops_per_token(model), f"-{optim}-", batch if batch != plan.size.batch_tokens else None)
            if name in found:
                continue
            found[name] = Train(
                data=Data(str(plan.data), val_tokens=plan.size.val_tokens),
                model=model,
                stages=(Stage(STEPS * batch, 1e-3),),
                batch_tokens=batch,
                micro_batch=min(plan.size.micro_batch, batch // model.seq_len),
                dtype=plan.size.dtype,
                optim=Optim(optim),
                out=str(plan.out / f"pace-{name}"),
                log_interval=STEPS * batch // 3,
                eval_interval=STEPS * batch,
                save_interval=2**62,
            )
    return found


def timed(config: Train) -> float:
    """Seconds per token of the last two thirds of a run."""
    shutil.rmtree(config.out, ignore_errors=True)
    execute(config)
    _, records = read_run(Path(config.out))
    shutil.rmtree(config.out)
    first, last = records[0], records[-1]
    return (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"])
