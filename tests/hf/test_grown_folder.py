"""A folder of theirs that was grown keeps what it had: the ids of its tokenizer, its precision, its window."""

import json
import os

import pytest
import tokenizers
import torch
from hflm import byte_level, write_tokenizer
from tokenizers import AddedToken, normalizers, processors

import grow
from nanostack.config import Growth
from nanostack.hf import export
from nanostack.hf.config import to_config
from nanostack.model import LlamaConfig

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
ODD = ("the cat on", " the cat", "  the\n cat zé", "a</s>b", "12345 e\u0301 🙂", "")
SHAPE = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, vocab_size=384, seq_len=32)


def folder_of(path, kind, dtypes=(torch.float32,), **fields):
    """A folder of theirs with random weights, whose tensors have these dtypes in turn."""
    path.mkdir()
    described = to_config(SHAPE, None, torch.float32) | {"model_type": kind} | fields
    (path / "config.json").write_text(json.dumps({key: value for key, value in described.items() if key != "architectures"}))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
    tensors = {name: value.to(dtypes[number % len(dtypes)]) for number, (name, value) in enumerate(model.state_dict().items())}
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def grown(folder, **how):
    out = folder.with_name("grown")
    grow.main(grow.Command(folder, Growth(**({"op": "zero", "g": 2} | how)), out, device="cpu"))
    return out


def falling_back_to_bytes(prepends: bool) -> tokenizers.Tokenizer:
    """A BPE as Llama 2's, which puts a space before every text or does not."""
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for token in [*"▁abcdefghijklmnopqrstuvwxyz", "th", "the", "▁the", "ca", "cat", "▁cat", "on"]:
        vocab[token] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("o", "n")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prepends else space
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return made


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CASES = [  # the model, what its tokenizer is, the class that tokenizer_config.json names, the class that config.json names
    *[("mistral", prepends, name, None) for prepends in (True, False) for name in ("LlamaTokenizer", "LlamaTokenizerFast")],
    ("mistral", False, None, None),
    ("mistral", False, None, "LlamaTokenizer"),
    ("mistral", None, "LlamaTokenizerFast", None),
    ("llama", False, "LlamaTokenizer", None),
    ("llama", False, None, "LlamaTokenizer"),
    ("qwen2", None, "LlamaTokenizerFast", None),
    ("qwen3", None, None, None),
    ("qwen3", None, "PreTrainedTokenizerFast", None),
]


@pytest.mark.parametrize(("kind", "prepends", "name", "of_model"), CASES)
def test_autotokenizer_gives_the_same_ids_before_and_after_growth(kind, prepends, name, of_model, tmp_path):
    head = {"num_key_value_heads": 2} | ({"tokenizer_class": of_model} if of_model else {})
    folder = folder_of(tmp_path / "base", kind, **head)
    made = byte_level(False) if prepends is None else falling_back_to_bytes(prepends)
    write_tokenizer(
        folder, made, {} if prepends is None and name is None else NAMED | ({"tokenizer_class": name} if name else {})
    )
    out = grown(folder)
    before, after = (transformers.AutoTokenizer.from_pretrained(one) for one in (folder, out))
    assert type(before) is type(after) and json.loads((out / "config.json").read_text())["model_type"] == kind
    assert [before.encode(text) for text in ODD] == [after.encode(text) for text in ODD]
    assert (before.bos_token_id, before.eos_token_id) == (after.bos_token_id, after.eos_token_id)


def test_tokenizer_of_vocabulary_and_merges_goes_along(tmp_path):
    folder = folder_of(tmp_path / "base", "qwen2", num_key_value_heads=2)
    byte_level(False).model.save(str(folder))
    out = grown(folder)
    before, after = (transformers.AutoTokenizer.from_pretrained(one) for one in (folder, out))
    assert before.encode("the cat") == after.encode("the cat") and len(before.encode("the cat")) < 7


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_ends_that_a_config_does_not_name_stay_those_of_its_architecture(kind, tmp_path):
    folder = folder_of(tmp_path / "base", kind)
    said = json.loads((folder / "config.json").read_text())
    silent = {key: value for key, value in said.items() if key not in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(silent))
    before, after = (transformers.AutoConfig.from_pretrained(one) for one in (folder, grown(folder)))
    assert (before.bos_token_id, before.eos_token_id) == (after.bos_token_id, after.eos_token_id)
    models = (transformers.AutoModelForCausalLM.from_pretrained(one) for one in (folder, folder.with_name("grown")))
    assert len({str(model.generation_config.eos_token_id) for model in models}) == 1


def test_mistral_keeps_its_window_and_its_logits(tmp_path):
    folder = folder_of(tmp_path / "base", "mistral", sliding_window=8)
    out = grown(folder)
    tokens = torch.randint(384, (2, 32), generator=torch.Generator().manual_seed(3))
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(one) for one in (folder, out))
    assert (after.config.sliding_window, after.config.max_position_embeddings) == (8, 32)
    with torch.no_grad():
        torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=0, atol=1e-4)
    assert export.check_place(out, folder, overwrite=True) is None


@pytest.mark.parametrize(
    ("dtypes", "kept", "told"),
    [
        ((torch.float32, torch.bfloat16), torch.float32, "has tensors of 2 dtypes: what is made of it is of float32"),
        ((torch.bfloat16, torch.float16), torch.float32, "has tensors of 2 dtypes"),
        ((torch.float16,), torch.float16, ""),
        ((torch.float64, torch.float32), torch.float32, "has tensors of float64: they are rounded to float32"),
    ],
)
def test_no_tensor_is_narrowed_by_growth(dtypes, kept, told, tmp_path, capsys):
    """The dtype was that of the last norm, and float16 has no 1e5."""
    folder = folder_of(tmp_path / "base", "llama", dtypes)
    tensors = safetensors.load_file(folder / "model.safetensors")
    wide = next(name for name, value in tensors.items() if value.dtype == dtypes[0] and value.ndim == 2)
    tensors[wide][0, 0] = 1e5 if dtypes[0] != torch.float16 else 1.0
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = safetensors.load_file(grown(folder) / "model.safetensors")
    assert told in capsys.readouterr().err and {value.dtype for value in out.values()} == {kept}
    assert all(torch.equal(out[name].double(), tensors[name].double()) for name in tensors if ".1." not in name)
