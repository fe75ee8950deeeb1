"""What does growth need under Muon? One seed, to look around: what is claimed stands in the study `muon`; they share runs.

Each arm changes one thing in the recipe that serves AdamW: stack 2 → 8 layers after a tenth of the FLOPs, old momentum kept,
zero for new layers, the rate goes on.
"""

from dataclasses import replace
from typing import Any

from nanostack.config import Growth
from study.plan import CPU, GPU, Arm, Jump, Study, controls

SCALED = {"residual_scale": 2.0}  # 1 in the base of 2 layers
KEEP: dict[str, Any] = {"moments_old": "keep", "moments_new": "zero"}


def grown(label: str, op: str = "stack", at: float = 0.1, g: int | None = 4, n_layer: int = 2, restart=False, **how) -> Arm:
    """One jump under Muon."""
    state = {} if how.pop("reset", False) else KEEP
    jump = {name: how.pop(name) for name in ("rewarm",) if name in how}
    model = how.pop("model", {})
    return Arm(label, n_layer, (Jump(at, Growth(op, g, **state | how), restart, **jump),), "muon", model)


study = Study(
    name="muon_growth",
    question="What does growth need under Muon?",
    arms={
        **controls("muon"),
        "adamw base": Arm("2 layers by AdamW, never grown", 2),
        "scaled": Arm("8 layers from scratch, branches 1/4", 8, optim="muon", model=SCALED),
        "scaled base": Arm("2 layers, branches 1", 2, optim="muon", model=SCALED),
        "looped": Arm("2 layers run 4 times", 2, optim="muon", model={"loops": 4}),
        "stack": grown("stacked"),
        "copied": grown("momentum copied", moments_new="copy"),
        "halved": grown("momentum copied by half", moments_new="scale", moments_factor=0.5),
        "reset": grown("momentum reset", reset=True),
        "5 %": grown("after 5 %", at=0.05),
        "30 %": grown("after 30 %", at=0.3),
        "4 to 8": grown("4 → 8 layers", g=2, n_layer=4),
        "2 to 4 to 8": Arm(
            "2 → 4 → 8 layers", 2, tuple(Jump(at, Growth("stack", 2, **KEEP), restart=False) for at in (0.05, 0.1)), "muon"
        ),
        "interleave": grown("interleaved", "interleave"),
        "zero": grown("new outputs zero", "zero"),
        "learn": grown("learned", "learn", reset=True, learn_steps=50),
        "noise": grown("20 % noise", noise=0.2),
        "warm-up": grown("warmed up again", restart=True),
        "re-warm": grown("new layers warmed up", rewarm=True),
        "into muon": Arm("2 layers by AdamW → 8", 2, (Jump(0.1, Growth("stack", 4), restart=False, optim="muon"),)),
        "rescaled": grown("branches 1 → 1/4", model=SCALED),
        "scale kept": grown("branches 1 → 1", residual="keep", model=SCALED),
        **{
            f"untied {share:.0%}": grown(
                f"2 layers run 4 times, untied after {share:.0%}", "untie", share, None, model={"loops": 4}
            )
            for share in (0.1, 0.3, 0.5)
        },
    },
    sizes={
        size: (replace(one, budgets=budgets, lrs=(2e-3, 4e-3, 8e-3), seeds=(0,), text="site-packages"),)
        for size, one, budgets in (("cpu", CPU, (4.5e12, 9e12)), ("gpu", GPU, (1.5e14, 3e14)))
    },
)
