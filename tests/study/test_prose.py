"""Prose out of packages: which paragraphs are kept, and what is refused."""

import hashlib
import io
import lzma
import tarfile

import pytest

from study import prose

SENTENCE = "This is a sentence of plain English that is long enough to be kept, as it says what somebody did. "
PAGE = f"""<html><head><title>no</title></head><body><h1>{SENTENCE}</h1>
<p>{SENTENCE}It goes on with <em>emphasis</em> and <code>a name</code> in it.</p><p>Short.</p>
<pre>{SENTENCE}</pre><p>{"x = f(1, 2) + 3; " * 9}</p><ul><li>{SENTENCE}</li></ul></body></html>"""


def package(files: dict[str, str]) -> bytes:
    """A .deb: an ar archive with the files in data.tar.xz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"./usr/share/doc/some-doc/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    data = lzma.compress(packed.getvalue())
    members = ((b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data))
    found = b"!<arch>\n"
    for name, content in members:
        found += name.ljust(16) + b"0".ljust(32) + str(len(content)).encode().ljust(10) + b"`\n"
        found += content + b"\n" * (len(content) % 2)
    return found


def test_paragraphs_that_are_sentences_are_kept_and_a_changed_package_is_refused(tmp_path, monkeypatch):
    deb = package({"b.html": PAGE, "a.html": "<p>none</p>", "notes.txt": SENTENCE})
    (tmp_path / "some-doc_1_all.deb").write_bytes(deb)
    monkeypatch.setattr(prose, "PACKAGES", {"pool/some-doc_1_all.deb": hashlib.sha256(deb).hexdigest()})
    answer = prose.main(prose.Command(tmp_path / "out", tmp_path))
    (page,) = (tmp_path / "out/some-doc").iterdir()
    kept = page.read_text().split("\n\n")
    assert kept == [f"{SENTENCE}It goes on with emphasis and a name in it.", f"{SENTENCE.strip()}\n"] and page.name == "b.txt"
    assert answer["bytes"] == {"some-doc_1_all.deb": page.stat().st_size}
    with pytest.raises(ValueError, match="is there already"):
        prose.main(prose.Command(tmp_path / "out", tmp_path))
    (tmp_path / "some-doc_1_all.deb").write_bytes(package({"b.html": "<p>other</p>"}))
    with pytest.raises(ValueError, match="it is another file, or damaged"):
        prose.main(prose.Command(tmp_path / "other", tmp_path))
    with pytest.raises(ValueError, match=r"there is no some-doc_1_all\.deb in"):
        prose.main(prose.Command(tmp_path / "other", tmp_path / "out"))
