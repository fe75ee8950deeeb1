"""Does the gain grow or shrink with size at 20 tokens per parameter? Three targets, five seeds."""

from dataclasses import replace

from study.plan import CONTROLS, CPU, Size, Study, stacked, with_earlier


def target(d_model: int, n_head: int, d_ff: int, budget: float) -> Size:
    model = replace(CPU.model, d_model=d_model, n_head=n_head, n_kv_head=n_head, d_ff=d_ff)
    size = replace(CPU, model=model, budgets=with_earlier(budget), lrs=(2e-3, 4e-3, 8e-3), seeds=(0, 1, 2, 3, 4))
    return replace(size, text="packages:constraints.txt")


study = Study(
    name="scale_20",
    question="Does the gain grow or shrink with the size of the target, at 20 tokens per parameter?",
    arms={name: replace(arm, budgets=(1.0,)) for name, arm in CONTROLS.items()} | {"grown": stacked("2 → 8 layers")},
    sizes={"cpu": (target(32, 1, 88, 2.1e12), target(48, 2, 128, 9e12), target(64, 2, 176, 2.7e13))},
)
