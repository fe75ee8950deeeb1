"""When to grow? 2 layers stacked to 8 after 2 to 30 % of the largest budget, at three budgets: curves of equal FLOPs."""

from nanostack.config import Growth
from study.plan import CONTROLS, CPU, GPU, Arm, Jump, Study

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
% of the larger (by single seeds 37 to 48 % and 14 to 19 %). The paper's formula falls with the budget too, from far above. At
the larger budget the curve is flat: from 10 to 30 % the losses are within 0.015 nats of each other, at 2 and 5 % they are 0.038
± 0.047 and 0.031 ± 0.056 above the lowest, with every seed. At the smaller one, of which these two arms grow at 4 and 10 %,
that is dear: 0.084 ± 0.074 and 0.091 ± 0.063. Every arm is below the target from scratch in the mean at the larger budget, none
beyond doubt. `nanostack plan` caps its advice at a fifth of the tokens, where the paper's formula breaks down. That is 8 % of
the FLOPs of this target, a little early by what is best here; the cap is ours, a caution for budgets of billions, and stays.

Two budgets of one size, and parabolas through three points each, say no more than that; the arms warm up again after growth, as
the paper's do. Against 4 layers never grown, the best base at the largest budget, growing at 20 % is 0.034 ± 0.049 nats ahead
there: whether growth pays is not decided at this size (it is at the next: the study of scale). An earlier run of this study
tuned rates at the smallest budget only, with the first seed, and found growing at 2 or 5 % hardly better than from scratch: at
the larger budgets these arms want half of that rate.
""",
)
