"""What a prepared folder says of itself: `manifest.json`, with the hash of every shard and of the tokenizer."""

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np

from nanostack.errors import UserError

FORMAT = "nanostack-tokens-1"
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
ADVISED = {  # by the name of a folder: a source and a tokenizer
    "stdlib": ("stdlib", "bpe:1024"),
    "stdlib512": ("stdlib", "bpe:512"),
    "site-packages512": ("site-packages", "bpe:512"),
    "packages512": ("packages:constraints.txt", "bpe:512"),
    "prose512": ("data/prose", "bpe:512"),
}


def advised(path: str | Path) -> tuple[str, str]:
    """A source and a tokenizer that suit a folder of this name."""
    source, tokenizer = ADVISED.get(Path(path).name, ("SOURCE...", "bpe:32000"))
    there = not source.startswith("packages:") or Path(source.removeprefix("packages:")).is_file()  # a clone has it
    return source if there else "stdlib", tokenizer


def load_manifest(path: str | Path) -> dict:
    """The manifest of the prepared data in folder `path`. UserError if there is none, or it is damaged or not ours."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        what, name = advised(path)
        raise UserError(
            f"there is no prepared data in {path}; write it with: "
            f"nanostack prepare {what} --out {shlex.quote(str(path))} --tokenizer {name}"
        )
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(f"{file} is of format {manifest['format']!r}, this version reads {FORMAT!r}; prepare it again")
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                str(shard["file"]), int(shard["tokens"]), str(shard["sha256"])
        np.dtype(manifest["dtype"]), int(manifest["tokenizer"]["n_vocab"]), int(manifest["tokenizer"]["eot"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); prepare the data again") from None
    return manifest


def manifest_sha256(path: str | Path) -> str:
    """What names this data in checkpoints and logs: the manifest holds the hash of every shard and of the tokenizer."""
    load_manifest(path)
    return hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest()
