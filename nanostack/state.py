"""The one state of a run: with config and text, nothing else influences it. Model, optimizer, cursor, growth receipts, seed."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanostack import growth
from nanostack.config import Optim, Stage
from nanostack.device import check_room
from nanostack.errors import UserError
from nanostack.flops import flops_exact_per_token, flops_per_token, n_params
from nanostack.growth import Growth, Receipt, width
from nanostack.growth.ramp import is_ramping
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import AdamW, make_optimizer, name_of, set_rate_of, state_numbers
from nanostack.parallel import Placement, initialise, reshard
from nanostack.schedule import rewarming
from nanostack.shards import assign, local_shard, whole
from nanostack.text.bounds import Bounds


@dataclass
class Cursor:
    """How far a run is, growth included: the ledger follows the model from its first token on."""

    samples: int = 0
    tokens: int = 0
    flops: float = 0.0  # 6·N_total per token, as the paper counts
    flops_exact: float = 0.0  # matrix products and causal attention
    stage: int = 0
    stage_tokens: int = 0  # of `tokens`, those that the current stage has trained on

    def advance(self, samples: int, config: LlamaConfig) -> None:
        tokens = samples * config.seq_len
        self.samples += samples
        self.tokens += tokens
        self.flops += float(tokens * flops_per_token(config))
        self.flops_exact += float(tokens * flops_exact_per_token(config))


@dataclass
class State:
    model: Llama
    optimizer: AdamW
    placement: Placement
    cursor: Cursor = field(default_factory=Cursor)
    growth: list[Receipt] = field(default_factory=list)
    seed: int = 0  # of the order of the text, and of what growth draws
    bounds: Bounds = field(default_factory=Bounds)  # how the texts begin and end that the model has seen
    window: int | None = None  # of a model with a longer context: so far its attention sees, and it was read so far

    @classmethod
    def create(cls, config: LlamaConfig, optim: Optim, placement: Placement, seed: int) -> "State":
        """The state before the first token."""
        torch.manual_seed(seed)
        model = placement.model(config)
        initialise(model, seed)
        return cls(model, make_optimizer(model, optim), placement, seed=seed)

    @classmethod
    def restore(cls, saved: Mapping[str, Any], optim: Optim, placement: Placement) -> "State":
        """The state that `checkpoint.load` read, on whatever mesh there is now."""
        config = LlamaConfig(**saved["config"])
        model = placement.model(config)
        model.init_rope()
        optimizer = make_optimizer(model, optim)
        places: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            for key in saved["optimizer"].get(name, {}):
                # A step count is one number and never sharded; moments lie like their parameter.
                dtype = getattr(torch, optim.moments)
                like = torch.empty((), device=parameter.device) if key == "step" else torch.empty_like(parameter, dtype=dtype)
                optimizer.state[parameter][key] = places[f"optimizer.{name}.{key}"] = like
        if (shards := saved.get("shards")) is not None:
            shards.read_into(places)
        else:
            for name, parameter in model.named_parameters():
                assign(parameter, saved["model"][name])
                for key, like in optimizer.state.get(parameter, {}).items():
                    assign(like, saved["optimizer"][name][key])
        torch.set_rng_state(saved["rng"]["cpu"])
        if placement.device.type == "cuda" and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], placement.device)
        cursor, receipts = Cursor(**saved["cursor"]), [Receipt.of(receipt) for receipt in saved["growth"]]
        if receipts and receipts[-1].ramps and (share := receipts[-1].ramp_share(cursor.tokens)) < 1:
            growth.attach_ramp(model, receipts[-1], share)
        own = Bounds(**saved["bounds"]), saved.get("window")
        return cls(model, optimizer, placement, cursor, receipts, saved["seed"] or 0, *own)

    def grow(self, how: Growth, probe: Tensor | None = None, gradients: Callable[[], Tensor] | None = None) -> Receipt:
        """Grow the model in place and keep the ledger. Returns the receipt, which is kept too.

        `probe`: tokens (B, T), the same on all ranks, by whose logits the receipt tells what a preserving operator changed.
        `gradients()`, for learn: puts those of the next batch into the model, moves the cursor on, and returns the loss.
        """
        plan = how.plan(self.model.config)
        probe = probe if plan.preserves and not how.noise else None
        if self.growth and self.growth[-1].ramp_tokens:
            growth.set_ramp(self.model, self.growth[-1].ramp_share(self.cursor.tokens))
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)  # whatever was frozen so far
        more = n_params(plan.config) - n_params(self.model.config)
        if plan.moments.new != "zero":
            name = name_of(self.optimizer.state)
            more += state_numbers(plan.config, name) - state_numbers(self.model.config, name)
        check_room(self.placement.device, 4 * more / self.placement.shards, "growing")
        before = None if probe is None else self._logits(probe)
        reshard(self.model)
        receipt = growth.grow(
            self.model, self.optimizer, how, self.placement.hooks(), seed=self._growth_seed(), gradients=gradients
        )
        receipt.ramp_tokens = how.ramp_tokens if receipt.ramps else 0
        if probe is not None and before is not None:
            receipt.max_logit_change = (self._logits(probe) - before).abs().max().item()
        receipt.samples, receipt.tokens = self.cursor.samples, self.cursor.tokens
        self.growth.append(receipt)
        return receipt

    def _growth_seed(self) -> int:
        """The seed of this growth. Each run, each place in a run, and each of several growths in one place have their own."""
        place = f"{self.seed}:{self.cursor.samples}:{len(self.growth)}"
        return int.from_bytes(hashlib.sha256(place.encode()).digest()[:6], "little")

    @torch.no_grad()
    def _logits(self, tokens_BT: Tensor) -> Tensor:
        # The whole batch goes through the blocks, in a shape they are compiled for, and one row of it through the head.
        one_row = self.model.head.register_forward_pre_hook(lambda head, arguments: (arguments[0][:1],))
        logits_BTV = self.model(tokens_BT).float()
        one_row.remove()
        reshard(self.model)
        return logits_BTV

    def ramp(self, stage: Stage) -> None:
        """Let random layers count for as much as the tokens since their growth entitle them to."""
        if not is_ramping(self.model):
            return
        receipt = self.growth[-1]  # no growth begins before the ramp of the last one has ended
        if receipt.ramp_tokens is None:
            receipt.ramp_tokens = stage.warmup_tokens or max(1, stage.tokens // 10)
        growth.set_ramp(self.model, receipt.ramp_share(self.cursor.tokens))

    def rewarm(self, stage: Stage, tokens: int) -> None:
        """Set the learning rate of what is re-warmed after the last growth, as the stage says, for the step to `tokens`."""
        which: set[Tensor] = set()
        if stage.rewarm_tokens:
            which.update(self._new_layers().values() if stage.rewarm == "new" else self.model.parameters())
        set_rate_of(self.model, self.optimizer, which, rewarming(stage, tokens))

    def freeze(self, stage: Stage) -> None:
        """Leave gradients to the layers that the last growth made, or to all."""
        new = set(self._new_layers().values())
        if stage.freeze and not new:
            raise UserError("a stage freezes all but new layers, and the checkpoint it starts from has not grown any")
        for parameter in self.model.parameters():
            parameter.requires_grad_(not stage.freeze or parameter in new)

    def _new_layers(self) -> dict[str, Tensor]:
        """The parameters of the layers that the last growth made."""
        new = set(self.growth[-1].new_layers) if self.growth else set()
        return {n: p for n, p in self.model.named_parameters() if n.startswith("blocks.") and int(n.split(".")[1]) in new}

    def dead_after_growth(self, batch_tokens: int) -> list[str]:
        """The `dead` parameters of the second step after a growth, noted in its receipt; none of any other step.

        It is called with the gradients of a step in place, and the cursor past the tokens of that step.
        """
        if not self.growth or self.cursor.tokens - self.growth[-1].tokens != 2 * batch_tokens:
            return []
        self.growth[-1].dead = dead = self.dead()
        return dead

    def dead(self) -> list[str]:
        """Names of parameters of which all that is new has a gradient of zero, in this rank's share of them."""
        maps = width.recorded(self.growth[-1].width, self.model.config, self.placement.device)
        new_layers, dead = self._new_layers(), []
        for name, parameter in self.model.named_parameters():
            gradient = local_shard(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            new = [gradient] if name in new_layers else width.new_parts(name, gradient, maps)
            if parameter.requires_grad and any(part.numel() and not part.any() for part in new):
                dead.append(name)
        return dead

    def whole_tensors(self, to_host: Callable[[str, Tensor], Tensor] | None) -> tuple[dict, dict]:
        """Model {name: tensor} and optimizer {name: {key: tensor}} on the host, gathered one by one over the mesh.

        Every rank must call it; those that want the result give `to_host(name, tensor)`, which brings a tensor there.
        """
        reshard(self.model)
        model, optimizer = {}, {}
        for name, parameter in self.model.named_parameters():
            value = whole(parameter.detach())
            if to_host:
                model[name] = to_host(name, value)
            moments = {key: whole(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
            if to_host and moments:
                optimizer[name] = {key: to_host(f"{name}.{key}", value) for key, value in moments.items()}
        return model, optimizer
