"""Which operator? The paper's figure 3 at our size: 2 layers to 8 by each, at the FLOPs of 8 layers from scratch.

`python bench/speedup.py study/studies/operators.py --data data/stdlib512`; that is the standard library in bpe:512.
middle cannot make 8 layers of 2: it grows 4 layers to 6 and to 8, as MIDAS does in stages.
"""

from nanostack.config import Growth
from study.plan import CONTROLS, CPU, GPU, Arm, Jump, Study

AT = 0.1  # of the largest budget


def grown(op: str, **options) -> Arm:
    return Arm(f"2 → 8 layers, {op}", 2, (Jump(AT, Growth(op, 4, **options)),))


study = Study(
    name="operators",
    question="Which operator grows best in depth?",
    arms={
        **CONTROLS,
        "stack": grown("stack"),
        "interleave": grown("interleave"),
        "zero": grown("zero"),
        "random": grown("random"),
        "learn": grown("learn", learn_steps=50),
        "middle": Arm("4 → 6 → 8 layers, middle", 4, (Jump(AT / 2, Growth("middle", k=2)), Jump(AT, Growth("middle", k=2)))),
    },
    sizes={"cpu": (CPU,), "gpu": (GPU,)},
    means="""
stack, random and learn end within 0.015 nats of each other. Against stack, interleave is behind by 0.025 to 0.051 nats and zero
by 0.029 to 0.065, with every seed at every budget and beyond every interval; learn by 0.054 ± 0.013, 0.019 ± 0.041 and 0.008 ±
0.001; random by 0.022 ± 0.025 and 0.020 ± 0.021, and at the largest budget it is ahead by 0.007 ± 0.040. So stack stays the
default, of the three the simplest: it needs neither a ramp nor batches of its own. middle, which begins with 4 layers and grows
twice, is no better than from scratch.

The speedup of stack over the tuned and decayed target is 23 ± 34 % here: at the largest budget the seeds of the target alone
are 0.07 nats apart. There it ends below both bases that never grew with every seed, beyond the interval only against 2 layers
(0.070 ± 0.014; against 4 layers 0.029 ± 0.036); at half of that budget it is behind both in the mean. The curves of grown
models fall more steeply than those of the bases, so a larger budget should favour growth over the bases; from the target they
gain no ground: stack leads by 0.11, 0.07 and 0.08 nats.

Limits: 0.27M parameters, 4.5M tokens of Python, three seeds. All grow at the tenth of the largest budget that suits stack there
(the study of timing), and warm up again with moments reset, as the paper's do. learn trained
on 50 batches, half of the default.
""",
)
