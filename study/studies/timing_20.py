"""When to grow at 20 tokens per parameter, from bases of 1 and of 2 layers: after 5 to 80 % of the FLOPs.

arXiv 2511.04981 grows a base of 0 or 1 layer at about 80 % of the budget, just when the rate begins to decay, and claims to
save about 80 % of the FLOPs.
"""

from dataclasses import replace

from nanostack.config import Growth
from study.plan import CONTROLS, CPU, GPU, Arm, Jump, Study

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)


def at(share: float, n_layer: int) -> Arm:
    growth = Growth("stack", 8 // n_layer, moments_old="keep", moments_new="zero")
    layers = "1 layer" if n_layer == 1 else f"{n_layer} layers"
    return Arm(f"{layers} → 8 after {share:.0%}", n_layer, (Jump(share, growth, restart=False),), budgets=(1.0,))


study = Study(
    name="timing_20",
    question="When is it best to grow at 20 tokens per parameter, and from how many layers?",
    arms={
        **CONTROLS,
        "base1": Arm("1 layer, never grown", 1),
        **{f"{n_layer} at {share:.0%}": at(share, n_layer) for n_layer in (2, 1) for share in SHARES},
    },
    sizes={
        size: (replace(one, budgets=budgets, lrs=(2e-3, 4e-3, 8e-3), text="packages:constraints.txt"),)
        for size, one, budgets in (("cpu", CPU, (3e12, 9e12)), ("gpu", GPU, (1e14, 3e14)))
    },
)
