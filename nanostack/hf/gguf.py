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
from nanostack.hf.config import context_of, from_config
from nanostack.hf.gguf_vocabulary import add_vocabulary
from nanostack.hf.weights import read_json
from nanostack.model import LlamaConfig, RopeScaling, rope_angles


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
YARN = ("beta_fast", "beta_slow", "attention_factor", "truncate")  # what llama.cpp may compute otherwise, if it is not as usual
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
    config = from_config(found, where := folder / "config.json")
    if config.seq_len < (context := context_of(found, where)):
        window = f"a sliding window of {config.seq_len} and a context of {context}"
        raise UserError(f"{name} has {window}; llama.cpp would attend to all")
    if found["model_type"] == "qwen3" and config.qkv_bias:
        raise UserError(f"{name} is a Qwen3 with biases (attention_bias), which llama.cpp does not load")
    if found["model_type"] == "qwen2" and config.d_head is not None:
        wide = f"{config.n_head} heads of {config.head_dim} channels in a width of {config.d_model} (head_dim)"
        raise UserError(f"{name} is a Qwen2 with {wide}, which llama.cpp does not load")
    writer.add_name(name)
    _add_shape(writer, config, name)
    add_vocabulary(writer, folder, name, config.vocab_size)
    stored = _rope_factors(config, kind) | _stored(folder, config, kind)
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


def _add_shape(writer: Any, config: LlamaConfig, name: str) -> None:
    from gguf import RopeScalingType

    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # which is a tensor, _rope_factors
        return
    writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        changed = (one for one in YARN if getattr(scaling, one) != getattr(RopeScaling, one))
        if (unknown := next(changed, None)) is not None:
            raise UserError(f"{name} scales rotary positions by yarn with {unknown}, which is not written to a GGUF")
        writer.add_rope_scaling_orig_ctx_len(scaling.original_seq_len)


def _rope_factors(scaled: LlamaConfig, kind: Architecture) -> dict[str, Stored]:
    """What rotary's frequencies are divided by, where they are scaled as Llama 3's."""
    if scaled.rope_scaling is None or scaled.rope_scaling.kind != "llama3":
        return {}
    if kind.name != "llama":
        raise UserError("rotary positions that are scaled by 'llama3' are known to llama.cpp for its llama only")
    two = replace(scaled, seq_len=2)
    plain, divided = (rope_angles(one, torch.device("cpu"))[1] for one in (replace(two, rope_scaling=None), two))
    factors = plain / divided
    return {"rope_freqs.weight": Stored(tuple(factors.shape), torch.float32, lambda: factors)}


def _stored(folder: Path, config: LlamaConfig, kind: Architecture) -> dict[str, Stored]:
    """The tensors of a folder by llama.cpp's names. Gains and biases are float32 there."""
    from safetensors import safe_open

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    heads = {"attn_q": config.n_head, "attn_k": config.n_kv_head}
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
