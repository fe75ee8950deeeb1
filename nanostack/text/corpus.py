"""A prepared folder out of text: documents in, shards of tokens and a manifest out.

`prepare(CorpusConfig(...))` reads the sources (nanostack.text.sources) once, in the order of their paths:

1. Hidden, binary, empty and repeated documents, and what is no UTF-8, are left out and counted.
2. With sources of its own for validation (`val`), all of their documents are for validation, and are left out of the others.
   Else a document is for validation if the leading 64 bits of the BLAKE2b hash of its text are below val_fraction: a text is
   always on the same side, whatever comes with it. If that leaves none, the document with the lowest hash is.
3. Documents, each followed by end-of-text and behind what the tokenizer begins a text with (--bos), are encoded by all
   cores, about a megabyte at a time.
4. Tokens go to shards in OUT.partial; `manifest.json` comes last; the folder is then renamed to OUT. A killed run
   leaves OUT as it was, and the next one clears away what it left.

The same sources and options give the same bytes, whatever the number of workers; the manifest names a dataset with its
commit. Memory does not grow with the corpus, but for 100 bytes per document, which it takes to find the repeated ones.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import tyro

from nanostack.errors import UserError
from nanostack.files import sync
from nanostack.text.encoding import encode
from nanostack.text.manifest import FORMAT, MANIFEST, SPLITS
from nanostack.text.sources import File, Reader, list_files, name_of
from nanostack.text.tokenizer import JSON_FILE, RANKS_FILE, Tokenizer, check_size, get, train

ALL = 1 << 64  # above every document's place between training and validation
BATCH = 1 << 20  # bytes of text that a worker gets at a time
SAMPLE = 1 << 26  # bytes of text that bpe:N is trained on at most
LIMITS = ("max_documents", "max_bytes")
OURS = re.compile(rf"({'|'.join(SPLITS)})_\d{{5,}}\.bin|{re.escape(MANIFEST)}|{re.escape(RANKS_FILE)}|{re.escape(JSON_FILE)}")


@dataclass(frozen=True)
class CorpusConfig:
    """Which text becomes which tokens, and where."""

    sources: tyro.conf.Positional[list[str]]
    """stdlib, site-packages, packages:FILE, folders, files: text, code, .jsonl (.gz, .zst), .parquet;
    hf:OWNER/NAME,name=...,split=..."""
    out: Path
    """folder for the tokens; must not exist yet"""
    tokenizer: str = "bpe:1024"
    """gpt2, cl100k_base, o200k_base, bytes, bpe:N (N entries, trained on the sources), a file of ranks, a tokenizer.json or
    a folder that has one, OWNER/NAME on Hugging Face's Hub, or a folder of prepared data; bpe:1024 suits 10 MB of text, more
    deserves a larger one"""
    bos: Literal["auto", "yes", "no"] = "auto"
    """whether a begin-of-text token stands before every document; auto: as the template of a tokenizer.json has it"""
    field: str = "text"
    """the field of JSON records, and the column of .parquet, that holds the text"""
    val: tuple[str, ...] = ()
    """sources of the validation text, as those of the rest: a benchmark's split, say; documents that stand on both sides are
    for validation alone"""
    val_fraction: float | None = None
    """share of the documents kept for validation where --val names none; 0.05 unless told, 0.001 is plenty for many GB"""
    max_documents: int | None = None
    """stop after so many documents, repeated ones not counted"""
    max_bytes: int | None = None
    """stop before the document with which the text would be longer; a token is 4 to 5 bytes of English"""
    keep_downloads: bool = True
    """keep the files of a dataset once they are read; without, they take the room of one, but a run that is broken off
    fetches all anew"""
    shard_tokens: int = 100_000_000
    """tokens per shard"""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """processes that encode; all cores unless told"""
    overwrite: bool = False
    """replace prepared data in --out, once the new is complete"""


def prepare(config: CorpusConfig) -> dict:
    """Write the folder config.out; returns its manifest. UserError, and nothing written, for what the user can mend."""
    _check_options(config)
    with _folder(config.out.resolve(), config.overwrite) as folder:
        skipped: Counter = Counter()
        listed = [list_files(source, skipped) for source in config.sources]
        files = list(itertools.chain.from_iterable(listed))
        listed_val = [list_files(source, skipped) for source in config.val]
        val_files = list(itertools.chain.from_iterable(listed_val))
        limits = {name: most for name in LIMITS if (most := getattr(config, name)) is not None}
        bound = 0 if config.val else int(_fraction(config) * 2**64)
        held_out: set[bytes] = set()
        for _ in Split(Reader(val_files, config.field), ALL, held_out):  # which puts their hashes there
            pass
        encoder, trained = _tokenizer(config, files, bound, held_out)
        splits, dropped, lowest = _write_shards(config, files, val_files, encoder, folder, bound, held_out)
        if not config.val and splits["train"]["documents"] > 1 and not splits["val"]["documents"]:
            _clear(folder)
            splits, dropped, _ = _write_shards(config, files, val_files, encoder, folder, lowest + 1, held_out)
        left_out = dict(sorted((skipped + dropped).items()))
        _check_documents(config, splits, left_out)
        manifest = {
            "format": FORMAT,
            "sources": [name_of(source, found) for source, found in zip(config.sources, listed, strict=True)],
            **_named_split(config, listed_val),
            **limits,
            "tokenizer": encoder.save(folder) | trained,
            "dtype": encoder.dtype.str,
            "splits": splits,
            "dropped": left_out,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _fraction(config: CorpusConfig) -> float:
    return 0.05 if config.val_fraction is None else config.val_fraction


def _named_split(config: CorpusConfig, listed_val: list[list[File]]) -> dict:
    """What the manifest says of the split."""
    if not config.val:
        return {"val_fraction": _fraction(config)}
    return {"val": [name_of(source, found) for source, found in zip(config.val, listed_val, strict=True)]}


def _check_options(config: CorpusConfig):
    if config.val and config.val_fraction is not None:
        raise UserError(
            "--val_fraction keeps documents of the sources for validation, and --val names others: give one of them"
        )
    if not 0 < _fraction(config) < 1:
        raise UserError(f"--val_fraction is a share of the documents between 0 and 1, not {config.val_fraction}")
    if min(config.shard_tokens, config.workers) < 1:
        raise UserError("--shard_tokens and --workers must be at least 1")
    for name in LIMITS:
        if (most := getattr(config, name)) is not None and most < 2:  # training and validation need a document each
            raise UserError(f"--{name} must be at least 2, not {most}")
    if not config.sources:
        raise UserError("name a source, such as stdlib; --help tells what there is")
    if config.tokenizer.startswith("bpe:"):
        n = config.tokenizer.removeprefix("bpe:")
        if not n.isdecimal():
            raise UserError(f"in --tokenizer bpe:N, N is a number of entries, as in bpe:1024, not {n!r}")
        check_size(int(n))
        if config.bos == "yes":
            raise UserError(f"{config.tokenizer} has no begin-of-text token to put before a text: leave out --bos yes")


def _check_documents(config: CorpusConfig, splits: dict, dropped: dict):
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing"
    left_out += "".join(f"; all above --{name} {getattr(config, name)}" for name in LIMITS if getattr(config, name))
    if config.val and not splits["val"]["documents"]:
        raise UserError(f"there is no text in --val {' '.join(config.val)} (left out: {left_out})")
    if config.val and not splits["train"]["documents"]:
        raise UserError(
            f"{' '.join(config.sources)} has no text that --val {' '.join(config.val)} has not (left out: {left_out}): "
            "nothing is left to train on"
        )
    documents = sum(entry["documents"] for entry in splits.values())
    if documents == 0:
        raise UserError(f"there is no text in {' '.join(config.sources)} (left out: {left_out})")
    if documents == 1:
        raise UserError(
            f"{' '.join(config.sources)} is a single document (left out: {left_out}), and training and validation "
            f"need one each; give more text, or the same in several files"
        )
    if not splits["train"]["documents"]:
        raise UserError(f"all {documents} documents went to validation; give more text or a smaller --val_fraction")


@contextlib.contextmanager
def _folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """OUT.partial, which becomes OUT if all goes well and disappears if not. Old data stay in OUT until that moment."""
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another prepare is writing {out} at this moment") from None
    if foreign := sorted(path.name for path in partial.iterdir() if not OURS.fullmatch(path.name)):
        os.close(lock)
        raise UserError(f"{partial}, where the data would be made, holds {foreign[0]}: move it away, or choose another --out")
    try:
        _clear(partial)
        if old.is_dir() and not out.exists():
            old.rename(out)  # a run was killed between the two renames below
        _check_out(out, overwrite)
        yield partial
        for path in [*(path for path in partial.iterdir() if path.suffix != ".bin"), partial]:
            sync(path)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _check_out(out: Path, overwrite: bool):
    if (out / MANIFEST).is_file():
        if not overwrite:
            raise UserError(f"{out} already holds prepared data; choose another --out, or replace it with --overwrite")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no prepared data; choose another --out")


def _clear(folder: Path):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _tokenizer(config: CorpusConfig, files: list[File], bound: int, held_out: set[bytes]) -> tuple[Tokenizer, dict]:
    """The tokenizer, with what to say of it in the manifest: bpe:N is trained on SAMPLE bytes at most, a share per file.

    Under a limit it is trained on the first SAMPLE bytes within, so that no other file of a dataset is fetched.
    """
    if not config.tokenizer.startswith("bpe:"):
        return get(config.tokenizer, config.bos), {}
    limits = [getattr(config, name) for name in LIMITS]
    by_hash = sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file.name)).digest())
    groups = [files] if any(limits) else [[file] for file in by_hash]  # with a limit, the text that is used comes first
    share = max(SAMPLE // max(1, len(groups)), 1 << 20)
    seen: set[bytes] = set()
    count = {"documents": 0, "bytes": 0}

    def sample() -> Iterator[str]:
        for group in groups:
            end = min(count["bytes"] + share, SAMPLE)
            for split, text, size in Split(Reader(group, config.field), bound, seen, held_out, *limits):
                if count["bytes"] + size > end:
                    break
                if split == "train":
                    count["documents"] += 1
                    count["bytes"] += size
                    yield text

    texts = sample()
    if (first := next(texts, None)) is None:
        return get("bytes"), {}  # nothing to train on: _check_documents will say why
    if sys.stderr.isatty():
        print(f"training {config.tokenizer} …", file=sys.stderr)
    return train(itertools.chain([first], texts), int(config.tokenizer.removeprefix("bpe:"))), {"trained_on": count}


def _write_shards(
    config: CorpusConfig,
    files: list[File],
    val_files: list[File],
    encoder: Tokenizer,
    folder: Path,
    bound: int,
    held_out: set[bytes],
) -> tuple[dict, Counter, int]:
    """Encode and write every document; returns (entry per split, what was dropped, the lowest hash of a document)."""
    reader, val_reader = (Reader(of, config.field, config.keep_downloads) for of in (files, val_files))
    documents = Split(reader, bound, set(), held_out, *(getattr(config, name) for name in LIMITS))
    val = Split(val_reader, ALL, set())
    shards = {split: Shards(folder, split, config.shard_tokens) for split in SPLITS}
    encoded = encode(_batches(itertools.chain(val, documents)), encoder, config.workers)
    with contextlib.closing(encoded), _progress(reader, sum(file.size for file in files)) as show:
        for split, tokens in encoded:
            shards[split].write(tokens)
            show()
    splits = {}
    for split, writer in shards.items():
        writer.close()
        tokens = sum(shard["tokens"] for shard in writer.entries)
        count = {"documents": documents.documents[split] + val.documents[split], "tokens": tokens}
        count["bytes"] = documents.bytes[split] + val.bytes[split]  # of text; each shard has those of its file
        splits[split] = count | {"shards": writer.entries}
    dropped_val = Counter({f"val_{reason}": count for reason, count in val_reader.dropped.items()})
    return splits, reader.dropped + dropped_val, documents.lowest


class Split:
    """Reads documents once, leaves out the empty, the repeated and those held out, and says on which side of the split each is.

    A document is for validation if its hash is below `bound`; the hashes of all go into `seen`. Ends after max_documents of
    both sides together, and before the one with which they would have more than max_bytes.
    """

    def __init__(
        self,
        reader: Reader,
        bound: int,
        seen: set[bytes],
        held_out: Collection[bytes] = (),
        max_documents: int | None = None,
        max_bytes: int | None = None,
    ):
        self.reader, self.bound, self.seen, self.held_out, self.lowest = reader, bound, seen, held_out, ALL
        self.max_documents, self.max_bytes = max_documents or float("inf"), max_bytes or float("inf")
        self.documents: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        for text in self.reader:
            try:
                data = text.encode()
            except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and no text can hold
                self.reader.dropped["not_utf8"] += 1
                continue
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if not data.strip():
                self.reader.dropped["empty"] += 1
            elif digest in self.held_out:
                self.reader.dropped["in_val"] += 1
            elif digest in self.seen:
                self.reader.dropped["duplicate"] += 1
            elif self.bytes.total() + len(data) > self.max_bytes:
                return
            else:
                self.seen.add(digest)
                place = int.from_bytes(digest[:8], "big")
                self.lowest = min(self.lowest, place)
                split = "val" if place < self.bound else "train"
                self.documents[split] += 1
                self.bytes[split] += len(data)
                yield split, text, len(data)
                if self.documents.total() >= self.max_documents:
                    return  # before the next document, which may take another download


def _batches(documents: Iterable[tuple[str, str, int]]) -> Iterator[tuple[str, list[str]]]:
    """Documents of one split each, BATCH bytes or a little more at a time."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, text, size in documents:
        texts[split].append(text)
        sizes[split] += size
        if sizes[split] >= BATCH:
            yield split, texts[split]
            texts[split], sizes[split] = [], 0
    yield from texts.items()


class Shards:
    """Writes the tokens of one split to files of `size` tokens, and describes them for the manifest."""

    def __init__(self, folder: Path, split: str, size: int):
        self.folder, self.split, self.size = folder, split, size
        self.entries: list[dict] = []
        self._file: BinaryIO | None = None

    def write(self, tokens: np.ndarray):
        while len(tokens):
            if self._file is None:
                self._file = open(self.folder / f"{self.split}_{len(self.entries):05d}.bin", "wb")  # noqa: SIM115
                self._hash, self._room = hashlib.sha256(), self.size
            piece, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(piece.data)
            self._hash.update(piece.data)
            self._room -= len(piece)
            if self._room == 0:
                self.close()

    def close(self):
        """Complete the file that is begun, if one is."""
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
            entry = {"file": Path(file.name).name, "tokens": self.size - self._room, "bytes": file.tell()}
        self.entries.append(entry | {"sha256": self._hash.hexdigest()})
        self._file = None


@contextlib.contextmanager
def _progress(reader: Reader, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("encoding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.update(task, completed=reader.position)
