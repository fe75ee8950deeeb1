"""How large a micro-batch fits, by option, before a GPU is there: `nanostack fit config/1b.py --gpu h200`.

A training step of the config is traced on tensors without storage (torch's FakeTensorMode, which knows their sizes), and
every storage is counted while it lives. Two traces, of one sequence and of two, give what does not depend on the micro-batch
and what each sequence adds; both are exact but for what libraries take for themselves (RESERVED) and the allocator's rounding.
On several GPUs (--count, fully sharded) the states are divided and FSDP2's gathered copies added by formula: an estimate.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from nanostack.config import load
from nanostack.errors import UserError, command_line
from nanostack.memory import GIB, RESERVED, capacity, estimate, scratch_of

CHECKPOINTING: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
MOMENTS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Command:
    """The largest micro-batch that fits, for every option."""

    config: tyro.conf.Positional[str]
    """A run's config file."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Changes to it as train.py takes them: all options that are not named here."""
    gpu: str = "h200"
    """h200, h100, a100, a100-40, b200, l40s, rtx4090, rtx3090, or a number of GiB."""
    count: int = 1
    """GPUs that the run is fully sharded over."""
    json: bool = False
    """Print the answer as one JSON object; everything else goes to standard error."""


def main(command: Command) -> dict:
    config = load(command.config, list(command.overrides))
    if command.count < 1:
        raise UserError(f"count must be at least 1, not {command.count}")
    room = capacity(command.gpu) - RESERVED
    model = replace(config.shapes()[-1], vocab_size=config.model.vocab_size or 32_000)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    console = Console(stderr=command.json, highlight=False)
    answer: dict = {"gpu": command.gpu, "count": command.count, "room": room, "vocab_size": model.vocab_size, "options": []}
    table = Table(title=f"{command.config} on {command.count} × {command.gpu}: {model.outline()}")
    for name in ("checkpointing", "moments", "micro_batch", "tokens", "stays, GiB", "per sequence, GiB"):
        table.add_column(name, justify="right")
    for how, moments in itertools.product(CHECKPOINTING, MOMENTS):
        parallel = replace(config.parallel, activation_checkpointing=how)
        one = replace(config, parallel=parallel, optim=replace(config.optim, moments=moments))
        found = estimate(one, model, dtype, True, command.count)

        scratch = scratch_of(model, dtype, True)
        most = found.sequences(room, scratch)
        peak = found.peak(config.micro_batch, scratch(config.micro_batch))
        answer["options"].append(
            {"activation_checkpointing": how, "moments": moments, "micro_batch": most, "peak_at_config": peak}
            | {"fixed": found.fixed, "per_sequence": found.per_sequence, "transient": found.transient}
        )
        cells = [how, moments, str(most) if most else "does not fit", f"{most * model.seq_len:,}"]
        table.add_row(*cells, f"{sum(found.fixed.values()) / GIB:.2f}", f"{max(found.per_sequence) / GIB:.3f}")
    console.print(table)
    stays = answer["options"][0]["fixed"]
    console.print("stays, of the first: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in stays.items()))
    if config.model.vocab_size is None:
        console.print(f"the config leaves the vocabulary to the data; {model.vocab_size} is assumed (--model.vocab_size)")
    return answer


def run() -> None:
    command_line(Command, main, __doc__)
