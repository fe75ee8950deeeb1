"""Can one core feed a GPU, and does preparing text cost more than encoding it?

    python bench/dataloader.py [--data data/texts] [--text stdlib] [--rounds 5] [--json]

The prepared folder is data/stdlib; where there is none, the standard library is prepared in a temporary one.

Loader: tokens/s of `Prefetcher` over a prepared folder, at the context and micro-batch of config/1b.py, pages in memory, and
how often the fastest GPU's appetite that is (60,000 tokens/s for 1B on one H200: an estimate).
Encoding: MB/s of the same documents by tiktoken's own `encode_ordinary_batch` with one thread, by our tokenizer, and by
all of `prepare` (read, hash, deduplicate, encode, write; one worker), with the same ranks.

All of it runs pinned to one core, in turns; medians. JSON goes to bench/results/.
"""

import contextlib
import io
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import ROOT
from bench.results import place, write_result
from nanostack.config import load
from nanostack.errors import UserError, command_line
from nanostack.provenance import device_name
from nanostack.text import tokenizer
from nanostack.text.corpus import CorpusConfig, prepare
from nanostack.text.dataset import Prefetcher, Tokens
from nanostack.text.manifest import MANIFEST, advised
from nanostack.text.sources import Reader, list_files

APPETITE = 60_000  # tokens/s of a 1B model on the fastest GPU, an estimate
STDLIB = ROOT / "data/stdlib"
LOADED = 4_000_000  # tokens a round


@dataclass(frozen=True)
class Command:
    """Time what feeds the GPU."""

    data: Path | None = None
    """Prepared text that is loaded, and whose tokenizer encodes. Default: data/stdlib, or one made now."""
    text: str = "stdlib"
    """The text to encode: a source as `nanostack prepare` takes it."""
    rounds: int = 5
    out: Path | None = None
    """Result file; in bench/results/ by the name of the device."""
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def load_tokens(data: Path, seq_len: int, micro_batch: int) -> float:
    """Tokens/s of the prefetcher when nothing else is to be done."""
    tokens = Tokens(data, "train", seq_len)
    n = -(-LOADED // (micro_batch * seq_len))
    ranges = [(i * micro_batch, (i + 1) * micro_batch) for i in range(n + 1)]
    with Prefetcher(tokens, ranges) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(n):
            next(batches)
        return n * micro_batch * seq_len / (time.perf_counter() - began)


@contextlib.contextmanager
def prepared_text(data: Path | None) -> Iterator[Path]:
    """A folder of prepared text: the one asked for, data/stdlib, or the standard library prepared in a temporary one."""
    data = data or STDLIB
    if data != STDLIB or (data / MANIFEST).is_file():
        yield data
        return
    with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        source, ranks = advised(STDLIB)
        prepare(CorpusConfig([source], Path(folder) / "stdlib", ranks))
        yield Path(folder) / "stdlib"


def encode_ways(data: Path, text: str) -> tuple[dict, int]:
    """{way: a function that encodes all documents once}, and their bytes."""
    own = tokenizer.load(data)
    texts = [one for one in Reader(list_files(text, Counter()), "text") if one.strip()]
    size = sum(len(one.encode()) for one in texts)

    def prepared() -> None:
        with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            prepare(CorpusConfig([text], Path(folder) / "data", str(data), workers=1))

    ways = {
        "tiktoken's encode_ordinary_batch": lambda: own._bpe.encode_ordinary_batch(texts, num_threads=1),
        "our tokenizer, end-of-text added": lambda: own.encode_documents(texts),
        "all of prepare": prepared,
    }
    return ways, size


def main(command: Command) -> dict:
    if command.rounds < 1:
        raise UserError("rounds must be at least 1")
    with prepared_text(command.data) as data:
        return measure(command, data)


def measure(command: Command, data: Path) -> dict:
    console = Console(stderr=command.json, highlight=False)
    config = load(str(ROOT / "config/1b.py"), [])
    model, device = config.shapes()[-1], torch.device("cpu")
    seq_len = min(model.seq_len, Tokens(data, "train", 1).n_tokens - 1)
    out = place("feeding", device_name(device), command.out)
    ways, size = encode_ways(data, command.text)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    loaded, seconds = [], {name: [] for name in ways}
    load_tokens(data, seq_len, config.micro_batch)
    for _ in track(range(command.rounds), "rounds", console=console):
        loaded.append(load_tokens(data, seq_len, config.micro_batch))
        for name, encode in ways.items():
            began = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(seconds))
    result = {
        "loader": {"tokens_per_s": statistics.median(loaded), "rounds": loaded, "seq_len": seq_len},
        "times_the_appetite": statistics.median(loaded) / APPETITE,
        "text": {"source": command.text, "bytes": size},
        "encode": {
            name: {
                "mb_per_s": size / statistics.median(took) / 1e6,
                "speed_over_tiktoken": statistics.median(a / b for a, b in zip(seconds[first], took, strict=True)),
                "seconds": took,
            }
            for name, took in seconds.items()
        },
        "device": device_name(device),
    }
    console.print(
        f"loader: {result['loader']['tokens_per_s'] / 1e6:.1f}M tokens/s from one core at context {seq_len}, "
        f"{result['times_the_appetite']:.0f} times the {APPETITE:,} of a 1B model on the fastest GPU (an estimate)"
    )
    shown = Table("one core", "MB/s", "speed over tiktoken", title=f"{size / 1e6:.1f} MB of {command.text}")
    for name, way in result["encode"].items():
        shown.add_row(name, f"{way['mb_per_s']:.2f}", f"{way['speed_over_tiktoken']:.2f}")
    console.print(shown)
    write_result(result, out, ("tiktoken",))
    console.print(f"wrote {out}", soft_wrap=True)
    return result


if __name__ == "__main__":
    command_line(Command, main)
