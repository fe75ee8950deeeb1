"""The loader: every block once per epoch, any batch from its numbers alone, and no damaged data unnoticed."""

import hashlib
import json
import os
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanostack.errors import UserError
from nanostack.text import dataset as module
from nanostack.text.corpus import CorpusConfig, prepare
from nanostack.text.dataset import Prefetcher, Tokens, permute, verify
from nanostack.text.manifest import FORMAT, load_manifest, manifest_sha256

EMAIL = Path(sysconfig.get_path("stdlib")) / "email"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Real text in byte tokens, several shards a split; not to be changed."""
    return prepared(tmp_path_factory.mktemp("real") / "email")


@pytest.fixture
def mine(tmp_path) -> Path:
    """The same, to be damaged."""
    return prepared(tmp_path / "email")


def prepared(out: Path) -> Path:
    prepare(CorpusConfig(sources=[str(EMAIL)], out=out, tokenizer="bytes", shard_tokens=40_000, workers=1))
    return out


def counted(folder: Path, *lengths: int) -> Path:
    """Train shards of the given lengths that hold 0, 1, 2, …, so that a token is its own place."""
    shards, first = [], 0
    for i, length in enumerate(lengths):
        (folder / f"{i}.bin").write_bytes(np.arange(first, first + length, dtype="<u4").tobytes())
        shards.append({"file": f"{i}.bin", "tokens": length, "bytes": 4 * length, "sha256": ""})
        first += length
    splits = {"train": {"shards": shards}, "val": {"shards": []}}
    manifest = {"format": FORMAT, "dtype": "<u4", "tokenizer": {"n_vocab": 1 << 20, "eot": 0}, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@example(n=1, seed=0, epoch=0)
@example(n=1024, seed=0, epoch=0)
@example(n=1025, seed=0, epoch=0)
def test_the_permutation_is_a_bijection_for_every_size(n, seed, epoch):
    assert sorted(permute(np.arange(n, dtype=np.uint64), n, seed, epoch).tolist()) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 2**50), seed=st.integers(0, 2**32))
def test_the_permutation_of_a_huge_range_keeps_to_it_and_repeats_nothing(n, seed):
    x = np.unique(np.linspace(0, n - 1, 500).astype(np.uint64))
    assert len(np.unique(permute(x[x < n], n, seed, 3))) == len(x[x < n])
    assert permute(x[x < n], n, seed, 3).max() < n


def test_the_permutation_is_the_same_on_every_machine():
    """Checkpoints count on it: a change here changes what a resumed run reads."""
    assert permute(np.arange(8, dtype=np.uint64), 1000, 1337, 2).tolist() == [489, 226, 455, 10, 488, 181, 491, 394]


def test_the_permutation_mixes_well():
    """Neighbours go apart, every epoch and seed is another one, and places are even: chi-square over 16 × 16 cells."""
    n = 16_000
    x = np.arange(n, dtype=np.uint64)
    orders = [permute(x, n, seed, epoch).astype(np.int64) for seed in (0, 1) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(x, order)[0, 1]) < 0.03 and (np.abs(np.diff(order)) == 1).sum() < 15
        counts = np.histogram2d(x, order, bins=16, range=[[0, n], [0, n]])[0]
        assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 225 + 5 * 450**0.5
        for other in orders[:i]:
            assert (order == other).sum() < 10


@pytest.mark.parametrize("lengths", [(101,), (50, 51), (1, 2, 3, 4, 0, 5, 6, 80), (1,) * 101])
def test_a_block_is_its_tokens_whatever_the_shards(tmp_path, lengths):
    tokens = Tokens(counted(tmp_path, *lengths), "train", 10)
    assert (tokens.n_tokens, tokens.n_blocks) == (101, 10)
    assert tokens.blocks(0, 10).tolist() == [list(range(10 * b, 10 * b + 11)) for b in range(10)]


@pytest.mark.parametrize(("n_tokens", "n_blocks"), [(11, 1), (20, 1), (21, 2), (100, 9), (101, 10)])
def test_blocks_are_all_whole_ones(tmp_path, n_tokens, n_blocks):
    assert Tokens(counted(tmp_path, n_tokens), "train", 10).n_blocks == n_blocks


def test_an_epoch_has_every_block_once_in_an_order_of_its_own(real):
    tokens = Tokens(real, "train", 64)
    n = tokens.n_blocks
    first, second = tokens.batch(0, n), tokens.batch(n, 2 * n)
    in_order = tokens.blocks(0, n)
    for epoch in (first, second):
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, in_order))
    assert (first != second).any(axis=1).mean() > 0.95 and (first != in_order).any(axis=1).mean() > 0.95


def test_a_batch_does_not_depend_on_how_it_is_sliced(real):
    tokens, again = Tokens(real, "train", 64, seed=5), Tokens(real, "train", 64, seed=5)
    n = tokens.n_blocks
    whole = tokens.batch(n - 40, n + 40)  # over the end of an epoch
    assert whole.shape == (80, 65) and whole.dtype == np.int64
    for ranks in (2, 5, 8):
        size = 80 // ranks
        parts = [again.batch(n - 40 + r * size, n - 40 + (r + 1) * size) for r in reversed(range(ranks))]
        assert (np.concatenate(parts[::-1]) == whole).all()
    assert (Tokens(real, "train", 64, seed=6).batch(n - 40, n + 40) != whole).any()


def test_more_epochs_than_one_in_a_batch_are_each_complete(tmp_path):
    tokens = Tokens(counted(tmp_path, 31), "train", 10)
    firsts = tokens.batch(0, 12)[:, 0].reshape(4, 3)
    assert np.sort(firsts, axis=1).tolist() == [[0, 10, 20]] * 4 and len(np.unique(firsts, axis=0)) > 1


def test_epochs_are_counted_from_samples(real):
    tokens = Tokens(real, "train", 64)
    assert tokens.epoch(0) == 0 and tokens.epoch(3 * tokens.n_blocks) == 3


def test_validation_reads_the_text_in_order(real):
    tokens = Tokens(real, "val", 64)
    shards = [np.fromfile(real / shard["file"], "<u2") for shard in tokens.manifest["splits"]["val"]["shards"]]
    text = np.concatenate(shards)
    blocks = tokens.blocks(0, tokens.n_blocks)
    assert (blocks[:, :-1].ravel() == text[: tokens.n_blocks * 64]).all()
    assert (blocks[:, 1:].ravel() == text[1 : tokens.n_blocks * 64 + 1]).all()
    with pytest.raises(IndexError):
        tokens.blocks(0, tokens.n_blocks + 1)


def test_token_bytes_give_the_bytes_of_the_text(real):
    tokens = Tokens(real, "train", 64)
    assert tokens.token_bytes.shape == (tokens.vocab_size,) == (257,)
    entry = tokens.manifest["splits"]["train"]
    ids = np.concatenate([np.fromfile(real / shard["file"], "<u2") for shard in entry["shards"]])
    assert tokens.token_bytes[ids].sum() == entry["bytes"]


def test_a_split_without_a_whole_block_is_refused(real):
    with pytest.raises(UserError, match=r"val split .* has [\d,]+ tokens, not one block of seq_len \+ 1 = 1,000,001"):
        Tokens(real, "val", 1_000_000)
    with pytest.raises(UserError, match="no split 'test'; there are train and val"):
        Tokens(real, "test", 64)


def test_loading_keeps_up_with_the_fastest_training(real):
    """1.2 million tokens a second are asked for; ten are a fraction of what one core does."""
    tokens = Tokens(real, "train", 256)
    tokens.batch(0, 64)
    best = min(seconds(lambda: tokens.batch(0, 2048)) for _ in range(5))
    assert 2048 * 256 / best > 5e6


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- the folder ----


def test_missing_data_say_how_to_prepare_them(tmp_path):
    with pytest.raises(UserError, match=r"with: nanostack prepare stdlib --out \S+/stdlib --tokenizer bpe:1024"):
        load_manifest(tmp_path / "data" / "stdlib")
    with pytest.raises(UserError, match=r"with: nanostack prepare SOURCE\.\.\. --out \S*fineweb"):
        Tokens(tmp_path / "fineweb", "train", 64)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "nanostack-tokens-1"}', '{"format": "nanostack-tokens-1", "splits": []}']
)
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*prepare the data again"):
        load_manifest(tmp_path)


def test_a_manifest_of_another_version_is_refused(mine):
    change(mine, lambda manifest: manifest.update(format="nanostack-tokens-0"))
    with pytest.raises(UserError, match="is of format 'nanostack-tokens-0', this version reads 'nanostack-tokens-1'"):
        load_manifest(mine)


def change(folder: Path, edit):
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_hash_names_the_data(mine, real):
    assert manifest_sha256(mine) == manifest_sha256(real)
    change(mine, lambda manifest: manifest["splits"]["val"]["shards"][0].update(sha256="0" * 64))
    assert manifest_sha256(mine) != manifest_sha256(real)


def test_a_flipped_byte_is_found_and_the_shard_named(mine):
    verify(mine)
    shard = mine / "train_00003.bin"
    content = bytearray(shard.read_bytes())
    content[1001] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train_00003\.bin does not have the SHA-256 of its manifest"):
        verify(mine)


def test_a_cut_shard_is_found_without_reading_it(mine):
    with open(mine / "val_00000.bin", "r+b") as file:
        file.truncate(1000)
    for look in (verify, lambda path: Tokens(path, "val", 64)):
        with pytest.raises(UserError, match=r"val_00000\.bin has 1,000 bytes, its manifest says"):
            look(mine)


def test_a_missing_shard_is_named(mine):
    (mine / "train_00001.bin").unlink()
    for look in (verify, lambda path: Tokens(path, "train", 64)):
        with pytest.raises(UserError, match=r"train_00001\.bin is missing"):
            look(mine)


def test_a_token_outside_the_vocabulary_is_found(mine):
    """Even where the hash fits: a tokenizer and shards that were never made for each other."""
    shard = mine / "train_00002.bin"
    tokens = np.fromfile(shard, "<u2")
    tokens[-1] = 257
    tokens.tofile(shard)
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    change(mine, lambda manifest: manifest["splits"]["train"]["shards"][2].update(sha256=digest))
    with pytest.raises(UserError, match=r"train_00002\.bin holds token id 257, outside the vocabulary of 257"):
        verify(mine)


def test_what_was_checked_is_not_read_again_until_it_changes(mine, monkeypatch):
    read = []
    original = module._check_content
    monkeypatch.setattr(module, "_check_content", lambda file, *rest: (read.append(file.name), original(file, *rest)))
    verify(mine)
    every = sorted(path.name for path in mine.glob("*.bin"))
    assert sorted(read) == every and (mine / ".verified.json").is_file()
    read.clear()
    verify(mine)
    assert read == []
    os.utime(mine / "train_00001.bin")
    verify(mine)
    assert read == ["train_00001.bin"]
    read.clear()
    (mine / ".verified.json").write_text("damaged")
    verify(mine)
    assert sorted(read) == every


def test_checking_shows_a_bar_on_a_terminal_only_if_it_takes_long(mine, monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    before = threading.active_count()
    verify(mine)
    assert (mine / ".verified.json").is_file() and capsys.readouterr().err == ""
    assert threading.active_count() == before, "its timer is gone"


def test_a_failed_check_is_not_remembered(mine):
    (mine / "val_00000.bin").write_bytes(bytes((mine / "val_00000.bin").stat().st_size))
    for _ in range(2):
        with pytest.raises(UserError, match=r"val_00000\.bin"):
            verify(mine)


def test_a_read_only_folder_is_checked_all_the_same(mine, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)  # the tests may run as root, whom no permission stops
    verify(mine)
    assert not (mine / ".verified.json").exists()


# ---- the thread ----


def test_prefetched_batches_are_those_of_the_loader_in_order(real):
    tokens = Tokens(real, "train", 64)
    ranges = [(i, i + 3) for i in range(0, 60, 3)]
    batches = list(Prefetcher(tokens, ranges, depth=3))
    assert len(batches) == 20
    for (start, stop), (tokens_BT, targets_BT) in zip(ranges, batches, strict=True):
        expected = tokens.batch(start, stop)
        assert tokens_BT.dtype == targets_BT.dtype == torch.int64 and tokens_BT.is_contiguous()
        assert (tokens_BT.numpy() == expected[:, :-1]).all() and (targets_BT.numpy() == expected[:, 1:]).all()


def test_the_thread_works_ahead_by_the_depth_and_no_more(real):
    tokens, asked = Tokens(real, "train", 64), []

    def ranges():
        for i in range(100):
            asked.append(i)
            yield i, i + 1

    with Prefetcher(tokens, ranges(), depth=3) as batches:
        until = time.monotonic() + 5
        while len(asked) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(asked) == 4  # three ready, one in hand
        next(batches)


def test_an_error_in_the_thread_reaches_the_consumer_after_the_good_batches(real):
    tokens = Tokens(real, "train", 64)

    def ranges():
        yield 0, 1
        raise OSError("the disk went away")

    batches = Prefetcher(tokens, ranges())
    next(batches)
    with pytest.raises(OSError, match="the disk went away"):
        next(batches)
    assert list(batches) == []


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_thread_at_once(real, taken):
    tokens = Tokens(real, "train", 64)
    batches = Prefetcher(tokens, ((i, i + 1) for i in range(10**9)), depth=2)
    for _ in range(taken):
        next(batches)
    assert seconds(batches.close) < 2
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert list(batches) == []
    batches.close()


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_as_they_are(real):
    """Copied on another stream: what is read at once, on the current one, must be all there."""
    tokens = Tokens(real, "train", 64)
    ranges = [(i, i + 16) for i in range(0, 640, 16)]
    with Prefetcher(tokens, ranges, device=torch.device("cuda")) as batches:
        for (start, stop), (tokens_BT, targets_BT) in zip(ranges, batches, strict=True):
            assert tokens_BT.is_cuda and targets_BT.is_cuda
            expected = tokens.batch(start, stop)
            assert (tokens_BT.cpu().numpy() == expected[:, :-1]).all() and (targets_BT.cpu().numpy() == expected[:, 1:]).all()
