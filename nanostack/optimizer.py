"""AdamW over fp32 masters, gradient clipping, and a guard that keeps non-finite gradients away from the weights."""

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanostack.config import Optim
from nanostack.shards import whole


class LowMomentAdamW(torch.optim.AdamW):
    """AdamW that keeps its moments in bfloat16: 8 bytes of state per weight instead of 12, masters included.

    torch's fused update, in fp32, a parameter at a time on a widened copy of its moments, which are rounded to nearest
    afterwards. bfloat16 steps are 0.4 to 0.8 % apart, so a second moment that moves by less at a time would stand still:
    `Optim` refuses beta2 above 0.99.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # there is no closure here
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    for name in MOMENTS:
                        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
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


MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """torch's fused AdamW. Weight decay on matrices only: norm gains have no reason to shrink."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if optim.moments == "float32" else LowMomentAdamW
    return kind(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def set_rate_of(optimizer: torch.optim.Optimizer, which: set[Tensor], rate: float) -> None:
    """Give these parameters groups of their own, beside those they are in, whose learning rate is `rate` times the others'."""
    groups = optimizer.param_groups
    mine = [group for group in groups if "rate" in group]
    if {p for group in mine for p in group["params"]} != which:
        groups[:] = [group for group in groups if "rate" not in group]
        for group, earlier in zip(groups, mine, strict=False):  # those of an earlier growth come home
            group["params"] += earlier["params"]
        mine = [{**group, "params": [p for p in group["params"] if p in which], "rate": rate} for group in groups]
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in which]
        groups += mine
    for group in mine:
        group["rate"] = rate


@torch.no_grad()
def guarded_step(
    optimizer: torch.optim.AdamW, loss: Tensor, lr: float, grad_clip: float, set_to_none: bool = True
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
