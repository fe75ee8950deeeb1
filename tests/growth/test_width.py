"""Growth in width: against formulas in float64, whole heads, an optimizer that fits, ramps, what cannot be."""

import copy
from dataclasses import replace

import pytest
import torch

from nanostack import growth
from nanostack.config import Growth, Optim
from nanostack.growth import width
from nanostack.growth.moments import COPY, POWER, Moments
from nanostack.growth.width import Width
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer
from nanostack.parallel import Placement
from nanostack.state import State

MHA = LlamaConfig(n_layer=2, n_head=4, n_kv_head=4, d_model=32, d_ff=48, vocab_size=64, seq_len=16)
GQA = replace(MHA, n_kv_head=2)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def step(model, optimizer) -> float:
    loss = model(TOKENS, TOKENS.roll(-1, 1))
    loss.backward()
    guarded_step(optimizer, loss.detach(), 1e-2, 1.0)
    return loss.item()


def how(wider: Width, **fields) -> Growth:
    """The config of this growth in width."""
    return Growth(width=wider.op, **{name: value for name, value in vars(wider).items() if name != "op"}, **fields)


def trained(config: LlamaConfig, steps: int = 3, optim: Optim = Optim()):  # noqa: B008
    """A model whose norm gains are not 1, and its optimizer."""
    model = Llama(config, seed=1)
    optimizer = make_optimizer(model, optim)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


WIDER = [Width(op, d_model=64) for op in ("split", "zero", "random")] + [
    Width("split", d_model=96, alpha=0.7),  # three copies, uneven
    Width("split", d_ff=96, alpha=0.25),
    Width("split", d_ff=100),  # 4 of 48 neurons are there three times
    Width("zero", d_model=40, d_ff=64, n_kv_head=5),  # one head more
    Width("random", d_ff=50),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("base", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("wider", WIDER, ids=str)
def test_grown_model_computes_what_the_base_did(wider, base, tied):
    base = replace(base, tie_embeddings=tied)
    if base.n_kv_head == 2 and wider.d_model == 40:
        wider = replace(wider, n_kv_head=1)  # refused below; here the factor 5/4 leaves no other whole number
        with pytest.raises(ValueError, match="growth makes nothing smaller: n_kv_head from 2 to 1"):
            wider.config(base)
        return
    model, optimizer = trained(base)
    before = model(TOKENS)
    wide = wider.config(base)
    assert how(wider).plan(base).preserves
    receipt = growth.grow(model, optimizer, wider=wider)
    assert model.config == wide and receipt["width"]["to"]["d_model"] == wide.d_model and receipt["op"] is None
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in Llama(wide).named_parameters()}
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-5)
    assert (model.head.weight is model.embed.weight) == tied


@pytest.mark.parametrize(
    ("heads", "kv"), [((4, 4), (8, 8)), ((4, 2), (8, 4)), ((4, 2), (8, 2)), ((4, 1), (8, 4)), ((4, 2), (12, 6))]
)
@pytest.mark.parametrize("op", ["split", "zero", "random"])
def test_query_heads_stay_with_their_keys_whatever_becomes_of_the_groups(op, heads, kv):
    (n_head, n_kv), (new_head, new_kv) = heads, kv
    base = replace(MHA, n_head=n_head, n_kv_head=n_kv)
    wider = Width(op, d_model=new_head * base.head_dim, n_kv_head=new_kv)
    group, new_group = n_head // n_kv, new_head // new_kv
    if op != "split" and new_group < group:
        with pytest.raises(ValueError, match="leave no place for old query head"):
            wider.config(base)
        return
    model, _ = trained(base)
    before = model(TOKENS)
    growth.grow(model, wider=wider)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-5)


def unfused(model: Llama) -> dict[str, torch.Tensor]:
    """The weights as Hugging Face has them, in float64, by short names."""
    c = model.config
    named = {"embed": model.embed.weight, "norm": model.norm.weight, "head": model.head.weight}
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv.weight.split([n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)])
        gate, up = block.mlp.gate_up.weight.chunk(2)
        layer = {"q": q, "k": k, "v": v, "o": block.attn.out.weight, "gate": gate, "up": up, "down": block.mlp.down.weight}
        layer |= {"attn_norm": block.attn_norm.weight, "mlp_norm": block.mlp_norm.weight}
        named |= {f"{name}.{i}": value for name, value in layer.items()}
    return {name: value.detach().double() for name, value in named.items()}


def inputs_outputs(name: str) -> tuple[bool, bool]:
    """Whether the rows and the columns of an unfused matrix grow."""
    return name.split(".")[0] not in ("head", "embed"), name != "embed"


@pytest.mark.parametrize("alpha", [None, 0.7])
@pytest.mark.parametrize("base", [MHA, GQA], ids=["mha", "gqa"])
def test_split_is_the_formula(base, alpha):
    """W' = [[αW, βW], [αW, βW]], embedding [E, E], head [αW, βW], gains [μ, μ]; twice as many of everything."""
    model, _ = trained(base)
    old = unfused(model)
    growth.grow(model, wider=Width("split", d_model=64, alpha=alpha))
    share = torch.tensor([0.5 if alpha is None else alpha, 0.5 if alpha is None else 1 - alpha], dtype=torch.float64)
    for name, value in unfused(model).items():
        w = old[name]
        if w.ndim == 1:
            expected = torch.cat([w, w])
        elif name == "embed":
            expected = torch.cat([w, w], 1)
        else:
            expected = torch.kron(share, w) if name == "head" else torch.kron(torch.stack([share, share]), w)
        torch.testing.assert_close(value, expected.reshape(value.shape), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("op", ["zero", "random"])
@pytest.mark.parametrize("base", [MHA, GQA], ids=["mha", "gqa"])
def test_zero_and_random_are_the_block_matrices_of_the_formula(op, base):
    model, _ = trained(base)
    old = unfused(model)
    growth.grow(model, wider=Width(op, d_model=64), seed=3)
    d, D = 32, 64
    assert model.config.norm_eps == model.norm.eps == model.blocks[0].mlp_norm.eps == base.norm_eps * d / D
    for name, value in unfused(model).items():
        w = old[name]
        if w.ndim == 1:
            expected = torch.cat([(d / D) ** 0.5 * w, torch.ones(D - d, dtype=torch.float64)])
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
            continue
        rows, columns = w.shape
        torch.testing.assert_close(value[:rows, :columns], w, rtol=0, atol=0)
        A, below, C = value[:rows, columns:], value[rows:, :columns], value[rows:, columns:]
        scale = 2.0 / (5 * (model.config.d_ff if "down" in name else D))
        if name.startswith(("o", "down")):
            scale = 1 / ((model.config.d_ff if "down" in name else D) * model.config.n_layer**2)
        fresh = [C, A] if name != "embed" else []
        if op == "zero":
            assert not below.any()
            assert name != "embed" or not A.any()
        else:
            fresh += [below] + ([A] if name == "embed" else [])
        for part in fresh:
            if part.numel():
                assert part.std().item() == pytest.approx(scale**0.5, rel=0.25), (name, part.shape)


def test_random_channels_are_masked_and_ramped_in():
    """Every linear output but the head's, and the embedding's, times [1, c], by hand in float64."""
    model, _ = trained(GQA)
    growth.grow(model, wider=Width("random", d_model=64), seed=3)
    plain = copy.deepcopy(model).double()
    for module in plain.modules():
        module._forward_hooks.clear()
    for c in (0.0, 0.3, 1.0):
        growth.set_ramp(model, c)
        scaled = copy.deepcopy(plain)
        mask = {n: torch.cat([torch.ones(n // 2), torch.full((n // 2,), c)]).double() for n in (16, 32, 48 * 2, 64)}
        scaled.embed.weight.data *= mask[64]
        for block in scaled.blocks:
            q_k_v = torch.cat([mask[64], mask[32], mask[32]])
            gate_up = torch.cat([mask[96], mask[96]])
            block.attn.qkv.weight.data *= q_k_v[:, None]
            block.mlp.gate_up.weight.data *= gate_up[:, None]
            block.attn.out.weight.data *= mask[64][:, None]
            block.mlp.down.weight.data *= mask[64][:, None]
        torch.testing.assert_close(model(TOKENS).double(), scaled(TOKENS), rtol=1e-5, atol=1e-5)
    assert model.ramp is None and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("op", ["split", "zero", "random"])
def test_depth_after_width_in_one_growth_is_one_after_the_other(op):
    both, one = trained(GQA), trained(GQA)
    receipt = growth.grow(*both, op="stack", g=2, wider=Width(op, d_model=64), moments=COPY, seed=5)
    growth.grow(*one, wider=Width(op, d_model=64), moments=COPY, seed=5)
    if op == "random":
        with pytest.raises(ValueError, match="still being ramped in"):
            growth.grow(*one, op="stack", g=2, moments=COPY)
        growth.set_ramp(one[0], 1)
        growth.set_ramp(both[0], 1)
    growth.grow(*one, op="stack", g=2, moments=COPY)
    assert receipt["op"] == "stack" and receipt["width"]["op"] == op and len(both[0].blocks) == 4
    assert both[0].config == one[0].config
    for (name, a), b in zip(both[0].named_parameters(), one[0].parameters(), strict=True):
        assert torch.equal(a, b), name
        states = both[1].state[a], one[1].state[b]
        assert all(torch.equal(states[0][key], states[1][key]) for key in POWER if key in states[0]), name


@pytest.mark.parametrize("depth", [None, "zero", "random", "insert"])
@pytest.mark.parametrize("op", ["split", "zero", "random"])
def test_preserving_in_both_directions(op, depth):
    model, optimizer = trained(GQA)
    before = model(TOKENS)
    g = 2 if depth in ("zero", "random") else None
    assert how(Width(op, d_model=64), op=depth, g=g).plan(GQA).preserves
    growth.grow(model, optimizer, op=depth, g=g, wider=Width(op, d_model=64))
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [MHA, replace(GQA, tie_embeddings=True)], ids=["mha", "gqa-tied"])
@pytest.mark.parametrize("op", ["split", "zero", "random"])
def test_training_goes_on_and_nothing_new_stays_dead(op, base):
    state = State.create(base, Optim(), Placement(torch.device("cpu")), seed=1)
    for _ in range(3):
        step(state.model, state.optimizer)
    state.grow(Growth(width=op, d_model=64, alpha=0.7 if op == "split" else None, op="zero", g=2))
    growth.set_ramp(state.model, 0.5)
    grouped = [p for group in state.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, state.model.parameters()))
    assert [all(p.ndim == n for p in group["params"]) for n, group in zip((2, 1), state.optimizer.param_groups, strict=True)]
    assert state.dead(), "before any gradient all is still"
    losses = [step(state.model, state.optimizer)]
    state.model(TOKENS, TOKENS.roll(-1, 1)).backward()
    assert state.dead() == []
    losses += [step(state.model, state.optimizer) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_copies_of_an_even_split_stay_alike_and_those_of_an_uneven_one_part():
    for alpha, alike in ((None, True), (0.7, False)):
        model, optimizer = trained(MHA)
        receipt = growth.grow(model, optimizer, wider=Width("split", d_ff=3 * 48, alpha=alpha))
        assert bool(receipt.caution()) == alike
        for _ in range(5):
            step(model, optimizer)
        a, b, c = model.blocks[0].mlp.gate_up.weight[: 3 * 48].chunk(3)
        for one, other in ((a, b), (b, c), (a, c)):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6) == alike


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("op", ["split", "zero"])
@pytest.mark.parametrize("old", ["keep", "zero", "scale"])
@pytest.mark.parametrize("new", ["copy", "zero", "scale"])
def test_moments_are_those_computed_by_hand(old, new, op, optim):
    model, optimizer = trained(MHA, optim=Optim(optim))
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    growth.grow(model, optimizer, wider=Width(op, d_ff=96), moments=Moments(old, new, 0.5))
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        copies = op == "split" and ("gate_up" in name or "down" in name)
        if old == "zero" and (new == "zero" or not copies):
            assert not state, "all of it is zero, so its step is too"
            continue
        assert state.keys() == before[name].keys() and state.get("step", 3) == 3
        for key in before[name].keys() - {"step"}:
            m, power = before[name][key], 2 if key == "exp_avg_sq" else 1
            was = m * {"keep": 1, "zero": 0, "scale": 0.5**power}[old]
            copied = m * {"copy": 1, "zero": 0, "scale": 0.5**power}[new] * (op == "split")
            if "gate_up" in name:
                was, copied = ([x[:48], x[48:]] for x in (was, copied))
                expected = torch.cat([was[0], copied[0], was[1], copied[1]])
            elif "down" in name:
                expected = torch.cat([was, copied], 1)
            else:
                expected = was
            assert torch.equal(state[key], expected), (name, key)
    step(model, optimizer)
    assert optimizer.state.keys() == set(model.parameters()), "it goes on"


@pytest.mark.parametrize("new", ["copy", "zero", "scale"])
@pytest.mark.parametrize("old", ["keep", "zero", "scale"])
def test_moments_of_deep_copies_of_wide_layers_are_scaled_once(old, new):
    model, optimizer = trained(MHA)
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    growth.grow(model, optimizer, op="stack", g=2, wider=Width("split", d_ff=96), moments=Moments(old, new, 0.5))
    of_new, of_old = {"copy": 1, "zero": 0, "scale": 0.5}[new], {"keep": 1, "zero": 0, "scale": 0.5}[old]
    for layer, of_first in ((0, of_old), (2, of_new)):
        state = optimizer.state.get(model.blocks[layer].mlp.down.weight, {})
        m = before["blocks.0.mlp.down.weight"]["exp_avg"]
        expected = torch.cat([m * of_first, m * of_new], 1)
        assert torch.equal(state["exp_avg"], expected) if expected.any() else not state
        assert not state or state["step"] == 3


def test_neurons_of_a_zero_growth_of_d_ff_alone_learn():
    """New channels that nothing writes to would leave gate and up at zero for good: here what reads the neurons is zero."""
    model, optimizer = trained(MHA)
    before = model(TOKENS)
    growth.grow(model, optimizer, wider=Width("zero", d_ff=96))
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-5)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "mlp." in name}
    for _ in range(3):
        step(model, optimizer)
    for name, value in start.items():
        moved = (model.get_parameter(name) != value).float().mean()
        assert moved > 0.99, name


@pytest.mark.parametrize("options", [{"op": "zero", "g": 2}, *({"wider": Width(op, d_model=64)} for op in ("split", "zero"))])
def test_models_in_float64_stay_in_float64(options):
    model = Llama(GQA).double()
    before = model(TOKENS)
    growth.grow(model, **options)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-7, atol=1e-7)


def test_old_parameters_are_freed_one_by_one():
    """No more is held at once than the wide state and one tensor of it beside what is still narrow."""
    model, optimizer = trained(replace(MHA, n_layer=6))
    held = []

    def measure(name):
        alive = sum(p.nbytes for p in model.parameters()) + sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        held.append(alive)

    original = width._value
    narrow = sum(p.nbytes for p in model.parameters()) * 3
    try:
        width._value = lambda name, *rest: (measure(name), original(name, *rest))[1]
        growth.grow(model, optimizer, wider=Width("split", d_model=64), moments=COPY)
    finally:
        width._value = original
    wide = sum(p.nbytes for p in model.parameters()) * 3
    assert held == sorted(held) and narrow <= held[0] < held[-1] < wide * 1.01


@pytest.mark.parametrize(
    ("wider", "message"),
    [
        (Width("split", d_model=60), "d_model 60 is not a whole number of heads of 8 channels; near are 56 and 64"),
        (Width("split", d_model=40), "n_kv_head 2 does not grow by 40/32 to a whole number: give n_kv_head"),
        (Width("split", d_model=24, n_kv_head=1), "nothing smaller: d_model from 32 to 24"),
        (Width("split", d_ff=32), "nothing smaller: d_ff from 48 to 32"),
        (Width("split"), "give at least one that is larger"),
        (Width("split", d_model=64, n_kv_head=3), "n_head 8 is not divisible by model.n_kv_head 3"),
        (Width("zero", d_model=64, alpha=0.5), "belongs to split"),
        (Width("split", d_model=64, alpha=1.0), "alpha is a share between 0 and 1"),
        (Width("stretch", d_model=64), "no width operator 'stretch'"),
        (Width("learn", d_model=64), "learn trains how to grow and needs text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_widths_that_do_not_fit_are_refused_before_anything_is_touched(wider, message):
    model, optimizer = trained(GQA, steps=1)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        growth.grow(model, optimizer, wider=wider)
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()} and model.config == GQA


def test_whole_factors_preserve_and_others_do_not():
    assert not Width("split", d_model=48).preserves(MHA)
    assert Width("split", d_model=96).preserves(MHA) and Width("zero", d_model=48).preserves(MHA)
    assert not how(Width("zero", d_model=48), op="stack", g=2).plan(MHA).preserves
