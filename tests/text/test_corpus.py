"""Preparing data: nothing lost, nothing twice, the same bytes every time, and nothing half-done that looks done."""

import gzip
import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nanostack.errors import UserError
from nanostack.text import corpus as module
from nanostack.text import encoding, tokenizer
from nanostack.text.corpus import CorpusConfig, prepare
from nanostack.text.dataset import verify
from nanostack.text.manifest import load_manifest, manifest_sha256

STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = sorted((STDLIB / "email").glob("*.py")) + sorted(STDLIB.glob("a*.py"))
TEXTS = sorted({path.read_text("utf-8") for path in FILES} - {""})


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder of forty files of real text."""
    folder = tmp_path / "texts"
    for i, text in enumerate(TEXTS):
        (folder / f"sub{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"sub{i % 3}" / f"{i:03d}.py").write_bytes(text.encode())
    return folder


def run(out: Path, *sources: Path | str, **options) -> dict:
    options = {"tokenizer": "bytes", "workers": 1} | ({} if "val" in options else {"val_fraction": 0.2}) | options
    return prepare(CorpusConfig(sources=[str(source) for source in sources], out=out, **options))


def documents(out: Path) -> dict[str, list[str]]:
    """The documents of each split, read back from the shards."""
    manifest, bpe, found = load_manifest(out), tokenizer.load(out), {}
    for split, entry in manifest["splits"].items():
        shards = [np.fromfile(out / shard["file"], manifest["dtype"]) for shard in entry["shards"]]
        tokens = np.concatenate([*shards, np.zeros(0, manifest["dtype"])])
        assert len(tokens) == entry["tokens"]
        ends = np.flatnonzero(tokens == bpe.eot)
        found[split] = [bpe.decode(part[part != bpe.eot]) for part in np.split(tokens, ends + 1)[:-1]]
        assert len(found[split]) == entry["documents"]
        assert sum(len(text.encode()) for text in found[split]) == entry["bytes"]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(out: Path) -> list[str]:
    found = documents(out)
    return sorted(found["train"] + found["val"])


@pytest.mark.parametrize("name", ["bytes", "bpe:500"])
def test_the_tokens_decode_to_exactly_the_documents(tmp_path, texts, name):
    manifest = run(tmp_path / "out", texts, tokenizer=name, shard_tokens=7001)
    assert everything(tmp_path / "out") == TEXTS
    for entry in manifest["splits"].values():
        assert {shard["tokens"] for shard in entry["shards"][:-1]} == {7001} and len(entry["shards"]) > 1
    verify(tmp_path / "out")


def test_documents_stay_in_the_order_of_their_paths(tmp_path, texts):
    run(tmp_path / "out", texts)
    order = [path.read_text() for path in sorted(texts.rglob("*.py"))]
    for found in documents(tmp_path / "out").values():
        assert found == [text for text in order if text in found]


@pytest.mark.parametrize("name", ["bpe:300", "tokenizer.json"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, texts, monkeypatch, name):
    monkeypatch.setattr(module, "BATCH", 30_000)
    if name == "tokenizer.json":
        name = str(tmp_path / name)
        Path(name).write_bytes(tokenizer.train(TEXTS, 300).to_json())
    for workers in (1, 2, 3):
        run(tmp_path / f"{workers}", texts, workers=workers, tokenizer=name, shard_tokens=50_000)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_the_same_text_elsewhere_gives_the_same_manifest(tmp_path, texts):
    run(tmp_path / "a", texts, tokenizer="bpe:300")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(texts, tmp_path / "elsewhere" / "texts")
    run(tmp_path / "b", tmp_path / "elsewhere" / "texts", tokenizer="bpe:300")
    assert manifest_sha256(tmp_path / "a") == manifest_sha256(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_a_text_is_on_the_same_side_whatever_comes_with_it(tmp_path, texts):
    run(tmp_path / "a", texts)
    (tmp_path / "more").mkdir()
    for i, text in enumerate(reversed(TEXTS[::2])):
        (tmp_path / "more" / f"{i}").write_text(text)
    (tmp_path / "more" / "other").write_text("one more text")
    run(tmp_path / "b", tmp_path / "more")
    first, second = documents(tmp_path / "a"), documents(tmp_path / "b")
    assert first["val"] and first["train"]
    for split in first:
        assert set(second[split]) - {"one more text"} == set(first[split]) & set(TEXTS[::2])


def test_the_share_of_validation_is_the_one_asked_for(tmp_path):
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(20_000)))
    splits = run(tmp_path / "out", tmp_path / "many.jsonl", val_fraction=0.1)["splits"]
    assert abs(splits["val"]["documents"] - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5


def test_a_corpus_of_two_documents_still_gets_validation(tmp_path):
    for name, text in (("a", "the first text"), ("b", "the second text")):
        (tmp_path / name).write_text(text)
    run(tmp_path / "out", tmp_path / "a", tmp_path / "b", val_fraction=1e-9, shard_tokens=10)
    run(tmp_path / "turned", tmp_path / "b", tmp_path / "a", val_fraction=1e-9)
    first, second = documents(tmp_path / "out"), documents(tmp_path / "turned")
    assert first == second and len(first["val"]) == len(first["train"]) == 1
    verify(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.bin")} == {
        shard["file"] for entry in load_manifest(tmp_path / "out")["splits"].values() for shard in entry["shards"]
    }


def test_repeated_documents_are_dropped_once_seen(tmp_path, texts):
    shutil.copytree(texts, tmp_path / "again")
    (tmp_path / "again" / "sub0" / "000.py").write_text(TEXTS[0] + " ")  # almost the same is not the same
    manifest = run(tmp_path / "out", texts, tmp_path / "again")
    assert manifest["dropped"] == {"duplicate": len(TEXTS) - 1}
    assert everything(tmp_path / "out") == sorted([*TEXTS, TEXTS[0] + " "])


def test_a_limit_ends_the_text_at_a_document(tmp_path, texts):
    order = list(dict.fromkeys(path.read_text() for path in sorted(texts.rglob("*.py"))))
    manifest = run(tmp_path / "some", texts, texts, max_documents=10)
    assert everything(tmp_path / "some") == sorted(order[:10]) and manifest["max_documents"] == 10
    most = sum(len(text.encode()) for text in order[:7])
    for name, limit, count in (("exact", most, 7), ("less", most - 1, 6)):
        manifest = run(tmp_path / name, texts, max_bytes=limit)
        assert everything(tmp_path / name) == sorted(order[:count]) and manifest["max_bytes"] == limit
    assert "max_bytes" not in run(tmp_path / "all", texts)
    trained = run(tmp_path / "bpe", texts, max_documents=10, tokenizer="bpe:300")["tokenizer"]["trained_on"]
    assert trained["documents"] == load_manifest(tmp_path / "some")["splits"]["train"]["documents"]


def test_what_is_left_out_is_counted(tmp_path, texts):
    (texts / ".git").mkdir()
    (texts / ".git" / "config").write_text("hidden")
    (texts / ".hidden").write_text("hidden")
    (texts / "empty").write_text("")
    (texts / "blank").write_text(" \n\t\n")
    (texts / "latin1.txt").write_bytes("où ça ?".encode("latin-1"))
    (texts / "image.bin").write_bytes(b"\0\1\2" * 200_000)
    (texts / "broken").symlink_to(texts / "nowhere")
    (texts / "loop").symlink_to(texts)
    (texts / "half.jsonl").write_text('{"text": "\\ud83d"}\n{"text": null}\n')
    run(texts / "tokens", texts / "sub0")
    manifest = run(tmp_path / "out", texts)
    assert manifest["dropped"] == {
        "binary": 1,
        "empty": 3,
        "hidden": 2,
        "linked_folder": 1,
        "not_a_file": 1,
        "not_utf8": 2,
        "prepared_data": 1,
    }
    assert everything(tmp_path / "out") == TEXTS


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    lines = "".join(json.dumps({"id": i, "body": text}) + "\n\n" for i, text in enumerate(TEXTS)).encode()
    packed = zstandard.ZstdCompressor().compress
    kinds = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines[:5000]) + gzip.compress(lines[5000:]),
        "c.jsonl.zst": packed(lines[:5000]) + packed(lines[5000:]),
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    table = pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    for name in [*kinds, "d.parquet"]:
        run(tmp_path / f"{name}.out", tmp_path / name, field="body")
        assert documents(tmp_path / f"{name}.out") == documents(tmp_path / "a.jsonl.out")
    assert everything(tmp_path / "a.jsonl.out") == TEXTS
    (tmp_path / "folder").mkdir()
    for name in [*kinds, "d.parquet"]:
        (tmp_path / name).rename(tmp_path / "folder" / name)
    assert run(tmp_path / "all", tmp_path / "folder", field="body")["dropped"] == {"duplicate": 3 * len(TEXTS)}


def test_bpe_is_trained_on_a_bounded_share_of_every_file(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 100_000)
    trained = run(tmp_path / "out", texts, tokenizer="bpe:300")["tokenizer"]["trained_on"]
    assert 50_000 < trained["bytes"] <= 100_000 and 0 < trained["documents"] < len(TEXTS)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad\.jsonl, line 3: not JSON"),
        ("utf.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"utf\.jsonl, line 2: not JSON"),
        ("field.jsonl", b'{"body": "a", "id": 1}\n', r"field\.jsonl, line 1: no field 'text' \(there is body, id\)"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl, line 1: no field 'text'"),
        ("type.jsonl", b'{"text": 5}\n', r"type\.jsonl, line 1: 'text' is not text but a int"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-10], r"cut\.jsonl\.gz is damaged or cut short"),
        ("no.txt.gz", b"no gzip", r"no\.txt\.gz is damaged or cut short"),
        ("cut.txt.zst", zstandard.compress(TEXTS[0].encode())[:-100], r"cut\.txt\.zst is damaged or cut short"),
        ("no.txt.zst", b"no zstd", r"no\.txt\.zst is damaged or cut short"),
        ("no.parquet", b"no parquet", r"no\.parquet is damaged"),
    ],
)
def test_a_damaged_source_is_named_and_nothing_is_written(tmp_path, texts, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", texts, tmp_path / name)
    assert not list(tmp_path.glob("out*"))


def test_a_killed_worker_ends_the_run_with_an_error(tmp_path, texts, monkeypatch):
    """The system kills a worker when memory runs out, perhaps in the middle of sending its result."""
    monkeypatch.setattr(module, "BATCH", 30_000)
    monkeypatch.setattr(encoding, "_start_worker", lambda encoder, started: killed(start(encoder, started), started))
    with pytest.raises(UserError, match="a worker process was killed"):
        run(tmp_path / "out", texts, workers=2)
    assert not list(tmp_path.glob("out*"))


start = encoding._start_worker


def killed(pipe, started):
    started[-1].kill()
    return pipe


def test_overwriting_replaces_the_data_only_when_asked_and_only_at_the_end(tmp_path, texts):
    out = tmp_path / "out"
    run(out, texts)
    old = content(out)
    with pytest.raises(UserError, match="already holds prepared data"):
        run(out, texts, tokenizer="bpe:300")
    (texts / "zzz.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="not JSON"):
        run(out, texts, tokenizer="bpe:300", overwrite=True)
    assert content(out) == old
    (texts / "zzz.jsonl").unlink()
    run(out, texts, tokenizer="bpe:300", overwrite=True)
    assert load_manifest(out)["tokenizer"]["name"] == "bpe:300" and everything(out) == TEXTS
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_run_killed_between_the_two_renames_gives_the_old_data_back(tmp_path, texts):
    out = tmp_path / "out"
    run(out, texts)
    old = content(out)
    out.rename(tmp_path / "out.replaced")
    with pytest.raises(UserError, match="already holds prepared data"):
        run(out, texts)
    assert content(out) == old


def test_two_runs_for_one_folder_do_not_mix(tmp_path, texts):
    with module._folder(tmp_path / "out", overwrite=False) as partial:  # the other run, at work
        (partial / "train_00000.bin").write_bytes(b"of the other run")
        with pytest.raises(UserError, match="another prepare is writing"):
            run(tmp_path / "out", texts)
        assert content(partial) == {"train_00000.bin": b"of the other run"}
        for name in ("manifest.json", "tokenizer.tiktoken"):
            (partial / name).write_text("of the other run")
    assert len(content(tmp_path / "out")) == 3


def test_what_others_keep_beside_the_folder_stays(tmp_path, texts):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out\.partial, where the data would be made, holds notes\.txt"):
        run(tmp_path / "out", texts)
    assert content(tmp_path / "out.partial") == {"notes.txt": b"mine"} and not (tmp_path / "out").exists()
    (tmp_path / "out.old").mkdir()
    run(tmp_path / "out.old/mine", texts)
    for _ in range(2):
        run(tmp_path / "out2", texts, overwrite=True)
    assert (tmp_path / "out.old/mine/manifest.json").is_file()


def test_validation_text_of_its_own_is_the_same_whatever_comes_with_it_and_stays_out_of_training(texts, tmp_path):
    """It lies inside one of the sources, and a copy under another name in the other."""
    shutil.copy(next((texts / "sub1").iterdir()), texts / "sub2" / "copy.py")
    judged, val = {}, (str(texts / "sub1"),)
    for name, sources in (("all", [texts]), ("one", [texts / "sub0"]), ("two", [texts / "sub2", texts / "sub0"])):
        manifest = run(tmp_path / name, *sources, val=val, max_documents=1000)
        found = documents(tmp_path / name)
        judged[name] = [(shard["tokens"], shard["sha256"]) for shard in manifest["splits"]["val"]["shards"]]
        assert sorted(found["val"]) == sorted(path.read_text("utf-8") for path in (texts / "sub1").iterdir())
        assert not set(found["val"]) & set(found["train"]) and found["train"]
        overlap = {"all": len(found["val"]) + 1, "one": 0, "two": 1}[name]
        assert manifest["dropped"].get("in_val", 0) == overlap
        assert manifest["val"] == ["sub1"] and "val_fraction" not in manifest
    assert judged["all"] == judged["one"] == judged["two"]
    trained = [run(tmp_path / f"bpe{i}", texts, val=val, tokenizer="bpe:260")["tokenizer"]["trained_on"] for i in (0, 1)]
    size = sum(len(text.encode()) for text in documents(tmp_path / "bpe0")["train"])
    assert trained[0] == trained[1] and trained[0]["bytes"] == size, "the tokenizer has not seen it either"


def test_repeated_documents_of_the_validation_text_are_counted_apart_and_limits_are_for_training(texts, tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "val" / name).write_text("" if name == "c.txt" else "judge by this")
    manifest = run(tmp_path / "out", texts, val=(str(tmp_path / "val"),), max_documents=5)
    assert {split: entry["documents"] for split, entry in manifest["splits"].items()} == {"train": 5, "val": 1}
    assert manifest["dropped"] == {"val_duplicate": 1, "val_empty": 1}


@pytest.mark.parametrize(
    ("val", "options", "message"),
    [
        ("nowhere", {}, "there is no source"),
        ("blank", {}, r"there is no text in --val .*blank \(left out: 1 val_empty\)"),
        ("texts", {}, r"has no text that --val .*texts has not \(left out: \d+ in_val\): nothing is left to train on"),
        (
            "texts",
            {"val_fraction": 0.1},
            "--val_fraction keeps documents of the sources for validation, and --val names others",
        ),
    ],
)
def test_validation_text_that_cannot_be_is_refused_and_nothing_written(texts, tmp_path, val, options, message):
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank/a.txt").write_text("\n")
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "out", texts, val=(str(tmp_path / val),), **options)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))
