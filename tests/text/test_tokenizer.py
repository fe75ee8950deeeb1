"""The tokenizer: exact round trips, the same ranks from the same text, the same tokenizer after loading."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanostack.errors import UserError
from nanostack.text import tokenizer
from nanostack.text.corpus import CorpusConfig, prepare

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [path.read_text("utf-8") for path in [*sorted((STDLIB / "json").glob("*.py")), STDLIB / "typing.py"]]
TEXT = TEXTS[-1]
BPE = tokenizer.train(TEXTS, 400)
BYTES = tokenizer.get("bytes")


def test_bpe_n_has_n_entries_and_end_of_text_is_the_last():
    assert BPE.n_vocab == 400 and BPE.eot == 399 and sorted(BPE.ranks.values()) == list(range(399))
    assert BYTES.n_vocab == 257 and BYTES.eot == 256
    assert max(BPE.encode(TEXT)) <= 398 and len(BPE.encode(TEXT)) < 0.7 * len(TEXT)


TRAIN_AND_HASH = """
import hashlib, random, sys
from nanostack.text import tokenizer
seed = int(sys.argv[1])
random.seed(0)
ties = [" ".join(f"{a}{b}{a}" for a in "abcdefgh" for b in "ijklmnop")] * 3  # every pair as frequent as every other
texts = ties + [open(path, encoding="utf-8").read() for path in sys.argv[2:]]
random.Random(seed).shuffle(texts)
for corpus, n in ((texts, 1024), (ties, 280)):
    ranks = tokenizer.train(corpus, n).ranks
    print(hashlib.sha256(repr(sorted(ranks.items())).encode()).hexdigest())
"""


def test_training_gives_the_same_ranks_in_every_process_order_and_number_of_threads():
    paths = [str(path) for path in sorted(STDLIB.glob("a*.py"))]
    runs = []
    for threads in (1, 2, 4):
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads)}
        command = [sys.executable, "-c", TRAIN_AND_HASH, str(threads), *paths]
        runs.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert runs[0] == runs[1] == runs[2] and len(set(runs[0].split())) == 2


def test_training_and_tiktoken_encode_alike():
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(TEXTS), 399, pattern=tokenizer.PATTERN)
    assert trainer.encode(TEXT) == BPE.encode(TEXT)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_the_round_trip(text):
    for bpe in (BPE, BYTES):
        assert bpe.decode(bpe.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_token_bytes_add_up_to_the_bytes_of_the_text(text):
    assert BPE.token_bytes[BPE.encode(text)].sum() == len(text.encode())


def test_end_of_text_and_unused_ids_stand_for_no_bytes():
    assert BPE.token_bytes.shape == (400,) and BPE.token_bytes[BPE.eot] == 0 and BPE.token_bytes[:399].min() == 1


def test_text_that_looks_like_end_of_text_is_plain_text():
    for bpe in (BPE, BYTES):
        ids = bpe.encode("a<|endoftext|>b")
        assert bpe.eot not in ids and bpe.decode(ids) == "a<|endoftext|>b"
        assert (bpe.encode_documents(["a<|endoftext|>b"]) == [*ids, bpe.eot]).all()


def test_documents_are_each_followed_by_end_of_text():
    ids = BPE.encode_documents(TEXTS)
    assert ids.dtype == np.dtype("<u2")
    assert ids.tolist() == [token for part in BPE.encode_batch(TEXTS) for token in [*part, BPE.eot]]


def test_a_vocabulary_above_65536_gets_four_bytes():
    ranks = BYTES.ranks | {b"%06d" % i: 256 + i for i in range(65_280)}
    assert tokenizer.Tokenizer("t", ".", ranks, {tokenizer.EOT: 65_535}).dtype == np.dtype("<u2")
    assert tokenizer.Tokenizer("t", ".", ranks, {tokenizer.EOT: 65_536}).dtype == np.dtype("<u4")


@pytest.mark.parametrize("text", [" " * 1_200_000 + "a", "\n" * 1_200_000, "中" * 1_000_000], ids=["space", "line", "word"])
def test_a_million_equal_characters_are_encoded_and_trained_on(text):
    """Uncut, a million spaces exceed the backtracking limit of tiktoken's and rustbpe's regular expressions."""
    assert BPE.decode(BPE.encode(text)) == text
    assert tokenizer.train([text], 258).n_vocab == 258


def test_cutting_a_long_text_does_not_change_its_tokens(monkeypatch):
    whole = BPE.encode(TEXT)
    monkeypatch.setattr(tokenizer, "MAX_CHARS", 12_000)
    first, *rest = tokenizer._parts(TEXT)
    assert len(rest) > 7 and all(part.startswith(" ") for part in rest), "each seam is before a word"
    assert first + "".join(rest) == TEXT and BPE.encode(TEXT) == whole


def prepared(folder: Path, name: str) -> Path:
    (folder / "text").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / "text" / f"{i}.py").write_bytes(text.encode())
    prepare(CorpusConfig(sources=[str(folder / "text")], out=folder / "out", tokenizer=name, workers=1))
    return folder / "out"


def test_a_loaded_tokenizer_encodes_like_the_one_that_was_saved(tmp_path, monkeypatch):
    out = prepared(tmp_path, "bpe:300")
    loaded = tokenizer.load(out)
    for again in (tokenizer.get(str(out)), tokenizer.get(str(out / "tokenizer.tiktoken"))):
        assert again.ranks == loaded.ranks and again.pattern == loaded.pattern and again.special == loaded.special
    assert loaded.n_vocab == 300 and loaded.decode(loaded.encode(TEXT)) == TEXT
    tokens = np.fromfile(out / "train_00000.bin", "<u2")
    document = tokens[: np.argmax(tokens == 299)]
    assert loaded.encode(loaded.decode(document)) == document.tolist()


def test_a_downloaded_tokenizer_is_kept_whole_for_machines_without_network(tmp_path, monkeypatch):
    """GPT-2's ranks give the bytes another order, and cl100k_base has special tokens beyond a gap."""
    order = sorted(range(256), key=lambda byte: (byte % 7, byte))
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)} | {b"in": 256, b"th": 257}
    special = {"<|endoftext|>": 259, "<|endofprompt|>": 278}
    pattern = r" ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    fetched = tiktoken.Encoding("cl100k_base", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fetched)
    out = prepared(tmp_path, "cl100k_base")
    monkeypatch.undo()
    loaded = tokenizer.load(out)
    assert (loaded.eot, loaded.n_vocab) == (259, 279) and loaded.encode(TEXT) == fetched.encode_ordinary(TEXT)


def test_changed_ranks_are_refused(tmp_path):
    out = prepared(tmp_path, "bytes")
    ranks = (out / "tokenizer.tiktoken").read_bytes()
    (out / "tokenizer.tiktoken").write_bytes(ranks.replace(b" 5\n", b" 6\n", 1))
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken .*not the file its manifest describes"):
        tokenizer.load(out)


def test_a_file_of_ranks_is_a_tokenizer(tmp_path):
    entry = BPE.save(tmp_path)
    data = (tmp_path / "tokenizer.tiktoken").read_bytes()
    assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    (tmp_path / "mine.tiktoken").write_bytes(data)
    mine = tokenizer.get(str(tmp_path / "mine.tiktoken"))
    assert mine.n_vocab == 400 and mine.encode(TEXT) == BPE.encode(TEXT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello world\n", "not a file of ranks"),
        (b"\xff\xfe\x00", "not a file of ranks"),
        (b"aGVsbG8= 0\n", "lacks some of the 256"),
        (b"", "lacks some of the 256"),
    ],
)
def test_a_file_that_holds_no_ranks_is_refused(tmp_path, content, message):
    (tmp_path / "ranks").write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenizer.get(str(tmp_path / "ranks"))


def test_two_tokens_of_one_rank_are_refused(tmp_path):
    BYTES.save(tmp_path)
    with open(tmp_path / "tokenizer.tiktoken", "ab") as file:
        file.write(b"aGVsbG8= 7\n")
    with pytest.raises(UserError, match="two ranks to one token, one rank to two"):
        tokenizer.get(str(tmp_path / "tokenizer.tiktoken"))


def test_too_small_a_vocabulary_and_too_little_text_are_refused():
    with pytest.raises(UserError, match="at least bpe:257"):
        tokenizer.train(TEXTS, 256)
    with pytest.raises(UserError, match=r"only enough repetition for bpe:2\d\d, not bpe:1024"):
        tokenizer.train(["hello world hello world"], 1024)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"gpt3.*gpt2, cl100k_base, o200k_base, bytes, bpe:N"):
        tokenizer.get("gpt3")
