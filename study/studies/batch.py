"""How many tokens should a step of the quickstart have? Tuned for the target from scratch, its rate with it."""

from dataclasses import replace

from study.plan import Arm, Study
from study.studies.quickstart import CPU_20, OPTIM
from study.studies.quickstart import study as quickstart

study = Study(
    name="batch",
    question="How many tokens should a step have?",
    arms={
        **quickstart.arms,
        **{
            f"scratch {batch}": Arm(f"8 layers from scratch, {batch} a step", 8, (), OPTIM, budgets=(1.0,), batch_tokens=batch)
            for batch in (512, 2048)
        },
    },
    sizes={"cpu": (replace(CPU_20, seeds=(0, 1, 2)),)},
)
