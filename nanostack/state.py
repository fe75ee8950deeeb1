"""The one state of a run: model, optimizer, cursor, growth receipts. What is not in it cannot influence the run."""

from dataclasses import dataclass, field

import torch

from nanostack import growth
from nanostack.config import Growth, Optim
from nanostack.flops import flops_exact_per_token, flops_per_token
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import make_optimizer
from nanostack.parallel import Placement, assign, initialise, reshard, whole


@dataclass
class Cursor:
    """How far a run is, growth included: the ledger follows the model from its first token on."""

    samples: int = 0
    tokens: int = 0
    flops: float = 0.0  # 6·N_total per token, as the paper counts
    flops_exact: float = 0.0  # matrix products and causal attention
    stage: int = 0
    stage_tokens: int = 0  # of `tokens`, those of the current stage

    def advance(self, samples: int, config: LlamaConfig) -> None:
        tokens = samples * config.seq_len
        self.samples += samples
        self.tokens += tokens
        self.stage_tokens += tokens
        self.flops += float(tokens * flops_per_token(config))
        self.flops_exact += float(tokens * flops_exact_per_token(config))


@dataclass
class State:
    model: Llama
    optimizer: torch.optim.AdamW
    placement: Placement
    cursor: Cursor = field(default_factory=Cursor)
    growth: list[dict] = field(default_factory=list)  # receipts

    @classmethod
    def create(cls, config: LlamaConfig, optim: Optim, placement: Placement, seed: int) -> "State":
        """The state before the first token."""
        torch.manual_seed(seed)
        model = placement.model(config)
        initialise(model, seed)
        return cls(model, make_optimizer(model, optim), placement)

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
                like = torch.empty((), device=parameter.device) if key == "step" else torch.empty_like(parameter)
                assign(like, value)
                optimizer.state[parameter][key] = like
        torch.set_rng_state(saved["rng"]["cpu"])
        if placement.device.type == "cuda" and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], placement.device)
        return cls(model, optimizer, placement, Cursor(**saved["cursor"]), list(saved["growth"]))

    def grow(self, how: Growth) -> dict:
        """Grow the model in place and keep the ledger. Returns the receipt, which is kept too."""
        reshard(self.model)
        receipt = growth.grow(
            self.model, self.optimizer, how.op, how.g, how.layers, how.optimizer, prepare_block=self.placement.block
        )
        self.placement.grown(self.model)
        receipt |= {
            "samples": self.cursor.samples,
            "tokens": self.cursor.tokens,
            "loss_before": None,
            "loss_after": None,
        }
        self.growth.append(receipt)
        return receipt

    def whole_tensors(self, keep: bool) -> tuple[dict, dict]:
        """Model {name: tensor} and optimizer {name: {key: tensor}} on the host, gathered one by one over the mesh.

        Every rank must call it; `keep` says whether this one wants the result.
        """
        reshard(self.model)
        model, optimizer = {}, {}
        for name, parameter in self.model.named_parameters():
            value = whole(parameter.detach())
            if keep:
                model[name] = value.cpu()
            moments = {key: whole(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
            if keep and moments:
                optimizer[name] = {key: value.cpu() for key, value in moments.items()}
        return model, optimizer
