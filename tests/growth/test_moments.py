"""What growth makes of the optimizer's state: moments by the map, groups that stay complete, rates of their own."""

import pytest
import torch
from test_growth import backward, trained

from nanostack import growth
from nanostack.config import Optim
from nanostack.growth.moments import COPY, RESET, Moments
from nanostack.optimizer import guarded_step, make_optimizer, set_rate_of


def test_copied_moments_and_steps_follow_the_map_and_reset_ones_are_zero():
    for state in (COPY, RESET):
        model, optimizer, _ = trained(steps=3)
        source = [optimizer.state[block.attn.qkv.weight] for block in model.blocks]
        source = [{key: value.clone() for key, value in s.items()} for s in source]
        growth.grow(model, optimizer, g=2, moments=state)
        for i, block in enumerate(model.blocks):
            mine = optimizer.state.get(block.attn.qkv.weight)
            if state is COPY:
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


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("old", ["keep", "zero", "scale"])
@pytest.mark.parametrize("new", ["copy", "zero", "scale"])
def test_moments_are_those_computed_by_hand(old, new, optim):
    model, optimizer, tokens = trained(steps=3, optim=Optim(optim))
    before = {p: {key: value.clone() for key, value in s.items()} for p, s in optimizer.state.items()}
    base = [dict(block.named_parameters()) for block in model.blocks]
    growth.grow(model, optimizer, g=2, moments=Moments(old, new, 0.5))
    power = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}
    for i, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            how, state = (old if i < 3 else new), optimizer.state.get(parameter, {})
            if how == "zero":
                assert not any(value.any() for value in state.values())
                continue
            for key, value in before[base[i % 3][name]].items():
                assert torch.equal(state[key], value * (0.5 ** power[key] if how == "scale" else 1)), (i, name, key)
    backward(model(tokens, tokens.roll(-1, 1)))
    optimizer.step()
    assert optimizer.state.keys() == set(model.parameters()), "it goes on"


def test_new_parameters_or_all_get_a_rate_of_their_own_and_give_it_back():
    model, optimizer, tokens = trained()
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    for expected in (6, 12):  # two growths, one after the other
        receipt = growth.grow(model, optimizer, g=2, moments=COPY)
        new = {
            p for block, rule in zip(model.blocks, receipt["rules"], strict=True) if rule != "kept" for p in block.parameters()
        }
        set_rate_of(model, optimizer, new, 0.5)
        assert len(model.blocks) == expected and len(optimizer.param_groups) == 4
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        guarded_step(optimizer, loss.detach(), 1e-2, 1.0)
        for group in optimizer.param_groups:
            assert group["lr"] == (5e-3 if group["params"][0] in new else 1e-2)
            assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0.0)
            assert all(p in new for p in group["params"]) or not any(p in new for p in group["params"])
    set_rate_of(model, optimizer, set(model.parameters()), 0.25)
    assert {group.get("rate", 1.0) for group in optimizer.param_groups if group["params"]} == {0.25}
    set_rate_of(model, optimizer, set(), 1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert [len(group["params"]) for group in optimizer.param_groups][:2] == [4 * sizes[0] - 3 * 2, 4 * sizes[1] - 3]
    anew = [group["params"] for group in make_optimizer(model, Optim()).param_groups]
    assert [list(map(id, group["params"])) for group in optimizer.param_groups[:2]] == [list(map(id, group)) for group in anew]


def test_another_optimizer_only_names_its_state():
    model, _, tokens = trained()
    for optimizer, known in (
        (torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9), True),
        (torch.optim.Adagrad(model.parameters(), 1e-2), False),
    ):
        model(tokens, tokens.roll(-1, 1)).backward()
        optimizer.step()
        if not known:
            with pytest.raises(ValueError, match="optimizer's sum is not known"):
                growth.grow(model, optimizer, g=2)
            assert model.config.n_layer == len(model.blocks) == 6, "it was touched"
            continue
        growth.grow(model, optimizer, g=2, moments=COPY)
        a, b = (optimizer.state[model.blocks[i].mlp.down.weight]["momentum_buffer"] for i in (0, 3))
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
