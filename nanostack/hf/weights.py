"""Hugging Face's folders: their names and shapes beside ours, and how one is read; nanostack.hf.export writes them.

`load(folder)` gives what `checkpoint.load` gives, the weights read when they are asked for, tensor by tensor. What Hugging Face
has no place for (tokens, FLOPs, growth) stands in config.json under "nanostack": a round trip loses the optimizer only. It
belongs to the weights that it was written with, and does not count where they were changed, as by training elsewhere.

Their q_proj, k_proj, v_proj are the rows of our qkv, gate_proj and up_proj those of gate_up; both rotate halves.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from nanostack import checkpoint
from nanostack.errors import UserError
from nanostack.hf.config import context_of, from_config, told
from nanostack.model import LlamaConfig
from nanostack.state import Cursor
from nanostack.text.bounds import Bounds
from nanostack.text.tokenizer_json import JSON_FILE, bounds_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",  # of GPT-2's kind
    "merges.txt",
    "tekken.json",  # Mistral's
    "chat_template.jinja",
)
BLOCK = {  # ours: theirs, put side by side in this order
    "attn_norm.weight": ("input_layernorm.weight",),
    "attn.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attn.out.weight": ("self_attn.o_proj.weight",),
    "attn.out.bias": ("self_attn.o_proj.bias",),
    "attn.q_norm.weight": ("self_attn.q_norm.weight",),
    "attn.k_norm.weight": ("self_attn.k_norm.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.gate_up.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
    "mlp.down.bias": ("mlp.down_proj.bias",),
}
OPTIONAL = {  # the field of LlamaConfig with which a block has it
    "attn.qkv.bias": "qkv_bias",
    "attn.out.bias": "out_bias",
    "attn.q_norm.weight": "qk_norm",
    "attn.k_norm.weight": "qk_norm",
    "mlp.gate_up.bias": "mlp_bias",
    "mlp.down.bias": "mlp_bias",
}
ADAPTER = "adapter_config.json"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ENDS = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}


def require_extra() -> None:
    """UserError with the line that installs what is missing."""
    try:
        import safetensors  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError(f"Hugging Face folders need {error.name}: pip install 'nanostack[hf]'") from error


def theirs(name: str) -> tuple[str, ...]:
    """Hugging Face's names of one of our parameters."""
    if name in ENDS:
        return (ENDS[name],)
    _, number, rest = name.split(".", 2)
    return tuple(f"model.layers.{number}.{part}" for part in BLOCK[rest])


def in_loop(name: str, n_layer: int) -> str:
    """The parameter of a model of so many layers, run in loops, that stands for this one of the model without."""
    if name in ENDS:
        return name
    blocks, number, rest = name.split(".", 2)
    return f"{blocks}.{int(number) % n_layer}.{rest}"


def rows_of(name: str, config: LlamaConfig) -> list[int]:
    """How many rows each of `theirs(name)` has."""
    heads, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    fused = {"qkv": [heads, kv, kv], "gate_up": [config.d_ff, config.d_ff]}
    return next((rows for part, rows in fused.items() if f".{part}." in name), [-1])


def shapes_of(name: str, config: LlamaConfig) -> list[tuple[int, ...]]:
    """The shape of each of `theirs(name)`."""
    if "norm" in name:
        return [(config.head_dim if ".attn." in name else config.d_model,)]
    all_rows = {"embed": config.vocab_size, "head": config.vocab_size}.get(name.split(".")[0], config.d_model)
    rows = [all_rows if part == -1 else part for part in rows_of(name, config)]
    if name.endswith("bias"):
        return [(part,) for part in rows]
    columns = {"out": config.n_head * config.head_dim, "down": config.d_ff}.get(name.split(".")[-2], config.d_model)
    return [(part, columns) for part in rows]


def names_of(config: LlamaConfig) -> Iterator[str]:
    """Our parameters, a tied head left out."""
    yield "embed.weight"
    for number in range(config.n_layer):
        yield from (f"blocks.{number}.{rest}" for rest in BLOCK if rest not in OPTIONAL or getattr(config, OPTIONAL[rest]))
    yield from ("norm.weight",) if config.tie_embeddings else ("norm.weight", "head.weight")


class Weights(Mapping):
    """Our parameters {name: tensor on the host} out of a folder, read when they are asked for, in the dtype they have there."""

    def __init__(self, folder: Path, config: LlamaConfig):
        self.folder, self.config = folder, config
        self._open: dict[Path, Any] = {}
        self._files = _files_of(folder)
        wanted = [theirs_ for name in names_of(config) for theirs_ in theirs(name)]
        if missing := [name for name in wanted if name not in self._files]:
            raise UserError(f"{folder} lacks {len(missing)} tensors that its config.json asks for, {missing[0]} first")
        known = {*wanted, *theirs("head.weight")}  # what older versions of transformers wrote beside them means nothing
        if unknown := sorted(name for name in self._files if name not in known and not name.endswith("rotary_emb.inv_freq")):
            raise UserError(f"{folder} has {len(unknown)} tensors that its config.json does not ask for, {unknown[0]} first")

    def __getitem__(self, name: str) -> Tensor:
        if name == "head.weight" and self.config.tie_embeddings:
            name = "embed.weight"
        parts = [self._read(one) for one in theirs(name)]
        for part, shape, one in zip(parts, shapes_of(name, self.config), theirs(name), strict=True):
            if part.shape != shape:
                raise UserError(f"{self.folder}: {one} is {tuple(part.shape)}, its config.json asks for {shape}")
            if part.dtype not in FLOATS:
                raise UserError(f"{self.folder}: {one} is of {part.dtype}; only whole weights can be read, no quantized ones")
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter([*names_of(self.config), *(["head.weight"] if self.config.tie_embeddings else [])])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def head_of_its_own(self) -> bool:
        """Whether the file has a head that is not the embedding, whatever its config.json says of tying them."""
        (embed,), (head,) = (theirs(name) for name in ("embed.weight", "head.weight"))
        return head in self._files and not torch.equal(self._read(embed), self._read(head))

    def dtype(self) -> torch.dtype:
        """The narrowest that holds the values of all tensors. Ours are float32, so that float64 is told and becomes that."""
        dtypes = {one: self._read(one, first_row=True).dtype for name in names_of(self.config) for one in theirs(name)}
        known = {dtype for dtype in dtypes.values() if dtype in FLOATS}  # of another, the tensor is refused when it is read
        widest = functools.reduce(torch.promote_types, known, torch.bfloat16 if torch.bfloat16 in known else torch.float16)
        if len(known) > 1:
            told(
                f"{self.folder} has tensors of {len(known)} dtypes: what is made of it is of {str(widest)[6:]}, which holds all"
            )
        if widest == torch.float64:
            told(f"{self.folder} has tensors of float64: they are rounded to float32, which our models are of")
        return torch.float32 if widest == torch.float64 else widest

    def fingerprint(self) -> str:
        """SHA-256 of the first row of every tensor, as it is stored: other weights have another."""
        digest = hashlib.sha256()
        for one in (one for name in names_of(self.config) for one in theirs(name)):
            digest.update(self._read(one, first_row=True).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _read(self, name: str, first_row: bool = False) -> Tensor:
        path = self.folder / self._files[name]
        if path not in self._open:
            self._open[path] = _open(path)
        with _damage_told(path):
            return self._open[path].get_slice(name)[:1] if first_row else self._open[path].get_tensor(name)


class _Pickled(dict):
    """A pytorch_model.bin, read as safetensors' files are. Only tensors are unpickled."""

    get_tensor = get_slice = dict.__getitem__


def _open(path: Path):
    from safetensors import safe_open

    with _damage_told(path):
        if path.suffix != ".bin":
            return safe_open(path, "pt")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # else of older torch
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, no tensors by their names")
    if others := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: its {others[0]!r} is a {type(found[others[0]]).__name__}, no tensor")
    return _Pickled(found)


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except UnpicklingError as error:  # torch's own advice is to run what is in the file
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which could be code and is not run: have whoever made it save it "
            "as model.safetensors (save_pretrained)"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError, IndexError) as error:
        raise UserError(f"{path} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _files_of(folder: Path) -> dict[str, str]:
    """{tensor: file}, from the index or the one file; UserError for shards that are not there."""
    kinds = [any(folder.glob(f"{name}*")) for name in ("model.safetensors", "pytorch_model.bin")]
    if all(kinds):
        told(f"{folder} has both model.safetensors and pytorch_model.bin: the first is read, as in transformers")
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = single.with_name(f"{single.name}.index.json")
        if single.is_file():
            if index.is_file():
                told(f"{folder} has {single.name} and an index: the single file is read, as in transformers")
            return dict.fromkeys(_open(single).keys(), single.name)
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise UserError(f"{index} does not say which tensor is in which file (weight_map)")
            if missing := sorted({file for file in files.values() if not (folder / file).is_file()}):
                raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names")
            return files
    raise UserError(f"{folder} has neither model.safetensors nor an index of shards, nor a pytorch_model.bin")


def read_json(path: Path) -> dict:
    """The object in a file. UserError if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def load(folder: str | Path) -> dict:
    """What `checkpoint.load` gives, of a Hugging Face folder: no optimizer; the ledger where we wrote it, else a new one.

    "model" reads from the files as it is asked; "dtype" holds what they hold; "window" is how far attention sees, where the
    folder's model takes more. Raises `UserError` for another architecture, missing shards, damaged files.
    """
    folder = Path(folder)
    require_extra()
    if not (folder / "config.json").is_file():
        last = folder / "ckpt.pt"
        run = f"; it is the folder of a run, whose last checkpoint is {last}" if last.exists() else ""
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json{run}")
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} has {ADAPTER}, an adapter of PEFT's, which transformers puts on the weights: merge it "
            "(merge_and_unload, save_pretrained), or move the file away to read the weights alone"
        )
    found = read_json(folder / "config.json")
    config = from_config(found, folder / "config.json")
    _check_tokenizer(folder, config)
    weights, ours = Weights(folder, config), found.get("nanostack") or {}
    if config.tie_embeddings and weights.head_of_its_own():
        told(f"{folder} says that its head is its embedding, and has another: it keeps that, as in transformers")
        config = dataclasses.replace(config, tie_embeddings=False)
        weights = Weights(folder, config)
    if ours and (not isinstance(ours, dict) or ours.get("fingerprint") != weights.fingerprint()):
        print(f"note: {folder} was changed since nanostack wrote it: its tokens, FLOPs, growth do not count", file=sys.stderr)
        ours = {}
    try:
        cursor = Cursor(**(ours.get("cursor") or {}))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: what stands under nanostack was not written by this version") from error
    return {
        "format": checkpoint.FORMAT,
        "config": dataclasses.asdict(config),
        "model": weights,
        "optimizer": {},
        "cursor": dataclasses.asdict(cursor),
        "rng": {"cpu": torch.get_rng_state()},
        "growth": ours.get("growth") or [],
        "manifest_sha256": ours.get("manifest_sha256"),
        "seed": ours.get("seed", 0),
        "bounds": vars(_bounds(folder, ours)),
        "window": config.seq_len if config.seq_len < context_of(found, folder / "config.json") else None,
        "dtype": weights.dtype(),
        "eot": found.get("eos_token_id"),
    }


def _bounds(folder: Path, ours: dict) -> Bounds:
    """How texts begin and end for the model in a folder: as one of ours was trained, or as the files of another say."""
    found = bounds_of(folder)
    if ours.get("manifest_sha256") is None:
        return found
    try:
        return Bounds(**ours.get("bounds", {"start": [], "ends": found.ends}))  # older folders say nothing: there was no start
    except TypeError as error:
        raise UserError(f"{folder / 'config.json'}: its nanostack.bounds were not written by this version") from error


def _check_tokenizer(folder: Path, config: LlamaConfig) -> None:
    """UserError for a tokenizer.json that is damaged, or has ids that the model has not."""
    import tokenizers

    path = folder / JSON_FILE
    if not path.is_file():
        return
    try:
        vocab = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library has no other class
        raise UserError(f"{path} cannot be read: {error}") from error
    if (most := max(vocab.values(), default=-1)) >= config.vocab_size:
        raise UserError(f"{path} has ids up to {most}, the model beside it a vocabulary of {config.vocab_size}")
