"""Do the savings of Muon and of growth add up? 20 tokens for each of the target's parameters, every rate tuned.

The recipe of growth is what serves AdamW: stack after a tenth of the FLOPs of the largest budget, old moments kept and zero for
new layers, no warm-up. The rate after growth is tuned; before it stands that of the base at the smallest budget.
"""

from dataclasses import replace

from study.plan import CPU, GPU, STACK, Arm, Jump, Study, controls

GROWTH = Jump(0.1, STACK, restart=False)

study = Study(
    name="muon",
    question="Does growth pay beside Muon, and do the two savings add up?",
    arms={
        **controls("muon"),
        "stacked": Arm("2 → 8 layers, Muon", 2, (GROWTH,), "muon"),
        "adamw": Arm("8 layers from scratch, AdamW", 8),
        "adamw base": Arm("2 layers, never grown, AdamW", 2),
        "adamw stacked": Arm("2 → 8 layers, AdamW", 2, (GROWTH,)),
        "into muon": Arm("2 layers by AdamW → 8 by Muon", 2, (replace(GROWTH, optim="muon"),)),
    },
    sizes={
        size: (replace(one, budgets=budgets, lrs=(2e-3, 4e-3, 8e-3), text="site-packages"),)
        for size, one, budgets in (("cpu", CPU, (4.5e12, 9e12)), ("gpu", GPU, (1.5e14, 3e14)))
    },
    means="""
With every seed it does, and the two savings add up; with three seeds the rule of this page decides it at 10 tokens per
parameter, where growth came after a fifth of the FLOPs, and not yet at 20, where it came after a tenth. At 20 tokens per
parameter the model that Muon grew ends 0.110 ± 0.124 nats below the one that Muon trained from scratch, by seed 0.053,
0.146 and 0.130, and below 4 and 2 layers never grown with every seed (0.137 ± 0.139 and 0.228 ± 0.087). At half of that
budget it is ahead of all three beyond the interval (0.108 ± 0.091, 0.078 ± 0.070 and 0.114 ± 0.076). Under AdamW it is the
same picture one step higher: 0.101 ± 0.130 below scratch, 0.191 ± 0.014 below 2 layers. The speedups over the same
optimizer's model from scratch are 51 ± 62 % (Muon) and 51 ± 74 % (AdamW), by the exact count 56 % each, in seconds 55 ± 65
% and 53 ± 76 %.

Muon from scratch is 0.071 ± 0.075 below AdamW from scratch, Muon grown 0.079 ± 0.067 below AdamW grown, and 0.181 ± 0.189
below AdamW from scratch. A base trained by AdamW and grown into Muon, which begins there without any momentum, ends where a
base trained by Muon does (0.007 ± 0.030 apart): what growth takes over is in the weights.

An earlier trial, with one seed, another text and another program, said the opposite: Muon from scratch ended at 2.390 and
the best stacked model at 2.452. There the grown arms were best at 2e-3 and got worse with the rate; here they are best at
4e-3 and 8e-3. Which of text, loop or luck makes the difference is not known.

The rate that the grown model liked is half of its base's (8e-3, then 4e-3), at 10 tokens per parameter the same (8e-3). The
model from scratch took 2e-3 and 8e-3 there; at 20 its sweep has 4e-3 with one seed only, which was worse than both
neighbours.

What limits it: there is no model of 4 layers by AdamW; three seeds, of which the first is a lucky one for every model from
scratch (2.477 where the others have 2.506 and 2.525; under AdamW 2.517, 2.598 and 2.606). The rates lie on a grid of
factors of two, at which neighbours from 2e-3 on differ by up to 0.07 for the model from scratch. Newton–Schulz is in neither
count of FLOPs. At this width and batch it would add 14 % to those of 8 layers and 10 % to those of 2 (paper's count); of the
seconds it takes 16 and 12 % (the table of paces in the result file). On large models it is little.
""",
)
