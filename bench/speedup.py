"""What growth saved: FLOPs(scratch) / FLOPs(grown, base included) − 1 at equal validation loss."""

import itertools
import json
from pathlib import Path

from nanostack.errors import UserError


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """Header and records of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (no metrics.jsonl)")
    header, *records = map(json.loads, path.read_text().splitlines())
    return header, records


def curve(records: list[dict]) -> list[tuple[float, float]]:
    """(FLOPs spent, validation loss in nats per token) of every evaluation, in order. A growth costs no FLOPs."""
    return [(record["flops"], record["val_loss"]) for record in records if record["val_loss"] is not None]


def flops_to_reach(points: list[tuple[float, float]], loss: float) -> float | None:
    """FLOPs at which a curve first comes down to `loss`, linear between evaluations; None if it never does."""
    if points and points[0][1] <= loss:
        return points[0][0]
    for (flops_a, loss_a), (flops_b, loss_b) in itertools.pairwise(points):
        if loss_b <= loss < loss_a:
            return flops_a + (flops_b - flops_a) * (loss_a - loss) / (loss_a - loss_b)
    return None


def speedup(scratch: list[tuple[float, float]], grown: list[tuple[float, float]]) -> float | None:
    """Speedup as a fraction at the last loss of `scratch`; None if `grown` never reaches it."""
    flops, loss = scratch[-1]
    needed = flops_to_reach(grown, loss)
    return None if needed is None else flops / needed - 1
