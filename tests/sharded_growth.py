"""Run by tests/trainer/test_parallel.py on two gloo ranks: train, grow sharded, look inside, train on, save."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from nanostack import checkpoint, muon, parallel
from nanostack.config import Growth, Optim, Parallel, Stage
from nanostack.errors import UserError
from nanostack.model import LlamaConfig
from nanostack.optimizer import guarded_step
from nanostack.shards import local_shard
from nanostack.state import State

CONFIG = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16)


def gradients(state: State) -> torch.Tensor:
    rows = slice(4 * parallel.rank() // parallel.world_size(), 4 * (parallel.rank() + 1) // parallel.world_size())
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))[rows]
    loss = state.model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    state.cursor.advance(4, state.model.config)
    return parallel.mean(loss.detach())


def train(state: State, steps: int) -> None:
    for _ in range(steps):
        guarded_step(state.optimizer, gradients(state), 1e-2, 1.0)


def roots(state: State) -> list[str]:
    named = ((name, m) for name, m in state.model.named_modules() if isinstance(m, FSDPModule))
    return [name for name, module in named if module._get_fsdp_state()._is_root]


def skip(state: State) -> None:
    """A step whose gradient is not finite on one rank changes nothing on any."""
    held = {name: value.clone() for name, value in everything(state)}

    def spoil(norm, arguments) -> None:
        arguments[0].register_hook(lambda gradient: gradient * (torch.nan if parallel.rank() == 1 else 1.0))

    hook = state.model.norm.register_forward_pre_hook(spoil)
    loss = gradients(state)
    hook.remove()
    assert loss.isfinite()
    _, skipped = guarded_step(state.optimizer, loss, 1e-2, 1.0)
    assert skipped == 1 and all(torch.equal(value, held[name]) for name, value in everything(state))


def everything(state: State):
    """(name, this rank's part) of every weight and of what the optimizer keeps."""
    for name, p in state.model.named_parameters():
        yield name, p.to_local()
        for key, value in state.optimizer.state[p].items():
            yield f"{name}.{key}", local_shard(value)


def main(out: str, placement: parallel.Placement, how: Growth, optim: Optim, shape: LlamaConfig) -> None:
    shard = placement.shards
    state = State.create(shape, optim, placement, seed=3)
    train(state, 2)
    skip(state)
    checkpoint.save(state, f"{out} base.pt")
    held = {name: p.to_local().data_ptr() for name, p in state.model.named_parameters()}
    with pytest.raises(UserError, match="a sharded model does not grow in width"):
        state.grow(Growth(width="split", d_model=64))
    if how.op == "learn":
        receipt = state.grow(how, gradients=lambda: gradients(state))
    else:
        with CommDebugMode() as collectives:
            receipt = state.grow(how)
        assert collectives.get_total_counts() == 0, collectives.get_comm_counts()
    after = {name: p.to_local().data_ptr() for name, p in state.model.named_parameters()}
    moved = {held[name] for name in held} - set(after.values())
    assert not moved, "a base shard moved"
    assert len(set(after.values())) == len(after)
    new = [b for b, rule in zip(state.model.blocks, receipt["rules"], strict=True) if rule != "kept"]
    local = sum(p.to_local().nbytes for b in new for p in b.parameters())
    assert receipt["bytes_allocated"] >= local and (how.moments().new != "zero" or receipt["bytes_allocated"] == local)
    checkpoint.save(state, f"{out} grown.pt")
    if how.op == "insert":
        held = {name: p.to_local().clone() for name, p in state.model.named_parameters()}
        state.freeze(Stage(1, lr=1.0, freeze=True))
        train(state, 1)
        loss = gradients(state)
        assert not state.dead()
        guarded_step(state.optimizer, loss, 1e-2, 1.0)
        same = {name for name, p in state.model.named_parameters() if torch.equal(p.to_local(), held[name])}
        assert same == {name for name in held if not name.startswith(("blocks.1.", "blocks.3."))}
        state.freeze(Stage(1, lr=1.0))
    train(state, 2)
    assert roots(state) == [""], roots(state)
    assert all(isinstance(block, FSDPModule) for block in state.model.blocks)
    for p in state.model.blocks.parameters():
        assert isinstance(p, DTensor) and p.to_local().numel() * shard == p.numel(), "a block stayed gathered"
    with torch.no_grad():  # after a forward alone the blocks are sharded again too
        state.model(torch.zeros(1, 16, dtype=torch.long))
    assert all(isinstance(p, DTensor) for p in state.model.blocks.parameters())
    contexts = {id(m._get_fsdp_state()._state_ctx) for m in state.model.modules() if isinstance(m, FSDPModule)}
    assert len(contexts) == 1
    checkpoint.save(state, f"{out} trained.pt")
    accumulate(state)


def accumulate(state: State) -> None:
    """Gradients of two micro-batches add up, and between them no rank holds whole ones."""
    gradients(state)
    once = [p.grad.to_local().clone() for p in state.model.parameters()]
    state.optimizer.zero_grad()
    for now in (False, True):
        parallel.sync_gradients(state.model, now)
        gradients(state)
        groups = [m._get_fsdp_state()._fsdp_param_group for m in state.model.modules() if isinstance(m, FSDPModule)]
        assert not [p for group in groups for p in group.fsdp_params if p.unsharded_accumulated_grad is not None]
    for p, gradient in zip(state.model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad.to_local(), 2 * gradient)


if __name__ == "__main__":
    folder, cases = sys.argv[1], json.loads(sys.argv[2])
    first = parallel.start(Parallel(dp_shard=2), "float32", compile=False)
    muon.PIECE = 2000  # so that a model so small goes in several pieces
    for name, (shard, how, optim, shape) in cases.items():
        mesh = init_device_mesh("cpu", parallel.mesh_shape(Parallel(dp_shard=shard), 2), mesh_dim_names=("replicate", "shard"))
        main(f"{folder}/{name}", replace(first, mesh=mesh), Growth(**how), Optim(optim), replace(CONFIG, **shape))
    parallel.leave()
