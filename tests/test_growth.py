"""Growth in place: exact copies, storages that stay, an optimizer that fits."""

import pytest
import torch

from nanostack import growth
from nanostack.config import Optim
from nanostack.growth import connection_rate, parse_layers, plan_layers
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer

CONFIG = LlamaConfig(n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16)


def trained(steps: int = 2, config: LlamaConfig = CONFIG, device: str = "cpu"):
    model = Llama(config, seed=1).to(device)
    optimizer = make_optimizer(model, Optim())
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(steps):
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        guarded_step(optimizer, loss.detach(), 1e-2, 1.0)
    return model, optimizer, tokens


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
        plan_layers(3, g=g)


def test_maps_that_are_none_are_refused_before_anything_is_touched():
    model, optimizer, _ = trained()
    before = list(model.blocks)
    bad = [
        ({"g": 2, "layers": [0, 1, 2, 0]}, "exclude each other"),
        ({"layers": [0, 1, 2, 3]}, "names layer 3"),
        ({"layers": [0, 1, 2]}, "no growth"),
        ({"layers": [0, 1, 0, 1]}, "leaves out layer 2"),
        ({"op": "sideways"}, "no growth operator 'sideways'"),
        ({"optimizer_state": "halve"}, "reset or copy"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            growth.grow(model, optimizer, **arguments)
    assert list(model.blocks) == before and model.config == CONFIG


@pytest.mark.parametrize("state", ["reset", "copy"])
@pytest.mark.parametrize("arguments", [{"g": 2}, {"g": 4}, {"layers": "0-2,1-2*2"}, {}])
def test_base_keeps_its_storage_and_new_layers_are_exact_unaliased_copies(arguments, state):
    model, optimizer, _ = trained()
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    moments = {p: (s["exp_avg"].data_ptr(), s["exp_avg"].clone()) for p, s in optimizer.state.items()}
    values = [[p.clone() for p in block.parameters()] for block in model.blocks]
    base_bytes = sum(p.nbytes for p in model.parameters())
    receipt = growth.grow(model, optimizer, optimizer_state=state, **arguments)

    layers = receipt["layers"]
    assert len(model.blocks) == model.config.n_layer == len(layers) > 3
    for block, source in zip(model.blocks, layers, strict=True):
        assert all(torch.equal(p, v) for p, v in zip(block.parameters(), values[source], strict=True))
    after = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert addresses.items() <= after.items() or "layers" in arguments  # a list may put base layers elsewhere
    assert set(addresses.values()) <= set(after.values())
    assert len(set(after.values())) == len(after), "two layers share storage"
    assert all(optimizer.state[p]["exp_avg"].data_ptr() == address for p, (address, _) in moments.items())

    new_bytes = sum(p.nbytes for p in model.parameters()) - base_bytes
    optimizer_bytes = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    optimizer_bytes -= sum(v.nbytes for p in moments for v in optimizer.state[p].values())
    assert receipt["bytes_allocated"] == receipt["bytes_copied_on_device"] == new_bytes + optimizer_bytes
    assert receipt["bytes_through_host"] == 0 and receipt["seconds"] > 0


def test_copied_moments_and_steps_follow_the_map_and_reset_ones_are_zero():
    for state in ("copy", "reset"):
        model, optimizer, _ = trained(steps=3)
        source = [optimizer.state[block.attn.qkv.weight] for block in model.blocks]
        source = [{key: value.clone() for key, value in s.items()} for s in source]
        growth.grow(model, optimizer, g=2, optimizer_state=state)
        for i, block in enumerate(model.blocks):
            mine = optimizer.state.get(block.attn.qkv.weight)
            if state == "copy":
                assert all(torch.equal(mine[key], source[i % 3][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
                assert mine["step"] == 3
            elif mine:
                assert not any(value.any() for value in mine.values())


def test_optimizer_groups_stay_complete_and_every_parameter_trains_on():
    model, optimizer, tokens = trained()
    growth.grow(model, optimizer, g=3)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    decayed, plain = (group["params"] for group in optimizer.param_groups)
    assert all(p.ndim == 2 for p in decayed) and all(p.ndim == 1 for p in plain)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        guarded_step(optimizer, loss.detach(), 1e-2, 1.0)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {2}


def test_stack_computes_the_base_applied_twice():
    model, _, tokens = trained()
    x = model.embed(tokens)
    for _ in range(2):
        for block in model.blocks:
            x = block(x, model.cos, model.sin)
    expected = model.head(model.norm(x))
    growth.grow(model, g=2)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)


def test_tied_embeddings_stay_tied():
    from dataclasses import replace

    model, optimizer, _ = trained(config=replace(CONFIG, tie_embeddings=True))
    growth.grow(model, optimizer, g=2)
    assert model.head.weight is model.embed.weight


@pytest.mark.gpu
def test_nothing_passes_through_the_host_and_memory_grows_by_the_new_layers():
    model, optimizer, _ = trained(device="cuda")
    growth.grow(model, optimizer, g=2, optimizer_state="copy")  # warms up what copying needs
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        receipt = growth.grow(model, optimizer, g=2, optimizer_state="copy")
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert not [name for name in names if "HtoD" in name or "DtoH" in name]
    assert any("DtoD" in name or "copy" in name.lower() for name in names)
    assert torch.cuda.memory_stats()["requested_bytes.all.current"] - before == receipt["bytes_allocated"]
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == receipt["bytes_allocated"]
