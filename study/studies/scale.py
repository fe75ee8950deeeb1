"""Does the gain grow or shrink with size? Three targets, budgets in proportion to the square of their parameters.

The recipe is what the other studies found best, or within 0.005 nats of it, at their largest budget: stack after a tenth of it,
old moments kept and zero for new layers, the rate goes on.
"""

from dataclasses import replace

from study.plan import CONTROLS, CPU, GPU, STACK, Arm, Jump, Size, Study


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
        "cpu": (
            wider(CPU, 32, 1, 88, 0.25),
            CPU,
            replace(wider(CPU, 64, 2, 176, 3.0), seeds=(0, 1, 2, 3)),  # the fourth when three had left it open
        ),
        "gpu": (wider(GPU, 64, 1, 176, 1 / 16), wider(GPU, 96, 2, 256, 1 / 3), GPU),
    },
    means="""
It grows. At 0.47M parameters and 9e12 FLOPs the grown model is 0.132 ± 0.034 nats below 4 layers never grown, 0.178 ± 0.022
below 2 layers and 0.147 ± 0.100 below the target from scratch, with every seed: growth pays there. The speedup over the target
is 57 ± 44 %, by seed 17, 62, 76 and 73 %: in the mean, and with three seeds of four, beyond the paper's 54.6 % (of 7B); the
interval says no more than that it is above zero. The fourth seed was added because three had left it at 52 ± 78 %.

At the smaller sizes growth does not get there within their budgets. At 0.27M it is 25 ± 36 % and not decided against 4 layers;
at 0.13M one seed of three does not reach the target's loss, and growth is 0.076 ± 0.075 nats behind 2 layers. Nor do smaller
budgets suffice at 0.47M: at half of the largest it is ahead of both bases, of 4 layers beyond the interval (0.033 ± 0.024), of
2 layers not (0.041 ± 0.045); at a quarter 2 layers are the better buy by 0.067 ± 0.027. Target and budget rise together here,
so which of the two it is that makes growth pay cannot be told apart.

6·N flatters the grown model a little, for it has spent more exact FLOPs than the bases: read on its curve where it has spent as
many as they at the end, it is 0.115 ± 0.032 below 4 layers and 0.126 ± 0.024 below 2. The speedup by the exact count is 61 ± 46
%, since the target spends more by it.

What limits it: the target's seeds end 0.12 nats apart, those of the grown model 0.02. The first seed of the target does most of
that, at the rate that was taken, 0.004; at 0.002, the next best, all seeds of the target end at 2.43 to 2.44, and the speedup
over that would be 59 ± 13 %. That is a rate chosen afterwards, and no result. The target sees 7 tokens for each of its
parameters at the largest budgets (the paper's 7B: 43), and has just about caught up with the bases there. Its warm-up is of the
same tokens at all sizes, and so 6.6, 3.3 and 1.9 % of its run. And the text: 2 layers never grown read it twice at 9e12 FLOPs,
4 layers 1.2 times, the others less than once, which may cost the bases a little. The laws go through three points each, of
three different targets.
""",
)
