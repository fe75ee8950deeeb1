"""Text to tokens: `nanostack prepare SOURCE... --out DIR --tokenizer NAME`.

A source is a folder, a file, a dataset of Hugging Face's, packages, or one of two words (a folder of that name is ./stdlib):

    stdlib          the Python standard library on this machine, without tests and tables: 10 MB that need no network
    site-packages   the Python source of what is installed beside this package, for larger runs
    packages:FILE   the Python source of the packages that a requirements file names: with pinned versions the same text on
                    every machine that has them (Triton's is for Linux only)
    hf:OWNER/NAME   a dataset of the Hub, as in hf:HuggingFaceFW/fineweb-edu,name=sample-10BT,split=train (the split unless
                    told); hf:OWNER/NAME@COMMIT pins it. Its files are fetched when their turn comes and kept
                    (nanostack.text.hub), or, with --no_keep_downloads, deleted when they have been read
    *.jsonl         one document per line, in --field; so are .ndjson, .jsonlines, .jl, .ldjson, and under any other name files
                    whose first two lines are objects. The first one must have the field, those that lack it are counted
    *.json          one array of objects: one document per object, in --field. An array of anything else is left out and
                    counted; one object is a document if it has text in --field, else text, as a program's settings
    *.parquet       one document per row, in the column --field
    anything else   plain text or code; a file is a document, a long one several (cut at line ends, see sources.LONGEST)

.gz and .zst are unpacked on the way. Then, in one pass and in the order of the paths:

1. Hidden, binary, empty and repeated documents, and what is no UTF-8, are left out and counted.
2. With --val SOURCE..., all documents of these sources are for validation, and are left out of the others. Else a document is
   for validation if the leading 64 bits of the BLAKE2b hash of its text are below --val_fraction: a text is always on the
   same side, whatever comes with it. If that leaves none, the document with the lowest hash is.
3. Documents, each followed by end-of-text and behind what the tokenizer begins a text with (--bos), are encoded by all
   cores, about a megabyte at a time.
4. Tokens go to shards in OUT.partial; `manifest.json` comes last; the folder is then renamed to OUT. A killed run
   leaves OUT as it was, and the next one clears away what it left.

--max_documents and --max_bytes end the text early; of a dataset, only the files that this takes are fetched. docs/data.md has
recipes.

The same sources and options give the same bytes, whatever the number of workers; the manifest names a dataset with its
commit. Memory does not grow with the corpus, but for 100 bytes per document, which it takes to find the repeated ones.
"""

import signal
import sys
import time
from dataclasses import dataclass

from nanostack.errors import UserError, command_line
from nanostack.text.corpus import CorpusConfig, prepare
from nanostack.text.manifest import manifest_sha256


@dataclass(frozen=True)
class Command(CorpusConfig):
    """Text to tokens."""

    json: bool = False
    """print one JSON object on standard output, and nothing else there"""


def main(command: Command) -> dict:
    start = time.perf_counter()
    try:
        manifest = prepare(command)
    except KeyboardInterrupt:
        print(f"interrupted; {command.out} is as it was before", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else f"writing {command.out}: "
        raise UserError(where + (error.strerror or str(error))) from None
    seconds = time.perf_counter() - start
    if not command.json:
        report(command, manifest, seconds)
    return {"out": str(command.out), "manifest_sha256": manifest_sha256(command.out), "seconds": seconds} | manifest


def report(command: Command, manifest: dict, seconds: float) -> None:
    splits = manifest["splits"]
    for split, entry in splits.items():
        print(
            f"{split:>5}: {entry['tokens']:>13,} tokens, {entry['bytes']:>13,} bytes, {entry['documents']:>9,} "
            f"documents, {len(entry['shards'])} shards"
        )
    tokens, size = (sum(entry[key] for entry in splits.values()) for key in ("tokens", "bytes"))
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()) or "nothing"
    print(f"{command.out}: {size / tokens:.2f} bytes per token, left out: {left_out}; {seconds:.1f} s")


def run() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit clears away what was begun
    command_line(Command, main, __doc__)
