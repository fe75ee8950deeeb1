"""Text to token ids and back: byte-pair encoding run by tiktoken, from ranks that are known, on disk, or trained here.

A tokenizer is a table of ranks (bytes → id; the lower id merges first), a regular expression that cuts text into pieces
which no merge crosses, and special tokens, of which we use one: end-of-text, behind every document. Names:

    gpt2, cl100k_base, o200k_base, …   tiktoken's own; the ranks are downloaded once and kept in TIKTOKEN_CACHE_DIR
    bytes                              256 bytes and end-of-text
    bpe:N                              N entries in all, end-of-text last, trained on the corpus by rustbpe
    a path                             a file of ranks in tiktoken's format, or a folder written by nanostack.prepare

rustbpe breaks ties by token ids, so the same texts give the same ranks whatever their order and the number of threads.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from nanostack.errors import UserError

EOT = "<|endoftext|>"
RANKS_FILE = "tokenizer.tiktoken"
NAMES = "gpt2, cl100k_base, o200k_base, bytes, bpe:N (as in bpe:1024), a file of ranks, or a folder of prepared data"

# The pieces of cl100k_base (GPT-4): words take the space or sign before them, numbers come in threes, indentation stays
# together. Written as in rustbpe, so that training and encoding cut alike.
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
BYTES_PATTERN = r"[\s\S]{1,64}"  # nothing merges, so any piece will do, and long ones are five times as fast

# tiktoken's regular expressions panic after a million backtracking steps, which a run of a million spaces takes. Longer
# texts go in parts, cut between a letter and a space before a letter, where all the patterns above cut anyway.
MAX_CHARS = 400_000
_SEAM = re.compile(r"[A-Za-z](?= [A-Za-z])")


class Tokenizer:
    """Encodes text to ids in [0, n_vocab) and back. Text that looks like a special token is encoded as plain text."""

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]):
        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, special
        self.eot = special[EOT]
        self.ends = {self.eot}  # the ids at which a text ends
        self._bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.n_vocab = self._bpe.max_token_value + 1

    def encode(self, text: str) -> list[int]:
        return [token for part in _parts(text) for token in self._bpe.encode_ordinary(part)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """All documents in one array of `dtype`, each followed by end-of-text."""
        pieces = []
        for text in texts:
            pieces += [self._bpe.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
            pieces.append(np.array([self.eot], np.uint32))
        return np.concatenate(pieces).astype(self.dtype) if pieces else np.zeros(0, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a cut inside a character) come out as U+FFFD."""
        return self._bpe.decode(ids.tolist() if hasattr(ids, "tolist") else list(ids))

    @property
    def dtype(self) -> np.dtype:
        """Little-endian, the narrowest that holds every id."""
        return np.dtype("<u2" if self.n_vocab <= 1 << 16 else "<u4")

    @property
    def token_bytes(self) -> np.ndarray:
        """(n_vocab,) int64: the bytes of text each id stands for; 0 for special tokens and ids nothing has."""
        lengths = np.zeros(self.n_vocab, np.int64)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths

    def save(self, folder: str | Path) -> dict:
        """Write the ranks to `folder`; returns the manifest's entry, from which `load` makes the same tokenizer."""
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        data = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
        (Path(folder) / RANKS_FILE).write_bytes(data)
        return {
            "name": self.name,
            "file": RANKS_FILE,
            "sha256": hashlib.sha256(data).hexdigest(),
            "pattern": self.pattern,
            "special": self.special,
            "eot": self.eot,
            "n_vocab": self.n_vocab,
        }


def train(texts: Iterable[str], n: int) -> Tokenizer:
    """A tokenizer of `n` entries, end-of-text included, fitted to `texts`. UserError if they hold too little for n."""
    import rustbpe

    check_size(n)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((part for text in texts for part in _parts(text)), n - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < n - 1:
        raise UserError(
            f"the text has only enough repetition for bpe:{len(ranks) + 1}, not bpe:{n}; give more text or a smaller N"
        )
    return Tokenizer(f"bpe:{n}", PATTERN, ranks, {EOT: n - 1})


def check_size(n: int):
    if n < 257:
        raise UserError(f"bpe:{n} is too small: 256 bytes and end-of-text make at least bpe:257")


def get(name: str) -> Tokenizer:
    """The tokenizer called `name` (see the top of the file); bpe:N needs `train`. UserError if there is none."""
    path = Path(name)
    if name == "bytes":
        return Tokenizer("bytes", BYTES_PATTERN, {bytes([byte]): byte for byte in range(256)}, {EOT: 256})
    if name in tiktoken.list_encoding_names():
        return _download(name)
    if path.is_dir():
        return load(path)
    if path.is_file():
        return _from_file(path)
    raise UserError(f"there is no tokenizer {name!r}; known are {NAMES}")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that nanostack.prepare wrote; needs no network. UserError if its ranks were changed."""
    from nanostack.data import load_manifest  # data imports this module

    entry = load_manifest(folder)["tokenizer"]
    path = Path(folder) / entry["file"]
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is missing or is not the file its manifest describes; prepare the data again")
    return Tokenizer(entry["name"], entry["pattern"], _read_ranks(path), entry["special"])


def _from_file(path: Path) -> Tokenizer:
    """A file of ranks says nothing of the pattern: a manifest beside it does, else it is taken to be PATTERN."""
    manifest = path.parent / "manifest.json"
    if path.name == RANKS_FILE and manifest.is_file():
        return load(path.parent)
    ranks = _read_ranks(path)
    return Tokenizer(path.name, PATTERN, ranks, {EOT: max(ranks.values()) + 1})


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is not a file of ranks (lines of base64 bytes, a space, the rank): {error}") from None
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} lacks some of the 256 single bytes, so it cannot encode every text")
    if len(ranks) != len(lines) or len(set(ranks.values())) != len(lines) or min(ranks.values()) < 0:
        raise UserError(f"{path} gives two ranks to one token, one rank to two, or a negative rank")
    return ranks


def _download(name: str) -> Tokenizer:
    try:
        bpe = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        cause = error
        while cause.__context__:  # what was wrong lies under three layers of retrying
            cause = cause.__context__
        raise UserError(
            f"the ranks of {name} could not be fetched ({type(cause).__name__}: {cause}). Let TIKTOKEN_CACHE_DIR name a "
            f"folder where another machine's tiktoken has put them, or use bpe:N or bytes, which need no network"
        ) from None
    special = {EOT: bpe.eot_token} | bpe._special_tokens
    return Tokenizer(name, bpe._pat_str, bpe._mergeable_ranks, special)


def _parts(text: str) -> Iterator[str]:
    """`text` itself, or parts of at most MAX_CHARS characters."""
    start = 0
    while len(text) - start > MAX_CHARS:
        seam = _SEAM.search(text, start + MAX_CHARS * 9 // 10, start + MAX_CHARS)
        stop = seam.end() if seam else start + MAX_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text
