"""Hugging Face's config.json of a Llama, Mistral, Qwen2 or Qwen3, written and read.

What it does not say, transformers fills in by architecture, and where two fields disagree it takes one: so does this, with a
line that says which. What it computes otherwise than our model is refused.
"""

import json
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

# Fields that mean nothing to some architectures: transformers may still fail on values of another type than theirs, or null.
ANYWHERE: dict[str, type] = {"sliding_window": int, "max_window_layers": int, "head_dim": int}
ANYWHERE |= {"use_sliding_window": bool, "attention_bias": bool, "mlp_bias": bool}


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

    grown_from: the config.json of the model that it was made of. What was a Mistral stays one, with its window, as for a Llama
    AutoTokenizer makes another tokenizer of the same files.
    """
    kind, seq_len, window = model_type(config), config.seq_len, None
    if kind == "llama" and grown_from and grown_from.get("model_type") == "mistral":
        kind, seq_len = "mistral", grown_from.get("max_position_embeddings", ARCHITECTURES["mistral"].seq_len)
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
    """The shape that a config.json describes. UserError for what our model is not, and for what transformers does not take."""
    kind, field = found.get("model_type"), Fields(found, where)
    if kind not in ARCHITECTURES:
        raise UserError(f"{where} is of architecture {kind!r}; {', '.join(ARCHITECTURES)} can be read")
    silent = ARCHITECTURES[kind]
    for name in (name for name, kept in ANYWHERE.items() if type(found.get(name)) not in (kept, type(None))):
        field.whole(name) if ANYWHERE[name] is int else field.flag(name)
    if (named := found.get("architectures")) and named != [silent.name]:
        told(f"{where}: its model_type is {kind!r}, its architectures are {named!r}; the first counts, as in transformers")
    if found.get("quantization_config") is not None:
        raise UserError(f"{where} is of quantized weights: save them anew in bfloat16 with transformers (dequantize)")
    if (act := found.get("hidden_act", "silu")) not in ("silu", "swish"):  # two names of one function
        raise UserError(f"{where} has hidden_act {act!r}; our model has 'silu'")
    layers, heads, width = (field.whole(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    kv = field.whole("num_key_value_heads", silent.n_kv_head or heads, null=kind != "mistral")
    if kind == "llama" and width % heads:
        raise UserError(f"{where}: its hidden_size {width} is no multiple of num_attention_heads {heads}")
    if heads % (kv := kv or heads):
        raise UserError(f"{where}: its num_attention_heads {heads} is no multiple of num_key_value_heads {kv}")
    d_head = field.whole("head_dim", silent.d_head or width // heads, null=kind in ("llama", "mistral")) or width // heads
    if d_head % 2 or not d_head:
        raise UserError(
            f"{where}: heads of {d_head} channels (head_dim, else hidden_size / num_attention_heads) cannot be turned"
        )
    seq_len, window = context_of(found, where), _window(found, layers, where)
    theta, scaling = _rope(found, seq_len, where)
    if window is not None and window < seq_len:
        told(
            f"{where} has a sliding window of {window} tokens in a context of {seq_len}: it is read as a model of context "
            f"{window}, within which both are the same"
        )
        seq_len = window
    attention_bias = kind in ("llama", "qwen3") and field.flag("attention_bias")
    return LlamaConfig(
        n_layer=layers,
        n_head=heads,
        n_kv_head=kv,
        d_model=width,
        d_ff=field.whole("intermediate_size"),
        vocab_size=field.whole("vocab_size"),
        seq_len=seq_len,
        rope_theta=theta,
        norm_eps=field.number("rms_norm_eps", 1e-6, whole=False),
        tie_embeddings=field.flag("tie_word_embeddings"),
        rope_scaling=scaling,
        d_head=d_head,
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=kind == "llama" and field.flag("mlp_bias"),
        qk_norm=kind == "qwen3",
    )


class Fields:
    """The fields of one object in a config.json, each of the type that transformers asks for. UserError for another."""

    def __init__(self, found: dict, where: Path):
        self.found, self.where = found, where

    def whole(self, name: str, default: int | None = None, null: bool = False, least: int = 1) -> Any:
        """A whole number of `least` or more; None for null, where that may be. UserError if it lacks and has no default."""
        value = self.found.get(name, default)
        if value is None and name not in self.found:
            raise UserError(f"{self.where} does not say {name}")
        if value is None and null:
            return None
        if type(value) is not int or value < least:
            raise UserError(f"{self.where}: its {name} is {_shown(value)}, no whole number of {least} or more")
        return value

    def number(self, name: str, default: float, whole: bool = True, least: float | None = None) -> float:
        """A number above 0, or of `least` or more."""
        value = self.found.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{self.where}: its {name} is {_shown(value)}, no number")
        if not whole and isinstance(value, int):
            raise UserError(f"{self.where}: its {name} is {value}, which transformers takes with a decimal point only")
        if value < least if least is not None else value <= 0:
            raise UserError(
                f"{self.where}: its {name} is {value}, and must be {'positive' if least is None else f'{least} or more'}"
            )
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.found.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: its {name} is {_shown(value)}, neither true nor false")
        return value


def _shown(value: Any) -> str:
    """A value as it stands in a file."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def context_of(found: dict, where: Path) -> int:
    """The context of the model that a config.json describes, whatever each layer sees of it."""
    return int(Fields(found, where).whole("max_position_embeddings", ARCHITECTURES[found["model_type"]].seq_len))


def _window(found: dict, n_layer: int, where: Path) -> int | None:
    """How far attention sees, where a layer does not see everything: of Mistral in all layers, of Qwen in some."""
    kind, layers, field = found["model_type"], found.get("layer_types"), Fields(found, where)
    if kind == "mistral" and "layer_types" in found:
        raise UserError(f"{where} has layer_types, with which transformers takes a mistral for a ministral: not read here")
    if layers is not None and (not isinstance(layers, list) or len(layers) != n_layer):
        raise UserError(f"{where}: its layer_types do not name its {n_layer} layers")
    if unknown := sorted({str(one) for one in layers or ()} - {"full_attention", "sliding_attention"}):
        raise UserError(f"{where}: its layer_types have {unknown[0]!r}, which our model does not")
    slides = layers is not None and "sliding_attention" in layers
    if kind in ("llama", "mistral"):
        if slides:
            raise UserError(f"{where}: its layer_types have sliding_attention, which no {kind} has")
        return field.whole("sliding_window", ARCHITECTURES[kind].window, null=True) if kind == "mistral" else None
    used = field.flag("use_sliding_window")
    window = field.whole("sliding_window", 4096, null=True, least=1 if used else -sys.maxsize) if used or layers else None
    window = window if used else None
    first = field.whole("max_window_layers", 28, least=-sys.maxsize)
    counted = window is not None and first < n_layer
    if layers is None:
        slides = counted
    elif "max_window_layers" in found and counted != slides:
        told(f"{where}: its layer_types and max_window_layers differ; the first counts, as in transformers")
    if slides and window is None:
        raise UserError(f"{where}: its layer_types have sliding_attention, and no sliding_window is in use")
    return window if slides else None


def _rope(found: dict, seq_len: int, where: Path) -> tuple[float, RopeScaling | None]:
    """θ and how positions are scaled."""
    for key in ("rope_scaling", "rope_parameters"):
        if found.get(key) is not None and not isinstance(found[key], dict):
            raise UserError(f"{where}: its {key} is {found[key]!r}, no object")
    old, new = found.get("rope_scaling") or {}, found.get("rope_parameters") or {}
    rope = old or new
    if old and any(new[key] != (old | {"rope_theta": found.get("rope_theta")}).get(key) for key in new):
        told(f"{where}: its rope_scaling and rope_parameters differ; the first counts, as in transformers")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        which = "rope_scaling" if old else "rope_parameters"
        raise UserError(f"{where}: its {which} has fields of its own for {nested[0]!r}, and our layers are all alike")
    shares = (rope.get("partial_rotary_factor"), found.get("partial_rotary_factor"))
    if any(share is not None and (isinstance(share, bool) or share != 1) for share in shares):
        raise UserError(f"{where} turns a part of each head only (partial_rotary_factor); our model turns whole heads")
    beside = found.get("rope_theta", 1e4)
    if rope.get("rope_theta", beside) != beside and "rope_theta" in found:
        told(f"{where} has two rope_theta; that of its rotary scaling, {rope['rope_theta']}, counts, as in transformers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        told(f"{where} has rope_type {kind!r} and type {rope['type']!r}; the first counts, as in transformers")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"{where} scales rotary positions by {kind!r}; default, linear, llama3 and yarn are known")
    field = Fields(rope := rope | {"rope_theta": rope.get("rope_theta", beside)}, where)
    theta = field.number("rope_theta", 1e4)
    if kind == "default":
        return theta, None
    needs = ("factor", *(("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()))
    if missing := [name for name in needs if name not in rope]:
        raise UserError(f"{where}: its {kind} rotary scaling lacks {', '.join(missing)}")
    values: dict[str, Any] = {}
    if kind != "linear":
        original = rope.get("original_max_position_embeddings", seq_len)
        beside = found.get("original_max_position_embeddings", original)
        if beside != original and "original_max_position_embeddings" in rope:
            told(
                f"{where} has two original_max_position_embeddings; that of the model, {beside}, counts, as in transformers, "
                f"and not the {original} of its rotary scaling"
            )
        rope["original_max_position_embeddings"] = beside
        values["original_seq_len"] = field.whole("original_max_position_embeddings")
    if kind == "yarn":
        if rope["factor"] is None:
            rope["factor"] = seq_len / values["original_seq_len"]
        if theta <= 1:
            raise UserError(f"{where}: its rope_theta is {theta:g}, for which yarn has no channels to mix")
        values |= {name: field.number(name, 1.0) for name in ("beta_fast", "beta_slow") if rope.get(name)}
        values["truncate"] = rope.get("truncate", True) is not None and field.flag("truncate", True)
        values["attention_factor"] = _attention_factor(rope, field.number("factor", 1.0), where)
    values |= {name: field.number(name, 1.0) for name in needs}
    return theta, RopeScaling(kind=kind, **values)


def _attention_factor(rope: dict, factor: float, where: Path) -> float | None:
    """What yarn multiplies cos and sin by; None: what follows from the factor alone."""
    field = Fields(rope, where)
    if rope.get("attention_factor") is not None:
        return field.number("attention_factor", 1.0, least=0.0)
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None
    above, below = (
        1.0 if factor <= 1 else 0.1 * field.number(name, 1.0) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")
    )
    return above / below


def told(note: str) -> None:
    """Say how a folder was read."""
    print(f"note: {note}", file=sys.stderr)
