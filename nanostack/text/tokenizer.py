"""Text to token ids and back: byte-pair encoding run by tiktoken, from ranks that are known, on disk, or trained here;
or, slower, a tokenizer.json run by Hugging Face's tokenizers.

A tokenizer is a table of ranks (bytes → id; the lower id merges first), a regular expression that cuts text into pieces
which no merge crosses, and special tokens, of which we use end-of-text, behind every document, and begin-of-text, before it
where the template of a tokenizer.json says so (nanostack.text.bounds). Names:

    gpt2, cl100k_base, o200k_base, …   tiktoken's own; the ranks are downloaded once and kept in TIKTOKEN_CACHE_DIR
    bytes                              256 bytes and end-of-text
    bpe:N                              N entries in all, end-of-text last, trained on the corpus by rustbpe
    a path                             a file of ranks in tiktoken's format, a tokenizer.json, a folder that has one, or one
                                       written by `nanostack prepare`
    OWNER/NAME, OWNER/NAME@REVISION    a model on Hugging Face's Hub; its tokenizer is downloaded once

rustbpe breaks ties by token ids, so the same texts give the same ranks whatever their order and the number of threads.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nanostack.errors import UserError
from nanostack.text import hub, ranks
from nanostack.text.bounds import Bounds
from nanostack.text.tokenizer_json import (
    JSON_FILE,
    named_tokens,
    own_config,
    read_json,
    start_of,
    template_of,
    token_lengths,
    with_start,
)
from nanostack.text.translation import tokenizer_json

EOT = "<|endoftext|>"
RANKS_FILE = "tokenizer.tiktoken"
NAMES = (
    "gpt2, cl100k_base, o200k_base, bytes, bpe:N (as in bpe:1024), a file of ranks, a tokenizer.json, a folder of a model or "
    "of prepared data, and OWNER/NAME on Hugging Face's Hub"
)

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
        self.eot_token, self.eot = EOT, special[EOT]
        self.config: dict = {"unk_token": EOT}  # what tokenizer_config.json is to say beside: as GPT-2's
        self._bpe: Any = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.n_vocab = self._bpe.max_token_value + 1
        self.template: list[int] = []  # what it puts before a text of its own accord: ranks know of nothing
        self.follow(Bounds())

    def follow(self, bounds: Bounds) -> None:
        """Begin and end texts as a model does.

        start: ids before every text; prefix: stands for an empty one; ends: ids at which a text ends. UserError for a start
        that is none of the tokenizer's tokens.
        """
        self.start = list(self.template if bounds.start is None else bounds.start)
        if strange := [one for one in self.start if self.token(one) is None]:
            raise UserError(
                f"texts of the model begin with token {strange[0]}, and {self.name} has no such token to begin with"
            )
        self.prefix = bounds.prefix if bounds.prefix is not None else self.start[0] if self.start else self.eot
        self.ends = {self.eot, *bounds.ends}

    def token(self, number: int) -> str | None:
        """The special token of this id, as it stands in files of Hugging Face's."""
        return {one: token for token, one in self.special.items()}.get(number)

    def encode(self, text: str) -> list[int]:
        return [token for part in _parts(text) for token in self._bpe.encode_ordinary(part)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to go on with: those of `encode`, behind `start`."""
        return self.start + self.encode(text)

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """All documents in one array of `dtype`, each behind `start` and followed by end-of-text."""
        pieces = []
        for text in texts:
            pieces.append(np.array(self.start, np.uint32))
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

    def to_json(self) -> bytes:
        """The same ids as a tokenizer.json of Hugging Face's. UserError for a pattern that cannot be said there."""
        return tokenizer_json(self.name, self.pattern, self.ranks, self.special).encode()

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


class JsonTokenizer(Tokenizer):
    """The same interface for a tokenizer.json: the ids are those of `tokenizers` with no special tokens added.

    data: the content of the file; eot_token: the token that ends a document. Text that looks like a special token is plain
    text here too (what transformers calls split_special_tokens); decoding leaves special tokens out. UserError for a file that
    is damaged, that cannot encode every text (it must be byte-level, as GPT-2's and Llama 3's, or fall back to bytes, as Llama
    2's), or that lacks eot_token.
    """

    def __init__(self, name: str, data: bytes, eot_token: str):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{name}: a {JSON_FILE} takes tokenizers; pip install 'nanostack[hf]'") from None
        try:
            self._bpe = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library has no other class
            raise UserError(f"{name} is no {JSON_FILE} that the tokenizers library can read: {error}") from None
        self.name, self.data, self.eot_token = name, data, eot_token
        unknown = getattr(self._bpe.model, "unk_token", None) or eot_token
        self.config = {"unk_token": unknown}
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self._bpe.encode_special_tokens = True
        if getattr(self._bpe.model, "dropout", None):
            self._bpe.model.dropout = None  # merges left out at random, for training the old way
        vocab = self._bpe.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocab.values(), default=-1) + 1
        ids = len(set(vocab.values()))
        if ids < len(vocab) or self.n_vocab > 2 * ids:
            raise UserError(f"{name} is damaged: its {len(vocab)} tokens have {ids} ids up to {self.n_vocab - 1}")
        if eot_token not in vocab:
            raise UserError(f"{name} has no token {eot_token!r}, which is to end the documents (eos_token)")
        self.eot = vocab[eot_token]
        self.special = {eot_token: self.eot}
        self.bos: int | None = None  # what the files beside it name so
        self.template, behind = template_of(self._bpe)
        if behind not in ([], [self.eot]):
            raise UserError(
                f"the template of {name} puts {self.token(behind[0])!r} behind every text: only end-of-text is known"
            )
        self.follow(Bounds())
        self._lengths = token_lengths(name, self._bpe, data, self.n_vocab)
        self._lengths[[*self.template, self.eot]] = 0
        self._lengths[self.eot] = len("a") - self._lengths[self.encode("a")].sum()
        if self.eot in self.encode(eot_token):
            raise UserError(f"{name} takes the text {eot_token!r} for the end of a document, so not every text can be encoded")

    def __reduce__(self):
        return JsonTokenizer, (self.name, self.data, self.eot_token), {"start": self.start}

    def token(self, number: int) -> str | None:
        return self._bpe.id_to_token(number)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        pieces = [np.array([*self.start, *ids, self.eot], self.dtype) for ids in self.encode_batch(texts)]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return self._bpe.decode(ids.tolist() if hasattr(ids, "tolist") else list(ids))

    @property
    def token_bytes(self) -> np.ndarray:
        """(n_vocab,) int64 as in `Tokenizer`; where a normalizer changes text, the bytes of what it made of it.

        Llama 2's and its like put a space before every text, which its first token has and the text has not. End-of-text
        stands for −1 byte there, so that the sum over documents is right.
        """
        lengths = self._lengths.copy()
        lengths[[one for one in self.start if one != self.eot]] = 0
        return lengths

    def to_json(self) -> bytes:
        """The file as it was, with a template that does what `start` says."""
        if template_of(self._bpe) == (self.start, []):
            return self.data
        return with_start(self.data, [(self._bpe.id_to_token(one), one) for one in self.start])

    def save(self, folder: str | Path) -> dict:
        """Write tokenizer.json to `folder` as it was; returns the manifest's entry, as `Tokenizer.save` does."""
        if self.eot in self.start and self._lengths[self.eot]:  # which then stands twice in every document
            raise UserError(f"{self.name} begins and ends texts with one token, and its bytes cannot be counted: --bos no")
        (Path(folder) / JSON_FILE).write_bytes(self.data)
        entry = {
            "name": self.name,
            "file": JSON_FILE,
            "sha256": hashlib.sha256(self.data).hexdigest(),
            "special": self.special,
            "eot": self.eot,
            "n_vocab": self.n_vocab,
            "config": self.config,
        }
        return entry | ({"start": self.start} if self.start else {})


def train(texts: Iterable[str], n: int) -> Tokenizer:
    """A tokenizer of `n` entries, end-of-text included, fitted to `texts`. UserError if they hold too little for n."""
    import rustbpe

    check_size(n)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((part for text in texts for part in _parts(text)), n - 1, pattern=PATTERN)
    made = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(made) < n - 1:
        raise UserError(
            f"the text has only enough repetition for bpe:{len(made) + 1}, not bpe:{n}; give more text or a smaller N"
        )
    return Tokenizer(f"bpe:{n}", PATTERN, made, {EOT: n - 1})


def check_size(n: int):
    if n < 257:
        raise UserError(f"bpe:{n} is too small: 256 bytes and end-of-text make at least bpe:257")


def get(name: str, bos: str = "auto") -> Tokenizer:
    """The tokenizer called `name` (see the top of the file); bpe:N needs `train`. UserError if there is none.

    bos: `auto`, before every text stands what the tokenizer's template puts there; `no`, nothing; `yes`, its begin-of-text
    token also where the template has none. UserError where there is no such token.
    """
    found = _find(name)
    if bos == "no":
        found.follow(Bounds([]))
    elif bos == "yes" and not found.start:
        begin = found.bos if isinstance(found, JsonTokenizer) else None
        if begin is None and not found.template:
            raise UserError(
                f"the tokenizer {name} has no begin-of-text token (bos_token) to put before a text: leave out --bos yes"
            )
        found.follow(Bounds(found.template if begin is None else [begin]))
    return found


def _find(name: str) -> Tokenizer:
    path = Path(name)
    if name == "bytes":
        return Tokenizer("bytes", BYTES_PATTERN, {bytes([byte]): byte for byte in range(256)}, {EOT: 256})
    if name in tiktoken.list_encoding_names():
        bpe = ranks.fetched(name)
        return Tokenizer(name, bpe._pat_str, bpe._mergeable_ranks, {EOT: bpe.eot_token} | bpe._special_tokens)
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if path.is_file():
        return _from_file(path)
    if hub.is_name(name):
        folder = hub.model(name, [JSON_FILE, "tokenizer_config.json", "special_tokens_map.json", "config.json"])
        return _from_folder(folder, f"{name.partition('@')[0]}@{folder.name}")
    raise UserError(f"there is no tokenizer {name!r}; known are {NAMES}")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that `nanostack prepare` wrote; needs no network. UserError if its ranks were changed."""
    from nanostack.text.manifest import load_manifest

    manifest = load_manifest(folder)
    entry = manifest["tokenizer"]
    path = Path(folder) / entry["file"]
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is missing or is not the file its manifest describes; prepare the data again")
    if path.name == JSON_FILE:
        made = JsonTokenizer(entry["name"], path.read_bytes(), *entry["special"])
        made.config |= entry.get("config", {})
        made.follow(Bounds.of_data(manifest))
        return made
    return Tokenizer(entry["name"], entry["pattern"], ranks.read(path), entry["special"])


def _from_folder(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of prepared data, or of a model of Hugging Face's."""
    if (folder / "manifest.json").is_file():
        return load(folder)
    if (folder / JSON_FILE).is_file():
        return _from_json(folder / JSON_FILE, name)
    old = "; transformers' AutoTokenizer makes one of its tokenizer.model" if (folder / "tokenizer.model").is_file() else ""
    raise UserError(f"{folder} holds neither a {JSON_FILE} nor prepared data{old}")


def _from_json(path: Path, name: str) -> JsonTokenizer:
    """End-of-text is the eos_token that AutoTokenizer reads beside it, else EOT; a config.json there bounds the ids."""
    named = named_tokens(path.parent)
    made = JsonTokenizer(str(path), path.read_bytes(), EOT if named["eos_token"] is None else named["eos_token"])
    made.template = start_of(path.parent, made._bpe)
    made.follow(Bounds())
    made.bos = None if named["bos_token"] is None else made._bpe.token_to_id(named["bos_token"])
    most = read_json(path.with_name("config.json")).get("vocab_size") or made.n_vocab
    if made.n_vocab > most:
        raise UserError(f"{path} has ids up to {made.n_vocab - 1}, and the model beside it a vocabulary of {most}")
    made.name = name  # without the path: data are the same wherever the file lay
    made.config |= own_config(path.parent)
    return made


def _from_file(path: Path) -> Tokenizer:
    """A file of ranks says nothing of the pattern: a manifest beside it does, else it is taken to be PATTERN."""
    manifest = path.parent / "manifest.json"
    if path.name in (RANKS_FILE, JSON_FILE) and manifest.is_file():
        return load(path.parent)
    if path.suffix == ".json":
        return _from_json(path, path.name)
    found = ranks.read(path)
    return Tokenizer(path.name, PATTERN, found, {EOT: max(found.values()) + 1})


def _parts(text: str) -> Iterator[str]:
    """`text` itself, or parts of at most MAX_CHARS characters."""
    start = 0
    while len(text) - start > MAX_CHARS:
        seam = _SEAM.search(text, start + MAX_CHARS * 9 // 10, start + MAX_CHARS)
        stop = seam.end() if seam else start + MAX_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text
