"""What does growth need under Muon? One seed, to look around: what is claimed stands in the study `muon`; they share runs.

Each arm changes one thing in the recipe that serves AdamW: stack 2 → 8 layers after a tenth of the FLOPs of the largest budget,
old momentum kept, zero for new layers, no warm-up. The rate after growth is tuned, that of the base is its own.
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
With one seed this is where to look, and no ranking of what lies close together: the model from scratch is 0.05 nats from
that of another seed, and this seed is the one that is kindest to it (2.477; 2.503 in the mean of three, study *muon*). The
same arm with three seeds took the other one of two rates. At 20 tokens per parameter, so that shares are those of that
budget (at 10 each growth comes after twice the share):

- *When* counts most. After 5 % of the FLOPs the grown model ends at 2.383, after 10 % at 2.404, after 30 % at 2.472, no
  more than 0.005 below this seed's model from scratch.
- *Momentum* hardly counts: kept for old layers and zero for new 2.404, all reset 2.407, copied 2.415, copied by half 2.414.
  That of old layers was kept or reset, not scaled.
- *Stack, or anything that is like it.* 4 → 8 layers and 2 → 4 → 8 end where 2 → 8 does (2.404, 2.403), from bases that had
  trained at other rates. Learned (2.423) and noise (2.415) are a little behind, interleaved (2.468) and new outputs zero
  (2.478) are at scratch. It is the paper's order, under AdamW.
- *A warm-up* of all layers costs here (2.432) and at half the budget nothing (2.599); one of new layers alone costs nothing
  (2.404).
- *A base by AdamW* serves as well (2.412).
- *Branches scaled by 1/depth* (CompleteP). Does the rate of the base serve the grown model? With them it does: the base is
  best at 8e-3, where the grown model ends at 2.397, beside 2.393 at its own best (4e-3). Without them it does not: the base
  is best at 2e-3, where the grown model ends at 2.454, beside 2.404 at its own best (8e-3). What is gained? Little for the
  grown model (2.393 beside 2.404), and the model from scratch loses 0.05 (2.529). Left as they are at growth, branches cost
  (2.459).
- *Loops*: 2 layers run 4 times and untied after 10 % end at 2.397, beside 2.404 for stacking: as good, with one seed,
  though a token costs 2.6 times the FLOPs that it costs in two layers; untied later they lose (2.458, 2.491). A looped model
  that stays one is the worst of all (2.736).
- *Learned* has half of the default's batches: 50.
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
