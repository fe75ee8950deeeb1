"""A run of seconds: 2 layers for 12 steps, stacked ×2, 12 steps as 4 layers; checkpoints every 4 steps."""

from nanostack.config import Data, Stage, Train, grow
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/missing", val_tokens=1024),
    model=LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96, vocab_size=None, seq_len=32),
    stages=(
        Stage(tokens=12 * 256, lr=1e-2, schedule="constant", warmup_tokens=512),
        grow("stack", g=2, tokens=12 * 256, lr=5e-3, min_lr=1e-3, warmup_tokens=512),
    ),
    batch_tokens=256,
    micro_batch=4,
    dtype="float32",
    log_interval=256,
    eval_interval=1024,
    save_interval=1024,
    out="out/tiny",
)
