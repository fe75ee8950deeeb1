"""The maps of growth in depth: the source of each layer of the deeper model.

The operators on a base of l layers, written as `layers` writes them (l = 4):

    stack       0-3*g               G_stack, "Stacking Your Transformers", arXiv 2405.15319
    interleave  0*g,1*g,2*g,3*g
    zero        as interleave; the copies' output projections are zero, so the model computes what it did
    random      0-3, then fresh layers whose residual branches are ramped in (MSG): it computes what it did at first
    middle      0,1-2*2,3           the k middle layers twice (MIDAS, arXiv 2409.19044), k = l/2 unless given
    solar       0-2,1-3             all but the last k, then all but the first k (SOLAR, arXiv 2312.15166), k = l/4
    insert      0-1,1,2-3,3         after every k layers a copy of the last with output zero (LLaMA-Pro, arXiv 2401.02415)
    learn       as stack; then the mixture that each layer is of base layers is trained (LiGO, arXiv 2303.00980)
    untie       0-3*g           of a model that runs its layers in loops: each pass gets its own, and it computes what it did
    layers      any list: `0-1,2-5*5,4-5` is what the G_stack paper writes 12-3456×5-56

Adding an operator takes one function in OPERATORS.
"""

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from nanostack.errors import UserError

_TERM = re.compile(r"(\d+)(?:-(\d+))?(?:\*(\d+))?")


class Layer(NamedTuple):
    """One layer of the grown model: the base layer it comes from (None: none), and what becomes of it."""

    source: int | None
    rule: str  # "kept", "copied", "zeroed" (a copy whose outputs are 0), "random" (as initialised) or "learned"


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
    return list(range(n_layer)) * _factor(g, k)


def _interleave(n_layer: int, g: int | None, k: int | None) -> list:
    g = _factor(g, k)
    return [layer for layer in range(n_layer) for _ in range(g)]


def _append(n_layer: int, g: int | None, k: int | None) -> list:
    return [*range(n_layer), *[None] * (n_layer * (_factor(g, k) - 1))]


def _middle(n_layer: int, g: int | None, k: int | None) -> list:
    k = _number_of_layers(n_layer, g, k, max(1, n_layer // 2), n_layer)
    first = (n_layer - k) // 2
    return [*range(first + k), *range(first, n_layer)]


def _solar(n_layer: int, g: int | None, k: int | None) -> list:
    k = _number_of_layers(n_layer, g, k, n_layer // 4, (n_layer - 1) // 2)
    return [*range(n_layer - k), *range(k, n_layer)]


def _insert(n_layer: int, g: int | None, k: int | None) -> list:
    k = _number_of_layers(n_layer, g, k, 1, n_layer)
    return [layer for i in range(n_layer) for layer in ([i, i] if (i + 1) % k == 0 else [i])]


def _factor(g: int | None, k: int | None) -> int:
    """g, where it is one."""
    if k is not None:
        raise UserError("k belongs to middle, solar and insert; this operator takes g")
    if isinstance(g, bool) or not isinstance(g, int) or g < 2:
        raise UserError(f"g must be a whole number of 2 or more, not {g!r}")
    if g > 1000:
        raise UserError(f"g is {g}: no model is made of a thousand times its layers")
    return g


def _number_of_layers(n_layer: int, g: int | None, k: int | None, default: int, most: int) -> int:
    if g is not None:
        raise UserError(
            "g belongs to stack, interleave, zero, random, learn and untie; this operator takes k, a number of layers"
        )
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
    "learn": (_repeat, "learned"),
    "untie": (_repeat, "copied"),
}
TAKES_G = ("stack", "interleave", "zero", "random", "learn", "untie")


def plan(
    n_layer: int,
    op: str = "stack",
    g: int | None = None,
    layers: str | list[int] | None = None,
    k: int | None = None,
    loops: int = 1,
) -> list[Layer]:
    """The map of a growth of a model of `n_layer` layers, run `loops` times. Raises `UserError` for a map that is none.

    g is the factor (4 where nothing is given; all loops for untie), k the number of layers that middle, solar and insert need.
    """
    if op not in OPERATORS:
        raise UserError(f"there is no growth operator {op!r}; there are {', '.join(OPERATORS)}")
    sources_of, rule = OPERATORS[op]
    if layers is not None:
        if g is not None or k is not None:
            given = "g" if g is not None else "k"
            raise UserError(f"{given} and layers exclude each other: {given} says how many, layers says exactly which")
        sources = _checked(parse_layers(layers) if isinstance(layers, str) else list(layers), n_layer)
        if rule in ("random", "learned") or op == "untie":
            raise UserError(f"{op} makes layers of its own and takes g; a layer list says what stack, zero and others copy")
    elif op == "untie":
        if loops == 1:
            raise UserError("untie gives the passes of a loop layers of their own, and this model runs its layers once")
        g = loops if g is None else g
        if g == 1:
            raise UserError(
                f"untie takes a g of 2 or more that divides the model's {loops} loops, not 1: that would change nothing"
            )
        if _factor(g, k) > loops or loops % g:
            raise UserError(f"untie takes a g that divides the model's {loops} loops, not {g}")
        sources = sources_of(n_layer, g, k)
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
    kept = sum(before is not None and after == before + 1 for before, after in itertools.pairwise(layers))
    return kept / (len(layers) - 1) if len(layers) > 1 else 1.0
