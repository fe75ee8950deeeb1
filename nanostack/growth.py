"""Grow a model in place, on the device it is on: first in width, then in depth, its optimizer with it.

A growth is a map and a rule for what is new: nanostack/depth.py has those of layers, nanostack/width.py those of channels and
heads, nanostack/learn.py trains them, nanostack/moments.py says what becomes of the optimizer's state. In depth, the first
occurrence of a base layer *is* that layer: it keeps its storage. Every other layer is allocated once and filled on the device.
Nothing passes through the host and, sharded, no collective runs: each rank fills its own shards. Width needs new storage for
every parameter, one at a time.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanostack import learn, width
from nanostack.depth import TAKES_G, Layer, connection_rate, plan
from nanostack.errors import UserError
from nanostack.learn import local
from nanostack.model import LlamaConfig, initial_value
from nanostack.moments import POWER, RESET, Moments
from nanostack.width import Width

OUTPUTS = ("attn.out.weight", "mlp.down.weight")  # what writes to the residual stream


class Shape(NamedTuple):
    """What a growth makes of a model."""

    layers: list[Layer]
    config: LlamaConfig
    op: str | None  # None: only its width grows
    preserves: bool  # whether the grown model computes what the base did, but for noise


def shape(
    base: LlamaConfig,
    op: str | None = None,
    g: int | None = None,
    layers: str | list[int] | None = None,
    k: int | None = None,
    wider: Width | None = None,
) -> Shape:
    """The shape that a growth gives to a model of shape `base`. Raises `UserError` where there is no such growth."""
    wide = base if wider is None else wider.config(base)
    only_wider = wider is not None and op is None and g is None and layers is None and k is None
    op = op if op is not None or only_wider else "stack"
    grown = [Layer(i, "kept") for i in range(base.n_layer)] if op is None else plan(base.n_layer, op, g, layers, k)
    kept = [layer.source for layer in grown if layer.rule == "kept"]
    same = kept == sorted(kept) and all(layer.rule in ("kept", "zeroed", "random") for layer in grown)
    return Shape(grown, replace(wide, n_layer=len(grown)), op, same and (wider is None or wider.preserves(base)))


def grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    op: str | None = None,
    g: int | None = None,
    layers: str | list[int] | None = None,
    k: int | None = None,
    wider: Width | None = None,
    moments: Moments = RESET,
    noise: float = 0.0,
    seed: int = 0,
    gradients: Callable[[], Tensor] | None = None,
    learn_steps: int = 100,
    prepare_block: Callable[[nn.Module], nn.Module] = lambda block: block,
    rejoin: Callable[[nn.Module], object] = lambda model: None,
    write: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    sum_shards: Callable[[Tensor], object] = lambda value: None,
) -> dict:
    """Grow the model in place, in width and then in depth, and `optimizer` with it.

    op, g, layers, k  the map of layers, see `plan`; op None is stack, or no growth in depth where only `wider` is given
    wider             the growth in width, if any; not of a sharded model
    optimizer         its state must be tensors, as that of torch's optimizers is; frozen parameters need not be in it
    moments           what becomes of its state, see `Moments`
    noise             α of W ← (1 − α)·W + α·ε for every matrix of the grown model, ε as it was initialised
                      (arXiv 2405.15319, eq. 53-54); 0.2 is the paper's, more is worse
    seed              of noise and of what is random, which depend on nothing else
    gradients         learn needs it: puts the gradients of the next batch into the model's parameters, returns the loss
    prepare_block     is given each new block, still without storage, and returns it as the model's own blocks are
                      (checkpointed, compiled, sharded)
    rejoin            is given the model when it has its new blocks: FSDP2 has to find its root again
    write             `write(parameter, value)` puts a whole value into a parameter; a sharded model passes its own
    sum_shards        adds up a value over the ranks that hold parts of the same weight

    What is random is ramped in: `set_ramp(model, 0)` holds, until the caller raises it to 1. Returns the receipt: op, g, k,
    layers, rules, rc, width, learned, moments, noise, bytes_allocated, bytes_copied_on_device, bytes_through_host, seconds;
    sizes are those on this rank. Losses before and after are the caller's to add. Raises `UserError` before anything is
    touched, and where learning diverges.
    """
    base, device, asked, moments = model.config, next(model.parameters()).device, moments, moments.settled()
    grown = shape(base, op, g, layers, k, wider)
    check(grown, wider, moments, noise, learn_steps)
    _check_state(model, optimizer, grown, wider, gradients)
    receipt = {
        "op": grown.op if layers is None or grown.op != "stack" else "layers",
        "g": len(grown.layers) // base.n_layer if layers is None and grown.op in TAKES_G else None,
        "k": k,
        "layers": [layer.source for layer in grown.layers],
        "rules": [layer.rule for layer in grown.layers],
        "rc": round(connection_rate([layer.source for layer in grown.layers]), 6),
        "width": None if wider is None else vars(wider) | {"from": _sizes(base), "to": _sizes(grown.config)},
        "moments": None if optimizer is None else asked._asdict(),
        "noise": noise,
    }
    _wait_for(device)
    started = time.perf_counter()
    allocated = copied = 0
    learned = []
    if optimizer is not None and (moments.old, moments.new) == ("zero", "zero"):
        optimizer.state.clear()  # before anything is allocated: that may go where the moments were
    if wider is not None:
        mixed = None
        if wider.op == "learn":
            wide = wider.config(base)
            mixed = learn.WidthMap(model, wide, width.axes(base, wide, wider, device), seed)
        allocated, copied = width.widen(model, optimizer, wider, seed, mixed)
        if mixed is not None:
            learned.append(learn.train(model, mixed, gradients, learn_steps))
    if grown.op is not None:
        old = moments.old if wider is None else "keep"  # wide moments are settled below
        more = _deepen(model, optimizer, grown, moments._replace(old=old), seed, prepare_block, write)
        allocated, copied = allocated + more[0], copied + more[1]
        rejoin(model)
    if wider is not None and optimizer is not None:
        new_layers = tuple(f"blocks.{i}." for i, layer in enumerate(grown.layers) if layer.rule != "kept")
        wide_ones = {name: p for name, p in model.named_parameters() if not name.startswith(new_layers)}
        width.settle_moments(optimizer, wide_ones, width.recorded(receipt["width"], grown.config, device), moments)
    if ramps(receipt):
        attach_ramp(model, receipt)
    if grown.op == "learn":
        learned.append(learn.train(model, learn.DepthMap(model, base.n_layer, write), gradients, learn_steps, sum_shards))
    if noise:
        _add_noise(model, base, noise, seed, write)
    _wait_for(device)
    return receipt | {
        "learned": learned or None,
        "bytes_allocated": allocated,
        "bytes_copied_on_device": copied,
        "bytes_through_host": 0,
        "seconds": round(time.perf_counter() - started, 6),
    }


def check(grown: Shape, wider: Width | None, moments: Moments, noise: float, learn_steps: int) -> None:
    """Raise `UserError` for options that cannot be together, whatever the model."""
    moments.check()
    if not 0 <= noise < 1:
        raise UserError(f"noise is a share of the weights, from 0 up to 1, not {noise}")
    if grown.op == "learn" or (wider is not None and wider.op == "learn"):
        settled = moments.settled()
        if (settled.old, settled.new) != ("zero", "zero"):
            raise UserError("a learned growth mixes weights, and their moments with it no more mean anything: reset them")
        if learn_steps < 1:
            raise UserError(f"learn needs at least 1 step, not {learn_steps}")


def _check_state(model, optimizer, grown: Shape, wider: Width | None, gradients) -> None:
    """Raise `UserError` for a model or an optimizer that cannot grow like this."""
    if getattr(model, "ramp", None) is not None:
        raise UserError("what the last growth made is still being ramped in: grow again when it counts in full")
    unknown = {name for state in optimizer.state.values() for name in state} - set(POWER) if optimizer is not None else set()
    if unknown:
        raise UserError(f"what to do with the optimizer's {', '.join(sorted(unknown))} is not known: see nanostack/moments.py")
    if wider is not None and any(hasattr(p, "to_local") for p in model.parameters()):
        raise UserError("a sharded model does not grow in width: grow its checkpoint with grow.py, or train on one device")
    if gradients is None and (grown.op == "learn" or (wider is not None and wider.op == "learn")):
        raise UserError("learn trains how to grow and needs text: grow in a run, or give grow.py --data")


def _sizes(config: LlamaConfig) -> dict:
    return {name: getattr(config, name) for name in ("d_model", "n_head", "n_kv_head", "d_ff")}


def _deepen(model, optimizer, grown: Shape, moments: Moments, seed: int, prepare_block, write) -> tuple[int, int]:
    """Put the grown model's blocks in place. Returns the bytes allocated, and those copied on the device."""
    base, device, dtype = list(model.blocks), next(model.parameters()).device, next(model.parameters()).dtype
    blocks, source_of, allocated, copied = [], {}, 0, 0
    for number, layer in enumerate(grown.layers):
        if layer.rule == "kept":
            blocks.append(base[layer.source])
            continue
        with torch.device("meta"):
            block = type(base[0])(grown.config).to(dtype)
        block = prepare_block(block).to_empty(device=device)
        like = base[0 if layer.source is None else layer.source]
        for (name, new), old in zip(block.named_parameters(), like.parameters(), strict=True):
            copied += _fill(new, old, layer, f"blocks.{number}.{name}", grown.config, seed, write)
            new.requires_grad_(old.requires_grad)
            source_of[new] = None if layer.source is None else old
            allocated += local(new).nbytes
        block.train(like.training)
        blocks.append(block)
    model.blocks = nn.ModuleList(blocks)
    model.config = grown.config
    moved = 0 if optimizer is None else _grow_optimizer(optimizer, model, base[0], source_of, moments)
    return allocated + moved, copied + moved


@torch.no_grad()
def _fill(new: Tensor, old: Tensor, layer: Layer, name: str, config: LlamaConfig, seed: int, write) -> int:
    """First value of a parameter of a new layer. Returns the bytes copied from another one."""
    if layer.rule == "random":
        write(new, initial_value(name, new.shape, config, seed, new.device))
        return 0
    if layer.rule == "zeroed" and name.endswith(OUTPUTS):
        local(new).zero_()
        return 0
    local(new).copy_(local(old))
    return local(new).nbytes


@torch.no_grad()
def _add_noise(model: nn.Module, base: LlamaConfig, noise: float, seed: int, write) -> None:
    """Mix into every matrix what the paper initialises with; d and l in its formulas are those of the base."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        fresh = initial_value(f"noise:{name}", parameter.shape, base, seed, parameter.device)
        fresh.mul_((parameter.shape[1] / base.d_model) ** 0.5)  # a variance over d_model, whatever the fan-in
        if local(parameter) is not parameter:
            whole, fresh = fresh, torch.empty_like(parameter)
            write(fresh, whole)
        local(parameter).mul_(1 - noise).add_(local(fresh), alpha=noise)


def _grow_optimizer(optimizer, model: nn.Module, pattern: nn.Module, source_of: dict, moments: Moments) -> int:
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
                local(state[key]).copy_(local(value)).mul_(moments.of_new(key))
                copied += local(value).nbytes
    for parameter in [p for p in optimizer.state if p not in source_of]:
        if moments.old == "zero":
            del optimizer.state[parameter]  # as it was before the first update, which makes it anew
        elif moments.old == "scale":
            for key, value in optimizer.state[parameter].items():
                local(value).mul_(moments.of_old(key))
    return copied


def ramps(receipt: dict) -> bool:
    """Whether a growth makes anything random, which is to be ramped in."""
    return "random" in receipt.get("rules", ()) or (receipt.get("width") or {}).get("op") == "random"


def ramp_left(receipts: list[dict], tokens: int) -> int:
    """Tokens that the ramp of the last growth still has to go, `tokens` into the run; 1 where its length is not decided."""
    if not receipts or not ramps(receipts[-1]):
        return 0
    length = receipts[-1]["ramp_tokens"]
    return 1 if length is None else max(0, length - (tokens - receipts[-1]["tokens"]))


def attach_ramp(model: nn.Module, receipt: dict, scale: float = 0.0) -> None:
    """Multiply what a growth made at random by `model.ramp`, a number on the device that `set_ramp` changes: both residual
    branches of new layers, and the new outputs of the embedding and of every linear layer but the head.

    Hooks, not new modules or parameters: names, shards and checkpoints are those of a model without them.
    """
    device = next(model.parameters()).device
    model.ramp = torch.full((), scale, device=device)
    new = [block for block, rule in zip(model.blocks, receipt["rules"], strict=True) if rule == "random"]
    scaled = [(branch, None) for block in new for branch in (block.attn, block.mlp)]
    inputs_scaled = []
    if receipt["width"] and receipt["width"]["op"] == "random":
        maps = width.recorded(receipt["width"], model.config, device)
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


def set_ramp(model: nn.Module, scale: float) -> None:
    """How much random layers count, from 0 to 1. At 1 the hooks go, and the scale with them."""
    if getattr(model, "ramp", None) is None:
        return
    model.ramp.fill_(scale)
    if scale >= 1:
        for hook in model.ramp_hooks:
            hook.remove()
        model.ramp = model.ramp_hooks = None


def outcome(receipt: dict) -> str:
    """What a growth made, in a few words: stack to 8 layers; split in width to 8 layers × 256."""
    wide = receipt.get("width")
    size = f"{len(receipt['rules'])} layers" + (f" × {wide['to']['d_model']}" if wide else "")
    return " and ".join(filter(None, (receipt["op"], wide and f"{wide['op']} in width"))) + f" to {size}"


def describe(receipt: dict) -> str:
    """A receipt as one line."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in receipt.items() if v is not None}
    del shown["layers"], shown["rules"]
    size = f"{len(receipt['layers'])} layers"
    if wide := shown.pop("width", None):
        size += f" × {wide['to']['d_model']} (by {wide['op']}; {wide['to']['n_head']} heads, d_ff {wide['to']['d_ff']})"
    return f"grown to {size}: " + ", ".join(f"{name} {value}" for name, value in shown.items())


def caution(receipt: dict) -> str | None:
    """What someone who trains on should know of a growth."""
    wide = receipt["width"]
    more_channels = wide and any(wide["from"][name] != wide["to"][name] for name in ("d_model", "d_ff"))
    if more_channels and wide["op"] == "split" and wide["alpha"] in (None, 0.5) and not receipt["noise"]:
        return "copies of an even split get equal gradients and stay alike: give alpha (0.7, say) or noise"
    return None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
