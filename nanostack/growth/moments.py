"""The optimizer's state in a growth: a choice for old parameters, and one for new ones."""

import math
from typing import NamedTuple

from nanostack.errors import UserError


class Moments(NamedTuple):
    """The choices for the optimizer's state: keep, zero or scale for old parameters; copy, zero or scale for new ones.

    scale multiplies a copied first moment by `factor` and a second one by its square. zero takes the step count along:
    a zeroed moment with an old step would make the first update up to 3 times too large.
    """

    old: str = "zero"
    new: str = "zero"
    factor: float = 1.0

    def settled(self) -> "Moments":
        """The same choices, where scaling by 0 is zero."""
        if self.factor != 0:
            return self
        old, new = ("zero" if side == "scale" else side for side in (self.old, self.new))
        return Moments(old, new, self.factor)

    def of_old(self, key: str) -> float:
        """The factor on an old parameter's value of this name."""
        return {"keep": 1.0, "zero": 0.0, "scale": self.factor ** POWER[key]}[self.old]

    def of_new(self, key: str) -> float:
        """The factor on a new parameter's copy of it."""
        return {"copy": 1.0, "zero": 0.0, "scale": self.factor ** POWER[key]}[self.new]

    def check(self) -> None:
        """Raise `UserError` unless the choices exist."""
        if self.old not in ("keep", "zero", "scale") or self.new not in ("copy", "zero", "scale"):
            raise UserError(f"moments are old keep|zero|scale and new copy|zero|scale, not {self.old!r} and {self.new!r}")
        if not 0 <= self.factor < math.inf:
            raise UserError(f"moments are scaled by a factor of 0 or more, not {self.factor}")


RESET = Moments()
COPY = Moments("keep", "copy")
POWER = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}  # of the gradient; another optimizer adds its own
EPS_FOLLOWS_DEPTH = "eps_follows_depth"  # marks a group of parameters whose gradients are divided by the depth, and so is eps
