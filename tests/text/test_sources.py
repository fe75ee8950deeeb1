"""Sources: which files they are, what documents are in them, and what is said of those that cannot be read."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import zstandard
from conftest import python
from hub_server import COMMIT, Hub

from nanostack.config import Optim
from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text.sources import LONGEST, Reader, list_files, name_of


def reader(source: Path, field: str = "text") -> Reader:
    return Reader(list_files(str(source), Counter()), field)


@pytest.mark.parametrize("unit", ["a line of text number %d\n", "字符没有换行%d"], ids=["lines", "one long line"])
def test_a_long_text_becomes_several_documents_that_join_to_it(tmp_path, unit):
    whole = "".join(unit % i for i in range(60_000))
    (tmp_path / "book.txt").write_bytes(whole.encode())
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(whole.encode()))
    book = reader(tmp_path / "book.txt")
    parts = list(book)
    assert "".join(parts) == whole and len(parts) > 4 and not book.dropped
    assert max(len(part.encode()) for part in parts) <= LONGEST
    assert list(reader(tmp_path / "book.txt.gz")) == parts


def test_link_to_a_file_is_read_as_its_own_name_says(tmp_path):
    """The Hub's cache is made of such links: to blobs/SHA, which has no suffix."""
    (tmp_path / "blob").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "part.jsonl").symlink_to("blob")
    assert list(reader(tmp_path / "part.jsonl")) == ["a", "b"]


def test_site_packages_are_the_installed_sources():
    names = {file.name for file in list_files("site-packages", Counter())}
    assert {"numpy/__init__.py", "tiktoken/core.py"} <= names
    assert not [name for name in names if "/tests/" in name or not name.endswith(".py")]


def test_packages_are_those_that_a_requirements_file_names(tmp_path):
    """The same files as of site-packages, under the same names; what is not installed is counted."""
    pins = tmp_path / "pins.txt"
    pins.write_text(
        f"# pins\nnumpy=={numpy.__version__}\n  tiktoken[a]>=0.9 ; python_version > '3'\nno-such-package\n-r other.txt\n"
    )
    dropped: Counter = Counter()
    found = list_files(f"packages:{pins}", dropped)
    everything = set(list_files("site-packages", Counter()))
    assert {file.name.split("/")[0] for file in found} >= {"numpy", "tiktoken"} and set(found) < everything
    assert dropped == {"package_not_installed": 1} and "numpy/__config__.py" not in {file.name for file in found}
    assert name_of(f"packages:{pins}", found) == "packages:pins.txt"
    pins.write_text("no-such-package==1\nnumpy == 0.0.1  # another\n")
    with pytest.raises(UserError, match=r"no package that .*pins\.txt names is installed with Python source"):
        list_files(f"packages:{pins}", Counter())
    pins.write_bytes(b"\xff\xfe")
    for path, why in ((pins, "can't decode"), (tmp_path / "gone.txt", "No such file")):
        with pytest.raises(UserError, match=f"{path.name}: no requirements file .*{why}"):
            list_files(f"packages:{path}", Counter())


def test_parquet_says_which_columns_there_are_and_how_to_read_it(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' \(there is id, body\)"):
        list(reader(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'id' is not text but a int"):
        list(reader(tmp_path / "a.parquet", field="id"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'nanostack\[data\]'"):
        list(reader(tmp_path / "a.parquet"))


@pytest.mark.parametrize("checked", [False, True])
def test_damaged_page_of_parquet_is_named_with_its_file(tmp_path, checked):
    """A page that cannot be unpacked; and one that can, with a byte another, where the file has checksums."""
    packing = {"compression": "none" if checked else "snappy", "write_page_checksum": checked, "use_dictionary": False}
    texts = [f"document {i} " * 20 for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", **packing)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    place = data.index(b"document 40") if checked else len(data) // 3
    data[place : place + 8] = b"xxxxxxxx"
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"^\S+/a\.parquet is damaged: .+$"):
        list(reader(tmp_path / "a.parquet"))


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample
  data_files:
  - split: train
    path: sample/*
---
"""
TEXTS = [f"document {i} of a dataset\n" * 400 for i in range(24)]
SMALL = """
from nanostack.commands import prepare
from nanostack.text import hub
hub.BLOCK = 1 << 12  # a small file comes in several blocks
prepare.run()
"""
READ = """
import json, sys
from collections import Counter
from nanostack.errors import UserError
from nanostack.text.sources import Reader, list_files
for source in sys.argv[2:]:
    try:
        print(json.dumps(list(Reader(list_files(source, Counter()), sys.argv[1]))))
    except UserError as error:
        print(error)
"""


@pytest.fixture
def hub(tmp_path):
    """own/web: parquet with a card, as FineWeb-Edu; own/slim: .jsonl.zst in folders named for splits, as SlimPajama."""
    web, slim = tmp_path / "hub/datasets/own/web", tmp_path / "hub/datasets/own/slim"
    for place, texts in (("sample", TEXTS), ("data/CC-1", ["crawled"])):
        (web / place).mkdir(parents=True)
        for i in range(3):
            table = pyarrow.table({"text": texts[i::3], "id": range(len(texts[i::3]))})
            pyarrow.parquet.write_table(table, web / place / f"00{i}.parquet", compression="none")
    (web / "README.md").write_text(CARD)
    for split, texts in (("train", TEXTS), ("validation", ["held out"])):
        for i in (0, 1, 10):
            lines = "".join(json.dumps({"text": text, "meta": {"set": "C4"}}) + "\n" for text in texts[i % 3 :: 3])
            path = slim / split / "chunk1" / f"example_{i}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zstandard.compress(lines.encode()))
    server = Hub(tmp_path / "hub")
    yield server
    server.shutdown()


def python_at(hub: Hub, *words: object) -> subprocess.CompletedProcess:
    """Run Python where `hub` is the Hub; what it downloads is kept in `home` beside its folder."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.folder.parent / "home"), "HF_HUB_OFFLINE": "0"}
    environment["HF_DATASETS_OFFLINE"] = "0"  # which other tests of this process may have set
    return python(*words, env=environment)


def prepared(hub: Hub, out: Path, *words: object, name: str = "bytes") -> dict:
    done = python_at(hub, "-c", SMALL, *words, "--out", out, "--tokenizer", name, "--workers", 1, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fetched(hub: Hub) -> list[tuple[str, str]]:
    """(name of the file, range) of every request for some of a file, in order."""
    return [(path.rpartition("/")[2], part.removeprefix("bytes=")) for _, path, part in hub.requests if part]


def test_a_dataset_of_the_hub_is_its_files_at_a_commit(hub, tmp_path):
    """The configuration and split choose them; what the manifest calls the source gives the same data again."""
    first = prepared(hub, tmp_path / "first", "hf:own/web,name=sample")
    assert first["sources"] == [f"hf:own/web@{COMMIT},name=sample"]
    plain = prepared(hub, tmp_path / "plain", hub.folder / "datasets/own/web/sample")
    assert plain["splits"] == first["splits"] and first["splits"]["train"]["bytes"] > 200_000
    again = prepared(hub, tmp_path / "again", *first["sources"])
    assert again["manifest_sha256"] == first["manifest_sha256"]
    assert len([part for _, part in fetched(hub) if part.startswith("0-")]) == 3, "fetched once, kept for the second time"


def test_folders_and_files_of_a_dataset_are_read_in_order(hub):
    done = python_at(hub, "-c", READ, "text", "hf:own/slim", "hf:own/slim,split=validation", "hf:own/web")
    train, held_out, default = (json.loads(line) for line in done.stdout.splitlines())
    assert train == [*TEXTS[0::3], *TEXTS[1::3], *TEXTS[1::3]] and set(held_out) == {"held out"} and default == ["crawled"]


def test_a_download_that_died_goes_on_where_it_stopped(hub, tmp_path):
    words = ["-c", SMALL, "hf:own/web,name=sample", "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1]
    hub.breaks_at = 40_000
    died = python_at(hub, *words)
    assert died.returncode == 2 and died.stderr.count("\n") == 1
    assert died.stderr.startswith(f"error: sample/000.parquet of hf:own/web@{COMMIT} could not be had from Hugging Face's Hub")
    assert "the same command goes on from there" in died.stderr
    assert not list(tmp_path.glob("out*"))
    kept = tmp_path / f"home/nanostack/own--web@{COMMIT}/sample"
    there = (kept / "000.parquet.partial").stat().st_size
    hub.breaks_at = None
    hub.requests.clear()
    assert there >= 40_000 and python_at(hub, *words).returncode == 0
    name, part = fetched(hub)[0]
    assert name == "000.parquet" and part.startswith(f"{there}-")
    for file in (hub.folder / "datasets/own/web/sample").iterdir():
        assert (kept / file.name).read_bytes() == file.read_bytes()
    assert len(list(kept.iterdir())) == 3, "no partial file is left"


DOWNLOAD = """
import sys
from nanostack.errors import UserError
from nanostack.text import hub
sys.stderr.isatty = lambda: True  # where one waits, one is told for what
repository, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
for wrong in (1, -1, 0, 0):
    try:
        print(hub.download(repository, path, size + wrong).name)
    except UserError as error:
        print(error)
"""


def test_a_file_of_another_length_than_the_hub_said_is_not_taken(hub):
    path = "sample/000.parquet"
    size = (hub.folder / "datasets/own/web" / path).stat().st_size
    done = python_at(hub, "-c", DOWNLOAD, f"own/web@{COMMIT}", path, size)
    came = f"{path} of hf:own/web@{COMMIT} came with {size:,} bytes instead of "
    wrong = [f"{came}{size + off:,}; fetch it again" for off in (1, -1)]
    assert done.stdout.splitlines() == [*wrong, "000.parquet", "000.parquet"], done.stderr
    assert done.stderr.count(f"fetching {path}") == 3 and len(fetched(hub)) == 2, "kept; too long, so thrown away; kept"


def test_a_limit_fetches_no_file_that_it_does_not_need(hub, tmp_path):
    words = ["hf:own/slim", "--max_documents", 8, "--val_fraction", 0.3]
    assert prepared(hub, tmp_path / "bytes", *words)["max_documents"] == 8
    assert prepared(hub, tmp_path / "bpe", *words, name="bpe:260")["tokenizer"]["trained_on"]["documents"] > 1
    assert {name for name, _ in fetched(hub)} == {"example_0.jsonl.zst"}


def test_files_of_a_dataset_need_not_be_kept(hub, tmp_path):
    words = ["hf:own/slim", "--val_fraction", 0.3]
    kept = prepared(hub, tmp_path / "kept", *words, name="bpe:260")
    folder = next((hub.folder.parent / "home/nanostack").glob("own--slim@*"))
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3
    assert prepared(hub, tmp_path / "not", *words, "--no_keep_downloads", name="bpe:260")["splits"] == kept["splits"]
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_mistakes_with_datasets_are_told_in_one_line(hub):
    (hub.folder / "datasets/own/table/data").mkdir(parents=True)
    (hub.folder / "datasets/own/table/data/train.csv").write_text("text\nhello\n")
    mistakes = {
        "hf:own/nothing": "hf:own/nothing could not be had from Hugging Face's Hub: Dataset 'own/nothing' doesn't exist",
        "hf:own/web@v9": "Revision 'v9' doesn't exist",
        "hf:own/web,name=other": "BuilderConfig 'other' not found. Available: ['default', 'sample']",
        "hf:own/web,split=test": "hf:own/web has no split 'test', only train",
        "hf:own/web,config=sample": "is not of the form hf:OWNER/NAME[@REVISION][,name=CONFIGURATION][,split=SPLIT]",
        "hf:web": "is not of the form",
        "hf:own/table": "hf:own/table holds data/train.csv; of datasets, parquet, jsonl and txt can be read",
        "hf:own/slim": "example_0.jsonl.zst, line 1: no field 'body' (there is text, meta); choose it with --field",
        "hf:own/web": "000.parquet: no column 'body' (there is text, id); choose it with --field",
    }
    done = python_at(hub, "-c", READ, "body", *mistakes)
    for line, (source, message) in zip(done.stdout.splitlines(), mistakes.items(), strict=True):
        assert message in line, (source, line)


def test_a_hub_that_is_not_there_gives_one_line(hub):
    hub.url = "http://127.0.0.1:9"
    done = python_at(hub, "-m", "nanostack", "prepare", "hf:own/web", "--out", "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: hf:own/web could not be had from Hugging Face's Hub: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_of_the_hub_is_imported_by_its_name(hub, tmp_path, file):
    place = hub.folder / "models/own/llama"
    place.parent.mkdir(parents=True)
    shape = LlamaConfig(n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=16, vocab_size=64, seq_len=16)
    export.save(State.create(shape, Optim(), Placement(torch.device("cpu")), 0), place, None)
    if file.endswith(".bin"):
        torch.save(safetensors.torch.load_file(place / "model.safetensors"), place / file)
        (place / "model.safetensors").unlink()
    done = python_at(hub, "-m", "nanostack", "import", "own/llama", tmp_path / "ckpt.pt", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["config"]["n_layer"] == 1, done.stderr
    assert not [
        path
        for method, path, _ in hub.requests
        if method == "GET" and path.endswith((".bin", ".safetensors")) and file not in path
    ]


def test_datasets_without_their_library_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"hf:own/web could not be had without datasets; pip install 'nanostack\[data\]'"):
        list_files("hf:own/web", Counter())
