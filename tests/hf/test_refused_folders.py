"""What transformers does not take in a folder, or takes for something else, is refused in one line with file and field."""

import json
import pickle

import pytest
import torch
from conftest import python

from nanostack.errors import UserError
from nanostack.hf import weights as hf
from nanostack.hf.config import from_config, to_config
from nanostack.model import LlamaConfig

safetensors = pytest.importorskip("safetensors.torch")
SHAPE = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, vocab_size=64, seq_len=32)
NAN = float("nan")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR, YARN = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
)
EACH = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}


def described(kind="llama", **fields) -> dict:
    given = to_config(SHAPE, None, torch.float32) | {"model_type": kind, "sliding_window": None} | fields
    del given["architectures"], given["rope_parameters"], given["rope_theta"]
    return given | {key: value for key, value in fields.items() if key.startswith(("rope", "arch"))}


REFUSED = [
    ("llama", {"max_position_embeddings": None}, "its max_position_embeddings is null, no whole number"),
    ("llama", {"num_hidden_layers": True}, "its num_hidden_layers is true, no whole number"),
    ("mistral", {"sliding_window": True}, "its sliding_window is true, no whole number"),
    ("qwen2", {"sliding_window": True}, "its sliding_window is true, no whole number"),
    ("mistral", {"sliding_window": 0}, "its sliding_window is 0, no whole number of 1 or more"),
    ("mistral", {"sliding_window": -1}, "its sliding_window is -1, no whole number of 1 or more"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 0}, "its sliding_window is 0, no whole number of 1 or more"),
    ("qwen2", {"use_sliding_window": "false"}, "its use_sliding_window is 'false', neither true nor false"),
    ("llama", {"rms_norm_eps": None}, "its rms_norm_eps is null, no number"),
    ("llama", {"rms_norm_eps": NAN}, "its rms_norm_eps is nan, no number"),
    ("llama", {"rms_norm_eps": 1}, "its rms_norm_eps is 1, which transformers takes with a decimal point only"),
    ("llama", {"tie_word_embeddings": "false"}, "its tie_word_embeddings is 'false', neither true nor false"),
    ("llama", {"attention_bias": None}, "its attention_bias is null, neither true nor false"),
    ("llama", {"head_dim": 0}, "its head_dim is 0, no whole number of 1 or more"),
    ("qwen2", {"head_dim": None}, "its head_dim is null, no whole number"),
    ("qwen3", {"head_dim": 7}, "heads of 7 channels"),
    ("mistral", {"num_key_value_heads": None}, "its num_key_value_heads is null, no whole number"),
    ("llama", {"num_key_value_heads": 3}, "its num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ("llama", {"quantization_config": {}}, "is of quantized weights"),
    ("llama", {"hidden_act": None}, "has hidden_act None"),
    ("qwen3", {"rope_parameters": EACH}, "its rope_parameters has fields of its own for 'full_attention'"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "transformers takes a mistral for a ministral"),
    ("qwen2", {"layer_types": ["full_attention"]}, "its layer_types do not name its 2 layers"),
    ("llama", {"rope_scaling": LINEAR | {"factor": 0}}, "its factor is 0, and must be positive"),
    ("llama", {"rope_scaling": LINEAR | {"factor": True}}, "its factor is true, no number"),
    ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 0}}, "its low_freq_factor is 0, and must be positive"),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": -1.0}}, "its high_freq_factor is -1.0, and must be positive"),
    (
        "llama",
        {"rope_scaling": YARN | {"original_max_position_embeddings": 16.5}},
        "its original_max_position_embeddings is 16.5",
    ),
    ("llama", {"rope_scaling": YARN, "rope_theta": 1}, "its rope_theta is 1, for which yarn has no channels to mix"),
    ("llama", {"rope_scaling": YARN | {"truncate": "no"}}, "its truncate is 'no', neither true nor false"),
    ("llama", {"rope_scaling": LINEAR, "partial_rotary_factor": True}, "turns a part of each head only"),
    ("llama", {"rope_theta": None}, "its rope_theta is null, no number"),
    ("llama", {"rope_scaling": False}, "its rope_scaling is False, no object"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED, ids=[f"{kind} {fields}"[:70] for kind, fields, _ in REFUSED])
def test_field_that_transformers_does_not_take_is_named_once_with_its_file(kind, fields, message, tmp_path):
    with pytest.raises(UserError) as told:
        from_config(described(kind, **fields), tmp_path / "config.json")
    assert message in str(told.value) and str(told.value).count(str(tmp_path / "config.json")) == 1, told.value


TOLD = [
    (
        {"rope_scaling": LINEAR | {"rope_theta": 2e4}, "rope_theta": 5e5},
        "has two rope_theta; that of its rotary scaling, 20000.0",
    ),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "rope_theta": 5e5}, "has two rope_theta"),
    ({"rope_scaling": LINEAR | {"type": "yarn"}}, "has rope_type 'linear' and type 'yarn'; the first counts"),
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "its rope_scaling and rope_parameters differ"),
    ({"architectures": ["MistralForCausalLM"]}, "its model_type is 'llama', its architectures are ['MistralForCausalLM']"),
    ({"rope_scaling": LINEAR | {"rope_theta": 2e4}, "rope_theta": 2e4}, ""),
    ({"hidden_act": "swish"}, ""),
]


@pytest.mark.parametrize(("fields", "note"), TOLD)
def test_two_fields_that_disagree_are_told(fields, note, tmp_path, capsys):
    from_config(described(**fields), tmp_path / "config.json")
    err = capsys.readouterr().err
    assert note in err and bool(err) == bool(note)


class Code:
    def __reduce__(self):
        return print, ("code was run",)


def model(folder):
    (folder / "config.json").write_text(json.dumps(described()))
    tensors = {}
    for name in hf.names_of(SHAPE):
        for one, shape in zip(hf.theirs(name), hf.shapes_of(name, SHAPE), strict=True):
            tensors[one] = torch.full(shape, float(len(tensors)))
    return tensors


def test_pickles_are_read_as_transformers_reads_them_and_code_in_them_is_not_run(tmp_path, capsys):
    tensors, path = model(tmp_path), tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    found = hf.load(tmp_path)["model"]
    assert torch.equal(found["norm.weight"], tensors["model.norm.weight"])
    for content, message in (
        ([1, 2], "pytorch_model.bin holds a list, no tensors by their names"),
        (tensors | {"step": 5}, "pytorch_model.bin: its 'step' is a int, no tensor"),
        (tensors | {"code": Code()}, "which could be code and is not run: have whoever made it save it as model.safetensors"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError) as told:
            hf.load(tmp_path)
        assert message in str(told.value) and "weights_only" not in str(told.value) and "\n" not in str(told.value)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match="is damaged, or holds more than tensors"):
        hf.load(tmp_path)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("pickled", [False, True])
def test_number_in_the_place_of_a_tensor_is_told(pickled, tmp_path):
    tensors = model(tmp_path) | {"model.norm.weight": torch.tensor(1.0)}
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"(is damaged|model\.norm\.weight is \(\), its config\.json asks for \(32,\))"):
        dict(hf.load(tmp_path)["model"])


def test_safetensors_go_before_pickles_and_it_is_told(tmp_path, capsys):
    tensors = model(tmp_path)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    torch.save({name: value + 1 for name, value in tensors.items()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(hf.load(tmp_path)["model"]["norm.weight"], tensors["model.norm.weight"])
    assert "has both model.safetensors and pytorch_model.bin: the first is read" in capsys.readouterr().err


def test_adapter_and_odd_values_end_a_command_in_one_line(tmp_path):
    safetensors.save_file(model(tmp_path), tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    done = python("-m", "nanostack", "import", tmp_path, tmp_path / "out.pt")
    assert done.returncode == 2 and "has adapter_config.json, an adapter of PEFT's" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json does not hold a JSON object, but a list"):
        hf.load(tmp_path)
