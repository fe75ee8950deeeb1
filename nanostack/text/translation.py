"""Ranks and a pattern of tiktoken's as a tokenizer.json of Hugging Face's, which gives the same ids.

The two cut text by other libraries of regular expressions: tiktoken by Rust's fancy-regex, tokenizers by Oniguruma. Some signs
mean another thing in each: in Rust `{1,3}+` never gives back what it took and `$` is the end of the text, in Oniguruma they
are one or more times {1,3} and the end of a line. Signs that are known to mean the same are kept, those two are said in
Oniguruma's way, and a pattern with any other is refused.
"""

import itertools
import re

from nanostack.errors import UserError

CATEGORIES = ["L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S", "Z", "Han"]
CLASSES = {r"\s", r"\S", r"\d", r"\D"}  # hold the same characters in both (tests/text/test_translation.py)
CLASSES |= {rf"\{letter}{{{category}}}" for letter in "pP" for category in CATEGORIES}
ESCAPES = r"\\[pP]\{\w+\}|\\[sSdDrntf]|\\[^\w\s<>]"
PARTS = re.compile(
    rf"""(?P<escape>{ESCAPES})
    | (?P<set>\[\^?(?:{ESCAPES}|(?!&&|--|~~)[^\[\]\\])+\])
    | (?P<ignoring_case>\(\?i:(?P<folded>[A-Za-z'|\[\]]+)\))
    | (?P<open>\((?:(?!\?)|\?(?:[:=!>]|<[=!])))
    | (?P<close>\))
    | (?P<possessive>\{{\d+(?:,\d*)?\}}\+)(?![+*?{{])
    | (?P<times>\{{\d+(?:,\d*)?\}}|[*+?][+?]?)(?![+*?{{])
    | (?P<bar>\|)
    | (?P<edge>[$^])
    | (?P<character>[^\\\[\](){{}}*+?^$|])
    """,
    re.VERBOSE,
)
ONE_CHARACTER = re.compile("ss|st|ff|fi|fl", re.IGNORECASE)  # where Oniguruma takes ß or ﬁ for two letters, if case is ignored


def tokenizer_json(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> str:
    """The content of a tokenizer.json with these ids. UserError for a pattern that cannot be said there. Needs the extra `hf`.

    tiktoken keeps ranks of byte strings, Hugging Face an ordered list of merges: the merge that makes a token is found by
    merging its bytes with the other ranks until two are left. Special tokens stand among the others too, or they would be
    numbered anew where ids are left out, as in cl100k_base. Text that looks like a special token becomes that token, as is the
    custom there; ours takes it as text.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    shown = bytes_to_unicode()
    text = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(parts := _merged(ranks, token)) == 2:
            merges.append((text[parts[0]], text[parts[1]]))
    vocab = {text[token]: rank for token, rank in ranks.items()} | special
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=any(len(token) > 1 for token in ranks)))
    translated = oniguruma(name, pattern)
    try:
        split = pre_tokenizers.Split(Regex(translated), behavior="isolated")
    except Exception as error:  # the library has no other class
        raise UserError(f"{name}: its pattern cannot be said in a tokenizer.json: {error}") from None
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    names = sorted(special, key=special.__getitem__)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return made.to_str(pretty=True)


def oniguruma(name: str, pattern: str) -> str:
    """What cuts text in Oniguruma as `pattern` does in fancy-regex. UserError, with `name`, for what is not known to."""
    out: list[str] = []
    groups: list[int] = []  # where in `out` the open ones begin
    at = atom = 0  # in `out`, where what a quantifier is about begins
    while at < len(pattern):
        found = PARTS.match(pattern, at)
        if not found or not _means_the_same(found):
            told = found[0] if found else pattern[at : at + 8]
            raise UserError(
                f"{name}: its pattern has {told!r}, which Hugging Face's tokenizers may not read as tiktoken does; its "
                f"tokenizer.json could give other ids, so export the model without one (no --data)"
            )
        at, kind, part = found.end(), found.lastgroup, found[0]
        if kind == "possessive":
            out[atom:] = ["(?>", *out[atom:], part[:-1], ")"]
            continue
        if kind == "open":
            groups.append(len(out))
        elif kind == "close":
            atom = groups.pop()
        elif kind != "times":
            atom = len(out)
        out.append({"$": r"\z", "^": r"\A"}[part] if kind == "edge" else part)
    return "".join(out)


def _means_the_same(found: re.Match) -> bool:
    if found["folded"]:
        return not ONE_CHARACTER.search(re.sub(r"[\[\]]", "", found["folded"]))
    escapes = re.findall(ESCAPES, found["escape"] or found["set"] or "")
    return all(escape in CLASSES or escape[1] in "rntf" or not escape[1].isalnum() for escape in escapes)


def _merged(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The bytes of a token, merged as far as the ranks of the others go."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
