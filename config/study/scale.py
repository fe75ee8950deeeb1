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
It grows. In the mean the speedup is nothing that three seeds show at 0.13M parameters, 25 % at 0.27M and 52 % at 0.47M; the
lead over the target at its largest budget is 0.014 ± 0.082, 0.082 ± 0.102 and 0.131 ± 0.165 nats. At 0.47M the single seeds
stand at 17, 62 and 76 %: two are beyond the paper's 54.6 %, and the interval (± 78 %) holds zero, because the target's own
seeds end 0.11 nats apart; those of the grown model within 0.010.

What is decided there: growth beats both bases that never grew. At 9e12 FLOPs it ends 0.131 ± 0.064 nats below 4 layers never
grown and 0.175 ± 0.037 below 2 layers, with every seed; at half of that 0.039 ± 0.023 below 4 layers; at a quarter 2 layers are
the better buy by 0.070 ± 0.050. So at this size growth pays from 4.5e12 FLOPs on. At the smaller sizes it does not get there
within their budgets. No rate and seed of any other arm comes within 0.05 nats of what all three seeds of the grown model reach
at 9e12 FLOPs.

What limits it: the target's seeds, as above (with ten seeds and the same spread the interval at 0.47M would be ± 22 %, an
estimate); that 8 layers are the right size at all only where these budgets end, where the target first catches up with the
bases; and the text: 2 layers never grown read it twice at 9e12 FLOPs, 4 layers 1.2 times, the others less than once, which may
cost the bases a little. The exponents say the same as the table: the grown model's curve is the steepest of the four, through
three points each, of three different targets.
""",
)
