"""Text from a model: `nanostack sample out/quickstart/grown/ckpt.pt --prompt "def " "class "`.

The model is a checkpoint or a Hugging Face folder. On a terminal the text appears as it is made, one sample after another; all
samples of prompts of one length are made together, each with random numbers of its own, so that it is the text that it would
be alone.
"""

import sys
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import cast

import tyro

from nanostack import models
from nanostack.config import Sampling
from nanostack.device import choose_device
from nanostack.errors import UserError, command_line
from nanostack.generate import Sample, encode, find_tokenizer, write
from nanostack.parallel import Placement
from nanostack.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Command(Sampling):
    """Let a model write."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a folder of Hugging Face's."""
    data: Path | None = None
    """The prepared folder whose tokenizer the model was trained with. Default: the one in data/ that it was trained on."""
    prompt: tuple[str, ...] = ("def ",)
    """One or several; an empty one is the beginning of a document."""
    prompt_file: Path | None = None
    """A file with the prompt, instead of --prompt; - is standard input."""
    n: int = 1
    """Samples of each prompt: the first has `seed`, the next the number after it."""
    json: bool = False
    """Print all samples as one JSON object."""


class Console:
    """Prints samples one after another as they grow; what comes of later ones meanwhile waits for its turn."""

    def __init__(self, samples: list[Sample], text: Tokenizer):
        self.samples, self.text, self.now, self.printed = samples, text, 0, 0
        cast(TextIOWrapper, sys.stdout).reconfigure(errors="replace")  # a terminal that has not all of Unicode
        self.begin()

    def begin(self) -> None:
        if len(self.samples) > 1:
            print(f"--- sample {self.now + 1} of {len(self.samples)}, seed {self.samples[self.now].seed}")

    def show(self) -> None:
        """Print what is new."""
        while self.now < len(self.samples):
            text = self.samples[self.now].text(self.text)
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)
            if not self.samples[self.now].end:
                return
            print()
            self.now, self.printed = self.now + 1, 0
            if self.now < len(self.samples):
                self.begin()


def read_prompts(command: Command) -> tuple[str, ...]:
    file = command.prompt_file
    if file is None:
        return command.prompt
    try:
        return ((sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode(),)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from error


def main(command: Command) -> dict:
    command.check()
    if command.n < 1 or not command.prompt:
        raise UserError(f"n must be at least 1, and there must be a prompt, not {command.n} and {len(command.prompt)}")
    prompts = read_prompts(command)
    saved = models.read(command.checkpoint)
    text = find_tokenizer(saved, command.checkpoint, command.data)
    encoded = {prompt: encode(prompt, text, saved["config"]["seq_len"]) for prompt in prompts}
    window, longest = saved.get("window"), max(encoded, key=lambda prompt: len(encoded[prompt]))
    if window and (length := len(encoded[longest]) + command.tokens - 1) > window:
        raise UserError(
            f"the prompt {longest[:40]!a} and {command.tokens} more tokens take {length}, and beyond {window} the attention of "
            f"{command.checkpoint} is a sliding window, which ours is not: at most --tokens {window + command.tokens - length}"
        )
    samples = [Sample(prompt, list(encoded[prompt]), command.seed + i) for prompt in prompts for i in range(command.n)]
    device = choose_device("auto")
    model = models.restore(saved, Placement(device)).model
    console = None if command.json else Console(samples, text)
    for _ in write(model, samples, command, text):
        if console:
            console.show()
    return {"samples": [sample.record(text) for sample in samples]}


def run() -> None:
    command_line(Command, main, __doc__)
