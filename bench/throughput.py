"""The whole training step beside what else one would use: tokens/s, MFU, memory, time to the first step.

    python bench/throughput.py                                   config/1b.py on a GPU, config/quickstart.py without
    python bench/throughput.py config/3b.py --against compile,hf
    python bench/throughput.py --optim.name muon --against adamw  ours by either optimizer
    python bench/throughput.py --against litgpt,nanogpt --nanogpt ../nanoGPT

Every way trains a model of the same size on the same ids: forward, backward, clipping at 1.0, AdamW (ours by the config's
optimizer, which is Muon in config/quickstart.py: `--optim.name adamw` compares like with like). Ours is train.py's own loop.
The others: plain torch eager; the same under torch.compile (on a GPU with attention forced to cuDNN); Hugging Face's Llama,
with Liger's kernels where they are installed and there is a GPU; litgpt's; a GPT-2 of the same layers and width by nanoGPT's
own train.py, from a clone, on a CPU. Each runs in a process of its own, in turns, several rounds,
so that a slow minute hits all; the first round starts with empty compilation caches (but the libraries read from the disk
before) and tells the time to the first step. What was measured is kept after every turn.

Reported: the median over rounds and steps, half the distance between the quartiles as a share of it; how many times as fast
ours is, round by round (median, least, most), as a machine may be slow for minutes. On a shared one many short rounds are worth
more than a few long ones. MFU is nanostack/flops.py's. JSON and picture go to bench/results/.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import ROOT, anchors
from bench.ids import fed, names_text
from bench.results import picture, place, write_result
from nanostack.config import Stage, Train, load
from nanostack.device import choose_device, compute_dtype
from nanostack.errors import UserError, command_line
from nanostack.flops import MFU, mfu, n_params, peak_flops
from nanostack.provenance import device_name
from nanostack.text.dataset import Prefetcher, Tokens
from nanostack.text.manifest import load_manifest
from study import training_run

OURS = "nanostack"
STARTED = "NANOSTACK_BENCH_STARTED"  # in the environment: when the process of a way was started
PEERS = {"eager": "torch eager", "compile": "torch.compile", "hf": "Hugging Face", "litgpt": "litgpt", "nanogpt": "nanoGPT"}
PEERS |= {"adamw": "nanostack, AdamW"}


@dataclass(frozen=True)
class Command:
    """Time the training step."""

    config: tyro.conf.Positional[str] = ""
    """Its last stage's model is timed. Default: config/1b.py on a GPU, config/quickstart.py without."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Changes to it as train.py takes them: all options that are not named here. Without --data.path, the batches are random
    ids (bench/ids.py): text does not decide how fast a step is."""
    against: str = "eager,compile,hf"
    """Which others, by comma: eager, compile, hf, litgpt, nanogpt; "" for none."""
    nanogpt: Path | None = None
    """A clone of github.com/karpathy/nanoGPT, for --against nanogpt."""
    rounds: int = 3
    steps: int = 20
    """Timed in each round, after as many as `warmup`."""
    warmup: int = 5
    accumulate: int = 4
    """Micro-batches a step at most, where the config has more: a step of 2M tokens takes half a minute."""
    out: Path | None = None
    """The JSON file; the picture stands beside it. Default: bench/results/throughput-CONFIG-DEVICE.json"""
    worker: str | None = None
    """Internal: be one of the ways, and print what was measured."""
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def default_config() -> str:
    """The config to time where none is named: the 1B model on a GPU, what the quickstart grows to without."""
    return str(ROOT / "config" / ("1b.py" if torch.cuda.is_available() else "quickstart.py"))


@contextlib.contextmanager
def timed(config: Train, overrides: Sequence[str], steps: int, accumulate: int) -> Iterator[Train]:
    """The config with data, and one stage of so many steps of its largest model which nothing interrupts."""
    most = accumulate * config.micro_batch * config.model.seq_len
    config = replace(config, batch_tokens=min(config.batch_tokens, most))
    with fed(config, overrides, config.batch_tokens, steps) as config:
        yield in_one_stage(config, steps)


def in_one_stage(config: Train, steps: int) -> Train:
    model, manifest = config.shapes()[-1], load_manifest(config.data.path)
    if model.vocab_size is None:
        model = replace(model, vocab_size=-(-manifest["tokenizer"]["n_vocab"] // 128) * 128)
    never, tokens = 2**62, steps * config.batch_tokens
    stage = Stage(tokens=tokens, lr=1e-4, schedule="constant")
    return replace(config, model=model, stages=(stage,), log_interval=never, eval_interval=never, save_interval=never)


def ours(config: Train, mark) -> str:
    """Train with train.py's loop, calling `mark` after every step. Returns what its kernels ran in."""
    with TemporaryDirectory() as folder:
        run = training_run(replace(config, out=folder))
        stepped = run.recorder.record_step

        def marked(*step) -> dict:
            values = stepped(*step)
            mark()
            return values

        run.recorder.record_step, run.recorder.log, run.save = marked, lambda *_: None, lambda: None
        run.train()
    return run.kernels


def theirs(name: str, config: Train, mark) -> str:
    """Train as a user of plain torch or transformers does, calling `mark` after every step."""
    from bench.peers import HuggingFaceLlama, LitLlama, PlainLlama

    device = choose_device("auto")
    dtype = compute_dtype(device, config.dtype)
    torch.set_float32_matmul_precision("high")
    with device:
        kinds = {"hf": lambda shape: HuggingFaceLlama(shape, liger(device)), "litgpt": LitLlama}
        model = kinds.get(name, PlainLlama)(config.model)
    if name == "compile":
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=config.optim.betas, weight_decay=0.1, fused=True)
    parts = config.batch_tokens // (config.micro_batch * config.model.seq_len)
    cuda, low = device.type == "cuda", dtype != torch.float32
    attention = contextlib.nullcontext
    if cuda and name == "compile":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attention():
            return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)

    tokens = Tokens(config.data.path, "train", config.model.seq_len, config.seed)
    total = config.stages[0].tokens // (config.micro_batch * config.model.seq_len)
    ranges = [(i * config.micro_batch, (i + 1) * config.micro_batch) for i in range(total)]
    with Prefetcher(tokens, ranges, device=device) as batches:
        for _ in range(total // parts):
            for _ in range(parts):
                with attention():
                    with torch.autocast(device.type, dtype, enabled=low):
                        loss = model(*next(batches)) / parts
                    loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mark()
    return "torch"


def liger(device: torch.device) -> bool:
    """Whether Hugging Face's Llama gets Liger's kernels: where they are installed, on a GPU."""
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return False
    return device.type == "cuda"


def work(command: Command, config: Train) -> dict:
    """Be one of the ways: run warm-up and timed steps in this process."""
    began = float(os.environ.get(STARTED, time.time()))  # before Python was started
    if command.worker == "nanogpt":
        from bench.peers import nanogpt

        found = nanogpt(command.nanogpt or Path(), config, command.warmup + command.steps, began)
        return found | {"seconds": found["seconds"][command.warmup :]}
    cuda, marks = torch.cuda.is_available(), []

    def mark():
        """The end of a step: by the device's clock, so that nothing is waited for but the first."""
        if not cuda:
            marks.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        if len(marks) == 1:
            if cuda:
                torch.cuda.synchronize()
            first.append(time.time() - began)

    first: list[float] = []
    if command.worker == "adamw":
        config = replace(config, optim=replace(config.optim, name="adamw"))
    kernels = ours(config, mark) if command.worker in (OURS, "adamw") else theirs(command.worker, config, mark)
    if cuda:
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource

        seconds = [b - a for a, b in itertools.pairwise(marks)]
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds[command.warmup - 1 :], "first_step": first[0], "peak_bytes": peak, "kernels": kernels}


def main(command: Command) -> dict:
    device = choose_device("auto")
    path = command.config or default_config()
    if min(command.rounds, command.steps, command.warmup, command.accumulate) < 1:
        raise UserError("rounds, steps, warmup and accumulate must be at least 1")
    against = [name.strip() for name in command.against.split(",") if name.strip()]
    if unknown := [name for name in against if name not in PEERS]:
        raise UserError(f"--against takes {', '.join(PEERS)}, not {', '.join(unknown)}")
    if "nanogpt" in against and command.nanogpt is None:
        raise UserError("--against nanogpt needs a clone of github.com/karpathy/nanoGPT: --nanogpt FOLDER")
    config, steps = load(path, list(command.overrides)), command.warmup + command.steps
    with timed(config, command.overrides, steps, command.accumulate) as config:
        return work(command, config) if command.worker else compare(command, path, against, config, device)


def compare(command: Command, path: str, against: list[str], config: Train, device: torch.device) -> dict:
    """Time all ways in turns, and keep what was measured after every turn."""
    if config.data.document_mask and against:
        raise UserError('the others see whole rows, so --data.document_mask goes with --against "" only')
    if config.parallel.activation_checkpointing != "none" and against:
        told = f"the others keep all activations, the config recomputes ({config.parallel.activation_checkpointing})"
        raise UserError(f'{told}: add --parallel.activation_checkpointing none, or --against ""')
    out = place(f"throughput-{Path(path).stem}", device_name(device), command.out)
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 140)
    if config.optim.name != "adamw" and set(against) - {"adamw"}:
        console.print(
            f"note: ours steps by {config.optim.name}, the others by AdamW; --optim.name adamw compares like with like"
        )
    found, failed = {name: [] for name in [OURS, *against]}, {}
    asked = {"config": Path(path).name, "overrides": command.overrides, "dtype": str(compute_dtype(device, config.dtype))[6:]}
    asked |= {"rounds": command.rounds, "steps": command.steps, "warmup": command.warmup, "liger": liger(device)}
    asked |= {"device": device_name(device), "random_ids": not names_text(command.overrides)}
    subprocess.run([sys.executable, "-c", "import train, bench.peers, torch._inductor.compile_fx"], cwd=ROOT)
    with TemporaryDirectory() as caches:
        turns = [(i, name) for i in range(command.rounds) for name in rotated_by(list(found), i)]
        for number, name in track(turns, "rounds", console=console):
            if name in failed:
                continue
            try:
                found[name].append(in_process(name, path, command, config.data.path, Path(caches), number))
            except UserError as error:  # a peer that fails costs its own numbers only
                if name == OURS:
                    raise
                failed[name] = str(error)
                console.print(f"{name} is left out: {error}", soft_wrap=True)
            measured = {name: rounds for name, rounds in found.items() if rounds and name not in failed}
            result = asked | summarise(measured, config, device) | {"failed": failed}
            speeds = {name: way["tokens_per_s"] for name, way in result["ways"].items()}
            result["anchors"] = anchors.beside(path, command.overrides, config.model, speeds)
            write_result(result, out, ("transformers", "liger-kernel"))
    if drawing := picture(out):
        draw(result, drawing)
    console.print(table(result))
    console.print(MFU)
    for sentence in anchors.sentences(result["anchors"], device.type == "cuda"):
        console.print(sentence)
    console.print(f"wrote {out}" + (f" and {drawing}" if drawing else ""), soft_wrap=True)
    return result


def rotated_by(names: list[str], turn: int) -> list[str]:
    return names[turn % len(names) :] + names[: turn % len(names)]


def in_process(name: str, path: str, command: Command, data: str, caches: Path, number: int) -> dict:
    """One round of one way. Its caches are empty in the first round, and of its own."""
    arguments = [sys.executable, str(Path(__file__)), path, *command.overrides, "--data.path", data, "--worker", name, "--json"]
    arguments += ["--nanogpt", str(command.nanogpt)] if command.nanogpt else []
    arguments += ["--steps", str(command.steps), "--warmup", str(command.warmup), "--accumulate", str(command.accumulate)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches / name / "inductor")}
    environment |= {"TRITON_CACHE_DIR": str(caches / name / "triton"), "XDG_CACHE_HOME": str(caches / name)}
    environment[STARTED] = str(time.time())
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode == 2:  # a mistake in what was asked, which it tells in its last line
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise UserError(f"{name}, round {number + 1}, ended with exit code {done.returncode}:\n{said}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(found: dict, config: Train, device: torch.device) -> dict:
    ways = {}
    peak = peak_flops(device, compute_dtype(device, config.dtype))
    for name, rounds in found.items():
        seconds = [second for one in rounds for second in one["seconds"]]
        median = statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
        speed = config.batch_tokens / median
        ways[name] = {
            "tokens_per_s": speed,
            "ms": 1e3 * median,
            "spread": (quartiles[2] - quartiles[0]) / 2 / median,
            "mfu_full": mfu(config.model, speed, peak),
            "mfu_causal": mfu(config.model, speed, peak, causal=True),
            "peak_bytes": max(one["peak_bytes"] for one in rounds),
            "first_step_cold": rounds[0]["first_step"],
            "first_step_warm": statistics.median([one["first_step"] for one in rounds[1:]]) if rounds[1:] else None,
            "rounds": rounds,
        }
    ours = [statistics.median(one["seconds"]) for one in found[OURS]]
    for name, way in ways.items():
        theirs = [statistics.median(one["seconds"]) for one in found[name]]
        both = zip(ours, theirs, strict=False)  # a turn may be to come
        way["ours_over_by_round"] = None if name == OURS else [b / a for a, b in both]
        way["ours_over"] = None if name == OURS else statistics.median(way["ours_over_by_round"])
    shape = {"n_params": n_params(config.model), "seq_len": config.model.seq_len, "batch_tokens": config.batch_tokens}
    return shape | {"micro_batch": config.micro_batch, "ways": ways}


HEAD = ("", "tokens/s", "ms a step", "±", "MFU full", "causal", "peak, GiB", "first step, s: cold", "warm", "ours ×")


def cells(result: dict) -> list[list[str]]:
    """A row under HEAD for every way."""
    rows = []
    for name, way in result["ways"].items():
        shares = [f"{100 * way[key]:.1f} %" if way[key] else "-" for key in ("mfu_full", "mfu_causal")]
        row = [f"{way['tokens_per_s']:,.0f}", f"{way['ms']:.1f}", f"{100 * way['spread']:.0f} %", *shares]
        row += [f"{way['peak_bytes'] / 2**30:.2f}", f"{way['first_step_cold']:.1f}"]
        row += ["-" if way["first_step_warm"] is None else f"{way['first_step_warm']:.1f}"]
        by_round = way["ours_over_by_round"]
        over = f"{way['ours_over']:.2f} ({min(by_round):.2f} to {max(by_round):.2f})" if by_round else ""
        rows.append([PEERS.get(name, name), *row, over])
    return rows


def table(result: dict) -> Table:
    size = f"{result['n_params'] / 1e6:.1f}M parameters, context {result['seq_len']}, {result['batch_tokens']} tokens a step"
    shown = Table(title=f"{result['config']}: {size}; {result['device']}")
    for name in HEAD:
        shown.add_column(name, justify="right" if name else "left")
    for row in cells(result):
        shown.add_row(*row)
    return shown


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = result["ways"]
    figure, axes = plt.subplots(figsize=(7, 0.7 * len(ways) + 1.6), dpi=140, layout="constrained")
    names = [PEERS.get(name, name) for name in ways]
    bars = axes.barh(names, [way["tokens_per_s"] for way in ways.values()], color=["#d1495b"] + ["#999999"] * (len(ways) - 1))
    labels = [f"{way['tokens_per_s']:,.0f}" for way in ways.values()]
    axes.bar_label(bars, labels, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="tokens/s, the whole training step", title=f"{result['config']}, {result['device']}")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    command_line(Command, main)
