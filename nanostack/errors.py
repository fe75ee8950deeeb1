"""How a command line ends: a user's mistake in one message, exit code 2 and no traceback, Ctrl-C in one message and 130."""

import contextlib
import difflib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import tyro


class UserError(ValueError):
    """Something the user can mend. The message says what was wrong, where, and what to do."""


@contextlib.contextmanager
def exits_cleanly():
    """Wrap a command line's main: a `UserError` ends the process with its message and exit code 2, Ctrl-C with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # Nearly every mistake is seen by all ranks, and rank 0 tells it. Its exit makes torchrun end this process;
            # a rank that is still alive after a moment was alone with its error and has to tell it itself.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2) if "RANK" in os.environ else sys.exit(2)  # no waiting for a process group that will never answer


def command_line(options: type, main: Callable[[Any], dict], description: str | None = None) -> dict:
    """Parse the command line into the dataclass `options`, call `main` with it and return its answer.

    With --json, a field of every `options`, the answer is printed as one JSON object. Options that `options` does not know,
    with what follows them, go to its field `overrides` if it has one: they are a run's config's. --help shows `description`,
    or else the docstring of `options`. What the system refuses is the user's to mend: it ends as a `UserError` does.
    """
    with exits_cleanly():
        mine: list[str] = sys.argv[1:]
        others: list[str] = []
        if any(field.name == "overrides" for field in fields(options)):
            mine, others = split({field.name for field in fields(options)}, mine)
        command = parse(options, mine, description=description)
        try:
            answer = main(replace(command, overrides=tuple(others)) if others else command)
        except BrokenPipeError:  # who reads the answer has left: no mistake
            raise
        except OSError as error:  # a folder that is a file, a full disk, no right to write
            raise UserError(f"{error.filename or 'reading or writing'}: {error.strerror or error}") from error
        if command.json:
            print(json.dumps(answer))
    return answer


def split(known: set[str], arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments in two: options named in `known` (and what comes before any option), and others, each with its values."""
    mine: list[str] = []
    others: list[str] = []
    now = mine
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
            now = mine if name.removeprefix("no_") in known | {"help"} else others
        now.append(argument)
    return mine, others


def parse(options: type, arguments: list[str], **how) -> Any:
    """The dataclass that the words of a command line make; `how` is for tyro.cli. UserError for words that make none."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(options, args=arguments, use_underscores=True, **how)
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UserError(_plain(message.getvalue())) from None


def _plain(box: str) -> str:
    """The text of tyro's message box as one line, without its title, its rules and its pointers to the help."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines() if not line.startswith(("╭", "╰", "├"))]
    text = " ".join(re.sub(r"-{4,}", " ", " ".join(lines).replace("│", " ").replace("─", " ")).split())
    text = re.sub(r" (in|from) \S+(\.py|nanostack)( \S+)? --help|( Argument helptext:| For full helptext).*", "", text)
    if wrong := re.match(r"invalid choice '(.*?)'.*Expected one of \((.*?)\)", text):
        near = difflib.get_close_matches(wrong[1], re.findall(r"'(.*?)'", wrong[2]), 1)
        text += f" Perhaps you meant: {near[0]}" if near else ""
    return text
