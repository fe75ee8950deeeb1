"""Run by tests/trainer/test_rehearsal.py on four gloo ranks: train and grow with each option of FSDP2, and measure a step."""

import gc
import json
import sys
from dataclasses import replace

import torch
from conftest import peak_bytes
from sharded_growth import CONFIG, gradients, roots
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from nanostack import kernels, parallel
from nanostack.config import Data, Growth, Optim, Parallel, Stage, Train
from nanostack.model import LlamaConfig
from nanostack.optimizer import guarded_step
from nanostack.rehearsal import Traffic
from nanostack.state import State

SHAPE = LlamaConfig(n_layer=6, n_head=4, n_kv_head=2, d_model=192, d_ff=512, vocab_size=1024, seq_len=256)
MEASURED = Train(Data(), SHAPE, (Stage(2**20, 1e-3),), batch_tokens=16 * 256, micro_batch=2, out="out")  # two micro-batches
OPTIONS = {
    "default": Parallel(),
    "kept": Parallel(reshard_after_forward=False),
    "in pairs": Parallel(reshard_after_forward=2),
    "ahead": Parallel(prefetch=2),
    "in pairs and ahead": Parallel(reshard_after_forward=2, prefetch=1),
}
MEASURED_WITH = {name: OPTIONS[name] for name in ("default", "kept", "in pairs and ahead")}


def losses(placement: parallel.Placement) -> dict:
    """Losses of steps around a growth, and how often parameters are gathered in the last of them."""
    state = State.create(CONFIG, Optim(), placement, seed=3)
    found = []

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = gradients(state)
            found.append(loss.item())
            guarded_step(state.optimizer, loss, 1e-2, 1.0)

    train(2)
    with torch.no_grad():  # leaves blocks gathered, where they stay so
        state.model(torch.zeros(1, 16, dtype=torch.long))
    with CommDebugMode() as collectives:
        state.grow(Growth("stack", 2, optimizer="copy"))
    assert collectives.get_total_counts() == 0, collectives.get_comm_counts()
    train(1)
    with CommDebugMode() as collectives:
        train(1)
    assert roots(state) == [""]
    blocks = list(state.model.blocks)
    states = [block._get_fsdp_state() for block in blocks]
    ahead = [[states.index(one) for one in each._states_to_forward_prefetch] for each in states]
    behind = [[states.index(one) for one in each._states_to_backward_prefetch] for each in states]
    between = [group.post_forward_mesh_info for each in states for group in each._fsdp_param_groups]
    if placement.reshard_after_forward == 2:
        assert len({id(info) for info in between}) == 1, "each block has process groups of its own"
    assert len({info and info.shard_mesh_size for info in between}) == 1, "new blocks do not lie as the old ones"
    for module in state.model.modules():
        assert not isinstance(module, FSDPModule) or all(isinstance(p, DTensor) for p in module.parameters())
    gathers = sum(n for op, n in collectives.get_comm_counts().items() if "allgather" in str(op) or "all_gather" in str(op))
    return {"losses": found, "gathers": gathers, "ahead": ahead, "behind": behind}


def measured(placement: parallel.Placement) -> dict:
    """Bytes that two steps hold at their peak, and what this rank sends in one."""
    kernels.set_backend("torch")
    tokens, traffic = torch.randint(SHAPE.vocab_size, (MEASURED.micro_batch, SHAPE.seq_len + 1)), Traffic()

    def step(state: State) -> None:
        for now in (False, True):
            parallel.sync_gradients(state.model, now)
            traffic.phase = "forward"
            loss = state.model(tokens[:, :-1], tokens[:, 1:]) / 2
            traffic.phase = "backward"
            loss.backward()
            del loss  # and with it the graph, as a run does
        traffic.phase = "update"
        guarded_step(state.optimizer, torch.zeros(()), 1e-3, 1.0)

    def steps() -> None:
        state = State.create(SHAPE, Optim(), placement, 0)
        step(state)
        step(state)

    gc.collect()  # what earlier models leave would be counted when it goes
    peak = peak_bytes(steps)
    state = State.create(SHAPE, Optim(), placement, 0)
    with traffic:
        step(state)
    return {"peak": peak, "sent": [[*key, size] for key, size in sorted(traffic.sent.items())]}


if __name__ == "__main__":
    first = parallel.start(Parallel(), "float32", compile=False)
    answer: dict = {}
    for name, options in OPTIONS.items():
        answer[name] = losses(parallel.place(options, first.device, first.dtype, first.mesh))
    for name, options in MEASURED_WITH.items():
        answer[name] |= measured(parallel.place(options, first.device, first.dtype, first.mesh))
    hybrid = parallel.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    answer["hybrid"] = measured(replace(first, mesh=hybrid))
    if parallel.is_main_rank():
        with open(sys.argv[1], "w") as file:
            json.dump(answer, file)
    parallel.leave()
