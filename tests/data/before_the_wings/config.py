"""The run whose folder this is: stopped after its growth, to be resumed by later versions."""

from nanostack.config import Data, Stage, Train, grow
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/missing", val_tokens=512),
    model=LlamaConfig(n_layer=1, n_head=1, n_kv_head=1, d_model=8, d_ff=16, vocab_size=None, seq_len=16),
    stages=(
        Stage(tokens=512, lr=1e-2, schedule="constant"),
        grow("random", g=2, tokens=1024, lr=5e-3, ramp_tokens=768, optimizer="copy"),
    ),
    batch_tokens=64,
    micro_batch=4,
    dtype="float32",
    kernels="torch",
    log_interval=64,
    eval_interval=512,
    save_interval=512,
    out="out/old",
)
