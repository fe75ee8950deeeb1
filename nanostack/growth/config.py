"""The config of a growth, and the plan that follows from it for a model of a given shape."""

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from nanostack.errors import UserError
from nanostack.growth import depth
from nanostack.growth.depth import Layer
from nanostack.growth.moments import Moments
from nanostack.growth.width import OPERATORS as WIDTH_OPERATORS
from nanostack.growth.width import Width
from nanostack.model import LlamaConfig

if TYPE_CHECKING:
    DepthOperator: TypeAlias = str
    WidthOperator: TypeAlias = str
else:  # whoever adds an operator has it on the command line
    DepthOperator = Literal[*depth.OPERATORS]
    WidthOperator = Literal[*WIDTH_OPERATORS]


class GrowthPlan(NamedTuple):
    """The result of a growth, planned before anything is touched."""

    layers: list[Layer]
    config: LlamaConfig  # of the grown model
    op: str | None  # None: only its width grows
    preserves: bool  # whether the grown model computes what the base did, but for noise
    width: Width | None  # how its width grows
    moments: Moments  # what becomes of the optimizer's state

    @property
    def learns(self) -> bool:
        return "learn" in (self.op, self.width and self.width.op)

    def map(self) -> dict[str, Any]:
        """op, and for each layer its source and its rule; rc is their connection rate (arXiv 2405.15319)."""
        sources = [layer.source for layer in self.layers]
        rules = [layer.rule for layer in self.layers]
        return {"op": self.op, "layers": sources, "rules": rules, "rc": round(depth.connection_rate(sources), 6)}

    def suffix(self, base: LlamaConfig) -> str:
        """The end of a grown checkpoint's name: x4, d2048, x4-d2048, 9-layers, ..."""
        times, rest = divmod(self.config.n_layer, base.n_layer)
        said = [] if times == 1 and not rest else [f"{self.config.n_layer}-layers" if rest else f"x{times}"]
        said += [f"d{self.config.d_model}"] if self.config.d_model != base.d_model else []
        return "-".join(said) or f"kv{self.config.n_kv_head}-ff{self.config.d_ff}"


@dataclass(frozen=True)
class Growth:
    """How a model grows: first in width, then in depth. See nanostack/growth/__init__.py."""

    op: DepthOperator | None = None
    """How its depth grows. None: stack, or not at all where only its width does."""
    g: int | None = None
    """How many times deeper: stack, interleave, zero, random and learn, 4 where nothing is given; untie, as many times as the
    layers are run."""
    layers: str | None = None
    """Instead of g: which base layer each new layer copies, e.g. 0-1,2-5*5,4-5."""
    optimizer: Literal["reset", "copy"] = "reset"
    """The optimizer's moments and steps after growth: all zero (the paper), or copied with the layers."""
    k: int | None = None
    """Layers that middle repeats, solar drops at the seam, insert lets stand between two new ones."""
    moments_old: Literal["keep", "zero", "scale"] | None = None
    """Moments of the layers that were there; None: as `optimizer` says."""
    moments_new: Literal["copy", "zero", "scale"] | None = None
    """Moments of new layers: their source's, none, or their source's times moments_factor (squared for the second)."""
    moments_factor: float = 1.0
    residual: Literal["rescale", "keep"] = "rescale"
    """In a model with a residual_scale: divide it by the new depth (CompleteP), or let branches count for what they did."""
    noise: float = 0.0
    """Share of fresh noise mixed into every matrix; the paper finds 0.2 slightly better than 0."""
    ramp_tokens: int | None = None
    """Tokens over which what is random is ramped in; None: the warm-up of the stage, or a tenth of it."""
    width: WidthOperator | None = None
    """How its width grows, before its depth does; on one device, or by grow.py."""
    d_model: int | None = None
    """Width to grow to, by whole heads: d_head stays."""
    n_kv_head: int | None = None
    """Key/value heads of the wider model; None: more by the factor of d_model, as d_ff."""
    d_ff: int | None = None
    alpha: float | None = None
    """Share of the first of several copies after split, from 0 to 1; None: equal shares, and the copies then stay alike."""
    learn_steps: int = 100
    """Batches on which learn trains its map; they are no part of the stage's tokens, but of the run's."""

    def __post_init__(self):
        if isinstance(self.layers, list | tuple):  # as Python code has it
            object.__setattr__(self, "layers", ",".join(map(str, self.layers)))

    @property
    def makes_random(self) -> bool:
        """Whether anything is made at random, which is to be ramped in."""
        return "random" in (self.op, self.width)

    def moments(self) -> Moments:
        old, new = ("keep", "copy") if self.optimizer == "copy" else ("zero", "zero")
        return Moments(self.moments_old or old, self.moments_new or new, self.moments_factor)

    def wider(self) -> Width | None:
        """The growth in width, if any. UserError for sizes without an operator."""
        given: dict[str, Any] = {name: getattr(self, name) for name in ("d_model", "n_kv_head", "d_ff", "alpha")}
        if self.width is not None:
            return Width(self.width, **given)
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name} belongs to a growth in width: say how (width {', '.join(WIDTH_OPERATORS)})")
        return None

    def learning_steps(self) -> int:
        """Batches that the growth takes for itself."""
        return self.learn_steps * (self.width, self.op).count("learn")

    def plan(self, base: LlamaConfig) -> GrowthPlan:
        """The plan for a model of shape `base`. UserError where there is no such growth."""
        return _plan(self, base)


@functools.lru_cache(maxsize=64)  # asked for by whoever needs to know beforehand: the config, the state, grow itself
def _plan(how: Growth, base: LlamaConfig) -> GrowthPlan:
    width = how.wider()
    wide = base if width is None else width.config(base)
    only_wider = width is not None and how.op is None and how.g is None and how.layers is None and how.k is None
    op = how.op if how.op is not None or only_wider else "stack"
    if op is None:
        layers = [Layer(i, "kept") for i in range(base.n_layer)]
    else:
        layers = depth.plan(base.n_layer, op, how.g, how.layers, how.k, base.loops)
    kept = [layer.source for layer in layers if layer.rule == "kept" and layer.source is not None]
    same = kept == sorted(kept) and all(layer.rule in ("kept", "zeroed", "random") for layer in layers)
    preserves = (same or op == "untie") and (width is None or width.preserves(base))
    loops = base.loops * base.n_layer // len(layers) if op == "untie" else base.loops
    grown = replace(wide, n_layer=len(layers), loops=loops)
    if how.residual == "keep" and grown.residual_scale is not None:
        grown = replace(grown, residual_scale=grown.residual_scale * grown.depth / base.depth)
    plan = GrowthPlan(layers, grown, op, preserves, width, how.moments())
    _check(how, plan)
    return plan


def _check(how: Growth, plan: GrowthPlan) -> None:
    """Raise `UserError` for options that cannot be together, whatever the model."""
    plan.moments.check()
    if how.residual not in ("rescale", "keep"):
        raise UserError(f"residual is rescale or keep, not {how.residual!r}")
    if how.residual == "keep" and plan.config.residual_scale is None:
        raise UserError("residual keep is for a model with a residual_scale, and this one has none")
    if not 0 <= how.noise < 1:
        raise UserError(f"noise is a share of the weights, from 0 up to 1, not {how.noise}")
    if plan.learns:
        settled = plan.moments.settled()
        if (settled.old, settled.new) != ("zero", "zero"):
            raise UserError("learn mixes weights, after which moments mean nothing: reset them (optimizer reset)")
        if how.learn_steps < 1:
            raise UserError(f"learn needs at least 1 step, not {how.learn_steps}")
    if how.moments_factor != 1 and "scale" not in (how.moments_old, how.moments_new):
        raise UserError(f"moments_factor {how.moments_factor} is for moments that are scaled, and none are")
    if how.ramp_tokens is not None and (how.ramp_tokens < 1 or not how.makes_random):
        raise UserError(f"ramp_tokens {how.ramp_tokens} must be at least 1, and be for random layers or channels")
