"""What others have published of a training step's speed, to stand beside ours: by the name of the config it is comparable to.

None of it was measured here. Each says what its figure counts, and what about it differs from ours.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanostack.flops import mfu
from nanostack.model import LlamaConfig


@dataclass(frozen=True)
class Anchor:
    name: str
    device: str
    tokens_per_s: float  # of one GPU
    mfu: float  # 6 FLOPs for every parameter in a product, 12·d_model for every layer and token of a window: our "full"
    peak: float  # FLOP/s that it is a share of
    source: str
    differences: str  # from the config it stands beside


ANCHORS = {
    "50m": (
        Anchor(
            name="autoresearch",
            device="one H100",
            tokens_per_s=942 * 2**19 / 300.1,  # its 499.6M tokens are 953 steps, of which the clock leaves out eleven
            mfu=0.398,
            peak=989.5e12,
            source="github.com/karpathy/autoresearch, sample run in program.md at 228791f",
            differences=(
                "windows of 1024 tokens in six of its eight layers, and 29.4M parameters that count: 239 MFLOP a token, ours "
                "280; ReLU² in place of SwiGLU, norms of q and k, value embeddings in four layers (the rest of its 50.3M "
                "parameters are embeddings), logits capped by tanh; Muon for its matrices; FlashAttention-3 under torch.compile"
            ),
        ),
    ),
    "1b": (
        Anchor(
            name="OLMo-core",
            device="each of 8 H100",
            tokens_per_s=55_000,
            mfu=0.52,
            peak=989e12,
            source="pypi.org/project/ai2-olmo-core/1.6.3, its table of training scripts",
            differences=(
                "1B of 16 layers × 2048 with d_ff 8192 and 100,352 tokens, context 4096, on several GPUs; the MFU is what its "
                "tokens/s come to by our count (full)"
            ),
        ),
    ),
}


def beside(config: str, overrides: Sequence[str], model: LlamaConfig, speeds: dict[str, float]) -> list[dict]:
    """The anchors of the config file, with the MFU that each way's tokens/s are by their definition: none where options change
    the model, as the differences would no longer be those named."""
    if any(word.startswith("--model.") and word.partition("=")[0] != "--model.vocab_size" for word in overrides):
        return []
    return [
        asdict(anchor) | {"ours": {way: mfu(model, speed, anchor.peak) for way, speed in speeds.items()}}
        for anchor in ANCHORS.get(Path(config).stem, ())
    ]


def sentences(anchors: list[dict], on_gpu: bool) -> list[str]:
    """Sentences to read beside the table of a result."""
    said = []
    for anchor in anchors:
        text = f"{anchor['name']}, published for {anchor['device']} and not measured here: {anchor['tokens_per_s']:,.0f} "
        text += f"tokens/s, {100 * anchor['mfu']:.1f} % MFU ({anchor['source']})."
        if on_gpu:
            found = (f"{way} {100 * share:.1f} %" for way, share in anchor["ours"].items())
            text += f" By its definition, and its peak of {anchor['peak'] / 1e12:g} TFLOP/s: {', '.join(found)}."
        said.append(f"{text} It differs: {anchor['differences']}.")
    return said
