"""Ramps: random layers and channels are multiplied by a number that rises from 0 to 1 (MSG, arXiv 2305.02869)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanostack.growth import width
from nanostack.growth.receipt import Receipt


def attach_ramp(model: Any, receipt: Receipt, scale: float = 0.0) -> None:
    """Multiply the random part of a growth by `model.ramp`, a number on the device that `set_ramp` changes: both residual
    branches of new layers, and the new outputs of the embedding and of every linear layer but the head.

    Hooks, not new modules or parameters: names, shards and checkpoints are those of a model without them.
    """
    device = next(model.parameters()).device
    model.ramp = torch.full((), scale, device=device)
    new = [block for block, rule in zip(model.blocks, receipt.rules, strict=True) if rule == "random"]
    scaled: list[tuple[nn.Module, Tensor | None]] = [(branch, None) for block in new for branch in (block.attn, block.mlp)]
    inputs_scaled = []
    if receipt.width and receipt.width["op"] == "random":
        maps = width.recorded(receipt.width, model.config, device)
        scaled.append((model.embed, maps["model"].first))
        reads_its_own = maps["heads"].source != width.BORROWS
        for block in model.blocks:
            scaled += [(block.attn.qkv, maps["qkv"].first), (block.attn.out, maps["model"].first)]
            scaled += [(block.mlp.gate_up, maps["gate_up"].first), (block.mlp.down, maps["model"].first)]
            inputs_scaled += [] if reads_its_own.all() else [(block.attn.out, reads_its_own)]

    def times_ramp(x: Tensor, old: Tensor | None) -> Tensor:
        return x * (model.ramp if old is None else torch.where(old, 1.0, model.ramp)).to(x.dtype)

    @functools.cache  # one hook for all blocks: torch.compile makes a graph for each
    def after(old: Tensor | None) -> Callable:
        return lambda module, arguments, output: times_ramp(output, old)

    @functools.cache
    def before(old: Tensor) -> Callable:
        return lambda module, arguments: times_ramp(arguments[0], old)

    model.ramp_hooks = [module.register_forward_hook(after(old)) for module, old in scaled]
    model.ramp_hooks += [module.register_forward_pre_hook(before(old)) for module, old in inputs_scaled]


def set_ramp(model: Any, scale: float) -> None:
    """Set the number, from 0 to 1. At 1 the hooks go, and the number with them."""
    if not is_ramping(model):
        return
    model.ramp.fill_(scale)
    if scale >= 1:
        for hook in model.ramp_hooks:
            hook.remove()
        model.ramp = model.ramp_hooks = None


def is_ramping(model: nn.Module) -> bool:
    """Whether the last growth's random part does not count in full yet."""
    return getattr(model, "ramp", None) is not None
