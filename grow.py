"""Grow a checkpoint on disk: `python grow.py out/1b_base/ckpt.pt --g 4` writes ckpt-x4.pt beside it.

It is read tensor by tensor from the memory-mapped file to the device (the GPU where there is one), grown there in place, and
written. Train on with `train.py CONFIG --init_from CHECKPOINT`. A folder of Hugging Face's Llama is taken too, and a folder
written: `python grow.py smollm --g 2 --out smollm-x2`.
"""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from nanostack import checkpoint, export, hf
from nanostack.config import Growth, Optim
from nanostack.data import Tokens, manifest_sha256
from nanostack.depth import connection_rate
from nanostack.errors import UserError, exits_cleanly
from nanostack.flops import n_params
from nanostack.growth import Shape, caution, ramp_left
from nanostack.model import Llama, LlamaConfig
from nanostack.moments import RESET
from nanostack.parallel import Placement, check_room, free_bytes
from nanostack.state import State

TOGETHER = 4  # sequences that go through the model at a time


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
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    folder = command.checkpoint.is_dir()
    if command.checkpoint.is_file():
        console.print(f"reading and checking {command.checkpoint} ({command.checkpoint.stat().st_size / 2**30:.2f} GiB)")
    saved = hf.load(command.checkpoint) if folder else checkpoint.load(command.checkpoint)
    base = LlamaConfig(**saved["config"])
    grown = command.growth.shape(base)
    source = command.checkpoint.resolve() if folder else command.checkpoint
    name = f"{source.name}-{suffix(base, grown.config)}" if folder else f"{source.stem}-{suffix(base, grown.config)}.pt"
    out = command.out or source.with_name(name)
    check(command, saved, out)
    texts = [Tokens(command.data, split, base.seq_len, saved["seed"] or 0) for split in ("train", "val") if command.data]
    if texts and texts[0].vocab_size > base.vocab_size:
        raise UserError(f"{command.data} holds token ids up to {texts[0].vocab_size - 1}, the model has {base.vocab_size}")

    device = choose_device(command.device)
    if command.growth.moments() == RESET:
        saved["optimizer"] = {}  # never to be read
    forecast = foresee(saved, command.growth, grown) | {"device": str(device), "out": str(out)}
    if command.dry_run:
        return forecast | {"bytes_free": free_bytes(device)}
    check_room(device, forecast["bytes_needed"], "growing")
    if device.type != "cpu":
        at_once = min(forecast["bytes_written"], export.SHARD_BYTES) if folder else forecast["bytes_written"]
        check_room(torch.device("cpu"), at_once, "putting the file together")

    console.print(
        f"growing on {device}, {forecast['n_params_before'] / 1e6:.1f}M to {forecast['n_params'] / 1e6:.1f}M parameters"
    )
    state = State.restore(saved, Optim(), Placement(device))
    state.model.end_of_text = texts[0].manifest["tokenizer"]["eot"] if texts and command.document_mask else None
    probe = torch.arange(min(base.seq_len, 128), device=device)[None] % base.vocab_size
    before = mean_loss(state.model, texts[1]) if texts else None
    with Progress(console=console, disable=command.growth.learning_steps() == 0) as progress:
        task = progress.add_task("learning how to grow", total=command.growth.learning_steps())
        receipt = state.grow(
            command.growth,
            probe,
            gradients_of(state, texts[0], command.batch_tokens, lambda: progress.advance(task)) if texts else None,
        )
    receipt |= {"loss_before": before, "loss_after": mean_loss(state.model, texts[1]) if texts else None}
    console.print(f"writing {out} ({forecast['bytes_written'] / 2**30:.2f} GiB)")
    if folder:
        options = {"dtype": saved["dtype"], "tokenizer": command.checkpoint, "eot": saved["eot"]}
        export.save(state, out, saved["manifest_sha256"], **options)
    else:
        checkpoint.write(checkpoint.pack(state, saved["manifest_sha256"]), out)
    return receipt | {"out": str(out), "n_params": n_params(state.model.config)}


def check(command: Command, saved: dict, out: Path) -> None:
    """Raise UserError for what can be known before any weight is read."""
    if out.exists() and out.samefile(command.checkpoint):
        raise UserError(f"{out} is the checkpoint to grow; choose another --out")
    if command.checkpoint.is_dir():
        export.check_place(out, command.checkpoint, command.overwrite)
    elif out.exists() and not command.overwrite:
        raise UserError(f"{out} exists already: choose another --out, or replace it (--overwrite)")
    if left := ramp_left(saved["growth"], saved["cursor"]["tokens"]):
        raise UserError(f"{command.checkpoint} is still ramping in its last growth, for {left} tokens: train it on first")
    if command.growth.learning_steps() and not command.data:
        raise UserError("learn trains how to grow: give it prepared text, --data data/NAME")
    if command.growth.learning_steps() and command.batch_tokens < (seq_len := saved["config"]["seq_len"]):
        raise UserError(f"batch_tokens {command.batch_tokens} is less than one sequence of {seq_len} tokens")
    trained_on = saved["manifest_sha256"]  # None where others did
    if command.growth.learning_steps() and trained_on not in (None, manifest_sha256(command.data)):
        raise UserError(f"{command.checkpoint} was trained on other text than {command.data}: learn goes on where it stopped")
    if command.checkpoint.is_dir() and "random" in (command.growth.op, command.growth.width):
        raise UserError(
            "what begins at random is ramped in during training, which a Hugging Face folder has no place for: make a "
            "checkpoint of it (python -m nanostack.import_hf), grow that, and train on"
        )


def suffix(base: LlamaConfig, grown: LlamaConfig) -> str:
    """What the name of a grown checkpoint says of it: x4, d2048, x4-d2048, 9-layers, ..."""
    times, rest = divmod(grown.n_layer, base.n_layer)
    said = [] if times == 1 and not rest else [f"{grown.n_layer}-layers" if rest else f"x{times}"]
    said += [f"d{grown.d_model}"] if grown.d_model != base.d_model else []
    return "-".join(said) or f"kv{grown.n_kv_head}-ff{grown.d_ff}"


def gradients_of(state: State, text: Tokens, batch_tokens: int, done: Callable[[], object]) -> Callable[[], torch.Tensor]:
    """A function that puts the gradients of the next batch into the model, moves the cursor past it, and returns the loss."""

    def gradients() -> torch.Tensor:
        model, first, loss = state.model, state.cursor.samples, torch.zeros((), device=state.placement.device)
        size = batch_tokens // model.config.seq_len
        for start in range(first, first + size, TOGETHER):
            block = torch.from_numpy(text.batch(start, min(start + TOGETHER, first + size))).to(loss.device)
            part = model(block[:, :-1], block[:, 1:]) * len(block) / size
            part.backward()
            loss += part.detach()
        state.cursor.advance(size, model.config)
        done()
        return loss

    return gradients


@torch.no_grad()
def mean_loss(model: Llama, text: Tokens, tokens: int = 131072) -> float:
    """Loss in nats per token over the first validation tokens."""
    device, blocks = model.cos.device, max(1, min(text.n_blocks, tokens // text.seq_len))
    total = 0.0
    for start in range(0, blocks, TOGETHER):
        block = torch.from_numpy(text.blocks(start, min(start + TOGETHER, blocks))).to(device)
        total += len(block) * model(block[:, :-1], block[:, 1:]).item()
    return total / blocks


def foresee(saved: dict, how: Growth, grown: Shape) -> dict:
    """The map of the growth, the sizes of both models, and what weights and optimizer will need on the device."""
    base, config = LlamaConfig(**saved["config"]), grown.config
    moments = 2 if saved["optimizer"] else 0  # per parameter; new ones may have none
    old, new = n_params(base), n_params(config) - n_params(base)
    numbers = old * (1 + moments) + new * (1 if how.moments().new == "zero" else 1 + moments)
    if how.width:
        numbers = (old + new) * (1 + moments)
    if how.width or how.noise:  # the largest tensor is there twice
        numbers += max(config.vocab_size, 2 * config.d_ff) * config.d_model
    if how.learning_steps():  # the old weights, and gradients of the new ones
        numbers += old + (old + new)
    return {
        "growth": vars(how),
        "op": grown.op,
        "layers": [layer.source for layer in grown.layers],
        "rules": [layer.rule for layer in grown.layers],
        "rc": round(connection_rate([layer.source for layer in grown.layers]), 6),
        "shape": vars(config),
        "preserves": grown.preserves and not how.noise,
        "n_params_before": old,
        "n_params": old + new,
        "bytes_needed": 4 * numbers,
        "bytes_written": saved.get("dtype", torch.float32).itemsize * (old + new) * (1 + moments),
    }


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    with exits_cleanly():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leave no half file behind
        command = tyro.cli(Command, use_underscores=True)
        receipt = main(command)
        if not command.dry_run and (said := caution(receipt)):
            print(f"warning: {said}", file=sys.stderr)
        if command.json:
            print(json.dumps(receipt))
        else:
            print("\n".join(f"{name:>22}  {value}" for name, value in receipt.items()))
