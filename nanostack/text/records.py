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
DEFAULT_FIELD = "text"
BLOCK = 1 << 20  # bytes of an array that are read at a time
DECODER = json.JSONDecoder(parse_int=len)
SPACE = re.compile(r"[ \t\n\r]*")
BEGIN = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(\]?)")


def form(opened: Callable[[], BinaryIO], named_json: bool, field: str) -> Literal["lines", "array", "record", "text"]:
    """How a file is written whose name does not tell.

    opened: gives a stream at the beginning of the file. Lines: the first two that are not blank are objects, or one is and the
    other would be if it were whole; named .json also one object and anything behind it. An array: named .json it begins as
    one, under another name its first element is an object with the field. A record: one object with text in the field, named
    .json. Another object in a .json is text, as a program's settings, unless it is one line and a field is asked for by name.
    """
    begin = _beginning(opened())
    if begin.startswith(b"["):
        return _form_of_array(opened, begin, named_json, field)
    if not begin.startswith(b"{"):
        return "text"
    lines = _lines(opened())
    first, second = next(lines, b""), next(lines, b"")
    one: object = _object(first)
    if one is not None and (second.startswith(b"{") or (named_json and second)):
        return "lines"
    if _object(second) is not None and first.startswith(b'{"'):
        return "lines"
    if not named_json:
        return "text"
    if one is None:
        whole = opened().read(LONGEST_RECORD)
        try:
            one, more = first_value(whole.decode("utf-8-sig", "surrogatepass"))
        except ValueError:  # settings with comments, a template
            return "text"
        if more.startswith("{"):  # several objects, each on several lines
            return "lines"
    if isinstance(one, dict) and isinstance(one.get(field), str):
        return "record"
    return "lines" if field != DEFAULT_FIELD and _object(first) is not None else "text"


def _form_of_array(opened: Callable[[], BinaryIO], begin: bytes, named_json: bool, field: str) -> Literal["array", "text"]:
    begin = begin[1:].lstrip()[:1]
    if named_json:
        return "array" if not begin or begin in b'{["-0123456789tfn]' else "text"
    if begin not in (b"{", b""):
        return "text"
    try:
        element = next(elements(opened()), None)
    except ValueError:
        return "text"
    return "array" if isinstance(element, dict) and field in element else "text"


def _beginning(stream: BinaryIO) -> bytes:
    """Some bytes from the first on that is no white space, nor the mark of UTF-8."""
    begin = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    while not begin and (block := stream.read(BLOCK)):
        begin = block.lstrip()
    return begin


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines that are not blank, without the mark of UTF-8 before the first; of a long one the beginning."""
    start = True
    while line := stream.readline(LONGEST_RECORD):
        line = (line.removeprefix(codecs.BOM_UTF8) if start else line).strip()
        start = False
        if line:
            yield line


def _object(line: bytes) -> dict | None:
    """The object that a line is, if it is one."""
    try:
        value = decode(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def first_value(text: str) -> tuple[object, str]:
    """The value with which a text begins, and the text behind it. ValueError if there is none."""
    value, at = _scan(text, 0)
    return value, text[at:]


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
    text = ""
    while text.strip() in ("", "[") and (block := stream.read(BLOCK)):
        text += decoder.decode(block)
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
