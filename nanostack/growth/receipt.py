"""The receipt of a growth: typed in memory, a plain dict in checkpoints and records."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nanostack.errors import UserError


@dataclass(eq=False)  # it equals the dict of the same values
class Receipt(Mapping[str, Any]):
    """A growth that was made. It answers `receipt["op"]` as it does `receipt.op`; sizes are in bytes, those on this rank."""

    op: str | None
    """How the depth grew; layers, where a list said so; None where it did not."""
    g: int | None
    k: int | None
    layers: list[int | None]
    """The base layer that each layer comes from; None where it comes from none."""
    rules: list[str]
    """The rule of each layer: kept, copied, zeroed, random or learned."""
    rc: float
    """Connection rate of the layers (arXiv 2405.15319)."""
    width: dict[str, Any] | None
    """How the width grew: the fields of Width, and the sizes `from` and `to`."""
    moments: dict[str, Any] | None
    noise: float
    residual: str | None = None
    """In a model with a residual_scale, whether it was rescaled or kept."""
    learned: list[dict[str, Any]] | None = None
    bytes_allocated: int = 0
    bytes_copied_on_device: int = 0
    bytes_through_host: int = 0
    seconds: float = 0.0
    ramp_tokens: int | None = 0
    """Tokens over which what is random is ramped in; None: the stage that follows decides it."""
    max_logit_change: float | None = None
    samples: int | None = None
    tokens: int = 0
    """Samples and tokens of the run before the growth."""
    loss_before: float | None = None
    loss_after: float | None = None
    """Validation losses, in nats per token."""
    dead: list[str] | None = field(default=None)
    """Parameters without a gradient in the second step after; None before that step."""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Receipt":
        """The receipt that a checkpoint keeps. UserError for one with what this version does not know."""
        known = {one.name for one in fields(cls)}
        if unknown := sorted(saved.keys() - known):
            raise UserError(f"a growth receipt has {', '.join(unknown)}, which this version does not know")
        try:
            return cls(**saved)
        except TypeError as error:
            raise UserError(f"a growth receipt is not whole: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints and records keep them; `dead` where it is known."""
        return {name: getattr(self, name) for name in self}

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        return [one.name for one in fields(self) if one.name != "dead" or self.dead is not None]

    @property
    def ramps(self) -> bool:
        """Whether the growth made anything at random, which is to be ramped in."""
        return "random" in self.rules or (self.width or {}).get("op") == "random"

    @property
    def new_layers(self) -> list[int]:
        """Numbers of the layers that the growth made."""
        return [number for number, rule in enumerate(self.rules) if rule != "kept"]

    def ramp_left(self, tokens: int) -> int:
        """Tokens that the ramp still has to go, `tokens` into the run; 1 where its length is not decided."""
        if not self.ramps:
            return 0
        return 1 if self.ramp_tokens is None else max(0, self.ramp_tokens - (tokens - self.tokens))

    def ramp_share(self, tokens: int) -> float:
        """How much what is random counts, `tokens` into the run; 0 where the length of the ramp is not decided."""
        return min(1.0, (tokens - self.tokens) / self.ramp_tokens) if self.ramp_tokens else 0.0

    def outcome(self) -> str:
        """The result in a few words: stack to 8 layers; split in width to 8 layers × 256."""
        size = f"{len(self.rules)} layers" + (f" × {self.width['to']['d_model']}" if self.width else "")
        ways = [self.op or "", f"{self.width['op']} in width" if self.width else ""]
        return " and ".join(filter(None, ways)) + f" to {size}"

    def __str__(self) -> str:
        """One line."""
        hidden = ("layers", "rules", "width")
        values = {name: value for name, value in self.items() if value is not None and name not in hidden}
        size = f"{len(self.layers)} layers"
        if wide := self.width:
            size += f" × {wide['to']['d_model']} (by {wide['op']}; {wide['to']['n_head']} heads, d_ff {wide['to']['d_ff']})"
        shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
        return f"grown to {size}: " + ", ".join(shown)

    def caution(self) -> str | None:
        """A warning for whoever trains on, if there is one."""
        wide = self.width
        more_channels = wide and any(wide["from"][name] != wide["to"][name] for name in ("d_model", "d_ff"))
        if wide and more_channels and wide["op"] == "split" and wide["alpha"] in (None, 0.5) and not self.noise:
            return "copies of an even split get equal gradients and stay alike: give alpha (0.7, say) or noise"
        return None


def ramp_left(receipts: list[dict] | list[Receipt], tokens: int) -> int:
    """Tokens that the ramp of the last growth of a checkpoint still has to go, `tokens` into the run."""
    return Receipt.of(receipts[-1]).ramp_left(tokens) if receipts else 0
