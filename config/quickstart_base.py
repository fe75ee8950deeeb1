"""The control of quickstart.py: its 2-layer base, never grown, at the same FLOPs. Does growing pay at this budget at all?"""

from nanostack.config import Data, Stage, Train
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/stdlib", val_tokens=65_536),
    model=LlamaConfig(n_layer=2, n_head=3, n_kv_head=3, d_model=192, d_ff=512, vocab_size=None, seq_len=256),
    stages=(Stage(tokens=4_571_136, lr=4e-3, min_lr=2e-4, warmup_tokens=122_880),),
    batch_tokens=4096,
    micro_batch=16,
    log_interval=245_760,
    eval_interval=491_520,
    save_interval=2_457_600,
    out="out/quickstart/base",
)
