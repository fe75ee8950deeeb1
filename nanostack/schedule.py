"""The learning rate of a stage, as a function of the tokens trained in it."""

import math

from nanostack.config import Stage


def learning_rate(stage: Stage, tokens: int) -> float:
    """Rate for the step that ends after `tokens` tokens of the stage: linear warm-up from 0, then the stage's schedule.

    constant  stays at `lr`
    cosine    falls from `lr` to `min_lr` along half a cosine over what is left of the stage
    wsd       stays at `lr`, then falls linearly to `min_lr` over the last `decay_tokens` (warm-up, stable, decay)
    """
    if tokens < stage.warmup_tokens:
        return stage.lr * tokens / stage.warmup_tokens
    if stage.schedule == "constant":
        return stage.lr
    if stage.schedule == "cosine":
        progress = (tokens - stage.warmup_tokens) / max(1, stage.tokens - stage.warmup_tokens)
        return stage.min_lr + (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    left = max(0, stage.tokens - tokens) / stage.decay_tokens
    return stage.min_lr + (stage.lr - stage.min_lr) * min(1.0, left)
