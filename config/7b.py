"""7B with the paper's protocol (arXiv 2405.15319): 8 layers for 10.5B tokens, stacked ×4 in place, 300B tokens as 32 layers."""

from nanostack.config import Data, Parallel, Stage, Train, grow
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/slimpajama"),
    model=LlamaConfig(n_layer=8, n_head=32, n_kv_head=8, d_model=4096, d_ff=11008, vocab_size=None, seq_len=2048),
    stages=(
        Stage(tokens=10_500_000_000, lr=1e-3, schedule="constant", warmup_tokens=6_291_456_000),
        grow("stack", g=4, tokens=300_000_000_000, lr=1e-4, min_lr=1e-5, warmup_tokens=6_291_456_000),
    ),
    batch_tokens=2_097_152,
    micro_batch=4,
    parallel=Parallel(activation_checkpointing="full"),
    log_interval=20_971_520,
    eval_interval=1_048_576_000,
    save_interval=2_097_152_000,
    out="out/7b",
)
