"""Text from a model: prompts in, samples out, with a cache of keys and values.

All samples of prompts of one length are made together, each with random numbers of its own: every sample is the text that it
would be alone. `Writer` lets the model of a run write while it trains.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nanostack.config import Sampling, Train
from nanostack.errors import UserError
from nanostack.model import KVCache, Llama
from nanostack.parallel import reshard
from nanostack.provenance import tokenizer_name
from nanostack.text import tokenizer
from nanostack.text.bounds import Bounds
from nanostack.text.manifest import MANIFEST, load_manifest
from nanostack.text.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what bytes that are no whole character are decoded to


@dataclass
class Sample:
    """A text under way: `ids` begins with the prompt's."""

    prompt: str
    ids: list[int]
    seed: int
    end: Literal["end_of_text", "length"] | None = None
    n_prompt: int = field(init=False)

    def __post_init__(self):
        self.n_prompt = len(self.ids)

    def text(self, text: Tokenizer) -> str:
        """The prompt and what follows it, to the last whole character."""
        shown = self.ids if self.prompt else self.ids[self.n_prompt :]  # not the token that stands for an empty one
        return text.decode(shown).rstrip(UNFINISHED)

    def record(self, text: Tokenizer) -> dict:
        about = {"prompt": self.prompt, "seed": self.seed, "text": self.text(text)}
        return about | {"tokens": len(self.ids) - self.n_prompt, "end": self.end}


def encode(prompt: str, text: Tokenizer, seq_len: int) -> list[int]:
    """Token ids of a prompt; of an empty one, what begins a text. UserError where the model cannot take it."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt {prompt[:40]!a} is not valid UTF-8") from error
    ids = text.encode_prompt(prompt) or [text.prefix]
    if len(ids) > seq_len:
        raise UserError(f"the prompt {prompt[:40]!a} has {len(ids)} tokens, the model's context {seq_len}")
    return ids


def probabilities(logits_BK: Tensor, how: Sampling) -> Tensor:
    """(B, K) float64, of tokens from the likeliest on: softmax(logits / temperature), top_p of it, up to a factor."""
    logits_BK = logits_BK.double()
    p_BK = ((logits_BK - logits_BK[:, :1]) / how.temperature).softmax(-1)
    likelier_BK = p_BK.cumsum(-1) - p_BK
    return p_BK if how.top_p == 1 else p_BK * (likelier_BK < how.top_p)


def draw(logits_BV: Tensor, how: Sampling, generators: list[torch.Generator]) -> Tensor:
    """(B,) the next token of each row, drawn with its own generator, on the CPU. UserError for logits that are not finite."""
    if not logits_BV.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
    if how.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BK, index_BK = logits_BV.topk(min(how.top_k or logits_BV.shape[1], logits_BV.shape[1]))
    p_BK = probabilities(logits_BK.cpu(), how)
    choice_B1 = torch.stack([p_K.multinomial(1, generator=g) for p_K, g in zip(p_BK, generators, strict=True)])
    return index_BK.gather(1, choice_B1.to(index_BK.device)).squeeze(1)


@torch.no_grad()
def continue_rows(
    model: Llama, tokens_BT: Tensor, how: Sampling, n_vocab: int, generators: list[torch.Generator], cached: bool = True
) -> Iterator[list[int]]:
    """Yield the next token of every row, `how.tokens` times, out of the first n_vocab.

    The model's context is a window that fills up to seq_len tokens. Then all but its last half is dropped, and the keys and
    values of what stays are computed anew, as their positions and what they have seen are others. Without the cache they are
    computed for every token, with the same result. All ranks of a run must call this alike; they take rank 0's draws.
    """
    seq_len, capacity = model.config.seq_len, min(model.config.seq_len, tokens_BT.shape[1] + how.tokens)
    cached = cached and model.end_of_text is None
    cache = [KVCache(capacity) for _ in range(model.config.depth)] if cached else None
    for _ in range(how.tokens):
        unseen_BT = tokens_BT[:, cache[0].length :] if cache else tokens_BT
        next_B = draw(model(unseen_BT, cache=cache)[:, -1, :n_vocab].float(), how, generators)
        if dist.is_initialized():
            dist.broadcast(next_B, src=0)
        yield next_B.tolist()
        tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
        if tokens_BT.shape[1] > seq_len:
            tokens_BT = tokens_BT[:, -max(1, seq_len // 2) :]
            cache = [KVCache(capacity) for _ in range(model.config.depth)] if cached else None


def write(model: Llama, samples: list[Sample], how: Sampling, text: Tokenizer, cached: bool = True) -> Iterator[None]:
    """Go on with all samples until each has ended; yields after every token. Samples with prompts of one length go together."""
    device = model.cos.device
    for n_prompt in dict.fromkeys(sample.n_prompt for sample in samples):
        group = [sample for sample in samples if sample.n_prompt == n_prompt]
        generators = [torch.Generator().manual_seed(sample.seed) for sample in group]
        prompts_BT = torch.tensor([sample.ids for sample in group], device=device)
        for tokens in continue_rows(model, prompts_BT, how, text.n_vocab, generators, cached):
            for sample, token in zip(group, tokens, strict=True):
                if sample.end is None and token in text.ends:
                    sample.end = "end_of_text"
                elif sample.end is None:
                    sample.ids.append(token)
                    sample.end = "length" if len(sample.ids) == n_prompt + how.tokens else None
            yield
            if all(sample.end for sample in group):
                break


class Writer:
    """What the model of a run writes to the prompts of its config, each time with the same random numbers.

    Nothing of the run changes by it: not its random state, not its gradients, not what is compiled.
    """

    def __init__(self, config: Train):
        self.how, self.prompts = config.sample, []
        if self.how.interval is not None:
            self.text = tokenizer.load(config.data.path)
            self.prompts = [(prompt, encode(prompt, self.text, config.model.seq_len)) for prompt in self.how.prompt]

    def __call__(self, model: Llama, heard: Callable[[], object] = lambda: None) -> list[str]:
        """The texts, prompts included; calls `heard()` after each token. Every rank must call it."""
        samples = [Sample(prompt, list(ids), self.how.seed) for prompt, ids in self.prompts]
        try:
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                for _ in write(model, samples, self.how, self.text):
                    heard()
        except UserError as error:  # no reason to end a run
            return [str(error)]
        finally:
            reshard(model)
        return [sample.text(self.text) for sample in samples]


def find_tokenizer(saved: dict, source: Path, data: Path | None) -> Tokenizer:
    """The tokenizer of the prepared folder `data`; without one that of the Hugging Face folder, or of the folder in data/ that
    the model was trained on. UserError where there is none, or not the model's."""
    if data is None and (source / "tokenizer.json").is_file():
        text = tokenizer.get(str(source))
    else:
        manifests = sorted(Path("data").glob(f"*/{MANIFEST}")) if data is None else [data / MANIFEST]
        trained_on = [m for m in manifests if m.is_file() and sha256(m.read_bytes()).hexdigest() == saved["manifest_sha256"]]
        folder = trained_on[0].parent if trained_on else data
        if folder is None:
            raise UserError(f"data/ does not have what {source} was trained on: name a folder with its tokenizer (--data)")
        text = tokenizer.load(folder)
        if not trained_on:
            check_tokenizer(folder, source.parent / "metrics.jsonl")
    if text.n_vocab > (vocab_size := saved["config"]["vocab_size"]):
        raise UserError(f"the tokenizer of {data or source} has {text.n_vocab} entries, the model only {vocab_size}")
    text.follow(Bounds(**saved["bounds"]))
    return text


def check_tokenizer(folder: Path, run: Path) -> None:
    """Raise UserError where the records of the run say that it had another tokenizer than the prepared folder has."""
    try:
        with open(run) as file:
            wanted = json.loads(file.readline())["text"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no records: who knows
    if (found := tokenizer_name(load_manifest(folder))) != wanted:
        raise UserError(f"{folder} has the tokenizer {found}, the model was trained with {wanted}")
