"""Ten thousand strings on which ways to cut text differ: runs of digits, scripts, emoji, line ends, spaces, controls."""

import random

ALPHABETS = [
    "0123456789٣५½Ⅷ",
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "中文字符漢字かなカナ한국어𠀀𱍐",
    "🙂👩‍💻🇩🇪❤️☃é̂ñßſK",
    "\r\n",
    " \t\u00a0\u3000\u2028\u0085\v\f",
    "".join(map(chr, range(32))) + "\x7f\u200b\ufeff",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
]
SAID = ["'s", "'S", "'ſ", "'ll", "'LL", "'Ve", "don't", "I'M"]


def odd_text(drawn: random.Random) -> str:
    """Runs of characters of one kind, as real text has them."""
    runs = []
    for _ in range(drawn.randint(0, 8)):
        alphabet = drawn.choice(ALPHABETS)
        runs.append(drawn.choice(SAID) if drawn.random() < 0.1 else "".join(drawn.choices(alphabet, k=drawn.randint(1, 7))))
    return "".join(runs)


ODD = [odd_text(drawn) for drawn in [random.Random(0)] for _ in range(10_000)]
BYTES = {bytes([byte]): byte for byte in range(256)}


def neighbours() -> dict[bytes, int]:
    """256 bytes and a token for every two bytes that are neighbours in ODD, so that another cut gives other ids."""
    pairs = {data[i : i + 2]: 0 for text in ODD for data in [text.encode()] for i in range(len(data) - 1)}
    return BYTES | {pair: 256 + i for i, pair in enumerate(pairs)}
