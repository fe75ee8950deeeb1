"""lm-eval's own model of a Hugging Face folder, against which ours is held, and small folders by transformers."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "the cat sat on the mat. ",
    "def f(x):\n    return x + 1\n",
    "Question: what is it?\nAnswer: a parrot 123",
    "naïve 日本 🙂",
]
BOS, EOS, TURN = "<|begin|>", "<|end|>", "<|im_end|>"


def hflm(folder: Path):
    """HFLM with one text at a time. It imports accelerate, for several devices, which one does not need."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = importlib.util.find_spec("accelerate") is None
    if missing:
        names = ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size")
        sys.modules["accelerate"] = SimpleNamespace(**dict.fromkeys(names))
        sys.modules["accelerate.utils"] = SimpleNamespace(get_max_memory=None)
    try:
        from lm_eval.models.huggingface import HFLM
    finally:
        for name in ("accelerate", "accelerate.utils") if missing else ():
            del sys.modules[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)


def byte_level(begins: bool = True) -> tokenizers.Tokenizer:
    """A byte-level BPE as Llama 3's, with a template that puts BOS before every text if it `begins`."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in (BOS, EOS, TURN)])
    byte = processors.ByteLevel(trim_offsets=False)
    begin = {"single": f"{BOS} $A", "pair": f"{BOS} $A {BOS} $B", "special_tokens": [(BOS, made.token_to_id(BOS))]}
    made.post_processor = processors.Sequence([byte, processors.TemplateProcessing(**begin)]) if begins else byte
    return made


def write_tokenizer(folder: Path, made: tokenizers.Tokenizer, config: dict | None, special_map: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def llama(folder: Path, made: tokenizers.Tokenizer, seq_len: int, std: float = 0.3) -> Path:
    """A folder with random weights of a Llama, far from even probabilities, and this tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": seq_len, "initializer_range": std}
    ids = {"bos_token_id": made.token_to_id(BOS), "eos_token_id": made.token_to_id(EOS)}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=made.get_vocab_size(), **shape, **ids))
    model.save_pretrained(folder)
    return write_tokenizer(folder, made, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS})
