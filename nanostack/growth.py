"""Grow a model in depth, in place: a map that says what each layer of the deep model is, applied to weights and optimizer.

The first occurrence of a base layer *is* that layer: it keeps its storage. Every other layer is allocated once and filled on
the device. Nothing passes through the host and, sharded, no collective runs: each rank fills its own shards. What the
operators make of a base of l layers, as `layers` would say it (l = 4):

    stack       0-3*g               G_stack, "Stacking Your Transformers", arXiv 2405.15319
    interleave  0*g,1*g,2*g,3*g
    zero        as interleave; the copies' output projections are zero, so the model computes what it did
    random      0-3, then fresh layers whose residual branches are ramped in (MSG): it computes what it did at first
    middle      0,1-2*2,3           the k middle layers twice (MIDAS, arXiv 2409.19044), k = l/2 unless given
    solar       0-2,1-3             all but the last k, then all but the first k (SOLAR, arXiv 2312.15166), k = l/4
    insert      0-1,1,2-3,3         after every k layers a copy of the last with output zero (LLaMA-Pro, arXiv 2401.02415)
    layers      any list: `0-1,2-5*5,4-5` is what the G_stack paper writes 12-3456×5-56

Adding an operator takes one function in OPERATORS.
"""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanostack.errors import UserError
from nanostack.model import LlamaConfig, initial_value

_TERM = re.compile(r"(\d+)(?:-(\d+))?(?:\*(\d+))?")
OUTPUTS = ("attn.out.weight", "mlp.down.weight")  # what writes to the residual stream


class Layer(NamedTuple):
    """One layer of the grown model: the base layer it comes from (None: none), and what becomes of it."""

    source: int | None
    rule: str  # "kept", "copied", "zeroed" (a copy whose outputs are 0) or "random" (as initialised)


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


def _repeat(n_layer: int, g: int | None, k: int | None) -> list:
    _factor(g, k)
    return list(range(n_layer)) * g


def _interleave(n_layer: int, g: int | None, k: int | None) -> list:
    _factor(g, k)
    return [layer for layer in range(n_layer) for _ in range(g)]


def _append(n_layer: int, g: int | None, k: int | None) -> list:
    _factor(g, k)
    return [*range(n_layer), *[None] * (n_layer * (g - 1))]


def _middle(n_layer: int, g: int | None, k: int | None) -> list:
    k = _width(n_layer, g, k, max(1, n_layer // 2), n_layer)
    first = (n_layer - k) // 2
    return [*range(first + k), *range(first, n_layer)]


def _solar(n_layer: int, g: int | None, k: int | None) -> list:
    k = _width(n_layer, g, k, n_layer // 4, (n_layer - 1) // 2)
    return [*range(n_layer - k), *range(k, n_layer)]


def _insert(n_layer: int, g: int | None, k: int | None) -> list:
    k = _width(n_layer, g, k, 1, n_layer)
    return [layer for i in range(n_layer) for layer in ([i, i] if (i + 1) % k == 0 else [i])]


def _factor(g: int | None, k: int | None) -> None:
    if k is not None:
        raise UserError("k belongs to middle, solar and insert; this operator takes g")
    if isinstance(g, bool) or not isinstance(g, int) or g < 2:
        raise UserError(f"g must be a whole number of 2 or more, not {g!r}")


def _width(n_layer: int, g: int | None, k: int | None, default: int, most: int) -> int:
    if g is not None:
        raise UserError("g belongs to stack, interleave, zero and random; this operator takes k, a number of layers")
    k = default if k is None else k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise UserError(f"k must be a whole number from 1 to {most} for a model of {n_layer} layers, not {k!r}")
    return k


OPERATORS: dict[str, tuple[Callable[[int, int | None, int | None], list], str]] = {  # sources, what becomes of a repeated one
    "stack": (_repeat, "copied"),
    "interleave": (_interleave, "copied"),
    "zero": (_interleave, "zeroed"),
    "random": (_append, "random"),
    "middle": (_middle, "copied"),
    "solar": (_solar, "copied"),
    "insert": (_insert, "zeroed"),
}
TAKES_G = ("stack", "interleave", "zero", "random")
PRESERVING = ("zero", "random", "insert")


def plan(
    n_layer: int, op: str = "stack", g: int | None = None, layers: str | list[int] | None = None, k: int | None = None
) -> list[Layer]:
    """The map of a growth of a model of `n_layer` layers. Raises `UserError` for a map that is none.

    g is the factor (4 where nothing is given), k the number of layers that middle, solar and insert need to know.
    """
    if op not in OPERATORS:
        raise UserError(f"there is no growth operator {op!r}; there are {', '.join(OPERATORS)}")
    sources_of, rule = OPERATORS[op]
    if layers is not None:
        if g is not None or k is not None:
            given = "g" if g is not None else "k"
            raise UserError(f"{given} and layers exclude each other: {given} says how many, layers says exactly which")
        sources = _checked(parse_layers(layers) if isinstance(layers, str) else list(layers), n_layer)
        rule = "copied" if rule == "random" else rule
    else:
        sources = sources_of(n_layer, 4 if g is None and k is None and op in TAKES_G else g, k)
    met: set[int] = set()
    grown = []
    for source in sources:
        grown.append(Layer(source, "random" if source is None else rule if source in met else "kept"))
        met.add(source)
    return grown


def _checked(layers: list[int], n_layer: int) -> list[int]:
    outside = sorted({i for i in layers if not 0 <= i < n_layer})
    if outside:
        raise UserError(f"the layer list names layer {outside[0]}, but the model has layers 0 to {n_layer - 1}")
    if len(layers) <= n_layer:
        raise UserError(f"the layer list has {len(layers)} layers and the model {n_layer} already: that is no growth")
    dropped = sorted(set(range(n_layer)) - set(layers))
    if dropped:
        raise UserError(f"the layer list leaves out layer {dropped[0]}: every trained layer must occur in it")
    return layers


def connection_rate(layers: list[int | None]) -> float:
    """Rc: share of adjacent pairs of the grown model that were adjacent in the base (arXiv 2405.15319)."""
    kept = sum(None not in (before, after) and after == before + 1 for before, after in itertools.pairwise(layers))
    return kept / (len(layers) - 1)


class Moments(NamedTuple):
    """What becomes of the optimizer's state: of old parameters keep, zero or scale; of new ones copy, zero or scale.

    scale multiplies a copied first moment by `factor` and a second one by its square. zero takes the step count along:
    a zeroed moment with an old step would make the first update up to 3 times too large.
    """

    old: str = "zero"
    new: str = "zero"
    factor: float = 1.0


RESET = Moments()
COPY = Moments("keep", "copy")
POWER = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}  # of the gradient, in an optimizer's state


def check_moments(moments: Moments) -> None:
    """Raise `UserError` unless the choices exist."""
    if moments.old not in ("keep", "zero", "scale") or moments.new not in ("copy", "zero", "scale"):
        raise UserError(f"moments are old keep|zero|scale and new copy|zero|scale, not {moments.old!r} and {moments.new!r}")
    if not moments.factor >= 0:
        raise UserError(f"moments are scaled by a factor of 0 or more, not {moments.factor}")


def grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    op: str = "stack",
    g: int | None = None,
    layers: str | list[int] | None = None,
    k: int | None = None,
    moments: Moments = RESET,
    noise: float = 0.0,
    seed: int = 0,
    prepare_block: Callable[[nn.Module], nn.Module] = lambda block: block,
    write: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> dict:
    """Grow `model.blocks` in place, and `optimizer` with it.

    op, g, layers, k  the map, see `plan`
    optimizer         its state must be tensors, as that of torch's optimizers is; frozen parameters need not be in it
    moments           what becomes of its state, see `Moments`
    noise             α of W ← (1 − α)·W + α·ε for every matrix of the grown model, ε as it was initialised
                      (arXiv 2405.15319, eq. 53-54); 0.2 is the paper's, more is worse
    seed              of noise and of random layers, which depend on nothing else
    prepare_block     is given each new block, still without storage, and returns it as the model's own blocks are
                      (checkpointed, compiled, sharded)
    write             `write(parameter, value)` puts a whole value into a parameter; a sharded model passes its own

    Random layers are ramped in: `set_ramp(model, 0)` holds, until the caller raises it to 1. Returns the receipt: op, g, k,
    layers, rules, rc, moments, noise, bytes_allocated, bytes_copied_on_device, bytes_through_host, seconds; sizes are those
    on this rank. Losses before and after are the caller's to add. Raises `UserError` before anything is touched.
    """
    grown = plan(len(model.blocks), op, g, layers, k)
    check_moments(moments)
    if getattr(model, "ramp", None) is not None:
        raise UserError("random layers are still being ramped in: grow again when they count in full")
    if not 0 <= noise < 1:
        raise UserError(f"noise is a share of the weights, from 0 up to 1, not {noise}")
    unknown = {name for state in optimizer.state.values() for name in state} - set(POWER) if optimizer is not None else set()
    if unknown:
        raise UserError(f"what to do with the optimizer's {', '.join(sorted(unknown))} is not known: see growth.POWER")
    device = next(model.parameters()).device
    _wait_for(device)
    started = time.perf_counter()
    base, base_config = list(model.blocks), model.config
    config = replace(base_config, n_layer=len(grown))
    blocks, source_of, allocated, copied = [], {}, 0, 0
    for number, layer in enumerate(grown):
        if layer.rule == "kept":
            blocks.append(base[layer.source])
            continue
        with torch.device("meta"):
            block = type(base[0])(config)
        block = prepare_block(block).to_empty(device=device)
        like = base[0 if layer.source is None else layer.source]
        for (name, new), old in zip(block.named_parameters(), like.parameters(), strict=True):
            copied += _fill(new, old, layer, f"blocks.{number}.{name}", config, seed, write)
            new.requires_grad_(old.requires_grad)
            source_of[new] = None if layer.source is None else old
            allocated += _nbytes(new)
        block.train(like.training)
        blocks.append(block)
    model.blocks = nn.ModuleList(blocks)
    model.config = config
    if noise:
        _add_noise(model, base_config, noise, seed, write)
    if optimizer is not None:
        moved = _grow_optimizer(optimizer, model, base[0], source_of, moments)
        allocated, copied = allocated + moved, copied + moved
    ramped = [number for number, layer in enumerate(grown) if layer.rule == "random"]
    if ramped:
        attach_ramp(model, ramped)
    _wait_for(device)
    return {
        "op": op if layers is None or op != "stack" else "layers",
        "g": len(grown) // len(base) if layers is None and op in TAKES_G else None,
        "k": k,
        "layers": [layer.source for layer in grown],
        "rules": [layer.rule for layer in grown],
        "rc": round(connection_rate([layer.source for layer in grown]), 6),
        "moments": moments._asdict() if optimizer is not None else None,
        "noise": noise,
        "bytes_allocated": allocated,
        "bytes_copied_on_device": copied,
        "bytes_through_host": 0,
        "seconds": round(time.perf_counter() - started, 6),
    }


@torch.no_grad()
def _fill(new: Tensor, old: Tensor, layer: Layer, name: str, config: LlamaConfig, seed: int, write) -> int:
    """First value of a parameter of a new layer. Returns the bytes copied from another one."""
    if layer.rule == "random":
        write(new, initial_value(name, new.shape, config, seed, new.device))
        return 0
    if layer.rule == "zeroed" and name.endswith(OUTPUTS):
        _local(new).zero_()
        return 0
    _local(new).copy_(_local(old))
    return _nbytes(new)


@torch.no_grad()
def _add_noise(model: nn.Module, base: LlamaConfig, noise: float, seed: int, write) -> None:
    """Mix into every matrix what the paper initialises with; d and l in its formulas are those of the base."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        fresh = torch.empty_like(parameter)
        initial = initial_value(f"noise:{name}", parameter.shape, base, seed, parameter.device)
        write(fresh, initial * (parameter.shape[1] / base.d_model) ** 0.5)  # a variance over d_model, whatever the fan-in
        _local(parameter).mul_(1 - noise).add_(_local(fresh), alpha=noise)


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
            factor = moments.factor if moments.new == "scale" else 1.0
            optimizer.state[parameter] = state = {}
            for key, value in optimizer.state[source].items():
                state[key] = torch.empty_like(value)
                _local(state[key]).copy_(_local(value)).mul_(factor ** POWER[key])
                copied += _nbytes(value)
    for parameter, state in optimizer.state.items():
        if parameter in source_of or moments.old == "keep":
            continue
        for key, value in state.items():
            _local(value).zero_() if moments.old == "zero" else _local(value).mul_(moments.factor ** POWER[key])
    return copied


def attach_ramp(model: nn.Module, blocks: list[int], scale: float = 0.0) -> None:
    """Multiply both residual branches of these blocks by `model.ramp`, a number on the device that `set_ramp` changes.

    Hooks, not new modules or parameters: names, shards and checkpoints are those of a model without them.
    """
    model.ramp = torch.full((), scale, device=next(model.parameters()).device)

    def scaled(module, arguments, output):
        return output * model.ramp.to(output.dtype)

    model.ramp_hooks = [
        branch.register_forward_hook(scaled) for i in blocks for branch in (model.blocks[i].attn, model.blocks[i].mlp)
    ]


def set_ramp(model: nn.Module, scale: float) -> None:
    """How much random layers count, from 0 to 1. At 1 the hooks go, and the scale with them."""
    if getattr(model, "ramp", None) is None:
        return
    model.ramp.fill_(scale)
    if scale >= 1:
        for hook in model.ramp_hooks:
            hook.remove()
        model.ramp = model.ramp_hooks = None


def describe(receipt: dict) -> str:
    """A receipt as one line."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in receipt.items() if v is not None}
    del shown["layers"], shown["rules"]
    return f"grown to {len(receipt['layers'])} layers: " + ", ".join(f"{name} {value}" for name, value in shown.items())


def _local(tensor: Tensor) -> Tensor:
    """What of the tensor is on this rank: a sharded tensor's own shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _nbytes(tensor: Tensor) -> int:
    return _local(tensor).nbytes


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
