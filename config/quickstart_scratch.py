"""The baseline of quickstart.py: the same 8 layers from scratch at the same FLOPs, learning rate tuned and fully decayed."""

from nanostack.config import Data, Stage, Train
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/stdlib", val_tokens=65_536),
    model=LlamaConfig(n_layer=8, n_head=3, n_kv_head=3, d_model=192, d_ff=512, vocab_size=None, seq_len=256),
    stages=(Stage(tokens=1_486_848, lr=4e-3, min_lr=2e-4, warmup_tokens=122_880),),
    batch_tokens=4096,
    micro_batch=16,
    log_interval=81_920,
    eval_interval=163_840,
    save_interval=819_200,
    out="out/quickstart/scratch",
)
