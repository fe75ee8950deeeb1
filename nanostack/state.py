"""The one state of a run: model, optimizer, cursor, growth receipts. What is not in it cannot influence the run."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanostack import growth, width
from nanostack.config import Growth, Optim, Stage
from nanostack.errors import UserError
from nanostack.flops import flops_exact_per_token, flops_per_token, n_params
from nanostack.learn import local
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import make_optimizer, set_rate_of
from nanostack.parallel import Placement, assign, check_room, initialise, reshard, whole
from nanostack.schedule import rewarming


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
    optimizer: torch.optim.AdamW
    placement: Placement
    cursor: Cursor = field(default_factory=Cursor)
    growth: list[dict] = field(default_factory=list)  # receipts
    seed: int = 0  # of the order of the text, and of what growth draws

    @classmethod
    def create(cls, config: LlamaConfig, optim: Optim, placement: Placement, seed: int) -> "State":
        """The state before the first token."""
        torch.manual_seed(seed)
        model = placement.model(config)
        initialise(model, seed)
        return cls(model, make_optimizer(model, optim), placement, seed=seed)

    @classmethod
    def restore(cls, saved: dict, optim: Optim, placement: Placement) -> "State":
        """The state that `checkpoint.load` read, on whatever mesh there is now."""
        config = LlamaConfig(**saved["config"])
        model = placement.model(config)
        model.init_rope()
        for name, parameter in model.named_parameters():
            assign(parameter, saved["model"][name])
        optimizer = make_optimizer(model, optim)
        for name, parameter in model.named_parameters():
            for key, value in saved["optimizer"].get(name, {}).items():
                # A step count is one number and never sharded; moments lie like their parameter.
                dtype = getattr(torch, optim.moments)
                like = torch.empty((), device=parameter.device) if key == "step" else torch.empty_like(parameter, dtype=dtype)
                assign(like, value)
                optimizer.state[parameter][key] = like
        torch.set_rng_state(saved["rng"]["cpu"])
        if placement.device.type == "cuda" and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], placement.device)
        cursor, receipts = Cursor(**saved["cursor"]), list(saved["growth"])
        if receipts and growth.ramps(receipts[-1]) and (share := _ramp_share(receipts[-1], cursor)) < 1:
            growth.attach_ramp(model, receipts[-1], share)
        return cls(model, optimizer, placement, cursor, receipts, saved["seed"] or 0)

    def grow(self, how: Growth, probe: Tensor | None = None, gradients: Callable[[], Tensor] | None = None) -> dict:
        """Grow the model in place and keep the ledger. Returns the receipt, which is kept too.

        `probe`: tokens (B, T), the same on all ranks, by whose logits the receipt tells what a preserving operator changed.
        `gradients()`, for learn: puts those of the next batch into the model, moves the cursor on, and returns the loss.
        """
        grown = how.shape(self.model.config)
        probe = probe if grown.preserves and not how.noise else None
        if self.growth and self.growth[-1].get("ramp_tokens"):
            growth.set_ramp(self.model, _ramp_share(self.growth[-1], self.cursor))
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)  # whatever was frozen so far
        more = n_params(grown.config) - n_params(self.model.config)
        copies = 1 if how.moments().new == "zero" else 3  # of the weights, and of both moments
        check_room(self.placement.device, 4 * copies * more / self.placement.shards, "growing")
        logits = self._logits(probe)
        reshard(self.model)
        receipt = growth.grow(
            self.model,
            self.optimizer,
            *(how.op, how.g, how.layers, how.k, how.wider(), how.moments(), how.noise),
            seed=self._growth_seed(),
            gradients=gradients,
            learn_steps=how.learn_steps,
            prepare_block=self.placement.block,
            rejoin=self.placement.grown,
            write=assign,
            sum_shards=self.placement.sum_shards,
        )
        receipt |= {
            "ramp_tokens": how.ramp_tokens if growth.ramps(receipt) else 0,
            "max_logit_change": None if probe is None else (self._logits(probe) - logits).abs().max().item(),
            "samples": self.cursor.samples,
            "tokens": self.cursor.tokens,
            "loss_before": None,
            "loss_after": None,
        }
        self.growth.append(receipt)
        return receipt

    def _growth_seed(self) -> int:
        """Of what this growth draws: another one in each run, at each place in it, and for each of several growths there."""
        place = f"{self.seed}:{self.cursor.samples}:{len(self.growth)}"
        return int.from_bytes(hashlib.sha256(place.encode()).digest()[:6], "little")

    @torch.no_grad()
    def _logits(self, tokens_BT: Tensor | None) -> Tensor | None:
        if tokens_BT is None:
            return None
        # The whole batch goes through the blocks, in a shape they are compiled for, and one row of it through the head.
        one_row = self.model.head.register_forward_pre_hook(lambda head, arguments: (arguments[0][:1],))
        logits_BTV = self.model(tokens_BT).float()
        one_row.remove()
        reshard(self.model)
        return logits_BTV

    def ramp(self, stage: Stage) -> None:
        """Let random layers count for as much as the tokens since their growth entitle them to."""
        if getattr(self.model, "ramp", None) is None:
            return
        receipt = self.growth[-1]  # no growth begins before the ramp of the last one has ended
        if receipt["ramp_tokens"] is None:
            receipt["ramp_tokens"] = stage.warmup_tokens or max(1, stage.tokens // 10)
        growth.set_ramp(self.model, _ramp_share(receipt, self.cursor))

    def rewarm(self, stage: Stage, tokens: int) -> None:
        """Set the learning rate of what is re-warmed after the last growth, as the stage says, for the step to `tokens`."""
        which = ()
        if stage.rewarm_tokens:
            which = self._new_layers().values() if stage.rewarm == "new" else self.model.parameters()
        set_rate_of(self.optimizer, set(which), rewarming(stage, tokens))

    def freeze(self, stage: Stage) -> None:
        """Leave gradients to the layers that the last growth made, or to all."""
        new = set(self._new_layers().values())
        if stage.freeze and not new:
            raise UserError("a stage freezes all but new layers, and the checkpoint it starts from has not grown any")
        for parameter in self.model.parameters():
            parameter.requires_grad_(not stage.freeze or parameter in new)

    def _new_layers(self) -> dict[str, Tensor]:
        """The parameters of the layers that the last growth made."""
        new = {i for i, rule in enumerate(self.growth[-1].get("rules", ())) if rule != "kept"} if self.growth else set()
        return {n: p for n, p in self.model.named_parameters() if n.startswith("blocks.") and int(n.split(".")[1]) in new}

    def dead(self) -> list[str]:
        """Names of parameters of which all that is new has a gradient of zero, in this rank's share of them."""
        maps = width.recorded(self.growth[-1].get("width"), self.model.config, self.placement.device)
        new_layers, dead = self._new_layers(), []
        for name, parameter in self.model.named_parameters():
            gradient = local(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
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


def _ramp_share(receipt: dict, cursor: Cursor) -> float:
    """How much the random layers of a growth count by now; 0 where it is not decided yet over how many tokens they come."""
    length = receipt["ramp_tokens"]
    return min(1.0, (cursor.tokens - receipt["tokens"]) / length) if length else 0.0
