"""Evaluation against lm-eval's own model of the same folder: every kind of request, and what that model fails on is refused."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["DISABLE_MULTIPROC"] = "1"
pytest.importorskip("lm_eval")
import datasets
import safetensors.torch
from hflm import BOS, EOS, TURN, byte_level, hflm, llama
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from test_evaluate import fill

from nanostack import checkpoint, models
from nanostack.commands import import_hf, lm_tasks, sample
from nanostack.commands.harness import HubTokenizer, LiveModel
from nanostack.commands.lm_tasks import live_model
from nanostack.errors import UserError
from nanostack.parallel import Placement
from nanostack.text import corpus, tokenizer
from nanostack.text.bounds import Bounds

SEQ_LEN = 96
QUESTIONS = [("what is the cat on?", "the mat"), ("what does f return?", "x + 1"), ("naïve ☃?", "日本"), ("two", " plus  two ")]
LONG = "Question: what is the cat on? Answer: the mat. " * 12  # several contexts long


def requests(kind: str, *arguments, task: str | None = None) -> list[Instance]:
    return [Instance(kind, {}, one, number, (task, number, 1)) for number, one in enumerate(arguments)]


def live(source: Path, text=None) -> LiveModel:
    """What `nanostack evaluate` makes of a checkpoint or a folder."""
    saved = models.read(source)
    text = text or HubTokenizer(source, saved["bounds"]["ends"])
    if isinstance(text, tokenizer.Tokenizer):
        text.follow(Bounds(**saved["bounds"]))
    model = models.restore(saved, Placement(torch.device("cpu"))).model
    return live_model(model, text, source, 3, lambda batches, label: batches)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that writes TURN after "Q: go\\nA:" in the fourth place, though it ends no text."""
    place = llama(tmp_path_factory.mktemp("lm_eval") / "model", byte_level(), SEQ_LEN)
    turn, theirs = byte_level().token_to_id(TURN), hflm(place)
    ids = torch.tensor([theirs.tok_encode("Q: go\nA:")])
    fourth = theirs.model.generate(ids, max_new_tokens=4, do_sample=False)[0, -1].item()
    weights = safetensors.torch.load_file(place / "model.safetensors")
    weights["lm_head.weight"][turn] = 1.05 * weights["lm_head.weight"][fourth]
    safetensors.torch.save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture(scope="module")
def theirs(folder):
    return hflm(folder)


def local_tasks(place: Path, stop: str) -> dict[str, dict]:
    """Tasks of all kinds on four small documents; `stop` is what the model writes for the first."""
    docs = [{"question": q, "answer": a, "wrong": ["no", "日"], "long": LONG[: 150 * i]} for i, (q, a) in enumerate(QUESTIONS)]
    (place / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    asked, exact = "Question: {{question}}\nAnswer:", [{"metric": "exact_match", "aggregation": "mean"}]
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{[answer] + wrong}}", "doc_to_target": 0}
    accuracies = [{"metric": name} for name in ("acc", "acc_norm")]
    logs = {"output_type": "loglikelihood", "doc_to_target": " {{answer}}", "metric_list": [{"metric": "perplexity"}]}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "metric_list": [{"metric": "word_perplexity"}]}

    def generates(**how) -> dict:
        return {"output_type": "generate_until", "doc_to_text": asked, "generation_kwargs": how, "metric_list": exact}

    return {
        "choices": choice | {"doc_to_text": asked, "metric_list": accuracies},
        "choices_after_nothing": choice | {"doc_to_text": "", "metric_list": accuracies},
        "choices_after_examples": choice | {"doc_to_text": asked, "metric_list": accuracies, "num_fewshot": 2},
        "choices_beyond_context": choice | {"doc_to_text": "{{long}}Answer:", "metric_list": accuracies},
        "logs": logs | {"doc_to_text": asked},
        "logs_after_spaces": logs | {"doc_to_text": f"{asked}   "},
        "rolling": rolling | {"doc_to_target": "{{question}} {{answer}}"},
        "rolling_in_windows": rolling | {"doc_to_target": "{{long}}{{answer}}"},
        "texts": generates(until=["\n", stop], max_gen_toks=24, do_sample=False),
        "texts_by_other_names": generates(until="?", max_new_tokens=9, temperature=0.7, do_sample=False),
        "texts_to_the_end": generates(max_tokens=20, top_p=0.9, temperature=0.0) | {"num_fewshot": 1},
        "texts_beyond_context": generates(until=[], max_completion_tokens=40) | {"doc_to_text": "{{long}}Answer:"},
        "texts_to_a_special_token": generates(until=[TURN], max_gen_toks=12) | {"doc_to_text": "Q: go\nA:"},
    }


def loaded(place: Path, stop: str) -> list:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "docs.json")}}, "test_split": "test"}
    data |= {"fewshot_split": "test", "doc_to_target": "{{answer}}"}
    tasks = local_tasks(place, stop)
    for name, task in tasks.items():
        (place / f"{name}.yaml").write_text(json.dumps({"task": name} | data | task))
    found = TaskManager(include_path=str(place), include_defaults=False).load(list(tasks))
    return list(found["tasks"].values())


def answers(model, place: Path, stop: str) -> dict:
    tasks = loaded(place, stop) + lm_tasks.load_tasks(list(lm_tasks.PAPER), place / "data")
    return simple_evaluate(model, tasks=tasks, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))


def test_all_kinds_of_requests_are_answered_as_lm_evals_own_model_answers(folder, theirs, tmp_path, monkeypatch):
    """Log-likelihoods to 1e-3, generated texts and counts exactly, and with them every metric; the paper's tasks too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "data")
    first = f"Question: {QUESTIONS[0][0]}\nAnswer:"
    stop = theirs.generate_until(requests("generate_until", (first, {"until": [], "max_gen_toks": 12})))[0][5:7]
    ours, wanted = answers(live(folder), tmp_path, stop), answers(theirs, tmp_path, stop)
    assert set(ours["samples"]) == {*local_tasks(tmp_path, stop), *lm_tasks.PAPER} and ours["n-samples"] == wanted["n-samples"]
    texts = set()
    for name, samples in wanted["samples"].items():
        for mine, other in zip(ours["samples"][name], samples, strict=True):
            assert mine["doc_id"] == other["doc_id"] and mine["arguments"] == other["arguments"]
            for (mine_one,), (other_one,) in zip(mine["resps"], other["resps"], strict=True):
                if name.startswith("texts"):
                    assert mine_one == other_one, name
                    texts.add(other_one)
                else:
                    number, number_of_theirs = (one[0] if isinstance(one, tuple) else one for one in (mine_one, other_one))
                    assert number == pytest.approx(number_of_theirs, abs=1e-3), name
                    assert isinstance(mine_one, float) or mine_one[1] == other_one[1]
        for metric, value in wanted["results"][name].items():
            assert ours["results"][name][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert len(texts) > 8, "texts of many kinds"
    (special,) = {one["resps"][0][0] for one in wanted["samples"]["texts_to_a_special_token"]}
    free = {"until": [], "max_gen_toks": 12}
    (whole,) = live(folder).generate_until(requests("generate_until", ("Q: go\nA:", free)))
    assert whole.startswith(special) and len(whole) > len(special), "the stop is what ended it"


def test_request_that_lm_evals_own_model_cannot_answer_is_refused_with_the_name_of_its_task(folder, tmp_path):
    bare = llama(tmp_path / "bare", byte_level(begins=False), 64)
    model, with_start = live(bare), live(folder)
    others = [("hello there", " world"), ("abc", "d")]
    for asked, why in (
        (("  ", "xy"), "the context is encoded to no token"),
        (("abc", ""), "nothing is left of the continuation"),
        (("", ""), "there is no token to score"),
        (("a", LONG), r"the continuation has \d+ tokens, the model's context 64"),
    ):
        with pytest.raises(UserError, match=rf"the task quiz cannot be evaluated as lm-eval does: .*{why}"):
            model.loglikelihood(requests("loglikelihood", others[0], asked, others[1], task="quiz"))
    for context, how, why in (
        ("Q", {"max_gen_toks": 64}, "64 tokens are to be generated, and the model's context is 64: nothing of the prompt"),
        ("Q", {}, "256 tokens are to be generated"),
        ("", {"max_gen_toks": 5}, "the prompt is encoded to no token"),
        ("Q", {"max_gen_toks": 0}, "prompt and text are to have 1 tokens, the prompt 1"),
        ("Q", {"max_length": 99, "max_gen_toks": 5}, "prompt and text are to have 99 tokens"),
        ("Q", {"max_gen_toks": 5, "temperature": 0.5}, "with do_sample"),
        ("Q", {"max_gen_toks": 5, "num_beams": 4}, "with num_beams 4 another text would come"),
        ("Q", {"max_gen_toks": 5, "repetition_penalty": 1.3}, "with repetition_penalty 1.3"),
        ("Q", {"max_gen_toks": 5, "beams": 1}, "with beams 1"),
    ):
        with pytest.raises(UserError, match=rf"the task quiz cannot be evaluated as lm-eval does: .*{why}"):
            model.generate_until(requests("generate_until", (context, {"until": []} | how), task="quiz"))
    assert with_start.loglikelihood(requests("loglikelihood", ("  ", "xy")))[0][0] < 0, "behind BOS, as lm-eval has it"
    (bare / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "num_beams": 1, "temperature": 0.6}')
    with pytest.raises(UserError, match=r"with no_repeat_ngram_size 3 in generation_config\.json another text"):
        live(bare).generate_until(requests("generate_until", ("Q", {"until": [], "max_gen_toks": 5})))


def test_ends_that_a_request_names_go_before_those_of_the_model(folder, theirs, tmp_path):
    ids = theirs.tok_encode("the cat sat")
    free = theirs.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    config, place = json.loads((folder / "config.json").read_text()), tmp_path / "model"
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [config["eos_token_id"], free[6]]}))
    ours, judge, lengths = live(place), hflm(place), set()
    for ends in (free[3], [free[5], 9], [free[9]], None):
        asked = requests("generate_until", ("the cat sat", {"until": [], "max_gen_toks": 12, "eos_token_id": ends}))
        assert ours.generate_until(asked) == judge.generate_until(asked), ends
        lengths.add(len(ours.generate_until(asked)[0]))
    assert len(lengths) == 4, "each ends elsewhere"
    for how, why in (
        *(({"eos_token_id": odd}, f"its eos_token_id is {odd!r}, neither an id") for odd in ([], -1, True, "a", [[3]])),
        ({"pad_token_id": 0}, "lm-eval's Hugging Face model says pad_token_id itself"),
        ({"use_cache": True}, "lm-eval's Hugging Face model says use_cache itself"),
    ):
        with pytest.raises(UserError, match=re.escape(why)):
            ours.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 4} | how), task="quiz"))


def answers_to_some(model: LiveModel) -> list:
    pairs = [("Question: what?\nAnswer:", " a parrot"), ("", " none"), ("trailing  ", "x"), (f"{BOS}begins", " itself")]
    texts = [("the cat",), (LONG,), (f"{TURN} special",), ("",)]
    stops = {"until": ["\n"], "max_gen_toks": 12}
    found = [value for value, _ in model.loglikelihood(requests("loglikelihood", *pairs))]
    found += model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    return found, model.generate_until(requests("generate_until", ("the cat", stops), (LONG, stops)))


def prepared(place: Path, name: str, **options) -> Path:
    (place / "texts").mkdir(exist_ok=True)
    for i in range(6):
        (place / f"texts/{i}.txt").write_text(f"the cat sat on mat {i}\n" * 20)
    how = corpus.CorpusConfig([str(place / "texts")], place / "data", tokenizer=name, val_fraction=0.3, workers=1, **options)
    corpus.prepare(how)
    return place / "data"


def test_folder_and_its_import_give_one_number(folder, theirs, tmp_path):
    """Also with text prepared before manifests said what stands before it, and with checkpoints of that time."""
    import_hf.main(import_hf.Command(str(folder), tmp_path / "ckpt.pt"))
    data = prepared(tmp_path, str(folder))
    numbers, texts = answers_to_some(live(folder))
    wanted, texts_of_theirs = answers_to_some(theirs)
    assert numbers == pytest.approx(wanted, abs=1e-3) and texts == texts_of_theirs
    old = json.loads((data / "manifest.json").read_text())
    assert old["tokenizer"].pop("start") == [byte_level().token_to_id(BOS)]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    (tmp_path / "old/manifest.json").write_text(json.dumps(old))
    saved = checkpoint.load(tmp_path / "ckpt.pt")
    del saved["bounds"], saved["hashes"]
    checkpoint.write(saved | {"hashes": checkpoint._hashes(saved)}, tmp_path / "old.pt")
    for source, text in (("ckpt.pt", data), ("ckpt.pt", tmp_path / "old"), ("old.pt", tmp_path / "old")):
        found, texts_of_import = answers_to_some(live(tmp_path / source, tokenizer.load(text)))
        assert found == pytest.approx(numbers, abs=1e-4) and texts_of_import == texts, (source, text)


def test_every_end_of_config_generation_config_and_tokenizer_ends_a_text(folder, theirs, tmp_path):
    """Of a folder, and of its import; transformers' generate stops there too."""
    ids = theirs.tok_encode("the cat sat")
    free = theirs.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    place = tmp_path / "model"
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    config, eos = json.loads((folder / "config.json").read_text()), byte_level().token_to_id(EOS)
    stops = {5: {"generation_config.json": [eos, free[5]]}, 7: {"config.json": [free[7], eos], "generation_config.json": eos}}
    for number, files in stops.items():
        assert free[number] not in free[:number]
        for name, ends in files.items():
            (place / name).write_text(json.dumps((config if name == "config.json" else {}) | {"eos_token_id": ends}))
        how = {"prompt": ("the cat sat",), "tokens": 20, "temperature": 0, "json": True}
        (one,) = sample.main(sample.Command(place, **how))["samples"]
        assert (one["tokens"], one["end"]) == (number, "end_of_text")
        stop = {"until": [], "max_gen_toks": 20}
        asked = requests("generate_until", ("the cat sat", stop))
        assert live(place).generate_until(asked) == [theirs.tok_decode(free[: number + 1])]
        if number == 5:
            assert hflm(place).generate_until(asked) == [theirs.tok_decode(free[: number + 1])]
    import_hf.main(import_hf.Command(str(place), tmp_path / "ckpt.pt"))
    data = prepared(tmp_path, str(place))
    assert sample.main(sample.Command(tmp_path / "ckpt.pt", data=data, **how))["samples"] == [one]


@pytest.mark.parametrize(
    ("said", "module", "needed"),
    [
        ("No module named 'antlr4.x'", "antlr4.x", "needs antlr4.x: pip install 'antlr4-python3-runtime"),
        ("No module named 'rouge_score'", "rouge_score", "needs rouge_score: pip install 'rouge-score"),
        ("No module named 'cv2'", "cv2", "needs cv2: pip install opencv-python"),
        ("`sympy` is required.\n  pip install lm-eval[math]", None, "says: `sympy` is required. pip install lm-eval[math]"),
    ],
)
def test_package_that_a_task_lacks_is_named_as_it_is_installed(said, module, needed):
    assert lm_tasks.needed(ModuleNotFoundError(said, name=module)).startswith(needed)
