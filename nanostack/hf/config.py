"""Hugging Face's config.json of a Llama, written and read."""

import dataclasses
from pathlib import Path

import torch

from nanostack.errors import UserError
from nanostack.model import LlamaConfig, RopeScaling


def to_config(config: LlamaConfig, eot: int | None, dtype: torch.dtype) -> dict:
    """config.json of a model."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= dataclasses.asdict(scaling) | {"rope_type": "llama3"}
        rope["original_max_position_embeddings"] = rope.pop("original_seq_len")
    old: dict = {"rope_theta": config.rope_theta}  # where transformers 4 looks
    if scaling is not None:
        old["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.d_head,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": eot,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name of the same for transformers 4
    } | old


def from_config(found: dict, where: Path) -> LlamaConfig:
    """The shape that a config.json describes. UserError for what our Llama is not."""
    if found.get("model_type") != "llama":
        raise UserError(f"{where} is of architecture {found.get('model_type')!r}; only 'llama' can be read")
    if found.get("quantization_config"):
        raise UserError(f"{where} is of quantized weights: save them anew in bfloat16 with transformers (dequantize)")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if found.get(key, wanted) != wanted:
            raise UserError(f"{where} has {key} {found[key]!r}; our Llama has {wanted!r}")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(found.get(key) or {}, dict):
            raise UserError(f"{where}: its {key} is {found[key]!r}, no object")
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    for key in (*sizes, "vocab_size", "max_position_embeddings"):
        if not isinstance(found.get(key, 0) or 0, int):
            raise UserError(f"{where}: its {key} is {found[key]!r}, no whole number")
    rope = (found.get("rope_scaling") or {}) | (found.get("rope_parameters") or {})
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [name for name in names if name not in rope]:
            raise UserError(f"{where}: its llama3 rotary scaling lacks {', '.join(missing)}")
        if odd := [name for name in names if not isinstance(rope[name], int | float)]:
            raise UserError(f"{where}: its {odd[0]} is {rope[odd[0]]!r}, no number")
        scaling = RopeScaling(*(rope[name] for name in names))
    elif kind != "default":
        raise UserError(f"{where} scales rotary positions by {kind!r}; 'default' and 'llama3' are known")
    try:
        heads, width = found["num_attention_heads"], found["hidden_size"]
        config = LlamaConfig(
            n_layer=found["num_hidden_layers"],
            n_head=heads,
            n_kv_head=found.get("num_key_value_heads") or heads,
            d_model=width,
            d_ff=found["intermediate_size"],
            vocab_size=found["vocab_size"],
            seq_len=found.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta", found.get("rope_theta", 1e4))),
            norm_eps=found.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(found.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
        )
    except KeyError as error:
        raise UserError(f"{where} does not say {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} does not describe a Llama: {error}") from error
    if (found.get("head_dim") or config.d_head) != config.d_head:
        raise UserError(f"{where} has heads of {found['head_dim']}, not of hidden_size / num_attention_heads = {config.d_head}")
    return config
