"""A sharded run, rehearsed in one process without its memory: bytes of each rank, and bytes that each collective moves.

The process group is torch's fake one, in which this process is rank 0 of as many as are asked for and collectives return at
once; tensors are fake (FakeTensorMode), with sizes and without storage. All else is what a run does: the model is built and
sharded by Placement, grown by growth.grow with its optimizer, and trained for steps of two micro-batches.

A whole model is built, grown and updated. Steps are traced at two small depths: what they take is a sum over layers, and is
drawn on to the depth that is asked for. The mesh is one of CPU ranks, where FSDP2 runs its code for GPUs, without streams.
"""

import contextlib
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanostack import growth
from nanostack.config import Train
from nanostack.growth import Growth
from nanostack.kernels import dispatch
from nanostack.memory import Live, MemoryEstimate
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import AdamW, Muon, guarded_step, make_optimizer
from nanostack.parallel import Placement, check_gathering, fake_ranks, mesh_shape, place, sync_gradients

DEPTHS = (3, 5)  # layers of the models whose steps are traced, beside those that are gathered further ahead


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this rank sends in collectives, by phase and kind, as a ring of n ranks sends them.

    all-gather: n − 1 times its own part. reduce-scatter: (n − 1) / n of what it puts in. all-reduce: twice that.
    all-to-all: all but what it keeps, which is taken for 1 / n.
    """

    def __init__(self):
        super().__init__()
        self.phase = ""
        self.sent: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its own operations, on local shards, come here by themselves
        if op in KINDS:
            kind, place, times = KINDS[op]
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            n = _ranks_of(args)
            if n > 1:
                self.sent[self.phase, kind] += round(times(n) * sum(tensor.nbytes for tensor in tensors))
        elif op.namespace in ("c10d", "_c10d_functional") and "wait_tensor" not in str(op) and "_wrap_tensor" not in str(op):
            raise NotImplementedError(f"{op}: how many bytes it moves is not known here")
        return op(*args, **(kwargs or {}))


def _ranks_of(arguments: tuple) -> int:
    """The number of ranks of the group that a collective is given, as an object or by its name."""
    for one in arguments:
        if isinstance(one, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):  # an operation of reduction is such an object, too
                return dist.ProcessGroup.unbox(one).size()
    name: Any = next(one for one in arguments[::-1] if isinstance(one, str))
    return dist.distributed_c10d._resolve_process_group(name).size()


KINDS = {  # the kind, the argument that counts, and how many times its bytes are sent in a group of n
    torch.ops.c10d._allgather_base_.default: ("all-gather", 1, lambda n: n - 1),
    torch.ops.c10d._reduce_scatter_base_.default: ("reduce-scatter", 1, lambda n: (n - 1) / n),
    torch.ops.c10d.allreduce_.default: ("all-reduce", 0, lambda n: 2 * (n - 1) / n),
    torch.ops.c10d.alltoall_base_.default: ("all-to-all", 1, lambda n: (n - 1) / n),
    torch.ops._c10d_functional.all_reduce.default: ("all-reduce", 0, lambda n: 2 * (n - 1) / n),
    torch.ops._c10d_functional.all_gather_into_tensor.default: ("all-gather", 0, lambda n: n - 1),
}


@dataclass(frozen=True)
class Step:
    """What steps take on rank 0, in bytes. `sent` holds, by phase and kind, what a micro-batch or an update sends."""

    weights: int
    gradients: int
    moments: int
    gathered: int  # most bytes of parameters that are whole at a time, in the compute dtype
    at_loss: int  # all that is there when the loss is computed, without the loss's own scratch
    else_: int  # the peak of forward and backward
    update: int  # the peak of the optimizer
    sent: dict[tuple[str, str], int]

    def drawn_on(self, other: "Step", layers: float) -> "Step":
        """This step, by so many times the way to the other one, which has more layers."""

        def line(one: int, two: int) -> int:
            return round(one + layers * (two - one))

        numbers = {name: line(value, getattr(other, name)) for name, value in vars(self).items() if name != "sent"}
        sent = {key: line(self.sent.get(key, 0), other.sent.get(key, 0)) for key in {**self.sent, **other.sent}}
        return Step(**numbers, sent=sent)


@dataclass(frozen=True)
class Grown:
    """Bytes on rank 0 of weights and moments before the last growth, at its peak and after it, and all bytes of an update."""

    before: int
    peak: int
    after: int
    update: int


@dataclass(frozen=True)
class Rehearsal:
    """A config's largest stage on so many ranks."""

    shape: tuple[int, int]  # (replicate, shard)
    memory: MemoryEstimate
    gathered: int  # bytes of gathered parameters at their most, in memory.transient
    micro_steps: int
    sent: dict[tuple[str, str], int]  # by a rank in one step, by (forward, backward or update; kind of collective)
    grown: Grown | None


def step_of(
    config: Train, model: LlamaConfig, placement: Placement, on_triton: bool, sequences: int, micro_steps: int = 2
) -> Step:
    """Trace steps of a model at its own depth."""
    with FakeTensorMode(), Live() as live, dispatch.traced(on_triton), Traffic() as traffic:
        tokens = torch.empty((sequences, model.seq_len), dtype=torch.int64)
        llama = placement.model(model)
        weights = live.now - tokens.nbytes
        _micro_batch(llama, tokens, traffic, "first")
        gradients = live.now - tokens.nbytes - weights
        optimizer = _optimizer(llama, config, on_triton)
        _update(optimizer, traffic)  # which frees the gradients
        moments = live.now - tokens.nbytes - weights
        live.peak, live.most_gathered = live.now, live.gathered
        traffic.sent.clear()
        for number in range(min(2, micro_steps)):
            last = number + 1 == min(2, micro_steps)
            sync_gradients(llama, now=last)
            _micro_batch(llama, tokens, traffic, "last" if last else "each")
        at_loss, else_, live.peak = live.at_loss, live.peak, live.now
        _update(optimizer, traffic)
        states = (weights, gradients, moments)
        return Step(*states, live.most_gathered, at_loss, else_, live.peak, dict(traffic.sent))


def _micro_batch(model: Llama, tokens: Tensor, traffic: Traffic, name: str) -> None:
    traffic.phase = f"{name} forward"
    loss = model(tokens, tokens) / 2
    traffic.phase = f"{name} backward"
    loss.backward()


def _update(optimizer: AdamW, traffic: Traffic) -> None:
    traffic.phase = "update"
    guarded_step(optimizer, torch.zeros(()), 1e-3, 1.0)


def _optimizer(model: Llama, config: Train, on_triton: bool) -> AdamW:
    optimizer = make_optimizer(model, config.optim)
    if isinstance(optimizer, Muon):
        optimizer.orthogonalise_in = torch.bfloat16 if on_triton else torch.float32
    return optimizer


def growth_of(config: Train, base: LlamaConfig, growths: list[Growth], placement: Placement, on_triton: bool) -> Grown:
    """Build the base, grow it, and update the grown model. Every operator but `learn`, which reads text."""
    with FakeTensorMode(), Live() as live, dispatch.traced(on_triton):
        model = placement.model(base)
        optimizer = _optimizer(model, config, on_triton)
        before = peak = 0
        for how in growths:
            _step_on_zeros(model, optimizer)
            before = live.peak = live.now
            growth.grow(model, optimizer, how, placement.hooks())
            peak = live.peak
            growth.set_ramp(model, 1.0)  # what is random counts in full before the next growth
        after = live.now
        _step_on_zeros(model, optimizer)  # which makes the moments
        live.peak = live.now
        _step_on_zeros(model, optimizer)
        return Grown(before, peak, after, live.peak)


def _step_on_zeros(model: Llama, optimizer: AdamW) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guarded_step(optimizer, torch.zeros(()), 1e-3, 1.0)


def rehearse(config: Train, dtype: torch.dtype, on_triton: bool, count: int, with_growth: bool = True) -> Rehearsal:
    """What the config's largest stage takes and sends on `count` ranks. UserError for a mesh that does not fit.

    `config.model.vocab_size` must be given.
    """
    shape = mesh_shape(config.parallel, count)
    check_gathering(config.parallel, shape[1])
    model = config.shapes()[-1]
    micro_steps = -(-config.batch_tokens // (model.seq_len * config.micro_batch * count))
    growths = [stage.growth for stage in config.stages if stage.growth]
    with fake_ranks(shape) as mesh:
        placement = place(config.parallel, torch.device("cpu"), dtype, mesh)
        depths = [config.parallel.prefetch + n for n in DEPTHS]

        def whole(sequences: int) -> Step:
            few, more = (
                step_of(config, replace(model, n_layer=n), placement, on_triton, sequences, micro_steps) for n in depths
            )
            return few.drawn_on(more, (model.n_layer - depths[0]) / (depths[1] - depths[0]))

        one, two = whole(1), whole(2)
        grown = None
        if with_growth and growths and not any(how.width or how.learning_steps() for how in growths):
            grown = growth_of(config, config.model, growths, placement, on_triton)
    memory, sent = _estimate(config, one, two, grown), _of_a_step(one, micro_steps)
    return Rehearsal(shape, memory, one.gathered, micro_steps, sent, grown)


def _estimate(config: Train, one: Step, two: Step, grown: Grown | None) -> MemoryEstimate:
    fixed = {"weights, fp32": one.weights, "gradients, fp32": one.gradients, f"moments, {config.optim.moments}": one.moments}
    stays = sum(fixed.values())
    each = (two.at_loss - one.at_loss, two.else_ - one.else_)
    transient = (one.at_loss - each[0] - stays, one.else_ - each[1] - stays)
    return MemoryEstimate(fixed, each, transient, max(one.update, grown.update if grown else 0) - stays)


def _of_a_step(step: Step, micro_steps: int) -> dict[tuple[str, str], int]:
    """What a rank sends in a step: micro-batches but for the last, the last, the update."""
    sent: dict[tuple[str, str], int] = defaultdict(int)
    for (phase, kind), size in step.sent.items():
        name, _, direction = phase.rpartition(" ")
        sent[direction, kind] += size * (micro_steps - 1 if name == "each" else 1)
    return dict(sent)
