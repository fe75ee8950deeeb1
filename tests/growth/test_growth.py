"""Growth in place: exact copies, storages that stay, memory."""

import copy
import gc
import itertools
from dataclasses import replace

import pytest
import torch

from nanostack import growth
from nanostack.config import Optim
from nanostack.growth import Growth
from nanostack.growth.depth import OPERATORS, TAKES_G, connection_rate, parse_layers, plan
from nanostack.growth.moments import COPY, RESET, Moments
from nanostack.growth.width import Width
from nanostack.model import RESIDUAL_OUTPUTS, Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer

CONFIG = LlamaConfig(n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16)


def trained(steps: int = 2, config: LlamaConfig = CONFIG, device: str = "cpu", optim: Optim = Optim()):  # noqa: B008
    model = Llama(config, seed=1).to(device)
    optimizer = make_optimizer(model, optim)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(steps):
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        guarded_step(optimizer, loss.detach(), 1e-2, 1.0)
    return model, optimizer, tokens


def backward(loss):
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-5*4", list(range(6)) * 4),
        ("0-1,2-5*5,4-5", [0, 1] + [2, 3, 4, 5] * 5 + [4, 5]),
        ("3", [3]),
        ("0*3,1", [0, 0, 0, 1]),
        (" 0-1 , 1-2 ", [0, 1, 1, 2]),
    ],
)
def test_layer_list_grammar(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "0-", "-1", "3-1", "0*0", "0,,1", "0-5*", "1.5", "0-5x4"])
def test_bad_layer_lists_are_named(text):
    with pytest.raises(ValueError, match="bad layer list"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("layers", "percent"),
    [
        ("0-5*4", 86.96),
        ("0-1,2-5*5,4-5", 78.26),
        ("0-1,2-4*7,5", 73.91),
        ("0-2,3-5*7", 73.91),
        ("0,1-3*7,4-5", 73.91),
        ("0-2*7,3-5", 73.91),
        ("0-3,4-5*10", 60.87),
        ("0-1,2-3*10,4-5", 60.87),
    ],
)
def test_connection_rate_is_the_papers(layers, percent):
    assert len(parse_layers(layers)) == 24
    assert round(100 * connection_rate(parse_layers(layers)), 2) == percent


@pytest.mark.parametrize("g", [1, 0, -2, 2.0, "4", True])
def test_factor_below_two_or_not_whole_is_refused(g):
    with pytest.raises(ValueError, match="g must be a whole number of 2 or more"):
        plan(3, g=g)


def test_maps_that_are_none_are_refused_before_anything_is_touched():
    model, optimizer, _ = trained()
    before = list(model.blocks)
    bad = [
        ({"g": 2, "layers": [0, 1, 2, 0]}, "exclude each other"),
        ({"layers": [0, 1, 2, 3]}, "names layer 3"),
        ({"layers": [0, 1, 2]}, "no growth"),
        ({"layers": [0, 1, 0, 1]}, "leaves out layer 2"),
        ({"op": "sideways"}, "no growth operator 'sideways'"),
        ({"moments": Moments("halve")}, r"old keep\|zero\|scale"),
        ({"moments": Moments("scale", "scale", -1.0)}, "a factor of 0 or more"),
        ({"noise": 1.0}, "noise is a share"),
        ({"op": "middle", "g": 2}, "this operator takes k"),
        ({"op": "stack", "k": 2}, "this operator takes g"),
        ({"op": "solar", "k": 2}, "k must be a whole number from 1 to 1"),
        ({"op": "insert", "k": 0}, "k must be a whole number from 1 to 3"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            growth.grow(model, optimizer, **arguments)
    assert list(model.blocks) == before and model.config == CONFIG


@pytest.mark.parametrize("state", [RESET, COPY])
@pytest.mark.parametrize("arguments", [{"g": 2}, {"g": 4}, {"layers": "0-2,1-2*2"}, {}])
def test_base_keeps_its_storage_and_new_layers_are_exact_unaliased_copies(arguments, state):
    model, optimizer, _ = trained()
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    moments = {p: (s["exp_avg"].data_ptr(), s["exp_avg"].clone()) for p, s in optimizer.state.items()}
    values = [[p.clone() for p in block.parameters()] for block in model.blocks]
    base_bytes = sum(p.nbytes for p in model.parameters())
    receipt = growth.grow(model, optimizer, moments=state, **arguments)

    layers = receipt["layers"]
    assert len(model.blocks) == model.config.n_layer == len(layers) > 3
    for block, source in zip(model.blocks, layers, strict=True):
        assert all(torch.equal(p, v) for p, v in zip(block.parameters(), values[source], strict=True))
    after = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert addresses.items() <= after.items() or "layers" in arguments  # a list may put base layers elsewhere
    assert set(addresses.values()) <= set(after.values())
    assert len(set(after.values())) == len(after), "two layers share storage"
    if state is COPY:
        assert all(optimizer.state[p]["exp_avg"].data_ptr() == address for p, (address, _) in moments.items())
    else:
        assert not optimizer.state, "a state of zeros is none, and none takes no memory"

    new_bytes = sum(p.nbytes for p in model.parameters()) - base_bytes
    optimizer_bytes = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    optimizer_bytes -= sum(v.nbytes for p in moments for v in optimizer.state.get(p, {}).values())
    assert receipt["bytes_allocated"] == receipt["bytes_copied_on_device"] == new_bytes + optimizer_bytes
    assert receipt["bytes_through_host"] == 0 and receipt["seconds"] > 0


def test_stack_computes_the_base_applied_twice():
    model, _, tokens = trained()
    x = model.embed(tokens)
    for _ in range(2):
        for block in model.blocks:
            x = block(x, model.cos, model.sin)
    expected = model.head(model.norm(x))
    growth.grow(model, g=2)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)


SEQUENCES = {  # which base layers the grown model of 4 runs through, by hand
    ("stack", 2, None): [0, 1, 2, 3, 0, 1, 2, 3],
    ("interleave", 3, None): [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    ("middle", None, None): [0, 1, 2, 1, 2, 3],
    ("middle", None, 1): [0, 1, 1, 2, 3],
    ("middle", None, 4): [0, 1, 2, 3, 0, 1, 2, 3],
    ("solar", None, None): [0, 1, 2, 1, 2, 3],
    ("zero", 3, None): [0, 1, 2, 3],
    ("random", 2, None): [0, 1, 2, 3],
    ("insert", None, None): [0, 1, 2, 3],
    ("insert", None, 3): [0, 1, 2, 3],
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("op", "g", "k"), SEQUENCES)
def test_grown_model_runs_through_the_base_layers_of_the_formula(op, g, k, tied):
    """In float64 the base layers applied one after another; the operators that change nothing leave the base's own logits."""
    model, optimizer, tokens = trained(config=replace(CONFIG, n_layer=4, tie_embeddings=tied))
    base = copy.deepcopy(model).double()
    x = base.embed(tokens)
    for i in SEQUENCES[op, g, k]:
        x = base.blocks[i](x, base.cos, base.sin)
    receipt = growth.grow(model, optimizer, op=op, g=g, k=k)
    expected = base.head(base.norm(x))
    torch.testing.assert_close(model(tokens).double(), expected, rtol=1e-5, atol=1e-5)
    assert Growth(op, g, k=k).plan(base.config).preserves == (SEQUENCES[op, g, k] == [0, 1, 2, 3])
    assert receipt["op"] == op and len(model.blocks) == model.config.n_layer == len(receipt["rules"])
    assert receipt["rules"].count("kept") == 4


def test_every_operator_leaves_a_model_in_which_all_parameters_train():
    """New layers with zeroed outputs have no gradient inside at the first step: after two, nothing may stand still."""
    for op in OPERATORS:
        model, optimizer, tokens = trained(config=replace(CONFIG, n_layer=4, loops=2 if op == "untie" else 1))
        noise, text = 0.2 if op == "stack" else 0.0, (tokens, tokens.roll(-1, 1))
        g = 2 if op in TAKES_G else None
        growth.grow(model, optimizer, op, g, noise=noise, gradients=lambda m=model, t=text: backward(m(*t)), learn_steps=2)
        growth.set_ramp(model, 0.5)
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, model.parameters())), op
        losses = []
        for _ in range(6):
            loss = model(tokens, tokens.roll(-1, 1))
            loss.backward()
            gradients = {name: p.grad.count_nonzero() for name, p in model.named_parameters()}
            guarded_step(optimizer, loss.detach(), 1e-2, 1.0)
            losses.append(loss.item())
        assert all(gradients.values()), (op, gradients)
        assert losses[-1] < losses[0], op


def test_random_layers_are_the_initialised_ones_and_ramp_in():
    model, optimizer, tokens = trained()
    base = copy.deepcopy(model)
    receipt = growth.grow(model, optimizer, op="random", g=2, seed=7)
    fresh = Llama(replace(CONFIG, n_layer=6), seed=7)
    for i in (3, 4, 5):
        for ours, theirs in zip(model.blocks[i].parameters(), fresh.blocks[i].parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert receipt["layers"] == [0, 1, 2, None, None, None] and receipt["rc"] == 0.4
    for scale in (0.0, 0.25, 1.0):
        growth.set_ramp(model, scale)
        x = base.embed(tokens)
        for block in base.blocks:
            x = block(x, base.cos, base.sin)
        for block in fresh.blocks[3:]:
            x = x + scale * block.attn(block.attn_norm(x), base.cos, base.sin, None)
            x = x + scale * block.mlp(block.mlp_norm(x))
        torch.testing.assert_close(model(tokens), base.head(base.norm(x)), rtol=1e-5, atol=1e-5)
    assert model.ramp is None and not any(m._forward_hooks for m in model.modules()), "the ramp leaves nothing behind"


def test_noise_has_the_papers_share_and_spread():
    config = replace(CONFIG, d_model=128, d_ff=256, vocab_size=256, n_layer=2)
    clean, noisy, again = (Llama(config, seed=1) for _ in range(3))
    growth.grow(clean, g=2)
    for model in (noisy, again):
        growth.grow(model, g=2, noise=0.2, seed=5)
    for (name, w), n, a in zip(clean.named_parameters(), noisy.parameters(), again.parameters(), strict=True):
        assert torch.equal(n, a)
        if w.ndim < 2:
            assert torch.equal(w, n)
            continue
        eps = (n - 0.8 * w) / 0.2
        d, layers = 128, 2  # of the base
        expected = (d * layers**2) ** -0.5 if name.endswith(RESIDUAL_OUTPUTS) else (2 / (5 * d)) ** 0.5
        assert eps.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(torch.corrcoef(torch.stack((eps.flatten(), w.flatten())))[0, 1]) < 0.05, name


@pytest.mark.parametrize("state", [RESET, COPY], ids=["reset", "copy"])
@pytest.mark.parametrize(
    "arguments",
    [{"g": 4}, {"op": "zero", "g": 3}, {"op": "random", "g": 2}, {"op": "solar"}, {"wider": Width("split", d_model=256)}],
    ids=str,
)
def test_peak_memory_is_the_larger_state_and_at_most_one_layer(arguments, state):
    """Every allocation and every free of the growth, from the profiler, which has to see the base come to be."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model, optimizer, _ = trained(config=replace(CONFIG, n_layer=6, d_model=128, d_ff=192))
        before = held(model, optimizer)
        gc.collect()
        with torch.profiler.record_function("growth"):
            growth.grow(model, optimizer, moments=state, **arguments)
    events = profile.profiler.kineto_results.events()
    (growing,) = (event for event in events if event.name() == "growth")
    events = [e for e in events if e.name() == "[memory]" and growing.start_ns() <= e.start_ns() <= growing.end_ns()]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    after = held(model, optimizer)
    assert sum(changes) == pytest.approx(after - before, abs=4096)
    peak = before + max(itertools.accumulate(changes))
    layer = sum(p.nbytes for p in model.blocks[0].parameters())
    assert 0.99 * max(before, after) <= peak <= max(before, after) + layer


def held(model, optimizer) -> int:
    states = (value for values in optimizer.state.values() for value in values.values())
    return sum(p.nbytes for p in model.parameters()) + sum(value.nbytes for value in states)


def test_tied_embeddings_stay_tied():
    model, optimizer, _ = trained(config=replace(CONFIG, tie_embeddings=True))
    growth.grow(model, optimizer, g=2)
    assert model.head.weight is model.embed.weight


@pytest.mark.gpu
def test_nothing_passes_through_the_host_and_memory_grows_by_the_new_layers():
    model, optimizer, _ = trained(device="cuda")
    growth.grow(model, optimizer, g=2, moments=COPY)  # warms up what copying needs
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        receipt = growth.grow(model, optimizer, g=2, moments=COPY)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert not [name for name in names if "HtoD" in name or "DtoH" in name]
    assert any("DtoD" in name or "copy" in name.lower() for name in names)
    assert torch.cuda.memory_stats()["requested_bytes.all.current"] - before == receipt["bytes_allocated"]
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == receipt["bytes_allocated"]


@pytest.mark.gpu
def test_growth_leaves_no_memory_that_nothing_can_use():
    """After growth and a step, all that the allocator holds is in use or free for the next step, but for its segments' ends."""
    config = LlamaConfig(n_layer=4, n_head=8, n_kv_head=8, d_model=1024, d_ff=2816, vocab_size=1024, seq_len=128)
    model, optimizer, tokens = trained(config=config, device="cuda")
    for _ in range(2):
        growth.grow(model, optimizer, g=2, moments=COPY)
        backward(model(tokens, tokens.roll(-1, 1)))
        optimizer.step()
    torch.cuda.synchronize()
    held_, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    assert reserved < 1.1 * held_ + 2**26, f"{reserved:,} bytes reserved, of which {held_:,} were ever in use"
