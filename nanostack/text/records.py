"""JSON records, one to a line or all in one array, whatever nests in them and however long their numbers are.

A record is asked for one field, and the others must not matter. So the value of a whole number is not kept, as int() refuses
one of more than 4,300 digits; and in a record that nests deeper than Python recurses, lists and objects come out empty.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal

LONGEST_RECORD = 1 << 26  # bytes of an array's element, and of a line that may be a record
BLOCK = 1 << 20  # bytes of an array that are read at a time
DECODER = json.JSONDecoder(parse_int=len)
SPACE = re.compile(r"[ \t\n\r]*")
BEGIN = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(\]?)")


def form(opened: Callable[[], BinaryIO], named_json: bool) -> Literal["lines", "array", "text"]:
    """How a file is written whose name does not tell: as lines if the first two are objects, as an array if named .json.

    opened: gives a stream at the beginning of the file.
    """
    start = opened().read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    try:
        if start == b"{":
            lines = opened()
            if all(isinstance(decode(lines.readline(LONGEST_RECORD)), dict) for _ in range(2)):
                return "lines"
        if start == b"[" and named_json:
            next(elements(opened()), None)
            return "array"
    except ValueError:
        pass
    return "text"


def decode(line: bytes) -> object:
    """The value that a line is. ValueError if it is not JSON."""
    text = line.decode("utf-8-sig", "surrogatepass")
    value, at = _scan(text, 0)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return value


def elements(stream: BinaryIO) -> Iterator[object]:
    """The elements of the array that a stream is, each as soon as it has come. ValueError if it is not JSON."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogatepass")
    text = decoder.decode(stream.read(BLOCK))
    if (begin := BEGIN.match(text)) is None:
        raise json.JSONDecodeError("Expecting '['", text, 0)
    at, closed = begin.end(), bool(begin[1])
    while not closed:
        try:
            value, end = _scan(text, at)
            closed = text.startswith("]", end)
            end = end + 1 if closed else _expect(",", text, end)
        except ValueError:
            block = stream.read(max(BLOCK, len(text) - at)) if len(text) - at < LONGEST_RECORD else b""
            if not block:
                raise
            text, at = text[at:] + decoder.decode(block), 0  # the element may go on there
            continue
        at = end
        yield value
    if text[at:].strip() or stream.read(BLOCK).strip():
        raise ValueError("there is more behind the array")


def _scan(text: str, at: int) -> tuple[object, int]:
    """The value that begins at `at` or behind white space there, and where the white space behind it ends."""
    at = _after_space(text, at)
    try:
        value, at = DECODER.raw_decode(text, at)
    except RecursionError:
        value, at = _scan_deep(text, at)
    return value, _after_space(text, at)


def _scan_deep(text: str, at: int) -> tuple[object, int]:
    """`DECODER.raw_decode` without recursion: lists and objects that are in the value come out empty."""
    whole: object = None
    key, due = "", []  # the brackets that close what is open, the innermost last
    while True:
        value: object
        if opened := text[at : at + 1] in ("[", "{"):
            value = {} if text[at] == "{" else []
            due.append("}" if text[at] == "{" else "]")
            at += 1
        else:
            value, at = DECODER.raw_decode(text, at)
        if whole is None:
            whole = value
        elif len(due) == 1 + opened and isinstance(whole, dict):
            whole[key] = value
        while due and text.startswith(due[-1], at := _after_space(text, at)):
            due.pop()
            at, opened = at + 1, False
        if not due:
            return whole, at
        if not opened:  # behind another value
            at = _after_space(text, _expect(",", text, at))
        if due[-1] == "}":
            key, at = _expect_key(text, at)
            at = _after_space(text, at)


def _expect_key(text: str, at: int) -> tuple[str, int]:
    _expect('"', text, at)
    key, at = DECODER.raw_decode(text, at)
    return key, _expect(":", text, _after_space(text, at))


def _expect(character: str, text: str, at: int) -> int:
    """Where it goes on behind a character that must be there."""
    if text[at : at + 1] != character:
        raise json.JSONDecodeError(f"Expecting {character!r}", text, at)
    return at + 1


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at
