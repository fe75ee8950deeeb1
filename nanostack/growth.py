"""Grow a model in depth, in place: a map that says which layer each new layer copies, applied to weights and optimizer.

The map is a list `layers`: layer i of the grown model is base layer `layers[i]`. The first occurrence of a base layer *is*
that layer: it keeps its storage. Every further occurrence is allocated once and filled on the device. Nothing passes through
the host and, sharded, no collective runs: each rank copies its own shards.

    stack       base layers 0..l-1, g times over         G_stack, "Stacking Your Transformers", arXiv 2405.15319
    layers      any list: `0-5*4` is a stack; `0-1,2-5*5,4-5` is what the paper writes 12-3456×5-56
"""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nanostack.errors import UserError

_TERM = re.compile(r"(\d+)(?:-(\d+))?(?:\*(\d+))?")


def parse_layers(text: str) -> list[int]:
    """`0-1,2-5*5,4-5` → [0, 1, 2, 3, 4, 5, 2, ...]: comma-separated terms, zero-based, `a-b` inclusive, `*k` repeats."""
    layers = []
    for term in text.split(","):
        match = _TERM.fullmatch(term.strip())
        if not match:
            raise UserError(f"bad layer list {text!r}: {term!r} is not of the form 3, 0-5 or 0-5*4")
        first, last, times = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or times < 1:
            raise UserError(f"bad layer list {text!r}: {term!r} names no layer")
        layers += list(range(first, last + 1)) * times
    return layers


def plan_layers(n_layer: int, op: str = "stack", g: int | None = None, layers: str | list[int] | None = None) -> list[int]:
    """The map of a growth of an `n_layer` model. Raises `UserError` for a map that is none."""
    if layers is not None and g is not None:
        raise UserError("g and layers exclude each other: g says how often, layers says exactly which")
    if layers is not None:
        layers = parse_layers(layers) if isinstance(layers, str) else list(layers)
        outside = sorted({i for i in layers if not 0 <= i < n_layer})
        if outside:
            raise UserError(f"the layer list names layer {outside[0]}, but the model has layers 0 to {n_layer - 1}")
        if len(layers) <= n_layer:
            raise UserError(f"the layer list has {len(layers)} layers and the model {n_layer} already: that is no growth")
        dropped = sorted(set(range(n_layer)) - set(layers))
        if dropped:
            raise UserError(f"the layer list leaves out layer {dropped[0]}: every trained layer must occur in it")
        return layers
    g = 4 if g is None else g
    if op != "stack":
        raise UserError(f"there is no growth operator {op!r}; there is: stack")
    if isinstance(g, bool) or not isinstance(g, int) or g < 2:
        raise UserError(f"g must be a whole number of 2 or more, not {g!r}")
    return list(range(n_layer)) * g


def connection_rate(layers: list[int]) -> float:
    """Rc: share of adjacent pairs of the grown model that were adjacent in the base (arXiv 2405.15319)."""
    kept = sum(after == before + 1 for before, after in itertools.pairwise(layers))
    return kept / (len(layers) - 1)


def grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    op: str = "stack",
    g: int | None = None,
    layers: str | list[int] | None = None,
    optimizer_state: str = "reset",
    prepare_block: Callable[[nn.Module], nn.Module] = lambda block: block,
) -> dict:
    """Grow `model.blocks` in place, and `optimizer` with it.

    op, g            the operator and its factor, an integer of 2 or more (4 where neither g nor layers is given)
    layers           instead of g: the map, as a list or in the grammar of `parse_layers`
    optimizer        its state must be tensors, as that of torch's optimizers is; frozen parameters need not be in it
    optimizer_state  "reset": moments and steps of all parameters start again from 0, as in the paper;
                     "copy": new layers get copies of their source's moments and steps, old ones keep theirs
    prepare_block    is given each new block, still without storage, and returns it as the model's own blocks are
                     (checkpointed, compiled, sharded)

    Returns the receipt: op, g, layers, rc, bytes_allocated, bytes_copied_on_device, bytes_through_host, seconds; sizes are
    those on this rank. Losses before and after are the caller's to add. Raises `UserError` before anything is touched.
    """
    sources = plan_layers(len(model.blocks), op, g, layers)
    if optimizer_state not in ("reset", "copy"):
        raise UserError(f"optimizer state after growth is reset or copy, not {optimizer_state!r}")
    device = next(model.parameters()).device
    _wait_for(device)
    started = time.perf_counter()
    config = replace(model.config, n_layer=len(sources))
    base, taken, blocks, copied_from = list(model.blocks), set(), [], {}
    allocated = 0
    for source in sources:
        if source not in taken:
            taken.add(source)
            blocks.append(base[source])
            continue
        with torch.device("meta"):
            block = type(base[source])(config)
        block = prepare_block(block).to_empty(device=device)
        for new, old in zip(block.parameters(), base[source].parameters(), strict=True):
            _copy(new, old)
            new.requires_grad_(old.requires_grad)
            copied_from[new] = old
            allocated += _nbytes(new)
        block.train(base[source].training)
        blocks.append(block)
    model.blocks = nn.ModuleList(blocks)
    model.config = config
    moments = _grow_optimizer(optimizer, model, copied_from, optimizer_state) if optimizer is not None else 0
    _wait_for(device)
    return {
        "op": op if layers is None else "layers",
        "g": len(sources) // len(base) if layers is None else None,
        "layers": sources,
        "rc": round(connection_rate(sources), 6),
        "optimizer": optimizer_state if optimizer is not None else None,
        "bytes_allocated": allocated + moments,
        "bytes_copied_on_device": allocated + moments,
        "bytes_through_host": 0,
        "seconds": round(time.perf_counter() - started, 6),
    }


def _grow_optimizer(optimizer, model, copied_from: dict[Tensor, Tensor], how: str) -> int:
    """Put every new parameter into its source's group, in the model's order, and grow the state. Returns bytes copied."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = []
    copied = 0
    for parameter in model.parameters():
        source = copied_from.get(parameter, parameter)
        if id(source) not in groups:
            continue  # frozen: the optimizer does not know it
        groups[id(source)]["params"].append(parameter)
        if how == "copy" and source is not parameter and source in optimizer.state:
            state = {name: torch.empty_like(value) for name, value in optimizer.state[source].items()}
            for name, value in optimizer.state[source].items():
                _copy(state[name], value)
                copied += _nbytes(value)
            optimizer.state[parameter] = state
    if how == "reset":
        for state in optimizer.state.values():
            for value in state.values():
                _local(value).zero_()
    return copied


def _local(tensor: Tensor) -> Tensor:
    """What of the tensor is on this rank: a sharded tensor's own shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def _copy(new: Tensor, old: Tensor) -> None:
    _local(new).copy_(_local(old))


def _nbytes(tensor: Tensor) -> int:
    return _local(tensor).nbytes


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
