"""Text to token ids and back: byte-pair encoding run by tiktoken, from ranks that are known, on disk, or trained here;
or, slower, a tokenizer.json run by Hugging Face's tokenizers.

A tokenizer is a table of ranks (bytes → id; the lower id merges first), a regular expression that cuts text into pieces
which no merge crosses, and special tokens, of which we use one: end-of-text, behind every document. Names:

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
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nanostack.errors import UserError
from nanostack.text import hub
from nanostack.text.translation import tokenizer_json

EOT = "<|endoftext|>"
RANKS_FILE = "tokenizer.tiktoken"
JSON_FILE = "tokenizer.json"
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
        self.ends = {self.eot}  # the ids at which a text ends
        self.begins = False  # whether a prompt goes behind what the tokenizer itself begins a text with
        # What tokenizer_config.json is to say: as GPT-2, one special token, which no text begins with
        self.config: dict = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT, "add_bos_token": False}
        self._bpe: Any = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.n_vocab = self._bpe.max_token_value + 1

    def encode(self, text: str) -> list[int]:
        return [token for part in _parts(text) for token in self._bpe.encode_ordinary(part)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to go on with."""
        return self.encode(text)

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
        self.config = {"bos_token": eot_token, "eos_token": eot_token, "unk_token": unknown}
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
        self.special, self.ends, self.begins = {eot_token: self.eot}, {self.eot}, False
        self._lengths = self._measured(vocab)
        if self.eot in self.encode(eot_token):
            raise UserError(f"{name} takes the text {eot_token!r} for the end of a document, so not every text can be encoded")

    def __reduce__(self):
        return JsonTokenizer, (self.name, self.data, self.eot_token)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt: those of `encode`, with `begins` behind those with which the tokenizer itself begins a text."""
        if not self.begins:
            return self.encode(text)
        ids = self._bpe.encode(text).ids
        return ids[:-1] if ids[-1:] == [self.eot] else ids

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        pieces = [np.array([*ids, self.eot], self.dtype) for ids in self.encode_batch(texts)]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return self._bpe.decode(ids.tolist() if hasattr(ids, "tolist") else list(ids))

    @property
    def token_bytes(self) -> np.ndarray:
        """(n_vocab,) int64 as in `Tokenizer`; where a normalizer changes text, the bytes of what it made of it.

        Llama 2's and its like put a space before every text, which its first token has and the text has not. End-of-text
        stands for −1 byte there, so that the sum over documents is right.
        """
        return self._lengths

    def _measured(self, vocab: dict[str, int]) -> np.ndarray:
        from tokenizers.pre_tokenizers import ByteLevel

        made = json.loads(self.data)
        decoder = made.get("decoder") or {}
        steps = {step.get("type") for step in (decoder, *decoder.get("decoders", ()))}
        if "ByteLevel" in steps:
            complete, fallback = vocab.keys() >= set(ByteLevel.alphabet()), None  # a character stands for a byte
        else:
            fallback = {f"<0x{byte:02X}>": 1 for byte in range(256)} if "ByteFallback" in steps else {}
            complete = bool(fallback) and made["model"].get("byte_fallback") and vocab.keys() >= fallback.keys()

        def length(token: str) -> int:
            return len(token) if fallback is None else fallback.get(token) or len(token.replace("▁", " ").encode())

        if not complete:
            raise UserError(f"{self.name} cannot encode every text: it has neither all 256 bytes nor a fallback to them")
        lengths = np.zeros(self.n_vocab, np.int64)
        lengths[list(vocab.values())] = [length(token) for token in vocab]
        for number, token in self._bpe.get_added_tokens_decoder().items():
            lengths[number] = 0 if token.special else len(token.content.encode())
        lengths[self.eot] = 0
        lengths[self.eot] = len("a") - lengths[self.encode("a")].sum()
        return lengths

    def to_json(self) -> bytes:
        return self.data

    def save(self, folder: str | Path) -> dict:
        """Write tokenizer.json to `folder` as it was; returns the manifest's entry, as `Tokenizer.save` does."""
        (Path(folder) / JSON_FILE).write_bytes(self.data)
        return {
            "name": self.name,
            "file": JSON_FILE,
            "sha256": hashlib.sha256(self.data).hexdigest(),
            "special": self.special,
            "eot": self.eot,
            "n_vocab": self.n_vocab,
            "config": self.config,
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
        return _from_folder(path, path.resolve().name)
    if path.is_file():
        return _from_file(path)
    if hub.is_name(name):
        folder = hub.model(name, [JSON_FILE, "tokenizer_config.json", "config.json"])
        return _from_folder(folder, f"{name.partition('@')[0]}@{folder.name}")
    raise UserError(f"there is no tokenizer {name!r}; known are {NAMES}")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that `nanostack prepare` wrote; needs no network. UserError if its ranks were changed."""
    from nanostack.text.manifest import load_manifest

    entry = load_manifest(folder)["tokenizer"]
    path = Path(folder) / entry["file"]
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is missing or is not the file its manifest describes; prepare the data again")
    if path.name == JSON_FILE:
        made = JsonTokenizer(entry["name"], path.read_bytes(), *entry["special"])
        made.config |= entry.get("config", {})
        return made
    return Tokenizer(entry["name"], entry["pattern"], _read_ranks(path), entry["special"])


def _from_folder(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of prepared data, or of a model of Hugging Face's."""
    if (folder / "manifest.json").is_file():
        return load(folder)
    if (folder / JSON_FILE).is_file():
        return _from_json(folder / JSON_FILE, name)
    old = "; transformers' AutoTokenizer makes one of its tokenizer.model" if (folder / "tokenizer.model").is_file() else ""
    raise UserError(f"{folder} holds neither a {JSON_FILE} nor prepared data{old}")


def _from_json(path: Path, name: str) -> JsonTokenizer:
    """End-of-text is the eos_token of tokenizer_config.json beside it, else EOT; a config.json there bounds the ids."""
    eot_token = _read_json(path.with_name("tokenizer_config.json")).get("eos_token") or EOT
    if isinstance(eot_token, dict):  # with its properties, as older versions wrote it
        eot_token = eot_token.get("content")
    made = JsonTokenizer(str(path), path.read_bytes(), str(eot_token))
    most = _read_json(path.with_name("config.json")).get("vocab_size") or made.n_vocab
    if made.n_vocab > most:
        raise UserError(f"{path} has ids up to {made.n_vocab - 1}, and the model beside it a vocabulary of {most}")
    made.name = name  # without the path: data are the same wherever the file lay
    made.config |= _own_config(path)
    return made


def _own_config(path: Path) -> dict:
    """What tokenizer_config.json beside a tokenizer.json says, but for files and code that are not taken along."""
    own = _read_json(path.with_name("special_tokens_map.json")) | _read_json(path.with_name("tokenizer_config.json"))
    own = {key: value for key, value in own.items() if key not in ("auto_map", "name_or_path", "tokenizer_file", "vocab_file")}
    if own.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for PreTrainedTokenizerFast
        del own["tokenizer_class"]
    named = {key: value["content"] for key, value in own.items() if isinstance(value, dict) and "content" in value}
    return own | named  # tokenizer.json itself has the properties of tokens


def _read_json(path: Path) -> dict:
    """The object in a file, {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not hold a JSON object: {error}") from None


def _from_file(path: Path) -> Tokenizer:
    """A file of ranks says nothing of the pattern: a manifest beside it does, else it is taken to be PATTERN."""
    manifest = path.parent / "manifest.json"
    if path.name in (RANKS_FILE, JSON_FILE) and manifest.is_file():
        return load(path.parent)
    if path.suffix == ".json":
        return _from_json(path, path.name)
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
        cause: BaseException = error
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
