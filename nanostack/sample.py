"""Text from a checkpoint: `python -m nanostack.sample out/quickstart/grown/ckpt.pt --data data/stdlib --prompt "def "`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from nanostack import checkpoint, tokenizer
from nanostack.config import Optim
from nanostack.errors import UserError, exits_cleanly
from nanostack.model import Llama, LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State


@dataclass(frozen=True)
class Command:
    """Let a checkpoint write."""

    checkpoint: tyro.conf.Positional[Path]
    data: Path
    """The prepared folder whose tokenizer the model was trained with."""
    prompt: str = "def "
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0
    json: bool = False
    """Print one JSON object with prompt, text and seed."""


@torch.no_grad()
def generate(model: Llama, tokens_BT: Tensor, n: int, temperature: float, top_k: int, n_vocab: int, seed: int) -> Tensor:
    """Append n tokens, each drawn from the top_k of softmax(logits / temperature) over the first n_vocab entries.

    The context is recomputed for every token and cut to the model's last seq_len: right, short, and slow.
    """
    generator = torch.Generator(tokens_BT.device).manual_seed(seed)
    for _ in range(n):
        logits_BV = model(tokens_BT[:, -model.config.seq_len :])[:, -1, :n_vocab].float() / temperature
        top_BK, index_BK = logits_BV.topk(min(top_k, n_vocab))
        choice_B1 = torch.multinomial(top_BK.softmax(-1), 1, generator=generator)
        tokens_BT = torch.cat([tokens_BT, index_BK.gather(1, choice_B1)], dim=1)
    return tokens_BT


def main(command: Command) -> str:
    if command.temperature <= 0 or command.top_k < 1 or command.tokens < 1:
        raise UserError("temperature, top_k and tokens must be positive")
    saved = checkpoint.load(command.checkpoint)
    text = tokenizer.load(command.data)
    config = LlamaConfig(**saved["config"])
    if text.n_vocab > config.vocab_size:
        raise UserError(f"the tokenizer of {command.data} has {text.n_vocab} entries, the model only {config.vocab_size}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = State.restore(saved | {"optimizer": {}}, Optim(), Placement(device)).model  # with the ramp of a growth, if in one
    start = torch.tensor([text.encode(command.prompt) or [text.eot]], device=device)
    out = generate(model, start, command.tokens, command.temperature, command.top_k, text.n_vocab, command.seed)
    return text.decode(out[0].tolist())


if __name__ == "__main__":
    with exits_cleanly():
        command = tyro.cli(Command, use_underscores=True)
        text = main(command)
        print(json.dumps({"prompt": command.prompt, "text": text, "seed": command.seed}) if command.json else text)
