"""The four arms of `make quickstart`, 20 tokens for each of the target's parameters: rates tuned for every arm, five seeds.

The batch is tuned for the target from scratch. The other arms take the same, which serves the target best.
"""

from dataclasses import replace

from nanostack.config import OptimizerName
from study.plan import CPU, Arm, Study, controls, stacked, with_earlier

OPTIM: OptimizerName = "adamw"
BATCHES = (512, 2048)  # beside the study's
RATES = {  # by budget, as they were tuned: bench/results/study-quickstart-cpu.json
    "scratch": (4e-3,),
    "grown": (4e-3, 4e-3, 4e-3),
    "base4": (4e-3,),
    "base": (4e-3,),
}

study = Study(
    name="quickstart",
    question="Does stacking pay at 20 tokens per parameter?",
    arms={
        "scratch": replace(controls(OPTIM)["scratch"], budgets=(1.0,)),
        "grown": stacked("2 layers, stacked ×4", OPTIM),
        "base4": replace(controls(OPTIM)["base4"], budgets=(1.0,)),
        "base": replace(controls(OPTIM)["base"], budgets=(1.0,)),
        **{
            f"batch {batch}": Arm(
                f"8 layers from scratch, {batch} tokens a step", 8, (), OPTIM, budgets=(1.0,), batch_tokens=batch
            )
            for batch in BATCHES
        },
    },
    sizes={
        size: (
            replace(
                one,
                budgets=with_earlier(budget),
                lrs=(2e-3, 4e-3, 8e-3),
                evaluations=8,
                seeds=(0, 1, 2, 3, 4),
                text="packages:constraints.txt",
            ),
        )
        for size, one, budget in (("cpu", CPU, 9e12), ("gpu", replace(CPU, dtype="bfloat16"), 9e12))
    },
)
