"""Learning rates, as functions of the tokens trained in a stage."""

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanostack.config import Stage  # which imports this module


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine; `progress` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(stages: "tuple[Stage, ...]", number: int, tokens: int) -> float:
    """Rate for the step that ends after `tokens` tokens of stage `number`: linear warm-up from 0, then the schedule.

    constant  stays at `lr`
    cosine    falls from `lr` to `min_lr` along half a cosine over what is left of the stage
    wsd       stays at `lr`, then falls linearly to `min_lr` over the last `decay_tokens` (warm-up, stable, decay)

    Stages that continue are one stretch with the one they continue.
    """
    stage = scheduled(stages, number)
    while stages[number].continues:
        number -= 1
        tokens += stages[number].tokens
    if tokens < stage.warmup_tokens:
        return stage.lr * tokens / stage.warmup_tokens
    if stage.schedule == "constant":
        return stage.lr
    if stage.schedule == "cosine":
        progress = (tokens - stage.warmup_tokens) / max(1, stage.tokens - stage.warmup_tokens)
        return cosine(min(1.0, progress), stage.lr, stage.min_lr)
    left = max(0, stage.tokens - tokens) / stage.decay_tokens
    return stage.min_lr + (stage.lr - stage.min_lr) * min(1.0, left)


def rewarming(stage: "Stage", tokens: int) -> float:
    """Factor on the rate of what the stage re-warms, after `tokens` of its tokens (arXiv 2602.02472)."""
    up = tokens / stage.rewarm_tokens if stage.rewarm_tokens else 2.0
    return stage.rewarm_peak * up if up <= 1 else stage.rewarm_peak + (1 - stage.rewarm_peak) * min(1.0, up - 1)


def scheduled(stages: "tuple[Stage, ...]", number: int) -> "Stage":
    """The stage whose schedule rules over stage `number`, with the tokens of all the stages that continue it."""
    first, last = number, number + 1
    while first and stages[first].continues:
        first -= 1
    while last < len(stages) and stages[last].continues:
        last += 1
    return dataclasses.replace(stages[first], tokens=sum(stage.tokens for stage in stages[first:last]))
