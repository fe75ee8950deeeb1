"""Ranks of byte-pair encodings: bytes to ids, in files of tiktoken's format or fetched by tiktoken itself."""

import base64
from pathlib import Path

import tiktoken

from nanostack.errors import UserError


def read(path: Path) -> dict[bytes, int]:
    """The ranks in a file. UserError where it is none, or cannot encode every text."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is not a file of ranks (lines of base64 bytes, a space, the rank): {error}") from None
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} lacks some of the 256 single bytes, so it cannot encode every text")
    if len(ranks) != len(lines) or len(set(ranks.values())) != len(lines) or min(ranks.values()) < 0:
        raise UserError(f"{path} gives two ranks to one token, one rank to two, or a negative rank")
    return ranks


def fetched(name: str) -> tiktoken.Encoding:
    """One of tiktoken's own encodings, whose ranks are downloaded once. UserError where they cannot be had."""
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        cause: BaseException = error
        while cause.__context__:  # what was wrong lies under three layers of retrying
            cause = cause.__context__
        raise UserError(
            f"the ranks of {name} could not be fetched ({type(cause).__name__}: {cause}). Let TIKTOKEN_CACHE_DIR name a "
            f"folder where another machine's tiktoken has put them, or use bpe:N or bytes, which need no network"
        ) from None
