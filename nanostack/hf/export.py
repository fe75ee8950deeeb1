"""A state as a Hugging Face folder, from which `AutoModelForCausalLM.from_pretrained` gives the same logits.

A model of theirs has neither loops nor a residual scale: each pass of a loop gets layers of its own, and the scale is
multiplied into the projections that write to the residual stream, and their biases. Both compute the same.

`save` writes config.json, safetensors (sharded by size), generation_config.json, the files of a tokenizer and a model card.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from nanostack.config import describe_tokens
from nanostack.errors import UserError
from nanostack.flops import n_params
from nanostack.hf import gguf
from nanostack.hf import weights as hf
from nanostack.hf.config import ARCHITECTURES, model_type, to_config
from nanostack.hf.gguf_vocabulary import does_as_qwen2
from nanostack.model import RESIDUAL_OUTPUTS, LlamaConfig
from nanostack.state import State
from nanostack.text.bounds import Bounds
from nanostack.text.tokenizer import JSON_FILE, Tokenizer

SHARD_BYTES = 5 * 10**9
LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")  # how the names of files begin that go with a model
OF_TEXTS = ("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class")  # of a config.json; AutoTokenizer reads the last
WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|config\.json|generation_config\.json|README\.md|curves\.(png|svg)|.*\.gguf|"
    + "|".join(map(re.escape, hf.TOKENIZER_FILES))
    + f"|({'|'.join(LEGAL)}).*",
    re.IGNORECASE,
)


def check_place(folder: Path, source: Path, overwrite: bool) -> None:
    """UserError unless a model may be written to `folder`: there, only another one that we wrote is replaced, if asked for."""
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} exists already: choose another folder, or replace it (--overwrite)")
    config = folder / "config.json"
    if not folder.is_dir() or not config.is_file() or "nanostack" not in hf.read_json(config):
        raise UserError(f"{folder} is no model that was written here, and is not replaced: choose another folder")
    if others := sorted(path.name for path in folder.iterdir() if not WRITTEN.fullmatch(path.name)):
        raise UserError(f"{folder} holds {others[0]}, which was not written here, and is not replaced: choose another folder")
    if folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{folder} holds {source}, from which it would be made: choose another folder")


def save(
    state: State,
    folder: str | Path,
    manifest_sha256: str | None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Tokenizer | Path | None = None,
    eot: int | None = None,
    records: list[dict] | None = None,
    text: str | None = None,
    as_gguf: bool = False,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and, with a tokenizer, `AutoTokenizer` load. One process, no mesh.

    tokenizer: ours, translated unless it is a tokenizer.json already, or the folder of the model that this one was made of,
    whose tokenizer and licence are copied. records: of the run, for the card's curve; text: what it was trained on; as_gguf:
    write FOLDER/NAME.gguf too, for llama.cpp. Everything is written beside the folder first: it is whole or it is not there. A
    folder that is there is replaced: ask `check_place` before. Raises `UserError` where it cannot be.
    """
    hf.require_extra()
    from safetensors import SafetensorError

    folder, config = Path(folder).resolve(), state.model.config  # of a link, the folder that it leads to
    if isinstance(tokenizer, Tokenizer):
        if tokenizer.n_vocab > config.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.n_vocab} entries, the model only {config.vocab_size}")
        tokenizer.follow(state.bounds)  # the files say what training did
        eot = tokenizer.eot
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        written = written_shape(config.unrolled(), tokenizer)
        found = hf.read_json(tokenizer / "config.json") if isinstance(tokenizer, Path) else None
        described = to_config(written, eot, dtype, found)
        _write_weights(state, written, partial, dtype, shard_bytes)
        about = _ledger(state, folder, manifest_sha256) | {"fingerprint": hf.Weights(partial, written).fingerprint()}
        ends = sorted({*state.bounds.ends, *([] if eot is None else [eot])})
        special: dict[str, Any] = {"bos_token_id": _begin(state.bounds, tokenizer)}
        base = None
        special["eos_token_id"] = eot if eot is not None else ends if len(ends) > 1 else ends[0] if ends else None
        generation = {**special, "do_sample": True, "temperature": 0.8, "top_k": 50}
        generation |= {"eos_token_id": ends} if len(ends) > 1 else {}
        if isinstance(tokenizer, Path) and found is not None:
            described = {key: value for key, value in described.items() if key not in OF_TEXTS}
            special = {key: found[key] for key in OF_TEXTS if key in found}  # where it is silent, its architecture has others
            if (tokenizer / "generation_config.json").is_file():
                generation = hf.read_json(tokenizer / "generation_config.json")
            base = tokenizer.resolve().name if manifest_sha256 is None else None
        _write_json(partial / "config.json", described | special | {"nanostack": about})
        _write_json(partial / "generation_config.json", generation)
        if isinstance(tokenizer, Tokenizer):
            write_tokenizer(tokenizer, partial, config.seq_len)
        elif tokenizer is not None:
            _copy_tokenizer(tokenizer, partial)
        if as_gguf:
            gguf.write(partial, partial / f"{folder.name}.gguf", folder.name)
        (partial / "README.md").write_text(card(folder.name, described["model_type"], state, records, text, base))
        if records:
            from nanostack.curves import draw

            draw({folder.name: records}, "flops", partial / "curves.png")
        _replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)


def _begin(bounds: Bounds, tokenizer: Tokenizer | Path | None) -> int | None:
    """The token that stands for an empty text, as tokenizer_config.json names it; None where that is not known."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.prefix
    return bounds.prefix if bounds.prefix is not None else bounds.start[0] if bounds.start else None


def _ledger(state: State, folder: Path, manifest_sha256: str | None) -> dict:
    """What config.json keeps under "nanostack", as Hugging Face has no place for it."""
    receipts = [receipt.as_dict() for receipt in state.growth]
    if state.model.config.loops > 1 and receipts:
        print(f"note: {folder} has a layer for each pass of a loop; how the looped ones grew is left out", file=sys.stderr)
        receipts = []
    about = {"cursor": dataclasses.asdict(state.cursor), "growth": receipts, "seed": state.seed}
    return about | {"manifest_sha256": manifest_sha256, "bounds": dataclasses.asdict(state.bounds)}


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer and the licence of another model, as they are."""
    for path in source.iterdir():
        if path.is_file() and (path.name in hf.TOKENIZER_FILES or path.name.upper().startswith(LEGAL)):
            shutil.copyfile(path, folder / path.name)


def written_shape(config: LlamaConfig, tokenizer: Tokenizer | Path | None) -> LlamaConfig:
    """The shape that is written: the model's own, but for a Qwen2 whose tokenizer does other than Qwen's.

    transformers makes Qwen's tokenizer of the entries and merges of every qwen2 folder, whatever its files say, and would give
    other ids. Such a model is written as a Llama, whose out projections have biases, too: they are 0.
    """
    if not isinstance(tokenizer, Tokenizer) or model_type(config) != "qwen2":
        return config
    return config if does_as_qwen2(json.loads(tokenizer.to_json())) else dataclasses.replace(config, out_bias=True)


def _replace(partial: Path, folder: Path) -> None:
    """Put a finished folder in its place; one that was there goes only when the new one is in."""
    if not folder.exists():
        os.replace(partial, folder)
        return
    old = folder.with_name(f"{folder.name}.{os.getpid()}.replaced")
    os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_weights(state: State, config: LlamaConfig, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """safetensors, each of at most shard_bytes unless a tensor alone is larger; only a shard at a time is held."""
    from safetensors.torch import save_file

    parameters, scale = dict(state.model.named_parameters()), state.model.config.branch_scale
    n_layer = state.model.config.n_layer
    shards: list[list[tuple[str, int]]] = [[]]  # (our name, which of its parts)
    total = filled = 0
    for name in hf.names_of(config):
        for part, shape in enumerate(hf.shapes_of(name, config)):
            n_bytes = dtype.itemsize * math.prod(shape)
            if shards[-1] and filled + n_bytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, part))
            filled, total = filled + n_bytes, total + n_bytes
    index: dict[str, str] = {}
    for number, parts in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, part in parts:
            ours = parameters.get(hf.in_loop(name, n_layer))
            whole = torch.zeros(hf.shapes_of(name, config)[0]) if ours is None else ours.detach()
            if name.endswith(RESIDUAL_OUTPUTS) and scale != 1:
                whole = whole * scale
            rows = hf.rows_of(name, config)
            tensor = whole.split(rows)[part] if len(rows) > 1 else whole
            tensors[hf.theirs(name)[part]] = tensor.to("cpu", dtype, copy=True).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tokenizer(ours: Tokenizer, folder: Path, seq_len: int) -> None:
    """tokenizer.json and tokenizer_config.json of a tokenizer of ours, which begins texts as training did."""
    (folder / JSON_FILE).write_bytes(ours.to_json())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    about["model_input_names"] = ["input_ids", "attention_mask"]  # what transformers 4 passes to a Llama, which takes no more
    about |= ours.config | {"eos_token": ours.eot_token, "bos_token": ours.token(ours.prefix)}
    about |= {"add_bos_token": bool(ours.start), "model_max_length": seq_len}
    _write_json(folder / "tokenizer_config.json", about)


def card(name: str, kind: str, state: State, records: list[dict] | None, text: str | None, base: str | None = None) -> str:
    """README.md of the folder: shape, text, tokens, FLOPs, how it grew, its curve.

    kind: the architecture that is written; base: the model of others that was grown.
    """
    config, cursor = state.model.config.unrolled(), state.cursor
    heads = f"{config.n_head} heads ({config.n_kv_head} for keys and values)"
    tags, family = f"tags: [{kind}, nanostack, stacking]", ARCHITECTURES[kind].name.removesuffix("ForCausalLM")
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", tags, "---"]
    lines += [
        f"# {name}",
        "",
        f"A {family} of {n_params(config) / 1e6:.1f}M parameters: {config.outline()},",
    ]
    made = f"Made of {base} with nanostack, and not trained since" if base else "Trained with nanostack"
    lines += [f"{heads}, context {config.seq_len}. {made}.", ""]
    if not base:
        lines += [f"- tokens: {describe_tokens(cursor.tokens)}", *([f"- text: {text}"] if text else [])]
        lines += [
            f"- FLOPs, those before growth included: {cursor.flops:.3g} (6·N per token), {cursor.flops_exact:.3g} exactly"
        ]
    for receipt in state.growth:
        lines += [f"- {receipt.outcome()}" + ("" if base else f", after {describe_tokens(receipt.tokens)} tokens")]
    lines += [] if state.growth else ["- never grown"]
    for record in [record for record in records or [] if record.get("val_loss") is not None][-1:]:
        at = describe_tokens(record["tokens"])
        lines += [f"- validation loss: {record['val_loss']:.4f} nats per token, after {at} tokens"]
    return "\n".join([*lines, *(["", "![curves](curves.png)"] if records else [])]) + "\n"
