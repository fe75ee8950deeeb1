"""Learning rates, as functions of the tokens trained in a stage."""

import math

from nanostack.config import Stage, scheduled


def learning_rate(stages: tuple[Stage, ...], number: int, tokens: int) -> float:
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
        return stage.min_lr + (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    left = max(0, stage.tokens - tokens) / stage.decay_tokens
    return stage.min_lr + (stage.lr - stage.min_lr) * min(1.0, left)


def rewarming(stage: Stage, tokens: int) -> float:
    """Factor on the rate of what the stage re-warms, after `tokens` of its tokens (arXiv 2602.02472)."""
    up = tokens / stage.rewarm_tokens if stage.rewarm_tokens else 2.0
    return stage.rewarm_peak * up if up <= 1 else stage.rewarm_peak + (1 - stage.rewarm_peak) * min(1.0, up - 1)
