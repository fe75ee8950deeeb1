"""How good a checkpoint is: standard tasks through EleutherAI's lm-eval, and bits per byte of validation text.

    nanostack evaluate out/1b/ckpt.pt --tokenizer data/texts --tasks paper    the eight tasks of the G_stack paper
    nanostack evaluate out/1b/ckpt.pt --tokenizer data/texts --tasks arc_easy,hellaswag --limit 100
    nanostack evaluate out/1b/ckpt.pt --val data/texts                        validation loss; needs no extra
    nanostack evaluate exported/1b --tasks paper                              a Hugging Face folder, its own tokenizer

The live model is evaluated, nothing is exported. --tasks and --val may come together, and --val's tokenizer then serves both.
The result is written beside the checkpoint as NAME.eval.json (or --out).

Tasks come from the Hub. `--data DIR` needs no network: each task is read from DIR/<its dataset's name>, filled like this:

    for name in allenai/ai2_arc baber/piqa allenai/sciq allenai/winogrande EleutherAI/lambada_openai \\
            EleutherAI/wikitext_document_level; do
        hf download --repo-type dataset $name --local-dir DIR/$name
    done
    git clone https://github.com/lgw863/LogiQA-dataset DIR/EleutherAI/logiqa              (the Hub has only a script)

Files of one's own do as well: DIR/<dataset>/<configuration, if the task names one>/{train,validation,test}.jsonl or .parquet.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nanostack import models
from nanostack.commands.lm_tasks import PAPER, SHARES, live_model, load_tasks, require_extra, run_tasks, task_names
from nanostack.config import describe_tokens
from nanostack.device import choose_device
from nanostack.errors import UserError, command_line
from nanostack.files import replacing
from nanostack.flops import n_params
from nanostack.generate import check_tokenizer
from nanostack.hf import weights as hf
from nanostack.model import Llama, LlamaConfig
from nanostack.parallel import Placement
from nanostack.provenance import device_name, git_commit, versions
from nanostack.text import tokenizer
from nanostack.text.bounds import Bounds
from nanostack.text.dataset import Tokens
from nanostack.text.manifest import load_manifest, manifest_sha256
from nanostack.validation import Validation


@dataclass(frozen=True)
class Command:
    """Evaluate a checkpoint, or a Hugging Face folder, on tasks of lm-eval and on validation text."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a Hugging Face folder."""
    tasks: str = ""
    """`paper`, or names of lm-eval's tasks, with commas between them."""
    tokenizer: Path | None = None
    """The prepared folder whose tokenizer the model was trained with."""
    data: Path | None = None
    """Folder with the tasks' data, instead of the Hub."""
    val: Path | None = None
    """A prepared folder: loss and bits per byte on its whole validation split."""
    num_fewshot: int | None = None
    """Examples before each question, instead of what the task says."""
    limit: int | None = None
    """Only the first so many examples of each task: a trial, not a result."""
    batch: int = 16
    """Texts that go through the model at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The model computes in it."""
    document_mask: bool = False
    """The model was trained with --data.document_mask."""
    out: Path | None = None
    overwrite: bool = False
    """Replace an earlier result."""
    json: bool = False
    """Print the result as one JSON object."""


def main(command: Command) -> dict:
    out = checked(command)
    names = task_names(command.tasks)
    if names:
        require_extra(command.data)
    saved = models.read(command.checkpoint) if command.checkpoint.is_dir() else None  # which reads no weights yet
    text = tokenizer_of(command, saved) if names or command.document_mask else None
    tasks = load_tasks(names, command.data) if names else []
    saved = saved or models.read(command.checkpoint)
    config = LlamaConfig(**saved["config"])
    if text and text.n_vocab > config.vocab_size:
        raise UserError(f"the tokenizer has {text.n_vocab} entries, the model only {config.vocab_size}")
    for folder in filter(None, {command.tokenizer, command.val}):
        if saved["manifest_sha256"] not in (None, manifest_sha256(folder)):
            check_tokenizer(folder, command.checkpoint.parent / "metrics.jsonl")
            print(f"note: the model was trained on other data than {folder}: is it the same tokenizer?", file=sys.stderr)
    bounds = Bounds(**saved["bounds"])
    if isinstance(text, tokenizer.Tokenizer):
        text.follow(bounds)
    if command.val and (difference := bounds.unlike(Bounds.of_data(load_manifest(command.val)))):
        print(f"note: {command.checkpoint} and {command.val}: {difference}", file=sys.stderr)
    device = choose_device("auto")
    placement = Placement(device, getattr(torch, command.dtype))
    state = models.restore(saved, placement)
    if command.val and state.window:
        print(f"note: the loss is that of blocks of {state.window} tokens, the model's sliding window", file=sys.stderr)
    state.model.end_of_text = text.eot if text and command.document_mask else None
    answer = {
        "checkpoint": str(command.checkpoint),
        "cursor": dataclasses.asdict(state.cursor),
        "n_params": n_params(config),
        "growth": [{key: receipt[key] for key in ("op", "g", "tokens")} for receipt in state.growth],
        "tokenizer": getattr(text, "name", None) or (str(command.checkpoint) if text else None),
        "device": device_name(device),
        "dtype": command.dtype,
        "versions": versions() | {name: version(name) for name in (("lm_eval", "datasets", "transformers") if names else ())},
        "git_commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "val": None,
        "tasks": None,
    }
    try:
        if command.val:
            answer["val"] = validation(state.model, command.val, command.batch)
        if tasks:
            live = live_model(state.model, text, command.checkpoint, command.batch, progress)
            live.window = state.window
            answer |= run_tasks(live, tasks, command.num_fewshot, command.limit)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{command.batch} texts at once do not fit the GPU: choose a smaller --batch") from error
    write(finite(answer), out)
    if not command.json:
        show(answer)
        print(f"wrote {out}")
    return finite(answer)


def checked(command: Command) -> Path:
    """The file of the result. UserError for options that cannot be."""
    if not task_names(command.tasks) and not command.val:
        raise UserError("nothing to evaluate: give --tasks (paper, or names of lm-eval's), --val (a prepared folder) or both")
    for name in ("limit", "batch"):
        if getattr(command, name) is not None and getattr(command, name) < 1:
            raise UserError(f"{name} must be positive, not {getattr(command, name)}")
    if command.num_fewshot is not None and command.num_fewshot < 0:
        raise UserError(f"num_fewshot must not be negative, as {command.num_fewshot} is")
    if command.data and not command.data.is_dir():
        raise UserError(f"there is no folder {command.data}")
    if not command.checkpoint.exists():
        raise UserError(f"there is no checkpoint {command.checkpoint}")
    place = command.checkpoint.resolve()
    out = command.out or place.with_name(f"{place.name if place.is_dir() else place.stem}.eval.json")
    if out.is_dir():
        raise UserError(f"{out} is a folder; --out names the file of the result")
    if out.exists() and not command.overwrite:
        raise UserError(f"{out} exists already: choose another place (--out), or replace it (--overwrite)")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write the result to")
    return out


def tokenizer_of(command: Command, saved: dict | None):
    """The tokenizer named, that of --val, or that of the Hugging Face folder itself."""
    if folder := command.tokenizer or command.val:
        return tokenizer.load(folder)
    if saved and any((command.checkpoint / name).is_file() for name in hf.TOKENIZER_FILES):
        if saved["manifest_sha256"]:  # trained here: older folders say no more than the tokenizer's own files
            return tokenizer.get(str(command.checkpoint))
        from nanostack.commands.harness import HubTokenizer

        return HubTokenizer(command.checkpoint, saved["bounds"]["ends"])
    raise UserError("tasks are text: name the prepared folder whose tokenizer the model was trained with (--tokenizer)")


def validation(model: Llama, folder: Path, batch: int) -> dict:
    """Mean loss over the whole validation split of a prepared folder, as train.py counts it.

    loss in nats per token, perplexity = e^loss, bits_per_byte of the text that the targets stand for. Every token but the first
    is a target once; those after the last whole block of seq_len are left out. UserError where the split has no whole block.
    """
    tokens = Tokens(folder, "val", model.config.seq_len)
    if tokens.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer of {folder} has {tokens.vocab_size} entries, the model only {model.config.vocab_size}")
    text = Validation(tokens)
    with progress_bar(-(-text.n_blocks // batch), "validation") as advance:
        loss = text(model, batch, advance)
    return {
        "data": str(folder),
        "manifest_sha256": manifest_sha256(folder),
        "tokens": text.n_tokens,
        "bytes": text.n_bytes,
        "loss": loss.nats_per_token,
        "perplexity": math.exp(loss.nats_per_token),
        "bits_per_byte": loss.bits_per_byte,
    }


@contextlib.contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[], None]]:
    """Yields what to call after each of `total` steps. Standard error shows a bar on a terminal, else a line for each tenth."""
    console, steps = Console(stderr=True, highlight=False), itertools.count(1)

    def advance() -> None:
        done = next(steps)
        if 10 * done // total > 10 * (done - 1) // total:
            print(f"{label}: {100 * done // total} %", file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield advance
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def progress(batches: list, label: str) -> Iterator:
    """The batches one by one, with a progress bar."""
    with progress_bar(len(batches), label) as advance:
        for batch in batches:
            yield batch
            advance()


def finite(value):
    """The same, with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(answer: dict, out: Path) -> None:
    try:
        with replacing(out) as file:
            file.write(json.dumps(answer, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"could not write {out}: {error.strerror}") from error


def show(answer: dict) -> None:
    """The result for people, the paper's numbers beside it."""
    console, cursor = Console(highlight=False, soft_wrap=True), answer["cursor"]
    trained = f"{describe_tokens(cursor['tokens'])} tokens, {cursor['flops']:.3g} FLOPs"
    console.print(f"{answer['checkpoint']}: {answer['n_params'] / 1e6:.1f}M parameters, {trained}")
    if val := answer["val"]:
        of = f"over {val['tokens']:,} tokens of {val['data']}"
        console.print(
            f"{val['loss']:.4f} nats a token (perplexity {val['perplexity']:.2f}), {val['bits_per_byte']:.4f} bits a byte, {of}"
        )
    if not answer["tasks"]:
        return
    table = Table("task", "metric", "n", "value", "±", "scratch*", "stack*")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for name, task in answer["tasks"].items():
        paper = PAPER.get(name)
        for metric, found in task["metrics"].items():
            if paper and metric != paper.metric:
                continue
            numbers = [shown(metric, found["value"]), shown(metric, found["stderr"])]
            theirs = [f"{paper.scratch:.2f}", f"{paper.stack:.2f}"] if paper else ["", ""]
            table.add_row(paper.label if paper else name, metric, str(task["n"] or ""), *numbers, *theirs)
    if answer["average_accuracy"] is not None:
        shares = [task for task in PAPER.values() if task.metric in SHARES]
        theirs = [f"{sum(numbers) / len(shares):.2f}" for numbers in zip(*((t.scratch, t.stack) for t in shares), strict=True)]
        table.add_row("average", "accuracy", "", f"{answer['average_accuracy']:.2f}", "", *theirs)
    console.print(table)
    if any(name in PAPER for name in answer["tasks"]):
        console.print("accuracies in %. * the paper's 1.1B at 8e20 FLOPs, one seed (arXiv 2405.15319, figure 3)")
    if answer["limit"]:
        console.print(f"only {answer['limit']} examples of each task: a trial, not a result")


def shown(metric: str, value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}" if metric in SHARES else f"{value:.4g}"


def run() -> None:
    command_line(Command, main, __doc__)
