"""Hugging Face's Hub: the files of a model, and those of a dataset, which are fetched one by one as they are read.

A repository is OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit of it. HF_ENDPOINT names another server that
speaks the Hub's protocol, HF_TOKEN (or `hf auth login`) says who asks. Models lie in the Hub's own cache, which works without
a network once they are there. Files of a dataset lie in HF_HOME/nanostack/OWNER--NAME@COMMIT, by their paths in the dataset: a
download that was cut off goes on at the byte where it stopped, whatever ended it, and the folder is a source by itself.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanostack.errors import UserError

BLOCK = 1 << 24  # bytes asked for at once


def is_name(source: str) -> bool:
    """Whether `source` could be a repository: OWNER/NAME, with @REVISION or without."""
    owner, slash, name = source.partition("@")[0].partition("/")
    return bool(slash and owner and name) and not owner.startswith((".", "~")) and "/" not in name


def model(source: str, patterns: list[str]) -> Path:
    """A folder with the files of a model that match `patterns`; its name is the commit. UserError if it cannot be had."""
    repository, _, revision = source.partition("@")
    with _errors_told(f"{source} is neither a file nor a folder here, and", "hf"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))


def dataset(source: str, name: str | None, split: str) -> tuple[str, dict[str, int]]:
    """(OWNER/NAME@COMMIT, {path in the dataset: bytes}) of a split. UserError if there is none or the Hub is out of reach.

    name: a configuration of the dataset's own, such as sample-10BT. Which files belong to it, its card or their paths tell:
    the rules are those of Hugging Face's `datasets`, which is asked.
    """
    repository, _, revision = source.partition("@")
    with _errors_told(f"hf:{source}", "data"):
        import datasets
        from huggingface_hub import HfFileSystem

        datasets.disable_progress_bars()
        builder = datasets.load_dataset_builder(repository, name, revision=revision or None)
        splits = {str(key): urls for key, urls in (builder.config.data_files or {}).items()}
        if split not in splits:
            raise UserError(f"hf:{source} has no split {split!r}, only {', '.join(splits)}")
        names = [url.removeprefix("hf://") for url in splits[split]]
        files, folders = HfFileSystem(), sorted({name.rpartition("/")[0] for name in names})
        entries: list[Any] = [entry for folder in folders for entry in files.ls(folder)]
        sizes = {entry["name"]: entry["size"] for entry in entries}
        pinned = "/".join(names[0].split("/")[1:3])
        return pinned, {name.removeprefix(f"datasets/{pinned}/"): sizes[name] for name in names}


def download(repository: str, path: str, size: int) -> Path:
    """The file `path` of a dataset OWNER/NAME@COMMIT on this machine, fetched if it is not there. UserError if that fails."""
    with _errors_told(f"{path} of hf:{repository}", "data", "; what has come is kept, and the same command goes on from there"):
        from huggingface_hub import HfFileSystem, constants

        file = Path(constants.HF_HOME) / "nanostack" / repository.replace("/", "--") / path
        if file.is_file():
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        if sys.stderr.isatty():
            print(f"fetching {path}, {size / 1e6:,.0f} MB …", file=sys.stderr)
        with open(partial, "ab") as sink:
            fcntl.flock(sink, fcntl.LOCK_EX)  # another prepare may be fetching it
            if file.is_file():
                partial.unlink(missing_ok=True)
                return file
            with HfFileSystem().open(f"datasets/{repository}/{path}", block_size=BLOCK) as source:
                source.seek(sink.seek(0, os.SEEK_END))
                while block := source.read(BLOCK):
                    sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
            if (come := sink.tell()) != size:
                if come > size:
                    partial.unlink()
                raise UserError(f"{path} of hf:{repository} came with {come:,} bytes instead of {size:,}; fetch it again")
            partial.rename(file)
        return file


@contextlib.contextmanager
def _errors_told(what: str, extra: str, then: str = "") -> Iterator[None]:
    """One line for whatever goes wrong on the way to the Hub: of its libraries, the network, the disk."""
    if not sys.stderr.isatty():  # in a terminal it is good to see what one waits for
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{what} could not be had without {error.name}; pip install 'nanostack[{extra}]'") from None
    except Exception as error:
        raise UserError(f"{what} could not be had from Hugging Face's Hub: {_reason(error)}{then}") from None


def _reason(error: Exception) -> str:
    known = {
        "GatedRepoError": "its owner wants you to accept conditions on its page, and to show who you are with: hf auth login",
        "RepositoryNotFoundError": "there is no such repository, or none that you may see without: hf auth login",
        "RevisionNotFoundError": "it has no such revision",
        "EntryNotFoundError": "it has no such file",
    }
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return known.get(type(error).__name__) or (lines[0].rstrip(".") if lines else type(error).__name__)
