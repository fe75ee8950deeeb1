"""By how much? 8 layers from 4, 2 and 1, in one jump or in two: old moments kept, zero for new layers, the rate goes on."""

from bench.study import CONTROLS, CPU, GPU, Arm, Jump, Study
from nanostack.config import Growth

AT = 0.1  # of the largest budget


def jump(at: float, g: int) -> Jump:
    return Jump(at, Growth("stack", g, moments_old="keep", moments_new="zero"), restart=False)


study = Study(
    name="factor",
    question="Which growth factor?",
    arms={
        **CONTROLS,
        "base1": Arm("1 layer, never grown", 1),
        "base4": Arm("4 layers, never grown", 4),
        "g2": Arm("4 → 8 layers", 4, (jump(AT, 2),)),
        "g4": Arm("2 → 8 layers", 2, (jump(AT, 4),)),
        "g8": Arm("1 → 8 layers", 1, (jump(AT, 8),)),
        "g2g2": Arm("2 → 4 → 8 layers", 2, (jump(AT / 2, 2), jump(AT, 2))),
    },
    sizes={"cpu": (CPU,), "gpu": (GPU,)},
)
