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
    means="""
With one seed, whose model from scratch is 0.05 to 0.09 nats from that of another, this is where to look, and no ranking of
what lies close together. At 20 tokens per parameter:

- *When* counts most. After 5 % of the FLOPs the grown model ends at 2.383, after 10 % at 2.404, after 30 % at 2.472, where
  nothing is left of the saving (8 layers from scratch: 2.477).
- *Momentum* hardly counts: kept for old layers and zero for new 2.404, all reset 2.407, copied 2.415, copied by half 2.414.
  That is half of one percent; the rate after growth (8e-3 instead of 4e-3) is worth more.
- *Stack, or anything that is like it.* 4 → 8 layers and 2 → 4 → 8 end where 2 → 8 does (2.404, 2.403). Learned (2.423) and
  noise (2.415) are a little behind, interleaved (2.468) and new outputs zero (2.478) save nothing. It is the paper's order,
  under AdamW.
- *A warm-up* of all layers costs (2.432), one of new layers alone does not (2.404).
- *A base by AdamW* serves as well (2.412).
- *Branches scaled by 1/depth* need a larger rate and no other care: rescaled at growth 2.393, left as they are 2.459. The
  model from scratch is not better for it (2.529).
- *Loops*: 2 layers run 4 times and untied after 10 % end at 2.397, where stacking is, though the loops cost four times the
  FLOPs; untied later they lose (2.458, 2.491). A looped model that stays one is the worst of all (2.736).
""",
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
