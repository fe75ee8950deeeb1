"""Does stacking pay on English prose as on Python source? The four arms at 20 tokens per parameter.

The text: python -m study.prose data/prose, then nanostack prepare data/prose --out data/prose512 --tokenizer bpe:512.
2 layers read it 1.1 times, 4 layers 0.7 times, 8 layers 0.4 times.
"""

from dataclasses import replace

from study.plan import CONTROLS, Study, stacked
from study.studies.quickstart import CPU_20

study = Study(
    name="prose",
    question="Does stacking pay on English prose, at 20 tokens per parameter?",
    arms={name: replace(arm, budgets=(1.0,)) for name, arm in CONTROLS.items()} | {"grown": stacked("2 → 8 layers")},
    sizes={"cpu": (replace(CPU_20, seeds=(0, 1, 2), text="data/prose"),)},
)
