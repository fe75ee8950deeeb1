"""Sources: which files they are, what documents are in them, and what is said of those that cannot be read."""

import gzip
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanostack.errors import UserError
from nanostack.sources import LONGEST, Reader, list_files


def reader(source: Path, field: str = "text") -> Reader:
    return Reader(list_files(str(source), Counter()), field)


@pytest.mark.parametrize("unit", ["a line of text number %d\n", "字符没有换行%d"], ids=["lines", "one long line"])
def test_a_long_text_becomes_several_documents_that_join_to_it(tmp_path, unit):
    whole = "".join(unit % i for i in range(60_000))
    (tmp_path / "book.txt").write_bytes(whole.encode())
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(whole.encode()))
    book = reader(tmp_path / "book.txt")
    parts = list(book)
    assert "".join(parts) == whole and len(parts) > 4 and not book.dropped
    assert max(len(part.encode()) for part in parts) <= LONGEST
    assert list(reader(tmp_path / "book.txt.gz")) == parts


def test_site_packages_are_the_installed_sources():
    names = {file.name for file in list_files("site-packages", Counter())}
    assert {"numpy/__init__.py", "tiktoken/core.py"} <= names
    assert not [name for name in names if "/tests/" in name or not name.endswith(".py")]


def test_parquet_says_which_columns_there_are_and_how_to_read_it(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' \(there is id, body\)"):
        list(reader(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'id' is not text but a int"):
        list(reader(tmp_path / "a.parquet", field="id"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'nanostack\[data\]'"):
        list(reader(tmp_path / "a.parquet"))
