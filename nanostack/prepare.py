"""Text to tokens: `python -m nanostack.prepare SOURCE... --out DIR --tokenizer NAME`.

A source is a folder, a file, or one of two words (a folder of that name is ./stdlib):

    stdlib          the Python standard library on this machine, without tests and tables: 10 MB that need no network
    site-packages   the Python source of what is installed beside this package, for larger runs
    *.jsonl         one document per line, in --field
    *.parquet       one document per row, in the column --field
    anything else   plain text or code; a file is a document, a long one several (cut at line ends, see LONGEST)

.gz and .zst are unpacked on the way. Then, in one pass and in the order of the paths:

1. Hidden, binary, empty and repeated documents, and what is no UTF-8, are left out and counted.
2. A document is for validation if the leading 64 bits of the BLAKE2b hash of its text are below --val_fraction: a text
   is always on the same side, whatever comes with it. If that leaves none, the document with the lowest hash is.
3. Documents, each followed by end-of-text, are encoded by all cores, about a megabyte at a time.
4. Tokens go to shards in OUT.partial; `manifest.json` comes last; the folder is then renamed to OUT. A killed run
   leaves OUT as it was, and the next one clears away what it left.

The same sources and options give the same bytes, whatever the number of workers. Memory does not grow with the corpus,
but for 100 bytes per document, which it takes to find the repeated ones.
"""

import contextlib
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tyro

from nanostack.data import FORMAT, MANIFEST, SPLITS, manifest_sha256
from nanostack.errors import UserError, exits_cleanly
from nanostack.tokenizer import RANKS_FILE, Tokenizer, check_size, get, train

LONGEST = 1 << 18  # bytes of a document made of plain text: far above any seq_len, and a book still gives several
BATCH = 1 << 20  # bytes of text that a worker gets at a time
SAMPLE = 1 << 26  # bytes of text that bpe:N is trained on at most
NOT_CODE = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data"}


class File(NamedTuple):
    path: Path
    name: str  # path in the source, with / on every system: the order and bpe:N's sample depend on it
    size: int


# ---- sources to files ----


def list_files(source: str, dropped: Counter) -> list[File]:
    """The files of a source, sorted by name; counts in `dropped` what is left out. UserError if the source is missing."""
    if source in ("stdlib", "site-packages"):
        keys = ("stdlib",) if source == "stdlib" else ("purelib", "platlib")
        roots = sorted({Path(sysconfig.get_path(key)).resolve() for key in keys})
        walks = [(root, _walk(root, Counter(), NOT_CODE)) for root in roots]
        paths = [(root, path) for root, walk in walks for path in walk if path.suffix == ".py"]
        if not paths:
            raise UserError(f"there is no Python source in {', '.join(map(str, roots))}; give a folder of text instead")
    elif Path(source).is_dir():
        root = Path(source).resolve()
        paths = [(root, path) for path in _walk(root, dropped)]
    elif Path(source).is_file():
        path = Path(source).resolve()
        paths = [(path.parent, path)]
    else:
        raise UserError(f"there is no source {source!r}: it is no file, no folder, and not the word stdlib or site-packages")
    files = [File(path, path.relative_to(root).as_posix(), path.stat().st_size) for root, path in paths]
    return sorted(files, key=lambda file: file.name)


def _walk(root: Path, dropped: Counter, skip: Iterable[str] = ()) -> Iterator[Path]:
    def stop(error: OSError):
        raise error  # os.walk passes over folders it cannot read; a corpus must not lose them unseen

    for folder, folders, names in os.walk(root, onerror=stop):
        if MANIFEST in names and RANKS_FILE in names:  # tokens, ours
            dropped["prepared_data"] += 1
            folders.clear()
            continue
        hidden = [name for name in folders + names if name.startswith(".")]
        links = [name for name in folders if name not in hidden and (Path(folder) / name).is_symlink()]
        broken = [name for name in names if name not in hidden and not (Path(folder) / name).is_file()]
        dropped.update(hidden=len(hidden), linked_folder=len(links), not_a_file=len(broken))
        folders[:] = [name for name in folders if name not in hidden and name not in skip]
        yield from (Path(folder) / name for name in names if name not in hidden and name not in broken)


# ---- files to documents ----


class Reader:
    """Iterates over the documents of `files`; counts what it leaves out; `position` is how many bytes it has read."""

    def __init__(self, files: Iterable[File], field: str):
        self.files, self.field, self.dropped, self.position = files, field, Counter(), 0

    def __iter__(self) -> Iterator[str]:
        done = 0
        for file in self.files:
            with open(file.path, "rb") as raw:
                for text in self._documents(file, raw):
                    self.position = done + min(raw.tell(), file.size)
                    yield text
            done += file.size
            self.position = done

    def _documents(self, file: File, raw: BinaryIO) -> Iterator[str]:
        suffixes = [suffix.lower() for suffix in file.path.suffixes]
        packing = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else None
        kind = suffixes[-1] if suffixes else ""
        if kind == ".parquet" and not packing:
            yield from self._parquet(file.path)
            return
        stream = gzip.GzipFile(fileobj=raw) if packing == ".gz" else _unzstd(raw) if packing else raw
        try:
            yield from self._jsonl(stream, file.path) if kind == ".jsonl" else self._plain(stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file.path} is damaged or cut short: {error}") from None

    def _plain(self, stream: BinaryIO) -> Iterator[str]:
        tail, first = b"", True
        while (block := tail + stream.read(LONGEST - len(tail))) or first:
            cut = len(block) if len(block) < LONGEST else block.rfind(b"\n") + 1 or _last_character(block)
            block, tail = block[:cut], block[cut:]
            try:
                text, reason = block.decode(), "binary" if b"\0" in block else ""
            except UnicodeDecodeError:
                reason = "not_utf8"
            if not reason:
                yield text
            else:
                self.dropped[reason] += 1
                if first:  # no text at all
                    return
            first = False

    def _jsonl(self, stream: BinaryIO, path: Path) -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or self.field not in record:
                there = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
                raise UserError(f"{path}, line {number}: no field {self.field!r} (there is {there}); choose it with --field")
            yield self._text(record[self.field], f"{path}, line {number}")

    def _parquet(self, path: Path) -> Iterator[str]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: reading parquet takes pyarrow; pip install 'nanostack[data]'") from None
        try:
            table = pyarrow.parquet.ParquetFile(path)
            if self.field not in table.schema_arrow.names:
                there = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path}: no column {self.field!r} (there is {there}); choose it with --field")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield self._text(value, f"{path}, row {row}")
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged: {error}") from None

    def _text(self, value: object, where: str) -> str:
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {self.field!r} is not text but a {type(value).__name__}; choose another --field")
        return value or ""


def _last_character(block: bytes) -> int:
    """Where the last character of `block` begins, which may be cut off: the place to cut a text without line ends."""
    return next((i for i in range(len(block) - 1, len(block) - 5, -1) if block[i] & 0xC0 != 0x80), len(block))


def _unzstd(raw: BinaryIO) -> BinaryIO:
    """A stream of the unpacked bytes; zstandard's own ends quietly where a file was cut short, this with EOFError."""
    import zstandard

    class Unpacked(io.RawIOBase):
        frame, packed, ready = None, b"", b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            while not self.ready:
                self.packed = self.packed or raw.read(1 << 16)
                if not self.packed and self.frame:
                    raise EOFError("the last zstd frame has no end")
                if not self.packed:
                    return 0
                self.frame = self.frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    self.ready = self.frame.decompress(self.packed)
                except zstandard.ZstdError as error:
                    raise EOFError(error) from None
                self.packed = self.frame.unused_data if self.frame.eof else b""
                self.frame = None if self.frame.eof else self.frame
            n = min(len(buffer), len(self.ready))
            buffer[:n], self.ready = self.ready[:n], self.ready[n:]
            return n

    return io.BufferedReader(Unpacked(), 1 << 20)


# ---- documents to shards ----


class Shards:
    """Writes the tokens of one split to files of `size` tokens, and describes them for the manifest."""

    def __init__(self, folder: Path, split: str, size: int, dtype: np.dtype):
        self.folder, self.split, self.size, self.dtype = folder, split, size, dtype
        self.tokens = 0
        self.done: list[dict] = []
        self._file: BinaryIO | None = None

    def write(self, tokens: np.ndarray):
        while len(tokens):
            if self._file is None:
                self._file = open(self.folder / f"{self.split}_{len(self.done):05d}.bin", "wb")  # noqa: SIM115
                self._hash, self._room = hashlib.sha256(), self.size
            piece, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(piece.data)
            self._hash.update(piece.data)
            self._room -= len(piece)
            self.tokens += len(piece)
            if self._room == 0:
                self._end_file()

    def _end_file(self):
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        count = self.size - self._room
        entry = {"file": Path(self._file.name).name, "tokens": count, "bytes": count * self.dtype.itemsize}
        self.done.append(entry | {"sha256": self._hash.hexdigest()})
        self._file = None

    def close(self) -> list[dict]:
        """The manifest's entries of the files."""
        if self._file is not None:
            self._end_file()
        return self.done


class Split:
    """Reads documents once, leaves out the empty and the repeated, and says on which side of the split each one is."""

    def __init__(self, reader: Reader, bound: int, seen: set[bytes] | None = None):
        self.reader, self.bound, self.lowest = reader, bound, 1 << 64
        self.seen = set() if seen is None else seen
        self.documents, self.bytes = Counter(), Counter()

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        seen, dropped = self.seen, self.reader.dropped
        for text in self.reader:
            try:
                data = text.encode()
            except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and no text can hold
                dropped["not_utf8"] += 1
                continue
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if not data.strip():
                dropped["empty"] += 1
            elif digest in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(digest)
                place = int.from_bytes(digest[:8], "big")
                self.lowest = min(self.lowest, place)
                split = "val" if place < self.bound else "train"
                self.documents[split] += 1
                self.bytes[split] += len(data)
                yield split, text, len(data)


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


def _encode(batches: Iterable[tuple[str, list[str]]], encoder: Tokenizer, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """(split, its documents) to (split, their tokens), in order; in `workers` processes, or here if that is one.

    Each worker has a pipe of its own and one batch at a time, so memory is bounded, and the end of a process at either
    end of the pipe is seen at the other: no worker outlives a killed parent, no parent waits for a killed worker.
    """
    if workers == 1:
        yield from ((split, encoder.encode_documents(texts)) for split, texts in batches)
        return
    started: list[Process] = []
    busy: deque[tuple[Connection, str]] = deque()

    def oldest() -> tuple[Connection, str, np.ndarray]:
        pipe, split = busy.popleft()
        return pipe, split, np.frombuffer(pipe.recv_bytes(), encoder.dtype)

    try:
        for split, texts in batches:
            if len(busy) < workers:
                pipe = _start_worker(encoder, started)
            else:
                pipe, *result = oldest()
                yield tuple(result)
            pipe.send(texts)
            busy.append((pipe, split))
        while busy:
            yield oldest()[1:]
    except (EOFError, ConnectionError):
        raise UserError("a worker process was killed, perhaps for want of memory; try fewer --workers") from None
    finally:
        for process in started:
            process.kill()
            process.join()


def _start_worker(encoder: Tokenizer, started: list[Process]) -> Connection:
    ours, theirs = multiprocessing.Pipe()
    resource_tracker.ensure_running()  # of multiprocessing itself; its start unblocks the signals blocked below
    # Spawned, for a fork would copy rustbpe's threads half alive; and with the signals blocked, which it inherits, since
    # Ctrl-C in a terminal goes to every process and is for this one to answer.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(encoder, theirs), daemon=True)
        started.append(process)
        process.start()
        theirs.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return ours


def _work(encoder: Tokenizer, pipe: Connection):
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is done, or gone
        while True:
            pipe.send_bytes(encoder.encode_documents(pipe.recv()))


def write_shards(args: "Args", files: list[File], encoder: Tokenizer, folder: Path, bound: int) -> tuple[dict, Counter, int]:
    """Encode and write every document; returns (entry per split, what was dropped, the lowest hash of a document)."""
    reader = Reader(files, args.field)
    documents = Split(reader, bound)
    shards = {split: Shards(folder, split, args.shard_tokens, encoder.dtype) for split in SPLITS}
    encoded = _encode(_batches(documents), encoder, args.workers)
    with contextlib.closing(encoded), _progress(reader, sum(file.size for file in files)) as show:
        for split, tokens in encoded:
            shards[split].write(tokens)
            show()
    splits = {}
    for split, writer in shards.items():
        count = {"documents": documents.documents[split], "tokens": writer.tokens, "bytes": documents.bytes[split]}
        splits[split] = count | {"shards": writer.close()}  # bytes of text here, bytes of the file in each shard
    return splits, reader.dropped, documents.lowest


@contextlib.contextmanager
def _progress(reader: Reader, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("encoding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.update(task, completed=reader.position)


# ---- the whole ----


@dataclass
class Args:
    sources: tyro.conf.Positional[list[str]]
    """stdlib, site-packages, folders, files: text, code, .jsonl (.gz, .zst), .parquet"""
    out: Path
    """folder for the tokens; must not exist yet"""
    tokenizer: str = "bpe:1024"
    """gpt2, cl100k_base, o200k_base, bytes, bpe:N (N entries, trained on the sources), a file of ranks, or a folder of
    prepared data; bpe:1024 suits 10 MB of text, more deserves a larger one"""
    field: str = "text"
    """the field of .jsonl and column of .parquet that holds the text"""
    val_fraction: float = 0.05
    """share of the documents kept for validation; 0.001 is plenty for many GB"""
    shard_tokens: int = 100_000_000
    """tokens per shard"""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """processes that encode; all cores unless told"""
    overwrite: bool = False
    """replace prepared data in --out, once the new is complete"""
    json: bool = False
    """print one JSON object on standard output, and nothing else there"""


def prepare(args: Args) -> dict:
    """Write the folder args.out; returns its manifest. UserError, and nothing written, for what the user can mend."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction is a share of the documents between 0 and 1, not {args.val_fraction}")
    if min(args.shard_tokens, args.workers) < 1:
        raise UserError("--shard_tokens and --workers must be at least 1")
    if not args.sources:
        raise UserError("name a source, such as stdlib; --help tells what there is")
    trained = args.tokenizer.startswith("bpe:")
    if trained:
        if not args.tokenizer[4:].isdecimal():
            raise UserError(f"in --tokenizer bpe:N, N is a number of entries, as in bpe:1024, not {args.tokenizer[4:]!r}")
        check_size(int(args.tokenizer[4:]))
    with _folder(args.out.resolve(), args.overwrite) as folder:
        skipped: Counter = Counter()
        files = [file for source in args.sources for file in list_files(source, skipped)]
        bound = int(args.val_fraction * 2**64)
        encoder, sample = _train(args, files, bound) if trained else (get(args.tokenizer), None)
        splits, dropped, lowest = write_shards(args, files, encoder, folder, bound)
        if splits["train"]["documents"] > 1 and not splits["val"]["documents"]:
            _clear(folder)
            splits, dropped, _ = write_shards(args, files, encoder, folder, lowest + 1)
        dropped = {reason: count for reason, count in sorted((skipped + dropped).items()) if count}
        _check_documents(args, splits, dropped)
        entry = encoder.save(folder) | ({"trained_on": sample} if sample else {})
        manifest = {
            "format": FORMAT,
            "sources": [Path(source).resolve().name if Path(source).exists() else source for source in args.sources],
            "val_fraction": args.val_fraction,
            "tokenizer": entry,
            "dtype": encoder.dtype.str,
            "splits": splits,
            "dropped": dropped,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _train(args: Args, files: list[File], bound: int) -> tuple[Tokenizer, dict | None]:
    """bpe:N fitted to at most SAMPLE bytes of training documents: a share of each file, files in order of a hash."""
    share = max(SAMPLE // max(1, len(files)), 1 << 20)
    seen, count = set(), {"documents": 0, "bytes": 0}

    def sample() -> Iterator[str]:
        for file in sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file.name)).digest()):
            end = min(count["bytes"] + share, SAMPLE)
            for split, text, size in Split(Reader([file], args.field), bound, seen):
                if count["bytes"] + size > end:
                    break
                if split == "train":
                    count["documents"] += 1
                    count["bytes"] += size
                    yield text

    texts = sample()
    if (first := next(texts, None)) is None:
        return get("bytes"), None  # nothing to train on, nothing to encode: what follows says why
    if sys.stderr.isatty():
        print(f"training {args.tokenizer} …", file=sys.stderr)
    return train(itertools.chain([first], texts), int(args.tokenizer[4:])), count


def _check_documents(args: Args, splits: dict, dropped: dict):
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing"
    documents = sum(entry["documents"] for entry in splits.values())
    if documents == 0:
        raise UserError(f"there is no text in {' '.join(args.sources)} (left out: {left_out})")
    if documents == 1:
        raise UserError(
            f"{' '.join(args.sources)} is a single document (left out: {left_out}), and training and validation "
            f"need one each; give more text, or the same in several files"
        )
    if not splits["train"]["documents"]:
        raise UserError(f"all {documents} documents went to validation; give more text or a smaller --val_fraction")


@contextlib.contextmanager
def _folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """OUT.partial, which becomes OUT if all goes well and disappears if not. Old data stay in OUT until that moment."""
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another prepare is writing {out} at this moment") from None
    try:
        _clear(partial)
        if old.is_dir() and not out.exists():
            old.rename(out)  # a run was killed between the two renames below
        _check_out(out, overwrite)
        yield partial
        for path in (partial / RANKS_FILE, partial / MANIFEST, partial):
            _sync_path(path)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
        _sync_path(out.parent)
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


def _sync_path(path: Path):
    """Make a small file, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _report(args: Args, manifest: dict, seconds: float):
    splits = manifest["splits"]
    if args.json:
        print(json.dumps({"out": str(args.out), "manifest_sha256": manifest_sha256(args.out), "seconds": seconds} | manifest))
        return
    for split, entry in splits.items():
        print(
            f"{split:>5}: {entry['tokens']:>13,} tokens, {entry['bytes']:>13,} bytes, {entry['documents']:>9,} "
            f"documents, {len(entry['shards'])} shards"
        )
    tokens, size = (sum(entry[key] for entry in splits.values()) for key in ("tokens", "bytes"))
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()) or "nothing"
    print(f"{args.out}: {size / tokens:.2f} bytes per token, left out: {left_out}; {seconds:.1f} s")


def main():
    args = tyro.cli(Args, prog="python -m nanostack.prepare", description=__doc__, use_underscores=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is cleared away
    start = time.perf_counter()
    with exits_cleanly():
        try:
            _report(args, prepare(args), time.perf_counter() - start)
        except KeyboardInterrupt:
            print(f"interrupted; {args.out} is as it was before", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else f"writing {args.out}: "
            raise UserError(where + (error.strerror or str(error))) from None


if __name__ == "__main__":
    main()
