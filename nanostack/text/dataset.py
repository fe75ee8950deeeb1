"""Prepared tokens to batches.

1. A folder written by nanostack.text.corpus: `manifest.json` and shards of little-endian token ids, memory-mapped.
2. The shards of a split, end to end, are one stream of n_tokens. Block b is the seq_len + 1 tokens from b · seq_len on,
   so that every token but the first is a target exactly once; a block may lie in several shards.
3. Sample n is a block of epoch n // n_blocks. Which one, a permutation keyed by (seed, epoch) says: a Feistel network,
   computed for the samples at hand, so nothing is stored and any sample is found at once.
4. A batch is the range of samples [start, stop): a pure function of (data, seed, start, stop). Ranks take sub-ranges.
5. A thread keeps the next batches ready, in pinned memory where there is a GPU.
"""

import contextlib
import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanostack import files
from nanostack.errors import UserError
from nanostack.text import tokenizer
from nanostack.text.manifest import SPLITS, load_manifest

if TYPE_CHECKING:
    import torch  # not at run time: `nanostack prepare` starts its workers without it

VERIFIED = ".verified.json"
CHUNK = 1 << 24  # bytes read at once when checking a shard


def verify(path: str | Path) -> None:
    """Read every shard once: size, SHA-256, no id outside the vocabulary. UserError naming the first that does not fit.

    What fitted is remembered in the folder by size and time of change, so that 200 GB are not read at every start.
    """
    folder, manifest = Path(path), load_manifest(path)
    tokenizer.load(folder)
    dtype, n_vocab = np.dtype(manifest["dtype"]), manifest["tokenizer"]["n_vocab"]
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    known = _read_verified(folder)
    marks = {shard["file"]: _check_size(folder / shard["file"], shard, dtype) for shard in shards}
    unread = [shard for shard in shards if known.get(shard["file"]) != marks[shard["file"]]]
    if not unread:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, _progress(len(unread)) as advance:
        checks = [pool.submit(_check_content, folder / shard["file"], shard, dtype, n_vocab) for shard in unread]
        try:
            for check in as_completed(checks):
                check.result()
                advance()
        finally:
            pool.shutdown(cancel_futures=True)
    # A folder that is read-only is checked every time.
    with contextlib.suppress(OSError), files.replacing(folder / VERIFIED) as file:
        json.dump(marks, file, indent=1)


def _read_verified(folder: Path) -> dict:
    try:
        known = json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _check_size(file: Path, shard: dict, dtype: np.dtype) -> dict:
    """The mark of a shard that fits, to be remembered: its size, its time of change, and the hash that it then had."""
    if not file.is_file():
        raise UserError(f"shard {file} is missing; prepare the data again")
    stat, size = file.stat(), shard["tokens"] * dtype.itemsize
    if stat.st_size != size:
        raise UserError(f"shard {file} has {stat.st_size:,} bytes, its manifest says {size:,}; prepare the data again")
    return {"size": size, "changed_ns": [stat.st_mtime_ns, stat.st_ctime_ns], "sha256": shard["sha256"]}


def _check_content(file: Path, shard: dict, dtype: np.dtype, n_vocab: int):
    digest, highest = hashlib.sha256(), 0
    with open(file, "rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
            highest = max(highest, int(np.frombuffer(chunk, dtype).max()))
    if digest.hexdigest() != shard["sha256"]:
        raise UserError(f"shard {file} does not have the SHA-256 of its manifest: it was changed; prepare the data again")
    if highest >= n_vocab:
        raise UserError(f"shard {file} holds token id {highest}, outside the vocabulary of {n_vocab}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator:
    """A bar on a terminal, after two seconds, for what takes that long."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task, timer = bar.add_task("checking shards", total=total), threading.Timer(2, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda: bar.advance(task)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


class Tokens:
    """One split as numbered samples of seq_len + 1 tokens. UserError if it has not even one.

    n_tokens, n_blocks (samples in an epoch), vocab_size, seq_len, manifest are plain attributes.
    """

    def __init__(self, path: str | Path, split: str, seq_len: int, seed: int = 0):
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}; there are {' and '.join(SPLITS)}")
        self.path, self.split, self.seq_len, self.seed = Path(path), split, seq_len, seed
        self.manifest = load_manifest(path)
        self.vocab_size: int = self.manifest["tokenizer"]["n_vocab"]
        dtype, shards = np.dtype(self.manifest["dtype"]), self.manifest["splits"][split]["shards"]
        for shard in shards:
            _check_size(self.path / shard["file"], shard, dtype)
        self._shards = [np.memmap(self.path / shard["file"], dtype, "r") for shard in shards if shard["tokens"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self.n_tokens = int(self._ends[-1]) if self._shards else 0
        self.n_blocks = max(0, self.n_tokens - 1) // seq_len
        if self.n_blocks == 0:
            raise UserError(
                f"the {split} split of {path} has {self.n_tokens:,} tokens, not one block of seq_len + 1 = "
                f"{seq_len + 1:,}; choose a smaller seq_len, or prepare more text or a larger --val_fraction"
            )

    def batch(self, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) in the order of training: (stop - start, seq_len + 1) int64."""
        samples = np.arange(start, stop, dtype=np.uint64)
        epochs, places = np.divmod(samples, np.uint64(self.n_blocks))
        return self._gather(permute(places, self.n_blocks, self.seed, epochs))

    def blocks(self, start: int, stop: int) -> np.ndarray:
        """Blocks [start, stop) in the order of the text, for validation: (stop - start, seq_len + 1) int64."""
        if not 0 <= start <= stop <= self.n_blocks:
            raise IndexError(f"blocks [{start}, {stop}) of {self.n_blocks}")
        return self._gather(np.arange(start, stop, dtype=np.uint64))

    def epoch(self, sample: int) -> float:
        """How often the split has been read when `sample` samples have."""
        return sample / self.n_blocks

    @property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text per token id, 0 for end-of-text: from loss per token to loss per byte."""
        return tokenizer.load(self.path).token_bytes

    def _gather(self, blocks: np.ndarray) -> np.ndarray:
        out = np.empty((len(blocks), self.seq_len + 1), np.int64)
        starts = blocks.astype(np.int64) * self.seq_len
        for row, start, shard in zip(out, starts.tolist(), np.searchsorted(self._ends, starts, "right").tolist(), strict=True):
            place = start - int(self._ends[shard]) + len(self._shards[shard])
            filled = 0
            while filled < len(row):  # once, unless the block goes on in the next shard
                piece = self._shards[shard][place : place + len(row) - filled]
                row[filled : filled + len(piece)] = piece
                filled, shard, place = filled + len(piece), shard + 1, 0
        return out


def permute(x: np.ndarray, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """A permutation of 0..n-1 keyed by (seed, epoch), applied to x (any length, uint64); epoch may be one per element.

    A balanced Feistel network permutes 0..4^k - 1 for the smallest 4^k ≥ n; a value that falls outside n walks on
    through the network until it is inside, at most four steps on average (Black and Rogaway, Ciphers with Arbitrary
    Finite Domains, 2002).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    key = _mix(_mix(np.full(x.shape, seed & (1 << 64) - 1, np.uint64)) ^ np.asarray(epoch, np.uint64))
    out, outside = np.array(x, np.uint64), np.ones(x.shape, bool)
    while outside.any():
        out[outside] = _feistel(out[outside], np.uint64(half), key[outside])
        outside = out >= n
    return out


def _feistel(x: np.ndarray, half: np.uint64, key: np.ndarray) -> np.ndarray:
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low_bits
    for turn in range(1, 9):
        left, right = right, left ^ (_mix(right ^ key * np.uint64(2 * turn + 1)) & low_bits)
    return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit of x, on every platform."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Prefetcher:
    """Batches of `tokens` for the ranges (start, stop), in order, prepared up to `depth` ahead by a thread. Ranges are of
    samples, shuffled for training, or without `shuffle` of blocks in the order of the text.

    Yields (tokens_BT, targets_BT): int64 tensors on the CPU, or on the CUDA `device`, where they are copied from pinned
    memory on a stream of their own while earlier batches are worked on. An error in the thread is raised where its batch would
    have come. `close`, or leaving a `with`, ends the thread.
    """

    def __init__(
        self,
        tokens: Tokens,
        ranges: Iterable[tuple[int, int]],
        depth: int = 2,
        device: "torch.device | None" = None,
        shuffle: bool = True,
    ):
        self._read, self._ranges = tokens.batch if shuffle else tokens.blocks, ranges
        self._device = device if device is not None and device.type == "cuda" else None
        self._ready: queue.Queue = queue.Queue(maxsize=max(1, depth))
        self._stream: torch.cuda.Stream | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> "tuple[torch.Tensor, torch.Tensor]":
        if self._closed:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        pair, copied = item
        if copied is not None:
            import torch

            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for half in pair:
                half.record_stream(stream)  # its memory is the other stream's: not to be given away before this one is done
        return pair

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:  # room for the one batch the thread may be holding; then it sees that it is done
                self._ready.get_nowait()
        self._thread.join()

    def _work(self):
        try:
            for start, stop in self._ranges:
                batch = self._tensors(start, stop)
                if self._closed:
                    return
                self._ready.put(batch)
                if self._closed:
                    return
            end: BaseException = StopIteration()
        except BaseException as error:
            end = error
        if not self._closed:
            self._ready.put(end)

    def _tensors(self, start: int, stop: int) -> "tuple[tuple[torch.Tensor, torch.Tensor], torch.cuda.Event | None]":
        """The batch, and the event after which it is on the device."""
        import torch

        batch = torch.from_numpy(self._read(start, stop))
        pair = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        if self._device is None:
            return pair, None
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            tokens_BT, targets_BT = (half.pin_memory().to(self._device, non_blocking=True) for half in pair)
            copied = torch.cuda.Event()
            copied.record()
        return (tokens_BT, targets_BT), copied
