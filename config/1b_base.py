"""The two-step way, first step: 6 layers for 10.5B tokens. Then `python grow.py out/1b_base/ckpt.pt --g 4`."""

from nanostack.config import Data, Stage, Train
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/slimpajama"),
    model=LlamaConfig(n_layer=6, n_head=32, n_kv_head=32, d_model=2048, d_ff=5632, vocab_size=None, seq_len=2048),
    stages=(Stage(tokens=10_500_000_000, lr=1e-3, schedule="constant", warmup_tokens=6_291_456_000),),
    batch_tokens=2_097_152,
    micro_batch=16,
    log_interval=20_971_520,
    eval_interval=1_048_576_000,
    save_interval=2_097_152_000,
    out="out/1b_base",
)
