"""Do the savings of Muon and of growth add up? 20 tokens for each of the target's parameters, every rate tuned.

The recipe of growth is what serves AdamW: stack after a tenth of the FLOPs, old moments kept and zero for new layers, the rate
goes on.
"""

from dataclasses import replace

from nanostack.config import Growth
from study.plan import CPU, GPU, Arm, Jump, Study, controls

STACK = Jump(0.1, Growth("stack", 4, moments_old="keep", moments_new="zero"), restart=False)

study = Study(
    name="muon",
    question="Does growth pay beside Muon, and do the two savings add up?",
    arms={
        **controls("muon"),
        "stacked": Arm("2 → 8 layers, Muon", 2, (STACK,), "muon"),
        "adamw": Arm("8 layers from scratch, AdamW", 8),
        "adamw base": Arm("2 layers, never grown, AdamW", 2),
        "adamw stacked": Arm("2 → 8 layers, AdamW", 2, (STACK,)),
        "into muon": Arm("2 layers by AdamW → 8 by Muon", 2, (replace(STACK, optim="muon"),)),
    },
    sizes={
        size: (replace(one, budgets=budgets, lrs=(2e-3, 4e-3, 8e-3), text="site-packages"),)
        for size, one, budgets in (("cpu", CPU, (4.5e12, 9e12)), ("gpu", GPU, (1.5e14, 3e14)))
    },
)
