"""Grow a checkpoint on disk: `python grow.py out/1b_base/ckpt.pt --g 4` writes ckpt-x4.pt beside it.

It is read tensor by tensor from the memory-mapped file to the device (the GPU where there is one), grown there in place, and
written. Train on with `train.py CONFIG --init_from CHECKPOINT`. A folder of Hugging Face's is taken too, and a folder written:
`python grow.py smollm --g 2 --out smollm-x2`. A sharded checkpoint grows in depth shard by shard: one process takes the part
of one rank after another, several (`torchrun --nproc_per_node 8 grow.py ...`) each their own; no whole model is in memory.
"""

import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from nanostack import checkpoint, models, parallel, sharded
from nanostack.config import Parallel
from nanostack.device import check_room, choose_device, free_bytes
from nanostack.errors import UserError, exits_cleanly, parse
from nanostack.growth import Growth, ramp_left
from nanostack.growth.moments import RESET
from nanostack.hf import export
from nanostack.launch import check_environment
from nanostack.memory import foresee
from nanostack.model import LlamaConfig
from nanostack.optimizer import name_of
from nanostack.parallel import Placement
from nanostack.parts import TOGETHER, gradients_of
from nanostack.parts import grow as grow_in_parts
from nanostack.text.dataset import Tokens
from nanostack.text.manifest import manifest_sha256
from nanostack.validation import Validation

VAL_TOKENS = 131072


@dataclass(frozen=True)
class Command:
    """Grow a checkpoint in width, depth or both, with its optimizer's state."""

    checkpoint: tyro.conf.Positional[Path]
    growth: tyro.conf.OmitArgPrefixes[Growth] = field(default_factory=Growth)
    out: Path | None = None
    """The grown checkpoint; ckpt-x4.pt beside the old one."""
    overwrite: bool = False
    """Replace what is at out."""
    device: str = "auto"
    """cuda where there is one; or cpu, cuda:1, ..."""
    data: Path | None = None
    """Prepared text: learn trains on what the run would read next, and the receipt tells the loss before and after."""
    batch_tokens: int = 65536
    """Tokens of one step of learn."""
    document_mask: bool = False
    """With data: whether a token attends only within its own document, as data.document_mask of a run."""
    dry_run: bool = False
    """Say what would happen, and do nothing."""
    json: bool = False
    """Print the receipt as one JSON object and nothing else."""


def main(command: Command) -> dict:
    """Read, grow, write. Returns the receipt; for a dry run what it would say and need."""
    check_environment()
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not parallel.is_main_rank())
    how, folder = command.growth, models.is_hf_folder(command.checkpoint)
    if command.checkpoint.is_file():
        console.print(f"reading and checking {command.checkpoint} ({command.checkpoint.stat().st_size / 2**30:.2f} GiB)")
    saved = models.read(command.checkpoint)
    base = LlamaConfig(**saved["config"])
    plan, out = how.plan(base), place(command, base)
    check(command, saved, out)
    text = val = None
    if command.data:
        text = Tokens(command.data, "train", base.seq_len, saved["seed"] or 0)
        if text.vocab_size > base.vocab_size:
            raise UserError(f"{command.data} holds token ids up to {text.vocab_size - 1}, the model has {base.vocab_size}")
        val = Validation(Tokens(command.data, "val", base.seq_len), VAL_TOKENS)

    placement = Placement(choose_device(command.device))
    if parallel.world_size() > 1:
        placement = parallel.start(Parallel(), "float32", compile=False)
    device, shards = placement.device, "shards" in saved or placement.mesh is not None
    if folder and placement.mesh is not None:
        raise UserError(f"{command.checkpoint}: one process grows a Hugging Face folder, without torchrun")
    if shards:
        sharded.check_place(out, command.checkpoint, command.overwrite)
    in_parts = shards and placement.mesh is None and plan.width is None and not plan.learns and not val
    if plan.moments == RESET:
        saved["optimizer"] = {}  # never to be read
    state_of, dtype = name_of(saved["optimizer"]), saved.get("dtype", torch.float32)
    forecast = foresee(base, how, state_of, dtype) | {"device": str(device), "out": str(out)}
    if command.dry_run:
        return forecast | {"bytes_free": free_bytes(device)}
    parts = saved["ranks"] if in_parts else placement.shards
    check_room(device, forecast["bytes_needed"] / parts, "growing")
    if device.type != "cpu" and not shards:
        most = export.SHARD_BYTES if folder else forecast["bytes_written"]
        check_room(torch.device("cpu"), min(most, forecast["bytes_written"]), "putting the file together")

    millions = [f"{forecast[name] / 1e6:.1f}M" for name in ("n_params_before", "n_params")]
    console.print(f"growing on {device}, {' to '.join(millions)} parameters" + (f", in {parts} parts" if parts > 1 else ""))
    if in_parts:
        with Progress(console=console) as progress:
            task = progress.add_task("growing part by part", total=parts)
            receipt = grow_in_parts(command.checkpoint, how, out, device, lambda: progress.advance(task))
    else:
        state = models.restore(saved, placement, optimizer=True)
        state.model.end_of_text = text.manifest["tokenizer"]["eot"] if text and command.document_mask else None
        probe = torch.arange(min(base.seq_len, 128), device=device)[None] % base.vocab_size
        before = val(state.model, TOGETHER).nats_per_token if val else None
        with Progress(console=console, disable=(steps := how.learning_steps()) == 0) as progress:
            task = progress.add_task("learning how to grow", total=steps)
            gradients = gradients_of(state, text, steps, command.batch_tokens, lambda: progress.advance(task)) if text else None
            receipt = state.grow(how, probe, gradients)
        receipt.loss_before, receipt.loss_after = before, val(state.model, TOGETHER).nats_per_token if val else None
        console.print(f"writing {out} ({forecast['bytes_written'] / 2**30:.2f} GiB)")
        if folder:
            export.save(state, out, saved["manifest_sha256"], saved["dtype"], tokenizer=command.checkpoint, eot=saved["eot"])
        elif shards:
            checkpoint.save_sharded(state, out, saved["manifest_sha256"])
        else:
            checkpoint.write(checkpoint.pack(state, saved["manifest_sha256"]), out)
    if caution := receipt.caution():
        console.print(f"warning: {caution}")
    return receipt.as_dict() | {"out": str(out), "n_params": forecast["n_params"]}


def place(command: Command, base: LlamaConfig) -> Path:
    """Where the grown model goes: --out, else beside the old one, under a name that says how it grew."""
    if command.out:
        return command.out
    source, suffix = command.checkpoint, command.growth.plan(base).suffix(base)
    if models.is_hf_folder(source):
        return source.resolve().with_name(f"{source.resolve().name}-{suffix}")
    return source.with_name(f"{source.stem}-{suffix}.pt")


def check(command: Command, saved: dict, out: Path) -> None:
    """Raise UserError for what can be known before any weight is read."""
    source, how, learns = command.checkpoint, command.growth, command.growth.learning_steps() > 0
    if out.exists() and out.samefile(source):
        raise UserError(f"{out} is the checkpoint to grow; choose another --out")
    if models.is_hf_folder(source):
        export.check_place(out, source, command.overwrite)
    elif out.exists() and not command.overwrite:
        raise UserError(f"{out} exists already: choose another --out, or replace it (--overwrite)")
    if left := ramp_left(saved["growth"], saved["cursor"]["tokens"]):
        raise UserError(f"{source} is still ramping in its last growth, for {left} tokens: train it on first")
    if learns and not command.data:
        raise UserError("learn trains how to grow: give it prepared text, --data data/NAME")
    if learns and command.batch_tokens < (seq_len := saved["config"]["seq_len"]):
        raise UserError(f"batch_tokens {command.batch_tokens} is less than one sequence of {seq_len} tokens")
    trained_on = saved["manifest_sha256"]  # None where others trained it
    if learns and command.data and trained_on not in (None, manifest_sha256(command.data)):
        raise UserError(f"{source} was trained on other text than {command.data}: learn goes on where it stopped")
    if models.is_hf_folder(source) and how.makes_random:
        raise UserError(
            "what begins at random is ramped in during training, which a Hugging Face folder has no place for: make a "
            "checkpoint of it (nanostack import), grow that, and train on"
        )


if __name__ == "__main__":
    with exits_cleanly():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leave no half file behind
        command = parse(Command, sys.argv[1:])
        answer = main(command)
        if parallel.is_main_rank():
            print(json.dumps(answer) if command.json else "\n".join(f"{name:>22}  {value}" for name, value in answer.items()))
        parallel.leave()
