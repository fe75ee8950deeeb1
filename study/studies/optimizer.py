"""What becomes of Adam's moments and of the learning rate? Nobody has published it for depth growth of language models.

restart warms up from 0 again; continue goes on at a constant rate; re-warm new does too, but for the new layers, whose rate
comes up from 0. The rate after growth is tuned for every arm: where it is not its base's, it steps at growth.
"""

from dataclasses import replace

from nanostack.config import Growth
from study.plan import CONTROLS, CPU, GPU, Arm, Jump, Study

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
    means="""
It matters little. At the smaller budget it is decided: going on at the rate that there was beats warming up again for each of
the four ways to treat the moments and with every seed, by 0.010 to 0.020 nats in the mean; re-warming the new layers alone lies
between. At the larger budget it is ahead by 0.006 to 0.008 nats in the mean, with every seed for copy only: where the rate
restarts, a higher one is best (0.008; a tie for reset), which makes up for most. At the same rate, 0.004, it is ahead with
every seed there too. Beside `continue`, keeping the old moments with zero for the new layers is best, and copying them is
worst, 0.017 ± 0.012 nats apart at the smaller budget, 0.009 ± 0.011 at the larger; beside the others reset is as good. The
best of all (keep old, zero new; continue) ends 0.020 ± 0.008 and 0.011 ± 0.024 nats (paired over seeds) below the paper's way
(reset; restart).

`nanostack plan` writes the best of the twelve, which is ahead of the paper's way beyond the interval at the smaller budget
only: no warm-up after growth, `moments_old="keep", moments_new="zero"`. (Its rate steps down at growth, to the paper's of the
target; here it went on.) `grow(...)` had no warm-up by default before, and keeps that. `reset` stays its default for the
moments: beside `continue` it is 0.010 nats behind the best at the smaller budget and 0.003 at the larger, and needs nothing to
be kept. The presets of the paper's sizes warm up again and reset, as the paper did. All twelve reach the
target's loss at a speedup of 15 to 19 % in the mean, with intervals that hold zero, and none beats 2 layers never grown at
these budgets. An earlier run of this study chose rates with one seed: the target got an unlucky one, and the speedups stood at
26 to 30 %.
""",
)
