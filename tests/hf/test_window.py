"""A model with a sliding window is one of a shorter context, in its folder and in a checkpoint of it."""

import json

import pytest
import torch
from conftest import TINY
from hflm import BOS, EOS, byte_level, write_tokenizer

from nanostack import checkpoint
from nanostack.commands import evaluate, import_hf, sample
from nanostack.commands import export as export_command
from nanostack.config import Growth, Optim, load
from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.hf import weights as hf
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text.corpus import CorpusConfig, prepare

pytest.importorskip("safetensors")
WINDOW, CONTEXT = 16, 64
SHAPE = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, vocab_size=384, seq_len=CONTEXT)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """(a folder with a window, a checkpoint of it, text in its tokens)."""
    place = tmp_path_factory.mktemp("window")
    folder, state = place / "model", State.create(SHAPE, Optim(), Placement(torch.device("cpu")), 1)
    export.save(state, folder, None)
    said = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": WINDOW}
    (folder / "config.json").write_text(json.dumps(said))
    write_tokenizer(folder, byte_level(True), {"bos_token": BOS, "eos_token": EOS})
    import_hf.main(import_hf.Command(str(folder), place / "ckpt.pt"))
    texts = place / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the cat sat on the mat, {i}. " * 20}) + "\n" for i in range(4)))
    prepare(CorpusConfig(sources=(str(texts),), out=place / "data", tokenizer=str(folder), workers=1))
    return folder, place / "ckpt.pt", place / "data"


def test_checkpoint_remembers_the_window_also_when_it_has_grown(read):
    folder, path, _ = read
    assert hf.load(folder)["window"] == checkpoint.load(path)["window"] == WINDOW
    state = State.restore(checkpoint.load(path), Optim(), Placement(torch.device("cpu")))
    state.grow(Growth("stack", 2))
    checkpoint.save(state, path.with_name("grown.pt"), None)
    assert checkpoint.load(path.with_name("grown.pt"))["window"] == WINDOW
    state.window = None
    checkpoint.save(state, path.with_name("plain.pt"), None)
    old = checkpoint.load(path.with_name("plain.pt"))
    assert "window" not in old, "as in the checkpoints of before"
    assert State.restore(old, Optim(), Placement(torch.device("cpu"))).window is None


def test_folder_and_checkpoint_have_one_loss_and_the_blocks_are_told(read, capsys):
    folder, path, data = read
    answers = [
        evaluate.main(evaluate.Command(one, val=data, out=data.with_name(f"{one.name}.json"), json=True))
        for one in (folder, path)
    ]
    assert answers[0]["val"] == answers[1]["val"]
    assert capsys.readouterr().err.count(f"the loss is that of blocks of {WINDOW} tokens, the model's sliding window") == 2


def test_what_is_exported_has_the_window_for_its_context(read, capsys):
    _, path, data = read
    export_command.main(export_command.Command(path, data.with_name("out"), json=True))
    assert f"with a sliding window, and its context is {WINDOW}" in capsys.readouterr().err
    out = hf.load(data.with_name("out"))
    assert out["window"] is None and out["config"]["seq_len"] == WINDOW


def test_longer_run_is_refused(read):
    _, path, _ = read
    config = load(TINY, ["--model.seq_len", str(CONTEXT)])
    with pytest.raises(UserError, match=f"model.seq_len is {WINDOW} there, {CONTEXT} here"):
        checkpoint.check_fits(checkpoint.load(path), path, config, None)


def test_text_beyond_the_window_is_neither_scored_nor_written(read):
    pytest.importorskip("lm_eval")
    folder, path, data = read
    pages = data.with_name("tasks") / "EleutherAI/wikitext_document_level/wikitext-2-raw-v1"
    pages.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (pages / f"{split}.jsonl").write_text(json.dumps({"page": "the cat sat on the mat. " * 9}) + "\n")
    for one in (folder, path):
        asked = evaluate.Command(one, "wikitext", tokenizer=data, data=data.with_name("tasks"), out=data.with_name("no.json"))
        with pytest.raises(UserError, match=rf"it takes \d+ tokens, and beyond {WINDOW} the model's attention is a sliding"):
            evaluate.main(asked)
        asked = sample.Command(checkpoint=one, data=data, prompt=("the cat",), tokens=40, json=True)
        with pytest.raises(UserError, match=r"is a sliding window, which ours is not: at most --tokens 1\d") as refused:
            sample.main(asked)
        most = int(str(refused.value).rpartition(" ")[2])
        made = sample.main(
            sample.Command(checkpoint=one, data=data, prompt=("the cat",), tokens=most, json=True, temperature=0)
        )
        assert made["samples"][0]["text"].startswith("the cat")
