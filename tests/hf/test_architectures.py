"""Folders of each architecture, with fields drawn at random, are read as transformers reads them, or refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st

from nanostack import models
from nanostack.config import Growth, Optim
from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.hf import weights as hf
from nanostack.hf.config import from_config
from nanostack.hf.gguf_vocabulary import QWEN2_PATTERN
from nanostack.model import LlamaConfig, RopeScaling
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer
from nanostack.text.bounds import Bounds

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
CPU = torch.device("cpu")
CONTEXT = 32
TOKENS = torch.randint(64, (2, CONTEXT), generator=torch.Generator().manual_seed(3))


def maybe(*values):
    """One of the values, or, half of the time, the field is not there."""
    return st.sampled_from([*[None] * len(values), *({"is": value} for value in values)])


def rope(kind: str, needs: dict, **may):
    """A rotary scaling of one kind, in which now and then something that it needs is not there."""
    given = {"rope_theta": st.sampled_from([1e4, 5e5]), "partial_rotary_factor": st.sampled_from([1.0, 1.0, 0.5])} | may
    spelled = st.sampled_from([{"rope_type": kind}, {"rope_type": kind}, {"type": kind}, {"rope_type": kind, "type": "linear"}])
    fields = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in needs.items()}, optional=given)
    lost = st.sampled_from([*[None] * 7, *needs])
    return st.builds(lambda how, what, name: how | {k: v for k, v in what.items() if k != name}, spelled, fields, lost)


FACTOR, ORIGINAL = {"factor": [2.0, 4]}, {"original_max_position_embeddings": st.sampled_from([8, 16])}
ROPE = st.one_of(
    rope("default", {}),
    rope("linear", FACTOR),
    rope("llama3", FACTOR | {"low_freq_factor": [1.0, 2.0], "high_freq_factor": [4.0, 1.0, 0.5]}, **ORIGINAL),
    rope(
        "yarn",
        FACTOR,
        **ORIGINAL,
        beta_fast=st.sampled_from([32, 4.0]),
        beta_slow=st.sampled_from([1, 0.5]),
        attention_factor=st.sampled_from([1.25, None]),
        mscale=st.sampled_from([1.0, 0.7]),
        mscale_all_dim=st.sampled_from([1.0, 0.4]),
        truncate=st.booleans(),
    ),
    rope("dynamic", FACTOR),
)
FIELDS = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
        "num_attention_heads": st.sampled_from([4, 6]),
        "num_key_value_heads": st.sampled_from([{"is": 1}, {"is": 2}, {"is": 2}, {"is": None}]),
        "head_dim": maybe(8, 12, 12, None),
        "attention_bias": maybe(True, False),
        "mlp_bias": maybe(True, False),
        "tie_word_embeddings": maybe(True, False),
        "rms_norm_eps": maybe(1e-5),
        "max_position_embeddings": maybe(CONTEXT, 64),
        "sliding_window": maybe(16, CONTEXT, None),
        "use_sliding_window": maybe(True, False),
        "max_window_layers": maybe(1, 2),
        "layer_types": maybe(["full_attention", "sliding_attention"], ["full_attention"] * 2, ["full_attention"] * 2),
        "rope_theta": maybe(2e4),
        "rope_scaling": st.none() | ROPE.map(lambda fields: {"is": fields}),
        "rope_parameters": st.none() | ROPE.map(lambda fields: {"is": fields}),
        "original_max_position_embeddings": maybe(12),
    }
)
FILES = st.sampled_from(["single", "index", "both"])
# One field in three folders is of a value that hardly anybody means.
WHOLE = [
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "head_dim",
]
WHOLE += ["max_position_embeddings", "sliding_window", "max_window_layers", "original_max_position_embeddings"]
FLAGS = ["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"]
OTHERS = ["rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "hidden_act", "quantization_config"]
VALUES = [None, None, True, False, 0, -1, 1, 2, "4", "false", 16.0, 0.5, [], {}, "swish"]
ODD_ONE = st.tuples(st.sampled_from(WHOLE + FLAGS + OTHERS), st.sampled_from(VALUES))
ODD = st.integers(0, 2).flatmap(lambda number: ODD_ONE if number == 2 else st.none())


def build(folder: Path, fields: dict, files: str, head: bool, odd: tuple | None) -> None:
    """A folder with these fields, and the weights that transformers asks for; with `head` also one that tying forbids.

    odd: (a field, its value) that goes before what `fields` says.
    """
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    given = {name: value for name, value in fields.items() if value is not None}
    described = sizes | {name: value["is"] if isinstance(value, dict) else value for name, value in given.items()}
    described |= dict([odd] if odd else [])
    (folder / "config.json").write_text(json.dumps(described))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        draws = torch.Generator().manual_seed(number)
        around = 1.0 if "norm" in name else 0.0
        tensors[name] = around + 0.3 * torch.randn(value.shape, generator=draws)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if head:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    from safetensors.torch import save_file

    if files != "index":
        whole = {name: value.clone() for name, value in tensors.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    if files != "single":  # of other numbers where both are there: which file is read must show
        shards = {"a": dict(list(tensors.items())[::2]), "b": dict(list(tensors.items())[1::2])}
        for name, part in shards.items():
            part = {key: value * (2.0 if files == "both" else 1.0) for key, value in part.items()}
            save_file(part, folder / f"model-{name}.safetensors", metadata={"format": "pt"})
        where = {key: f"model-{name}.safetensors" for name, part in shards.items() for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def logits_of_theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def logits_of_ours(folder: Path) -> tuple[torch.Tensor, int]:
    """The logits, and the context that the folder is read with."""
    model = models.restore(models.read(folder), Placement(CPU)).model
    with torch.no_grad():
        return model(TOKENS[:, : model.config.seq_len]), model.config.seq_len


def fields_of(kind: str, **given) -> dict:
    """Fields as FIELDS draws them, of a folder of this architecture that says what is given."""
    return {"model_type": kind, "num_attention_heads": 4} | {name: {"is": value} for name, value in given.items()}


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8}
TWO_ROPES = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
HALF = {"use_sliding_window": True, "sliding_window": 16, "num_key_value_heads": 2}
SLIDES = ["full_attention", "sliding_attention"]
# What two files or two fields say differently, and windows: each is drawn too seldom to be left to chance.
KNOWN = [
    (fields_of("llama", tie_word_embeddings=True), "single", True),
    (fields_of("qwen2", tie_word_embeddings=True, num_key_value_heads=2), "both", False),
    (fields_of("mistral", sliding_window=16, num_key_value_heads=2), "single", False),
    (fields_of("qwen2", max_window_layers=1, **HALF), "index", False),
    (fields_of("qwen3", layer_types=SLIDES, **HALF), "single", False),
    (fields_of("llama", **TWO_ROPES), "single", False),
    (fields_of("llama", rope_scaling=LLAMA3, original_max_position_embeddings=16), "single", False),
    (fields_of("llama", rope_scaling=LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}), "single", False),
    (fields_of("llama", rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}), "single", False),
    (fields_of("qwen3", hidden_act="swish", num_key_value_heads=2), "single", False),
    (fields_of("qwen2", head_dim=None, num_key_value_heads=2), "single", False),
    (fields_of("mistral", num_key_value_heads=None), "single", False),
]


def every(cases):
    """Tries each of these besides what is drawn."""

    def decorate(test):
        for fields, files, head in cases:
            test = example(fields=fields, files=files, head=head, odd=None)(test)
        return test

    return decorate


@every(KNOWN)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a folder that differs is told as it was drawn
    suppress_health_check=list(HealthCheck),
)
@given(fields=FIELDS, files=FILES, head=st.booleans(), odd=ODD)
def test_folder_drawn_at_random_has_the_logits_of_transformers_or_is_refused(fields, files, head, odd):
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            build(folder, fields, files, head, odd)
            theirs = logits_of_theirs(folder)
        except Exception as error:  # a folder that transformers does not take
            event(f"not of transformers: {type(error).__name__}")
            with pytest.raises(UserError) as told:
                if list(folder.glob("*.safetensors")):
                    dict(hf.load(folder)["model"])
                else:  # what lacks weights would be refused for that
                    from_config(json.loads((folder / "config.json").read_text()), folder / "config.json")
            assert name in str(told.value) and str(told.value).count(name) == 1, told.value
            return
        try:
            ours, context = logits_of_ours(folder)
        except UserError as error:
            event(f"refused: {str(error).replace(name, '')[12:60]}")
            refused = ("partial_rotary_factor", "no number", "sliding_attention", "'dynamic'", "a ministral")
            assert odd or any(word in str(error) for word in refused), error
            assert str(error).count(name) == 1, error
            return
        event("compared")
        scale = theirs[:, :context].abs().max()
        torch.testing.assert_close(ours, theirs[:, :context], rtol=0, atol=1e-4 * max(1.0, float(scale)))


SHAPE = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=48, d_ff=40, vocab_size=64, seq_len=CONTEXT, d_head=16)
SHAPES = {
    "llama": SHAPE,
    "llama with biases": replace(SHAPE, qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True),
    "llama, linear": replace(SHAPE, rope_scaling=RopeScaling(2.0, kind="linear")),
    "qwen2": replace(SHAPE, qkv_bias=True, rope_scaling=RopeScaling(4.0, original_seq_len=8, kind="yarn", beta_fast=4.0)),
    "qwen3": replace(SHAPE, qk_norm=True, norm_eps=1e-6, rope_theta=1e6),
    "qwen3 with biases": replace(SHAPE, qk_norm=True, qkv_bias=True, out_bias=True),
}


@pytest.mark.parametrize(("name", "config"), SHAPES.items(), ids=SHAPES)
def test_model_that_was_grown_is_exported_and_read_again(name, config, tmp_path):
    state = State.create(config, Optim(), Placement(CPU), seed=2)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in state.model.parameters() if p.ndim == 1):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.3)
    state.grow(Growth("stack", 2))
    export.save(state, tmp_path / "out", None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == name.split()[0].strip(",")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in state.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, state.model(TOKENS), rtol=0, atol=1e-4)
    back = hf.load(tmp_path / "out")
    assert LlamaConfig(**back["config"]) == state.model.config
    assert all(torch.equal(back["model"][key], value) for key, value in state.model.named_parameters())


def test_what_no_architecture_of_theirs_computes_is_not_exported(tmp_path):
    state = State.create(replace(SHAPE, qk_norm=True, mlp_bias=True), Optim(), Placement(CPU), seed=2)
    with pytest.raises(UserError, match="no architecture of transformers has qk_norm, mlp_bias and nothing more of the kind"):
        export.save(state, tmp_path / "out", None)
    assert not list(tmp_path.iterdir())


def of_qwens_kind(composes: bool, end: str, pattern: str = QWEN2_PATTERN, ignores: bool = False, template: bool = False):
    """A tokenizer that cuts as Qwen's, and does the rest as it or not."""
    import tokenizers
    from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignores))
    made.normalizer = normalizers.NFC() if composes else None
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), bytes_only])
    made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(ODD_TEXTS * 9, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    if template:
        made.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, made.token_to_id(end))])
    return tokenizer.JsonTokenizer("theirs", made.to_str().encode(), end)


ODD_TEXTS = ["1234 numbers,  and\t words\r\n in 12345678 lines", "e\u0301 n\u0303 \u1100\u1161 é", "I'LL 'ſt don't 日本 🙂", ""]
TOKENIZERS = {  # what is written, the tokenizer
    "our own": ("llama", lambda: tokenizer.train([ODD_TEXTS[0]] * 4, 270)),
    "as Qwen's": ("qwen2", lambda: of_qwens_kind(True, "<|endoftext|>")),
    "as Qwen's, with a template": ("qwen2", lambda: of_qwens_kind(True, "<|endoftext|>", template=True)),
    "composes nothing": ("llama", lambda: of_qwens_kind(False, "<|endoftext|>")),
    "cuts in threes": ("llama", lambda: of_qwens_kind(True, "<|endoftext|>", QWEN2_PATTERN.replace("{N}", "{N}{1,3}"))),
    "another end": ("llama", lambda: of_qwens_kind(True, "<|end|>")),
}


@pytest.mark.parametrize(("kind", "made"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizer_of_a_qwen2_gives_its_ids_in_every_folder(kind, made, tmp_path):
    """transformers reads the tokenizer of every qwen2 folder as Qwen's own: a model with another goes as a Llama."""
    state = State.create(replace(SHAPE, qkv_bias=True, vocab_size=384), Optim(), Placement(CPU), seed=2)
    ours = made()
    export.save(state, tmp_path / "out", None, tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*ODD_TEXTS, "<|endoftext|>x" if "end" not in ours.eot_token else ""]:
        assert theirs.encode(text) == ours.encode_prompt(text), text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == kind
    assert kind == "qwen2" or not any(layer.self_attn.o_proj.bias.any() for layer in model.model.layers)
    assert theirs.bos_token_id == model.config.bos_token_id == model.generation_config.bos_token_id == ours.prefix
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, state.model(TOKENS), rtol=0, atol=1e-4)


def test_begin_and_ends_of_texts_are_written_also_without_a_tokenizer(tmp_path):
    state = State.create(SHAPE, Optim(), Placement(CPU), seed=2)
    for bounds, begin, end in (
        (Bounds([5, 6], ends=[7]), 5, 7),
        (Bounds([], prefix=3, ends=[7, 8]), 3, [7, 8]),
        (Bounds(), None, None),
    ):
        state.bounds = bounds
        export.save(state, tmp_path / "out", None)
        for file in ("config.json", "generation_config.json"):
            said = json.loads((tmp_path / "out" / file).read_text())
            assert (said["bos_token_id"], said["eos_token_id"]) == (begin, end), file
        assert hf.load(tmp_path / "out")["bounds"]["ends"] == bounds.ends
