"""Tokenizers of others, as tokenizer.json: the ids of their library, nothing lost, and what is refused."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from conftest import ROOT
from hub_server import COMMIT, Hub
from test_tokenizer import BPE, TEXT, TEXTS, prepared

from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.text import tokenizer
from nanostack.text.bounds import Bounds
from nanostack.text.tokenizer import JsonTokenizer


def llama_2(metaspace: bool = False) -> bytes:
    """A tokenizer.json built as Llama 2's is: pieces with ▁ for the space, one before every text, bytes for what has none."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    options = {"special_tokens": pieces, "limit_alphabet": 90, "show_progress": False}
    trained.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=700, **options))
    made = json.loads(trained.to_str())
    made["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made["added_tokens"] = made["added_tokens"][: len(special)]
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    ends = [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    made["decoder"] = {"type": "Sequence", "decoders": [space, *ends]}
    if not metaspace:
        turned = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        made["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, turned]}
        made["pre_tokenizer"] = None
    post = tokenizers.processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return with_parts(made, post_processor=json.loads(post.__getstate__()))


def smol() -> bytes:
    """A tokenizer.json built as SmolLM's is: digits alone, the rest in bytes, special tokens first in the vocabulary."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|endoftext|>", "<|im_start|>"], "initial_alphabet": alphabet, "show_progress": False}
    trained.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=600, **options))
    trained.add_tokens(["中文"])
    return trained.to_str().encode()


def llama_3() -> bytes:
    """Built as Llama 3's is: tiktoken's ranks and pattern, special tokens behind them."""
    return BPE.to_json()


def with_parts(data: bytes | dict, **parts) -> bytes:
    made = json.loads(data) if isinstance(data, bytes) else data
    return json.dumps(made | parts).encode()


BUILT = {
    "llama-2": (llama_2(), "</s>"),
    "metaspace": (llama_2(metaspace=True), "</s>"),
    "smol": (smol(), "<|endoftext|>"),
    "llama-3": (llama_3(), "<|endoftext|>"),
}
ODD = ["naïve ☃ 中文 🙂 1234\n", "\n\n\tx  =  1", "¡é\x00\x7f\r\n", "▁_▁", "a" * 1000]
on_every_build = pytest.mark.parametrize(("data", "eot_token"), BUILT.values(), ids=BUILT)


def model_folder(folder: Path, data: bytes, eot_token: str | dict | None = None, **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(data)
    if eot_token:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eot_token}))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@on_every_build
def test_a_tokenizer_json_gives_the_ids_of_its_library(data, eot_token):
    ours, theirs = JsonTokenizer("mine", data, eot_token), tokenizers.Tokenizer.from_str(data.decode())
    assert (ours.eot, ours.n_vocab) == (theirs.token_to_id(eot_token), theirs.get_vocab_size())
    for text in [*TEXTS, *ODD]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
    again = pickle.loads(pickle.dumps(ours))  # as it comes to a worker
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS) and again.eot == ours.eot


@on_every_build
def test_token_bytes_of_a_tokenizer_json_add_up_to_the_bytes_of_the_documents(data, eot_token):
    """A Llama 2 puts a space before each of them, which is not the document's."""
    ours = JsonTokenizer("mine", data, eot_token)
    documents = [*TEXTS, *[text for text in ODD if "▁" not in text]]
    for text in documents:
        assert ours.token_bytes[ours.encode_documents([text])].sum() == len(text.encode()), text[:40]
        assert ours.decode(ours.encode(text)) == text
    assert ours.token_bytes[ours.encode_documents(documents)].sum() == sum(len(text.encode()) for text in documents)
    assert ours.token_bytes.shape == (ours.n_vocab,) and ours.encode_documents(documents).dtype == ours.dtype


@on_every_build
def test_special_tokens_in_text_are_text_for_a_tokenizer_json_too(data, eot_token):
    ours = JsonTokenizer("mine", data, eot_token)
    text = f"a{eot_token}b<s>c"
    assert ours.eot not in ours.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.encode_documents([text]).tolist() == [*ours.start, *ours.encode(text), ours.eot]


def test_prompt_begins_as_text_in_training_did():
    """With what the template puts before a text; not with the end that it may put behind."""
    data, eot_token = BUILT["llama-2"]
    made = tokenizers.Tokenizer.from_str(data.decode())
    begin, end = made.token_to_id("<s>"), made.token_to_id(eot_token)
    template = {"single": f"<s> $A {eot_token}", "special_tokens": [("<s>", begin), (eot_token, end)]}
    made.post_processor = tokenizers.processors.TemplateProcessing(**template)
    ours = JsonTokenizer("mine", made.to_str().encode(), eot_token)
    assert ours.encode_prompt("def") == [begin, *ours.encode("def")] and ours.decode(ours.encode_prompt("def")) == "def"
    assert ours.encode_documents(["def"]).tolist() == [begin, *ours.encode("def"), end]
    ours.follow(Bounds([]))
    assert ours.encode_prompt("def") == ours.encode("def")


@pytest.mark.parametrize(
    "ranks", [{bytes([b]): b for b in range(256)}, {bytes([b]): b + b // 200 for b in range(256)} | {b"ab": 300}]
)
def test_ids_that_are_left_out_are_left_out_of_the_tokenizer_json(ranks):
    """cl100k_base has none at 100256, before its end-of-text."""
    ours = tokenizer.Tokenizer("holes", tokenizer.PATTERN, ranks, {tokenizer.EOT: 310, "<|fim|>": 312, "<|end|>": 400})
    theirs = JsonTokenizer("holes", ours.to_json(), tokenizer.EOT)
    text = "abacab <|endoftext|> é\n"
    assert theirs.encode(text) == ours.encode(text) and theirs.eot == ours.eot == 310 and theirs.n_vocab == ours.n_vocab == 401
    assert {name: theirs._bpe.token_to_id(name) for name in ours.special} == ours.special


def test_truncation_padding_and_dropout_of_a_tokenizer_json_lose_nothing():
    made = json.loads(BUILT["smol"][0])
    cut = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padded = {"strategy": {"Fixed": 9000}, "direction": "Right", "pad_to_multiple_of": None}
    padded |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    changed = with_parts(made, truncation=cut, padding=padded, model=made["model"] | {"dropout": 0.5})
    assert JsonTokenizer("mine", changed, "<|endoftext|>").encode(TEXT) == JsonTokenizer("mine", *BUILT["smol"]).encode(TEXT)


def test_ranks_and_the_tokenizer_json_made_of_them_give_the_same_shards(tmp_path):
    ranks = prepared(tmp_path / "ranks", "bpe:400")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.load(ranks).to_json())
    other = prepared(tmp_path / "json", str(tmp_path / "tokenizer.json"))
    assert len(list(ranks.glob("*.bin"))) == 2
    for shard in ranks.glob("*.bin"):
        assert shard.read_bytes() == (other / shard.name).read_bytes()
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (ranks, other))
    assert {key: one[key] for key in one if key != "tokenizer"} == {key: two[key] for key in two if key != "tokenizer"}
    assert (tokenizer.load(ranks).token_bytes == tokenizer.load(other).token_bytes).all()


@on_every_build
def test_prepared_data_hold_the_tokenizer_json_and_export_writes_it_again(tmp_path, data, eot_token):
    model = model_folder(tmp_path / "model", data, {"content": eot_token, "lstrip": False})
    out = prepared(tmp_path, str(model))
    entry = json.loads((out / "manifest.json").read_text())["tokenizer"]
    assert (entry["name"], entry["sha256"]) == ("model", hashlib.sha256(data).hexdigest())
    loaded = tokenizer.load(out)
    for again in (tokenizer.get(str(out)), tokenizer.get(str(out / "tokenizer.json")), tokenizer.get(str(model))):
        assert again.encode(TEXT) == loaded.encode(TEXT) and again.eot_token == loaded.eot_token == eot_token
    exported = tmp_path / "exported"
    exported.mkdir()
    export.write_tokenizer(loaded, exported, 64)
    assert (exported / "tokenizer.json").read_bytes() == data
    about = json.loads((exported / "tokenizer_config.json").read_text())
    unknown = "<unk>" if b"<unk>" in data else eot_token
    begin = "<s>" if b"TemplateProcessing" in data else eot_token
    assert (about["eos_token"], about["bos_token"], about["unk_token"]) == (eot_token, begin, unknown)
    assert about["add_bos_token"] == (begin != eot_token)
    (out / "tokenizer.json").write_bytes(data + b"\n")
    with pytest.raises(UserError, match=r"tokenizer\.json .*not the file its manifest describes"):
        tokenizer.load(out)


def test_what_the_config_of_a_given_tokenizer_says_is_passed_on(tmp_path):
    """But for code and files that stay where they are, and the length, which is the model's."""
    data, eot_token = BUILT["llama-2"]
    model = model_folder(tmp_path / "model", data)
    own = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": eot_token, "tokenizer_class": "TokenizersBackend"}
    own |= {"chat_template": "{{ messages }}", "model_max_length": 10**30, "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    (model / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "</s>"}, "bos_token": "<unk>"}))
    loaded = tokenizer.load(prepared(tmp_path, str(model)))
    export.write_tokenizer(loaded, tmp_path, 64)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": "<s>",
        "add_bos_token": True,
        "eos_token": eot_token,
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "chat_template": "{{ messages }}",
        "model_max_length": 64,
    }


WORDS = {"type": "WordLevel", "vocab": {"a": 0, "?": 1, "</s>": 2}, "unk_token": "?"}
UNIGRAM = [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0], *([f"<0x{byte:02X}>", -9.0] for byte in range(256))]
PIECES = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": UNIGRAM}
SMOL = json.loads(BUILT["smol"][0])


def with_vocab(**tokens) -> bytes:
    return with_parts(SMOL, model=SMOL["model"] | {"vocab": SMOL["model"]["vocab"] | tokens})


@pytest.mark.parametrize(
    ("data", "eot_token", "message"),
    [
        (BUILT["smol"][0][:1000], None, r"tokenizer\.json is no tokenizer\.json that the tokenizers library can read"),
        (b"[1]", None, "is no tokenizer.json that"),
        (BUILT["llama-2"][0], None, r"has no token '<\|endoftext\|>', which is to end the documents \(eos_token\)"),
        (BUILT["smol"][0], "</s>", "has no token '</s>'"),
        (with_vocab(zz=5), None, "is damaged: its 602 tokens have 601 ids"),
        (with_vocab(zz=4_000_000_000), None, "is damaged: its 602 tokens have 602 ids up to 4000000000"),
        (with_parts(SMOL, model=WORDS, decoder=None, pre_tokenizer=None, added_tokens=[]), "</s>", "cannot encode every text"),
        (with_parts(llama_2(), decoder=None), "</s>", "cannot encode every text"),
        (
            with_parts(llama_2(), model=PIECES, pre_tokenizer=None, added_tokens=[]),
            "</s>",
            "takes the text '</s>' for the end of a document",
        ),
    ],
)
def test_a_tokenizer_json_that_does_not_fit_is_refused(tmp_path, data, eot_token, message):
    with pytest.raises(UserError, match=message):
        tokenizer.get(str(model_folder(tmp_path / "model", data, eot_token)))


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="ids up to 600, and the model beside it a vocabulary of 512"):
        tokenizer.get(str(model_folder(tmp_path / "model", BUILT["smol"][0], vocab_size=512)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(UserError, match=r"neither a tokenizer\.json nor prepared data; transformers' AutoTokenizer makes one"):
        tokenizer.get(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    (tmp_path / "tokenizer.json").write_bytes(BUILT["smol"][0])
    with pytest.raises(UserError, match=r"tokenizer_config\.json does not hold a JSON object"):
        tokenizer.get(str(tmp_path))


def test_a_tokenizer_json_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'nanostack\[hf\]'"):
        JsonTokenizer("mine", *BUILT["smol"])


GET = """
import sys
from nanostack.text import tokenizer
made = tokenizer.get(sys.argv[1])
print(made.name, made.eot, made.n_vocab)
"""


def test_a_tokenizer_of_the_hub_is_fetched_once_and_told_with_its_commit(tmp_path):
    model_folder(tmp_path / "hub/models/own/smol", *BUILT["smol"], vocab_size=640)
    (tmp_path / "hub/models/own/smol/model.safetensors").write_bytes(b"not to be fetched")
    hub = Hub(tmp_path / "hub")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", GET, "own/smol"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == f"own/smol@{COMMIT} 0 601\n"
    assert not [path for _, path, _ in hub.requests if "safetensors" in path]
    hub.shutdown()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    again = subprocess.run(command, env=offline, capture_output=True, text=True, check=True, cwd=ROOT)
    assert again.stdout == result.stdout
    command[-1] = "own/other"
    missing = subprocess.run(command, env=offline, capture_output=True, text=True, cwd=ROOT)
    assert "UserError: own/other is neither a file nor a folder here, and could not be had from" in missing.stderr
