"""AdamW, or Muon beside it, over fp32 masters; gradient clipping; a guard that keeps gradients that are not finite away."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nanostack.config import Optim, OptimizerName
from nanostack.device import multiplies_bf16
from nanostack.flops import n_matrices, n_params
from nanostack.growth.moments import EPS_FOLLOWS_DEPTH
from nanostack.model import Llama, LlamaConfig
from nanostack.muon import Fused, each_update
from nanostack.shards import local_shard, whole

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state, as torch calls it
BUFFER = "momentum_buffer"  # Muon's


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose moments may be bfloat16: 8 bytes of state per weight instead of 12, masters included.

    The update is then torch's, too, in fp32, a parameter at a time on a widened copy of its moments, which are rounded to
    nearest afterwards. bfloat16 steps are 0.4 to 0.8 % apart, so a second moment that moves by less at a time would stand
    still: `Optim` refuses beta2 above 0.99.
    """

    def __init__(self, groups: list[dict], moments: torch.dtype, **options):
        super().__init__(groups, fused=True, **options)
        self.moments = moments

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # there is no closure here
        if self.moments == torch.float32:
            super().step()
            return
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    for name in MOMENTS:
                        state[name] = torch.zeros_like(parameter, dtype=self.moments)
                first, second = (state[name].float() for name in MOMENTS)
                adamw(
                    *([parameter], [parameter.grad], [first], [second], [], [state["step"]]),
                    fused=True,
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                    amsgrad=False,
                    maximize=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                )
                for name, wide in zip(MOMENTS, (first, second), strict=True):
                    state[name].copy_(wide)


class Muon(AdamW):
    """Muon for groups that have a `momentum`, AdamW for the others. It heeds grad_scale and found_inf as torch's AdamW does.

    `rows_of()` tells the rows of each matrix that lies in a parameter, which a growth in width changes.
    """

    def __init__(self, groups: list[dict], rows_of: Callable[[], dict[Tensor, tuple[int, ...]]], **options):
        super().__init__(groups, **options)
        self.rows_of = rows_of
        gpus = {p.device for group in groups for p in group["params"] if p.is_cuda}
        self.orthogonalise_in = torch.bfloat16 if gpus and all(map(multiplies_bf16, gpus)) else torch.float32

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # there is no closure here
        everything = self.param_groups
        self._step_matrices([group for group in everything if "momentum" in group])
        self.param_groups = [group for group in everything if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = everything

    def _step_matrices(self, groups: list[dict]) -> None:
        """The update of torch.optim.Muon, with Nesterov's momentum; where found_inf is 1, none."""
        rows, found = self.rows_of(), []
        for group in groups:
            found += [(group, Fused(p, rows[p])) for p in group["params"] if p.grad is not None]
        if not found:
            return
        skipped = getattr(self, "found_inf", None)
        if skipped is None:
            skipped = torch.zeros((), device=found[0][1].parameter.device)
        rates = {lr: lr * (1 - skipped) for lr in {group["lr"] for group in groups}}

        def momentum_of(number: int) -> Tensor:
            return self._momentum(found[number][1].parameter, found[number][0]["momentum"], skipped)

        for number, update in each_update([fused for _, fused in found], momentum_of):
            group, fused = found[number]
            rate = rates[group["lr"]]
            local_shard(fused.parameter).mul_(1 - rate * group["weight_decay"]).sub_(update * rate)

    def _momentum(self, parameter: Tensor, momentum: float, skipped: Tensor) -> Tensor:
        """Move the momentum by the gradient, on this rank. Returns what is to be orthogonalised, in the dtype for that."""
        state = self.state[parameter]
        if BUFFER not in state:
            state[BUFFER] = torch.zeros_like(parameter, dtype=self.moments)
        assert parameter.grad is not None
        buffer, wide = (shard := local_shard(state[BUFFER])), shard.float()
        gradient = local_shard(parameter.grad) / getattr(self, "grad_scale", 1.0)
        gradient = torch.where(skipped > 0, wide, gradient)  # moves nothing: a factor of 0 would leave nan
        wide.lerp_(gradient, 1 - momentum)
        buffer.copy_(wide)
        return gradient.lerp(wide, momentum).to(self.orthogonalise_in)


def make_optimizer(model: Llama, optim: Optim) -> AdamW:
    """The optimizer that `optim` names. Weight decay on matrices only: norm gains have no reason to shrink.

    Each group has the model's order, as after a growth: norms are sums in it. With a residual_scale the gradients of the blocks
    are divided by the depth, and so is their eps (CompleteP, arXiv 2505.01618).
    """
    matrices = model.matrices() if optim.name == "muon" else {}
    rest = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    scaled = set(model.blocks.parameters()) if model.config.residual_scale is not None else set()
    kinds: list[tuple[dict, list[Tensor]]] = [({}, [p for p in rest if p not in scaled])]
    if scaled:
        about = {"eps": optim.eps * model.config.branch_scale, EPS_FOLLOWS_DEPTH: True}
        kinds.append((about, [p for p in rest if p in scaled]))
    groups = [
        {"params": [p for p in params if (p.ndim >= 2) == is_matrix], "weight_decay": optim.weight_decay if is_matrix else 0.0}
        | about
        for about, params in kinds
        for is_matrix in (True, False)
    ]
    options = {"moments": getattr(torch, optim.moments), "lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "adamw":
        return AdamW(groups, **options)
    momentum = {"weight_decay": optim.weight_decay, "momentum": optim.momentum}
    groups.append({"params": [p for p in model.parameters() if p.requires_grad and p in matrices], **momentum})
    return Muon(groups, model.matrices, **options)


def name_of(state: Mapping[Any, Mapping[str, Tensor]]) -> OptimizerName | None:
    """The optimizer whose state {parameter: {key: tensor}} this is, by its name in `Optim`; None of an empty one."""
    keys = {key for values in state.values() for key in values}
    return "muon" if BUFFER in keys else "adamw" if keys else None


def state_numbers(config: LlamaConfig, name: str | None) -> int:
    """How many numbers the optimizer keeps for a model: two moments of a parameter, or Muon's momentum of a matrix."""
    if name is None:
        return 0
    return 2 * n_params(config) - (n_matrices(config) if name == "muon" else 0)


def set_rate_of(model: Llama, optimizer: torch.optim.Optimizer, which: set[Tensor], rate: float) -> None:
    """Give these parameters groups of their own, beside those they are in, whose learning rate is `rate` times the others'.

    Those that come home from such groups take their places in the model's order, as in the optimizer of a resumed run.
    """
    groups = optimizer.param_groups
    mine = [group for group in groups if "rate" in group]
    if {p for group in mine for p in group["params"]} != which:
        groups[:] = [group for group in groups if "rate" not in group]
        for group, earlier in zip(groups, mine, strict=False):  # those of an earlier growth come home
            group["params"] += earlier["params"]
        place = {parameter: number for number, parameter in enumerate(model.parameters())}
        for group in groups:
            group["params"].sort(key=place.__getitem__)
        mine = [{**group, "params": [p for p in group["params"] if p in which], "rate": rate} for group in groups]
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in which]
        groups += mine
    for group in mine:
        group["rate"] = rate


@torch.no_grad()
def guarded_step(
    optimizer: AdamW, loss: Tensor, lr: float, grad_clip: float, set_to_none: bool = True
) -> tuple[Tensor, Tensor]:
    """Clip by global norm and step; where loss or norm is not finite, leave weights, moments and step counts as they are.

    `loss` must be the same on all ranks. Returns (gradient norm before clipping, 1.0 if skipped else 0.0), both on the
    device: nothing here waits for it. Gradients are freed, or else zeroed where they are.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)).float()
    skipped = (~(norm.isfinite() & loss.isfinite())).float()
    # The fused kernel divides gradients by grad_scale (clipping without a pass of its own) and obeys found_inf.
    optimizer.grad_scale = torch.clamp((norm + 1e-6) / grad_clip, min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    # The fused kernel does not say that it has written to the weights; copies of them go by this.
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.zero_grad(set_to_none=set_to_none)
    return norm, skipped
