"""A GGUF as its own library reads it: tensors, fields and vocabulary, and what is refused. test_llama_cpp.py runs it."""

import json

import pytest
import tokenizers
import torch
from conftest import python

from nanostack.config import Optim
from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.hf.gguf import write
from nanostack.model import LlamaConfig, RopeScaling
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.torch")
SCALING = RopeScaling(8.0, 1.0, 4.0, 16)
SHAPE = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=272, seq_len=32, rope_scaling=SCALING)
BYTES = tokenizer.get("bytes")
BYTES_AND = json.loads(BYTES.to_json())["model"]["vocab"]


@pytest.fixture
def folder(tmp_path):
    state = State.create(SHAPE, Optim(), Placement(torch.device("cpu")), 0)
    export.save(state, tmp_path / "model", None, torch.bfloat16, tokenizer=BYTES, as_gguf=True)
    return tmp_path / "model"


def edit(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def test_file_has_the_weights_with_gains_in_float32_and_neighbours_of_rotary_side_by_side(folder):
    read = gguf.GGUFReader(folder / "model.gguf")
    found = {tensor.name: tensor for tensor in read.tensors}
    stored = safetensors.load_file(folder / "model.safetensors")
    assert len(found) == len(stored) + 1 and found["rope_freqs.weight"].data.max() == SCALING.factor
    assert 1 < found["rope_freqs.weight"].data.min() < 2 and found["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    up = found["blk.1.ffn_up.weight"]
    bits = stored["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)
    assert up.tensor_type.name == "BF16" and (up.data == bits.numpy()).all()
    key, theirs = found["blk.0.attn_k.weight"].data, stored["model.layers.0.self_attn.k_proj.weight"].view(torch.uint8).numpy()
    for head in (0, 8):
        for i in range(4):
            assert (key[head + 2 * i] == theirs[head + i]).all() and (key[head + 2 * i + 1] == theirs[head + 4 + i]).all()


def test_file_says_the_shape_and_the_tokenizer(folder):
    read = gguf.GGUFReader(folder / "model.gguf")
    said = {name: field.contents() for name, field in read.fields.items()}
    assert said["general.architecture"] == "llama" and said["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    shape = {"context_length": 32, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "vocab_size": 272}
    shape |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "rope.freq_base": 1e4}
    assert {key: said[f"llama.{key}"] for key in shape} == shape
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert tokens[65] == "A" and tokens[256:258] == ["<|endoftext|>", "[PAD257]"] and kinds[255:258] == [1, 3, 5]
    assert (said["tokenizer.ggml.pre"], said["tokenizer.ggml.add_bos_token"]) == ("gpt-2", False)
    assert said["tokenizer.ggml.eos_token_id"] == said["tokenizer.ggml.bos_token_id"] == 256


def test_template_bos_and_second_end_of_a_tokenizer_are_said(folder):
    path = folder / "tokenizer.json"
    made = tokenizers.Tokenizer.from_str(path.read_text())
    made.add_special_tokens(["<s>", "<|end|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    made.add_tokens(["  "])
    path.write_text(made.to_str())
    edit(folder / "config.json", eos_token_id=[256, 258])
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}", pad_token={"content": "<|end|>"})
    write(folder, folder / "again.gguf", "again")
    read = gguf.GGUFReader(folder / "again.gguf")
    said = {name.removeprefix("tokenizer."): field.contents() for name, field in read.fields.items()}
    ids = {f"ggml.{name}_token_id": number for name, number in {"bos": 257, "eos": 256, "eot": 258, "padding": 258}.items()}
    assert {name: said[name] for name in ids} == ids and said["ggml.add_bos_token"] is True
    assert said["ggml.token_type"][256:261] == [3, 3, 3, 4, 5] and said["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("config", "generation", "wanted", "note"),
    [
        (256, [256, 7], {"eos": 256, "eot": 7}, ""),
        ([7, 256], [256, 9], {"eos": 7, "eot": 256, "eom": 9}, ""),
        ([256, 7], None, {"eos": 256, "eot": 7}, ""),
        (None, [8], {"eos": 8, "eot": 256}, ""),
        (
            [256, 7, 8, 9],
            [10],
            {"eos": 256, "eot": 7, "eom": 8},
            "room for 3 ends of a text: llama.cpp will not end one at 9, 10",
        ),
    ],
)
def test_every_end_of_a_text_is_said_or_told(folder, config, generation, wanted, note, capsys):
    edit(folder / "config.json", eos_token_id=config)
    edit(folder / "generation_config.json", eos_token_id=generation)
    write(folder, folder / "again.gguf", "again")
    fields = gguf.GGUFReader(folder / "again.gguf").fields
    said = {
        name: fields[key].contents() for name in ("eos", "eot", "eom") if (key := f"tokenizer.ggml.{name}_token_id") in fields
    }
    assert said == wanted and note in capsys.readouterr().err


QWEN3 = LlamaConfig(**vars(SHAPE) | {"rope_scaling": None, "qk_norm": True, "d_head": 16})
QWEN2 = LlamaConfig(**vars(SHAPE) | {"rope_scaling": None, "qkv_bias": True})
OTHERS = {
    "llama": LlamaConfig(**vars(SHAPE) | {"d_head": 16, "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
BIASES = {"blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_down.bias"}


@pytest.mark.parametrize(("kind", "shape"), OTHERS.items(), ids=OTHERS)
def test_tensors_are_those_that_llama_cpp_loads_in_its_shapes(kind, shape, tmp_path):
    """What its loader asks for (src/models): norms of q and k of Qwen3, biases of q, k, v of Qwen2, of a Llama any."""
    state = State.create(shape, Optim(), Placement(torch.device("cpu")), 0)
    export.save(state, tmp_path / "model", None)
    (tmp_path / "model/tokenizer.json").write_bytes(BYTES.to_json())
    write(tmp_path / "model", tmp_path / "model.gguf", "model")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    assert read.fields["general.architecture"].contents() == kind
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in read.tensors}
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[kind.upper()]]
    names = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in known}
    assert {name.rpartition(".")[0] for name in shapes if not name.startswith("blk.1")} <= names
    heads, kv = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    wanted = {"attn_q": (heads, 32), "attn_k": (kv, 32), "attn_v": (kv, 32), "attn_output": (32, heads)}
    assert {name: shapes[f"blk.0.{name}.weight"] for name in wanted} == wanted
    biases = {"qwen2": {"blk.0.attn_q.bias"}, "llama": BIASES}.get(kind, set())
    assert BIASES & shapes.keys() == biases and ("blk.0.attn_q_norm.weight" in shapes) == (kind == "qwen3")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (LlamaConfig(**vars(QWEN3) | {"qkv_bias": True, "out_bias": True}), "is a Qwen3 with biases"),
        (LlamaConfig(**vars(QWEN2) | {"d_head": 16}), "is a Qwen2 with 4 heads of 16 channels in a width of 32"),
    ],
)
def test_model_that_llama_cpp_does_not_load_is_refused(shape, message, tmp_path):
    state = State.create(shape, Optim(), Placement(torch.device("cpu")), 0)
    export.save(state, tmp_path / "model", None)
    (tmp_path / "model/tokenizer.json").write_bytes(BYTES.to_json())
    with pytest.raises(UserError, match=message):
        write(tmp_path / "model", tmp_path / "model.gguf", "model")


def tokenizer_with(**parts):
    def change(folder):
        made = json.loads((folder / "tokenizer.json").read_text())
        model = made["model"] | parts.pop("model", {})
        edit(folder / "tokenizer.json", model=model, **parts)

    return change


def config_with(**values):
    return lambda folder: edit(folder / "config.json", **values)


def pattern(text: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}


FIRST, SECOND = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
TWICE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a", "type_id": 0}}] * 2 + [FIRST]}
TWICE |= {"pair": [FIRST, SECOND], "special_tokens": {"a": {"id": "a", "ids": [97], "tokens": ["a"]}}}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, "beta_fast": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"a GGUF holds its tokenizer: .*\(--data\)"),
        (
            tokenizer_with(model={"type": "Unigram"}),
            r"the tokenizer\.json of again is of a kind .* \(Unigram, not byte-level\); byte-level BPE",
        ),
        (tokenizer_with(model={"byte_fallback": True}), r"\(BPE that falls back to bytes\)"),
        (tokenizer_with(normalizer={"type": "Lowercase"}), r"changes text by Lowercase before it cuts"),
        (tokenizer_with(pre_tokenizer=pattern(r"\d+")), r"cuts text by \\d\+, for which llama\.cpp has no name"),
        (tokenizer_with(pre_tokenizer={"type": "Whitespace"}), r'cuts text by {"type": "Whitespace"}'),
        (tokenizer_with(post_processor=TWICE), "puts several tokens before or behind a text"),
        (tokenizer_with(model={"ignore_merges": True, "vocab": BYTES_AND | {"ab": 257}}), "no merges make 'ab'"),
        (config_with(model_type="gemma"), "again is of architecture 'gemma'; a GGUF can be of llama, mistral, qwen2, qwen3"),
        (config_with(model_type="mistral", sliding_window=16), "has a sliding window of 16 and a context of 32"),
        (config_with(rope_scaling={"rope_type": "dynamic"}), "scales rotary positions by 'dynamic'"),
        (config_with(rope_scaling=YARN), "by yarn with beta_fast, which is not written"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        write(folder, folder / "again.gguf", "again")
    assert not (folder / "again.gguf").exists()


def test_gguf_without_data_is_refused_before_anything_is_read(tmp_path):
    done = python("-m", "nanostack", "export", tmp_path / "none.pt", tmp_path / "out", "--gguf")
    assert done.returncode == 2 and done.stderr.startswith("error: a GGUF holds its tokenizer: name the data"), done.stderr
