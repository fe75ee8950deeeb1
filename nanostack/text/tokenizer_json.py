"""What a tokenizer.json says, and the files beside it: bytes of its tokens, what its template adds, which token ends a text.

Each as transformers' AutoTokenizer has it: where files or fields disagree, its order counts. Two of its rules surprise: with a
tokenizer.json there, `add_bos_token` of tokenizer_config.json means nothing, as the template of tokenizer.json decides; and
special_tokens_map.json goes before tokenizer_config.json, unless that has `added_tokens_decoder`, when it is not read.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nanostack.errors import UserError
from nanostack.text.bounds import Bounds

JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# The tokens that transformers' classes have where no file names one. TokenizersBackend, which reads what it is given, has none.
NAMED_BY_CLASS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "GPTNeoXTokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>"},
}
CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "mistral": "TokenizersBackend"}  # else what is declared


def named_tokens(folder: Path) -> dict[str, str | None]:
    """{"bos_token", "eos_token"} of the model in a folder, as AutoTokenizer has them; None where there is none."""
    config = read_json(folder / CONFIG_FILE)
    found = NAMED_BY_CLASS.get(_class_of(folder, config), {}) | config
    if "added_tokens_decoder" not in config:
        found |= read_json(folder / "special_tokens_map.json")
    tokens = {}
    for name in ("bos_token", "eos_token"):
        token = found.get(name)
        if isinstance(token, dict):  # with its properties, as older versions wrote it
            token = token.get("content")
        if not isinstance(token, str | None):
            raise UserError(f"{folder}: the {name} of its {CONFIG_FILE} or special_tokens_map.json is {token!r}, no text")
        tokens[name] = token
    return tokens


def own_config(folder: Path) -> dict:
    """What tokenizer_config.json in a folder says that holds for the same tokens elsewhere: paddings, templates of a chat.

    How texts begin and end is said by training, and files and code are not taken along. The class is not either: some build a
    tokenizer of their own out of the merges, and tokenizer.json is what the ids are of.
    """
    found = read_json(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in found:
        found |= read_json(folder / "special_tokens_map.json")
    gone = ("auto_map", "name_or_path", "tokenizer_file", "vocab_file", "tokenizer_class", "add_bos_token", "add_eos_token")
    found = {key: value for key, value in found.items() if key not in (*gone, "bos_token", "eos_token")}
    named = {key: value["content"] for key, value in found.items() if isinstance(value, dict) and "content" in value}
    return found | named  # tokenizer.json itself has the properties of tokens


def _class_of(folder: Path, config: dict) -> str:
    """The class that AutoTokenizer makes of a folder, of those in NAMED_BY_CLASS."""
    model = read_json(folder / "config.json")
    declared = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    kind = str(model.get("model_type") or "")
    if kind == "qwen2":  # whatever is declared, which is often wrong there
        return CLASS_OF_MODEL[kind]
    bytes_of_llama = declared == "LlamaTokenizer" and (folder / JSON_FILE).is_file()
    if bytes_of_llama and b'"ByteLevel"' in (folder / JSON_FILE).read_bytes():
        return "TokenizersBackend"
    if kind == "mistral":
        return CLASS_OF_MODEL[kind] if declared else "TokenizersBackend"
    return declared or CLASS_OF_MODEL.get(kind, "TokenizersBackend")


def bounds_of(folder: Path) -> Bounds:
    """How a text begins and ends for the model in a folder: the tokens of its tokenizer, and the ends that its configs name.

    Needs the extra `hf`. Without a tokenizer.json there are only the configs' ends, and the start is not known.
    """
    ends: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        found = read_json(folder / file).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(one) is int and one >= 0 for one in ids):
            raise UserError(f"{folder / file}: its eos_token_id is {found!r}, neither an id nor a list of ids")
        ends |= set(ids)
    if not (folder / JSON_FILE).is_file():
        return Bounds(ends=sorted(ends))
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(folder / JSON_FILE))
    bos, eos = (None if token is None else bpe.token_to_id(token) for token in named_tokens(folder).values())
    ends |= set() if eos is None else {eos}
    return Bounds(start_of(folder, bpe), eos if bos is None else bos, sorted(ends))


def start_of(folder: Path, bpe: Any) -> list[int]:
    """The ids that AutoTokenizer puts before every text: those of the template, which its class for GPT-NeoX leaves out."""
    forgets = _class_of(folder, read_json(folder / CONFIG_FILE)) == "GPTNeoXTokenizer"
    return [] if forgets else template_of(bpe)[0]


def template_of(bpe: Any) -> tuple[list[int], list[int]]:
    """The ids that the template of a tokenizer puts before every text, and those behind it."""
    made = bpe.encode("a")
    own = [place for place, added in enumerate(made.special_tokens_mask) if not added]
    return (made.ids[: own[0]], made.ids[own[-1] + 1 :]) if own else (made.ids, [])


def with_start(data: bytes, tokens: list[tuple[str, int]]) -> bytes:
    """The same tokenizer.json with another template: these (token, id) before every text, and nothing behind it."""
    made = json.loads(data)
    post = made.get("post_processor")
    steps = post["processors"] if post and post["type"] == "Sequence" else [post] if post else []
    steps = [step for step in steps if step["type"] == "ByteLevel"]  # which adds no token
    if tokens:
        first, second = ([{"SpecialToken": {"id": token, "type_id": i}} for token, _ in tokens] for i in (0, 1))
        single = [*first, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, *second, {"Sequence": {"id": "B", "type_id": 1}}]
        special = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in tokens}
        steps.append({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special})
    many = {"type": "Sequence", "processors": steps}
    made["post_processor"] = many if len(steps) > 1 else steps[0] if steps else None
    return json.dumps(made, ensure_ascii=False, indent=2).encode()


def token_lengths(name: str, bpe: Any, data: bytes, n_vocab: int) -> np.ndarray:
    """(n_vocab,) int64, bytes of text that each id stands for. UserError where there are texts that it cannot encode."""
    from tokenizers.pre_tokenizers import ByteLevel

    made, vocab = json.loads(data), bpe.get_vocab(with_added_tokens=True)
    decoder = made.get("decoder") or {}
    steps = {step.get("type") for step in (decoder, *decoder.get("decoders", ()))}
    if "ByteLevel" in steps:
        complete, fallback = vocab.keys() >= set(ByteLevel.alphabet()), None  # a character stands for a byte
    else:
        fallback = {f"<0x{byte:02X}>": 1 for byte in range(256)} if "ByteFallback" in steps else {}
        complete = bool(fallback) and made["model"].get("byte_fallback") and vocab.keys() >= fallback.keys()
    if not complete:
        raise UserError(f"{name} cannot encode every text: it has neither all 256 bytes nor a fallback to them")

    def length(token: str) -> int:
        return len(token) if fallback is None else fallback.get(token) or len(token.replace("▁", " ").encode())

    lengths = np.zeros(n_vocab, np.int64)
    lengths[list(vocab.values())] = [length(token) for token in vocab]
    for number, token in bpe.get_added_tokens_decoder().items():
        lengths[number] = 0 if token.special else len(token.content.encode())
    return lengths


def read_json(path: Path) -> dict:
    """The object in a file, {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} does not hold a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object, but a {type(found).__name__}")
    return found
