"""The benchmarks themselves, at sizes of seconds: that they run, what they refuse, that a part's failure stays its own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, python, take_weights

from bench import anchors, timeline
from bench.ids import fed
from bench.throughput import timed
from nanostack.config import Optim, load
from nanostack.flops import n_matrices, n_params, newton_schulz_flops
from nanostack.text.dataset import Tokens, verify
from nanostack.text.manifest import load_manifest

GPU = torch.cuda.is_available()
MUON = Optim("muon")


def bench(name, *arguments):
    if GPU:  # which forks do not see
        command = [sys.executable, f"bench/{name}.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return python(f"bench/{name}.py", *arguments)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="in seconds on a CPU only")
def test_throughput_times_every_way_on_the_same_batches_with_no_text_prepared(tmp_path):
    options = ("--rounds", 1, "--steps", 3, "--warmup", 1, "--out", tmp_path / "found.json", "--json")
    done = bench("throughput", TINY, "--against", "eager,hf", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "found.json").read_text()) and (tmp_path / "found.png").stat().st_size > 5000
    assert list(found["ways"]) == ["nanostack", "eager", "hf"] and "MFU = " in done.stderr
    for name, way in found["ways"].items():
        assert [len(one["seconds"]) for one in way["rounds"]] == [3] and way["peak_bytes"] > 2**26
        assert 0.5 < way["first_step_cold"] < 60 and way["ms"] > 0
        assert way["tokens_per_s"] == pytest.approx(found["batch_tokens"] / way["ms"] * 1e3)
        if name == "nanostack":
            assert way["ours_over"] is way["ours_over_by_round"] is None
        else:
            assert way["ours_over_by_round"] == [way["ours_over"]]
            assert way["ours_over"] == pytest.approx(way["ms"] / found["ways"]["nanostack"]["ms"])
    largest = load(TINY, []).shapes()[-1]
    assert largest.n_layer == 4 and found["n_params"] == n_params(replace(largest, vocab_size=32000)) and found["random_ids"]


def test_peers_compute_the_model_that_is_timed():
    """The same weights give the same loss, ours, in plain torch and in transformers; so the same is timed."""
    from bench.peers import HuggingFaceLlama, PlainLlama
    from nanostack.model import Llama, LlamaConfig

    config = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96, vocab_size=128, seq_len=32)
    ours, plain, theirs = Llama(config), PlainLlama(config), HuggingFaceLlama(config, liger=False)
    take_weights(plain, ours)
    for mine, other in zip(ours.blocks, theirs.model.model.layers, strict=True):
        q, k, v = mine.attn.qkv.weight.split([64, 32, 32])
        gate, up = mine.mlp.gate_up.weight.chunk(2)
        named = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": mine.attn.out.weight}
        named |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": mine.mlp.down.weight}
        named |= {"input_layernorm": mine.attn_norm.weight, "post_attention_layernorm": mine.mlp_norm.weight}
        other.load_state_dict({f"{name}.weight": value for name, value in named.items()})
    ends = (theirs.model.model.embed_tokens, theirs.model.model.norm, theirs.model.lm_head)
    for a, b in zip((ours.embed, ours.norm, ours.head), ends, strict=True):
        b.load_state_dict({"weight": a.weight})
    tokens = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = [float(model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).detach()) for model in (ours, plain, theirs)]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_throughput_times_a_few_micro_batches_of_a_large_step():
    with timed(load(str(ROOT / "config/1b.py"), []), (), steps=7, accumulate=2) as config:
        assert config.batch_tokens == 2 * 16 * 2048 and config.stages[0].tokens == 7 * config.batch_tokens
        assert config.model.n_layer == 24 and config.model.vocab_size == 32000, "the grown model, with the paper's vocabulary"
        verify(config.data.path)
        ids = Tokens(config.data.path, "train", config.model.seq_len)
        assert ids.n_blocks == 7 * 2 * 16, "each is read once"
    assert not Path(config.data.path).exists()


def test_ids_of_its_own_are_as_frequent_as_words_and_the_text_that_is_named_is_taken(corpus, tmp_path):
    config = load(str(ROOT / "config/quickstart.py"), [])
    with fed(config, (), 4096, 25) as found:
        ids = Tokens(found.data.path, "train", 256).batch(0, 400)
        manifest = load_manifest(found.data.path)
    assert manifest["tokenizer"]["n_vocab"] == 512, "what data/packages512 has"
    counts = np.bincount(ids.ravel(), minlength=512) / ids.size
    for rank in (1, 10):
        assert counts[rank - 1] == pytest.approx(np.log1p(1 / rank) / np.log(512), rel=0.1)
    assert counts[manifest["tokenizer"]["eot"]] == pytest.approx(1 / 500, rel=0.3)
    for words in (["--data.path", str(corpus)], [f"--data.path={corpus}"]):
        config = load(TINY, words)
        with fed(config, words, 4096, 25) as found:
            assert found is config


def test_anchor_of_50m_is_what_autoresearch_counts_and_stands_beside_its_config_only():
    """29.4M parameters count, windows of 1024 in six layers and 2048 in two: 39.8 % of 989.5 TFLOP/s is the published MFU."""
    (anchor,) = anchors.ANCHORS["50m"]
    flops = 6 * (8 * 12 * 512**2 + 8192 * 512 + 4 * 32 * 4) + 12 * 512 * (6 * 1024 + 2 * 2048)
    assert flops * anchor.tokens_per_s / anchor.peak == pytest.approx(anchor.mfu, abs=1e-3)
    path = str(ROOT / "config/50m.py")
    model = load(path, []).model
    assert (model.n_layer, model.d_model, model.head_dim, model.vocab_size, model.seq_len) == (8, 512, 128, 8192, 2048)
    (found,) = anchors.beside(path, (), model, {"nanostack": 1e6})
    ours = 6 * (8 * (4 * 512**2 + 3 * 512 * 1408) + 8192 * 512) + 12 * 8 * 512 * 2048
    assert found["ours"] == {"nanostack": pytest.approx(ours * 1e6 / 989.5e12)} and f"{ours / 1e6:.0f}" in found["differences"]
    (said,) = anchors.sentences([found], on_gpu=True)
    assert "not measured here: 1,645,7" in said and f"nanostack {100 * ours * 1e6 / 989.5e12:.1f} %" in said
    assert anchors.beside(path, ("--model.seq_len", "1024"), model, {}) == anchors.beside("config/3b.py", (), model, {}) == []
    (other,) = anchors.beside("config/1b.py", (), model, {})
    assert other["name"] == "OLMo-core" and other["mfu"] == 0.52


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("throughput", ("--against", "jax"), "--against takes eager, compile, hf, litgpt, nanogpt, adamw, not jax"),
        (
            "throughput",
            ("--against", "nanogpt"),
            "--against nanogpt needs a clone of github.com/karpathy/nanoGPT: --nanogpt FOLDER",
        ),
        ("throughput", ("--rounds", "0"), "must be at least 1"),
        ("throughput", ("config/none.py",), "there is no config file config/none.py"),
        ("throughput", (TINY, "--data.pth", "x"), "--data.pth"),
        ("throughput", (TINY, "--data.path", "nowhere"), "nowhere"),
        ("throughput", (TINY, "--out", "tests"), "--out is the name of a .json file, not tests"),
        ("throughput", (TINY, "--out", "/proc/a.json"), "nothing can be written in /proc"),
        ("throughput", ("config/7b.py",), "the others keep all activations"),
        ("timeline", ("--estimate", "--dtype", "float32"), "the estimate is of bfloat16"),
        ("dataloader", ("--rounds", "0"), "rounds must be at least 1"),
        ("dataloader", ("--data", "nowhere"), "nowhere"),
        ("options", ("--only", "fun"), "there is no option fun; there are torch, plain"),
        (
            "tuning",
            ("--kernel", "attention"),
            "there is no kernel attention; there are attention_forward" if GPU else "nothing to",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(name, arguments, message, corpus):
    done = bench(name, *(argument.format(data=corpus) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr.splitlines()[0] and "Traceback" not in done.stderr, done.stderr


def test_estimate_has_newton_schulz_as_its_flops_and_bytes_say_whatever_the_batch():
    model = replace(load("config/1b.py", []).shapes()[-1], vocab_size=32000)
    adamw, muon, many = (timeline.estimated(model, 32768, n, optim) for n, optim in ((1, Optim()), (1, MUON), (64, MUON)))
    seconds = newton_schulz_flops(model) / (timeline.H200.flops * timeline.H200.products)
    seconds += 30 * n_matrices(model) / (timeline.H200.bytes * timeline.H200.bandwidth)
    assert muon["Newton–Schulz"] == many["Newton–Schulz"] == pytest.approx(1e3 * seconds)
    assert {name for name in muon if muon[name] != adamw.get(name)} == {"Newton–Schulz"}, (
        "the state saves what the update costs"
    )


@pytest.mark.slow
def test_dataloader_pins_one_core_and_compares_on_the_same_text(corpus, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i}: the quick brown fox jumps over the lazy dog\n" * 400)
    options = ("--data", corpus, "--text", tmp_path / "text", "--rounds", 1, "--out", tmp_path / "f.json", "--json")
    done = bench("dataloader", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loader"]["tokens_per_s"] > 20 * 60_000 and found["text"]["bytes"] > 700_000
    assert len(found["encode"]) == 3 and all(way["mb_per_s"] > 0.1 for way in found["encode"].values())
    assert found["versions"].keys() >= {"torch", "tiktoken"}
