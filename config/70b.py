"""70B, the shape of Llama 3's: 20 layers for 42.5B tokens, stacked ×4 in place, 2T tokens as 80 layers. Nobody has run this.

The paper (arXiv 2405.15319) ends at 7B. Its formula gives 42.5B tokens before growth for 70B parameters and 2T tokens. Batch
(4M tokens of 4096 each), warm-up (2000 steps) and the rate after growth (1.5e-4, down to a tenth) are those with which Llama 2
trained 70B from scratch (arXiv 2307.09288). The base has half the 1e-3 of the paper's bases, as it is twice as wide as the
widest of them. Each of 64 H100s has room for four sequences at a time (`nanostack fit`), and every weight is gathered a quarter
as often as for one. The vocabulary is that of Llama 3's tokenizer; text of another one can have --model.vocab_size.
"""

from nanostack.config import Data, Parallel, Stage, Train, grow
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/slimpajama"),
    model=LlamaConfig(
        n_layer=20, n_head=64, n_kv_head=8, d_model=8192, d_ff=28672, vocab_size=128256, seq_len=4096, rope_theta=5e5
    ),
    stages=(
        Stage(tokens=42_500_000_000, lr=5e-4, schedule="constant", warmup_tokens=8_388_608_000),
        grow("stack", g=4, tokens=2_000_000_000_000, lr=1.5e-4, min_lr=1.5e-5, warmup_tokens=8_388_608_000),
    ),
    batch_tokens=4_194_304,
    micro_batch=4,
    parallel=Parallel(activation_checkpointing="full"),
    log_interval=41_943_040,
    eval_interval=2_097_152_000,
    save_interval=4_194_304_000,
    out="out/70b",
)
