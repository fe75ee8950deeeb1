"""Does the gain grow or shrink with size? Three targets, budgets in proportion to the square of their parameters.

The recipe is what the other studies found best: stack after a tenth of the largest budget, old moments kept and zero for new
layers, the rate goes on.
"""

from dataclasses import replace

from bench.study import CONTROLS, CPU, GPU, Arm, Jump, Size, Study
from nanostack.config import Growth

STACK = Growth("stack", 4, moments_old="keep", moments_new="zero")


def wider(size: Size, d_model: int, n_head: int, d_ff: int, more: float) -> Size:
    """The size with another target and `more` times the FLOPs."""
    model = replace(size.model, d_model=d_model, n_head=n_head, n_kv_head=n_head, d_ff=d_ff)
    return replace(size, model=model, budgets=tuple(more * budget for budget in size.budgets))


study = Study(
    name="scale",
    question="Does the gain grow or shrink with the size of the target?",
    arms={
        **CONTROLS,
        "grown": Arm("2 → 8 layers, stack", 2, (Jump(0.1, STACK, restart=False),)),
    },
    sizes={
        "cpu": (wider(CPU, 32, 1, 88, 0.25), CPU, wider(CPU, 64, 2, 176, 3.0)),
        "gpu": (wider(GPU, 64, 1, 176, 1 / 16), wider(GPU, 96, 2, 256, 1 / 3), GPU),
    },
    means="""
Not answered yet: two of three sizes have run. At 0.13M parameters growth saves nothing that can be seen: it ends 0.014 ± 0.082
nats below the target, and both bases that never grew are below it. At 0.27M the speedup at the target's loss is 25 ± 36 %; it
is below 2 layers never grown at the largest budget beyond doubt (0.075 ± 0.017 nats), below 4 layers with every seed but not
beyond doubt (0.034 ± 0.044), and at no smaller budget below either. The lead over the target is larger at 0.27M (0.082 ±
0.102), but both intervals hold zero.

No grown model on this page reaches the paper's 54.6 % against a target that was tuned and decayed. What limits it: the target
from scratch is tuned as well as the grown one; its seeds differ by up to 0.07 nats, as much as growth gains; and budgets at
which 8 layers are the right size at all begin where these end. In the last doubling of the budget at 0.27M the grown model
falls by 0.26 nats, as the target does, and the bases by 0.13 and 0.19: a larger budget should favour growth over the bases;
that it should over the target is not to be seen. The grown model's exponent above is the largest, but through two points L =
a·C^b fits anything. The third target, 0.47M parameters at 9e12 FLOPs, takes nearly two hours of two idle cores (an estimate
from the pace of the second).
""",
)
