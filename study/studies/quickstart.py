"""The four arms of `make quickstart`, 20 tokens for each of the target's parameters: rates tuned for every arm, five seeds.

Five more seeds are run only if the interval of the speedup over scratch holds zero with five. study/studies/batch.py
tunes the batch for the target from scratch; the other arms take the same.
"""

from dataclasses import replace

from nanostack.config import OptimizerName
from study.plan import CPU, GPU, Study, controls, stacked, with_earlier

OPTIM: OptimizerName = "muon"  # under which the study `muon` found the lowest loss, and growth to save as much as under AdamW
RATES = {"scratch": 4e-3, "grown": 8e-3, "base4": 2e-3, "base": 4e-3}  # as this study found them with five seeds
BASE_THAT_GROWS = 4e-3  # until it does
OTHER = (  # bench/results/study-muon-cpu.json
    "AdamW beside Muon, three seeds on another text (docs/study.md): 8 layers from scratch end at 2.574 and 2.503, stacked at "
    "2.472 and 2.393"
)

CPU_20 = replace(
    CPU,
    budgets=with_earlier(9e12),
    lrs=(2e-3, 4e-3, 8e-3),
    seeds=(0, 1, 2, 3, 4),
    evaluations=12,
    text="packages:constraints.txt",
)
# 8 layers × 320, 10.2M parameters: 5.1e16 FLOPs with the branch that decays earlier, 8 minutes of one H100 or H200 if it
# reaches 106 TFLOP/s: an estimate. Rates and batch are not tuned.
TEN_MILLION = replace(
    GPU,
    model=replace(GPU.model, n_head=5, n_kv_head=5, d_model=320, d_ff=864),
    budgets=with_earlier(1.25e16),
    batch_tokens=32_768,
    micro_batch=64,
    warmup_tokens=4_096_000,
    lrs=(2e-3,),
    seeds=(0,),
    evaluations=12,
    val_tokens=1_048_576,
    text="packages:constraints.txt",
)

study = Study(
    name="quickstart",
    question="Does stacking pay at 20 tokens per parameter?",
    arms={
        "scratch": replace(controls(OPTIM)["scratch"], budgets=(1.0,)),
        "grown": stacked("2 layers, stacked ×4", OPTIM),
        "base4": replace(controls(OPTIM)["base4"], budgets=(1.0,)),
        "base": replace(controls(OPTIM)["base"], budgets=(1.0,)),
    },
    sizes={
        "cpu": (CPU_20,),
        "gpu": (replace(CPU_20, dtype="bfloat16"),),
        "10M": (TEN_MILLION,),
    },
    means="""
It does, with every one of five seeds, against all three controls. The stacked model ends at 2.370, 8 layers from scratch at
2.499, 4 layers at 2.543 and 2 layers at 2.612: 0.129 ± 0.025, 0.173 ± 0.029 and 0.242 ± 0.008 nats above it. It reaches the
loss of the model from scratch with a speedup of 61 ± 16 % (by seed 74, 75, 45, 53 and 60 %), and is at half of the budget
(2.559) where 2 layers do not come with all of it.

Every rate was tuned on this text. The grown model took 8e-3, twice the rate that its base has until it grows, and is next to
as good at 4e-3 (2.375), as the model from scratch is at 2e-3 (2.504).

What limits it: one target of 0.27M parameters, one kind of text, growth after a tenth of the FLOPs alone. The grid is of
factors of two, and the sweep takes the two best rates of the first seed to all: 4 layers had 4e-3 with that seed only. The
controls were not measured at half of the budget, so it is not known from which budget on stacking pays.
""",
)
