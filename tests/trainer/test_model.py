"""The Llama against its formulas, and its initial values."""

import math
from dataclasses import replace

import pytest
import torch

from nanostack.model import Llama, LlamaConfig, document_starts

CONFIG = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16)


def naive_logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """The Llama written out position by position in float64, from its published description."""
    c = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    w["head.weight"] = w.get("head.weight", w["embed.weight"])

    def norm(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain

    def rotate(x, position):
        half = c.head_dim // 2
        angle = torch.tensor([position * c.rope_theta ** (-2 * i / c.head_dim) for i in range(half)], dtype=torch.float64)
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    out = []
    for sequence in tokens:
        x = w["embed.weight"][sequence]
        for i in range(c.n_layer):
            b = f"blocks.{i}."
            y = norm(x, w[b + "attn_norm.weight"]) @ w[b + "attn.qkv.weight"].T
            q, k, v = y.split([c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim], dim=-1)
            heads = []
            for h in range(c.n_head):
                g = h // (c.n_head // c.n_kv_head)
                rows = []
                part_q, part_k = (z.unflatten(-1, (-1, c.head_dim)) for z in (q, k))
                keys = torch.stack([rotate(part_k[t, g], t) for t in range(len(sequence))])
                values = v.unflatten(-1, (-1, c.head_dim))[:, g]
                for t in range(len(sequence)):
                    scores = keys[: t + 1] @ rotate(part_q[t, h], t) / math.sqrt(c.head_dim)
                    rows.append(scores.softmax(0) @ values[: t + 1])
                heads.append(torch.stack(rows))
            x = x + torch.cat(heads, -1) @ w[b + "attn.out.weight"].T
            gate, up = (norm(x, w[b + "mlp_norm.weight"]) @ w[b + "mlp.gate_up.weight"].T).chunk(2, -1)
            x = x + (gate * gate.sigmoid() * up) @ w[b + "mlp.down.weight"].T
        out.append(norm(x, w["norm.weight"]) @ w["head.weight"].T)
    return torch.stack(out)


def tokens(n: int = 16, rows: int = 2) -> torch.Tensor:
    return torch.randint(64, (rows, n), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "change", [{}, {"n_kv_head": 4}, {"n_kv_head": 1}, {"tie_embeddings": True}, {"rope_theta": 500.0, "norm_eps": 1e-2}]
)
def test_logits_and_loss_are_those_of_the_formulas(change):
    model = Llama(replace(CONFIG, **change), seed=7)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # away from the near-identity of a fresh model, norms included
    x, y = tokens(), tokens().roll(-1, 1)
    expected = naive_logits(model, x)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten())
    assert float(model(x, y)) == pytest.approx(float(loss), rel=1e-5)


def test_no_token_sees_a_later_one():
    model, x = Llama(CONFIG), tokens()
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9:], b[:, 9:])


def test_documents_do_not_see_each_other():
    """With end_of_text set, every document gives the logits that it gives alone: rotary positions matter by distance only."""
    model, tokens = Llama(CONFIG), torch.randint(1, 64, (3, 16))
    model.end_of_text = 0
    tokens[0, [4, 5, 15]] = tokens[1, 0] = 0
    assert document_starts(tokens, 0).tolist() == [0, 5, 6, 16, 17, 32, *[48] * 43]
    logits = model(tokens)
    model.end_of_text = None
    for row, start, end in ((0, 0, 5), (0, 5, 6), (0, 6, 16), (1, 0, 1), (1, 1, 16), (2, 0, 16)):
        torch.testing.assert_close(logits[row, start:end], model(tokens[row : row + 1, start:end])[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0, 6:], model(tokens)[0, 6:], rtol=1e-2)


def test_parameter_names_are_the_documented_ones():
    block = ["attn_norm", "attn.qkv", "attn.out", "mlp_norm", "mlp.gate_up", "mlp.down"]
    expected = ["embed.weight"] + [f"blocks.{i}.{name}.weight" for i in range(2) for name in block]
    assert [name for name, _ in Llama(CONFIG).named_parameters()] == [*expected, "norm.weight", "head.weight"]


def test_initial_values_have_the_papers_spread():
    config = replace(CONFIG, n_layer=3, d_model=256, d_ff=640, vocab_size=512)
    spread = {name: float(p.detach().std()) for name, p in Llama(config).named_parameters() if p.ndim == 2}
    assert spread["embed.weight"] == pytest.approx(math.sqrt(2 / 5 / 256), rel=0.02)
    assert spread["head.weight"] == pytest.approx(math.sqrt(2 / 5 / 256), rel=0.02)
    assert spread["blocks.1.mlp.gate_up.weight"] == pytest.approx(math.sqrt(2 / 5 / 256), rel=0.02)
    assert spread["blocks.1.attn.out.weight"] == pytest.approx(1 / (math.sqrt(256) * 3), rel=0.02)
    assert spread["blocks.1.mlp.down.weight"] == pytest.approx(1 / (math.sqrt(640) * 3), rel=0.02)


def test_initial_values_depend_on_the_name_and_the_seed_only():
    small, large = Llama(CONFIG, seed=5), Llama(replace(CONFIG, n_layer=5), seed=5)
    torch.manual_seed(1234)
    again, other = Llama(CONFIG, seed=5), Llama(CONFIG, seed=6)
    large, again, other = (dict(model.named_parameters()) for model in (large, again, other))
    for name, p in small.named_parameters():
        assert torch.equal(p, again[name])
        if p.ndim == 2:
            assert not torch.equal(p, other[name])
            if not name.endswith(("attn.out.weight", "mlp.down.weight")):  # whose spread follows the depth
                assert torch.equal(p, large[name])
    assert not torch.equal(small.blocks[0].attn.qkv.weight, small.blocks[1].attn.qkv.weight)


def test_parameter_without_initial_value_is_found():
    model = Llama(CONFIG)
    skipped = model.blocks[1].mlp.down.weight
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.down\.weight was not initialised"):
        model.init_weights(0, write=lambda p, value: p is skipped or p.copy_(value))


def test_bfloat16_compute_keeps_fp32_masters_and_gradients():
    model = Llama(CONFIG)
    exact = model(tokens(), tokens().roll(-1, 1))
    model.compute_dtype = torch.bfloat16
    loss = model(tokens(), tokens().roll(-1, 1))
    loss.backward()
    assert model(tokens()).dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert float(loss) == pytest.approx(float(exact), rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_head": 3}, "n_head 4 is not divisible by model.n_kv_head 3"),
        ({"d_model": 30}, "d_model 30"),
        ({"n_layer": 0}, "n_layer must be positive"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"rope_theta": math.nan}, "rope_theta must be positive"),
        ({"norm_eps": math.inf}, "norm_eps must be positive"),
    ],
)
def test_shapes_that_are_none_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_sequence_longer_than_seq_len_is_refused():
    with pytest.raises(ValueError, match="longer than seq_len"):
        Llama(CONFIG)(tokens(17))
