"""How large a micro-batch fits, by option, before a GPU is there: `nanostack fit config/1b.py --gpu h200`.

A training step of the config is traced on tensors without storage (torch's FakeTensorMode, which knows their sizes), and
every storage is counted while it lives. Two traces, of one sequence and of two, give what does not depend on the micro-batch
and what each sequence adds; both are exact but for what libraries take for themselves (RESERVED) and the allocator's rounding.
On several GPUs (--count, on the mesh that the config's `parallel` makes of them) the model is built, sharded, grown and trained
on a fake process group, and the bytes that a GPU sends in each collective are told as well (nanostack/rehearsal.py).
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from nanostack.config import Train, load
from nanostack.errors import UserError, command_line
from nanostack.memory import GIB, RESERVED, capacity, estimate, scratch_of
from nanostack.parallel import check_gathering
from nanostack.rehearsal import Rehearsal, rehearse

CHECKPOINTING: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
MOMENTS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Command:
    """The largest micro-batch that fits, for every option."""

    config: tyro.conf.Positional[str]
    """A run's config: a file, or the name of a preset."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Changes to it as train.py takes them: all options that are not named here."""
    gpu: str = "h200"
    """h200, h100, a100, a100-40, b200, l40s, rtx4090, rtx3090, or a number of GiB."""
    count: int = 1
    """GPUs of the run."""
    json: bool = False
    """Print the answer as one JSON object; everything else goes to standard error."""


def main(command: Command) -> dict:
    config = load(command.config, list(command.overrides))
    if command.count < 1:
        raise UserError(f"count must be at least 1, not {command.count}")
    if command.count == 1:
        check_gathering(config.parallel, 1)
    room, asked = capacity(command.gpu) - RESERVED, config.model.vocab_size
    config = replace(config, model=replace(config.model, vocab_size=asked or 32_000))
    model = config.shapes()[-1]
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    console = Console(stderr=command.json, highlight=False)
    answer: dict = {"gpu": command.gpu, "count": command.count, "room": room, "vocab_size": model.vocab_size, "options": []}
    table = Table(title=f"{command.config} on {command.count} × {command.gpu}: {model.outline()}")
    for name in ("checkpointing", "moments", "micro_batch", "tokens", "stays, GiB", "per sequence, GiB"):
        table.add_column(name, justify="right")
    mine: Rehearsal | None = None  # of the config as it is
    for how, moments in itertools.product(CHECKPOINTING, MOMENTS):
        parallel = replace(config.parallel, activation_checkpointing=how)
        one = replace(config, parallel=parallel, optim=replace(config.optim, moments=moments))
        if command.count == 1:
            found = estimate(one, model, dtype, True)
        else:
            rehearsed = rehearse(one, dtype, True, command.count, with_growth=one == config)
            found, mine = rehearsed.memory, rehearsed if one == config else mine
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
    if mine is not None:
        answer |= tell_rehearsal(config, mine, scratch_of(model, dtype, True)(config.micro_batch), console)
    if asked is None:
        console.print(f"the config leaves the vocabulary to the data; {model.vocab_size} is assumed (--model.vocab_size)")
    return answer


def tell_rehearsal(config: Train, found: Rehearsal, scratch: int, console: Console) -> dict:
    """Print what the config as it is takes and sends on each of several GPUs. Returns it for the answer."""
    replicate, shard = found.shape
    peak = found.memory.peak(config.micro_batch, scratch)
    console.print(
        f"the config as it is, on a mesh of {replicate} × {shard}: {peak / GIB:.2f} GiB at the peak, of which up to "
        f"{found.gathered / GIB:.2f} GiB are gathered parameters; {found.micro_steps} micro-batches of {config.micro_batch} "
        "sequences a step"
    )
    answer: dict = {"mesh": found.shape, "peak": peak, "gathered": found.gathered, "micro_steps": found.micro_steps}
    if found.grown is not None:
        grown = found.grown
        sizes = (f"{size / GIB:.2f}" for size in (grown.before, grown.peak, grown.after))
        console.print("growing, GiB of weights and moments: {} before, {} at the peak, {} after".format(*sizes))
        answer["growth"] = {"before": grown.before, "peak": grown.peak, "after": grown.after}
    table = Table(title="sent by each GPU in a step, GiB")
    kinds = sorted({kind for _, kind in found.sent})
    for name in ("", *kinds):
        table.add_column(name, justify="right")
    for phase in ("forward", "backward", "update"):
        table.add_row(phase, *(f"{found.sent.get((phase, kind), 0) / GIB:.2f}" for kind in kinds))
    console.print(table)
    answer["sent"] = [{"phase": phase, "collective": kind, "bytes": n} for (phase, kind), n in sorted(found.sent.items())]
    return answer


def run() -> None:
    command_line(Command, main, __doc__)
