"""What a study is, many small runs with one question, every point fully decayed; and the runs that it plans.

Warm-up, stable, decay: an arm has one trunk at a constant learning rate, and from it a branch per budget that decays linearly
to zero over the last fifth of the budget's FLOPs. A grown arm's trunk starts from a trunk of its base, which all arms that grow
there share. Seeds change weights and order of the text; the arms of a seed share both.

A trunk is a chain of runs of train.py, one to each point where something leaves it, so that its beginning is the same run for
the sweep of learning rates, for every budget and for every study that asks for it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from nanostack.config import Data, Growth, Optim, OptimizerName, Stage, Train
from nanostack.errors import UserError
from nanostack.flops import flops_per_token
from nanostack.model import LlamaConfig
from nanostack.old_fields import former_config
from nanostack.text.manifest import load_manifest, manifest_sha256

NUMERICS = 2  # raised when a config gives other numbers than before, for they must not meet in one table; 2: attention in C


@dataclass(frozen=True)
class Jump:
    """A growth of an arm, when it has spent so many FLOPs."""

    at: float  # as a share of the study's largest budget
    growth: Growth
    restart: bool = True  # warm up again from 0; else the rate goes on
    rewarm: bool = False  # where the rate goes on: warm up that of the new layers alone
    optim: OptimizerName | None = None  # from here on; None: the same as before

    def __post_init__(self):
        _check(
            "a Jump",
            at=_number(self.at) and 0 < self.at < 1,
            growth=isinstance(self.growth, Growth),
            optim=self.optim in (None, *get_args(OptimizerName)),
        )


@dataclass(frozen=True)
class Arm:
    """One way to spend the FLOPs."""

    label: str
    n_layer: int  # to begin with
    jumps: tuple[Jump, ...] = ()
    optim: OptimizerName = "adamw"  # to begin with
    model: Mapping[str, Any] = field(
        default_factory=dict
    )  # what differs from the study's, to begin with: loops, residual_scale
    budgets: tuple[float, ...] = ()  # at which it is measured, as shares of the study's largest; (): at all of them
    batch_tokens: int | None = None  # None: the study's

    def __post_init__(self):
        _check(
            f"arm {self.label!r}",
            budgets=self.budgets == () or _tuple(self.budgets, lambda share: _number(share) and 0 < share <= 1),
            batch_tokens=self.batch_tokens is None or _count(self.batch_tokens),
            model=isinstance(self.model, Mapping) and {"loops", "residual_scale"} >= set(self.model),
            optim=self.optim in get_args(OptimizerName),
            label=isinstance(self.label, str),
            n_layer=_count(self.n_layer),
            jumps=_tuple(self.jumps, lambda jump: isinstance(jump, Jump)),
        )

    def begins(self, model: LlamaConfig) -> LlamaConfig:
        """The shape with which it begins, in a study of this model."""
        return replace(model, n_layer=self.n_layer, **self.model)

    def goes_to(self, budget: float, largest: float) -> bool:
        """Whether it is measured at this budget of a study."""
        return not self.budgets or any(math.isclose(budget, share * largest, rel_tol=0.01) for share in self.budgets)


@dataclass(frozen=True)
class Size:
    """A study's target at one size of machine."""

    model: LlamaConfig  # vocab_size None: the data's
    budgets: tuple[float, ...]  # FLOPs by the paper's count
    batch_tokens: int
    micro_batch: int
    warmup_tokens: int
    dtype: Literal["float32", "bfloat16"]  # said, so that machines do not differ
    lrs: tuple[float, ...] = (4e-3, 8e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    decay: float = 0.2  # of a budget's FLOPs
    val_tokens: int = 65536
    evaluations: int | None = None  # on the way to the largest budget; None: two of a trunk's run, one of a branch
    text: str = "stdlib"  # source of `nanostack prepare`, large enough for these budgets

    @property
    def folder(self) -> Path:
        """Where the text lies, prepared with 512 tokens."""
        return Path("data") / f"{Path(self.text.partition(':')[0]).name}512"

    def __post_init__(self):
        _check(
            "a Size",
            model=isinstance(self.model, LlamaConfig),
            budgets=_tuple(self.budgets, _positive),
            **{name: _count(getattr(self, name)) for name in ("batch_tokens", "micro_batch", "val_tokens")},
            evaluations=self.evaluations is None or _count(self.evaluations),
            warmup_tokens=isinstance(self.warmup_tokens, int) and self.warmup_tokens >= 0,
            dtype=self.dtype in ("float32", "bfloat16"),
            lrs=_tuple(self.lrs, _positive),
            seeds=_tuple(self.seeds, lambda seed: isinstance(seed, int)) and len(set(self.seeds)) == len(self.seeds),
            decay=_number(self.decay) and 0 < self.decay < 1,
        )


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value) -> bool:
    return _number(value) and value > 0


def _count(value) -> bool:
    return isinstance(value, int) and value > 0


def _tuple(values, each) -> bool:
    return isinstance(values, tuple) and all(map(each, values))


def _check(what: str, **right: bool) -> None:
    """Raise `UserError` that names the field of a study file which is not what it should be."""
    if wrong := [name for name, fine in right.items() if not fine]:
        raise UserError(f"{what} has no valid {', '.join(wrong)}; see study/plan.py (a tuple of one is written with a comma)")


CPU = Size(  # two cores, an hour a study
    model=LlamaConfig(n_layer=8, n_head=2, n_kv_head=2, d_model=48, d_ff=128, vocab_size=None, seq_len=128),
    budgets=(7.5e11, 1.5e12, 3e12),
    batch_tokens=1024,
    micro_batch=8,
    warmup_tokens=61_440,
    dtype="float32",
)
GPU = Size(  # up to 7e15 FLOPs and 430 runs a study: 6 minutes and the starts, if four at a time reach 20 TFLOP/s; an estimate
    model=LlamaConfig(n_layer=8, n_head=2, n_kv_head=2, d_model=128, d_ff=352, vocab_size=None, seq_len=512),
    budgets=(2.5e13, 5e13, 1e14),
    batch_tokens=8192,
    micro_batch=16,
    warmup_tokens=409_600,
    dtype="bfloat16",
    text="site-packages",
)


CPU_PACE = 8.5e10  # FLOP/s of two runs side by side, one core each: a CPU size on an AMD EPYC with AVX-512
GPU_PACE = 2e13  # of four side by side on one GPU: an estimate

CONTROLS = {  # what every study compares with
    "scratch": Arm("8 layers from scratch", 8),
    "base": Arm("2 layers, never grown", 2),
    "base4": Arm("4 layers, never grown", 4),
}


def controls(optim: OptimizerName) -> dict[str, Arm]:
    """The same, trained by another optimizer."""
    return {name: replace(arm, optim=optim) for name, arm in CONTROLS.items()}


STACK = Growth("stack", 4, moments_old="keep", moments_new="zero")  # the recipe that served best, or nearly


def stacked(label: str, optim: OptimizerName = "adamw", share: float = 1.0) -> Arm:
    """2 → 8 layers after a tenth of the FLOPs, old moments kept and zero for new layers, the rate goes on; measured at a share
    of the study's largest budget and at its half, between which speedups up to 100 % are seen."""
    jump = Jump(0.1 * share, STACK, restart=False)
    return Arm(label, 2, (jump,), optim, budgets=(share / 2, share))


def with_earlier(*budgets: float) -> tuple[float, ...]:
    """These budgets, and before each those at which `stacked` is measured, too."""
    return tuple(sorted(budget * share for budget in budgets for share in (0.5, 1.0)))


@dataclass(frozen=True)
class Study:
    name: str
    question: str
    arms: dict[str, Arm]  # "scratch" among them, and every base without jumps
    sizes: dict[str, tuple[Size, ...]]  # "cpu", "gpu", ...: one target, or several to compare
    means: str = ""  # for a user, written when the results were in; the report shows it

    def __post_init__(self):
        _check(
            f"study {self.name!r}",
            name=isinstance(self.name, str) and re.fullmatch(r"\w+", self.name),
            arms=isinstance(self.arms, dict) and all(isinstance(arm, Arm) for arm in self.arms.values()),
            sizes=isinstance(self.sizes, dict)
            and all(_tuple(of, lambda s: isinstance(s, Size)) and of for of in self.sizes.values()),
        )


@dataclass(frozen=True)
class Job:
    """One run of train.py."""

    name: str  # with a hash of all that shapes its losses
    config: Train
    needs: str | None  # the job from whose checkpoint it starts
    begins: int  # tokens that it starts after
    flops: float  # it will spend, to show progress
    budget: float | None = None  # of a branch


@dataclass(frozen=True)
class Place:
    """A point on a trunk."""

    model: LlamaConfig
    optim: OptimizerName  # that goes on from here
    batch_tokens: int
    job: Job | None = None  # that ends here
    samples: int = 0
    flops: float = 0.0


class Plan:
    """The jobs of a study on one prepared text. All tokens are whole batches."""

    def __init__(self, study: Study, size: Size, data: Path | None, out: Path, vocab: int | None = None):
        """Without `data` it can only be counted, for a text of `vocab` tokens."""
        vocab = vocab or load_manifest(data)["tokenizer"]["n_vocab"]
        model = replace(size.model, vocab_size=size.model.vocab_size or -(-vocab // 128) * 128)
        self.study, self.size, self.model, self.data, self.out = study, size, model, data, out
        self.manifest = manifest_sha256(data) if data else ""
        if "scratch" not in study.arms or study.arms["scratch"].jumps:
            raise UserError(f"study {study.name} needs an arm `scratch` that never grows")
        if not (size.lrs and size.seeds and size.budgets) or list(size.budgets) != sorted(set(size.budgets)):
            raise UserError(f"study {study.name} needs learning rates, seeds, and budgets that rise, not {size.budgets}")
        target = study.arms["scratch"].begins(self.model)
        for name, arm in study.arms.items():
            ends = arm.begins(self.model)
            for jump in arm.jumps:
                ends = jump.growth.plan(ends).config
            if arm.jumps and replace(ends, residual_scale=target.residual_scale) != target:
                raise UserError(
                    f"study {study.name}: arm {name} grows to {ends.n_layer} layers × {ends.d_model}, scratch differs"
                )
            if arm.jumps and self.base_of(arm) is None:
                raise UserError(
                    f"study {study.name}: arm {name} begins with {arm.n_layer} layers and {arm.optim}, which no arm keeps "
                    "for good"
                )
            if not any(arm.goes_to(b, size.budgets[-1]) for b in size.budgets):
                raise UserError(f"study {study.name}: arm {name} is measured at none of the budgets")
            least = self.batch_of(arm) * flops_per_token(ends) / (2 * size.decay)
            if (tiny := min(b for b in size.budgets if arm.goes_to(b, size.budgets[-1]))) < least:
                raise UserError(f"study {study.name}: {tiny:.3g} FLOPs have no room for a step of {arm.label} that decays")
            if not self.budgets(name):
                raise UserError(f"study {study.name}: arm {name} has no room to train between its last growth and any budget")
            self.jobs(name, size.seeds[0], size.lrs[0], size.lrs[0], self.budgets(name)[-1])  # refuses what cannot be

    def epochs(self) -> float:
        """How often the arm with the cheapest tokens reads the text at the largest budget."""
        cheapest = min(flops_per_token(arm.begins(self.model)) for arm in self.study.arms.values())
        read = self.size.budgets[-1] / cheapest
        return read / load_manifest(self.data)["splits"]["train"]["tokens"]

    def base_of(self, arm: Arm) -> str | None:
        """Name of the arm that never grows and begins as this one."""
        begun = replace(arm, label="", jumps=(), budgets=())
        return next((n for n, a in self.study.arms.items() if replace(a, label="", budgets=()) == begun), None)

    def budgets(self, name: str) -> tuple[float, ...]:
        """Those at which an arm has time to learn how to grow and to warm up before it decays, or grows just when it does."""
        arm, warmup = self.study.arms[name], self.size.warmup_tokens
        model, spent, largest = arm.begins(self.model), 0.0, self.size.budgets[-1]
        for jump in arm.jumps:
            spent = jump.at * largest
            model = jump.growth.plan(model).config
            warmup = jump.growth.learning_steps() * self.batch_of(arm) + 2 * self.size.warmup_tokens
        least = spent + warmup * flops_per_token(model)

        def has_room(budget: float) -> bool:
            stable = (1 - self.size.decay) * budget
            last = arm.jumps[-1] if arm.jumps else None
            at_decay = last and not last.restart and not last.growth.learning_steps() and math.isclose(stable, spent)
            return stable > least or bool(at_decay)

        return tuple(b for b in self.size.budgets if arm.goes_to(b, largest) and has_room(b))

    def batch_of(self, arm: Arm) -> int:
        """Tokens of a step of an arm."""
        return arm.batch_tokens or self.size.batch_tokens

    def jobs(self, name: str, seed: int, lr: float, base_lr: float, budget: float) -> list[Job]:
        """The runs of an arm to one of its budgets, each behind the one it needs: the trunk, which is cut where the decay of
        any budget begins, and the branch that decays."""
        arm, size = self.study.arms[name], self.size
        place, jobs = Place(arm.begins(self.model), arm.optim, self.batch_of(arm)), []
        for number, jump in enumerate((None, *arm.jumps)):
            last = number == len(arm.jumps)
            rate = lr if last else base_lr
            more = {"warmup_tokens": size.warmup_tokens if jump is None or jump.restart else 0}
            if jump is not None:
                more |= {"growth": jump.growth, "rewarm_tokens": size.warmup_tokens if jump.rewarm else 0}
                place = replace(place, optim=jump.optim or place.optim)
            stable = [(1 - size.decay) * b for b in self.budgets(name) if b <= budget]
            spent = arm.jumps[number - 1].at * size.budgets[-1] if jump else 0.0
            cuts = (
                [end for end in stable if not math.isclose(end, spent)] if last else [arm.jumps[number].at * size.budgets[-1]]
            )
            for end in cuts:
                place, more = self.segment(place, seed, end, rate, more), {}
                jobs.append(place.job)
        grown = replace(place, model=more["growth"].plan(place.model).config) if more.get("growth") else place
        tokens = self.tokens(size.decay * budget, grown)
        branch = self.run(place, seed, Stage(tokens, lr, "wsd", decay_tokens=tokens, **more), budget)
        return [*jobs, branch.job]

    def segment(self, place: Place, seed: int, end: float, lr: float, more: dict) -> Place:
        """From a place on the trunk to where it has spent `end` FLOPs, at a constant rate."""
        growth = more.get("growth")
        model = growth.plan(place.model).config if growth else place.model
        learned = growth.learning_steps() * place.batch_tokens if growth else 0
        tokens = self.tokens(end - place.flops, replace(place, model=model)) - learned
        if tokens <= more.get("warmup_tokens", 0):
            raise UserError(f"study {self.study.name}: {model.n_layer} layers have no room to warm up before {end:.3g} FLOPs")
        return self.run(place, seed, Stage(tokens, lr, "constant", **more))

    def run(self, start: Place, seed: int, stage: Stage, budget: float | None = None) -> Place:
        """Where a run of one stage ends that begins at `start`."""
        size, model, learned = self.size, start.model, 0
        if stage.growth is not None:
            model, learned = stage.growth.plan(model).config, stage.growth.learning_steps() * start.batch_tokens
        needs, every = start.job.name if start.job else None, size.budgets[-1] / size.evaluations if size.evaluations else None
        config = Train(
            data=Data(str(self.data), val_tokens=size.val_tokens),
            model=start.model,
            stages=(stage,),
            batch_tokens=start.batch_tokens,
            micro_batch=min(size.micro_batch, start.batch_tokens // model.seq_len),
            out=str(self.out),
            dtype=size.dtype,
            optim=Optim(start.optim),
            seed=seed,
            init_from=str(Path(start.job.config.out) / f"ckpt-{start.samples}.pt") if start.job else None,
            log_interval=max(1, stage.tokens // 10),
            eval_interval=max(1, round(every / flops_per_token(model)) if every else stage.tokens // (1 if budget else 2)),
            save_interval=2**62,
        )
        shaping = {k: v for k, v in config.shaping().items() if k not in ("log_interval", "eval_interval")}
        about = said(former_config(shaping) | {"init_from": needs, "text": self.manifest, "numerics": NUMERICS})
        about = json.dumps(about, sort_keys=True)
        by = "" if start.optim == "adamw" else f"{start.optim}-"
        by += f"{model.loops}-loops-" if model.loops > 1 else ""
        name = f"{model.n_layer}-layers-{by}lr{stage.lr:g}-s{seed}-" + (f"b{budget:.3g}-" if budget else "")
        name += hashlib.sha256(about.encode()).hexdigest()[:8]
        config = replace(config, out=str(self.out / name))
        tokens = learned + stage.tokens
        flops = float(tokens * flops_per_token(model))
        job = Job(name, config, needs, start.samples * model.seq_len, flops, budget)
        return Place(model, start.optim, start.batch_tokens, job, start.samples + tokens // model.seq_len, start.flops + flops)

    def tokens(self, flops: float, place: Place) -> int:
        """Whole batches that take about so many FLOPs."""
        return max(1, round(flops / flops_per_token(place.model) / place.batch_tokens)) * place.batch_tokens


def planned_cost(study: Study, size: Size, vocab_size: int = 512) -> tuple[int, float]:
    """How many runs a study takes at a size, and their FLOPs, if no grid of rates is widened: every rate with the first seed,
    the two best with all seeds."""
    plan = Plan(study, size, None, Path(), vocab_size)
    jobs = {}
    for name, rate, seed in product(study.arms, enumerate(size.lrs), enumerate(size.seeds)):
        if rate[0] < 2 or seed[0] == 0:
            for budget in plan.budgets(name):
                jobs |= {job.name: job.flops for job in plan.jobs(name, seed[1], rate[1], size.lrs[0], budget)}
    return len(jobs), sum(jobs.values())


def said(value):
    """A config without what is None, False or 0: options that it does not use, and that may not have existed yet."""
    if isinstance(value, dict):
        return {k: said(v) for k, v in value.items() if v}
    return [said(one) for one in value] if isinstance(value, list) else value
