"""English prose for a study, out of documentation that Debian ships: `python -m study.prose data/prose` writes a folder.

The packages are named with their versions and hashes, so the text is the same on every machine. Of their pages in HTML the
paragraphs are kept that are sentences: long enough, and made of letters for the most part; code and tables are left out.
27.8 MB; then: nanostack prepare data/prose --out data/prose512 --tokenizer bpe:512.
"""

import hashlib
import http.client
import io
import lzma
import shutil
import tarfile
import urllib.request
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import tyro
from rich.console import Console

from nanostack.errors import UserError, command_line

MIRROR = "http://deb.debian.org/debian/"
PACKAGES = {  # path on the mirror: SHA-256
    "pool/main/a/anarchism/anarchism_15.3-3_all.deb": "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "pool/main/l/linux/linux-doc-6.1_6.1.170-3_all.deb": "8a0e80e4f14407d0d96058b9eec7afa4ae57e6408d3f4e2bed35462d14b99342",
    "pool/main/p/postgresql-15/postgresql-doc-15_15.18-0+deb12u1_all.deb": (
        "3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0"
    ),
}
PARAGRAPHS = {"p", "li", "dd", "blockquote"}
NOT_PROSE = {"pre", "script", "style", "table", "nav", "head", "h1", "h2", "h3", "h4", "h5", "h6"}
SHORTEST, LETTERS = 80, 0.92  # characters of a paragraph; its share of letters, spaces and common stops


@dataclass(frozen=True)
class Command:
    """Fetch Debian's documentation, keep its prose."""

    out: tyro.conf.Positional[Path]
    """Folder for the text; must not exist yet."""
    packages: Path | None = None
    """Folder with the packages, if they are on this machine; else they are fetched."""
    json: bool = False
    """Print one JSON object; everything else goes to standard error."""


class Prose(HTMLParser):
    """Collects the paragraphs of a page that are sentences."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._text: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in NOT_PROSE
        if tag in PARAGRAPHS:
            self._end()

    def handle_endtag(self, tag):
        self._hidden -= tag in NOT_PROSE and self._hidden > 0
        if tag in PARAGRAPHS:
            self._end()

    def handle_data(self, data):
        if not self._hidden:
            self._text.append(data)

    def close(self):
        super().close()
        self._end()

    def _end(self):
        text = " ".join("".join(self._text).split())
        self._text = []
        plain = sum(c.isalpha() or c in " ,.'" for c in text)
        if len(text) >= SHORTEST and plain >= LETTERS * len(text) and text[-1] in ".!?:;\"'":
            self.found.append(text)


def main(command: Command) -> dict:
    console = Console(stderr=True, highlight=False)
    if command.out.exists():
        raise UserError(f"{command.out} is there already: remove it, or name another folder")
    packages = {}
    for path, sha256 in PACKAGES.items():
        name = path.rpartition("/")[2]
        console.print(name, soft_wrap=True)
        packages[name] = fetched(path, name, command.packages)
        if (got := hashlib.sha256(packages[name]).hexdigest()) != sha256:
            raise UserError(f"{name} has the SHA-256 {got}, not {sha256}: it is another file, or damaged")
    count = dict.fromkeys(packages, 0)
    partial = command.out.with_name(command.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, package in packages.items():
        for page, text in pages(package):
            place = partial / name.partition("_")[0] / f"{page}.txt"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
            count[name] += len(text.encode())
    partial.rename(command.out)
    console.print(f"{command.out}: {sum(count.values()) / 1e6:.1f} MB of prose")
    return {"out": str(command.out), "bytes": count}


def fetched(path: str, name: str, folder: Path | None) -> bytes:
    if folder is not None:
        if not (folder / name).is_file():
            raise UserError(f"there is no {name} in {folder}")
        return (folder / name).read_bytes()
    try:
        with urllib.request.urlopen(MIRROR + path, timeout=60) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(
            f"{MIRROR}{path} cannot be fetched ({error}); versions that Debian has replaced are on snapshot.debian.org: put "
            "the file into a folder, and name that with --packages"
        ) from error


def pages(package: bytes):
    """(name, prose) of each HTML page of a .deb that has any, in order; links are left out."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(member(package, b"data.tar.xz")))) as archive:
        for entry in sorted(archive.getmembers(), key=lambda entry: entry.name):
            file = archive.extractfile(entry) if entry.isfile() and entry.name.endswith(".html") else None
            if file is None:
                continue
            parser = Prose()
            parser.feed(file.read().decode(errors="replace"))
            parser.close()
            if parser.found:
                yield "-".join(Path(entry.name).with_suffix("").parts[4:]), "\n\n".join(parser.found) + "\n"


def member(package: bytes, name: bytes) -> bytes:
    """A file of an ar archive, which a .deb is: headers of 60 bytes, contents padded to even lengths."""
    at = len(b"!<arch>\n")
    while at < len(package):
        size = int(package[at + 48 : at + 58])
        if package[at : at + 16].rstrip(b" /") == name:
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise UserError(f"a package has no {name.decode()}")


if __name__ == "__main__":
    command_line(Command, main, __doc__)
