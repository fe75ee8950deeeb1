"""A live model as EleutherAI's lm-eval sees it, and its tasks' data from the Hub or from local files.

Needs the extra `eval`, so only what asks for tasks imports this. How texts are cut is lm-eval's own rule and that of its
Hugging Face model, to which every number is equal: context and continuation are encoded together, trailing spaces of the
context belong to the continuation, an empty context is end-of-text, what does not fit is cut on the left.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor
from transformers import AutoTokenizer

from nanostack.errors import UserError
from nanostack.model import Llama
from nanostack.text.tokenizer import Tokenizer

LOGIQA = "EleutherAI/logiqa"  # a loading script and no data: datasets ≥ 4 cannot read it
LOGIQA_FILES = "https://raw.githubusercontent.com/lgw863/LogiQA-dataset/master"  # where that script reads


class HubTokenizer:
    """The tokenizer in a Hugging Face folder, with what the model below asks of ours. UserError if it cannot be read."""

    def __init__(self, folder: Path):
        try:
            self._theirs = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # of transformers, tokenizers, json: it has many
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({_reason(error)}); name another (--tokenizer)"
            ) from error
        self.eot = self._theirs.eos_token_id
        self.prefix = self.eot if self._theirs.bos_token_id is None else self._theirs.bos_token_id
        if self.prefix is None:
            raise UserError(
                f"the tokenizer in {folder} has neither a first nor a last token of a text; name another (--tokenizer)"
            )
        self.n_vocab = len(self._theirs)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self._theirs.encode(text, add_special_tokens=special)

    def decode(self, ids: list[int]) -> str:
        return str(self._theirs.decode(ids, skip_special_tokens=True))


class LiveModel(TemplateLM):
    """lm-eval's interface to a `Llama` on its device. `batch` texts of like length go through it at once.

    `progress(batches, label)` yields the batches and tells how far it is.
    """

    def __init__(self, model: Llama, text: Tokenizer | HubTokenizer, batch: int, progress: Callable[[list, str], Iterable]):
        super().__init__()
        self.model, self.text, self.batch, self.progress = model, text, batch, progress
        self._device = model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.text.eot

    @property
    def prefix_token_id(self) -> int:
        return self.text.eot if isinstance(self.text, Tokenizer) else self.text.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if isinstance(self.text, Tokenizer):  # ours adds none
            return self.text.encode(string)
        return self.text.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether each token is the likeliest) of each request's continuation.

        A request is (anything, context ids, continuation ids). Requests that feed the model the same tokens share a row, as the
        choices A, B, C, D do. A continuation longer than seq_len goes in pieces of seq_len, each with what stands before it as
        context, so that every token is scored once: lm-eval's rolling windows.
        """
        seq_len = self.model.config.seq_len
        asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)  # row: [(request, targets at its end)]
        for number, (what, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError(f"nothing is left of the continuation in {what}: the tokenizer merges it with its context")
            whole = context + continuation
            for start in range(0, len(continuation), seq_len):
                targets = continuation[start : start + seq_len]
                end = len(context) + start + len(targets)
                asked[tuple(whole[max(0, end - 1 - seq_len) : end - 1])].append((number, targets))
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        rows = sorted(asked, key=len, reverse=True)  # memory runs out at once or not at all
        batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        for batch in self.progress(batches, "scoring"):
            lengths = [max(len(targets) for _, targets in asked[row]) for row in batch]
            log_probs_NV = self._log_probs(batch, lengths)
            places: list[int] = []
            expected: list[int] = []
            owners: list[int] = []
            end = 0
            for row, length in zip(batch, lengths, strict=True):
                end += length
                for number, wanted in asked[row]:
                    places += range(end - len(wanted), end)
                    expected += wanted
                    owners += [number] * len(wanted)
            at_N, wanted_N = (torch.tensor(x, device=self._device) for x in (places, expected))
            best = (log_probs_NV.argmax(-1)[at_N] == wanted_N).tolist()
            for number, value, is_best in zip(owners, log_probs_NV[at_N, wanted_N].tolist(), best, strict=True):
                sums[number] += value
                greedy[number] &= is_best
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        texts = [(None, [self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
        scores = iter(self._loglikelihood_tokens([one for one in texts if one[2]]))
        return [next(scores)[0] if ids else 0.0 for _, _, ids in texts]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each context, up to max_gen_toks tokens, end-of-text or one of `until`."""
        answers = [""] * len(requests)
        batches = [range(i, min(i + self.batch, len(requests))) for i in range(0, len(requests), self.batch)]
        for batch in self.progress(batches, "generating"):
            for number, answer in zip(batch, self._generate([requests[number].args for number in batch]), strict=True):
                answers[number] = answer
        return answers

    def _generate(self, arguments: list[tuple[str, dict]]) -> list[str]:
        seq_len, rows, until, left = self.model.config.seq_len, [], [], []
        made: list[list[int]] = []
        for context, options in arguments:
            if options.get("do_sample") or options.get("temperature"):
                raise UserError("a task asks for text drawn at random; only the likeliest is generated here")
            stops, most = options.get("until") or [], options.get("max_gen_toks", 256)
            until.append([stops] if isinstance(stops, str) else stops)
            left.append(most)
            rows.append((self.tok_encode(context) or [self.prefix_token_id])[-max(1, seq_len - most) :])
            made.append([])
        while going := [i for i, n in enumerate(left) if n > 0]:
            inputs = [(rows[i] + made[i])[-seq_len:] for i in going]
            likeliest = self._log_probs(inputs, [1] * len(going))[:, : self.text.n_vocab].argmax(-1).tolist()
            for i, token in zip(going, likeliest, strict=True):
                left[i] -= 1
                if token == self.text.eot:
                    left[i] = 0
                    continue
                made[i].append(token)
                if until[i] and any(stop in self.text.decode(made[i]) for stop in until[i]):
                    left[i] = 0
        texts = [self.text.decode(ids) for ids in made]
        return [
            text[: min((text.index(s) for s in stops if s in text), default=None)]
            for text, stops in zip(texts, until, strict=True)
        ]

    @torch.no_grad()
    def _log_probs(self, rows: list, lengths: list[int]) -> Tensor:
        """(sum of lengths, V) fp32: log-probabilities of what follows each of the last lengths[i] tokens of rows[i]."""
        width = max(map(len, rows))
        tokens_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._device)
        places = [
            i * width + j for i, (row, n) in enumerate(zip(rows, lengths, strict=True)) for j in range(len(row) - n, len(row))
        ]
        at_N = torch.tensor(places, device=self._device)
        # The head is by far the largest part for short continuations, and only these positions need it.
        hook = self.model.head.register_forward_pre_hook(lambda head, arguments: (arguments[0].flatten(0, 1)[at_N],))
        try:
            return self.model(tokens_BT).float().log_softmax(-1)
        finally:
            hook.remove()


@contextlib.contextmanager
def data_from(folder: Path | None) -> Iterator[None]:
    """While it lasts, lm-eval's tasks read from `folder`, or without one from the Hub, with UserErrors for what is not there.

    lm-eval takes overrides for tasks by name, but not for groups, nor for tasks that load more than their config says; all of
    them go through `datasets.load_dataset`, which is therefore what is replaced.
    """
    hub = datasets.load_dataset

    def load(path: str, name: str | None = None, **options):
        options.pop("trust_remote_code", None)
        try:
            if folder is None:
                return logiqa(LOGIQA_FILES, hub) if path == LOGIQA else hub(path, name, **options)
            place = folder / path
            if not place.is_dir():
                raise UserError(
                    f"there is no data of {path}: {place} is no folder. Where there is a network: {fetch(path, place)}"
                )
            if (place / "Test.txt").is_file():
                return logiqa(place, hub)
            if name and (place / name).is_dir():
                place, name = place / name, None
            return hub(str(place), name, **options)
        except UserError:
            raise
        except Exception as error:  # of datasets, the Hub, the network, pyarrow: it has many
            where = f"read from {folder / path}" if folder else "had from the Hub (without a network: --data)"
            raise UserError(f"the data of {path} could not be {where}: {_reason(error)}") from error

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = hub


def fetch(path: str, place: Path) -> str:
    """The command that fills `place` with the data set called `path`."""
    if path == LOGIQA:
        return f"git clone https://github.com/lgw863/LogiQA-dataset {place}"
    return f"hf download --repo-type dataset {path} --local-dir {place}"


def logiqa(place: str | Path, load_dataset: Callable) -> datasets.DatasetDict:
    """LogiQA from its authors' text files, parsed as the script on the Hub does.

    Records stand between empty lines: the answer's letter, the passage, the question, four options.
    """
    files = {"train": f"{place}/Train.txt", "validation": f"{place}/Eval.txt", "test": f"{place}/Test.txt"}
    texts = load_dataset("text", data_files=files, sample_by="document")

    def spaced(text: str) -> str:
        return text.replace(".", ". ").strip()

    splits = {}
    for split, text in texts.items():
        records = [record.split("\n") for record in text[0]["text"].strip().split("\n\n")]
        splits[split] = datasets.Dataset.from_list(
            [
                {
                    "label": record[0].strip(),
                    "context": spaced(record[1]),
                    "question": spaced(record[2]),
                    "options": [spaced(option[2:]) for option in record[3:]],
                }
                for record in records
            ]
        )
    return datasets.DatasetDict(splits)


def _reason(error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__  # it only says that there was one
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
