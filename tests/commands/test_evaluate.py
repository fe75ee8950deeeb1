"""Evaluation: log-likelihoods against the model itself and against lm-eval's Hugging Face model; the eight tasks end to end."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, python

import train
from nanostack import checkpoint
from nanostack.commands import evaluate
from nanostack.config import Optim, load
from nanostack.errors import UserError
from nanostack.hf import export
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer
from nanostack.text.dataset import Tokens

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
pytest.importorskip("lm_eval")
import datasets
from hflm import hflm
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanostack.commands.harness import HubTokenizer, LiveModel

CONFIG = LlamaConfig(n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=48, vocab_size=384, seq_len=32)
LONG = "It was the best of times, it was the worst of times. " * 4  # some 100 tokens, seq_len is 32
PAIRS = [
    ("Question: what is it?\nAnswer:", " a parrot"),
    ("Question: what is it?\nAnswer:", " b"),  # one row serves this one
    ("Question: what is it?\nAnswer:", " c"),  # and this one
    ("trailing spaces   ", "belong to the continuation"),
    ("", " no context at all"),
    ("foo", "bar: may merge with what is before it"),
    (LONG, " the end"),
    ("naïve ☃ ", "中文 🙂"),
]


@pytest.fixture(scope="module")
def state() -> State:
    state = State.create(CONFIG, Optim(), Placement(torch.device("cpu")), seed=1)
    with torch.no_grad():
        state.model.head.weight.mul_(10)  # distributions far from uniform
        state.model.head.weight[300:] = 0  # the likeliest is one that the tokenizer has
    return state


@pytest.fixture(scope="module")
def text(corpus) -> HubTokenizer:
    return HubTokenizer.of(tokenizer.load(corpus), CONFIG.seq_len)


def batches_only(batches, label):
    return batches


def live(state, text, batch=3) -> LiveModel:
    return LiveModel(state.model, text, batch, batches_only)


def requests(kind, *arguments) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@torch.no_grad()
def directly(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the definition: the model run on everything that fits, and what it says of the continuation's tokens."""
    ids = torch.tensor([(context + continuation)[-CONFIG.seq_len - 1 :]])
    log_probs = model(ids[:, :-1])[0, -len(continuation) :].double().log_softmax(-1)
    targets = torch.tensor(continuation)
    return log_probs.gather(1, targets[:, None]).sum().item(), bool((log_probs.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_loglikelihood_is_the_models_own(state, text, batch):
    start, other = text.encode("import"), text.encode("?")
    with torch.no_grad():
        likeliest = state.model(torch.tensor([start]))[0, -1].argmax().item()
        second = state.model(torch.tensor([start + other]))[0, -1].argmax().item()
    model = live(state, text, batch)
    asked = [(None, *model._encode_pair(*pair)) if pair[0] else (None, [text.eot], text.encode(pair[1])) for pair in PAIRS]
    asked += [(None, start, [*other, second]), (None, start, [likeliest])]
    found = model._loglikelihood_tokens(asked)
    for (_, context, continuation), (value, is_greedy) in zip(asked, found, strict=True):
        wanted, wanted_greedy = directly(state.model, context, continuation)
        assert value == pytest.approx(wanted, abs=1e-4) and is_greedy == wanted_greedy
    assert found[-1][1] and not all(one[1] for one in found)
    assert model.loglikelihood(requests("loglikelihood", *PAIRS)) == found[:-2]


def test_numbers_are_those_of_lm_evals_own_model_on_the_export(state, text, corpus, tmp_path):
    export.save(state, tmp_path / "out", None, tokenizer=tokenizer.load(corpus))
    theirs = hflm(tmp_path / "out")
    for ours in (live(state, text), live(state, HubTokenizer(tmp_path / "out"))):
        pairs = requests("loglikelihood", *PAIRS)
        for (value, greedy), (wanted, wanted_greedy) in zip(
            ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
        ):
            assert value == pytest.approx(wanted, abs=2e-3) and greedy == wanted_greedy
        texts = requests("loglikelihood_rolling", (LONG,), ("short",), (LONG + LONG[:50],))
        assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=5e-3)
        stops = {"until": [".", "\n\n"], "max_gen_toks": 12, "do_sample": False}
        prompts = requests("generate_until", ("def f", stops), ("import", stops), (LONG, stops))
        assert ours.generate_until(prompts) == theirs.generate_until(prompts)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 100])
def test_rolling_windows_are_lm_evals(state, text, n, monkeypatch):
    ids = torch.randint(300, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    windows = map(make_disjoint_window, get_rolling_token_windows(ids, text.eot, CONFIG.seq_len, 1))
    wanted = sum(directly(state.model, context, continuation)[0] for context, continuation in windows)
    monkeypatch.setattr(LiveModel, "tok_encode", lambda *_: ids)
    (value,) = live(state, text).loglikelihood_rolling(requests("loglikelihood_rolling", ("",)))
    assert value == pytest.approx(wanted, abs=1e-3)


def test_what_a_sliding_window_would_see_more_of_is_refused_and_not_cut(state, text):
    model = live(state, text)
    model.window = CONFIG.seq_len
    assert model.loglikelihood(requests("loglikelihood", ("a", " b")))[0][0] < 0
    asked = {
        model.loglikelihood: requests("loglikelihood", (LONG, " b")),
        model.loglikelihood_rolling: requests("loglikelihood_rolling", (LONG,)),
        model.generate_until: requests("generate_until", (LONG, {"until": ["."], "max_gen_toks": 4})),
    }
    for method, one in asked.items():
        with pytest.raises(UserError, match=r"tokens, and beyond 32 the model's attention is a sliding window"):
            method(one)


def test_empty_text_has_probability_one_and_a_vanished_continuation_is_an_error(state, text):
    model = live(state, text)
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", ("",), ("x",)))[0] == 0.0
    with pytest.raises(UserError, match="nothing is left of the continuation"):
        model._loglikelihood_tokens([(("abc", ""), text.encode("abc"), [])])


def test_generation_ends_at_a_stop_and_refuses_to_draw(state, text):
    model = live(state, text)
    free = model.generate_until(requests("generate_until", ("import", {"until": [], "max_gen_toks": 20})))[0]
    stop = free[5:7]
    stopped = model.generate_until(requests("generate_until", ("import", {"until": stop, "max_gen_toks": 20})))[0]
    assert stopped == free[: free.index(stop)]
    with pytest.raises(UserError, match=r"with do_sample \(or a temperature\) another text would come than the likeliest"):
        model.generate_until(requests("generate_until", ("import", {"until": [], "temperature": 0.8, "max_gen_toks": 20})))


@pytest.mark.slow
def test_validation_is_that_of_the_run(corpus, tmp_path):
    everything = Tokens(corpus, "val", 32).n_blocks * 32
    overrides = ["--data.path", str(corpus), "--data.val_tokens", str(everything), "--out", str(tmp_path / "run")]
    trained = train.Run(load(TINY, [*overrides, "--eval_interval", "1000000", "--micro_batch", "8"]))
    trained.train()
    wanted = trained.evaluate()
    found = run(tmp_path / "run/ckpt.pt", "--val", corpus, "--batch", "7")
    assert found == json.loads((tmp_path / "run/ckpt.eval.json").read_text())
    val = found["val"]
    assert val["loss"] == pytest.approx(wanted["val_loss"], abs=1e-5)
    assert val["bits_per_byte"] == pytest.approx(wanted["val_bits_per_byte"], abs=1e-5)
    assert val["perplexity"] == pytest.approx(math.exp(wanted["val_loss"]), rel=1e-4) and val["tokens"] == everything
    assert found["cursor"]["tokens"] == 24 * 256 and found["growth"][0]["op"] == "stack" and found["tasks"] is None


def write(folder: Path, name: str, rows: list[dict]) -> None:
    """Parquet or lines of JSON, by the name's ending."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / name) if name.endswith(".parquet") else table.to_json(folder / name)


def fill(folder: Path) -> None:
    """The eight tasks' data in the Hub's columns, under the names that a download leaves."""
    question = "Which of these conducts electricity?"
    choices = {"text": ["wood", "copper", "glass", "rubber"], "label": ["A", "B", "C", "D"]}
    arc = [{"id": f"q{i}", "question": question, "choices": choices, "answerKey": "B"} for i in range(3)]
    piqa = [
        {"goal": "boil an egg", "sol1": "put it in hot water", "sol2": "put it in the sun", "label": i % 2} for i in range(3)
    ]
    sciq = {"question": "What do plants take in?", "distractor1": "oxygen", "distractor2": "neon", "distractor3": "helium"}
    sciq |= {"correct_answer": "carbon dioxide", "support": "Plants take in carbon dioxide and give off oxygen."}
    trophy = "The trophy does not fit the case because the _ is too big."
    winogrande = [{"sentence": trophy, "option1": "trophy", "option2": "case", "answer": "1"}] * 2
    numbered = "-00000-of-00001.parquet"
    for split in ("train", "validation", "test"):
        write(folder / "allenai/ai2_arc", f"ARC-Easy/{split}{numbered}", arc)
        write(folder / "allenai/ai2_arc", f"ARC-Challenge/{split}{numbered}", arc[:2])
        write(folder / "baber/piqa", f"piqa_{split}.parquet", piqa)
        write(folder / "allenai/sciq", f"data/{split}{numbered}", [sciq] * 2)
        write(folder / "allenai/winogrande", f"winogrande_xl/{split}{numbered}", winogrande)
        pages = [{"page": " = Parrot = \n\n The parrot is a bird , and it is green . \n"}] * 2
        write(folder / "EleutherAI/wikitext_document_level", f"wikitext-2-raw-v1/wikitext-2-raw-v1-{split}.parquet", pages)
    write(folder / "EleutherAI/lambada_openai", f"default/test{numbered}", [{"text": "he gave the dog a bone"}] * 3)
    write(folder / "EleutherAI/lambada_openai", "data/lambada_test_de.jsonl", [{"text": "das ist nicht gefragt"}])
    (folder / "allenai/ai2_arc/.cache/huggingface").mkdir(parents=True)
    (folder / "allenai/ai2_arc/.cache/huggingface/CACHEDIR.TAG").write_text("")
    logiqa = folder / "EleutherAI/logiqa"
    logiqa.mkdir(parents=True)
    record = (
        "\nb\nAll parrots are birds.Polly is a parrot.\nWhat follows?\nA.Polly is green.\nB.Polly is a bird.\nC.No.\nD.None.\n"
    )
    for name in ("Train", "Eval", "Test"):
        (logiqa / f"{name}.txt").write_text(record * 2)


def command(*arguments) -> subprocess.CompletedProcess:
    return python("-m", "nanostack", "evaluate", *arguments)


@pytest.fixture(scope="module")
def place(state, tmp_path_factory, corpus) -> Path:
    """A folder with a checkpoint, its export, and data for the eight tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    os.environ["HF_HOME"] = str(folder / "cache")
    state.cursor.advance(5, CONFIG)
    checkpoint.save(state, folder / "ckpt.pt", None)
    export.save(state, folder / "exported", None, tokenizer=tokenizer.load(corpus))
    fill(folder / "data")
    return folder


@pytest.mark.slow
def test_the_papers_eight_tasks_end_to_end_from_local_files(place, corpus, state):
    local = ("--data", place / "data", "--tasks", "paper", "--json")
    done = command(place / "ckpt.pt", "--tokenizer", corpus, *local)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((place / "ckpt.eval.json").read_text())
    assert set(found["tasks"]) == set(evaluate.PAPER)
    examples = {"lambada_openai": 3, "arc_challenge": 2, "arc_easy": 3, "logiqa": 2}
    examples |= {"piqa": 3, "sciq": 2, "winogrande": 2, "wikitext": 2}
    assert {name: task["n"] for name, task in found["tasks"].items()} == examples
    for name, task in found["tasks"].items():
        assert task["metrics"][evaluate.PAPER[name].metric]["value"] is not None and task["n_shot"] == 0 and task["version"]
    assert found["tasks"]["arc_easy"]["metrics"]["acc"]["stderr"] is not None
    assert 0 <= found["average_accuracy"] <= 100 and found["cursor"]["flops"] == state.cursor.flops > 0
    assert {"lm_eval", "datasets", "torch"} <= set(found["versions"]) and found["device"]
    for name, task in run(place / "exported", *local)["tasks"].items():
        for metric, one in task["metrics"].items():
            assert one["value"] == pytest.approx(found["tasks"][name]["metrics"][metric]["value"], rel=1e-3), (name, metric)


def test_table_stands_beside_the_papers_numbers(place, corpus, capsys):
    run(
        *(place / "ckpt.pt", "--tokenizer", corpus, "--data", place / "data", "--tasks", "sciq,logiqa", "--limit", "1"),
        *("--num_fewshot", "1", "--out", place / "few.json"),
    )
    printed = capsys.readouterr()
    row = next(line for line in printed.out.splitlines() if "LogiQA" in line)
    assert "28.87" in row and "acc_norm" in row and "a trial, not a result" in printed.out
    assert "scoring: 100 %" in printed.err
    saved = json.loads((place / "few.json").read_text())
    assert saved["tasks"]["sciq"]["n_shot"] == 1 and saved["tasks"]["sciq"]["n"] == 1 and saved["average_accuracy"] is None


def test_logiqa_is_parsed_as_its_script_does(place):
    from nanostack.commands.harness import data_from, logiqa

    with data_from(place / "data"):
        found = datasets.load_dataset("EleutherAI/logiqa", "logiqa")
    assert found["test"][0] == {
        "label": "b",
        "context": "All parrots are birds. Polly is a parrot.",
        "question": "What follows?",
        "options": ["Polly is green.", "Polly is a bird.", "No.", "None."],
    }
    assert (
        found["train"].num_rows == 2 and logiqa(place / "data/EleutherAI/logiqa", datasets.load_dataset).keys() == found.keys()
    )


@pytest.mark.slow
def test_mistakes_are_told_in_one_line_and_nothing_is_written(place, corpus, state, tmp_path):
    few = replace(CONFIG, vocab_size=128)
    checkpoint.save(State.create(few, Optim(), Placement(torch.device("cpu")), 0), tmp_path / "few.pt", None)
    checkpoint.save(state, tmp_path / "ckpt.pt", None)
    (tmp_path / "old.json").write_text("{}")
    write(tmp_path / "half/allenai/sciq", "test.jsonl", [{"question": "?"}])
    for split in ("train", "validation", "test"):
        write(tmp_path / "other/allenai/sciq", f"{split}.jsonl", [{"question": "?"}])
    (tmp_path / "cut/allenai/sciq").mkdir(parents=True)
    (tmp_path / "cut/allenai/sciq/test.jsonl").write_text('{"question": "?"')
    ckpt, text, sciq = tmp_path / "ckpt.pt", ("--tokenizer", corpus), ("--tasks", "sciq")
    for arguments, message in (
        ((ckpt,), "nothing to evaluate: give --tasks"),
        ((ckpt, *sciq), "name the prepared folder whose tokenizer"),
        ((ckpt, *text, *sciq, "--data", tmp_path), f"{tmp_path / 'allenai/sciq'} is no folder. Where there is a network"),
        ((ckpt, *text, *sciq, "--data", tmp_path / "none"), "there is no folder"),
        ((ckpt, *text, *sciq, "--data", tmp_path / "half"), "lacks what the task reads: 'train'"),
        ((ckpt, *text, *sciq, "--data", tmp_path / "other"), "lacks what the task reads: 'support' is undefined"),
        ((ckpt, *text, *sciq, "--data", tmp_path / "cut"), "could not be read from"),
        ((ckpt, *text, *sciq), "had from the Hub (without a network: --data)"),
        ((ckpt, *text, *sciq, "--limit", "0"), "limit must be positive"),
        ((ckpt, *text, *sciq, "--num_fewshot", "-1"), "num_fewshot must not be negative"),
        ((ckpt, *text, *sciq, "--out", tmp_path / "old.json"), "exists already"),
        ((ckpt, *text, *sciq, "--out", tmp_path), "is a folder; --out names the file"),
        ((ckpt, *text, *sciq, "--out", tmp_path / "nowhere/a.json"), "there is no folder"),
        ((tmp_path / "none.pt", "--val", corpus), "there is no checkpoint"),
        ((tmp_path / "few.pt", *text, *sciq, "--data", place / "data"), "the model only 128"),
        ((tmp_path / "few.pt", "--val", corpus), "the model only 128"),
        ((ckpt, "--val", tmp_path), "there is no prepared data in"),
    ):
        with pytest.raises(UserError) as error:
            run(*arguments)
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    done = command(ckpt)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing to evaluate") and done.stderr.count("\n") == 1
    kept = {"ckpt.pt", "few.pt", "half", "other", "cut", "old.json"}
    assert {path.name for path in tmp_path.iterdir()} == kept and (tmp_path / "old.json").read_text() == "{}"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_a_line_per_tenth_elsewhere(terminal, monkeypatch, capfd):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))  # which Rich asks for
    with evaluate.progress_bar(20, "validation") as advance:
        for _ in range(20):
            advance()
    said = capfd.readouterr().err
    assert ("validation: 100 %" in said) == (said.count("\n") == 10) == (not terminal), said
    assert ("100%" in said) == terminal


@pytest.mark.slow
def test_task_that_is_not_known_is_named_with_its_like(place, corpus):
    with pytest.raises(UserError, match=r"lm-eval has no task scik\. Perhaps you meant sciq"):
        run(place / "ckpt.pt", "--tokenizer", corpus, "--tasks", "piqa,scik", "--out", place / "scik.json")


def run(*arguments) -> dict:
    """The command in this process."""
    import tyro

    return evaluate.main(tyro.cli(evaluate.Command, args=[str(one) for one in arguments], use_underscores=True))


@pytest.mark.parametrize("module", ["lm_eval", "lm_eval.evaluator"])
def test_extra_that_is_missing_is_named_with_its_install_line(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"tasks need lm_eval.*: pip install 'nanostack\[eval\]'"):
        evaluate.require_extra(None)
