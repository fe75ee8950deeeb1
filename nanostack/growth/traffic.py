"""Counts the bytes that go between host and device while a model grows."""

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostTraffic(TorchDispatchMode):
    """Within it, `bytes` adds up the copies of tensors from one kind of device to another; on a CPU alone there are none.

    It sees `copy_` and `to`. It does not see a tensor that is made on a device from Python numbers, nor `item()`.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its own operations, on local shards, come here by themselves
        out = op(*args, **(kwargs or {}))
        if op in COPIES:
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
            if len({tensor.device.type for tensor in tensors}) > 1:
                self.bytes += tensors[-1].nbytes
        return out


COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
