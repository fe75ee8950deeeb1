"""Where a model lives: its device, its precision, its mesh. The one parallel mechanism is FSDP2 on a (replicate, shard) mesh.

A model is built without storage, each block is prepared (activation checkpointing, compile, sharding, in that order), then
it gets storage and values. Nothing here changes what is computed; one device is simply a mesh that is not there.
"""

import contextlib
import functools
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanostack.config import Parallel
from nanostack.device import compute_dtype, open_device
from nanostack.errors import UserError
from nanostack.growth import Hooks
from nanostack.launch import Launch, check_environment, connect
from nanostack.model import Llama, LlamaConfig
from nanostack.shards import assign


@dataclass(frozen=True)
class Placement:
    device: torch.device
    dtype: torch.dtype = torch.float32
    mesh: DeviceMesh | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    reshard_after_forward: bool | int | None = None
    prefetch: int = 0
    launch: Launch | None = None  # of several ranks, or by torchrun
    _between_passes: list = field(default_factory=list, init=False, compare=False, repr=False)
    """What FSDP2 knows of the smaller mesh that blocks lie on between forward and backward, once there is one."""

    def block(self, block: nn.Module) -> nn.Module:
        """Prepare one block; it may be without storage still."""
        if self.activation_checkpointing != "none":
            # A bound method, not a partial: torch.compile traces through it, and would silently give up at the other.
            block.forward = types.MethodType(_checkpointed, block)
            block.keeps_products = self.activation_checkpointing == "selective"  # type: ignore[assignment]
        if self.compile:
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # a ramp's hooks come and go: see them
            torch._dynamo.config.recompile_limit = 64  # ramps, frozen layers and widths are graphs of their own
            block.compile()
        return self._shard(block, self.reshard_after_forward)

    def model(self, config: LlamaConfig) -> Llama:
        """A prepared model with storage but no values: `initialise` it or `assign` all of its parameters."""
        with torch.device("meta"):
            model = Llama(config)
        for block in model.blocks:
            self.block(block)
        self._shard(model).to_empty(device=self.device)
        if config.tie_embeddings and model.head.weight is not model.embed.weight:  # to_empty gives each name its own storage
            model.head.weight = model.embed.weight  # type: ignore[assignment]
        model.compute_dtype = self.dtype
        # FSDP2 has its own copies, shard by shard.
        model.keeps_compute_weights = self.mesh is None and self.dtype != torch.float32
        self._prefetch(model)
        return model

    def grown(self, model: Llama) -> None:
        """Make a sharded model whole again after blocks were added to it.

        FSDP2 decides at the first forward which module is the root, so a later block would become a root of its own: it
        would keep its parameters unsharded and prefetch nothing. Forgetting the decision makes the next forward take it
        anew. This is private API of torch, tested in tests/trainer/test_parallel.py.
        """
        for module in model.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                state._is_root = None
                state._state_ctx = type(state._state_ctx)()
        self._prefetch(model)

    def hooks(self) -> Hooks:
        """The hooks that a model in this place needs while it grows."""
        return Hooks(self.block, self.grown, assign, self.sum_shards)

    @property
    def shards(self) -> int:
        """In how many parts a parameter lies."""
        return 1 if self.mesh is None else self.mesh["shard"].size()

    def sum_shards(self, value: Tensor) -> None:
        """Add up, in place, a value of which each rank has the part that its shards make."""
        if self.mesh is not None:
            dist.all_reduce(value, group=self.mesh.get_group("shard"))

    def _shard(self, module: nn.Module, reshard_after_forward: bool | int | None = None) -> nn.Module:
        if self.mesh is None:
            return module
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if isinstance(reshard_after_forward, bool | None):
            fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)  # in place
            return module
        # FSDP2 makes process groups for every module that it is given a number for: as many communicators as blocks, and a
        # collective in the middle of a growth. All blocks share those of the first. This is private API of torch, tested in
        # tests/trainer/test_fsdp_options.py.
        first = not self._between_passes
        fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward if first else True)
        for group in module._get_fsdp_state()._fsdp_param_groups:  # type: ignore[operator, union-attr]
            if first:
                self._between_passes.append(group.post_forward_mesh_info)
                continue
            for holder in (group, *group.fsdp_params):
                holder.post_forward_mesh_info = self._between_passes[0]
            for parameter in group.fsdp_params:
                parameter._init_sharded_post_forward_param_metadata(torch.empty(parameter._orig_size, device="meta"))
        return module

    def _prefetch(self, model: Llama) -> None:
        """Tell every block which ones it gathers ahead of their turn."""
        ahead, blocks = self.prefetch, list(model.blocks)
        if self.mesh is None or not ahead:
            return
        for number, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(0, number - ahead) : number][::-1])
        model.set_modules_to_forward_prefetch(blocks[:ahead])  # type: ignore[operator]
        model.set_modules_to_backward_prefetch(blocks[-ahead:][::-1])  # type: ignore[operator]


def _checkpointed(block: nn.Module, *arguments: Tensor) -> Tensor:
    """The forward pass of a block that keeps its input, and what its products and attention give if `block.keeps_products`."""
    if not (arguments[0].requires_grad or any(p.requires_grad for p in block.parameters())):
        return type(block).forward(block, *arguments)  # frozen, and so is all before it: torch.compile fails at the other
    # There is no dropout, so no random state to stash: that would make a GPU wait.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if block.keeps_products:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(type(block).forward, block, *arguments, **options)


def _keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep what attention and products give, but for the last product (d_ff to d_model): nothing needs it again."""
    weight = args[PRODUCTS[op]] if op in PRODUCTS else None
    keep = op in ATTENTION or (weight is not None and weight.shape[0] <= weight.shape[1])
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}  # the place of the weight among the arguments
ATTENTION = (
    torch.ops.nanostack.flash_attention.default,
    torch.ops.nanostack.flash_attention_c.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def initialise(model: Llama, seed: int) -> None:
    """First values of a model, the same whatever the mesh."""
    model.init_weights(seed, write=assign)


def sync_gradients(model: Llama, now: bool) -> None:
    """Whether the next backward sums gradients over the replicas too. Every backward sums them over the shards: whole ones,
    kept from one micro-batch to the next, would be 4 bytes per parameter on every device."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)


def reshard(model: Llama) -> None:
    """Free what a forward without backward leaves gathered, so that parameters are the sharded ones again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_main_rank() -> bool:
    return rank() == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def micro_steps(batch_tokens: int, micro_batch: int, seq_len: int) -> int:
    """How many micro-batches of every rank make one step."""
    devices, sequences = world_size(), batch_tokens // seq_len
    together = micro_batch * devices
    if sequences % together == 0:
        return sequences // together
    below = sequences // together * together
    legal = [n * seq_len for n in (below, below + together) if n]
    divisors = [n for n in range(1, sequences + 1) if sequences % (n * devices) == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - micro_batch))[:2])
    raise UserError(
        f"batch_tokens {batch_tokens} is {sequences} sequences, which {devices} device(s) × micro_batch "
        f"{micro_batch} do not divide; nearest legal batch_tokens: {legal}"
        + (f"; nearest legal micro_batch: {near}" if near else "")
    )


START_PATIENCE = 8  # times hang_timeout: how long ranks wait for one that hashes a large corpus or writes a large checkpoint
_patient: "dist.ProcessGroup | None" = None  # waits so long
_patience = timedelta(hours=1)  # that time


def start(
    parallel: Parallel, dtype: str, compile: bool, cuda_graph: bool = False, hang_timeout: float = 900.0, out: str | None = None
) -> Placement:
    """Join the process group that torchrun describes, if any, and choose device, dtype and mesh.

    Messages between ranks fail a minute after hang_timeout, when the watchdog has told where each rank is. `out` is the folder
    of the run: where a signal has stopped an earlier attempt of this launch, this one ends.
    """
    check_environment()
    world = world_size()
    shape = mesh_shape(parallel, world)
    check_gathering(parallel, shape[1])
    cuda = torch.cuda.is_available()
    if cuda_graph and (world > 1 or not cuda):
        where = f"FSDP2, which {world} processes use, cannot be captured" if cuda else "this machine has no CUDA device"
        raise UserError(f"--cuda_graph: {where}; leave it out (--compile also launches fewer kernels)")
    device = open_device(int(os.environ.get("LOCAL_RANK", 0)), compile)
    timeout, patience = (timedelta(seconds=60 + times * hang_timeout) for times in (1, START_PATIENCE))
    launch, mesh = connect(patience), None
    if launch is not None and world > 1:
        # gloo stays beside nccl: flags and messages between ranks need no GPU.
        _join(launch, "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout, patience)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        for dimension in ("replicate", "shard"):
            dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(dimension))
    if launch is not None and out is not None and (code := on_rank_0(launch.stop_noted, Path(out))):
        if is_main_rank():
            print("note: a signal has stopped this run, so it ends when torchrun starts it anew; use --resume", file=sys.stderr)
        leave(code)
    return place(parallel, device, compute_dtype(device, dtype), mesh, compile, launch)


def place(
    parallel: Parallel,
    device: torch.device,
    dtype: torch.dtype,
    mesh: DeviceMesh | None,
    compile: bool = False,
    launch: Launch | None = None,
) -> Placement:
    """The placement that the config asks for, on a mesh that there is. Every rank must call it."""
    options = (parallel.activation_checkpointing, compile, parallel.reshard_after_forward, parallel.prefetch)
    placement = Placement(device, dtype, mesh, *options, launch)
    if not isinstance(parallel.reshard_after_forward, bool | None):  # its process groups are made now
        placement._shard(nn.Linear(1, 1, device="meta"), parallel.reshard_after_forward)
    return placement


def check_gathering(parallel: Parallel, shards: int) -> None:
    """Raise `UserError` where the options of when to gather parameters do not fit so many shards."""
    after = parallel.reshard_after_forward
    if shards == 1 and (after is not None or parallel.prefetch):
        raise UserError(
            "parallel.reshard_after_forward and parallel.prefetch say when parameters are gathered, and here every process has "
            "them whole: leave them out, or shard over several (--parallel.dp_shard)"
        )
    if not isinstance(after, bool | None) and (after >= shards or shards % after):
        legal = [n for n in range(2, shards) if shards % n == 0]
        raise UserError(
            f"parallel.reshard_after_forward {after} does not divide {shards} shards into several parts; "
            + (f"legal numbers: {legal}" if legal else "True and False are there")
        )


def _join(launch: Launch, backend: str, timeout: timedelta, patience: timedelta) -> None:
    """Join the process group of this attempt. It has keys of its own: the agent's store still holds the addresses of the
    processes that died."""
    global _patient, _patience
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's record of collectives, for the watchdog
    store = dist.PrefixStore(f"attempt_{launch.attempt}", launch.store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout)
    _patient, _patience = dist.new_group(backend="gloo", timeout=patience), patience


@contextlib.contextmanager
def fake_ranks(shape: tuple[int, int], rank: int = 0, device: str = "cpu") -> Iterator[DeviceMesh]:
    """The (replicate, shard) mesh of ranks of which this process is one, and no other is there: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which also makes the backend known

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=shape[0] * shape[1])
    try:
        yield init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    finally:
        dist.destroy_process_group()


def saving_group() -> "dist.ProcessGroup | None":
    """A process group for threads that save: their messages must not meet those of training. Shards may take long to write."""
    return dist.new_group(backend="gloo", timeout=_patience) if dist.is_initialized() else None


def mesh_shape(parallel: Parallel, world: int) -> tuple[int, int]:
    """(replicate, shard); what is not given takes all that is left, sharding first."""
    replicate = parallel.dp_replicate or (world // parallel.dp_shard if parallel.dp_shard else 1)
    shard = parallel.dp_shard or world // replicate
    if replicate < 1 or shard < 1 or replicate * shard != world or 0 in (parallel.dp_replicate, parallel.dp_shard):
        asked = f"parallel.dp_replicate {parallel.dp_replicate} × parallel.dp_shard {parallel.dp_shard}"
        raise UserError(f"{asked} does not make the number of processes, {world}")
    return replicate, shard


def on_rank_0(work, *args) -> Any:
    """Call `work(*args)` on rank 0 only and give every rank its result, or its `UserError`."""
    answer: list = [None, None]
    if rank() == 0:
        try:
            answer[0] = work(*args)
        except UserError as error:
            answer[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0, group=_patient, device=torch.device("cpu"))
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def mean(value: Tensor) -> Tensor:
    """The mean over all ranks of a scalar, without waiting for the device."""
    if dist.is_initialized():
        dist.all_reduce(value)  # gloo knows no average
        value = value / dist.get_world_size()
    return value


def leave(code: int = 0, launch: Launch | None = None) -> None:
    """End a rank's process with this exit code, when all ranks are here; one that is alone ends with it if it is not 0.

    A code that is not 0 is noted for attempts of this launch to come: a signal has stopped the run.

    Python is not shut down: a thread of gloo that drops its last reference to a tensor meanwhile wants the interpreter back,
    is refused, and takes the process with it ("terminate called without an active exception", one exit in ten).
    """
    if code and launch is not None and is_main_rank():
        launch.note_stop(code)
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
