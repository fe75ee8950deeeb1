"""Sources to documents: the files that a source stands for, and the texts in them.

`list_files` finds the files of a source, in the order of their names; `Reader` iterates over the documents of files.
`nanostack prepare --help` lists sources, kinds of files and what is left out. A file is read piece by piece: what is held
at a time is LONGEST bytes of plain text, a line or an element of JSON, or 256 rows of .parquet.
"""

import codecs
import gzip
import io
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from nanostack.errors import UserError
from nanostack.text import hub, records
from nanostack.text.manifest import MANIFEST
from nanostack.text.tokenizer import JSON_FILE, RANKS_FILE

LONGEST = 1 << 18  # bytes of a document made of plain text: far above any seq_len, and a book still gives several
LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl", ".ldjson")  # suffixes of JSON lines
PACKAGES = "packages:"
REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[.*?\])?\s*(?:==\s*([^\s;,*]+)\s*(?:[;#]|$))?")  # name, pin
OF_A_BUILD = {"version.py", "_version.py", "__config__.py"}  # which say how a package was built, and where
NOT_CODE = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data"}


class File(NamedTuple):
    path: Path  # on this machine, or in `repository`
    name: str  # path in the source, with / on every system: the order and bpe:N's sample depend on it
    size: int
    repository: str = ""  # OWNER/NAME@COMMIT of the dataset that it is fetched from when it is read


def list_files(source: str, dropped: Counter) -> list[File]:
    """The files of a source, sorted by name; counts in `dropped` what is left out. UserError if the source is missing."""
    if source.startswith("hf:"):
        return _dataset_files(source)
    if source.startswith(PACKAGES):
        paths = _of_packages(Path(source.removeprefix(PACKAGES)), dropped)
    elif source in ("stdlib", "site-packages"):
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
        path = Path(source).absolute()  # a link keeps its name, which says what it holds: the Hub's cache is made of links
        paths = [(path.parent, path)]
    else:
        raise UserError(
            f"there is no source {source!r}: it is no file, no folder, not the word stdlib or site-packages; packages are "
            f"written packages:requirements.txt, and a dataset of Hugging Face's hf:OWNER/NAME"
        )
    files = [File(path, path.relative_to(root).as_posix(), path.stat().st_size) for root, path in paths]
    return sorted(files, key=lambda file: file.name)


def _of_packages(requirements: Path, dropped: Counter) -> list[tuple[Path, Path]]:
    """(root, path) of the Python source of the packages that a requirements file names. A package that is not installed, or
    in another version than the file pins with ==, is counted as left out."""
    try:
        lines = requirements.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{requirements}: no requirements file ({getattr(error, 'strerror', None) or error})") from None
    pins = {found[1]: found[2] for line in lines if (found := REQUIREMENT.match(line))}
    paths = []
    for name, pin in sorted(pins.items()):
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            dropped["package_not_installed"] += 1
            continue
        if pin not in (None, package.version, package.version.partition("+")[0]):
            dropped["package_of_another_version"] += 1
            continue
        inside = [file for file in package.files or () if file.suffix == ".py" and file.name not in OF_A_BUILD]
        inside = [file for file in inside if not NOT_CODE & set(file.parts)]
        places = [(Path(str(file.locate())).resolve(), file) for file in inside if ".." not in file.parts]
        paths += [(path.parents[len(file.parts) - 1], path) for path, file in places if path.is_file()]
    if not paths:
        raise UserError(f"no package that {requirements} names is installed with Python source; give a folder of text instead")
    return paths


def _dataset_files(source: str) -> list[File]:
    repository, *options = source.removeprefix("hf:").split(",")
    chosen = dict(option.partition("=")[::2] for option in options)
    if not hub.is_name(repository) or not all(chosen.values()) or not chosen.keys() <= {"name", "split"}:
        raise UserError(f"{source!r} is not of the form hf:OWNER/NAME[@REVISION][,name=CONFIGURATION][,split=SPLIT]")
    pinned, found = hub.dataset(repository, chosen.get("name"), chosen.get("split", "train"))
    files = [File(Path(path), path, size, pinned) for path, size in sorted(found.items())]
    if unknown := [file.name for file in files if _kind(file)[0] not in (*LINES, ".json", ".parquet", ".txt")]:
        raise UserError(f"{source} holds {unknown[0]}; of datasets, parquet, jsonl and txt can be read, also as .gz and .zst")
    return files


def name_of(source: str, files: list[File]) -> str:
    """What a manifest calls a source: a path by its last part, a dataset with its commit, so that it names the same bytes."""
    if source.startswith(PACKAGES):
        return PACKAGES + Path(source.removeprefix(PACKAGES)).name
    if source.startswith("hf:"):
        return ",".join(["hf:" + files[0].repository, *source.split(",")[1:]])
    return Path(source).resolve().name if Path(source).exists() else source


def _kind(file: File) -> tuple[str, str | None]:
    """(what the name says that a file holds, how it is packed), as suffixes."""
    suffixes = [suffix.lower() for suffix in file.path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else None
    return suffixes[-1] if suffixes else "", packing


def _walk(root: Path, dropped: Counter, skip: Iterable[str] = ()) -> Iterator[Path]:
    def stop(error: OSError):
        raise error  # os.walk passes over folders it cannot read; a corpus must not lose them unseen

    for folder, folders, names in os.walk(root, onerror=stop):
        if MANIFEST in names and (RANKS_FILE in names or JSON_FILE in names):  # tokens, ours
            dropped["prepared_data"] += 1
            folders.clear()
            continue
        hidden = [name for name in folders + names if name.startswith(".")]
        links = [name for name in folders if name not in hidden and (Path(folder) / name).is_symlink()]
        broken = [name for name in names if name not in hidden and not (Path(folder) / name).is_file()]
        dropped.update(hidden=len(hidden), linked_folder=len(links), not_a_file=len(broken))
        folders[:] = [name for name in folders if name not in hidden and name not in skip]
        yield from (Path(folder) / name for name in names if name not in hidden and name not in broken)


class Reader:
    """Iterates over the documents of `files`; counts what it leaves out; `position` is how many bytes it has read.

    keep: whether files of a dataset stay on this machine when they have been read to their end.
    """

    def __init__(self, files: Iterable[File], field: str, keep: bool = True):
        self.files, self.field, self.keep, self.position = files, field, keep, 0
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        done = 0
        for file in self.files:
            path = hub.download(file.repository, file.name, file.size) if file.repository else file.path
            try:
                with open(path, "rb") as raw:
                    for text in self._documents(path, file, raw):
                        self.position = done + min(raw.tell(), file.size)
                        yield text
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is damaged or cut short: {error}") from None
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            if file.repository and not self.keep:
                path.unlink(missing_ok=True)  # another prepare may have done it
            done += file.size
            self.position = done

    def _documents(self, path: Path, file: File, raw: BinaryIO) -> Iterator[str]:
        kind, packing = _kind(file)
        if kind == ".parquet" and not packing:
            yield from self._parquet(path)
            return

        def opened() -> BinaryIO:
            raw.seek(0)
            return _unpacked(raw, packing)

        form = "lines" if kind in LINES else records.form(opened, kind == ".json", self.field)
        if form == "text" and file.repository and kind == ".json":
            form = "lines"  # a dataset has no settings
        yield from self._plain(opened()) if form == "text" else self._records(opened(), path, form)

    def _plain(self, stream: BinaryIO) -> Iterator[str]:
        tail, first = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8), True
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

    def _records(self, stream: BinaryIO, path: Path, form: str) -> Iterator[str]:
        """The texts of records. The first one tells whether the field is there; a later one may lack it, and is counted."""
        unit, first, others = "line" if form == "lines" else "record", True, 0
        for number, record in _numbered(stream, path, form):
            where = f"{path}, {unit} {number}"
            if form == "array" and not isinstance(record, dict) and first:
                others += 1
                continue
            if others:
                raise UserError(
                    f"{path}, record 1: no object, and record {number} is one: of an array all are records, or none"
                )
            if not isinstance(record, dict) or (first and self.field not in record):
                there = ", ".join(record) or "nothing" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise UserError(f"{where}: no field {self.field!r} (there is {there}); choose it with --field")
            first = False
            if self.field in record:
                yield self._text(record[self.field], where)
            else:
                self.dropped["without_field"] += 1
        if others:
            self.dropped["array_of_no_records"] += 1

    def _parquet(self, path: Path) -> Iterator[str]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: reading parquet takes pyarrow; pip install 'nanostack[data]'") from None
        try:
            table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            if self.field not in table.schema_arrow.names:
                there = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path}: no column {self.field!r} (there is {there}); choose it with --field")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield self._text(value, f"{path}, row {row}")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # an OSError where a page cannot be unpacked
            raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None

    def _text(self, value: object, where: str) -> str:
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {self.field!r} is not text but a {type(value).__name__}; choose another --field")
        return value or ""


def _last_character(block: bytes) -> int:
    """The offset of the last character of `block`, which may be cut off: a text without line ends is cut there."""
    return next((i for i in range(len(block) - 1, len(block) - 5, -1) if block[i] & 0xC0 != 0x80), len(block))


def _numbered(stream: BinaryIO, path: Path, form: str) -> Iterator[tuple[int, object]]:
    """(its number, what it holds) of each line that is not empty, or of each element of an array."""
    number = 0
    try:
        if form == "lines":
            for number, line in enumerate(stream, 1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    yield number, records.decode(line)
        elif form == "record":
            yield 1, records.first_value(stream.read().decode("utf-8-sig", "surrogatepass"))[0]
        else:
            for number, record in enumerate(records.elements(stream), 1):
                yield number, record
    except ValueError as error:
        where = f"line {number}: not JSON ({error})" if form == "lines" else f"behind record {number}: not JSON"
        raise UserError(f"{path}, {where}") from None


def _unpacked(raw: BinaryIO, packing: str | None) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packing == ".gz" else _unzstd(raw) if packing else raw


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
