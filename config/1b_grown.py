"""The two-step way, second step: `torchrun train.py config/1b_grown.py --init_from out/1b_base/ckpt-x4.pt`."""

from nanostack.config import Data, Stage, Train
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/slimpajama"),
    model=LlamaConfig(n_layer=24, n_head=32, n_kv_head=32, d_model=2048, d_ff=5632, vocab_size=None, seq_len=2048),
    stages=(Stage(tokens=100_000_000_000, lr=3e-4, min_lr=3e-5, warmup_tokens=6_291_456_000),),
    batch_tokens=2_097_152,
    micro_batch=16,
    log_interval=20_971_520,
    eval_interval=1_048_576_000,
    save_interval=2_097_152_000,
    out="out/1b_grown",
)
