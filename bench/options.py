"""Does every option of a step train as torch's own operations do? Twenty steps of a small model under each, grown ×2 in place
after ten of them, losses beside those of the torch path.

    python bench/options.py [--only plain fp32] [--small]

On a GPU this is a check of Triton's kernels, of the captured graph and of torch.compile in a real run; on a CPU, of those in C.
An option is a process of its own, several at a time, since nothing is timed. The data are random ids (bench/ids.py). After
every option that ends, the result file says what was found, and what is left to do. The exit code is 1 where an option failed,
or its losses are apart.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple, TextIO

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import ROOT, ids
from bench.results import place, write_result
from nanostack.config import Data, Optim, Stage, Train, grow
from nanostack.errors import UserError, command_line
from nanostack.model import LlamaConfig
from nanostack.provenance import device_name
from nanostack.runs import read_run
from study import training_run

STEPS = 20
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
JOBS = max(1, min(5, CORES // 3))  # at a time: each compiles on a core or two
ALIKE = {"bfloat16": (1e-2, 3e-3), "float32": (1e-3, 3e-4)}  # of the loss: at any step, in the mean of all


@dataclass(frozen=True)
class Option:
    against: str | None  # the option whose losses these must be; None for a reference
    changes: dict
    gpu: bool = False  # for nothing but a GPU


MASK = Data("", document_mask=True)
OPTIONS = {  # what is worth most first; the slowest last
    "torch": Option(None, {"kernels": "torch"}),
    "plain": Option("torch", {}),
    "torch fp32": Option(None, {"kernels": "torch", "dtype": "float32"}),
    "fp32": Option("torch fp32", {"dtype": "float32"}),
    "torch documents": Option(None, {"kernels": "torch", "data": MASK}),
    "documents": Option("torch documents", {"data": MASK}),
    "graph": Option("torch", {"cuda_graph": True}, gpu=True),
    "graph, documents": Option("torch documents", {"cuda_graph": True, "data": MASK}, gpu=True),
    "micro-batches": Option("torch", {"micro_batch": 2}),
    "recomputed": Option("torch", {"recompute": "selective"}),
    "all recomputed": Option("torch", {"recompute": "full"}),
    "bf16 moments": Option("torch", {"moments": "bfloat16"}),
    "torch muon": Option(None, {"kernels": "torch", "optimizer": "muon"}),
    "muon": Option("torch muon", {"optimizer": "muon"}),
    "compile": Option("torch", {"compile": True}),
    "all, compiled": Option(
        "torch documents",
        {"compile": True, "data": MASK, "micro_batch": 2, "recompute": "selective", "moments": "bfloat16"},
    ),
}


@dataclass(frozen=True)
class Command:
    """Train under every option and compare the losses."""

    only: tuple[str, ...] = ()
    """These options; what they are compared with is run too. Default: all."""
    small: bool = False
    """A model of seconds on a CPU."""
    worker: str | None = None
    """Internal: train under this option and print the losses; --data is its text."""
    data: str = ""
    out: Path | None = None
    """The JSON file. Default: bench/results/options-DEVICE.json"""
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def base(small: bool) -> Train:
    """The run without an option: two layers, four from the middle on; two micro-batches a step."""
    wide = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=256, d_ff=768, vocab_size=2048, seq_len=512)
    narrow = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96, vocab_size=512, seq_len=64)
    model = narrow if small else wide
    step = 8 * model.seq_len
    half = {"tokens": STEPS // 2 * step, "schedule": "constant", "warmup_tokens": 2 * step}
    stages = (Stage(lr=2e-3, **half), grow("stack", g=2, optimizer="copy", lr=1e-3, **half))
    intervals = {"log_interval": step, "eval_interval": 2**62, "save_interval": 2**62}
    return Train(Data("", val_tokens=model.seq_len), model, stages, step, 4, "out/options", **intervals)


def changed(config: Train, changes: dict) -> Train:
    """The config under an option."""
    changes = dict(changes)
    parallel = replace(config.parallel, activation_checkpointing=changes.pop("recompute", "none"))
    optim = Optim(changes.pop("optimizer", "adamw"), moments=changes.pop("moments", "float32"))
    data = replace(config.data, document_mask=changes.pop("data", config.data).document_mask)
    return replace(config, parallel=parallel, optim=optim, data=data, **changes)


def yardstick(config: Train) -> contextlib.AbstractContextManager:
    """Within it the torch path on a GPU has attention without cuDNN's, which errs with single queries and with masks."""
    if config.kernels != "torch" or not torch.cuda.is_available():
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def losses(config: Train) -> dict:
    """{"losses", "dtype", "kernels"} of a run of train.py's loop."""
    with TemporaryDirectory() as out, yardstick(config):
        run = training_run(replace(config, out=out))
        run.save = lambda: None
        run.train()
        head, records = read_run(Path(out))
    found = [record["loss"] for record in records if record["loss"] is not None]
    if len(found) < STEPS:
        raise UserError(f"only {len(found)} of {STEPS} losses are finite")
    return {"losses": found, "dtype": head["dtype"], "kernels": run.kernels}


def apart(found: list[float], reference: list[float]) -> tuple[float, float]:
    """How far losses are from those of a reference, as a share of them: at most, and in the mean."""
    shares = [abs(a - b) / b for a, b in zip(found, reference, strict=True)]
    return max(shares), sum(shares) / len(shares)


def judged(option: Option, found: dict, reference: dict) -> dict:
    """The result of an option that ran, its losses beside its reference's."""
    most, mean = apart(found["losses"], reference["losses"])
    allowed = ALIKE[found["dtype"]]
    state = "alike" if most <= allowed[0] and mean <= allowed[1] else "APART"
    state = state if option.against else "reference"
    kept = {"state": state, "against": option.against, "largest": most, "mean": mean, "allowed": allowed}
    return kept | {"kernels": found["kernels"], "said": ""}


class Worker(NamedTuple):
    process: subprocess.Popen
    said: TextIO
    errors: TextIO


def start(name: str, data: str, small: bool) -> Worker:
    command = [sys.executable, __file__, "--worker", name, "--data", data, "--json", *(["--small"] if small else [])]
    said, errors = TemporaryFile("w+"), TemporaryFile("w+")  # noqa: SIM115 (and no pipes: nobody reads before the end)
    return Worker(subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=errors, text=True), said, errors)


def chosen(only: tuple[str, ...], cuda: bool) -> list[str]:
    """The names to run, references before those that need them."""
    if unknown := set(only) - set(OPTIONS):
        raise UserError(f"there is no option {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    wanted = {name for name, option in OPTIONS.items() if (name in only or not only) and (cuda or not option.gpu)}
    wanted |= {OPTIONS[name].against for name in wanted} - {None}
    return [name for name in OPTIONS if name in wanted]


def work(command: Command) -> dict:
    config = base(command.small)
    config = replace(config, data=replace(config.data, path=command.data))
    return losses(changed(config, OPTIONS[command.worker].changes))


def main(command: Command) -> dict:
    if command.worker:
        return work(command)
    cuda = torch.cuda.is_available()
    device = device_name(torch.device("cuda" if cuda else "cpu"))
    todo, config = chosen(command.only, cuda), base(command.small)
    out, console = place("options", device, command.out), Console(stderr=command.json, highlight=False, soft_wrap=True)
    result = {"device": device, "steps": STEPS, "options": {}, "left": list(todo)}
    ran: dict[str, dict] = {}

    def settle() -> None:
        """Judge whatever has both its losses and its reference's, and keep it."""
        for name in list(result["left"]):
            option = OPTIONS[name]
            if name in ran and (option.against is None or option.against in ran):
                result["left"].remove(name)
                reference = ran.get(option.against, ran[name])
                failed = ran[name].get("failed") or (reference.get("failed") and f"{option.against} failed")
                kept = {"state": "failed", "said": failed} if failed else judged(option, ran[name], reference)
                result["options"][name] = kept
                console.print(f"{kept['state']:>9}  {name}  " + (kept["said"] or f"{kept['largest']:.1e} at most"))
        write_result(result, out)

    with ids.fed(config, (), config.batch_tokens, STEPS) as fed:
        settle()
        waiting, running = list(todo), {}
        try:
            while waiting or running:
                while waiting and len(running) < JOBS:
                    name = waiting.pop(0)
                    running[name] = start(name, fed.data.path, command.small)
                for name in [name for name, worker in running.items() if worker.process.poll() is not None]:
                    ran[name] = answer(running.pop(name))
                    settle()
                time.sleep(0.05)
        finally:
            for worker in running.values():
                worker.process.kill()
    console.print(f"wrote {out}")
    return result


def answer(worker: Worker) -> dict:
    """What a worker that has ended found, or why it did not."""
    with worker.said as said, worker.errors as errors:
        said.seek(0)
        errors.seek(0)
        if worker.process.returncode == 0:
            return json.loads(said.read().splitlines()[-1])
        told = errors.read()
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    sys.stderr.write(told)
    return {"failed": f"exit {worker.process.returncode}: {lines[-1][:300] if lines else 'it said nothing'}"}


def faulty(answer: dict) -> bool:
    """Whether an option failed, or is apart from its reference."""
    return any(of["state"] in ("failed", "APART") for of in answer.get("options", {}).values())


if __name__ == "__main__":
    sys.exit(int(faulty(command_line(Command, main))))
