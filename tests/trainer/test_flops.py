"""The FLOPs ledger against the paper's sizes and against torch's own counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanostack.config import load
from nanostack.flops import flops_exact_per_token, flops_per_token, mfu, n_matmul, n_params, peak_by_name
from nanostack.model import Llama, LlamaConfig

CONFIG = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16)
QWEN3 = dataclasses.replace(CONFIG, d_head=12, qk_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count_is_that_of_the_model(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    assert n_params(config) == sum(p.numel() for p in Llama(config).parameters())
    assert flops_per_token(config) == 6 * n_params(config)


@pytest.mark.parametrize(
    ("preset", "total", "non_embedding"),
    [("410m", 0.374, 0.308), ("1b", 1.364, 1.233), ("3b", 2.40, 2.23), ("7b", 5.93, 5.67)],
)
def test_presets_have_the_papers_sizes(preset, total, non_embedding):
    config = load(f"config/{preset}.py", []).model
    deep = dataclasses.replace(config, n_layer=4 * config.n_layer, vocab_size=32000)
    digits = 3 if preset in ("410m", "1b") else 2
    assert round(n_params(deep) / 1e9, digits) == total
    assert round((n_params(deep) - 2 * 32000 * deep.d_model) / 1e9, digits) == non_embedding


@pytest.mark.parametrize("config", [CONFIG, QWEN3], ids=["llama", "qwen3"])
def test_matmul_count_is_what_torch_counts_in_a_step(config):
    tokens = torch.randint(64, (3, 16))
    model = Llama(config)
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, tokens).backward()
    products = ("aten.mm", "aten.addmm", "aten.bmm", "nanostack.linear_cross_entropy_rows")
    matmuls = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in products)
    assert matmuls == 6 * n_matmul(config) * tokens.numel()


@pytest.mark.parametrize(("config", "d_attn"), [(CONFIG, 32), (QWEN3, 48)], ids=["llama", "qwen3"])
def test_exact_count_adds_causal_attention(config, d_attn):
    per_key = 4 * d_attn * 3  # scores and values, forward and twice that backward
    keys = sum(range(1, 17)) / 16
    assert flops_exact_per_token(config) == 6 * n_matmul(config) + config.n_layer * per_key * keys


def test_mfu_is_the_share_of_the_peak():
    flops = 6 * n_matmul(CONFIG) + 12 * CONFIG.n_layer * CONFIG.d_model * CONFIG.seq_len
    assert mfu(CONFIG, 1000.0, 2000.0 * flops) == pytest.approx(0.5)
    assert mfu(CONFIG, 1000.0, None) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_peak_is_that_of_the_device_and_not_of_one_with_a_similar_name(name, tera):
    assert peak_by_name(name) == (tera and tera * 1e12)
