"""What Mistral and Qwen add to a Llama (biases, norms on q and k, heads of another size) grows as the rest does."""

import copy
from dataclasses import replace

import pytest
import torch

from nanostack import growth
from nanostack.config import Optim, Sampling
from nanostack.flops import n_params
from nanostack.generate import continue_rows
from nanostack.growth import learn, width
from nanostack.growth.moments import COPY
from nanostack.growth.width import Width
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer

# With a norm_eps that counts for nothing, as a growth in width by zero or random gives heads that of the wide norms.
LLAMA = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16, norm_eps=1e-9)
BIASED = replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True)
VARIANTS = {
    "heads": replace(LLAMA, d_head=12),
    "biases": BIASED,
    "qwen2": replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(LLAMA, qk_norm=True, d_head=20),
    "all": replace(BIASED, qk_norm=True, d_head=20),
}
of_every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def trained(config: LlamaConfig, optim: Optim = Optim()):  # noqa: B008
    """A model whose gains are not 1 and whose biases are not 0, and its optimizer."""
    model = Llama(config, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.ndim == 1):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.3)
    optimizer = make_optimizer(model, optim)
    step(model, optimizer)
    return model, optimizer


def step(model: Llama, optimizer) -> None:
    loss = model(TOKENS, TOKENS.roll(-1, 1))
    loss.backward()
    guarded_step(optimizer, loss.detach(), 1e-2, 1.0)


@of_every_variant
def test_parameters_are_counted_and_all_learn(config):
    model, optimizer = trained(config)
    assert n_params(config) == sum(p.numel() for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("how", [{"op": "zero", "g": 2}, {"op": "insert"}, {"op": "random", "g": 2}], ids=lambda how: how["op"])
@of_every_variant
def test_preserving_in_depth(config, how):
    model, optimizer = trained(config)
    before = model(TOKENS)
    growth.grow(model, optimizer, **how)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-6)
    growth.set_ramp(model, 1.0)
    for _ in range(2):
        step(model, optimizer)


@pytest.mark.parametrize(
    "wider", [Width(op, d_model=64) for op in ("split", "zero", "random")] + [Width("zero", d_ff=64)], ids=str
)
@of_every_variant
def test_preserving_in_width(config, wider):
    model, optimizer = trained(config)
    before = model(TOKENS)
    growth.grow(model, optimizer, wider=wider)
    wide = wider.config(config)
    assert wide.head_dim == config.head_dim and model.config == wide
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in Llama(wide).named_parameters()}
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-5)
    growth.set_ramp(model, 1.0)
    step(model, optimizer)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_stack_copies_them_with_their_moments(optim):
    model, optimizer = trained(VARIANTS["all"], Optim(name=optim))
    base = [{name: p.detach().clone() for name, p in block.named_parameters()} for block in model.blocks]
    moments = [{name: copy.deepcopy(optimizer.state[p]) for name, p in block.named_parameters()} for block in model.blocks]
    growth.grow(model, optimizer, g=2, moments=COPY)
    for number, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, base[number % 2][name]), name
            kept = optimizer.state[parameter]
            assert all(torch.equal(kept[key], value) for key, value in moments[number % 2][name].items()), name
    assert all(("exp_avg" in optimizer.state[p]) == (optim == "adamw" or p.ndim == 1) for p in model.blocks.parameters())


def test_split_copies_biases_by_heads_and_leaves_gains_of_heads():
    model, _ = trained(VARIANTS["all"])
    old = {name: p.detach().clone() for name, p in model.blocks[0].named_parameters()}
    growth.grow(model, wider=Width("split", d_model=64, n_kv_head=2))
    new, K = dict(model.blocks[0].named_parameters()), 20
    q, k, v = old["attn.qkv.bias"].view(-1, K).split((4, 2, 2))
    expected = torch.cat([q[[0, 1, 0, 1, 2, 3, 2, 3]], k, v]).flatten()  # a query head stays with the keys that it knows
    assert torch.equal(new["attn.qkv.bias"], expected)
    assert torch.equal(new["attn.out.bias"], old["attn.out.bias"].repeat(2))
    gate, up = old["mlp.gate_up.bias"].chunk(2)
    assert torch.equal(new["mlp.gate_up.bias"], torch.cat([gate, gate, up, up]))
    assert all(torch.equal(new[name], old[name]) for name in ("attn.q_norm.weight", "attn.k_norm.weight"))


def test_learned_maps_mix_biases_as_they_mix_the_rows_they_go_with():
    model, _ = trained(VARIANTS["all"])
    base = copy.deepcopy(model)
    growth.grow(model, g=2)
    mixed, config = learn.DepthMap(model, 2, torch.Tensor.copy_), model.config
    for number, matrix in enumerate(mixed.matrices):
        matrix.data = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(number))
    biases = [block.attn.qkv.bias.split([n * config.head_dim for n in (4, 2, 2)]) for block in base.blocks]
    parts = [sum(mixed.D["attn.qkv.bias"][part, 3, j] * biases[j][part] for j in range(2)) for part in range(3)]
    torch.testing.assert_close(mixed("blocks.3.attn.qkv.bias"), torch.cat(parts))
    gains = sum(mixed.D["attn.q_norm.weight"][0, 2, j] * base.blocks[j].attn.q_norm.weight for j in range(2))
    torch.testing.assert_close(mixed("blocks.2.attn.q_norm.weight"), gains)

    wider = Width("learn", d_model=64)
    wide = learn.width_map(base, wider, seed=0)
    value = wide("blocks.0.attn.qkv.bias")
    q, k, v = base.blocks[0].attn.qkv.bias.split([n * 20 for n in (4, 2, 2)])
    torch.testing.assert_close(value, torch.cat([wide.B[name] @ part for name, part in (("q", q), ("k", k), ("v", v))]))
    assert torch.equal(wide("blocks.0.attn.k_norm.weight"), base.blocks[0].attn.k_norm.weight)
    width.widen(base, None, wider, 0, wide)

    def gradients() -> torch.Tensor:
        loss = base(TOKENS, TOKENS.roll(-1, 1))
        loss.backward()
        return loss.detach()

    found = learn.train(base, wide, gradients, steps=2)
    assert all(p.isfinite().all() for p in base.parameters()) and found["steps"] == 2


@of_every_variant
def test_a_cache_of_keys_and_values_changes_no_token(config):
    model, how = trained(config)[0], Sampling(tokens=8, temperature=0.0)
    generators = [torch.Generator()] * 2
    kept, anew = (list(continue_rows(model, TOKENS[:, :4], how, 64, generators, cached)) for cached in (True, False))
    assert kept == anew
