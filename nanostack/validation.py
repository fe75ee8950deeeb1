"""The one validation loss: of a run, of `nanostack evaluate`, and of `grow.py --data`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanostack.model import Llama
from nanostack.parallel import rank, reshard, world_size
from nanostack.text.dataset import Prefetcher, Tokens

CHUNK = 1 << 22  # tokens of text that are measured at a time


class Loss(NamedTuple):
    nats_per_token: float
    bits_per_byte: float


class Validation:
    """A fixed part of a validation split, and the loss of models on it.

    It is the first `most_tokens` of the split, in whole blocks of seq_len, at least one; None: the whole split. Every token but
    the first is a target once. The n_tokens targets decode to n_bytes of text.
    """

    def __init__(self, tokens: Tokens, most_tokens: int | None = None):
        self.tokens, self.n_blocks = tokens, tokens.n_blocks
        if most_tokens is not None:
            self.n_blocks = max(1, min(self.n_blocks, most_tokens // tokens.seq_len))
        self.n_tokens = self.n_blocks * tokens.seq_len
        token_bytes, step = tokens.token_bytes, max(1, CHUNK // tokens.seq_len)
        parts = (tokens.blocks(start, min(start + step, self.n_blocks)) for start in range(0, self.n_blocks, step))
        self.n_bytes = sum(int(token_bytes[part[:, 1:]].sum()) for part in parts)

    @torch.no_grad()
    def __call__(self, model: Llama, batch: int, advance: Callable[[], object] = lambda: None) -> Loss:
        """Mean loss, `batch` blocks of each rank at a time; `advance()` is called after each. Every rank must call it."""
        device, ranks = model.cos.device, world_size()
        nats = torch.zeros((), dtype=torch.float64, device=device)
        firsts = range(rank() * batch, self.n_blocks + rank() * batch, batch * ranks)
        mine = [(min(first, self.n_blocks), min(first + batch, self.n_blocks)) for first in firsts]
        # A rank that has no block left runs block 0 again, as FSDP2 needs all ranks, and its loss is dropped.
        ranges = [(start, stop) if start < stop else (0, 1) for start, stop in mine]
        with Prefetcher(self.tokens, ranges, device=device, shuffle=False) as blocks:
            for (start, stop), (tokens_BT, targets_BT) in zip(mine, blocks, strict=True):
                loss = model(tokens_BT, targets_BT)
                if start < stop:  # else it was run for the collectives only
                    nats += loss.double() * targets_BT.numel()
                advance()
        if dist.is_initialized():
            dist.all_reduce(nats)
        reshard(model)
        total = nats.item()
        return Loss(total / self.n_tokens, total / math.log(2) / max(1, self.n_bytes))
