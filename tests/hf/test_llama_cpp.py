"""llama.cpp itself takes what `export --gguf` writes: its logits, tokens and ids. It is run by xllamacpp, a build on PyPI:

pip install --target FOLDER --no-deps xllamacpp, and PYTHONPATH=FOLDER; `python -m bench.clients llama.cpp` does that.
"""

import json
import os
import random
import urllib.request
from pathlib import Path

import pytest
import tokenizers
import torch
from odd_text import ODD, neighbours

from nanostack.config import Optim
from nanostack.hf import export, gguf, gguf_vocabulary
from nanostack.model import LlamaConfig, RopeScaling
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer
from nanostack.text.translation import oniguruma

os.environ["HF_HUB_OFFLINE"] = "1"
xllamacpp = pytest.importorskip("xllamacpp", reason="runs llama.cpp, which takes xllamacpp (PyPI)")
transformers = pytest.importorskip("transformers")
TEXTS = [path.read_text() for path in sorted(Path(tokenizer.__file__).parent.glob("*.py"))]
BPE = tokenizer.train(TEXTS, 400)
N_VOCAB = 512


class LlamaCpp:
    """llama.cpp's server on a file, one thread, with keys and values in float32."""

    def __init__(self, path: Path):
        wanted = xllamacpp.CommonParams()
        wanted.model.path, wanted.n_ctx, wanted.n_parallel = str(path), 256, 1
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
        wanted.verbosity, wanted.warmup, wanted.fit_params = -1, False, False
        wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(wanted)

    def ask(self, what: str, **body) -> dict:
        request = urllib.request.Request(f"{self.server.listening_address}/{what}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str) -> list[int]:
        return self.ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def greedy(self, prompt: str | list[int], tokens: int) -> list[int]:
        how = {"temperature": 0, "top_k": 1, "return_tokens": True, "cache_prompt": False, "ignore_eos": True}
        return self.ask("completion", prompt=prompt, n_predict=tokens, **how)["tokens"]

    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """Of the token behind `ids`. An A is made to come, since half a character would not be told."""
        how = {"logit_bias": [[65, 1000.0]], "n_probs": N_VOCAB, "temperature": 0, "cache_prompt": False}
        (told,) = self.ask("completion", prompt=ids, n_predict=1, **how)["completion_probabilities"]
        found = {one["id"]: one["logprob"] for one in told["top_logprobs"]}
        return torch.tensor([found[number] for number in range(N_VOCAB)])


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens but for end-of-text, with which llama.cpp would stop."""
    for _ in range(tokens):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[BPE.eot] = -torch.inf
        ids = [*ids, logits.argmax().item()]
    return ids[-tokens:]


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size that makes greedy tokens differ, and gains and biases that are none too."""
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=drawn)
            else:
                parameter.normal_(0, 0.5 if name.endswith("bias") else 0.15, generator=drawn)
    return model


OURS = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96, vocab_size=N_VOCAB, seq_len=256)
SHAPES = {
    "default": OURS,
    "llama3, looped": LlamaConfig(**vars(OURS) | {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32), "loops": 2}),
    "tied, scaled": LlamaConfig(**vars(OURS) | {"tie_embeddings": True, "residual_scale": 2.0, "n_kv_head": 4}),
}


def of_ours(config: LlamaConfig, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[State, LlamaCpp]:
    state = State.create(config, Optim(), Placement(torch.device("cpu")), 0)
    spread(state.model)
    export.save(state, folder / "model", None, dtype, tokenizer=BPE, as_gguf=True)
    return state, LlamaCpp(folder / "model/model.gguf")


PROMPTS = ["def ", "import os\n\nclass", "x = [1234, 5678]\n", "naïve ☃ 中文 🙂", "    return self"]


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_five_prompts_go_on_with_the_tokens_of_ours(config, tmp_path):
    state, theirs = of_ours(config, tmp_path)
    for prompt in PROMPTS:
        ids = BPE.encode(prompt)
        assert theirs.ids(prompt) == ids
        assert theirs.greedy(prompt, 30) == greedy(state.model, ids, 30), prompt
        with torch.no_grad():
            logits = state.model(torch.tensor([ids]))[0, -1]
        torch.testing.assert_close(theirs.log_probabilities(ids), torch.log_softmax(logits, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_as_near_as_products_of_them_can_be(dtype, tmp_path):
    """llama.cpp rounds what goes into a matrix product too: it is compared with our weights, rounded alike, in float32."""
    state, theirs = of_ours(OURS, tmp_path, dtype)
    ids = BPE.encode(TEXTS[0])[:200]
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.copy_(parameter.to(dtype))
        logits = state.model(torch.tensor([ids]))[0, -1]
    differences = theirs.log_probabilities(ids) - torch.log_softmax(logits, -1)
    print(f"{dtype}: logits differ by {differences.std():.1e} (standard deviation), where theirs is {logits.std():.2f}")
    assert differences.std() < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] * logits.std()


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
THEIRS = {
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 5e5}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "yarn": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize(("kind", "parts"), THEIRS.values(), ids=THEIRS)
def test_architectures_of_transformers_compute_the_same_there(kind, parts, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": N_VOCAB, "max_position_embeddings": 256, "eos_token_id": BPE.eot}
    config = getattr(transformers, f"{kind}Config")(**shape | {"bos_token_id": None} | parts)
    model = spread(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.save_pretrained(tmp_path / "model")
    export.write_tokenizer(BPE, tmp_path / "model", 256)
    gguf.write(tmp_path / "model", tmp_path / "model.gguf", kind)
    theirs = LlamaCpp(tmp_path / "model.gguf")
    for n in (1, 5, 150):
        ids = torch.randint(399, (1, n), generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
            wanted = model.generate(ids, max_new_tokens=20, do_sample=False, suppress_tokens=[BPE.eot])[0, n:]
        torch.testing.assert_close(theirs.log_probabilities(ids[0].tolist()), logits.log_softmax(-1), rtol=0, atol=1e-4)
        assert theirs.greedy(ids[0].tolist(), 20) == wanted.tolist()


def test_text_ends_at_each_of_three_ends(tmp_path):
    state, _ = of_ours(OURS, tmp_path)
    free = greedy(state.model, BPE.encode("def "), 12)
    at = [number for number, token in enumerate(free) if token not in free[:number]][2:5]
    folder = tmp_path / "model"
    for number in at:
        others = [one for one in (508, 509) if one != free[number]]
        config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": others[0]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[number], BPE.eot]}))
        gguf.write(folder, tmp_path / f"{number}.gguf", "ends")
        how = {"temperature": 0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        told = LlamaCpp(tmp_path / f"{number}.gguf").ask("completion", prompt="def ", n_predict=12, **how)
        assert told["stop_type"] == "eos" and told["tokens"][:number] == free[:number] and len(told["tokens"]) <= number + 1


def cut(way: str) -> bytes:
    """A tokenizer.json that cuts text so, with a token for every two bytes that are neighbours in ODD."""
    made = tokenizer.Tokenizer("odd", tokenizer.PATTERN, RANKS, {tokenizer.EOT: len(RANKS)})
    theirs = tokenizers.Tokenizer.from_buffer(made.to_json())
    step = tokenizers.pre_tokenizers
    bytes_only = step.ByteLevel(add_prefix_space=False, use_regex=False)
    own = {"ByteLevel": [], "Digits, ByteLevel": [step.Digits(individual_digits=True)]}
    cutting = (
        [step.ByteLevel(add_prefix_space=False)] if way in own else [step.Split(tokenizers.Regex(way), "isolated"), bytes_only]
    )
    theirs.pre_tokenizer = step.Sequence([*own.get(way, []), *cutting])
    return theirs.to_str().encode()


RANKS = neighbours()


@pytest.mark.parametrize("way", [way for way in gguf_vocabulary.WAYS if way != tokenizer.BYTES_PATTERN])
def test_ids_of_odd_text_are_the_same_for_every_way_to_cut(way, tmp_path):
    """But for 'ſ, as the docs tell. GPT-4's, which takes space at the end of a text together, is refused."""
    shape = LlamaConfig(n_layer=1, n_head=1, n_kv_head=1, d_model=32, d_ff=32, vocab_size=len(RANKS) + 1, seq_len=64)
    state = State.create(shape, Optim(), Placement(torch.device("cpu")), 0)
    ours = tokenizer.JsonTokenizer("odd", cut(way), tokenizer.EOT)
    export.save(state, tmp_path / "model", None, torch.bfloat16, tokenizer=ours, as_gguf=True)
    theirs = LlamaCpp(tmp_path / "model/model.gguf")
    for text in [text for text in random.Random(1).sample(ODD, 400) if "'ſ" not in text]:
        assert theirs.ids(text) == ours.encode(text), text


def test_patterns_that_are_written_are_those_that_are_known():
    """Translated as they are exported."""
    assert {oniguruma("ours", pattern) for pattern in (tokenizer.PATTERN, tokenizer.BYTES_PATTERN)} < set(gguf_vocabulary.WAYS)
