"""Growth by a trained map (LiGO, arXiv 2303.00980; G_learn of arXiv 2405.15319).

    depth    W'_i = Σ_j D_ij W_j, with one L × l matrix D per kind of weight: q, k, v, out, gate, up, down, biases, norms
    width    W' = B_out W B_inᵀ, with one matrix B per axis, shared by all layers; gains of heads stay

D starts as stacked identities (which is stack), B as the identity above rows of N(0, 1/width). The old weights W stay as they
are; D or B is trained on the loss of the grown model for some steps, then W' is what trains on. The grown model computes
its own gradients, sharded and compiled as it is, and the chain rule takes them to the matrices: a shard's part is summed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanostack.errors import UserError
from nanostack.growth.width import Maps, Width, axes, kind, stored_axes
from nanostack.model import Llama, LlamaConfig, initial_value
from nanostack.schedule import cosine
from nanostack.shards import local_shard

PEAK, END = 7e-5, 7e-6  # learning rate of the matrices: up to the peak over half of the steps, then down along a cosine


class DepthMap:
    """D for every kind of weight in `model.blocks`, which hold the base of `n_base` layers stacked."""

    def __init__(self, model: Llama, n_base: int, write: Callable[[Tensor, Tensor], object]):
        config, L = model.config, len(model.blocks)
        parts = {"attn.qkv": [config.n_head, *[config.n_kv_head] * 2], "mlp.gate_up": [1, 1]}
        self.base, self.D, self.part_of_row = {}, {}, {}
        for name, parameter in model.blocks[0].named_parameters():
            same = [dict(block.named_parameters())[name] for block in model.blocks[:n_base]]
            self.base[name] = torch.stack([local_shard(p).detach() for p in same])
            sizes = parts.get(name.rpartition(".")[0], [1])
            stacked = torch.eye(n_base, device=self.base[name].device).repeat(-(-L // n_base), 1)[:L]
            self.D[name] = stacked.expand(len(sizes), L, n_base).clone().requires_grad_()
            if len(sizes) > 1:
                unit = parameter.shape[0] // sum(sizes)
                parts_of_rows = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes) * unit)
                labels = torch.empty_like(parameter, requires_grad=False)  # sharded as the weight is
                write(labels, parts_of_rows.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape).to(labels))
                self.part_of_row[name] = local_shard(labels).unsqueeze(-1).flatten(1)[:, 0].long()
        self.matrices = list(self.D.values())

    def __call__(self, name: str) -> Tensor | None:
        """The mixed value of a parameter, or of this rank's shard; None for one that is not mixed."""
        if not name.startswith("blocks."):
            return None
        layer, name = int(name.split(".")[1]), kind(name)
        D = self.D[name][:, layer]
        if name not in self.part_of_row:
            return torch.tensordot(D[0], self.base[name], 1)
        return torch.einsum("rj,jr...->r...", D[self.part_of_row[name]], self.base[name])


class WidthMap:
    """B for every axis of a model that is about to be widened; it keeps the narrow weights."""

    def __init__(self, model: Llama, grown: LlamaConfig, maps: Maps, seed: int):
        config = model.config
        self.base = {name: parameter.detach() for name, parameter in model.named_parameters()}
        device = next(iter(self.base.values())).device
        heads, kv = maps["heads"], maps["qkv"].source[grown.n_head * grown.head_dim :][: grown.n_kv_head * grown.head_dim]
        kv = torch.where(kv < 0, -1, kv - config.n_head * config.head_dim)
        sources = {"model": maps["model"].source, "q": heads.source, "k": kv, "v": kv, "ff": maps["ff"].source}
        if config.n_head != config.n_kv_head or grown.n_head != grown.n_kv_head:
            sources["heads"] = heads.source  # what out reads: with fewer values than queries it needs a B of its own
        self.B = {axis: _extended(axis, source, grown, seed, device) for axis, source in sources.items()}
        self.B.setdefault("heads", self.B["v"])
        self.parts = {axis: [axis] for axis in self.B} | {"qkv": ["q", "k", "v"], "gate_up": ["ff", "ff"]}
        self.matrices = [self.B[axis] for axis in sources]

    def __call__(self, name: str) -> Tensor:
        value, named = self.base[name], stored_axes(name)
        if value.ndim > 1 and named[1] is not None:
            value = value @ self.B[named[1]].T
        if named[0] is None:
            return value
        rows = [self.B[part] for part in self.parts[named[0]]]
        return torch.cat([B @ part for B, part in zip(rows, value.split([B.shape[1] for B in rows]), strict=True)])


def width_map(model: Llama, how: Width, seed: int) -> WidthMap:
    """B for the growth in width `how` of a model that is narrow still."""
    wide = how.config(model.config)
    return WidthMap(model, wide, axes(model.config, wide, how, next(model.parameters()).device), seed)


def _extended(axis: str, source: Tensor, config: LlamaConfig, seed: int, device: torch.device) -> Tensor:
    """(new, old): the identity where there is a source, else rows of N(0, 1/new)."""
    shape = torch.Size((len(source), int(source.max()) + 1))
    rows = initial_value(f"learn:{axis}", shape, config, seed, device) * (5 * shape[1] / (2 * shape[0])) ** 0.5
    has_source = source >= 0
    rows[has_source] = nn.functional.one_hot(source[has_source], shape[1]).to(rows.dtype)
    return rows.requires_grad_()


def train(
    model: Llama,
    mixed: DepthMap | WidthMap,
    gradients: Callable[[], Tensor],
    steps: int,
    sum_shards: Callable[[Tensor], object] = lambda value: None,
) -> dict:
    """Train the matrices, then leave the mixed weights in the model. Returns steps, and the loss at the first and last.

    `gradients()` puts the gradients of a whole batch into the model and returns its loss; `sum_shards(value)` adds up a value
    of all ranks that hold parts of the same weight. Raises `UserError` where the loss is not finite.
    """
    optimizer = torch.optim.Adam(mixed.matrices, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        _materialise(model, mixed)
        losses.append(gradients().item())
        if not math.isfinite(losses[-1]):
            raise UserError(f"learning the growth diverged: the loss of its step {step} is {losses[-1]}")
        for name, parameter in model.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and (value := mixed(name)) is not None and value.requires_grad:
                value.backward(local_shard(gradient))  # one at a time, so that one mixed weight is held beside the model
        for matrix in mixed.matrices:
            if matrix.grad is not None:
                sum_shards(matrix.grad)
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
    _materialise(model, mixed)
    return {"steps": steps, "loss_first": losses[0], "loss_last": losses[-1]}


@torch.no_grad()
def _materialise(model: Llama, mixed: DepthMap | WidthMap) -> None:
    for name, parameter in model.named_parameters():
        value = mixed(name)
        if value is not None:
            local_shard(parameter).copy_(value)


def rate(step: int, steps: int) -> float:
    """Learning rate of a step, the first being 0."""
    up = max(1, steps // 2)
    return PEAK * (step + 1) / up if step < up else cosine((step + 1 - up) / (steps - up), PEAK, END)
