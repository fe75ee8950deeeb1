"""Hugging Face's config.json of a Llama, Mistral, Qwen2 or Qwen3, written and read.

What it does not say, transformers fills in by architecture, and where two fields disagree it takes one: so does this, with a
line that says which. What it computes otherwise than our model is refused.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanostack.errors import UserError
from nanostack.model import LlamaConfig, RopeScaling


class Architecture(NamedTuple):
    """A model_type: the name of its class, and what a config.json means that is silent (transformers 5.24)."""

    name: str
    seq_len: int
    n_kv_head: int | None = None  # None: as many as query heads
    d_head: int | None = None  # None: hidden_size / num_attention_heads
    window: int | None = None  # of all layers


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", 2048),
    "mistral": Architecture("MistralForCausalLM", 4096 * 32, n_kv_head=8, window=4096),
    "qwen2": Architecture("Qwen2ForCausalLM", 32768, n_kv_head=32),
    "qwen3": Architecture("Qwen3ForCausalLM", 32768, n_kv_head=32, d_head=128),
}
SIZES = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "head_dim", "sliding_window", "max_window_layers"),
)


def model_type(config: LlamaConfig) -> str:
    """The architecture of transformers that computes what a model of this shape does. UserError where there is none."""
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    if config.qk_norm and biases in ((False, False, False), (True, True, False)):
        return "qwen3"
    if not config.qk_norm and config.qkv_bias == config.out_bias:
        return "llama"
    if not config.qk_norm and biases == (True, False, False):
        return "qwen2"
    given = [name for name in ("qk_norm", "qkv_bias", "out_bias", "mlp_bias") if getattr(config, name)]
    raise UserError(f"no architecture of transformers has {', '.join(given)} and nothing more of the kind: not exported")


def to_config(config: LlamaConfig, eot: int | None, dtype: torch.dtype, grown_from: dict | None = None) -> dict:
    """config.json of a model. UserError where transformers has none like it.

    grown_from: the config.json of the model that it was made of. What was a Mistral stays one, with its window, as AutoTokenizer
    makes another tokenizer of the same files for a Llama.
    """
    kind, seq_len, window = model_type(config), config.seq_len, None
    if kind == "llama" and grown_from and grown_from.get("model_type") == "mistral":
        kind, seq_len = "mistral", context_of(grown_from)
        window = grown_from.get("sliding_window", ARCHITECTURES[kind].window)
    rope, old = _rope_of(config)
    biases: dict[str, Any] = {"attention_bias": config.out_bias} if kind in ("llama", "qwen3") else {}
    biases |= {"mlp_bias": config.mlp_bias} if kind == "llama" else {"sliding_window": window}
    biases |= {"use_sliding_window": False} if kind in ("qwen2", "qwen3") else {}
    return {
        "architectures": [ARCHITECTURES[kind].name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        **biases,
        "bos_token_id": None,
        "eos_token_id": eot,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name of the same for transformers 4
    } | old


def _rope_of(config: LlamaConfig) -> tuple[dict, dict]:
    """(rope_parameters, the same in the fields where transformers 4 looks)."""
    theta, scaling = {"rope_theta": config.rope_theta}, config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"} | theta, dict(theta)
    says: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        says["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        says |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling.kind == "yarn":  # what stands there by default is left out, as other programs know less of it
        own = {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")}
        says |= {name: value for name, value in own.items() if value != getattr(RopeScaling, name)}
    return says | theta, {**theta, "rope_scaling": says}


def from_config(found: dict, where: Path) -> LlamaConfig:
    """The shape that a config.json describes. UserError for what our model is not."""
    kind = found.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where} is of architecture {kind!r}; {', '.join(ARCHITECTURES)} can be read")
    if found.get("quantization_config"):
        raise UserError(f"{where} is of quantized weights: save them anew in bfloat16 with transformers (dequantize)")
    if found.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where} has hidden_act {found['hidden_act']!r}; our model has 'silu'")
    for key in SIZES:
        if not isinstance(found.get(key, 0) or 0, int):
            raise UserError(f"{where}: its {key} is {found[key]!r}, no whole number")
    silent = ARCHITECTURES[kind]
    attention_bias = bool(found.get("attention_bias", False)) and kind in ("llama", "qwen3")
    seq_len = context_of(found)
    theta, scaling = _rope(found, seq_len, where)
    try:
        heads = found["num_attention_heads"]
        window = _window(found, where)
        if window is not None and window < seq_len:
            told(
                f"{where} has a sliding window of {window} tokens in a context of {seq_len}: it is read as a model of context "
                f"{window}, within which both are the same"
            )
            seq_len = window
        if kind == "llama" and found["hidden_size"] % heads:
            raise UserError(f"{where}: its hidden_size {found['hidden_size']} is no multiple of num_attention_heads {heads}")
        return LlamaConfig(
            n_layer=found["num_hidden_layers"],
            n_head=heads,
            n_kv_head=found.get("num_key_value_heads", silent.n_kv_head) or heads,
            d_model=found["hidden_size"],
            d_ff=found["intermediate_size"],
            vocab_size=found["vocab_size"],
            seq_len=seq_len,
            rope_theta=theta,
            norm_eps=found.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(found.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
            d_head=found.get("head_dim", silent.d_head) or found["hidden_size"] // heads,
            qkv_bias=attention_bias or kind == "qwen2",
            out_bias=attention_bias,
            mlp_bias=bool(found.get("mlp_bias", False)) and kind == "llama",
            qk_norm=kind == "qwen3",
        )
    except KeyError as error:
        raise UserError(f"{where} does not say {error.args[0]}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where} does not describe a model: {error}") from error


def context_of(found: dict) -> int:
    """The context of the model that a config.json describes, whatever each layer sees of it."""
    return found.get("max_position_embeddings", ARCHITECTURES[found["model_type"]].seq_len)


def _window(found: dict, where: Path) -> int | None:
    """How far attention sees, where a layer does not see everything: of Mistral in all layers, of Qwen in some."""
    kind, layers = found["model_type"], found.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or len(layers) != found["num_hidden_layers"]):
        raise UserError(f"{where}: its layer_types do not name its {found['num_hidden_layers']} layers")
    if unknown := sorted({str(one) for one in layers or ()} - {"full_attention", "sliding_attention"}):
        raise UserError(f"{where}: its layer_types have {unknown[0]!r}, which our model does not")
    slides = layers is not None and "sliding_attention" in layers
    if kind in ("llama", "mistral"):
        if slides:
            raise UserError(f"{where}: its layer_types have sliding_attention, which no {kind} has")
        return found.get("sliding_window", ARCHITECTURES[kind].window) if kind == "mistral" else None
    window = found.get("sliding_window", 4096) if found.get("use_sliding_window", False) else None
    if layers is None:
        slides = window is not None and found.get("max_window_layers", 28) < found["num_hidden_layers"]
    if slides and window is None:
        raise UserError(f"{where}: its layer_types have sliding_attention, and no sliding_window is in use")
    return window if slides else None


def _rope(found: dict, seq_len: int, where: Path) -> tuple[float, RopeScaling | None]:
    """θ and how positions are scaled."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(found.get(key) or {}, dict):
            raise UserError(f"{where}: its {key} is {found[key]!r}, no object")
    old, new = found.get("rope_scaling") or {}, found.get("rope_parameters") or {}
    rope = old or new
    if old and any(new[key] != (old | {"rope_theta": found.get("rope_theta")}).get(key) for key in new):
        told(f"{where}: its rope_scaling and rope_parameters differ; the first counts, as in transformers")
    if any(share not in (None, 1) for share in (rope.get("partial_rotary_factor"), found.get("partial_rotary_factor"))):
        raise UserError(f"{where} turns a part of each head only (partial_rotary_factor); our model turns whole heads")
    theta = _number(rope | {"rope_theta": rope.get("rope_theta", found.get("rope_theta", 1e4))}, "rope_theta", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"{where} scales rotary positions by {kind!r}; default, linear, llama3 and yarn are known")
    if kind != "linear":
        rope = {"original_max_position_embeddings": seq_len} | rope
        beside = found.get("original_max_position_embeddings", original := rope["original_max_position_embeddings"])
        if beside != original:
            told(
                f"{where} has two original_max_position_embeddings; that of the model, {beside}, counts, as in transformers, "
                f"and not the {original} of its rotary scaling"
            )
            rope |= {"original_max_position_embeddings": beside}
    names = {"factor": "factor"} | ({} if kind == "linear" else {"original_max_position_embeddings": "original_seq_len"})
    names |= {name: name for name in ("low_freq_factor", "high_freq_factor")} if kind == "llama3" else {}
    if missing := [name for name in names if name not in rope]:
        raise UserError(f"{where}: its {kind} rotary scaling lacks {', '.join(missing)}")
    if kind == "yarn" and rope["factor"] is None:
        rope |= {"factor": seq_len / _number(rope, "original_max_position_embeddings", where)}
    values: dict[str, Any] = {ours: _number(rope, name, where) for name, ours in names.items()}
    if kind == "yarn":
        values |= {name: _number(rope, name, where) for name in ("beta_fast", "beta_slow") if rope.get(name)}
        values["truncate"] = bool(rope.get("truncate", True))
        values["attention_factor"] = _attention_factor(rope, values["factor"], where)
    if "original_seq_len" in values:
        values["original_seq_len"] = int(values["original_seq_len"])
    return theta, RopeScaling(kind=kind, **values)


def _attention_factor(rope: dict, factor: float, where: Path) -> float | None:
    """What yarn multiplies cos and sin by; None: what follows from the factor alone."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", where)
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None
    above, below = (
        1.0 if factor <= 1 else 0.1 * _number(rope, name, where) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")
    )
    return above / below


def told(note: str) -> None:
    """Say how a folder was read."""
    print(f"note: {note}", file=sys.stderr)


def _number(rope: dict, name: str, where: Path) -> float:
    if isinstance(rope[name], bool) or not isinstance(rope[name], int | float):
        raise UserError(f"{where}: its {name} is {rope[name]!r}, no number")
    return float(rope[name])
