"""A checkpoint as a Hugging Face folder: `python -m nanostack.export out/1b/ckpt.pt exported/ --data data/texts`.

`AutoModelForCausalLM.from_pretrained("exported/")` gives the same logits. Without --data no tokenizer goes with it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from nanostack import checkpoint, hf, tokenizer
from nanostack.config import Optim
from nanostack.errors import UserError, command_line
from nanostack.metrics import read_run
from nanostack.parallel import Placement
from nanostack.state import State


@dataclass(frozen=True)
class Command:
    """Write a checkpoint for Hugging Face's transformers."""

    checkpoint: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]
    data: Path | None = None
    """The prepared folder whose tokenizer the model was trained with."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; the masters are float32."""
    shard_gb: float = 5.0
    """Size of a safetensors file at most, in 10^9 bytes."""
    overwrite: bool = False
    """Replace what is at the folder."""
    json: bool = False
    """Print what was written as one JSON object."""


def main(command: Command) -> dict:
    if command.shard_gb <= 0:
        raise UserError(f"shard_gb must be positive, not {command.shard_gb:g}")
    hf.require_extra()
    saved = checkpoint.load(command.checkpoint)
    text = tokenizer.load(command.data) if command.data else None
    state = State.restore(saved | {"optimizer": {}}, Optim(), Placement(torch.device("cpu")))
    folder = command.checkpoint.parent
    records = read_run(folder)[1] if (folder / "metrics.jsonl").is_file() else None
    records = [record for record in records or [] if record["tokens"] <= state.cursor.tokens]
    how = {"dtype": getattr(torch, command.dtype), "shard_bytes": int(command.shard_gb * 1e9), "overwrite": command.overwrite}
    hf.save(state, command.folder, saved["manifest_sha256"], tokenizer=text, records=records, **how)
    if not command.json:
        print(f"wrote {command.folder}" + ("" if text else "; no tokenizer, as --data was not given"))
    return {"folder": str(command.folder), "files": sorted(path.name for path in command.folder.iterdir())}


if __name__ == "__main__":
    command_line(Command, main)
