"""Grow a model in place, on the device it is on: first in width, then in depth, its optimizer with it.

A growth says which old layer or channel each new one copies, and how the others start. depth.py has the maps of layers,
width.py those of channels and heads; learn.py trains maps; moments.py has the choices for the optimizer's state; ramp.py lets
random parts in slowly. config.py has what a user asks for, receipt.py what a growth tells.

In depth, the first occurrence of a base layer *is* that layer: it keeps its storage. Every other layer is allocated once and
filled on the device. Nothing passes through the host and, sharded, no collective runs, but where `learn` trains. Width
needs new storage for every parameter, one at a time.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanostack.errors import UserError
from nanostack.growth import learn, width
from nanostack.growth.config import Growth, GrowthPlan
from nanostack.growth.depth import TAKES_G, Layer
from nanostack.growth.moments import EPS_FOLLOWS_DEPTH, POWER, Moments
from nanostack.growth.ramp import attach_ramp, is_ramping, set_ramp
from nanostack.growth.receipt import Receipt, ramp_left
from nanostack.growth.traffic import HostTraffic
from nanostack.model import RESIDUAL_OUTPUTS, Llama, LlamaConfig, initial_value
from nanostack.shards import local_shard

__all__ = ["Growth", "GrowthPlan", "Hooks", "Receipt", "attach_ramp", "grow", "ramp_left", "set_ramp"]


@dataclass(frozen=True)
class Hooks:
    """Functions that a sharded, compiled or checkpointed model needs while it grows; the defaults are for a plain one."""

    prepare_block: Callable[[nn.Module], nn.Module] = lambda block: block
    """Is given each new block, still without storage, and returns it as the model's own blocks are."""
    rejoin: Callable[[Llama], object] = lambda model: None
    """Is given the model when it has its new blocks: FSDP2 has to find its root again."""
    write: Callable[[Tensor, Tensor], object] = Tensor.copy_
    """`write(parameter, value)` puts a whole value into a parameter."""
    sum_shards: Callable[[Tensor], object] = lambda value: None
    """Adds up a value, in place, over the ranks that hold parts of the same weight."""


def grow(
    model: Llama,
    optimizer: torch.optim.Optimizer | None = None,
    how: Growth | str | None = None,
    hooks: Hooks | int | None = None,
    layers: str | list[int] | None = None,
    *,
    seed: int = 0,
    gradients: Callable[[], Tensor] | None = None,
    **fields,
) -> Receipt:
    """Grow the model in place, in width and then in depth, and `optimizer` with it.

    how        what to do. Without it, `fields` are those of Growth, and op, g and layers may come in the places of how, hooks
               and layers: `grow(model, optimizer, op="stack", g=4)` or `grow(model, optimizer, "stack", 4)`. wider=Width(...)
               and moments=Moments(...) set the fields of a growth in width, and those of the optimizer's state
    optimizer  its state must be tensors, as that of torch's optimizers is; frozen parameters need not be in it
    hooks      for a model that is sharded, compiled or checkpointed; width grows on one device only
    seed       of noise, random layers and random channels, which depend on nothing else
    gradients  learn needs it: puts the gradients of the next batch into the model's parameters, returns the loss

    Random layers and channels are ramped in: `set_ramp(model, 0)` holds, until the caller raises it to 1. The caller sets
    `loss_before` and `loss_after` of the receipt, whose `as_dict()` is plain values. Raises `UserError` before anything is
    touched, and where learning diverges; `TypeError` for arguments that do not fit together.
    """
    _check_types(how=(how, Growth, str), layers=(layers, str, list))
    if not isinstance(hooks, Hooks | int | float | str | None):
        raise TypeError(f"hooks are Hooks, not {hooks!r}")
    if not isinstance(how, Growth):
        places = {"op": how, "g": None if isinstance(hooks, Hooks) else hooks, "layers": layers}
        how, hooks = _growth_of(places, fields), hooks if isinstance(hooks, Hooks) else None
    elif fields or layers is not None:
        raise TypeError(
            f"`how` is a Growth already, which {', '.join(fields) or 'layers'} would change: dataclasses.replace does"
        )
    if hooks is not None and not isinstance(hooks, Hooks):
        raise TypeError(f"hooks are Hooks, not {hooks!r}: the config in `how` says by how much the model grows")
    hooks = hooks or Hooks()
    plan, base = how.plan(model.config), model.config
    gradients = _checked(model, optimizer, plan, gradients)
    receipt = _receipt(how, plan, base, optimizer is not None)
    device = next(model.parameters()).device
    _wait_for(device)
    started = time.perf_counter()
    moved = Moved()
    moments = plan.moments.settled()
    if optimizer is not None and (moments.old, moments.new) == ("zero", "zero"):
        optimizer.state.clear()  # before anything is allocated: that may go where the moments were
    learned = []
    traffic = HostTraffic()  # around everything but learn, which reads text
    if plan.width is not None:
        mixed = learn.width_map(model, plan.width, seed) if plan.width.op == "learn" else None
        with traffic:
            moved += width.widen(model, optimizer, plan.width, seed, mixed)
        if mixed is not None:
            learned.append(learn.train(model, mixed, gradients, how.learn_steps))
    with traffic:
        if plan.op is not None:
            # Moments of wide parameters change after the growth in depth only, in _settle_width.
            depth_moments = moments if plan.width is None else moments._replace(old="keep")
            moved += _deepen(model, optimizer, plan, depth_moments, seed, hooks)
            hooks.rejoin(model)
            _follow_scale(model, optimizer, plan, base)
        if receipt.width is not None and optimizer is not None:
            _settle_width(model, optimizer, receipt, moments)
        if receipt.ramps:
            attach_ramp(model, receipt)
    if plan.op == "learn":
        in_depth = learn.DepthMap(model, base.n_layer, hooks.write)
        learned.append(learn.train(model, in_depth, gradients, how.learn_steps, hooks.sum_shards))
    if how.noise:
        with traffic:
            _add_noise(model, base, how.noise, seed, hooks.write)
    _wait_for(device)
    receipt.learned, receipt.bytes_through_host = learned or None, traffic.bytes
    receipt.bytes_allocated, receipt.bytes_copied_on_device = moved.allocated, moved.copied
    receipt.seconds = round(time.perf_counter() - started, 6)
    return receipt


def _check_types(**arguments: tuple) -> None:
    """TypeError for an argument that is neither None nor of any of its types; each is (value, *types)."""
    for name, (value, *types) in arguments.items():
        if value is not None and not isinstance(value, tuple(types)):
            raise TypeError(f"{name} is a {' or '.join(one.__name__ for one in types)}, not {value!r}")


def _growth_of(places: dict[str, Any], fields: dict[str, Any]) -> Growth:
    """The config of op, g and layers by their places, and of fields by their names."""
    for name, value in places.items():
        if value is not None and name in fields:
            raise TypeError(f"{name} is given twice, by its place and by its name")
        fields |= {} if value is None else {name: value}
    if hooks := fields.keys() & {one.name for one in dataclasses.fields(Hooks)}:
        raise TypeError(f"{', '.join(sorted(hooks))} belongs to hooks=Hooks(...)")
    _check_types(wider=(fields.get("wider"), width.Width), moments=(fields.get("moments"), Moments))
    if (wider := fields.pop("wider", None)) is not None:
        fields |= {"width": wider.op} | {name: value for name, value in vars(wider).items() if name != "op"}
    if (moments := fields.pop("moments", None)) is not None:
        fields |= {"moments_old": moments.old, "moments_new": moments.new}
        fields |= {"moments_factor": moments.factor} if "scale" in moments else {}
    return Growth(**fields)


@dataclass
class Moved:
    """Bytes on this rank."""

    allocated: int = 0
    copied: int = 0

    def __iadd__(self, other: tuple[int, int]) -> "Moved":
        self.allocated, self.copied = self.allocated + other[0], self.copied + other[1]
        return self


def _receipt(how: Growth, plan: GrowthPlan, base: LlamaConfig, with_moments: bool) -> Receipt:
    """The receipt before anything is done."""

    def sizes(config: LlamaConfig) -> dict:
        return {name: getattr(config, name) for name in ("d_model", "n_head", "n_kv_head", "d_ff")}

    planned = plan.map() | ({"op": "layers"} if how.layers is not None and plan.op == "stack" else {})
    return Receipt(
        **planned,
        g=len(plan.layers) // base.n_layer if how.layers is None and plan.op in TAKES_G else None,
        k=how.k,
        width=None if plan.width is None else vars(plan.width) | {"from": sizes(base), "to": sizes(plan.config)},
        moments=plan.moments._asdict() if with_moments else None,
        noise=how.noise,
        residual=None if base.residual_scale is None else how.residual,
    )


def _checked(model: Llama, optimizer, plan: GrowthPlan, gradients: Callable[[], Tensor] | None) -> Callable[[], Tensor]:
    """`gradients`. UserError for a model or an optimizer that cannot grow like this."""
    if is_ramping(model):
        raise UserError("what the last growth made is still being ramped in: grow again when it counts in full")
    unknown = {name for state in optimizer.state.values() for name in state} - set(POWER) if optimizer is not None else set()
    if unknown:
        raise UserError(f"what to do with the optimizer's {', '.join(sorted(unknown))} is not known: see growth/moments.py")
    if plan.width is not None and any(local_shard(p) is not p for p in model.parameters()):
        raise UserError(
            "a sharded model does not grow in width: grow its checkpoint with grow.py, without torchrun, or train on one device"
        )
    if gradients is None:
        if plan.learns:
            raise UserError("learn trains how to grow and needs text: grow in a run, or give grow.py --data")
        return lambda: torch.zeros(())  # never asked for
    return gradients


def _deepen(model: Llama, optimizer, plan: GrowthPlan, moments: Moments, seed: int, hooks: Hooks) -> tuple[int, int]:
    """Put the grown model's blocks in place. Returns the bytes allocated, and those copied on the device."""
    base, device, dtype = list(model.blocks), next(model.parameters()).device, next(model.parameters()).dtype
    blocks, source_of, moved = [], {}, Moved()
    for number, layer in enumerate(plan.layers):
        like = base[0 if layer.source is None else layer.source]
        if layer.rule == "kept":
            blocks.append(like)
            continue
        with torch.device("meta"):
            block = type(base[0])(plan.config)
        if dtype != torch.get_default_dtype():  # fake tensors, on which memory is planned, have no `to`
            block = block.to(dtype)
        block = hooks.prepare_block(block).to_empty(device=device)
        for (name, new), old in zip(block.named_parameters(), like.parameters(), strict=True):
            copied = _fill(new, old, layer, f"blocks.{number}.{name}", plan.config, seed, hooks.write)
            new.requires_grad_(old.requires_grad)
            source_of[new] = None if layer.source is None else old
            moved += (local_shard(new).nbytes, copied)
        block.train(like.training)
        blocks.append(block)
    model.blocks = nn.ModuleList(blocks)
    for block in model.blocks:
        block.scale = plan.config.branch_scale
    for group in optimizer.param_groups if optimizer is not None else ():
        if EPS_FOLLOWS_DEPTH in group:
            group["eps"] *= plan.config.branch_scale / model.config.branch_scale
    model.config = plan.config
    if optimizer is not None:
        copied = _grow_optimizer(optimizer, model, base[0], source_of, moments)
        moved += (copied, copied)
    return moved.allocated, moved.copied


@torch.no_grad()
def _fill(new: Tensor, old: Tensor, layer: Layer, name: str, config: LlamaConfig, seed: int, write) -> int:
    """Give a parameter of a new layer its first value. Returns the bytes copied from another one."""
    if layer.rule == "random":
        write(new, initial_value(name, new.shape, config, seed, new.device))
        return 0
    if layer.rule == "zeroed" and name.endswith(RESIDUAL_OUTPUTS):
        local_shard(new).zero_()
        return 0
    local_shard(new).copy_(local_shard(old))
    return local_shard(new).nbytes


@torch.no_grad()
def _follow_scale(model: Llama, optimizer, plan: GrowthPlan, base: LlamaConfig) -> None:
    """Where branches count for another share than in the base: a model that is to compute what it did writes as much less or
    more to the residual stream, and moments are multiplied as the gradients are that they tell of."""
    share = plan.config.branch_scale / base.branch_scale
    if share == 1:
        return
    for block, layer in zip(model.blocks, plan.layers, strict=True):
        for name, weight in block.named_parameters():
            writes = name.endswith(RESIDUAL_OUTPUTS)
            if plan.preserves and writes and layer.rule == "kept":
                local_shard(weight).div_(share)
            state = optimizer.state.get(weight, {}) if optimizer is not None and (writes or not plan.preserves) else {}
            for key, value in state.items():
                local_shard(value).mul_(share ** POWER[key])


def _settle_width(model: Llama, optimizer, receipt: Receipt, moments: Moments) -> None:
    """Make of the moments of all wide parameters, but those of new layers, what was asked for."""
    new_layers = tuple(f"blocks.{number}." for number in receipt.new_layers)
    wide = {name: p for name, p in model.named_parameters() if not name.startswith(new_layers)}
    maps = width.recorded(receipt.width, model.config, next(model.parameters()).device)
    width.settle_moments(optimizer, wide, maps, moments)


@torch.no_grad()
def _add_noise(model: Llama, base: LlamaConfig, noise: float, seed: int, write) -> None:
    """Mix into every matrix what the paper initialises with, W ← (1 − α)·W + α·ε (arXiv 2405.15319, eq. 53-54).

    d and l in its formulas are those of the base.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        fresh = initial_value(f"noise:{name}", parameter.shape, base, seed, parameter.device)
        fresh.mul_((parameter.shape[1] / base.d_model) ** 0.5)  # a variance over d_model, whatever the fan-in
        if local_shard(parameter) is not parameter:
            full, fresh = fresh, torch.empty_like(parameter)
            write(fresh, full)
        local_shard(parameter).mul_(1 - noise).add_(local_shard(fresh), alpha=noise)


def _grow_optimizer(optimizer, model: Llama, pattern: nn.Module, source_of: dict, moments: Moments) -> int:
    """Put every new parameter into its source's group, in the model's order, and grow the state. Returns bytes copied.

    A random layer has no source: its parameters go where those of the block `pattern` are, and start without moments.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    group_of_name = {name: groups.get(parameter) for name, parameter in pattern.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = []
    copied = 0
    for name, parameter in model.named_parameters():
        source = source_of.get(parameter, parameter)
        group = group_of_name[name.split(".", 2)[2]] if source is None else groups.get(source)
        if group is None:
            continue  # frozen: the optimizer does not know it
        group["params"].append(parameter)
        if source is not None and source is not parameter and source in optimizer.state and moments.new != "zero":
            optimizer.state[parameter] = state = {}
            for key, value in optimizer.state[source].items():
                state[key] = torch.empty_like(value)
                local_shard(state[key]).copy_(local_shard(value)).mul_(moments.of_new(key))
                copied += local_shard(value).nbytes
    for parameter in [p for p in optimizer.state if p not in source_of]:
        if moments.old == "zero":
            del optimizer.state[parameter]  # as it was before the first update, which makes it anew
        elif moments.old == "scale":
            for key, value in optimizer.state[parameter].items():
                local_shard(value).mul_(moments.of_old(key))
    return copied


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
