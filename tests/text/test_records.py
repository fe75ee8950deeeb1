"""JSON records: how a file of them is told from text, and what is read of them."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nanostack.errors import UserError
from nanostack.text import records
from nanostack.text.sources import LONGEST, Reader, list_files


def reader(source: Path, field: str = "text") -> Reader:
    return Reader(list_files(str(source), Counter()), field)


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_json_is_json_lines_where_its_first_two_lines_are_records(tmp_path, packing):
    """C4 comes like this, as c4-train.00000-of-01024.json.gz. Settings of a program in a folder of code are text."""
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    records = b'{"text": "a"}\n{"text": "b"}\n'
    settings = [b'{"name": "x"}\n', b'{\n "name": "x"\n}\n', b"[section]\na = 1\n"]
    settings += [b'{ // of a compiler\n "text": 1\n}\n', b'{"text": 1}\n', b'{"text": {"size": 2}}']
    for data, texts in [(records, ["a", "b"]), *((one, [one.decode()]) for one in settings)]:
        (tmp_path / f"part.json{packing}").write_bytes(pack(data))
        assert list(reader(tmp_path / f"part.json{packing}")) == texts
    (tmp_path / "part.json").write_bytes(records)
    with pytest.raises(UserError, match=r"part\.json, line 1: no field 'body' \(there is text\)"):
        list(reader(tmp_path / "part.json", "body"))


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines.gz", "a.JL", "part-00000", "a.txt.zst"])
def test_json_lines_are_records_under_any_name(tmp_path, name):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(b'{"text": "a", "n": 1}\n{"text": "b"}\n\n{"n": 2}\n{"text": null}\n'))
    read = reader(tmp_path / name)
    assert list(read) == ["a", "b", ""] and read.dropped == {"without_field": 1}
    with pytest.raises(UserError, match=rf"{name}, line 1: no field 'body' \(there is text, n\); choose it with --field"):
        list(reader(tmp_path / name, "body"))


def test_one_array_of_records_is_read_element_by_element(tmp_path, monkeypatch):
    """Elements that lie across blocks, in several shapes; what is no record, or no JSON further on, never becomes text."""
    monkeypatch.setattr(records, "BLOCK", 7)
    path, texts = tmp_path / "a.json", [f"text {i} 字 🙂" for i in range(9)]
    made = [{"text": text, "meta": [{"n": i}]} for i, text in enumerate(texts)]
    for data in (json.dumps(made), json.dumps(made, indent=1, ensure_ascii=False) + "\n", "\ufeff " + json.dumps(made)):
        path.write_text(data, "utf-8")
        assert list(reader(path)) == texts
        path.write_text(data.rstrip()[:-1], "utf-8")
        with pytest.raises(UserError, match=r"a\.json, behind record 8: not JSON"):
            list(reader(path))
    with pytest.raises(UserError, match=r"a\.json, record 1: no field 'body' \(there is text, meta\)"):
        path.write_text(json.dumps(made))
        list(reader(path, "body"))
    for data in ("[]", "[1, 2]", '["a"]', '[["text"]]', "[null]", "[ \n ]"):
        path.write_text(data)
        others = reader(path)
        assert not list(others) and others.dropped == Counter(array_of_no_records=data not in ("[]", "[ \n ]")), data
    path.write_text('[{"text": "a"}] [')
    with pytest.raises(UserError, match="behind record 1: not JSON"):
        list(reader(path))


A, B, BOM = b'{"text": "a"}', b'{"text": "b"}', b"\xef\xbb\xbf"
READ = {  # what is in a file: the texts
    b"\n\n" + A + b"\n" + B: ["a", "b"],
    A + b"\n \n\r\n" + B + b"\n\n": ["a", "b"],
    BOM + A + b"\n" + B: ["a", "b"],
    BOM + b"\n" + A + b"\n" + B: ["a", "b"],
    A: ["a"],
    b'{\n "id": 1,\n "text": "a"\n}\n': ["a"],
    b" " * 3_000_000 + b"[" + A + b",\n" + B + b"]": ["a", "b"],
    b"[" + b"\n" * 3_000_000 + A + b"]": ["a"],
    BOM + b"[" + A + b"]": ["a"],
}


@pytest.mark.parametrize(("data", "texts"), READ.items(), ids=[repr(data[:30]) for data in READ])
def test_blank_lines_white_space_and_a_mark_of_utf8_make_no_text_of_records(tmp_path, data, texts):
    (tmp_path / "a.json").write_bytes(data)
    assert list(reader(tmp_path / "a.json")) == texts
    if data.startswith(b"{\n"):  # what may be settings
        assert list(reader(tmp_path / "a.json", "nosuch")) == [data.decode()]
        return
    with pytest.raises(UserError, match=r"a\.json, (line|record) [123]: no field 'nosuch'"):
        list(reader(tmp_path / "a.json", "nosuch"))


DAMAGED = {
    A + b'\n{"text": "b"\n': "line 2: not JSON",
    A + b"\nb\n": "line 2: not JSON",
    b'{"text": a}\n' + B: "line 1: not JSON",
    b'[{"text": "a", bad}, ' + B + b"]": "behind record 0: not JSON",
    b"[" + A + b" " + B + b"]": "behind record 0: not JSON",
    b"[": "behind record 0: not JSON",
    b"[" * 100_000: "behind record 0: not JSON",
    b"[null, " + B + b"]": "record 1: no object, and record 2 is one",
    b'[["a"], 1, ' + B + b"]": "record 1: no object, and record 3 is one",
    b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n': "line 1: not JSON",
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.items(), ids=DAMAGED.values())
def test_json_that_is_damaged_is_refused_and_never_text(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.json, {message}"):
        list(reader(tmp_path / "a.json"))


def test_array_of_records_is_found_under_any_name(tmp_path):
    for name, data, texts in (
        ("a.dat", b'\n[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ("b.py", b'[{"name": "a"}]', ['[{"name": "a"}]']),
        ("c.md", b"[link](there) {", ["[link](there) {"]),
    ):
        (tmp_path / name).write_bytes(data)
        assert list(reader(tmp_path / name)) == texts


def test_mark_of_utf8_is_no_text(tmp_path):
    for tail in (b"a", b"a" * LONGEST, "字".encode() * LONGEST):
        (tmp_path / "a.txt").write_bytes(BOM + tail)
        read = reader(tmp_path / "a.txt")
        assert "".join(read) == tail.decode() and not read.dropped


DEEP = "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize("other", [DEEP, '{"a":' * 20_000 + "[]" + "}" * 20_000, "9" * 9000, f"[-{'7' * 5000}, 1.5]"])
def test_what_nobody_asks_for_may_nest_and_be_as_large_as_it_likes(tmp_path, other):
    record = f'{{"text": "a\\n字", "other": {other}, "more": {{"text": "b"}}, "id": 3}}'
    (tmp_path / "a.jsonl").write_text(f"{record}\n{record}\n", "utf-8")
    (tmp_path / "a.json").write_text(f"[{record}, {record}]", "utf-8")
    for name in ("a.jsonl", "a.json"):
        assert list(reader(tmp_path / name)) == ["a\n字"] * 2
        with pytest.raises(UserError, match="1: 'id' is not text but a int"):
            list(reader(tmp_path / name, "id"))
        with pytest.raises(UserError, match=r"1: 'other' is not text but a (list|dict|int)"):
            list(reader(tmp_path / name, "other"))
    (tmp_path / "a.jsonl").write_text(record[:-1] + "\n", "utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: not JSON"):
        list(reader(tmp_path / "a.jsonl"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.integers(0), st.sampled_from(["", "]", "}", ",", ":", '"', "1", " "]), st.sampled_from([None, 1]))
def test_reading_without_recursion_takes_and_gives_what_json_does(value, place, planted, indent):
    """Also for texts with a character too many or too few somewhere."""
    text = json.dumps(value, indent=indent)
    place %= len(text) + 1
    text = text[:place] + planted + text[place + (not planted) :]
    try:
        wanted, end = json.JSONDecoder(parse_int=len).raw_decode(text)
    except ValueError:
        with pytest.raises(ValueError):
            records._scan_deep(text, 0)
        return
    if isinstance(wanted, dict):
        wanted = {key: type(inner)() if isinstance(inner, dict | list) else inner for key, inner in wanted.items()}
    assert records._scan_deep(text, 0) == ([] if isinstance(wanted, list) else wanted, end)
