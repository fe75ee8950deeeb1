"""Grow a checkpoint on disk: `python grow.py out/1b_base/ckpt.pt --g 4` writes ckpt-x4.pt beside it.

It is read straight to the device (the GPU where there is one), grown there in place, and written. Train on with
`train.py CONFIG --init_from CHECKPOINT`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from nanostack import checkpoint
from nanostack.config import Growth, Optim
from nanostack.errors import UserError, exits_cleanly
from nanostack.flops import n_params
from nanostack.parallel import Placement
from nanostack.state import State


@dataclass(frozen=True)
class Command:
    """Grow a checkpoint in depth, with its optimizer's state."""

    checkpoint: tyro.conf.Positional[Path]
    growth: tyro.conf.OmitArgPrefixes[Growth] = field(default_factory=Growth)
    out: Path | None = None
    """The grown checkpoint; ckpt-x4.pt beside the old one."""
    overwrite: bool = False
    """Replace what is at out."""
    device: str = "auto"
    """cuda where there is one; or cpu, cuda:1, ..."""
    json: bool = False
    """Print the receipt as one JSON object and nothing else."""


def main(command: Command) -> dict:
    """Read, grow, write. Returns the receipt."""
    saved = checkpoint.load(command.checkpoint)
    n_layer = saved["config"]["n_layer"]
    grown = command.growth.check(n_layer)
    suffix = f"x{grown // n_layer}" if grown % n_layer == 0 else f"{grown}-layers"
    out = command.out or command.checkpoint.with_name(f"{command.checkpoint.stem}-{suffix}.pt")
    if out.exists() and out.samefile(command.checkpoint):
        raise UserError(f"{out} is the checkpoint to grow; choose another --out")
    if out.exists() and not command.overwrite:
        raise UserError(f"{out} exists already: choose another --out, or replace it (--overwrite)")

    state = State.restore(saved, Optim(), Placement(choose_device(command.device)))
    receipt = state.grow(command.growth)
    checkpoint.write(checkpoint.pack(state, saved["manifest_sha256"], saved["seed"]), out)
    return receipt | {"out": str(out), "n_params": n_params(state.model.config)}


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    with exits_cleanly():
        command = tyro.cli(Command, use_underscores=True)
        receipt = main(command)
        if command.json:
            print(json.dumps(receipt))
        else:
            print("\n".join(f"{name:>22}  {value}" for name, value in receipt.items()))
