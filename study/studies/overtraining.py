"""One target at 7, 20 and 60 tokens for each of its parameters, beside models of 1, 2 and 4 layers that never grow.

Two questions: whether what growth saves grows or shrinks with tokens, and where grown models lie against the lower envelope of
all that never grew. Growth comes after a tenth of the FLOPs of the budget that an arm is for.
"""

from dataclasses import replace

from study.plan import CONTROLS, CPU, GPU, Arm, Study, stacked, with_earlier

BUDGETS = {"7": 1 / 9, "20": 1 / 3, "60": 1.0}  # tokens per parameter: share of the largest

study = Study(
    name="overtraining",
    question="Does growth save more or less with more tokens, and does it beat every smaller model?",
    arms={
        name: replace(arm, budgets=tuple(BUDGETS.values()))
        for name, arm in (CONTROLS | {"base1": Arm("1 layer, never grown", 1)}).items()
    }
    | {f"grown for {tokens}": stacked(f"2 → 8 layers for {tokens} a parameter", share=b) for tokens, b in BUDGETS.items()},
    sizes={
        size: (replace(one, budgets=with_earlier(*budgets), lrs=(2e-3, 4e-3, 8e-3), text="packages:constraints.txt"),)
        for size, one, budgets in (("cpu", CPU, (3e12, 9e12, 2.7e13)), ("gpu", GPU, (1e14, 3e14, 9e14)))
    },
)
