"""Token ids for benchmarks in which text decides nothing: drawn at random, and about as frequent as words are in text.

The writer of nanostack/text/corpus.py puts them into a folder in the format that train.py reads, so that what is timed reads,
shuffles and copies them to the device as it does text. Nothing has to be prepared, and nothing comes from the network.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from nanostack.config import Train
from nanostack.text.corpus import Shards
from nanostack.text.manifest import FORMAT, MANIFEST, SPLITS, advised
from nanostack.text.tokenizer import BYTES_PATTERN, EOT, Tokenizer

DOCUMENT = 500  # tokens in the mean
PIECE = 1 << 22  # ids drawn at a time


@contextlib.contextmanager
def fed(config: Train, overrides: Sequence[str], batch_tokens: int, steps: int) -> Iterator[Train]:
    """The config with data to read for so many steps: the prepared text that `overrides` name, else ids of its own.

    No id is read twice. They are gone when the context ends.
    """
    if names_text(overrides):
        yield config
        return
    with TemporaryDirectory(prefix="nanostack-ids-") as folder:
        write(Path(folder), vocabulary(config), {"train": steps * batch_tokens + 1, "val": 4 * config.model.seq_len + 1})
        yield replace(config, data=replace(config.data, path=folder))


def names_text(overrides: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--data.path" for word in overrides)


def vocabulary(config: Train) -> int:
    """The config's; where it leaves that to its text, what is advised for a folder of that name. All bytes and end-of-text
    are in it."""
    return max(257, config.model.vocab_size or int(advised(config.data.path)[1].removeprefix("bpe:")))


def write(folder: Path, n_vocab: int, sizes: dict[str, int], seed: int = 0) -> None:
    """Fill `folder` with prepared data of so many tokens by split.

    Of all ids but end-of-text, the r-th is drawn with a probability of about 1/r, the law of Zipf: how often an id repeats
    decides how many gradients meet in one row of the embedding.
    """
    random = np.random.default_rng(seed)
    ranks = {bytes([i]): i for i in range(256)} | {i.to_bytes(3, "big"): i for i in range(256, n_vocab - 1)}
    tokenizer = Tokenizer("random ids", BYTES_PATTERN, ranks, {EOT: n_vocab - 1})
    splits = {}
    for split in SPLITS:
        shards, left = Shards(folder, split, 1 << 30), sizes[split]
        while left:
            size = min(left, PIECE)
            ids = np.exp(random.random(size) * np.log(n_vocab)).astype(np.int64) - 1
            ids[random.random(size) < 1 / DOCUMENT] = tokenizer.eot
            shards.write(ids.astype(tokenizer.dtype))
            left -= size
        shards.close()
        count = {"documents": sizes[split] // DOCUMENT, "tokens": sizes[split], "bytes": 0}
        splits[split] = count | {"shards": shards.entries}
    manifest = {"format": FORMAT, "sources": [f"random ids, seed {seed}"], "tokenizer": tokenizer.save(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"dtype": tokenizer.dtype.str, "splits": splits}))
