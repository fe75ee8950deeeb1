"""Residual branches divided by the depth (CompleteP): what a growth does to the scale, and what is preserved."""

from dataclasses import replace

import pytest
import torch

from nanostack import growth
from nanostack.config import Growth, Optim
from nanostack.growth import width
from nanostack.growth.moments import COPY, POWER
from nanostack.model import RESIDUAL_OUTPUTS, Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer
from nanostack.text.dataset import Tokens
from study import coordinates

SCALED = LlamaConfig(2, 4, 2, d_model=32, d_ff=48, vocab_size=64, seq_len=16, residual_scale=1.0)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def trained(config: LlamaConfig = SCALED, optim: str = "adamw"):
    model = Llama(config, seed=1)
    optimizer = make_optimizer(model, Optim(optim))
    for _ in range(3):
        loss = model(TOKENS, TOKENS.roll(-1, 1))
        loss.backward()
        guarded_step(optimizer, loss.detach(), 1e-2, 1.0)
    return model, optimizer


@pytest.mark.parametrize("tied", [False, True])
def test_model_starts_as_the_one_without_a_scale_but_for_a_larger_embedding(tied):
    """Its projections to the residual stream are not divided by the depth: the scale does that."""
    config = replace(SCALED, tie_embeddings=tied)
    scaled, plain = (Llama(one, seed=1) for one in (config, replace(config, residual_scale=None)))
    for (name, a), b in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        if name == "embed.weight" and not tied:
            torch.testing.assert_close(a, b * 80**0.5)
            with torch.no_grad():
                a.copy_(b)
        assert torch.equal(a, 2 * b if name.endswith(RESIDUAL_OUTPUTS) else b)
    torch.testing.assert_close(scaled(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("way", coordinates.WAYS)
def test_sizes_do_not_depend_on_the_depth_where_branches_are_scaled(corpus, way):
    """The coordinate check, over a factor of 8 in depth. Without the scale the first steps change more in a deeper model."""
    text = Tokens(corpus, "train", 32)
    found = coordinates.measured(text, 4, 1e-3, 1, (2, 4, 16), {way: coordinates.WAYS[way]})[way]
    if "residual_scale" in way:
        assert abs(found["stream"]["slope"]) < 0.1 and abs(found["change"]["slope"]) < 0.2, found
    else:
        assert found["change"]["slope"] > 0.2, found


@pytest.mark.parametrize("residual", ["rescale", "keep"])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("how", [{"op": "zero", "g": 4}, {"op": "insert"}, {"op": "random", "g": 2}], ids=lambda how: how["op"])
def test_preserving_operators_are_exact_either_way(how, optim, residual):
    """The depth grows by powers of two: all that is multiplied is exact, in fp32."""
    model, optimizer = trained(optim=optim)
    base = dict(model.named_parameters())
    before, logits = {name: p.detach().clone() for name, p in base.items()}, model(TOKENS)
    kept = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in base.items()}
    receipt = growth.grow(model, optimizer, Growth(**how, optimizer="copy", residual=residual))
    assert torch.equal(model(TOKENS), logits) and receipt.residual == residual
    more = model.config.depth // 2
    assert model.config.residual_scale == (1.0 if residual == "rescale" else more)
    assert {block.scale for block in model.blocks} == {0.5 / more if residual == "rescale" else 0.5}
    for name, p in base.items():
        times = more if residual == "rescale" and name.endswith(RESIDUAL_OUTPUTS) else 1
        assert torch.equal(p, times * before[name])
        assert all(torch.equal(optimizer.state[p][k], v * times ** -POWER[k]) for k, v in kept[name].items())
    for (number, block), source in zip(enumerate(model.blocks), receipt.layers, strict=True):
        for name, p in block.named_parameters() if source is not None else ():
            times = more if residual == "rescale" and name.endswith(RESIDUAL_OUTPUTS) else 1
            for k, v in kept[f"blocks.{source}.{name}"].items():
                assert torch.equal(optimizer.state[p][k], v * times ** -POWER[k]), (number, name, k)


@pytest.mark.parametrize("residual", ["rescale", "keep"])
def test_stacked_branches_count_for_a_share_of_what_they_did_or_for_as_much(residual):
    model, optimizer = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    eps = [group["eps"] for group in optimizer.param_groups]
    growth.grow(model, optimizer, Growth("stack", 4, residual=residual, optimizer="copy"))
    for name, p in model.named_parameters():
        source = name if "blocks" not in name else f"blocks.{int(name.split('.')[1]) % 2}.{name.split('.', 2)[2]}"
        share = 1 / 4 if residual == "rescale" and "blocks" in name else 1  # of its gradient
        assert all(torch.equal(optimizer.state[p][k], v * share ** POWER[k]) for k, v in kept[source].items()), name
    assert {block.scale for block in model.blocks} == {1 / 8 if residual == "rescale" else 1 / 2}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    grown = [group["eps"] for group in optimizer.param_groups]
    assert eps == [1e-8, 1e-8, 5e-9, 5e-9]
    assert grown == ([1e-8, 1e-8, 1.25e-9, 1.25e-9] if residual == "rescale" else eps)
    again = make_optimizer(model, Optim())
    assert [group["eps"] for group in again.param_groups] == grown, "as on a checkpoint of it"
    in_blocks = {id(p) for p in model.blocks.parameters()}
    assert {id(p) for group in optimizer.param_groups[2:] for p in group["params"]} == in_blocks


def test_width_leaves_the_scale_alone():
    model, optimizer = trained()
    logits = model(TOKENS)
    growth.grow(model, optimizer, wider=width.Width("split", d_model=64), moments=COPY)
    torch.testing.assert_close(model(TOKENS), logits, rtol=1e-5, atol=1e-5)
    assert model.blocks[0].scale == 0.5


@pytest.mark.parametrize(
    ("config", "how", "message"),
    [
        (replace(SCALED, residual_scale=None), {"residual": "keep"}, "residual keep is for a model with a residual_scale"),
        (SCALED, {"residual": "halve"}, "residual is rescale or keep, not 'halve'"),
    ],
)
def test_growth_that_cannot_be_is_named(config, how, message):
    with pytest.raises(ValueError, match=message):
        Growth("stack", 2, **how).plan(config)


def test_scale_is_positive():
    with pytest.raises(ValueError, match=r"model\.residual_scale must be positive, not -1"):
        replace(SCALED, residual_scale=-1)
