"""34M parameters (30M of them in products): a Llama beside autoresearch's model of 50M; bench/anchors.py has its figures.

It has the depth, width, heads, vocabulary, context and batch of that model, and is for one GPU, as that is. d_ff 1408
gives the three matrices of SwiGLU 3 % more weights than the two of 4·512 have there.
"""

from nanostack.config import Data, Stage, Train
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/texts"),
    model=LlamaConfig(n_layer=8, n_head=4, n_kv_head=4, d_model=512, d_ff=1408, vocab_size=8192, seq_len=2048),
    stages=(Stage(tokens=499_646_464, lr=3e-3, min_lr=3e-4, warmup_tokens=10_485_760),),
    batch_tokens=524_288,
    micro_batch=128,
    log_interval=10_485_760,
    eval_interval=104_857_600,
    save_interval=499_646_464,
    out="out/50m",
)
