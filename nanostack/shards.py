"""A parameter, and the part of it that this rank holds: under FSDP2 a DTensor, elsewhere the tensor itself."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The part of the tensor on this rank, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full value of a tensor on every rank (a collective where it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, or into this rank's shard what belongs there."""
    if isinstance(parameter, DTensor):
        parts = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(parts.to_local())
    else:
        parameter.copy_(value)
