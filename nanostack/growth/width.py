"""Grow a model in width, parameter by parameter: more channels, whole heads, a wider MLP. The size of a head stays.

Every axis of a weight has a map, which says for each channel of the wide model which old one it is a copy of, if any. With
d old and D new channels, weights as (out, in) and norm gains μ:

    split    rows are copied, and what reads from copies is shared among them, evenly or α : 1 − α    G_direct→, Net2Net
    zero     [[W, A], [0, C]] with A and C as initialised: new channels are 0 until they learn; if    G_zero→
             d_ff grows alone, new neurons are as initialised and what reads them is 0
    random   all that is new as initialised, its outputs masked and ramped in from 0                  G_random→, MSG
    learn    B W Bᵀ with trained B, see learn.py                                                      G_learn→, LiGO

(arXiv 2405.15319, appendix A; 1511.05641; 2305.02869; 2303.00980.) All but learn compute what the narrow model did, split if
d_model grows by a whole factor: RMSNorm sees the same mean square then. zero and random make the mean square d/D of what it
was, so old gains are multiplied by √(d/D), and norm_eps by d/D. Norms of q and k, whose heads stay as wide, have no eps of
their own in transformers and take this one: a difference of eps / mean square. Biases go with the rows. Tied embeddings cannot
be shared out, so the gain of the final norm is, which stands before the head alone.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from nanostack.errors import UserError
from nanostack.growth.moments import Moments
from nanostack.model import Llama, LlamaConfig, RMSNorm, initial_value

OPERATORS = ("split", "zero", "random", "learn")
NEW, BORROWS = -1, -2  # a channel that is no copy; one of a query head that is no copy but attends to an old head's values
AXES: dict[str, tuple] = {  # which axes a weight has: (out, in); None is the vocabulary or a head, which stay as they are
    "head.weight": (None, "model"),
    "norm.weight": ("model",),
    "attn_norm.weight": ("model",),
    "attn.qkv.weight": ("qkv", "model"),
    "attn.out.weight": ("model", "heads"),
    "mlp_norm.weight": ("model",),
    "mlp.gate_up.weight": ("gate_up", "model"),
    "mlp.down.weight": ("model", "ff"),
    "attn.qkv.bias": ("qkv",),
    "attn.out.bias": ("model",),
    "mlp.gate_up.bias": ("gate_up",),
    "mlp.down.bias": ("model",),
    "attn.q_norm.weight": (None,),
    "attn.k_norm.weight": (None,),
    "embed.weight": ("model", None),  # a map from the vocabulary, stored as (in, out)
}


@dataclass(frozen=True)
class Width:
    """A growth in width. Sizes that are None follow d_model where that gives whole numbers."""

    op: str = "split"
    d_model: int | None = None
    n_kv_head: int | None = None
    d_ff: int | None = None
    alpha: float | None = None  # split: what the first of several copies carries, and of the rest the next; None: all the same

    def config(self, base: LlamaConfig) -> LlamaConfig:
        """The shape of the wide model. Raises `UserError` where there is none."""
        if self.op not in OPERATORS:
            raise UserError(f"there is no width operator {self.op!r}; there are {', '.join(OPERATORS)}")
        if self.alpha is not None and not (self.op == "split" and 0 < self.alpha < 1):
            raise UserError(f"alpha is a share between 0 and 1 and belongs to split, not {self.alpha} to {self.op}")
        d_model = base.d_model if self.d_model is None else self.d_model
        step = base.d_model // math.gcd(base.d_model, base.n_head)
        if d_model % step:
            near = [n * step for n in (d_model // step, d_model // step + 1)]
            raise UserError(
                f"d_model {d_model} is not a whole number of heads of {step} channels; near are {near[0]} and {near[1]}"
            )
        sizes: dict[str, Any] = {"d_model": d_model, "n_head": base.n_head * d_model // base.d_model}
        for name in ("n_kv_head", "d_ff"):
            old, given = getattr(base, name), getattr(self, name)
            if given is None and old * d_model % base.d_model:
                raise UserError(f"{name} {old} does not grow by {d_model}/{base.d_model} to a whole number: give {name}")
            sizes[name] = old * d_model // base.d_model if given is None else given
        for name, size in sizes.items():
            if size < getattr(base, name):
                raise UserError(f"growth makes nothing smaller: {name} from {getattr(base, name)} to {size}")
        if all(new == getattr(base, name) for name, new in sizes.items()):
            raise UserError("width is grown by d_model, n_kv_head or d_ff: give at least one that is larger than it is")
        eps = base.norm_eps if self.op in ("split", "learn") else base.norm_eps * base.d_model / d_model
        grown = replace(base, **sizes, norm_eps=eps)  # LlamaConfig checks that heads divide
        _heads(base, grown, copies=self.op == "split")
        return grown

    def preserves(self, base: LlamaConfig) -> bool:
        """Whether the wide model computes what the narrow one did."""
        return self.op in ("zero", "random") or (self.op == "split" and self.config(base).d_model % base.d_model == 0)


class Axis(NamedTuple):
    """One axis of the wide model, as tensors (new size,) on the model's device."""

    source: Tensor  # the old channel that each one copies; NEW, BORROWS: none
    first: Tensor  # whether it is the first to do so: the old channel itself
    share: Tensor  # where it is an input, the part of the old channel's weight that it carries


Maps: TypeAlias = dict[str | None, Axis]  # by the names in AXES; None, the vocabulary, is not in it


def axes(base: LlamaConfig, grown: LlamaConfig, width: Width, device: torch.device) -> Maps:
    """The maps of all axes from one shape to the other."""
    copies = width.op == "split"

    def sources(old: int, new: int) -> list[int]:
        return [i % old if copies or i < old else NEW for i in range(new)]

    def shifted(part: list[int], by: int) -> list[int]:
        return [i + by if i >= 0 else i for i in part]

    q, kv = _heads(base, grown, copies)
    ff = sources(base.d_ff, grown.d_ff)
    maps = {
        "model": (sources(base.d_model, grown.d_model), 1),
        "qkv": (q + shifted(kv, base.n_head) + shifted(kv, base.n_head + base.n_kv_head), base.head_dim),
        "heads": (q, base.head_dim),
        "gate_up": (ff + shifted(ff, base.d_ff), 1),
        "ff": (ff, 1),
    }
    return {name: _axis(source, each, width.alpha, device) for name, (source, each) in maps.items()}


def recorded(record: dict | None, config: LlamaConfig, device: torch.device) -> Maps:
    """The maps of the growth in width that a receipt tells of; none where it tells of none."""
    if record is None:
        return {}
    before, after = (replace(config, **record[name]) for name in ("from", "to"))
    return axes(before, after, Width(**{name: record[name] for name in vars(Width())}), device)


def new_parts(name: str, value: Tensor, maps: Maps) -> list[Tensor]:
    """The new rows and the new columns of a wide parameter, or of its gradient."""
    maps_of = ((dim, maps.get(axis)) for dim, axis in enumerate(stored_axes(name)))
    return [value.index_select(dim, (~axis.first).nonzero()[:, 0]) for dim, axis in maps_of if axis is not None]


def stored_axes(name: str) -> tuple[str | None, ...]:
    """The axes of a parameter in the order in which they are stored."""
    return AXES[kind(name)][::-1] if name == "embed.weight" else AXES[kind(name)]


def _heads(base: LlamaConfig, grown: LlamaConfig, copies: bool) -> tuple[list[int], list[int]]:
    """Old query head of each new one, and old key/value head of each new one: a query head stays with the keys it knows."""
    group, new_group = base.n_head // base.n_kv_head, grown.n_head // grown.n_kv_head
    kv = [i % base.n_kv_head if copies or i < base.n_kv_head else NEW for i in range(grown.n_kv_head)]
    met: Counter[int] = Counter()
    q: list[int] = []
    for source in kv:
        places = range(met[source], met[source] + new_group)
        met[source] += new_group
        if source == NEW:
            q += [NEW] * new_group
        else:
            q += [source * group + i % group if copies or i < group else BORROWS for i in places]
    lost = set(range(base.n_head)) - set(q)
    if lost:
        raise UserError(
            f"{grown.n_kv_head} key/value heads for {grown.n_head} leave no place for old query head {min(lost)} beside its "
            f"keys: choose an n_kv_head of at most {grown.n_head // group}"
        )
    return q, kv


def _axis(sources: list[int], each: int, alpha: float | None, device: torch.device) -> Axis:
    """The map of an axis whose units (heads, say) are `each` channels wide."""
    copies, met = Counter(sources), Counter[int]()
    first: list[bool] = []
    share: list[float] = []
    for source in sources:
        n, nth = copies[source], met[source]
        met[source] += 1
        first.append(source >= 0 and nth == 0)
        uneven = (1 - (alpha or 0)) ** nth * (alpha or 0 if nth < n - 1 else 1)  # α of what is left; the last one takes it all
        share.append(1 / n if alpha is None else uneven)
    units = torch.tensor(sources).repeat_interleave(each)
    channels = torch.where(units < 0, units, units * each + torch.arange(each).repeat(len(sources)))
    spread = (torch.tensor(values).repeat_interleave(each).to(device) for values in (first, share))
    return Axis(channels.to(device), *spread)


def kind(name: str) -> str:
    """`blocks.3.attn.qkv.weight` → `attn.qkv.weight`; the key of AXES."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


@torch.no_grad()
def widen(
    model: Llama,
    optimizer: torch.optim.Optimizer | None,
    width: Width,
    seed: int,
    learned: Callable[[str], Tensor] | None = None,
) -> tuple[int, int]:
    """Put the wide parameter in the place of each narrow one, in the model and in the optimizer; old ones are freed one by one.

    Moments are those of the source everywhere, 0 where there is none: `settle_moments` makes of them what was asked for.
    `learned(name)` is the value of a parameter for learn. Returns the bytes allocated, and those copied from old ones.
    """
    base, grown = model.config, width.config(model.config)
    maps = axes(base, grown, width, next(model.parameters()).device)
    groups = [group["params"] for group in optimizer.param_groups] if optimizer is not None else []
    places = {p: (group, i) for group in groups for i, p in enumerate(group)}
    allocated = copied = 0
    for name in [name for name, _ in model.named_parameters()]:
        old = model.get_parameter(name)
        value = learned(name) if learned is not None else _value(name, old.detach(), maps, width.op, grown, seed)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
        allocated, copied = allocated + new.nbytes, copied + (new if width.op == "split" else old).nbytes
        if optimizer is None or old not in places:
            continue
        group, i = places.pop(old)
        group[i] = new
        if state := optimizer.state.pop(old, {}):
            optimizer.state[new] = {key: _moment(name, value, maps) for key, value in state.items()}
            moved = sum(v.nbytes for v in optimizer.state[new].values())
            allocated, copied = allocated + moved, copied + moved
    if grown.tie_embeddings:
        model.head.weight = model.embed.weight  # type: ignore[assignment]
    model.embed.embedding_dim = grown.d_model
    for block in model.blocks:
        block.attn.heads = (grown.n_head, grown.n_kv_head, grown.n_kv_head)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = grown.norm_eps
    model.config = grown
    return allocated, copied


def _value(name: str, old: Tensor, maps: Maps, op: str, config: LlamaConfig, seed: int) -> Tensor:
    """The wide value of a parameter."""
    out, *into = (maps.get(axis) for axis in AXES[kind(name)])
    if op == "split":
        value = old
        for dim, axis in enumerate(maps.get(axis) for axis in stored_axes(name)):
            value = value if axis is None else value.index_select(dim, axis.source)
        reads = out if config.tie_embeddings and name == "norm.weight" else into[0] if into else None
        value = value.clone() if value is old else value
        return value if reads is None else value.mul_(reads.share)
    if not into:
        if out is None:  # a gain of heads
            return old.clone()
        value = initial_value(name, out.source.shape, config, seed, old.device).to(old.dtype)
        value[out.first] = _in_new_order(old, out, None) * (1.0 if name.endswith("bias") else (len(old) / len(value)) ** 0.5)
        return value
    reads_from, embedding = into[0], name == "embed.weight"
    if embedding:
        old = old.T
    rows, columns = (slice(None) if axis is None else axis.first for axis in (out, reads_from))
    shape = [old.shape[i] if axis is None else len(axis.source) for i, axis in enumerate((out, reads_from))]
    value = initial_value(name, torch.Size(shape[::-1] if embedding else shape), config, seed, old.device).to(old.dtype)
    wide = value.T if embedding else value
    if op == "zero":
        silent = not maps["model"].first.all()  # without new channels to listen to, new neurons would be 0 for good
        if out is not None and silent:
            wide[_pair(~out.first, columns)] = 0
        if reads_from is not None:
            wide[:, reads_from.source == BORROWS if silent else ~reads_from.first] = 0  # these inputs are not zero
    wide[_pair(rows, columns)] = _in_new_order(old, out, reads_from)
    return value


def _pair(rows: Tensor | slice, columns: Tensor | slice) -> tuple:
    """An index of these rows and these columns."""
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        return rows.nonzero(), columns.nonzero()[:, 0]
    return rows, columns


def _in_new_order(old: Tensor, out: Axis | None, into: Axis | None) -> Tensor:
    """The old weight with rows and columns in the order in which the wide one has them."""
    for dim, axis in enumerate((out, into)):
        if axis is not None:
            old = old.index_select(dim, axis.source[axis.first])
    return old


def _moment(name: str, old: Tensor, maps: Maps) -> Tensor:
    """The wide value of a moment: that of the source."""
    if old.ndim == 0:
        return old.clone()
    value = old
    for dim, axis in enumerate(maps.get(n) for n in stored_axes(name)):
        if axis is not None:
            value = value.index_select(dim, axis.source.clamp(min=0))
            value *= (axis.source >= 0).view([-1 if i == dim else 1 for i in range(old.ndim)])
    return value.clone() if value is old else value


@torch.no_grad()
def settle_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], maps: Maps, moments: Moments):
    """Multiply the moments of wide `parameters` by what becomes of old entries, and of copies.

    A tensor has one step count, which goes with its moments where all of them are zeroed, and stays elsewhere.
    """
    for name, parameter in parameters.items():
        was_there = torch.ones((), dtype=torch.bool, device=parameter.device)
        copies = False
        for dim, axis in enumerate(maps.get(n) for n in stored_axes(name)):
            if axis is not None:
                was_there = was_there & axis.first.view([-1 if i == dim else 1 for i in range(parameter.ndim)])
                copies = copies or bool(((axis.source >= 0) & ~axis.first).any())
        if moments.old == "zero" and (moments.new == "zero" or not copies):
            optimizer.state.pop(parameter, None)
            continue
        for key, value in optimizer.state.get(parameter, {}).items():
            if value.ndim:
                of_old, of_new = (torch.tensor(f, device=value.device) for f in (moments.of_old(key), moments.of_new(key)))
                value *= torch.where(was_there, of_old, of_new)
