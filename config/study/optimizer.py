"""What becomes of Adam's moments and of the learning rate? Nobody has published it for depth growth of language models."""

from dataclasses import replace

from bench.study import CPU, GPU, Arm, Jump, Study
from nanostack.config import Growth

MOMENTS = {
    "reset": {},
    "copy": {"optimizer": "copy"},
    "keep old, zero new": {"moments_old": "keep", "moments_new": "zero"},
    "keep old, halve new": {"moments_old": "keep", "moments_new": "scale", "moments_factor": 0.5},
}
RATES = {"restart": {}, "continue": {"restart": False}, "re-warm new": {"restart": False, "stage": {"rewarm_tokens": 122_880}}}


def grown(moments: str, rate: str) -> Arm:
    return Arm(f"{moments}; {rate}", 2, (Jump(0.2, Growth("stack", 4, **MOMENTS[moments]), **RATES[rate]),))


study = Study(
    name="optimizer",
    question="What should become of Adam's moments and of the learning rate?",
    arms={
        "scratch": Arm("8 layers from scratch", 8),
        "base": Arm("2 layers, never grown", 2),
        **{f"{moments}, {rate}": grown(moments, rate) for moments in MOMENTS for rate in RATES},
    },
    sizes={"cpu": replace(CPU, budgets=(5e12, 1e13)), "gpu": replace(GPU, budgets=(2e15, 4e15))},
)
