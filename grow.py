"""Grow a checkpoint on disk: `python grow.py out/1b_base/ckpt.pt --g 4` writes ckpt-x4.pt beside it.

It is read straight to the device (the GPU where there is one), grown there in place, and written. Train on with
`train.py CONFIG --init_from CHECKPOINT`.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from nanostack import checkpoint
from nanostack.config import Growth, Optim
from nanostack.errors import UserError, exits_cleanly
from nanostack.flops import n_params
from nanostack.growth import connection_rate, plan
from nanostack.model import LlamaConfig
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
    dry_run: bool = False
    """Say what would happen, and do nothing."""
    json: bool = False
    """Print the receipt as one JSON object and nothing else."""


def main(command: Command) -> dict:
    """Read, grow, write. Returns the receipt; for a dry run what it would say and need."""
    saved = checkpoint.load(command.checkpoint)
    n_layer = saved["config"]["n_layer"]
    grown = command.growth.check(n_layer)
    suffix = f"x{grown // n_layer}" if grown % n_layer == 0 else f"{grown}-layers"
    out = command.out or command.checkpoint.with_name(f"{command.checkpoint.stem}-{suffix}.pt")
    if out.exists() and out.samefile(command.checkpoint):
        raise UserError(f"{out} is the checkpoint to grow; choose another --out")
    if out.exists() and not command.overwrite:
        raise UserError(f"{out} exists already: choose another --out, or replace it (--overwrite)")

    device = choose_device(command.device)
    forecast = foresee(saved, command.growth) | {"device": str(device), "out": str(out)}
    if forecast["bytes_needed"] > free_bytes(device):
        needed, free = (f"{n / 2**30:.2f} GiB" for n in (forecast["bytes_needed"], free_bytes(device)))
        raise UserError(f"growing needs {needed} on {device}, which has {free} free; choose another --device")
    if command.dry_run:
        return forecast

    state = State.restore(saved, Optim(), Placement(device))
    receipt = state.grow(command.growth)
    checkpoint.write(checkpoint.pack(state, saved["manifest_sha256"], saved["seed"]), out)
    return receipt | {"out": str(out), "n_params": n_params(state.model.config)}


def foresee(saved: dict, how: Growth) -> dict:
    """The map of the growth, the sizes of both models, and what weights and optimizer will need on the device."""
    config = LlamaConfig(**saved["config"])
    layers = plan(config.n_layer, how.op, how.g, how.layers, how.k)
    grown = replace(config, n_layer=len(layers))
    moments = 2 if saved["optimizer"] else 0  # per parameter; new ones may have none
    new_moments = 0 if how.moments().new == "zero" else moments
    old, new = n_params(config), n_params(grown) - n_params(config)
    return {
        "op": how.op,
        "layers": [layer.source for layer in layers],
        "rules": [layer.rule for layer in layers],
        "rc": round(connection_rate([layer.source for layer in layers]), 6),
        "n_params_before": old,
        "n_params": old + new,
        "bytes_needed": 4 * (old * (1 + moments) + new * (1 + new_moments)),
    }


def free_bytes(device: torch.device) -> float:
    """Memory that is free there; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


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
