"""A live model as EleutherAI's lm-eval sees it, and its tasks' data from the Hub or from local files.

Needs the extra `eval`, so only what asks for tasks imports this. Every number is that of lm-eval's own Hugging Face model with
one text at a time (`--model hf --batch_size 1`): its functions read the arguments of a request, cut windows, find stops, and
trim what was generated. What that model fails on, or does in a way that this one does not know, is refused by name.
"""

import contextlib
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import tokenizers
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, StoppingCriteriaList

from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.model import Llama
from nanostack.text.tokenizer import Tokenizer
from nanostack.text.tokenizer_json import JSON_FILE

LOGIQA = "EleutherAI/logiqa"  # a loading script and no data: datasets ≥ 4 cannot read it
LOGIQA_FILES = "https://raw.githubusercontent.com/lgw863/LogiQA-dataset/master"  # where that script reads
PROBES = (" a", "a  b", "1234", "a\r\n\n b", "e\u0301", "don't 'll", "\t\tx = 1")  # texts that are cut up in different ways
MAX_GEN_TOKS = 256  # what lm-eval's Hugging Face model generates where a task says nothing
# What a request or a generation_config.json may say without another text coming of it: whatever it is, or if it is 1. All else
# may only be nothing, 0 or false.
NO_MATTER = """
    do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff length_penalty early_stopping max_length
    bos_token_id eos_token_id pad_token_id decoder_start_token_id use_cache cache_implementation cache_config max_cache_len
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate renormalize_logits
    remove_invalid_values low_memory disable_compile compile_config prefill_chunk_size transformers_version _from_model_config
"""
OF_THE_CALL = ("pad_token_id", "use_cache", "input_ids", "attention_mask", "stopping_criteria", "return_dict_in_generate")
ONES = "repetition_penalty encoder_repetition_penalty guidance_scale num_beams num_beam_groups num_return_sequences"


class HubTokenizer:
    """transformers' AutoTokenizer of a folder, as lm-eval's Hugging Face model uses it. UserError if it cannot be read.

    ends: ids that end a text beside the tokenizer's own, those of the model's configs.
    """

    def __init__(self, folder: Path, ends: Iterable[int] = ()):
        try:
            self.theirs = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # of transformers, tokenizers, json: it has many
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({_reason(error)}); name another (--tokenizer)"
            ) from error
        self.eot = self.theirs.eos_token_id
        if self.eot is None:
            raise UserError(
                f"the tokenizer in {folder} names no token that ends a text (eos_token); name another (--tokenizer)"
            )
        self.prefix = self.eot if self.theirs.bos_token_id is None else self.theirs.bos_token_id
        self.ends = {self.eot, *ends}
        self.n_vocab = max(self.theirs.get_vocab().values()) + 1
        self.generation = self._generation(folder)
        self._compare(folder)

    @classmethod
    def of(cls, text: Tokenizer, seq_len: int, model: Path | None = None) -> "HubTokenizer":
        """One of ours: what `nanostack export` would write of it, read again. model: the folder of the model, if it has one."""
        with tempfile.TemporaryDirectory() as folder:
            export.write_tokenizer(text, Path(folder), seq_len)
            made = cls(Path(folder), text.ends)
        made.generation = cls._generation(model) if model else made.generation
        return made

    def _compare(self, folder: Path) -> None:
        """Say where AutoTokenizer encodes otherwise than tokenizer.json: some of its classes build their own of the merges."""
        if not (folder / JSON_FILE).is_file():
            return
        plain = tokenizers.Tokenizer.from_file(str(folder / JSON_FILE))
        for text in PROBES:
            if plain.encode(text, add_special_tokens=False).ids != self.encode(text, special=False):
                kind = type(self.theirs).__name__
                print(
                    f"note: transformers ({kind}) encodes {text!r} otherwise than {folder / JSON_FILE} says. The numbers are "
                    "lm-eval's, so with transformers; prepare and sample do what the file says",
                    file=sys.stderr,
                )
                return

    @staticmethod
    def _generation(folder: Path) -> GenerationConfig:
        """How the model in a folder generates unless told otherwise."""
        try:
            if (folder / "generation_config.json").is_file():
                return GenerationConfig.from_pretrained(folder)
            if (folder / "config.json").is_file():
                return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
            return GenerationConfig()
        except Exception as error:
            raise UserError(f"{folder / 'generation_config.json'} cannot be read: {_reason(error)}") from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.theirs.encode(text, add_special_tokens=special)

    def decode(self, ids: list[int], special: bool = False) -> str:
        return str(self.theirs.decode(ids, skip_special_tokens=not special))


class LiveModel(TemplateLM):
    """lm-eval's interface to a `Llama` on its device. `batch` texts of like length go through it at once.

    `progress(batches, label)` yields the batches and tells how far it is.
    """

    def __init__(self, model: Llama, text: HubTokenizer, batch: int, progress: Callable[[list, str], Iterable]):
        super().__init__()
        self.model, self.text, self.batch, self.progress = model, text, batch, progress
        self.window: int | None = None  # of the model that was read, if its context is longer
        self._device = model.embed.weight.device
        self._tasks: dict[tuple, str | None] = {}  # of each request, to name it
        self._prefix = text.decode([text.prefix], special=True)

    @property
    def eot_token_id(self) -> int:
        return self.text.eot

    @property
    def prefix_token_id(self) -> int:
        return self.text.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._prefix)
        return self.text.encode(string, special=add_special_tokens)

    def refused(self, what: tuple | None, why: str) -> UserError:
        """The error that names the task of a request, and the request."""
        name = self._tasks.get(what) if what else None
        asked = f" {' | '.join(map(repr, what))[:120]}:" if what else ""
        return UserError(f"the task {name or 'that is scored'} cannot be evaluated as lm-eval does:{asked} {why}")

    def check_window(self, what: tuple | None, length: int) -> None:
        """UserError where a model with a sliding window would see further than ours, which would cut the text instead."""
        if self.window is not None and length > self.window:
            raise self.refused(
                what, f"it takes {length} tokens, and beyond {self.window} the model's attention is a sliding window"
            )

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        for request in requests:
            self._tasks[request.args] = request.task_name
            context, continuation = request.args
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise self.refused(request.args, "there is no token to score")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether each token is the likeliest) of each request's continuation.

        A request is (its texts or None, context ids, continuation ids). Requests that feed the model the same tokens share a
        row, as the choices A, B, C, D do. UserError for those that lm-eval's Hugging Face model has no number for.
        """
        seq_len = self.model.config.seq_len
        asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)  # row: [(request, targets at its end)]
        for number, (what, context, continuation) in enumerate(requests):
            if not context:
                raise self.refused(what, "the context is encoded to no token, so that nothing predicts the first one")
            if not continuation:
                raise self.refused(what, "nothing is left of the continuation: the tokenizer merges it with its context")
            self.check_window(what, len(context) + len(continuation) - 1)
            if len(continuation) > seq_len:
                raise self.refused(what, f"the continuation has {len(continuation)} tokens, the model's context {seq_len}")
            asked[tuple((context + continuation)[-seq_len - 1 : -1])].append((number, continuation))
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
        """The sum of log-probabilities of each text, in windows of seq_len behind the prefix token; of no tokens, 0."""
        seq_len = self.model.config.seq_len
        windows: list[tuple] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            self._tasks[request.args] = request.task_name
            self.check_window(request.args, len(tokens := self.tok_encode(request.args[0])))
            of_text = get_rolling_token_windows(tokens, self.prefix_token_id, seq_len, context_len=1)
            windows += [(None, *make_disjoint_window(window)) for window in of_text]
            owners += [number] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each context, to an end of text, or to the length or a stop that the request names."""
        asked = [Asked(self, request) for request in requests]
        batches = [asked[i : i + self.batch] for i in range(0, len(asked), self.batch)]
        for batch in self.progress(batches, "generating"):
            while going := [one for one in batch if not one.done]:
                inputs = [one.prompt + one.made for one in going]
                likeliest = self._log_probs(inputs, [1] * len(going))[:, : self.text.n_vocab].argmax(-1).tolist()
                for one, token in zip(going, likeliest, strict=True):
                    one.add(token)
        return [one.text() for one in asked]

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


class Asked:
    """A text to be generated, and what was made of it so far. UserError where lm-eval's Hugging Face model would not do it."""

    def __init__(self, live: LiveModel, request):
        context, given = request.args
        live._tasks[(context,)] = request.task_name
        self.hub, self.done = live.text, False
        self.made: list[int] = []
        how, seq_len = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS)), live.model.config.seq_len
        self.stops = handle_stop_sequences(how.pop("until"), eos=self.hub.decode([self.hub.eot], special=True))
        most = how.pop("max_gen_toks")
        if most >= seq_len:
            room = (
                f"{most} tokens are to be generated, and the model's context is {seq_len}: nothing of the prompt would remain"
            )
            raise live.refused((context,), room)
        special = not has_bos_prefix(context, self.hub.theirs.bos_token)
        ids = self.hub.encode(context, special=special)
        live.check_window((context,), len(ids) + most)
        self.prompt = ids[most - seq_len :]
        if not self.prompt:
            raise live.refused((context,), "the prompt is encoded to no token, so that nothing predicts the first one")
        self.length = how.pop("max_length", len(self.prompt) + most)
        if not len(self.prompt) < self.length <= seq_len:
            raise live.refused((context,), f"prompt and text are to have {self.length} tokens, the prompt {len(self.prompt)}")
        self.ends = self.hub.ends
        if "eos_token_id" in how:  # transformers takes them instead of the model's, and null for none
            ends = how.pop("eos_token_id")
            listed = ends if isinstance(ends, list) else [ends]
            if not listed or not all(type(one) is int and one >= 0 for one in listed if ends is not None):
                raise live.refused((context,), f"its eos_token_id is {ends!r}, neither an id nor a list of ids")
            self.ends = set(listed)
        if taken := [name for name in OF_THE_CALL if name in how]:
            raise live.refused((context,), f"lm-eval's Hugging Face model says {taken[0]} itself, and fails where a task does")
        if odd := unlike_greedy(self.hub.generation, how):
            raise live.refused((context,), f"with {odd} another text would come than the likeliest, which is all that is known")
        self.stopping: StoppingCriteriaList = stop_sequences_criteria(self.hub.theirs, self.stops, 0, 1)

    def add(self, token: int) -> None:
        self.made.append(token)
        stopped = bool(self.stopping(torch.tensor([self.made]), None).all())
        self.done = stopped or token in self.ends or len(self.prompt) + len(self.made) >= self.length

    def text(self) -> str:
        return postprocess_generated_text(self.hub.decode(self.made), self.stops, None)


def unlike_greedy(generation: GenerationConfig, how: dict) -> str | None:
    """What of a request's arguments, else of the model's own, makes transformers take another token than the likeliest."""
    if how.get("do_sample"):
        return "do_sample (or a temperature)"
    known, own = GenerationConfig().to_dict(), generation.to_dict()
    for name, value in ({name: own.get(name) for name in known} | how).items():
        neutral = name in NO_MATTER.split() or not value or (value == 1 and name in ONES.split())
        if name not in known or not neutral:
            return f"{name} {value!r}" + ("" if name in how else " in generation_config.json")
    return None


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
