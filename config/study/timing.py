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
What is best is nearly the same base for both budgets, one of 0.7 to 1 million tokens, and so 42 % of the smaller budget and 15
% of the larger (by single seeds 34 to 48 % and 14 to 19 %): the base should be trained until it learns slowly, not for a share.
Growing too early costs more than growing too late: after 2 to 5 % of the larger budget the grown model is hardly better than
one from scratch, and from 10 to 30 % the losses are within 0.015 nats of each other. The earliest arms took a rate of 0.008,
the others 0.004; that is not what sets them apart: at 0.004 too, growing at 5 % is 0.11 nats behind growing at 10 % at the
smallest budget. `nanostack.plan` caps its advice at a fifth of the tokens, where the paper's formula breaks down. That is 8 %
of the FLOPs of this target, earlier than what is best here; the cap is the paper's caution for budgets of billions, and stays.
The quickstart grows after 25 % of the FLOPs, within the flat part.

Rates were tuned at the smallest budget of each arm with the first seed, by the older method that the study of operators tells
of; and 4 layers never grown, the best base at the largest budget, are not in this study. Against those of the studies of
operators and factor, with the same seeds, growing at 20 % is 0.034 ± 0.049 nats ahead there: the verdict above holds against 2
layers only, against 4 it is not decided at this size (it is at the next: the study of scale).
""",
)
