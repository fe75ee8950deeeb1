"""A sharded checkpoint to one file, or one file to a sharded checkpoint: `nanostack consolidate out/1b/ckpt.pt whole.pt`.

What SOURCE is says which: OUT becomes the other. Tensors pass one at a time, so no whole model is in memory. Whatever takes a
checkpoint takes both; one file is handier to copy, and for torch.load.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from nanostack import checkpoint, models, parallel, parts, sharded
from nanostack.errors import UserError, command_line
from nanostack.launch import check_environment


@dataclass(frozen=True)
class Command:
    """Turn a sharded checkpoint into one file, or one file into a sharded checkpoint."""

    source: tyro.conf.Positional[Path]
    """A checkpoint: one file; or a sharded one's pointer or folder."""
    out: tyro.conf.Positional[Path]
    """NAME.pt. The shards of a sharded checkpoint are in the folder NAME beside it."""
    overwrite: bool = False
    """Replace what is at out."""
    json: bool = False
    """Print what was written as one JSON object."""


def main(command: Command) -> dict:
    check_environment()
    if parallel.world_size() > 1:
        raise UserError("one process turns a checkpoint into the other form: start it without torchrun")
    source, out = command.source, command.out
    if models.is_hf_folder(source):
        raise UserError(f"{source} is no checkpoint: nanostack import makes one of a Hugging Face folder")
    if not out.suffix or out.is_dir():
        raise UserError(f"{out}: OUT is a file with a suffix, as in whole.pt")
    if out.exists() and (out.samefile(source) or not command.overwrite):
        raise UserError(f"{out} exists already: choose another name" + ("" if out.samefile(source) else ", or --overwrite"))
    saved = checkpoint.load(source)
    if "shards" not in saved:
        sharded.check_place(out, source, command.overwrite)
        parts.to_shards(saved, out)
    else:
        parts.to_file(saved, out)
    kind = "one file" if "shards" in saved else "a sharded checkpoint"
    if not command.json:
        Console(highlight=False, soft_wrap=True).print(f"wrote {out}, {kind}")
    return {"out": str(out), "kind": kind}


def run() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leave no half file behind
    command_line(Command, main, __doc__)
