"""How many bytes a training step takes, and how large a micro-batch fits, before a GPU is there.

A training step of the config is traced on tensors without storage (torch's FakeTensorMode, which knows their sizes), and
every storage is counted while it lives. Two traces, of one sequence and of two, give what does not depend on the micro-batch
and what each sequence adds; both are exact but for what libraries take for themselves (RESERVED) and the allocator's rounding.
On several GPUs the states are divided by the shards and FSDP2's gathered copies added by formula, as a run checks at its start;
`nanostack fit` traces those as well (rehearsal.py).
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nanostack import gpus
from nanostack.config import Train
from nanostack.errors import UserError
from nanostack.flops import n_params
from nanostack.growth import Growth
from nanostack.kernels import dispatch
from nanostack.kernels.linear_cross_entropy import scratch_bytes
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import Muon, make_optimizer, state_numbers
from nanostack.parallel import Placement

GIB = 2**30
RESERVED = 2 * GIB  # CUDA context, cuBLAS and Triton workspaces, what the allocator rounds up


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a step on one device: what stays, and what a micro-batch of so many sequences adds at the peak."""

    fixed: dict[str, int] = field(default_factory=dict)
    per_sequence: tuple[int, int] = (0, 0)  # what a sequence adds when the loss is computed, and at the peak of the rest
    transient: tuple[int, int] = (0, 0)  # what is there besides at these moments, at any micro-batch
    update: int = 0  # what the optimizer takes besides, when there are no activations

    def peak(self, sequences: int, scratch: int) -> int:
        at_loss, else_ = (more + sequences * each for more, each in zip(self.transient, self.per_sequence, strict=True))
        return sum(self.fixed.values()) + max(at_loss + scratch, else_, self.update)

    def sequences(self, room: float, scratch) -> int:
        """The most that fit into `room` bytes; `scratch(sequences)` are the bytes that the loss needs."""
        most = 0
        for step in (2**i for i in reversed(range(20))):
            if self.peak(most + step, scratch(most + step)) <= room:
                most += step
        return most


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live; those on the meta device are none.

    FSDP2 gathers into one buffer, copies out of it into storages, and frees these by resizing them to nothing. `gathered` are
    the bytes of both.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.at_loss = self.gathered = self.most_gathered = 0
        self._sizes: dict[int, int] = {}
        self._gathered: set[int] = set()

    def __enter__(self) -> "Live":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            self._follow(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its own operations, on local shards, come here by themselves
        out = op(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        if op is torch.ops.fsdp.all_gather_copy_in.default:
            self._follow(out[1].untyped_storage())
        if op is torch.ops.nanostack.linear_cross_entropy_rows.default:
            self.at_loss = self.now
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._sizes or tensor.is_meta:
            return
        self._sizes[key] = 0
        self._changed(key, storage.nbytes())
        weakref.finalize(storage, self._remove, key)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self._sizes:
            self.gathered += 0 if key in self._gathered else self._sizes[key]
            self._gathered.add(key)
            self._changed(key, storage.nbytes())

    def _changed(self, key: int, n_bytes: int) -> None:
        more, self._sizes[key] = n_bytes - self._sizes[key], n_bytes
        self.now += more
        self.peak = max(self.peak, self.now)
        if key in self._gathered:
            self.gathered += more
            self.most_gathered = max(self.most_gathered, self.gathered)

    def _remove(self, key: int) -> None:
        self._changed(key, 0)
        self._gathered.discard(key)
        del self._sizes[key]


class Traced(NamedTuple):
    """Bytes of a step: what stays through it, and all that is there at its three peaks."""

    fixed: dict[str, int]
    at_loss: int  # without the loss's own scratch, which hides in one operation
    else_: int  # forward and backward
    update: int  # the optimizer


def trace(config: Train, model: LlamaConfig, dtype: torch.dtype, on_triton: bool, sequences: int) -> Traced:
    """Trace steps of one micro-batch each."""
    placement = Placement(torch.device("cpu"), dtype, None, config.parallel.activation_checkpointing)
    with torch.device("meta"):
        llama = Llama(model)
    for block in llama.blocks:
        placement.block(block)
    with FakeTensorMode(), Live() as live, dispatch.traced(on_triton):
        fixed = {}
        for module, name, value in _tensors_of(llama):
            made = torch.empty(value.shape, dtype=value.dtype)
            setattr(module, name, nn.Parameter(made) if isinstance(value, nn.Parameter) else made)
        if model.tie_embeddings:
            llama.head.weight = llama.embed.weight  # type: ignore[assignment]
        fixed["weights, fp32"] = live.now
        llama.compute_dtype, llama.keeps_compute_weights = dtype, dtype != torch.float32
        tokens = torch.empty((sequences, model.seq_len), dtype=torch.int64)
        if llama.keeps_compute_weights:
            llama.refresh()
            fixed["copies of weights"] = live.now - sum(fixed.values())
        (llama(tokens, tokens) / 2).backward()
        fixed["gradients, fp32"] = live.now - sum(fixed.values())
        optimizer = make_optimizer(llama, config.optim)
        if isinstance(optimizer, Muon):
            optimizer.orthogonalise_in = torch.bfloat16 if on_triton else torch.float32
        optimizer.step()
        fixed[f"moments, {config.optim.moments}"] = live.now - sum(fixed.values())
        live.peak = live.now
        (llama(tokens, tokens) / 2).backward()  # a further micro-batch, which finds gradients there
        at_loss, else_, live.peak = live.at_loss, live.peak, live.now
        optimizer.step()
        return Traced(fixed, at_loss, else_, live.peak)


def _tensors_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield module, name, value


def estimate(config: Train, model: LlamaConfig, dtype: torch.dtype, on_triton: bool, count: int = 1) -> MemoryEstimate:
    """What a step of the config needs on each of `count` devices that it is sharded over, from above."""
    one, two = (trace(config, model, dtype, on_triton, sequences) for sequences in (1, 2))
    fixed, stays = one.fixed, sum(one.fixed.values())
    loss_each, else_each = two.at_loss - one.at_loss, two.else_ - one.else_
    at_loss, else_ = one.at_loss - loss_each - stays, one.else_ - else_each - stays
    if count > 1:
        block = sum(math.prod(shape) for shape in _block_shapes(model))
        root = (1 if model.tie_embeddings else 2) * model.vocab_size * model.d_model
        after, ahead = config.parallel.reshard_after_forward, 2 + config.parallel.prefetch
        kept = 0 if after is None or after is True else model.n_layer * block // (after or 1)  # from forward to backward
        gathered = dtype.itemsize * (ahead * block + kept + root) + 4 * (block + root)  # and gradients on their way
        fixed = {name: -(-size // count) for name, size in fixed.items() if name != "copies of weights"}
        fixed["gathered by FSDP2 (estimate)"] = gathered
    return MemoryEstimate(fixed, (loss_each, else_each), (at_loss, else_), one.update - stays)


def _block_shapes(model: LlamaConfig) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [p.shape for p in Llama(replace(model, n_layer=1)).blocks[0].parameters()]


def scratch_of(model: LlamaConfig, dtype: torch.dtype, on_triton: bool) -> Callable[[int], int]:
    """Sequences to the bytes that the loss takes for itself."""
    sizes = (model.d_model, model.vocab_size, dtype.itemsize, on_triton)
    return lambda sequences: scratch_bytes(sequences * model.seq_len, *sizes)


def check_batch(
    config: Train, model: LlamaConfig, dtype: torch.dtype, on_triton: bool, free: float, slack: float = 1.0, count: int = 1
) -> None:
    """Raise `UserError`, which says what would fit, where the config's micro-batch needs more than `slack` times `free` bytes.

    A trace takes seconds: it is made only where a bound from above, which costs nothing, does not fit into half of them.
    """
    room = slack * free
    per_token = 4 * (model.depth * (16 * model.d_model + 8 * model.d_ff) + 2 * model.vocab_size)
    states = 18 * n_params(model)  # of several devices not divided: a bound
    if states + config.micro_batch * model.seq_len * per_token < room / 2:
        return
    scratch = scratch_of(model, dtype, on_triton)
    wanted = estimate(config, model, dtype, on_triton, count).peak(config.micro_batch, scratch(config.micro_batch))
    if wanted <= room:
        return
    most = {}
    for how in ("none", "selective", "full"):
        one = replace(config, parallel=replace(config.parallel, activation_checkpointing=how))
        most[how] = estimate(one, model, dtype, on_triton, count).sequences(room, scratch)
    said = ", ".join(f"{size} with --parallel.activation_checkpointing {how}" for how, size in most.items() if size)
    raise UserError(
        f"micro_batch {config.micro_batch} needs about {wanted / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; "
        + (f"what fits: {said}" if said else "not even one sequence fits: the model is too large for this device")
    )


def capacity(gpu: str) -> float:
    """Bytes that torch can have of a GPU by name (nanostack.gpus), or of a number of GiB. UserError for another word."""
    with contextlib.suppress(ValueError):
        known = gpus.find(gpu)
        gib = float(gpu) if known is None else known.memory_gib or 0
        if 0 < gib < 2**20:
            return gib * GIB
    names = ", ".join(one.name for one in gpus.GPUS if one.memory_gib)
    raise UserError(f"gpu is one of {names}, or a number of GiB, not {gpu!r}")


def grown_state(base: LlamaConfig, how: Growth, optimizer: str | None) -> int:
    """Numbers that the state of `optimizer` holds after a growth: new layers whose moments are zero have none yet."""
    plan = how.plan(base)
    if (plan.moments.old, plan.moments.new) == ("zero", "zero"):
        return 0
    return state_numbers(base if plan.moments.new == "zero" and not how.width else plan.config, optimizer)


def growth_bytes(base: LlamaConfig, how: Growth, optimizer: str | None) -> int:
    """Bytes of weights and of the state of `optimizer` (None: it has none) on one device while a model grows."""
    plan = how.plan(base)
    old, whole = n_params(base), n_params(plan.config)
    numbers = whole + max(grown_state(base, how, optimizer), state_numbers(base, optimizer))
    if how.width or how.noise:  # the largest tensor is there twice
        numbers += max(plan.config.vocab_size, 2 * plan.config.d_ff) * plan.config.d_model
    if plan.learns:  # the old weights, and gradients of the new ones
        numbers += old + whole
    return 4 * numbers


def foresee(base: LlamaConfig, how: Growth, optimizer: str | None, dtype: torch.dtype) -> dict:
    """The map of a growth, the sizes of both models, the bytes that it takes on the device, and those that are written."""
    plan = how.plan(base)
    new = n_params(plan.config)
    size = {"n_params_before": n_params(base), "n_params": new, "bytes_needed": growth_bytes(base, how, optimizer)}
    size |= {"bytes_written": dtype.itemsize * (new + grown_state(base, how, optimizer))}
    size |= {"preserves": plan.preserves and not how.noise}
    return {"growth": vars(how)} | plan.map() | {"shape": vars(plan.config)} | size
