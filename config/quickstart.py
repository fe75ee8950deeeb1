"""The quickstart on any machine: 2 layers trained for 25 % of the FLOPs, stacked ×4 in place, and trained on as 8 layers.

`make quickstart` runs it beside its two controls, quickstart_scratch.py and quickstart_base.py, at the same FLOPs.
"""

from nanostack.config import Data, Stage, Train, grow
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/stdlib", val_tokens=65_536),
    model=LlamaConfig(n_layer=2, n_head=3, n_kv_head=3, d_model=192, d_ff=512, vocab_size=None, seq_len=256),
    stages=(
        Stage(tokens=1_142_784, lr=4e-3, schedule="constant", warmup_tokens=122_880),
        grow("stack", g=4, tokens=1_114_112, lr=4e-3, min_lr=2e-4, warmup_tokens=122_880),
    ),
    batch_tokens=4096,
    micro_batch=16,
    log_interval=81_920,
    eval_interval=163_840,
    save_interval=819_200,
    out="out/quickstart/grown",
)
