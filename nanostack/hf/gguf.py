"""A Hugging Face folder as one file of llama.cpp's format, GGUF: the same logits, and the same ids of text.

`write(folder, path, name)` takes config.json, the weights in the dtype that they have there, and the tokenizer. Tables give the
names that llama.cpp has. An architecture is a row of ARCHITECTURES; the tokenizer is nanostack.hf.gguf_vocabulary's part.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanostack.errors import UserError
from nanostack.hf.config import from_config
from nanostack.hf.gguf_vocabulary import add_vocabulary
from nanostack.hf.weights import read_json
from nanostack.model import rope_angles


class Architecture(NamedTuple):
    name: str  # in llama.cpp
    neighbours: bool  # whether its rotary turns rows 2i and 2i + 1 of a head; else i and i + half of them, as Hugging Face's


ARCHITECTURES = {  # by the model_type of config.json
    "llama": Architecture("llama", neighbours=True),
    "mistral": Architecture("llama", neighbours=True),
    "qwen2": Architecture("qwen2", neighbours=False),
    "qwen3": Architecture("qwen3", neighbours=False),
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Fields of yarn that mean the same there; others are refused.
YARN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the GGUF
    read: Callable[[], Tensor]


def require_extra() -> None:
    """UserError with the line that installs what is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("a GGUF takes the package gguf: pip install 'nanostack[gguf]'") from None


def write(folder: Path, path: Path, name: str) -> None:
    """Write the model in a folder to `path`, tensor by tensor. UserError for what llama.cpp would not compute alike."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    found = read_json(folder / "config.json")
    kind = ARCHITECTURES.get(found["model_type"])
    if kind is None:
        raise UserError(f"{name} is of architecture {found['model_type']!r}; a GGUF can be of {', '.join(ARCHITECTURES)}")
    writer = GGUFWriter(None, kind.name)
    writer.add_name(name)
    _add_shape(writer, found, name)
    add_vocabulary(writer, folder, name, found["vocab_size"])
    stored = _rope_factors(found, folder, kind) | _stored(folder, found, kind)
    kinds = {dtype for _, dtype, _ in stored.values()}
    files = {torch.float16: LlamaFileType.MOSTLY_F16, torch.bfloat16: LlamaFileType.MOSTLY_BF16}
    writer.add_file_type(next((files[dtype] for dtype in files if dtype in kinds), LlamaFileType.ALL_F32))
    of = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for one, (shape, dtype, _) in stored.items():
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(one, shape, np.dtype(np.float32), size, GGMLQuantizationType[of[dtype]])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, dtype, read in stored.values():
        values = read().contiguous()
        writer.write_tensor_data((values.view(torch.int16) if dtype == torch.bfloat16 else values).numpy())
    writer.close()


def _rope(found: dict) -> dict:
    return (found.get("rope_scaling") or {}) | (found.get("rope_parameters") or {})


def _add_shape(writer: Any, found: dict, name: str) -> None:
    from gguf import RopeScalingType

    width, heads, longest = found["hidden_size"], found["num_attention_heads"], found["max_position_embeddings"]
    d_head = found.get("head_dim") or width // heads
    rope = _rope(found)
    window = found.get("sliding_window") if found.get("use_sliding_window", found["model_type"] == "mistral") else None
    if window and window < longest:
        raise UserError(f"{name} has a sliding window of {window} and a context of {longest}; llama.cpp would attend to all")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "llama3", "linear", "yarn"):
        raise UserError(f"{name} scales rotary positions by {scaling!r}, which is not written to a GGUF")
    writer.add_context_length(longest)
    writer.add_embedding_length(width)
    writer.add_block_count(found["num_hidden_layers"])
    writer.add_feed_forward_length(found["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(found.get("num_key_value_heads") or heads)
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_rope_dimension_count(d_head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", found.get("rope_theta", 1e4))))
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if scaling == "yarn":
        if unknown := sorted({key for key, value in rope.items() if value is not None} - YARN):
            raise UserError(f"{name} scales rotary positions by yarn with {unknown[0]}, which is not written to a GGUF")
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_layer_norm_rms_eps(found.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(found["vocab_size"])


def _rope_factors(found: dict, folder: Path, kind: Architecture) -> dict[str, Stored]:
    """What rotary's frequencies are divided by, where they are scaled as Llama 3's."""
    if _rope(found).get("rope_type") != "llama3":
        return {}
    if kind.name != "llama":
        raise UserError("rotary positions that are scaled by 'llama3' are known to llama.cpp for its llama only")
    scaled = replace(from_config(found, folder / "config.json"), seq_len=2)
    plain = replace(scaled, rope_scaling=None)
    factors = rope_angles(plain, torch.device("cpu"))[1] / rope_angles(scaled, torch.device("cpu"))[1]
    return {"rope_freqs.weight": Stored(tuple(factors.shape), torch.float32, lambda: factors)}


def _stored(folder: Path, found: dict, kind: Architecture) -> dict[str, Stored]:
    """The tensors of a folder by llama.cpp's names. Gains and biases are float32 there."""
    from safetensors import safe_open

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    heads = {"attn_q": found["num_attention_heads"], "attn_k": found.get("num_key_value_heads") or found["num_attention_heads"]}
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        opened = safe_open(path, "pt")
        for theirs in sorted(opened.keys()):
            part, name = _name(theirs)
            values = opened.get_slice(theirs)
            shape = tuple(values.get_shape())
            dtype = dtypes[values.get_dtype()] if len(shape) > 1 else torch.float32
            turned = heads.get(part) if kind.neighbours else None
            tensors[name] = Stored(shape, dtype, partial(_read, opened, theirs, dtype, turned))
    return tensors


def _read(opened: Any, name: str, dtype: torch.dtype, heads: int | None) -> Tensor:
    """A tensor as it goes to the file: where rotary turns neighbours, the halves of a head's rows take turns."""
    values = opened.get_tensor(name).to(dtype)
    return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else values


def _name(theirs: str) -> tuple[str, str]:
    """(which of a block's tensors, llama.cpp's name) of one of Hugging Face's."""
    whole, _, values = theirs.rpartition(".")
    block = IN_BLOCK.fullmatch(whole)
    part = BLOCK.get(block[2]) if block else ENDS.get(whole)
    if part is None:
        raise UserError(f"a GGUF has no name for the tensor {theirs}")
    return part, f"blk.{block[1]}.{part}.{values}" if block else f"{part}.{values}"
