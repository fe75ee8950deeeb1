"""Hugging Face in and out: the same numbers, the same ids, and what is refused. transformers itself is the judge."""

import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, TINY, python

import train
from nanostack import checkpoint
from nanostack.config import Growth, Optim, load
from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.hf import weights as hf
from nanostack.hf.config import to_config
from nanostack.model import LlamaConfig, RopeScaling
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer
from nanostack.text.corpus import CorpusConfig, prepare

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
CPU = torch.device("cpu")
MHA = LlamaConfig(n_layer=3, n_head=4, n_kv_head=4, d_model=64, d_ff=96, vocab_size=384, seq_len=64)
GQA = replace(MHA, n_kv_head=2, norm_eps=1e-6, rope_theta=5e5)
SCALED = replace(GQA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
SHAPES = {"mha": MHA, "gqa": GQA, "tied": replace(MHA, tie_embeddings=True), "llama3": SCALED}
on_every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def state_of(config: LlamaConfig, seed: int = 0) -> State:
    state = State.create(config, Optim(), Placement(CPU), seed)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if "norm" in name:  # gains of 1 would hide one that is in the wrong place
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return state


def run(module, *arguments):
    return python(*([module] if module.endswith(".py") else ["-m", "nanostack", module]), *arguments)


def exported(state, folder, **options):
    export.save(state, folder, None, **options)
    return folder


TOKENS = torch.randint(384, (2, 64), generator=torch.Generator().manual_seed(3))


@on_every_shape
def test_transformers_gives_the_same_logits(config, tmp_path):
    state = state_of(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(state, tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, state.model(TOKENS), rtol=0, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in state.model.parameters())


@on_every_shape
def test_round_trip_is_bit_for_bit_and_keeps_the_ledger(config, tmp_path):
    state = state_of(config, seed=5)
    state.cursor.advance(7, config)
    state.grow(Growth("stack", 2))
    folder = exported(state, tmp_path / "out", shard_bytes=100_000)
    done = run("import", folder, tmp_path / "back.pt")
    assert done.returncode == 0, done.stderr
    back = checkpoint.load(tmp_path / "back.pt")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()
    for name, parameter in state.model.named_parameters():
        assert torch.equal(back["model"][name], parameter), name
    assert back["config"] == asdict(state.model.config) and back["cursor"] == asdict(state.cursor)
    assert back["growth"] == json.loads(json.dumps([receipt.as_dict() for receipt in state.growth])) and back["seed"] == 5
    restored = State.restore(back, Optim(), Placement(CPU))
    assert torch.equal(restored.model(TOKENS), state.model(TOKENS))


@on_every_shape
def test_what_transformers_saved_is_read(config, tmp_path):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_config(config, None, torch.float32)))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    saved = hf.load(tmp_path / "theirs")
    assert LlamaConfig(**saved["config"]) == config
    with torch.no_grad():
        ours = State.restore(saved, Optim(), Placement(CPU)).model(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grow_takes_a_folder_and_writes_one(dtype, tmp_path):
    state = state_of(GQA)
    base = exported(state, tmp_path / "base", dtype=dtype, eot=7)
    (base / "tokenizer.json").write_bytes(tokenizer.get("bytes").to_json())
    (base / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    edit(bos_token_id=5)(base)
    done = run("grow.py", base, "--g", "2")
    assert done.returncode == 0, done.stderr
    grown = tmp_path / "base-x2"
    for name in ("tokenizer.json", "generation_config.json"):
        assert json.loads((grown / name).read_text()) == json.loads((base / name).read_text())
    config = json.loads((grown / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, 5)
    model = transformers.AutoModelForCausalLM.from_pretrained(grown, dtype=dtype)
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    assert len(model.model.layers) == 6 and model.lm_head.weight.dtype == dtype
    for i, layer in enumerate(model.model.layers):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before.model.layers[i % 3].state_dict()[name]), (i, name)
    again = run("grow.py", base, "--g", "2")
    assert again.returncode == 2 and "base-x2 exists already" in again.stderr


def of_others(folder):
    """Makes the folder one that transformers could have written."""
    config = json.loads((folder / "config.json").read_text())
    del config["nanostack"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").unlink()
    return folder


def test_model_of_others_is_grown_with_its_licence_and_no_claim_to_have_trained_it(corpus, tmp_path):
    base = of_others(exported(state_of(MHA), tmp_path / "base"))
    (base / "LICENSE.txt").write_text("of theirs")
    edit(max_position_embeddings=131072, rope_parameters=LLAMA3 | {"factor": 8.0})(base)
    assert run("grow.py", base, "--g", "2").returncode == 0
    page = (tmp_path / "base-x2/README.md").read_text()
    assert "Made of base with nanostack, and not trained since" in page and "stack to 6 layers" in page
    assert "tokens:" not in page and "FLOPs" not in page and (tmp_path / "base-x2/LICENSE.txt").read_text() == "of theirs"
    for ramped in (("--op", "random", "--g", "2"), ("--width", "random", "--d_ff", "192")):
        refused = run("grow.py", base, *ramped, "--out", tmp_path / "ramped")
        assert refused.returncode == 2 and "make a checkpoint of it (nanostack import)" in refused.stderr
    edit(max_position_embeddings=64)(base)
    learned = ("--op", "learn", "--g", "2", "--data", corpus, "--batch_tokens", "256", "--learn_steps", "2")
    done = run("grow.py", base, *learned, "--out", tmp_path / "learned")
    assert done.returncode == 0, done.stderr
    wide = run("grow.py", base, "--width", "zero", "--d_ff", "192", "--out", tmp_path / "wide")
    assert wide.returncode == 0 and "- zero in width to 3 layers × 64" in (tmp_path / "wide/README.md").read_text(), wide.stderr


def test_weights_that_others_changed_have_no_ledger_of_ours(tmp_path, capsys):
    state = state_of(MHA)
    state.cursor.advance(8, MHA)
    folder = exported(state, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "same")
    capsys.readouterr()
    assert hf.load(tmp_path / "same")["cursor"]["tokens"] == 8 * MHA.seq_len and not capsys.readouterr().err
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "trained")
    assert hf.load(tmp_path / "trained")["cursor"]["tokens"] == 0
    assert "trained was changed since nanostack wrote it" in capsys.readouterr().err
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which was not written here, and is not replaced"):
        export.check_place(folder, tmp_path / "ckpt.pt", overwrite=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_read_too(sharded, tmp_path):
    """Older models on the Hub have pickled weights."""
    folder = exported(state_of(GQA), tmp_path / "model", dtype=torch.bfloat16)
    wanted = dict(hf.load(folder)["model"])
    tensors = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {
        name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" if sharded else "pytorch_model.bin" for i, name in enumerate(tensors)
    }
    for file in set(names.values()):
        torch.save({name: value for name, value in tensors.items() if names[name] == file}, folder / file)
    if sharded:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    found = hf.load(folder)["model"]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    path = sorted(folder.glob("*.bin"))[0]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is damaged"):
        dict(hf.load(folder)["model"])


def test_tokenizer_gives_the_same_ids_as_tiktoken(corpus, tmp_path):
    ours = tokenizer.load(corpus)
    exported(state_of(MHA), tmp_path / "out", tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [
        "def f(x):\n    return x  # naïve ☃ 中文 🙂\n",
        "  \t\n\n\n 12345 don't DON'T",
        "",
        "a" * 300,
        (ROOT / "train.py").read_text(),
    ]
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text), text[:40]
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.unk_token_id == ours.eot and len(theirs) == ours.n_vocab
    assert theirs(texts)["input_ids"] == [ours.encode(text) for text in texts], "no token is added by itself"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.mark.slow
def test_checkpoint_of_a_run_is_exported_whole_and_generates(corpus, tmp_path):
    config = load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "run")])
    train.Run(config).train()
    done = run("export", tmp_path / "run/ckpt.pt", tmp_path / "out", "--data", corpus, "--json")
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)["files"]
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted | {"README.md", "curves.png"} <= set(files)
    page = (tmp_path / "out/README.md").read_text()
    assert "stack to 4 layers" in page and "FLOPs" in page and "validation loss" in page
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    text = pipe("def ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("def ") and len(text) > 4
    again = run("export", tmp_path / "run/ckpt.pt", tmp_path / "out")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert run("grow.py", tmp_path / "run/ckpt.pt", "--g", "2").returncode == 0
    assert run("export", tmp_path / "run/ckpt-x2.pt", tmp_path / "deep").returncode == 0
    deep = (tmp_path / "deep/README.md").read_text()
    assert "stack to 8 layers, after 6.14k tokens" in deep and "validation loss" not in deep and "curves" not in deep
    shutil.rmtree(tmp_path / "deep")
    assert "- text: " in page and "in tokens of bpe:300" in page
    for folder in (tmp_path / "run", tmp_path):  # with the checkpoint itself in it
        lost = run("export", tmp_path / "run/ckpt.pt", folder, "--overwrite")
        assert lost.returncode == 2 and "is not replaced" in lost.stderr and (tmp_path / "run/ckpt.pt").exists()
    inside = run("grow.py", tmp_path / "out", "--g", "2", "--out", tmp_path / "out", "--overwrite")
    assert inside.returncode == 2 and (tmp_path / "out/model.safetensors").exists(), inside.stderr
    other = run("prepare", "tests/tiny.py", "tests/conftest.py", "--out", tmp_path / "bytes", "--tokenizer", "bytes")
    assert other.returncode == 0, other.stderr
    wrong = run("export", tmp_path / "run/ckpt.pt", tmp_path / "wrong", "--data", tmp_path / "bytes")
    assert wrong.returncode == 2 and "the model was trained with bpe:300" in wrong.stderr
    shutil.rmtree(tmp_path / "bytes")
    replaced = run("export", tmp_path / "run/ckpt.pt", tmp_path / "out", "--overwrite", "--dtype", "bfloat16")
    assert replaced.returncode == 0 and not (tmp_path / "out/tokenizer.json").exists(), replaced.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"], "nothing half-written is left"


@pytest.mark.slow
def test_model_of_theirs_trains_on_text_prepared_with_its_own_tokenizer(corpus, tmp_path):
    """From a folder to ours and back: vocabulary and end-of-text fit, and its tokenizer.json is the same at the end."""
    config, ours = replace(load(TINY, []).model, vocab_size=300), tokenizer.load(corpus)
    base = exported(state_of(config), tmp_path / "base", tokenizer=ours)
    text = {"sources": [str(ROOT / "nanostack")], "out": tmp_path / "data", "tokenizer": str(base), "val_fraction": 0.2}
    prepare(CorpusConfig(**text, workers=1))
    assert run("import", base, tmp_path / "ckpt.pt").returncode == 0
    options = {"data.path": tmp_path / "data", "init_from": tmp_path / "ckpt.pt", "out": tmp_path / "run"}
    options |= {"model.vocab_size": 300, "stages.0.tokens": 1024, "stages.1.tokens": 1024}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    trained = train.Run(load(TINY, [*words, "--data.document_mask"]))
    assert trained.state.model.end_of_text == ours.eot
    trained.train()
    done = run("export", tmp_path / "run/ckpt.pt", tmp_path / "out", "--data", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == ours.eot
    assert run("grow.py", base, "--g", "2", "--data", tmp_path / "data").returncode == 0


def damaged(change):
    """A folder that `change` has been at."""

    def make(tmp_path):
        folder = exported(state_of(MHA), tmp_path / "model", shard_bytes=100_000)
        change(folder)
        return folder

    return make


def edit(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def cut(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def with_too_many_ids(folder):
    (folder / "tokenizer.json").write_bytes(tokenizer.get("bytes").to_json())
    edit(vocab_size=200)(folder)


def edit_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')


def of_whole_numbers(folder):
    for path in folder.glob("*.safetensors"):
        tensors = {name: value.to(torch.int8) for name, value in safetensors.load_file(path).items()}
        safetensors.save_file(tensors, path)


def with_odd_ledger(folder):
    ours = json.loads((folder / "config.json").read_text())["nanostack"]
    edit(nanostack=ours | {"cursor": {"foo": 1}})(folder)


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
BAD = [
    (edit(model_type="gemma2"), "is of architecture 'gemma2'; llama, mistral, qwen2, qwen3 can be read"),
    (edit(attention_bias=True), "lacks 12 tensors that its config.json asks for, model.layers.0.self_attn.q_proj.bias"),
    (edit(head_dim=32), "its config.json asks for (128, 64)"),
    (edit(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "scales rotary positions by 'dynamic'"),
    (edit(rope_parameters={"rope_type": "llama3", "factor": 2.0}), "lacks low_freq_factor"),
    (edit(num_hidden_layers=4), "lacks 9 tensors that its config.json asks for, model.layers.3"),
    (edit(intermediate_size=48), "its config.json asks for (48, 64)"),
    (edit(vocab_size=600), "embed_tokens.weight is (384, 64), its config.json asks for (600, 64)"),
    (edit(num_hidden_layers=3.0), "num_hidden_layers is 3.0, no whole number"),
    (edit(num_hidden_layers=2), "has 9 tensors that its config.json does not ask for, model.layers.2"),
    (edit(quantization_config={"quant_method": "fp8"}), "is of quantized weights"),
    (edit(rope_scaling="x"), "its rope_scaling is 'x', no object"),
    (with_odd_ledger, "was not written by this version"),
    (edit(rope_parameters={"rope_theta": "abc"}), "its rope_theta is 'abc', no number"),
    (edit(rope_parameters=LLAMA3 | {"factor": "8"}), "its factor is '8', no number"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
    (with_too_many_ids, "has ids up to 256, the model beside it a vocabulary of 200"),
    (edit_index, "does not say which tensor is in which file"),
    (of_whole_numbers, "is of torch.int8; only whole weights can be read"),
    (edit(hidden_size=None), "its hidden_size is null, no whole number of 1 or more"),
    (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "which its index names"),
    (cut, "is damaged"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    (lambda folder: (folder / "config.json").unlink(), "is no Hugging Face folder"),
    (lambda folder: [path.unlink() for path in folder.glob("model*")], "neither model.safetensors nor an index"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_folder_that_is_not_right_is_refused_and_nothing_written(change, message, tmp_path):
    folder = damaged(change)(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        saved = hf.load(folder)
        State.restore(saved, Optim(), Placement(CPU))


def test_commands_tell_mistakes_in_one_line(corpus, tmp_path):
    state = state_of(replace(MHA, vocab_size=128))
    checkpoint.save(state, tmp_path / "ckpt.pt", None)
    folder = exported(state_of(MHA), tmp_path / "model")
    cut(folder)
    for arguments, message in (
        (("export", tmp_path / "ckpt.pt", tmp_path / "out", "--data", corpus), "the tokenizer has"),
        (("export", tmp_path / "none.pt", tmp_path / "out"), "there is no checkpoint"),
        (("export", tmp_path / "ckpt.pt", tmp_path / "out", "--shard_gb", "0"), "shard_gb must be positive"),
        (("import", folder, tmp_path / "out.pt"), "is damaged"),
        (("import", "nowhere", tmp_path / "out.pt"), "there is no folder nowhere"),
        (("import", folder, tmp_path / "ckpt.pt"), "exists already"),
        (("grow.py", folder, "--g", "2"), "is damaged"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "model"]


def test_model_that_is_still_ramped_in_is_not_exported(corpus, tmp_path):
    options = ["--data.path", str(corpus), "--out", str(tmp_path / "run"), "--stages.1.growth.op", "random"]
    train.main([TINY, *options, "--stages.1.growth.ramp_tokens", "2048", "--save_interval", "512", "--keep", "99"])
    ramped = run("export", tmp_path / "run/ckpt-128.pt", tmp_path / "out")
    assert ramped.returncode == 2 and "is still ramping in its last growth" in ramped.stderr
    assert run("export", tmp_path / "run/ckpt.pt", tmp_path / "out").returncode == 0


def test_extra_that_is_missing_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"need safetensors: pip install 'nanostack\[hf\]'"):
        hf.require_extra()


def test_context_can_be_cut_on_the_way_in(tmp_path):
    folder = exported(state_of(MHA), tmp_path / "model")
    assert run("import", folder, tmp_path / "a.pt", "--seq_len", "32").returncode == 0
    assert checkpoint.load(tmp_path / "a.pt")["config"]["seq_len"] == 32
    longer = run("import", folder, tmp_path / "b.pt", "--seq_len", "128")
    assert longer.returncode == 2 and "between 1 and the model's 64" in longer.stderr
    shutil.rmtree(folder)
