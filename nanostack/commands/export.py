"""A checkpoint as a Hugging Face folder: `nanostack export out/1b/ckpt.pt exported/ --data data/texts`.

`AutoModelForCausalLM.from_pretrained("exported/")` gives the same logits. A tokenizer goes with it only if --data names one.
Written are config.json, safetensors (sharded by size), generation_config.json, the files of a tokenizer and a model card; with
--gguf also one file for llama.cpp.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from nanostack import checkpoint, models
from nanostack.errors import UserError, command_line
from nanostack.generate import check_tokenizer
from nanostack.growth import ramp_left
from nanostack.hf import gguf
from nanostack.hf import weights as hf
from nanostack.hf.export import check_place, save
from nanostack.parallel import Placement
from nanostack.runs import read_run
from nanostack.text import tokenizer
from nanostack.text.manifest import load_manifest, manifest_sha256


@dataclass(frozen=True)
class Command:
    """Write a checkpoint for Hugging Face's transformers."""

    checkpoint: tyro.conf.Positional[Path]
    """The checkpoint to export."""
    folder: tyro.conf.Positional[Path]
    """The folder to write; its name becomes the model's."""
    data: Path | None = None
    """The prepared folder whose tokenizer the model was trained with."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the weights that are written; the checkpoint's are float32."""
    gguf: bool = False
    """Write FOLDER/NAME.gguf too, for llama.cpp, in the same dtype and with the tokenizer; takes --data."""
    shard_gb: float = 5.0
    """Size of a safetensors file at most, in 10^9 bytes."""
    overwrite: bool = False
    """Replace what is at the folder."""
    json: bool = False
    """Print what was written as one JSON object."""


def main(command: Command) -> dict:
    if command.shard_gb <= 0:
        raise UserError(f"shard_gb must be positive, not {command.shard_gb:g}")
    if command.gguf:
        gguf.require_extra()
        if not command.data:
            raise UserError("a GGUF holds its tokenizer: name the data that the model was trained on (--data)")
    hf.require_extra()
    check_place(command.folder, command.checkpoint, command.overwrite)
    saved = checkpoint.load(command.checkpoint)
    if left := ramp_left(saved["growth"], saved["cursor"]["tokens"]):
        raise UserError(f"{command.checkpoint} is still ramping in its last growth, for {left} tokens: train it on first")
    text = tokenizer.load(command.data) if command.data else None
    if command.data and manifest_sha256(command.data) != saved["manifest_sha256"]:
        check_tokenizer(command.data, command.checkpoint.parent / "metrics.jsonl")
        print(f"note: the model was trained on other data than {command.data}: is it the same tokenizer?", file=sys.stderr)
    state = models.restore(saved, Placement(torch.device("cpu")))
    if state.window:
        print(f"note: {command.folder} is of a model with a sliding window, and its context is {state.window}", file=sys.stderr)
    folder = command.checkpoint.parent
    records = read_run(folder)[1] if (folder / "metrics.jsonl").is_file() else None
    if any(not isinstance(record, dict) or not record.keys() >= {"tokens", "flops"} for record in records or ()):
        raise UserError(f"{folder / 'metrics.jsonl'} was not written by this version of train.py: move it away to export")
    records = [record for record in records or [] if record["tokens"] <= state.cursor.tokens]
    if state.growth and state.growth[-1].tokens == state.cursor.tokens and "growth" not in (records or [{}])[-1]:
        records = None  # grown on disk, not trained since: they are its base's
    how = {"dtype": getattr(torch, command.dtype), "shard_bytes": int(command.shard_gb * 1e9), "records": records}
    if command.data and text:
        how |= {"tokenizer": text, "text": f"{', '.join(load_manifest(command.data)['sources'])}, in tokens of {text.name}"}
    save(state, command.folder, saved["manifest_sha256"], as_gguf=command.gguf, **how)
    if not command.json:
        print(f"wrote {command.folder}" + ("" if text else "; no tokenizer, as --data was not given"))
    return {"folder": str(command.folder), "files": sorted(path.name for path in command.folder.iterdir())}


def run() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leave no half folder behind
    command_line(Command, main, __doc__)
