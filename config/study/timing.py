"""When to grow? 2 layers stacked to 8 after 2 to 30 % of the largest budget, at three budgets: curves of equal FLOPs."""

from bench.study import CONTROLS, CPU, GPU, Arm, Jump, Study
from nanostack.config import Growth

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3)

study = Study(
    name="timing",
    question="When is it best to grow?",
    arms={
        **CONTROLS,
        **{f"at {at:.0%}": Arm(f"2 → 8 layers at {at:.0%}", 2, (Jump(at, Growth("stack", 4)),)) for at in SHARES},
    },
    sizes={"cpu": (CPU,), "gpu": (GPU,)},
    means="""
Growing too early costs more than growing too late: after 2 to 5 % of the FLOPs the grown model is hardly better than one from
scratch, from 10 to 30 % the curve is flat, and its lowest point is near 20 %. `nanostack.plan` caps its advice at a fifth of
the tokens where the paper's formula breaks down, and the quickstart grows after 25 % of the FLOPs: both stay. The earliest
arms took the higher of the swept rates at the smallest budget, which may not be their best at the largest; the target from
scratch did too, and for it the study of scale found the same at every budget.
""",
)
