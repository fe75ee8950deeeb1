"""How texts begin and end: prepared data, checkpoints, folders and exports say one thing, which is what AutoTokenizer says."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hflm import BOS, EOS, TURN, byte_level, llama, write_tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from nanostack import checkpoint, models
from nanostack.commands import export as export_command
from nanostack.commands import import_hf
from nanostack.config import Optim, Train
from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import corpus, tokenizer
from nanostack.text.bounds import Bounds
from nanostack.text.dataset import Tokens
from nanostack.text.manifest import load_manifest
from nanostack.text.tokenizer_json import bounds_of, named_tokens

transformers = pytest.importorskip("transformers")
TEXTS = ["the cat", " sat  on", "naïve 日本 🙂\n", "def f(x):\n\treturn 1234", ""]
BEGIN = byte_level().token_to_id(BOS)
CPU = Placement(torch.device("cpu"))
NAMED = {"bos_token": BOS, "eos_token": EOS}


def properties(token: str) -> dict:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


NAMES = {  # tokenizer_config.json and special_tokens_map.json
    "nowhere": ({}, None),
    "config": (NAMED, None),
    "properties": ({"eos_token": {"__type": "AddedToken"} | properties(EOS)}, None),
    "map": ({}, NAMED),
    "properties_in_map": ({}, {"eos_token": properties(EOS)}),
    "conflict": ({"bos_token": TURN, "eos_token": TURN}, NAMED),
    "map_not_read": ({"eos_token": TURN, "added_tokens_decoder": "all"}, NAMED),
    "none_in_map": ({"eos_token": EOS}, {"eos_token": None}),
    "add_bos_means_nothing": ({**NAMED, "add_bos_token": False}, None),
}
CLASSES = [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "GPTNeoXTokenizer"]
MODELS = [None, "llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("begins", [True, False])
def test_first_and_last_tokens_of_a_folder_are_those_of_autotokenizer(tmp_path, begins):
    """For every class that a config may declare, every architecture that is read, and every way to name the tokens."""
    made = byte_level(begins)
    made.add_special_tokens([AddedToken(one, special=True) for one in ("<unk>", "<s>", "</s>", "<|endoftext|>")])
    added = {str(i): properties(one.content) | {"special": True} for i, one in made.get_added_tokens_decoder().items()}
    found = set()
    for number, (kind, model, name) in enumerate(
        itertools.product(CLASSES, (None, "llama", "mistral", "qwen2", "qwen3"), NAMES)
    ):
        config, special_map = NAMES[name]
        config = config | ({"tokenizer_class": kind} if kind else {})
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = added
        folder = write_tokenizer(tmp_path / str(number), made, config, special_map)
        if model:
            (folder / "config.json").write_text(json.dumps({"model_type": model}))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert named_tokens(folder) == {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}, (kind, model, name)
        plain = theirs.encode("a", add_special_tokens=False)
        start = theirs.encode("a")[: -len(plain)]
        prefix = theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id
        ends = [] if theirs.eos_token_id is None else [theirs.eos_token_id]
        assert bounds_of(folder) == Bounds(start, prefix, ends), (kind, model, name)
        ours = tokenizer.get(str(folder))
        assert ours.eot_token == (theirs.eos_token or tokenizer.EOT) and ours.start == start
        found.add((theirs.eos_token, tuple(start)))
    assert len(found) == (8 if begins else 4), found


def test_names_that_are_no_text_and_ends_that_are_no_ids_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "odd", byte_level(), {"eos_token": 7})
    with pytest.raises(UserError, match=r"odd: the eos_token of its tokenizer_config\.json or .* is 7, no text"):
        tokenizer.get(str(folder))
    (folder / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(
        UserError, match=r"generation_config\.json: its eos_token_id is \['x'\], neither an id nor a list of ids"
    ):
        bounds_of(folder)


def prepared(place: Path, made, config: dict = NAMED, **options) -> Path:
    """Data of a few documents, in tokens of a model's folder."""
    folder = write_tokenizer(place / "model", made, config)
    (place / "texts").mkdir(exist_ok=True)
    for i in range(9):
        (place / f"texts/{i}.txt").write_text(f"the cat sat on mat {i}\n" * 9)
    how = {"tokenizer": str(folder), "val_fraction": 0.3, "workers": 1, "overwrite": True} | options
    corpus.prepare(corpus.CorpusConfig([str(place / "texts")], place / "data", **how))
    return place / "data"


@pytest.mark.parametrize(
    ("begins", "bos", "start"),
    [(True, "auto", [BEGIN]), (True, "yes", [BEGIN]), (True, "no", []), (False, "auto", []), (False, "yes", [BEGIN])],
)
def test_documents_begin_as_the_tokenizers_template_has_it_unless_told_otherwise(tmp_path, begins, bos, start):
    data = prepared(tmp_path, byte_level(begins), bos=bos)
    manifest, text = load_manifest(data), tokenizer.load(data)
    assert text.start == start and manifest["tokenizer"].get("start", []) == start
    for split in ("train", "val"):
        tokens = Tokens(data, split, 8)
        ids = tokens.blocks(0, tokens.n_blocks)[:, :-1].ravel()
        entry = manifest["splits"][split]
        assert ids[: len(start)].tolist() == start and (ids == BEGIN).sum() == pytest.approx(
            entry["documents"] * len(start), abs=1
        )
        for place in (ids == text.eot).nonzero()[0][:-1]:
            assert ids[place + 1 : place + 1 + len(start)].tolist() == start
    documents = [path.read_text() for path in (tmp_path / "texts").iterdir()]
    ids = text.encode_documents(documents)
    assert text.token_bytes[ids].sum() == sum(len(one.encode()) for one in documents)
    assert text.encode_prompt("the") == start + text.encode("the")


@pytest.mark.parametrize("name", ["bpe:300", "bytes"])
def test_begin_of_text_that_a_tokenizer_has_not_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} has no begin-of-text token.*leave out --bos yes"):
        prepared(tmp_path, byte_level(), tokenizer=name, bos="yes")
    assert not (tmp_path / "data").exists()


def test_template_with_a_token_behind_every_text_is_refused(tmp_path):
    made = byte_level()
    made.post_processor = TemplateProcessing(single=f"$A {TURN}", special_tokens=[(TURN, made.token_to_id(TURN))])
    with pytest.raises(UserError, match=r"the template of .* puts '<\|im_end\|>' behind every text: only end-of-text"):
        prepared(tmp_path, made)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("start", [[BEGIN], []])
def test_autotokenizer_of_an_export_gives_the_ids_that_training_saw(tmp_path, begins, start):
    """Whatever the template of the tokenizer that was given: it is left out, or made, as the checkpoint remembers."""
    data = prepared(tmp_path, byte_level(begins), bos="yes" if start else "no")
    text = tokenizer.load(data)
    shape = LlamaConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, vocab_size=text.n_vocab, seq_len=16)
    state = State.create(shape, Optim(), CPU, 0)
    state.bounds = Bounds.of_data(load_manifest(data))
    checkpoint.save(state, tmp_path / "ckpt.pt", "m")
    export_command.main(export_command.Command(tmp_path / "ckpt.pt", tmp_path / "out", data=data))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for one in TEXTS:
        assert [*theirs.encode(one), text.eot] == text.encode_documents([one]).tolist()
    pair = theirs("the", "cat").input_ids
    assert pair == [*theirs.encode("the"), *theirs.encode("cat")]
    assert theirs.eos_token_id == text.eot and theirs.bos_token_id == (start or [text.eot])[0]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == text.data or begins != bool(start)
    again = models.read(tmp_path / "out")
    assert Bounds(**again["bounds"]) == state.bounds and tokenizer.get(str(tmp_path / "out")).start == start


def train_config(data: Path, shape: LlamaConfig) -> Train:
    from nanostack.config import Data, Stage

    return Train(Data(str(data)), shape, (Stage(1024, 1e-3),), batch_tokens=256, micro_batch=4, out="unused")


def test_model_of_others_keeps_its_bounds_through_import_training_growth_and_export(tmp_path, capsys):
    """And where the text it is trained on begins otherwise, a line says so."""
    folder = llama(tmp_path / "theirs", byte_level(), 32)
    turn = byte_level().token_to_id(TURN)
    eos = byte_level().token_to_id(EOS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, turn]}))
    import_hf.main(import_hf.Command(str(folder), tmp_path / "ckpt.pt"))
    theirs = Bounds([BEGIN], BEGIN, sorted([eos, turn]))
    assert Bounds(**checkpoint.load(tmp_path / "ckpt.pt")["bounds"]) == theirs
    shape = LlamaConfig(**checkpoint.load(tmp_path / "ckpt.pt")["config"])
    data = prepared(tmp_path, byte_level())
    capsys.readouterr()
    state = checkpoint.begin(train_config(data, shape), str(tmp_path / "ckpt.pt"), False, "m", CPU)
    assert state.bounds == theirs and capsys.readouterr().err == ""
    export.save(state, tmp_path / "out", "m", tokenizer=tokenizer.load(data))
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == sorted([eos, turn])
    assert Bounds(**models.read(tmp_path / "out")["bounds"]) == theirs

    data = prepared(tmp_path, byte_level(), bos="no")
    export_command.main(export_command.Command(tmp_path / "ckpt.pt", tmp_path / "exported", data=data))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "exported").encode("") == [BEGIN], "the model has seen it"
    capsys.readouterr()
    state = checkpoint.begin(train_config(data, shape), str(tmp_path / "ckpt.pt"), False, "m", CPU)
    said = capsys.readouterr().err
    assert f"note: {tmp_path / 'ckpt.pt'} and {data}: tokens [{BEGIN}] stood before every text that the model has seen" in said
    assert state.bounds == Bounds([], None, sorted([eos, turn]))
    ranks = prepared(tmp_path, byte_level(), tokenizer="bytes")
    assert Bounds(**vars(theirs)).trained_on(Bounds.of_data(load_manifest(ranks))) == Bounds([], None, [256])


def test_tokenizer_that_lacks_what_the_models_texts_begin_with_is_refused():
    with pytest.raises(UserError, match="texts of the model begin with token 300, and bytes has no such token"):
        tokenizer.get("bytes").follow(Bounds([300]))
