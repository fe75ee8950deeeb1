"""Growth by a trained map: the gradients of D and B, and what is left when they have been trained."""

import copy
from dataclasses import replace

import pytest
import torch
from test_width import GQA, MHA, TOKENS, trained

from nanostack import growth
from nanostack.growth import learn, width
from nanostack.growth.moments import COPY
from nanostack.growth.width import Width
from nanostack.model import Llama


def gradients_of(model):
    def gradients():
        loss = model(TOKENS, TOKENS.roll(-1, 1))
        loss.backward()
        return loss.detach()

    return gradients


def loss_of(model, weights):
    return torch.func.functional_call(model, weights, (TOKENS, TOKENS.roll(-1, 1)), tie_weights=True)


def first_gradients(model, mixed):
    """What the first step of training hands to the optimizer of the matrices."""
    kept = []
    learn.train(model, mixed, gradients_of(model), 1, sum_shards=lambda value: kept.append(value.clone()))
    return kept


def test_gradient_of_D_is_that_of_the_mixture_it_stands_for():
    """In float64, W'_i = Σ_j D_ij W_j written out for q, k, v, out, gate, up, down and both norms, and torch's autograd."""
    model, _ = trained(GQA)
    growth.grow(model, op="stack", g=2)
    base = [dict(block.named_parameters()) for block in copy.deepcopy(model).blocks[:2]]
    mixed = learn.DepthMap(model, 2, torch.Tensor.copy_)
    kinds = {"attn.qkv.weight": (32, 16, 16), "mlp.gate_up.weight": (48, 48)}
    with torch.no_grad():
        for D in mixed.matrices:  # somewhere else than at the start, where every row is a copy
            D += 0.1 * torch.randn(D.shape, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(model).double()
    matrices = {name: D.detach().double().requires_grad_() for name, D in mixed.D.items()}
    weights = {name: p.detach() for name, p in plain.named_parameters() if not name.startswith("blocks.")}
    for i in range(4):
        for name, D in matrices.items():
            parts = [b[name].detach().double().split(kinds.get(name, [len(b[name])])) for b in base]
            rows = [sum(D[p, i, j] * parts[j][p] for j in range(2)) for p in range(len(D))]
            weights[f"blocks.{i}.{name}"] = torch.cat(rows)
    loss_of(plain, weights).backward()
    assert sum(len(D) for D in matrices.values()) == 9, "one D per kind of weight"
    for got, (name, D) in zip(first_gradients(model, mixed), matrices.items(), strict=True):
        torch.testing.assert_close(got.double(), D.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("base", [MHA, GQA, replace(MHA, tie_embeddings=True)], ids=["mha", "gqa", "tied"])
def test_gradient_of_B_is_that_of_the_products_it_stands_for(base):
    """In float64, the table of arXiv 2405.15319 written out: q, k, v: B W Bᵀ_emb; out: B_emb W Bᵀ_v; and so on."""
    model, _ = trained(base)
    old = {name: p.detach().double() for name, p in model.named_parameters()}
    wider = Width("learn", d_model=48, d_ff=64, n_kv_head=6 if base.n_kv_head == 4 else 3)
    grown = wider.config(base)
    mixed = learn.WidthMap(model, grown, width.axes(base, grown, wider, torch.device("cpu")), seed=3)
    width.widen(model, None, wider, 3, mixed)
    B = {name: matrix.detach().double().requires_grad_() for name, matrix in mixed.B.items()}
    if base.n_kv_head == base.n_head:
        assert mixed.B["heads"] is mixed.B["v"]
        B["heads"] = B["v"]
    for name, (new, narrow) in {"model": (48, 32), "q": (48, 32), "ff": (64, 48)}.items():
        assert torch.equal(B[name][:narrow], torch.eye(narrow, dtype=torch.float64))
        assert B[name][narrow:].std().item() == pytest.approx(new**-0.5, rel=0.15)
    sizes = [n * base.head_dim for n in (base.n_head, base.n_kv_head, base.n_kv_head)]
    weights = {"embed.weight": old["embed.weight"] @ B["model"].T, "norm.weight": B["model"] @ old["norm.weight"]}
    if not base.tie_embeddings:
        weights["head.weight"] = old["head.weight"] @ B["model"].T
    for i in range(base.n_layer):
        w = {name.split(".", 2)[2]: value for name, value in old.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = w["attn.qkv.weight"].split(sizes)
        gate, up = w["mlp.gate_up.weight"].chunk(2)
        qkv = torch.cat([B["q"] @ q @ B["model"].T, B["k"] @ k @ B["model"].T, B["v"] @ v @ B["model"].T])
        here = {"attn_norm.weight": B["model"] @ w["attn_norm.weight"], "mlp_norm.weight": B["model"] @ w["mlp_norm.weight"]}
        here |= {"attn.qkv.weight": qkv, "attn.out.weight": B["model"] @ w["attn.out.weight"] @ B["heads"].T}
        here |= {"mlp.gate_up.weight": torch.cat([B["ff"] @ gate @ B["model"].T, B["ff"] @ up @ B["model"].T])}
        here |= {"mlp.down.weight": B["model"] @ w["mlp.down.weight"] @ B["ff"].T}
        weights |= {f"blocks.{i}.{name}": value for name, value in here.items()}
    loss_of(copy.deepcopy(model).double(), weights).backward()
    names = [name for name in mixed.B if any(mixed.B[name] is matrix for matrix in mixed.matrices) and name != "heads"]
    names += ["heads"] if base.n_kv_head != base.n_head else []
    for got, name in zip(first_gradients(model, mixed), names, strict=True):
        torch.testing.assert_close(got.double(), B[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"op": "learn", "g": 2}, {"wider": Width("learn", d_model=64)}, {"op": "learn", "wider": Width("learn", d_ff=96)}],
)
def test_learning_lowers_the_loss_and_leaves_a_plain_model_that_trains(options, monkeypatch):
    monkeypatch.setattr(learn, "PEAK", 5e-3)  # the paper's rate takes more steps than a test has
    model, optimizer = trained(GQA, steps=20)
    receipt = growth.grow(model, optimizer, gradients=gradients_of(model), learn_steps=12, **options)
    wide = replace(GQA, n_layer=2 if "op" not in options else 8 if "g" not in options else 4)
    if "wider" in options:
        wide = replace(options["wider"].config(GQA), n_layer=wide.n_layer)
    assert model.config == wide and len(receipt["learned"]) == len(options) - ("g" in options)
    for learned in receipt["learned"]:
        assert learned["steps"] == 12 and learned["loss_last"] < learned["loss_first"]
    fresh = Llama(wide)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), model(TOKENS)), "nothing but weights is left"
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model(TOKENS, TOKENS.roll(-1, 1)).backward()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_without_training_a_learned_growth_is_stack_and_the_base_keeps_its_storage(monkeypatch):
    monkeypatch.setattr(learn, "rate", lambda step, steps: 0.0)
    stacked, learned = trained(GQA)[0], trained(GQA)[0]
    addresses = {p.data_ptr() for p in learned.parameters()}
    growth.grow(stacked, op="stack", g=3)
    growth.grow(learned, op="learn", g=3, gradients=gradients_of(learned), learn_steps=2)
    for a, b in zip(stacked.parameters(), learned.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert addresses <= {p.data_ptr() for p in learned.parameters()}


def test_what_is_random_in_width_counts_for_nothing_while_depth_is_learned():
    model, optimizer = trained(GQA)
    stacked = copy.deepcopy(model)
    growth.grow(stacked, op="stack", g=2)
    options = {"op": "learn", "g": 2, "wider": Width("random", d_model=64), "learn_steps": 1}
    receipt = growth.grow(model, optimizer, gradients=gradients_of(model), **options)
    expected = stacked(TOKENS, TOKENS.roll(-1, 1)).item()
    assert receipt["learned"][0]["loss_first"] == pytest.approx(expected, rel=1e-5) and model.ramp == 0


def test_rate_is_the_papers():
    rates = [learn.rate(step, 100) for step in range(100)]
    assert max(rates) == rates[49] == pytest.approx(7e-5) and rates[0] == pytest.approx(7e-5 / 50)
    assert rates[-1] == pytest.approx(7e-6) and rates[50:] == sorted(rates[50:], reverse=True)


def test_moments_cannot_follow_a_learned_map_and_divergence_is_told():
    model, optimizer = trained(GQA)
    with pytest.raises(ValueError, match="learn mixes weights"):
        growth.grow(model, optimizer, op="learn", g=2, moments=COPY, gradients=gradients_of(model))
    with pytest.raises(ValueError, match="at least 1 step"):
        growth.grow(model, optimizer, op="learn", g=2, gradients=gradients_of(model), learn_steps=0)
    with pytest.raises(ValueError, match="takes g; a layer list"):
        growth.grow(model, optimizer, op="learn", layers="0-1*2", gradients=gradients_of(model))
    assert len(model.blocks) == 2
    with pytest.raises(ValueError, match="diverged: the loss of its step 0 is nan"):
        growth.grow(model, optimizer, op="learn", g=2, gradients=lambda: torch.tensor(float("nan")))
