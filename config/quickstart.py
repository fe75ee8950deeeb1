"""The quickstart's grown arm as one run: 2 layers, stacked ×4 in place after a tenth of the FLOPs, trained on as 8 layers.

`make quickstart` prepares the text and trains it in pieces, beside three controls (study/studies/quickstart.py).
"""

from nanostack.config import Data, Optim, Stage, Train, grow
from nanostack.model import LlamaConfig

config = Train(
    data=Data("data/packages512", val_tokens=65_536),
    model=LlamaConfig(n_layer=2, n_head=2, n_kv_head=2, d_model=48, d_ff=128, vocab_size=None, seq_len=128),
    stages=(
        Stage(tokens=1_432_576, lr=4e-3, schedule="constant", warmup_tokens=61_440),
        grow(
            "stack", g=4, moments_old="keep", moments_new="zero",
            tokens=4_978_688, lr=8e-3, schedule="wsd", decay_tokens=1_105_920,
        ),
    ),
    optim=Optim("muon"),
    batch_tokens=1024,
    micro_batch=8,
    dtype="float32",
    log_interval=102_400,
    eval_interval=614_400,
    save_interval=2_457_600,
    out="out/quickstart/by-hand",
)  # fmt: skip
