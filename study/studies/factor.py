"""By how much? 8 layers from 4, 2 and 1, in one jump or in two: old moments kept, zero for new layers, the rate goes on."""

from nanostack.config import Growth
from study.plan import CONTROLS, CPU, GPU, Arm, Jump, Study

AT = 0.1  # of the largest budget


def jump(at: float, g: int) -> Jump:
    return Jump(at, Growth("stack", g, moments_old="keep", moments_new="zero"), restart=False)


study = Study(
    name="factor",
    question="Which growth factor?",
    arms={
        **CONTROLS,
        "base1": Arm("1 layer, never grown", 1),
        "g2": Arm("4 → 8 layers", 4, (jump(AT, 2),)),
        "g4": Arm("2 → 8 layers", 2, (jump(AT, 4),)),
        "g8": Arm("1 → 8 layers", 1, (jump(AT, 8),)),
        "g2g2": Arm("2 → 4 → 8 layers", 2, (jump(AT / 2, 2), jump(AT, 2))),
    },
    sizes={"cpu": (CPU,), "gpu": (GPU,)},
    means="""
At the largest budget a factor of 4 is best: 2 → 8 layers ends below 4 → 8 (by 0.041 ± 0.039 nats, paired over seeds) and below
1 → 8 (by 0.050 ± 0.037), with every seed, but hardly beyond doubt for two comparisons; at half of that budget nothing is
decided between 2 → 8 and 1 → 8. Twice doubling instead, 2 → 4 → 8, gains nothing: 0.012 ± 0.015 nats behind, with every seed.
The paper says the same of its sizes: best between 2 and 4, and a base of one layer is too little. At the smallest budget the
order is that of the bases, the shallower the better (1 → 8 at 3.119, 4 → 8 at 3.229): there 8 layers are too many for the
FLOPs, however they are come by: `nanostack plan` keeps g = 4 in one jump. 2 → 8 layers, in one jump or two, is below all
bases that never grew at the largest budget, with every seed, though not beyond doubt below 4 layers; the other two are not. All
grew after a tenth of the largest budget's FLOPs, which suits 2 → 8 at that budget (the study of timing) and was not tuned for
the others: a base of one layer has seen more text by then, one of four less.
""",
)
