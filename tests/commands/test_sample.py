"""Sampling: the cache changes no logits, a sample is the one it would be alone, and a run does not notice."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, Trainer, assert_same_state, python, records

import train
from kernels import dispatch
from nanostack import checkpoint
from nanostack.commands.sample import Command, Console, main
from nanostack.config import Optim, Sampling, load
from nanostack.errors import UserError
from nanostack.generate import Sample, Writer, continue_rows, draw, encode, probabilities, write
from nanostack.hf import export
from nanostack.model import KVCache, Llama, LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
MHA = LlamaConfig(n_layer=3, n_head=4, n_kv_head=4, d_model=64, d_ff=96, vocab_size=320, seq_len=24)
SHAPES = {"mha": MHA, "gqa": replace(MHA, n_kv_head=2), "tied": replace(MHA, n_kv_head=1, tie_embeddings=True)}
on_every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
SAMPLED = ("--sample.interval", "1500", "--sample.prompt", "def ", "", "--sample.tokens", "40")  # beyond seq_len 32
BYTES = tokenizer.get("bytes")


def model_of(config: LlamaConfig = MHA) -> Llama:
    model = Llama(config, seed=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # away from a fresh model's even probabilities
    return model


def tokens(rows: int, n: int) -> torch.Tensor:
    return torch.randint(256, (rows, n), generator=torch.Generator().manual_seed(3))


def written(model: Llama, prompts: dict[str, list[int]], how: Sampling, cached: bool = True, text=BYTES) -> list[list[int]]:
    """The ids that are added to each prompt with each of its seeds, all made together."""
    samples = [Sample(prompt, encode(prompt, text, model.config.seq_len), s) for prompt in prompts for s in prompts[prompt]]
    for _ in write(model, samples, how, text, cached):
        pass
    return [one.ids[one.n_prompt :] for one in samples]


@pytest.fixture
def all_in_torch(monkeypatch):
    """Every operation runs in torch, as those on a single token do: C, which takes many, has a rounding of its own."""
    monkeypatch.setattr(dispatch, "_backend", "torch")


@on_every_shape
@torch.no_grad()
def test_logits_with_the_cache_are_those_without_at_every_position(config, all_in_torch):
    model, x = model_of(config), tokens(3, config.seq_len)
    whole = model(x)
    for n_prompt in (1, 2, 7, config.seq_len):
        cache = [KVCache(config.seq_len) for _ in model.blocks]
        parts = [model(x[:, :n_prompt], cache=cache)]
        parts += [model(x[:, t : t + 1], cache=cache) for t in range(n_prompt, config.seq_len)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@on_every_shape
@torch.no_grad()
def test_logits_with_the_cache_and_without_are_as_near_to_those_in_fp64_as_torchs(config, monkeypatch):
    """The default backends compute: C for many tokens, torch for a single one."""
    model, x = model_of(config), tokens(3, config.seq_len)
    cache = [KVCache(config.seq_len) for _ in model.blocks]
    ours = [model(x), torch.cat([model(x[:, t : t + 1], cache=cache) for t in range(config.seq_len)], 1)]
    monkeypatch.setattr(dispatch, "_backend", "torch")
    plain, exact = model(x), model.double()(x)
    for logits in ours:
        assert (logits - exact).square().mean() < 1.25**2 * (plain - exact).square().mean()


def test_what_the_cache_cannot_serve_is_refused():
    model, x = model_of(), tokens(1, MHA.seq_len)
    cache = [KVCache(MHA.seq_len) for _ in model.blocks]
    model(x[:, :-1], cache=cache)
    with pytest.raises(ValueError, match="takes one more at a time, not 2"):
        model.blocks[0](torch.zeros(1, 2, 64), model.cos[:2], model.sin[:2], None, cache[0])
    model(x[:, -1:], cache=cache)
    with pytest.raises(ValueError, match="25 tokens are longer than seq_len 24"):
        model(x[:, :1], cache=cache)
    model.end_of_text = 256
    with pytest.raises(ValueError, match="does not keep documents apart"):
        model(x, cache=[KVCache(MHA.seq_len) for _ in model.blocks])


@on_every_shape
def test_window_that_is_full_goes_on_with_its_last_half_with_and_without_the_cache(config, all_in_torch):
    """Beyond seq_len too, every logit is that of the model on the tokens of the window alone."""
    model, n = model_of(config), 3 * config.seq_len
    seen = []
    model.head.register_forward_hook(lambda head, arguments, logits: seen.append(logits[:, -1].clone()))
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    drawn = torch.tensor(list(continue_rows(model, tokens(2, 5), Sampling(tokens=n), 256, generators))).T
    text, cached_logits = torch.cat([tokens(2, 5), drawn], 1), seen[:]
    start, starts = 0, set()
    for i in range(n):
        start += config.seq_len // 2 + 1 if 5 + i - start > config.seq_len else 0
        starts.add(start)
        with torch.no_grad():
            expected = model(text[:, start : 5 + i])[:, -1]
        torch.testing.assert_close(cached_logits[i], expected, rtol=1e-5, atol=1e-5)
    assert starts == {0, 13, 26, 39, 52}
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    again = list(continue_rows(model, tokens(2, 5), Sampling(tokens=n), 256, generators, cached=False))
    assert torch.tensor(again).T.equal(drawn)


@pytest.mark.parametrize("how", [Sampling(tokens=40), Sampling(tokens=40, temperature=1.5, top_k=0, top_p=0.9)])
def test_sample_is_the_same_alone_in_a_batch_and_without_the_cache(how):
    model, prompts = model_of(), {"one": [0, 1, 5], "two": [1], "longer": [0, 2], "": [0]}
    together = written(model, prompts, how)
    assert written(model, prompts, how, cached=False) == together
    alone = [written(model, {prompt: [seed]}, how)[0] for prompt in prompts for seed in prompts[prompt]]
    assert alone == together
    assert len({tuple(ids) for ids in together}) == len(together), "each seed and prompt has a text of its own"


def test_temperature_0_takes_the_likeliest_token_whatever_the_seed():
    model, ids = model_of(), list(b"def ")
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :257].argmax()))
    for how in (Sampling(tokens=20, temperature=0), Sampling(tokens=20, temperature=1e-300), Sampling(tokens=20, top_k=1)):
        assert written(model, {"def ": [0, 7]}, how) == [ids[4:]] * 2


def oracle(logits: list[float], how: Sampling) -> list[float]:
    """Probability of every token, one after another from the likeliest on."""
    weights = torch.tensor(logits, dtype=torch.float64).div(how.temperature).exp().tolist()
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: how.top_k or None]
    kept, total, sofar = [], sum(weights[i] for i in order), 0.0
    for i in order:
        if sofar < how.top_p:
            kept.append(i)
            sofar += weights[i] / total
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=t, top_k=k, top_p=p)
        for t, k, p in ((1, 0, 1), (0.5, 3, 1), (2, 0, 0.6), (1.3, 4, 0.7), (1, 99, 1e-9))
    ],
    ids=str,
)
def test_tokens_come_with_the_probabilities_of_top_k_and_top_p(how):
    logits, n = [0.3, 2.0, -1.0, 1.4, 0.9, -3.0], 4000
    expected = torch.tensor(oracle(logits, how), dtype=torch.float64)
    top_BK, index_BK = torch.tensor([logits]).topk(min(how.top_k or 6, 6))
    found = torch.zeros(6, dtype=torch.float64).scatter(0, index_BK[0], probabilities(top_BK, how)[0])
    torch.testing.assert_close(found / found.sum(), expected, rtol=1e-6, atol=0)
    drawn = draw(torch.tensor([logits] * n), how, [torch.Generator().manual_seed(seed) for seed in range(n)])
    frequency = drawn.bincount(minlength=6) / n
    assert ((frequency - expected).abs() <= 4.5 * (expected * (1 - expected) / n).sqrt()).all(), (frequency, expected)


def test_logits_that_are_not_finite_are_told_and_end_no_run(corpus):
    with pytest.raises(UserError, match="not finite"):
        draw(torch.tensor([[0.0, float("nan")]]), Sampling(), [torch.Generator()])
    config = load(TINY, ["--data.path", str(corpus), "--sample.interval", "256"])
    model = Llama(replace(config.model, vocab_size=384))
    torch.nn.init.constant_(model.norm.weight, float("inf"))
    assert "not finite" in Writer(config)(model)[0]


def test_watchdog_hears_of_each_token_that_a_run_writes(corpus):
    config = load(TINY, ["--data.path", str(corpus), "--sample.interval", "256", "--sample.tokens", "5"])
    heard = []
    Writer(config)(Llama(replace(config.model, vocab_size=384)), lambda: heard.append(1))
    assert len(heard) == 5


@on_every_shape
def test_greedy_text_is_that_of_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    state = State.create(config, Optim(), Placement(torch.device("cpu")), 0)
    export.save(state, tmp_path / "out", None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x, n = tokens(2, 5), config.seq_len - 5
    greedy = {"do_sample": False, "top_k": None, "temperature": None, "attention_mask": torch.ones_like(x)}
    expected = theirs.generate(x, max_new_tokens=n, **greedy)
    how, generators = Sampling(tokens=n, temperature=0), [torch.Generator()] * 2
    ours = list(continue_rows(state.model, x, how, config.vocab_size, generators))
    assert torch.tensor(ours).T.equal(expected[:, 5:])


def test_text_ends_before_end_of_text_and_others_go_on():
    model, how = model_of(), Sampling(tokens=20, temperature=0)
    (first,), (second,) = (written(model, {prompt: [0]}, how) for prompt in ("abc", "xyz"))
    text = tokenizer.get("bytes")
    text.ends = {first[4]}
    stop = [ids.index(first[4]) if first[4] in ids else 20 for ids in (first, second)]
    samples = [Sample(prompt, encode(prompt, text, 24), 0) for prompt in ("abc", "xyz")]
    rounds = sum(1 for _ in write(model, samples, how, text))
    assert [one.ids[3:] for one in samples] == [first[: stop[0]], second[: stop[1]]] and stop[0] <= 4 < stop[1]
    assert [one.end for one in samples] == ["end_of_text", "length" if stop[1] == 20 else "end_of_text"]
    assert rounds == min(20, max(stop) + 1)


def test_console_shows_whole_characters_only_and_one_sample_after_another(capsys):
    said = "é☃ 🙂x"
    samples = [Sample("p", list(b"p"), 0), Sample("q", list(b"q"), 1)]
    console = Console(samples, BYTES)
    shown = []
    for byte in said.encode():
        samples[0].ids.append(byte)
        samples[1].ids.append(ord("y"))
        console.show()
        shown.append(capsys.readouterr().out)
    assert shown == ["--- sample 1 of 2, seed 0\np", "é", "", "", "☃", " ", "", "", "", "🙂", "x"]
    samples[0].ids.append("é".encode()[0])  # cut within a character
    samples[0].end = samples[1].end = "length"
    console.show()
    assert capsys.readouterr().out == f"\n--- sample 2 of 2, seed 1\nq{'y' * 11}\n"


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> "os.PathLike":
    """A folder with `run`, a run with samples; `data/other`, which it was not trained on; `data/mine`, which it was."""
    folder = tmp_path_factory.mktemp("sample")
    Trainer(corpus, folder).good("run", *SAMPLED)
    shutil.copytree(corpus, folder / "data/mine")
    shutil.copytree(corpus, folder / "data/other")
    manifest = json.loads((corpus / "manifest.json").read_text())
    other = manifest["tokenizer"] | tokenizer.get("bytes").save(folder / "data/other")
    (folder / "data/other/manifest.json").write_text(json.dumps(manifest | {"tokenizer": other}))
    (folder / "data/torn").mkdir()
    (folder / "data/torn/manifest.json").write_text("{")
    return folder


def test_run_with_samples_is_the_run_without_bit_for_bit(run, trainer):
    plain, sampled = records(trainer.good("plain")), records(run / "run")
    texts = [(record["tokens"], record.pop("texts")) for record in sampled if "texts" in record]
    assert sampled == plain
    assert [tokens for tokens, _ in texts] == [1536, 3072, 4608, 6144]
    assert all(len(pair) == 2 and pair[0].startswith("def ") and pair[1] != "" for _, pair in texts)
    assert len({pair[0] for _, pair in texts}) > 1, "the model learns"
    one, two = (checkpoint.load(folder / "ckpt.pt") for folder in (trainer.folder / "plain", run / "run"))
    assert_same_state(one, two)
    heads = [(folder / "metrics.jsonl").read_text().splitlines()[0] for folder in (trainer.folder / "plain", run / "run")]
    assert heads[0] == heads[1]


def test_last_sample_of_a_run_is_what_its_checkpoint_writes(run, monkeypatch):
    """The prepared folder is named (--data), or found by its manifest."""
    monkeypatch.chdir(run)
    texts = next(record["texts"] for record in reversed(records(run / "run")) if "texts" in record)
    made = main(Command(run / "run/ckpt.pt", prompt=("def ", ""), tokens=40, json=True))["samples"]
    assert [one["text"] for one in made] == texts
    again = main(Command(run / "run/ckpt.pt", data=run / "data/mine", prompt=("def ", ""), tokens=40, n=2, json=True))[
        "samples"
    ]
    assert [again[0], again[2]] == made and [one["seed"] for one in again] == [0, 1, 0, 1]


def test_hugging_face_folder_writes_what_its_checkpoint_does(run, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(run)
    saved = checkpoint.load(run / "run/ckpt.pt")
    state = State.restore(saved, Optim(), Placement(torch.device("cpu")))
    export.save(state, tmp_path / "with", saved["manifest_sha256"], tokenizer=tokenizer.load(run / "data/mine"))
    export.save(state, tmp_path / "without", saved["manifest_sha256"])
    of_checkpoint, *of_folders = (
        main(Command(path, prompt=("x = é", ""), tokens=20, json=True))
        for path in (run / "run/ckpt.pt", tmp_path / "with", tmp_path / "without")
    )
    assert of_folders == [of_checkpoint] * 2


def mistakes(run) -> list[tuple[dict, str]]:
    (run / "latin1").write_bytes("é".encode("latin1"))
    return [
        ({"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"n": 0}, "n must be at least 1"),
        ({"prompt": ()}, "there must be a prompt"),
        ({"prompt": ("def " * 99,)}, "tokens, the model's context 32"),
        ({"prompt": ("\udcff",)}, "not valid UTF-8"),
        ({"prompt_file": run / "nowhere"}, "cannot read .*nowhere: No such file"),
        ({"prompt_file": run / "latin1"}, "latin1 is not UTF-8"),
        ({"checkpoint": run / "nowhere.pt"}, "there is no checkpoint .*nowhere.pt"),
        ({"checkpoint": run / "run"}, "is no Hugging Face folder"),
        ({"data": run / "nowhere"}, "there is no prepared data"),
        ({"data": run / "data/other"}, "other has the tokenizer bytes .*, the model was trained with bpe:300"),
        ({"data": None}, "data/ does not have what .*ckpt.pt was trained on"),
    ]


def test_every_mistake_is_told_in_one_line(run, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for change, message in mistakes(run):
        with pytest.raises(UserError, match=message) as told:
            main(Command(**{"checkpoint": run / "run/ckpt.pt", "data": run / "data/mine"} | change))
        assert "\n" not in str(told.value)
    assert capsys.readouterr().out == ""


def test_tokenizer_larger_than_the_model_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run)
    state = State.create(replace(MHA, vocab_size=256), Optim(), Placement(torch.device("cpu")), 0)
    checkpoint.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="other has 257 entries, the model only 256"):
        main(Command(tmp_path / "ckpt.pt", data=run / "data/other"))


def test_command_line_streams_and_prints_json_and_ends_with_2(run):
    def command(*arguments, **options):
        return python("-m", "nanostack", "sample", "run/ckpt.pt", *arguments, cwd=run, **options)

    streamed = command("--prompt_file", "-", "--tokens", "8", input="x = é")
    answer = command("--prompt", "x = é", "--tokens", "8", "--json")
    made = json.loads(answer.stdout)["samples"]
    assert streamed.stdout == made[0]["text"] + "\n" and made[0]["tokens"] == 8 and made[0]["end"] == "length"
    refused = command("--top_p", "2")
    assert refused.returncode == 2 and refused.stderr == "error: top_p must be above 0 and at most 1, not 2\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sample.interval", "0"), "sample.interval must be at least 1"),
        (("--sample.top_p", "2"), "sample.top_p must be above 0"),
        (("--sample.prompt",), "sample.prompt needs at least one text"),
        (("--sample.interval", "256", "--sample.prompt", "def " * 99), "tokens, the model's context 32"),
    ],
)
def test_samples_that_a_run_cannot_make_are_refused_before_it_starts(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train.Run(load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / "run"), *options]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [("--data.document_mask",), ("--dtype", "bfloat16")], ids=["documents", "bfloat16"])
def test_other_runs_do_not_notice_either(corpus, tmp_path, options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, more in (("plain", ()), ("sampled", SAMPLED)):
        train.Run(load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / name), *options, *more])).train()
    sampled = records(tmp_path / "sampled")
    assert sum(record.pop("texts", None) is not None for record in sampled) == 4
    assert sampled == records(tmp_path / "plain")


@pytest.mark.slow
def test_compiled_run_does_not_notice_and_compiles_nothing_for_it(corpus, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    graphs, one_layer = [], ("--model.n_layer", "1")
    for name, more in (("plain", ()), ("sampled", SAMPLED)):
        torch._dynamo.reset()
        counters.clear()
        train.Run(
            load(TINY, ["--data.path", str(corpus), "--out", str(tmp_path / name), "--compile", *one_layer, *more])
        ).train()
        graphs.append(counters["stats"]["unique_graphs"])
    sampled = records(tmp_path / "sampled")
    assert sum(record.pop("texts", None) is not None for record in sampled) == 4
    assert sampled == records(tmp_path / "plain") and graphs[0] == graphs[1] > 0


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_write_what_one_does_and_train_as_if_they_did_not(run, trainer):
    plain = records(trainer.good("plain", processes=2))
    sampled = records(trainer.good("sampled", *SAMPLED, processes=2))
    texts = [record.pop("texts") for record in sampled if "texts" in record]
    assert sampled == plain
    assert texts == [record["texts"] for record in records(run / "run") if "texts" in record]
