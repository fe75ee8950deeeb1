"""A Hugging Face model as a checkpoint: `nanostack import HuggingFaceTB/SmolLM2-135M out/smol/ckpt.pt`.

Takes a folder, or the name of a model on the Hub (with a network). Train on with `train.py CONFIG --init_from CHECKPOINT`; to
grow it and stay with Hugging Face, `grow.py` takes such a folder itself.
"""

import dataclasses
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from nanostack import checkpoint, models
from nanostack.errors import UserError, command_line
from nanostack.flops import n_params
from nanostack.hf import weights as hf
from nanostack.parallel import Placement
from nanostack.text import hub


@dataclass(frozen=True)
class Command:
    """Read a Llama, Mistral, Qwen2 or Qwen3 of Hugging Face's."""

    source: tyro.conf.Positional[str]
    """A folder, or a model's name on the Hub."""
    out: tyro.conf.Positional[Path]
    """The checkpoint to write."""
    seq_len: int | None = None
    """Context to train with, where that is to be less than the model's."""
    overwrite: bool = False
    """Replace what is at out."""
    json: bool = False
    """Print what was written as one JSON object."""


def folder_of(source: str) -> Path:
    """The folder itself, or where the Hub's files are kept on this machine."""
    if Path(source).is_dir():
        return Path(source)
    if not hub.is_name(source):
        raise UserError(f"there is no folder {source}, and a model on the Hub is called OWNER/NAME")
    folder = hub.model(source, ["*.json", "*.safetensors", "tokenizer*"])
    return folder if any(folder.glob("*.safetensors")) else hub.model(source, ["*.json", "pytorch_model*.bin", "tokenizer*"])


def main(command: Command) -> dict:
    if command.out.exists() and not command.overwrite:
        raise UserError(f"{command.out} exists already: choose another place, or replace it (--overwrite)")
    saved = hf.load(folder_of(command.source))
    if command.seq_len is not None:
        if not 0 < command.seq_len <= saved["config"]["seq_len"]:
            raise UserError(f"seq_len must be between 1 and the model's {saved['config']['seq_len']}, not {command.seq_len}")
        saved["config"] |= {"seq_len": command.seq_len}
    state = models.restore(saved, Placement(torch.device("cpu")))
    checkpoint.write(checkpoint.pack(state, saved["manifest_sha256"]), command.out)
    config = state.model.config
    if not command.json:
        print(f"wrote {command.out}: {config.outline()}, {n_params(config) / 1e6:.1f}M parameters")
    return {"out": str(command.out), "config": dataclasses.asdict(config), "n_params": n_params(config)}


def run() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leave no half file behind
    command_line(Command, main, __doc__)
