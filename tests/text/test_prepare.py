"""`nanostack prepare`: what its command line says, refuses and leaves behind when it is ended."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, python
from test_corpus import STDLIB, content, run

from nanostack.commands.prepare import Command
from nanostack.errors import UserError
from nanostack.text import corpus as module
from nanostack.text.dataset import Tokens, verify
from nanostack.text.manifest import load_manifest, manifest_sha256
from nanostack.text.sources import list_files


def cli(*words: object, **options) -> subprocess.CompletedProcess:
    return python("-m", "nanostack", "prepare", *words, **options)


def test_stdlib_is_real_text_without_tests_and_tables(tmp_path):
    result = cli("stdlib", "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["manifest_sha256"] == manifest_sha256(tmp_path / "out") and summary["seconds"] > 0
    splits = summary["splits"]
    assert 5e6 < splits["train"]["bytes"] < 30e6 and splits["val"]["tokens"] > 50_000
    assert Tokens(tmp_path / "out", "val", 256).n_blocks > 100
    names = {file.name for file in list_files("stdlib", Counter())}
    assert {"json/decoder.py", "typing.py"} <= names
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "pydoc_data", "encodings", "site-packages", "cp1252.py"}


def refused(result: subprocess.CompletedProcess, message: str):
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a source"),
        (["nowhere"], "there is no source 'nowhere'"),
        (["empty"], "there is no text in empty (left out: 1 empty)"),
        (["empty", "--tokenizer", "bpe:300"], "there is no text in empty (left out: 1 empty)"),
        (["one"], "is a single document"),
        (["texts", "--tokenizer", "gpt3"], "known are gpt2, cl100k_base, o200k_base, bytes, bpe:N"),
        (["texts", "--tokenizer", "bpe:many"], "as in bpe:1024, not 'many'"),
        (["texts", "--tokenizer", "bpe:100"], "at least bpe:257"),
        (["texts", "--tokenizer", "gpt2"], "TIKTOKEN_CACHE_DIR"),
        (["texts", "--val_fraction", "2"], "--val_fraction"),
        (["texts", "--workers", "0"], "--workers must be at least 1"),
        (["texts", "--max_documents", "1"], "--max_documents must be at least 2, not 1"),
        (["texts", "--max_bytes", "5"], "there is no text in texts (left out: nothing; all above --max_bytes 5)"),
        (["texts", "--max_bytes", "6"], "is a single document (left out: nothing; all above --max_bytes 6)"),
        (["hf:texts"], "is not of the form hf:OWNER/NAME"),
        (["texts", "--tokenizer", "own/nothing"], "own/nothing is neither a file nor a folder here, and could not be had"),
        (["texts", "--out", "texts"], "exists and is no prepared data"),
        (["texts", "--out", "one/below"], "one"),
        (["texts", "--out", "done"], "choose another --out, or replace it with --overwrite"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(tmp_path, words, message):
    (tmp_path / "texts").mkdir()
    (tmp_path / "empty").write_text("")
    (tmp_path / "one").write_text("a single document")
    for name in "ab":
        (tmp_path / "texts" / name).write_text(f"text {name}")
    if "done" in words:
        run(tmp_path / "done", tmp_path / "texts")
    before = sorted(tmp_path.rglob("*"))
    words = [
        *words,
        *([] if "--out" in words else ["--out", "out"]),
        *([] if "--tokenizer" in words else ["--tokenizer", "bytes"]),
    ]
    dead_end = {"HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    refused(cli(*words, cwd=tmp_path, env=dead_end), message)
    assert sorted(tmp_path.rglob("*")) == before


LIMITED = """
import resource
from nanostack.commands import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
prepare.run()
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """The system refuses to write on, without a disk being filled."""
    result = python("-c", LIMITED, "stdlib", "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1)
    refused(result, f"writing {tmp_path / 'out'}: File too large")
    assert not list(tmp_path.iterdir())


def test_commands_of_the_data_page_are_understood():
    page = (ROOT / "docs/data.md").read_text().replace("\\\n", "")
    lines = [shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("nanostack prepare ")]
    commands = [tyro.cli(Command, args=line[2:], use_underscores=True) for line in lines]
    assert len(commands) == 14
    for command in commands:
        module._check_options(command)
    assert {40 * 10**9, 500 * 10**9} < {command.max_bytes for command in commands}


def interrupted(out: Path, number: int, *words: str) -> tuple[int, str]:
    """Run prepare until it has written some shards, then send `number` to all its processes (SIGKILL: only to the first)."""
    command = [sys.executable, "-m", "nanostack", "prepare", "stdlib", "--out", str(out), "--tokenizer", "bytes"]
    command += ["--shard_tokens", "20000", "--workers", "2", *words]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits "ignore"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, usual)
    partial = out.with_name(out.name + ".partial")
    until = time.monotonic() + 30
    while len(list(partial.glob("*.bin"))) < 20:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    try:
        error = process.communicate(timeout=20)[1]  # returns when the workers, which share the pipe, have ended too
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, error


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_works(tmp_path):
    out = tmp_path / "out"
    assert interrupted(out, signal.SIGKILL) == (-signal.SIGKILL, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    for folder in (out, tmp_path / "out.partial"):
        with pytest.raises(UserError, match="no prepared data"):
            load_manifest(folder)
    run(out, STDLIB / "email")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run(tmp_path / "clean", STDLIB / "email")
    assert content(tmp_path / "clean") == content(out)
    verify(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_overwrite_leaves_the_old_data_and_nothing_else(tmp_path, number, code):
    out = tmp_path / "out"
    run(out, STDLIB / "email")
    old = content(out)
    returncode, error = interrupted(out, number, "--overwrite")
    assert returncode == code
    assert error == (f"interrupted; {out} is as it was before\n" if number == signal.SIGINT else "")
    assert content(out) == old and not list(tmp_path.glob("out.*"))
