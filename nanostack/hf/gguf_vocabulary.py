"""The tokenizer of a Hugging Face folder as llama.cpp's: entries, merges, and the name of the way it cuts text.

llama.cpp has no regular expression in its files, but names for some that it knows by heart. WAYS has those that cut alike, as
tests/hf/test_llama_cpp.py finds, but for one text: where case does not count, ſ is an s to Unicode and another letter to
llama.cpp, which keeps 'ſ together with letters behind it. A tokenizer of another kind, or that cuts otherwise, is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanostack.errors import UserError
from nanostack.hf.config import told
from nanostack.hf.weights import read_json
from nanostack.text.tokenizer import BYTES_PATTERN, JSON_FILE, PATTERN
from nanostack.text.tokenizer_json import bounds_of, template_of
from nanostack.text.translation import bytes_to_unicode

ENGLISH, WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
QWEN2_PATTERN = rf"{ENGLISH}|{WORDS}|\p{{N}}|{REST}"
WAYS = {  # by what pre-tokenizes: one Split, or the steps in words
    BYTES_PATTERN: "gpt-2",  # nothing merges, so any would do
    GPT_2: "gpt-2",
    "ByteLevel": "gpt-2",
    "Digits, ByteLevel": "smollm",
    PATTERN: "llama-bpe",
    rf"{ENGLISH}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",  # Llama 3's
    QWEN2_PATTERN: "qwen2",
}
WITHOUT_CASE = ("llama-bpe", "qwen2")
LONG_S = [data.encode() for data in ("ſ", "'ſ")] + ["ſ".encode()[-1:]]


def add_vocabulary(writer: Any, folder: Path, name: str, n_vocab: int) -> None:
    """Add the tokenizer in a folder to a GGUFWriter. UserError where llama.cpp would give other ids."""
    from gguf import TokenType

    if not (folder / JSON_FILE).is_file():
        raise UserError("a GGUF holds its tokenizer: name the data that the model was trained on (--data)")
    made, whose = read_json(folder / JSON_FILE), f"the {JSON_FILE} of {name}"
    way = _way(made, whose)
    entries = {number: (text, TokenType.NORMAL) for text, number in made["model"]["vocab"].items()}
    for token in made["added_tokens"]:
        if any(token[how] for how in ("lstrip", "rstrip", "single_word")) and not token["special"]:
            raise UserError(f"{whose}: {token['content']!r} is found with conditions, which a GGUF cannot say")
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        entries[token["id"]] = (token["content"], kind)
    listed = [entries.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(n_vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(way)
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]])
    _add_special(writer, folder, whose, {text: number for number, (text, _) in entries.items()})


def _way(made: dict, whose: str) -> str:
    """llama.cpp's name for the way a tokenizer.json cuts and merges."""
    model, decoder = made["model"], made.get("decoder") or {}
    if model["type"] != "BPE" or decoder.get("type") != "ByteLevel" or model.get("byte_fallback"):
        kind = "BPE that falls back to bytes" if model.get("byte_fallback") else f"{model['type']}, not byte-level"
        raise UserError(f"{whose} is of a kind that is not written to a GGUF ({kind}); byte-level BPE is")
    if (normalizer := made.get("normalizer")) and normalizer["type"] != "NFC":
        raise UserError(f"{whose} changes text by {normalizer['type']} before it cuts, which llama.cpp does not do")
    if normalizer:
        told("llama.cpp does not compose characters (NFC): of text that is not, its ids are others")
    steps = list(_steps(made.get("pre_tokenizer") or {"type": "nothing"}))
    if (way := WAYS.get(", ".join(steps))) is None:
        raise UserError(f"{whose} cuts text by {', '.join(steps)}, for which llama.cpp has no name")
    whole = {"llama-bpe": True}.get(way, False)  # whether a piece that is an entry is taken as it is, whatever merges give
    if whole != bool(model.get("ignore_merges")) and (odd := _not_merged(made)) is not None:
        raise UserError(f"{whose}: no merges make {odd!r}, which llama.cpp would find where this does not, or the reverse")
    if way in WITHOUT_CASE and _tells_long_s(model["vocab"]):
        told("llama.cpp takes 'ſ for the beginning of a word: of text with it, its ids may be others")
    return way


def does_as_qwen2(made: dict) -> bool:
    """Whether a tokenizer.json does with text what transformers' Qwen2Tokenizer does, which keeps entries, merges and template.

    That composes characters (NFC), cuts by Qwen's pattern, merges always, and has <|endoftext|> for an entry, or adds it.
    """
    model, steps = made["model"], made.get("pre_tokenizer") or {}
    cuts = list(_steps(steps)) == [QWEN2_PATTERN] and steps.get("type") == "Sequence"
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
    known = {*model.get("vocab", ()), *(token["content"] for token in made["added_tokens"])}
    if (made.get("normalizer") or {}).get("type") != "NFC" or not cuts or not plain or "<|endoftext|>" not in known:
        return False
    return model["type"] == "BPE" and (not model.get("ignore_merges") or _not_merged(made) is None)


def _steps(step: dict) -> Iterator[str]:
    """A pre-tokenizer in words that WAYS has, or that tell what is unknown."""
    parts = step.get("pretokenizers")
    if parts:
        last = parts[-1]
        if last["type"] == "ByteLevel" and not last["add_prefix_space"] and not last.get("use_regex", True):
            parts = parts[:-1]  # only turns bytes into characters
        for part in parts:
            yield from _steps(part)
    elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        yield step["pattern"].get("Regex") or json.dumps(step["pattern"])
    elif step["type"] == "ByteLevel" and not step["add_prefix_space"] and step.get("use_regex", True):
        yield "ByteLevel"
    elif step == {"type": "Digits", "individual_digits": True}:
        yield "Digits"
    else:
        yield json.dumps(step)


def _not_merged(made: dict) -> str | None:
    """An entry that merges do not make of its characters."""
    import tokenizers

    bare = {"version": "1.0", "model": made["model"] | {"ignore_merges": False}, "added_tokens": []}
    model = tokenizers.Tokenizer.from_str(json.dumps(bare)).model
    added = {token["content"] for token in made["added_tokens"]}
    return next((text for text in made["model"]["vocab"] if text not in added and len(model.tokenize(text)) > 1), None)


def _tells_long_s(vocab: dict[str, int]) -> bool:
    """Whether some entry begins with 'ſ, or an end of it, and goes on."""
    shown = bytes_to_unicode()
    beginnings = tuple("".join(shown[byte] for byte in data) for data in LONG_S)
    return any(text.startswith(beginnings) and text not in beginnings for text in vocab)


def _add_special(writer: Any, folder: Path, whose: str, number_of: dict[str, int]) -> None:
    """Which tokens begin and end a text, and whether they are put there, as the tokenizer's template does."""
    import tokenizers

    found = read_json(folder / "config.json")
    path = folder / "tokenizer_config.json"
    own = read_json(path) if path.is_file() else {}
    before, after = template_of(tokenizers.Tokenizer.from_file(str(folder / JSON_FILE)))
    if max(len(before), len(after)) > 1:
        raise UserError(f"{whose} puts several tokens before or behind a text, which a GGUF cannot say")
    named = {
        key: value["content"] if isinstance(value, dict) else value for key, value in own.items() if key.endswith("_token")
    }
    ends = found.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    ends += [one for one in bounds_of(folder).ends if one not in ends]  # of generation_config.json, of the tokenizer
    ends = [one for one in ends if one is not None]
    if after and after[0] not in ends:
        raise UserError(f"{whose} puts token {after[0]} behind a text, which is not the model's eos_token_id {ends}")
    begin = before[0] if before else number_of.get(named.get("bos_token") or "")
    eos = after[0] if after else ends[0] if ends else None
    pad = named.get("pad_token")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if begin is not None:
        writer.add_bos_token_id(begin)
    ways = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)  # llama.cpp ends a text at each
    listed = [] if eos is None else [eos, *(one for one in ends if one != eos)]
    for add, number in zip(ways, listed, strict=False):
        add(number)
    if more := listed[len(ways) :]:
        told(f"a GGUF has room for {len(ways)} ends of a text: llama.cpp will not end one at {', '.join(map(str, more))}")
    if pad in number_of:
        writer.add_pad_token_id(number_of[pad])
    template = folder / "chat_template.jinja"
    if chat := (template.read_text() if template.is_file() else own.get("chat_template")):
        writer.add_chat_template(chat)
