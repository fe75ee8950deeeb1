"""What leaves as tokenizer.json cuts and merges text as tiktoken does, for the patterns that the project names."""

import re

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_text import BYTES, ODD, neighbours
from tiktoken_ext import openai_public

from nanostack.errors import UserError
from nanostack.text import tokenizer, translation


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return neighbours()


@pytest.fixture(scope="module")
def patterns() -> dict[str, str]:
    """The patterns of tiktoken's own encodings, whose ranks would have to be downloaded, and ours."""
    with pytest.MonkeyPatch.context() as patched:
        for load in ("data_gym_to_mergeable_bpe_ranks", "load_tiktoken_bpe"):
            patched.setattr(openai_public, load, lambda *_, **__: BYTES)
        found = {name: make()["pat_str"] for name, make in openai_public.ENCODING_CONSTRUCTORS.items()}
    return found | {"ours": tokenizer.PATTERN, "bytes": tokenizer.BYTES_PATTERN}


@pytest.fixture(scope="module")
def exported(patterns, ranks) -> dict[str, tuple[tokenizer.Tokenizer, bytes]]:
    made = {name: tokenizer.Tokenizer(name, pattern, ranks, {tokenizer.EOT: len(ranks)}) for name, pattern in patterns.items()}
    once = {ours.pattern: ours.to_json() for ours in made.values()}
    return {name: (ours, once[ours.pattern]) for name, ours in made.items()}


NAMED = ["gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony", "ours", "bytes"]


def test_every_pattern_that_the_project_names_gives_the_ids_of_tiktoken(exported):
    assert set(NAMED) <= exported.keys()
    for ours, data in {ours.pattern: (ours, data) for ours, data in exported.values()}.values():
        theirs = tokenizers.Tokenizer.from_buffer(data).encode_batch(ODD)
        wanted = ours._bpe.encode_ordinary_batch(ODD)
        wrong = [text for text, found, ids in zip(ODD, theirs, wanted, strict=True) if found.ids != ids]
        assert not wrong, (ours.name, wrong[0])


def test_autotokenizer_cuts_digits_as_gpt_4_does(exported, tmp_path):
    """Taken as it stands, GPT-4's pattern means one or more times one to three digits: 12|34."""
    transformers = pytest.importorskip("transformers")
    ours, data = exported["cl100k_base"]
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["1234", "x = 1234567\r\n", *ODD[:200]]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text
    split = tokenizers.Tokenizer.from_buffer(data).pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("1234")] == ["123", "4"]


LETTERS = st.binary(min_size=2, max_size=5).map(lambda data: bytes(b"abc"[byte % 3] for byte in data))


@settings(max_examples=200, deadline=None)
@given(st.lists(LETTERS, max_size=20), st.lists(st.text("abc", min_size=1, max_size=25), min_size=5, max_size=20))
def test_ranks_of_any_tokens_merge_as_in_tiktoken(tokens, texts):
    """Also where the parts of a token have higher ranks than it has, which no training gives, but a file of ranks may."""
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys([*BYTES, *tokens]))}
    ours = tokenizer.Tokenizer("any", r"[a-c]+", ranks, {tokenizer.EOT: len(ranks)})
    theirs = tokenizers.Tokenizer.from_buffer(ours.to_json())
    for text in texts:
        assert theirs.encode(text).ids == ours.encode(text), text


def test_classes_hold_the_same_characters_in_both_libraries():
    """In the planes of Unicode that have characters. \\w holds others, and is refused."""
    everything = "".join(chr(i) for i in range(0x34000) if not 0xD800 <= i < 0xE000)
    for name in [r"\s", r"\d", *(rf"\p{{{category}}}" for category in translation.CATEGORIES)]:
        rust = tiktoken.Encoding("one", pat_str=f"{name}+", mergeable_ranks=BYTES, special_tokens={})
        onig = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"{name}+"), behavior="removed", invert=True)
        found = "".join(piece for piece, _ in onig.pre_tokenize_str(everything))
        assert rust.decode(rust.encode_ordinary(everything)) == found, name


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (r"\p{N}{1,3}+|\s++$", r"(?>\p{N}{1,3})|\s++\z"),
        (r"(?:ab|c){2}+d|^e", r"(?>(?:ab|c){2})d|\Ae"),
        (r"(?:a{1,2}+b)+", r"(?:(?>a{1,2})b)+"),
        (r"[^\]\r\n]?+(?!\S)", r"[^\]\r\n]?+(?!\S)"),
    ],
)
def test_repetition_without_return_and_edges_of_the_text_are_said_in_oniguruma(pattern, wanted):
    assert translation.oniguruma("mine", pattern) == wanted


@pytest.mark.parametrize(
    "part", [r"\w", r"\bx", "(?i)s", "(?m)^", "(?i:ss)", "(?i:Fi|x)", "[a&&b]", "[a[b]]", "{1,3}?", r"\p{Greek}", "(?<n>a)"]
)
def test_a_pattern_that_may_mean_something_else_is_refused_by_name(part):
    with pytest.raises(UserError, match=f"^mine: its pattern has '{re.escape(repr(part[:2])[1:-1])}.*export the model without"):
        tokenizer.Tokenizer("mine", rf"a{part}|[\s\S]", BYTES, {tokenizer.EOT: 256}).to_json()
