"""Which operator? The paper's figure 3 at our size: 2 layers to 8 by each, at the FLOPs of 8 layers from scratch.

`python bench/speedup.py config/study/operators.py --data data/stdlib512`; that is the standard library in bpe:512.
middle cannot make 8 layers of 2: it grows 4 layers to 6 and to 8, as MIDAS does in stages.
"""

from bench.study import CONTROLS, CPU, GPU, Arm, Jump, Study
from nanostack.config import Growth

AT = 0.1  # of the largest budget


def grown(op: str, **options) -> Arm:
    return Arm(f"2 → 8 layers, {op}", 2, (Jump(AT, Growth(op, 4, **options)),))


study = Study(
    name="operators",
    question="Which operator grows best in depth?",
    arms={
        **CONTROLS,
        "base4": Arm("4 layers, never grown", 4),
        "stack": grown("stack"),
        "interleave": grown("interleave"),
        "zero": grown("zero"),
        "random": grown("random"),
        "learn": grown("learn", learn_steps=50),
        "middle": Arm("4 → 6 → 8 layers, middle", 4, (Jump(AT / 2, Growth("middle", k=2)), Jump(AT, Growth("middle", k=2)))),
    },
    sizes={"cpu": (CPU,), "gpu": (GPU,)},
)
