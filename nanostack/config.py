"""A run's configuration: typed values that a file in config/ builds and dotted command-line overrides change.

Sizes of a run are in tokens. A run is a list of stages: the first trains the model as initialised (or as --init_from gives
it), a later one usually grows the model of the stage before it.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, get_args

import tyro

from nanostack.errors import UserError, parse
from nanostack.growth.config import Growth
from nanostack.model import LlamaConfig
from nanostack.old_fields import ADDED, current, renamed
from nanostack.schedule import Schedule, scheduled

PRESETS = Path(__file__).with_name("presets")  # a link to config/


@dataclass(frozen=True)
class Data:
    path: str = "data/stdlib"
    """Folder written by `nanostack prepare`."""
    val_tokens: int = 131072
    """Validation tokens: always the first ones of the validation split (all of it where it is shorter)."""
    document_mask: bool = False
    """Whether a token attends only within its own document, and not to what happens to stand before it in its block."""

    def __post_init__(self):
        if self.val_tokens < 1:
            raise UserError(f"data.val_tokens must be at least 1, not {self.val_tokens}")


@dataclass(frozen=True)
class Stage(Schedule):
    """A part of a run: how its model comes to be, how many tokens it trains, and at which rates."""

    growth: Growth | None = None
    """How the model is made from that of the stage before; None: it is the same."""
    freeze: bool = False
    """Train only the layers that the last growth made (LLaMA-Pro); the next stage trains all again unless it says so too."""

    def __post_init__(self):
        super().__post_init__()
        if self.rewarm_tokens and self.growth is None:
            raise UserError("rewarm_tokens ≥ 0 and rewarm_peak > 0 belong to a stage that grows")


def grow(op: str | None = None, g: int | None = None, **options) -> Stage:
    """A stage that starts by growing the model: `grow("stack", g=4, tokens=..., lr=...)`, with fields of Growth and Stage."""
    how = {field.name: options.pop(field.name) for field in dataclasses.fields(Growth) if field.name in options}
    return Stage(growth=Growth(op, g, **how), **options)


SHAPELESS = {  # fields of a run on which no record of it depends
    *("out", "resume", "resume_from", "resume_anyway", "overwrite", "profile", "keep", "checkpoint"),
    *("save_interval", "sample", "track", "hang_timeout"),
}
OptimizerName: TypeAlias = Literal["adamw", "muon"]


@renamed(decay="weight_decay", clip="grad_clip")
@dataclass(frozen=True)
class Optim:
    """AdamW for all parameters, or Muon for the blocks' matrices; weight decay reaches matrices only."""

    name: OptimizerName = "adamw"
    momentum: float = 0.95
    """The share of its momentum that Muon keeps from step to step; it looks ahead as Nesterov's method does."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """The dtype of Adam's moments and of Muon's momentum."""

    def __post_init__(self):
        if self.name not in get_args(OptimizerName):
            near = difflib.get_close_matches(str(self.name), get_args(OptimizerName), 1)
            there = f"perhaps you meant {near[0]}" if near else f"there are {' and '.join(get_args(OptimizerName))}"
            raise UserError(f"there is no optimizer {self.name!r}; {there}")
        slow = {"betas[1]": self.betas[1]} | ({"momentum": self.momentum} if self.name == "muon" else {})
        for name, value in slow.items():
            if self.moments == "bfloat16" and value > 0.99:
                raise UserError(
                    f"optim.moments bfloat16 needs {name} ≤ 0.99, not {value}: what it averages would move by less than "
                    "bfloat16 can tell apart"
                )
        if not (all(0 <= beta < 1 for beta in (*self.betas, self.momentum)) and self.eps > 0):
            raise UserError(f"optim needs betas and momentum in [0, 1) and eps > 0, not {self}")
        if self.name == "adamw" and self.momentum != type(self).momentum:
            raise UserError(f"optim.momentum {self.momentum} is Muon's; AdamW has betas, of which the first is {self.betas[0]}")
        if not (self.weight_decay >= 0 and self.grad_clip > 0):
            raise UserError(f"optim needs weight_decay ≥ 0 and grad_clip > 0, not {self}")


@renamed(replicate="dp_replicate", shard="dp_shard")
@dataclass(frozen=True)
class Parallel:
    """The device mesh: `dp_replicate` groups of `dp_shard` devices. None stands for all that the other leaves."""

    dp_replicate: int | None = None
    dp_shard: int | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """The backward pass computes these anew instead of keeping them: norms, rotary, SwiGLU (selective); whole blocks (full)."""
    reshard_after_forward: bool | int | None = None
    """Whether a block's gathered parameters are freed after its forward pass and gathered anew for its backward one; a number:
    they stay sharded over so many ranks between the two. None: they are freed."""
    prefetch: int = 0
    """How many blocks ahead parameters are gathered, forward and backward; 0: as FSDP2 does by itself, one."""

    def __post_init__(self):
        after = self.reshard_after_forward
        if not isinstance(after, bool | None) and after < 2:
            raise UserError(f"parallel.reshard_after_forward is True, False or a number of 2 or more, not {after}")
        if self.prefetch < 0:
            raise UserError(f"parallel.prefetch must be 0 or more, not {self.prefetch}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model goes on with a prompt: the temperature first, then top_k, then top_p of what that leaves."""

    tokens: int = 200
    """How many to add, or fewer where the text ends before."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 50
    """Draw from so many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities add up to this (nucleus sampling, arXiv 1904.09751)."""
    seed: int = 0

    def check(self) -> None:
        """UserError for a value that cannot be."""
        if self.tokens < 1:
            raise UserError(f"tokens must be at least 1, not {self.tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 or more, not {self.temperature:g}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p:g}")
        if not 0 <= self.seed < 2**62:
            raise UserError(f"seed must be from 0 to 2^62, not {self.seed}")


@dataclass(frozen=True)
class Samples(Sampling):
    """Text that the model writes while it trains, for people to read: on the console, and in the records as `texts`."""

    interval: int | None = None
    """Tokens of training from one time to the next; None: never."""
    prompt: tuple[str, ...] = ("",)
    """Each is gone on with; an empty one is the beginning of a document."""

    def check(self) -> None:
        super().check()
        if self.interval is not None and self.interval < 1:
            raise UserError(f"interval must be at least 1, not {self.interval}")
        if not self.prompt:
            raise UserError("prompt needs at least one text, which may be empty")


class Position(Protocol):
    """Where a run is: the stage, and the tokens that it has trained on (nanostack.state.Cursor)."""

    stage: int
    stage_tokens: int


@dataclass(frozen=True)
class Train:
    data: Data
    model: LlamaConfig
    stages: tuple[Stage, ...]
    batch_tokens: int
    """Tokens of one optimizer step, all devices together."""
    micro_batch: int
    """Sequences that one device takes through the model at a time."""
    out: str
    optim: Optim = Optim()
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype over fp32 masters; auto is bfloat16 where the device has it."""
    parallel: Parallel = Parallel()
    kernels: Literal["auto", "torch", "triton", "c"] = "auto"
    compile: bool = False
    """torch.compile each block; compiled once, shared by all."""
    cuda_graph: bool = False
    """Capture a micro-step in a CUDA graph: for small models, whose kernels are launched more slowly than they run. One GPU."""
    log_interval: int = 262144
    eval_interval: int = 16777216
    save_interval: int = 67108864
    sample: Samples = Samples()
    keep: int = 2
    """How many of the last checkpoints stay."""
    checkpoint: Literal["auto", "file", "sharded"] = "auto"
    """One file, or a folder into which every rank writes its own shards; auto is a folder from two ranks on."""
    seed: int = 0
    init_from: str | None = None
    """A checkpoint to start from: weights, cursor, FLOPs ledger, and the optimizer if it is in there."""
    resume: bool = False
    """Go on with the run that is in `out`."""
    resume_from: str | None = None
    """Go on from this earlier checkpoint of the run; later ones, and the records, are set aside as NAME.left."""
    resume_anyway: bool = False
    """Go on although options differ on which the past of the run depends."""
    overwrite: bool = False
    """Delete the run that is in `out`."""
    profile: int = 0
    """Write a trace of that many steps to `out`."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Show the records there as well, from rank 0; see nanostack/track.py."""
    hang_timeout: float = 900.0
    """Seconds after which a run whose steps do not end any more says where it hangs, and ends; torchrun may start it anew."""

    def __post_init__(self):
        if not self.stages:
            raise UserError("a run needs at least one stage")
        if self.stages[0].growth and not self.init_from:
            raise UserError("the first stage grows, but there is no model before it: set init_from to a checkpoint")
        if self.batch_tokens <= 0 or self.batch_tokens % self.model.seq_len:
            below = max(1, self.batch_tokens // self.model.seq_len) * self.model.seq_len
            raise UserError(
                f"batch_tokens {self.batch_tokens} is not a whole number of sequences of {self.model.seq_len} tokens; "
                f"the nearest legal values are {below} and {below + self.model.seq_len}"
            )
        for name in ("micro_batch", "log_interval", "eval_interval", "save_interval", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        try:
            self.sample.check()
        except UserError as error:
            raise UserError(f"sample.{error}") from None
        if not 0 < self.hang_timeout < math.inf:
            raise UserError(f"hang_timeout must be above 0, not {self.hang_timeout:g}")
        if self.profile < 0 or not 0 <= self.seed < 2**63 or not self.out:
            raise UserError(
                f"profile ≥ 0, 0 ≤ seed < 2^63 and an out folder are needed: {self.profile}, {self.seed}, {self.out!r}"
            )
        if self.stages[0].continues:
            raise UserError("the first stage cannot continue: there is no schedule before it")
        for number in range(len(self.stages)):
            whole = scheduled(self.stages, number)
            if whole.decay_tokens is not None and whole.decay_tokens > whole.tokens - whole.warmup_tokens:
                raise UserError(f"decay_tokens {whole.decay_tokens} does not fit into stage {number} after its warm-up")
        model, new_layers = self.model, bool(self.init_from)  # a checkpoint may have some
        for number, stage in enumerate(self.stages):  # a bad list must not end a run that has trained for days
            if stage.growth is not None:
                try:
                    plan = stage.growth.plan(model)
                except UserError as error:
                    raise UserError(f"stages.{number}.growth: {error}") from None
                model, new_layers = plan.config, any(layer.rule != "kept" for layer in plan.layers)
            if (stage.freeze or (stage.rewarm_tokens and stage.rewarm == "new")) and not new_layers:
                raise UserError(
                    f"stages.{number}: to freeze all but new layers, or to re-warm new ones, a growth must make some"
                )
            if stage.growth is None:
                continue
            next_growth = next((n for n, s in enumerate(self.stages) if n > number and s.growth), None)
            if next_growth and (stage.growth.ramp_tokens or 0) > sum(s.tokens for s in self.stages[number:next_growth]):
                raise UserError(
                    f"stages.{number}.growth.ramp_tokens {stage.growth.ramp_tokens} ends after the next growth begins"
                )

    @property
    def goes_on(self) -> bool:
        """Whether it asks for the run that is in `out`."""
        return self.resume or self.resume_anyway or self.resume_from is not None

    def shapes(self) -> list[LlamaConfig]:
        """The model of every stage; the last is the largest, as growth makes nothing smaller."""
        models = [self.model]
        for stage in self.stages:
            models.append(stage.growth.plan(models[-1]).config if stage.growth else models[-1])
        return models[1:]

    def steps_of(self, stages: "tuple[Stage, ...]") -> int:
        """Steps that these stages take; the last one of each is a whole one."""
        return sum(-(-stage.tokens // self.batch_tokens) for stage in stages)

    def steps_done(self, cursor: "Position") -> int:
        return self.steps_of(self.stages[: cursor.stage]) + cursor.stage_tokens // self.batch_tokens

    def steps_left(self, cursor: "Position") -> int:
        here = self.stages[cursor.stage].tokens - cursor.stage_tokens
        return self.steps_of(self.stages[cursor.stage + 1 :]) + max(0, -(-here // self.batch_tokens))

    def saves_shards(self, ranks: int) -> bool:
        return self.checkpoint == "sharded" or (self.checkpoint == "auto" and ranks > 1)

    def sha256(self) -> str:
        """Hash of everything that shapes the records of a run."""
        return hashlib.sha256(json.dumps(self.shaping(), sort_keys=True).encode()).hexdigest()

    def shaping(self) -> dict:
        """All that shapes the records of a run, as JSON has it: not where its files are, nor what they hold beside them."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in SHAPELESS}
        del values["data"]["path"]  # the manifest's hash stands for the text
        for name, usual in ADDED["parallel"].items():  # so that a run from before these has the hash that it had
            if values["parallel"][name] == usual:
                del values["parallel"][name]
        return json.loads(json.dumps(values))


def presets() -> dict[str, Path]:
    """The files of config/, which an installation has too, by the names that stand for them."""
    return {file.stem: file for file in sorted(PRESETS.glob("*.py"))}


def config_file(name: str) -> Path:
    """The file of a config: `name` is its path, or that of a preset, `1b` for config/1b.py.

    UserError where there is neither, and where a preset's name is also that of a file in this folder.
    """
    path, known = Path(name), presets()
    if name in known:
        for here in (path, path.with_suffix(".py")):
            if here.is_file() and not here.samefile(known[name]):
                raise UserError(f"{name} is a preset, and {here} is here: say ./{here}, or {known[name]} for the preset")
        return known[name]
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(path.stem.lower(), known, 1)
    said = f"did you mean {nearest[0]}? The" if nearest else "the"
    raise UserError(f"there is no config file {name}, and no preset of that name; {said} presets are {', '.join(known)}")


def load(path: str, overrides: list[str]) -> Train:
    """The `config` of the file at `path`, or of the preset of that name, changed by overrides such as `--stages.1.lr 1e-4`.

    Raises `UserError` (a ValueError) for a missing or broken file, an unknown or misspelt name and a value that does not
    parse. `--help` among the overrides prints all names and exits.
    """
    file = config_file(path)
    try:
        config = runpy.run_path(str(file)).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path} is not a valid config: {type(error).__name__}: {error}") from error
    if not isinstance(config, Train):
        raise UserError(f"{path} has no variable `config` of type nanostack.config.Train")
    if not overrides:
        return config
    try:
        return parse(
            Train,
            current(overrides),
            default=config,
            prog=f"{Path(sys.argv[0]).name} {path}",
            config=(tyro.conf.AvoidSubcommands,),  # a stage's growth is overridden like any other field
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def describe_tokens(tokens: float) -> str:
    """12_345_678 → '12.3M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(tokens) >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"
