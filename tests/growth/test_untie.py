"""Layers that are run in loops, and the growth that gives each pass layers of its own."""

from dataclasses import replace

import pytest
import torch

from nanostack import growth, models
from nanostack.config import Growth, Optim
from nanostack.flops import flops_exact_per_token, flops_per_token, mfu, n_params
from nanostack.generate import Sampling, continue_rows
from nanostack.growth.moments import COPY
from nanostack.hf import export
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer
from nanostack.parallel import Placement
from nanostack.state import State

LOOPED = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16, loops=4)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def backward(model: Llama) -> torch.Tensor:
    loss = model(TOKENS, TOKENS.roll(-1, 1))
    loss.backward()
    return loss.detach()


def trained(config: LlamaConfig = LOOPED, optim: str = "adamw"):
    model = Llama(config, seed=1)
    optimizer = make_optimizer(model, Optim(optim))
    for _ in range(2):
        guarded_step(optimizer, backward(model), 1e-2, 1.0)
    return model, optimizer


def unrolled(model: Llama) -> Llama:
    """The model without loops that computes the same."""
    alone = Llama(model.config.unrolled())
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            parts = name.split(".")
            if parts[0] == "blocks":
                parts[1] = str(int(parts[1]) % model.config.n_layer)
            parameter.copy_(model.get_parameter(".".join(parts)))
    return alone


@pytest.mark.parametrize("residual_scale", [None, 1.0])
def test_looped_model_is_its_unrolled_one(residual_scale):
    model, _ = trained(replace(LOOPED, residual_scale=residual_scale))
    alone = unrolled(model)
    assert torch.equal(model(TOKENS), alone(TOKENS))
    same, config = alone.config, model.config
    assert flops_per_token(config) == flops_per_token(same) and flops_exact_per_token(config) == flops_exact_per_token(same)
    assert mfu(config, 1e6, 1e15) == mfu(same, 1e6, 1e15)
    assert n_params(config) == sum(p.numel() for p in model.parameters()) < n_params(same)
    how, draws = Sampling(tokens=20, temperature=0.0), [torch.Generator(), torch.Generator()]
    texts = [list(continue_rows(one, TOKENS[:, :5], how, 64, draws, cached)) for one, cached in ((model, True), (alone, False))]
    assert texts[0] == texts[1], "also past the context, where the cache is made anew"


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("g", [None, 2])
def test_untied_model_and_its_gradient_are_the_looped_ones_to_the_bit(g, optim):
    model, optimizer = trained(optim=optim)
    loss, logits = backward(model), model(TOKENS)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    kept = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    model.zero_grad()
    receipt = growth.grow(model, optimizer, op="untie", g=g, moments=COPY)
    passes = g or 4
    assert receipt.layers == [0, 1] * passes and model.config == replace(LOOPED, n_layer=2 * passes, loops=4 // passes)
    assert torch.equal(model(TOKENS), logits) and torch.equal(backward(model), loss)
    for name, gradient in gradients.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            names = [f"blocks.{int(number) + 2 * i}.{rest}" for i in range(passes)]
            each = [model.get_parameter(one) for one in names]
            if g is None:  # in the order in which autograd adds them up: the last pass first
                total = each[-1].grad
                for one in reversed(each[:-1]):
                    total = total + one.grad
                assert torch.equal(total, gradient), name
            else:
                torch.testing.assert_close(sum(one.grad for one in each), gradient)
            assert all(torch.equal(optimizer.state[one][key], value) for one in each for key, value in kept[name].items())
        else:
            assert torch.equal(model.get_parameter(name).grad, gradient)
    guarded_step(optimizer, loss, 1e-2, 1.0)
    assert optimizer.state.keys() == set(model.parameters())


def test_folder_of_a_looped_model_gives_transformers_the_same_logits(tmp_path, capsys):
    """It has a layer for each pass, which the receipt of a growth of looped layers does not tell of: it stays out."""
    transformers = pytest.importorskip("transformers")
    state = State.create(replace(LOOPED, residual_scale=2.0), Optim(), Placement(torch.device("cpu")), 0)
    for how in (Growth("untie", 2), Growth("insert", k=2)):
        state.grow(how)
        guarded_step(state.optimizer, backward(state.model), 1e-2, 1.0)
    export.save(state, tmp_path / "hf", None)
    assert "how the looped ones grew is left out" in capsys.readouterr().err
    assert models.read(tmp_path / "hf")["growth"] == [] and "12 layers × 32" in (tmp_path / "hf/README.md").read_text()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.num_hidden_layers == 12 == state.model.config.depth
    torch.testing.assert_close(theirs(TOKENS).logits, state.model(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "how", "message"),
    [
        (replace(LOOPED, loops=1), {"op": "untie"}, "this model runs its layers once"),
        (LOOPED, {"op": "untie", "g": 3}, "untie takes a g that divides the model's 4 loops, not 3"),
        (LOOPED, {"op": "untie", "g": 8}, "not 8"),
        (LOOPED, {"op": "untie", "k": 2}, "k belongs to middle, solar and insert"),
        (LOOPED, {"op": "untie", "layers": "0-1*4"}, "untie makes layers of its own"),
    ],
)
def test_growth_that_cannot_be_is_named(config, how, message):
    with pytest.raises(ValueError, match=message):
        Growth(**how).plan(config)


def test_loops_are_whole():
    with pytest.raises(ValueError, match=r"model\.loops must be a whole number of 1 or more, not 0"):
        replace(LOOPED, loops=0)
