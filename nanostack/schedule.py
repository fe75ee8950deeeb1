"""Learning rates, as functions of the tokens trained in a stage."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanostack.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """The rates of a stage. All lengths are in tokens.

    constant  warms up from 0, then stays at `lr`
    cosine    warms up, then falls from `lr` to `min_lr` along half a cosine over what is left of the stage
    wsd       warms up, stays at `lr`, then falls linearly to `min_lr` over the last `decay_tokens` (warm-up, stable, decay)
    """

    tokens: int
    lr: float = 0.0
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    min_lr: float = 0.0
    """Rate at the end of a cosine or WSD stage."""
    warmup_tokens: int = 0
    decay_tokens: int | None = None
    """WSD only: length of the final decay."""
    continues: bool = False
    """Go on along the schedule of the stage before: its lr, min_lr, warm-up and decay, over the tokens of both."""
    rewarm_tokens: int = 0
    """After a growth: rate up from 0 to rewarm_peak times the schedule's over so many tokens, and over as many down to it."""
    rewarm_peak: float = 1.3
    rewarm: Literal["new", "all"] = "new"
    """The layers whose rate it is: those that growth made, or all."""

    def __post_init__(self):
        if self.rewarm_tokens < 0 or self.rewarm_peak <= 0:
            raise UserError("rewarm_tokens ≥ 0 and rewarm_peak > 0 belong to a stage that grows")
        if self.continues:
            if self.tokens <= 0 or self.lr or self.min_lr or self.warmup_tokens or self.decay_tokens is not None:
                raise UserError("a stage that continues has tokens > 0, and the lr, warm-up and decay of the stage before")
            return
        if self.tokens <= 0 or self.warmup_tokens < 0 or self.warmup_tokens > self.tokens:
            raise UserError(f"a stage needs tokens > 0 and warmup_tokens within them, not {self.tokens}, {self.warmup_tokens}")
        if not (self.lr > 0 and 0 <= self.min_lr <= self.lr):
            raise UserError(f"a stage needs lr > 0 and min_lr between 0 and lr, not lr {self.lr}, min_lr {self.min_lr}")
        if (self.schedule == "wsd") != (self.decay_tokens is not None):
            raise UserError("decay_tokens belongs to schedule wsd, which needs it")
        if self.decay_tokens is not None and self.decay_tokens <= 0:
            raise UserError(f"decay_tokens must be positive, not {self.decay_tokens}")

    def rate(self, tokens: int) -> float:
        """Learning rate for the step that ends after `tokens` tokens."""
        if tokens < self.warmup_tokens:
            return self.lr * tokens / self.warmup_tokens
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            progress = (tokens - self.warmup_tokens) / max(1, self.tokens - self.warmup_tokens)
            return cosine(min(1.0, progress), self.lr, self.min_lr)
        left = max(0, self.tokens - tokens) / (self.decay_tokens or 1)
        return self.min_lr + (self.lr - self.min_lr) * min(1.0, left)


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine; `progress` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(stages: Sequence[Schedule], number: int, tokens: int) -> float:
    """Rate for the step that ends after `tokens` tokens of stage `number`. Stages that continue are one stretch with the one
    that they continue."""
    whole = scheduled(stages, number)
    while stages[number].continues:
        number -= 1
        tokens += stages[number].tokens
    return whole.rate(tokens)


def scheduled(stages: Sequence[Schedule], number: int) -> Schedule:
    """The stage whose schedule rules over stage `number`, with the tokens of all the stages that continue it."""
    first, last = number, number + 1
    while first and stages[first].continues:
        first -= 1
    while last < len(stages) and stages[last].continues:
        last += 1
    return dataclasses.replace(stages[first], tokens=sum(stage.tokens for stage in stages[first:last]))


def rewarming(stage: Schedule, tokens: int) -> float:
    """Factor on the rate of what the stage re-warms, after `tokens` of its tokens (arXiv 2602.02472)."""
    up = tokens / stage.rewarm_tokens if stage.rewarm_tokens else 2.0
    return stage.rewarm_peak * up if up <= 1 else stage.rewarm_peak + (1 - stage.rewarm_peak) * min(1.0, up - 1)
