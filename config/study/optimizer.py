"""What becomes of Adam's moments and of the learning rate? Nobody has published it for depth growth of language models.

restart warms up from 0 again; continue goes on at a constant rate; re-warm new does too, but for the new layers, whose rate
comes up from 0. The rate after growth is tuned for every arm: where it is not its base's, it steps at growth.
"""

from dataclasses import replace

from bench.study import CONTROLS, CPU, GPU, Arm, Jump, Study
from nanostack.config import Growth

MOMENTS = {
    "reset": {"optimizer": "reset"},
    "copy": {"optimizer": "copy"},
    "keep old, zero new": {"moments_old": "keep", "moments_new": "zero"},
    "keep old, halve new": {"moments_old": "keep", "moments_new": "scale", "moments_factor": 0.5},
}
RATES = {"restart": {}, "continue": {"restart": False}, "re-warm new": {"restart": False, "rewarm": True}}


def grown(moments: str, rate: str, at: float) -> Arm:
    return Arm(f"{moments}; {rate}", 2, (Jump(at, Growth("stack", 4, **MOMENTS[moments]), **RATES[rate]),))


study = Study(
    name="optimizer",
    question="What should become of Adam's moments and of the learning rate?",
    arms={
        **CONTROLS,
        **{f"{moments}, {rate}": grown(moments, rate, 0.2) for moments in MOMENTS for rate in RATES},
    },
    sizes={size: (replace(one, budgets=one.budgets[:-1]),) for size, one in (("cpu", CPU), ("gpu", GPU))},
)
