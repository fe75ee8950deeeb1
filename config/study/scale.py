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
        "gpu": (GPU, wider(GPU, 256, 4, 704, 3.0), wider(GPU, 384, 6, 1024, 12.0)),
    },
)
