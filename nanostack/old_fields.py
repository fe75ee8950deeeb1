"""Fields of a run's config that had other names: they are still read, and a line says what they are called now."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

RENAMED = {
    "optim.decay": "optim.weight_decay",
    "optim.clip": "optim.grad_clip",
    "parallel.replicate": "parallel.dp_replicate",
    "parallel.shard": "parallel.dp_shard",
}
ADDED: dict[str, dict[str, Any]] = {  # later, and what every run did before
    "optim": {"name": "adamw", "momentum": 0.95},
    "model": {"loops": 1, "residual_scale": None, "d_head": None, "qk_norm": False}
    | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False),
    "rope_scaling": {"kind": "llama3", "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True},
    "growth": {"residual": "rescale"},
    "parallel": {"reshard_after_forward": None, "prefetch": 0},
}
Class = TypeVar("Class", bound=type)
_said: set[str] = set()


def renamed(**now: str) -> Callable[[Class], Class]:
    """Let a dataclass be built, and be asked, with the names that its fields had: `renamed(decay="weight_decay")`."""

    def decorate(cls: Class) -> Class:
        build = vars(cls)["__init__"]

        @functools.wraps(build)
        def build_by_any_name(self, *values, **named):
            for name in (one for one in now if one in named):
                if now[name] in named:
                    raise TypeError(
                        f"{cls.__name__} is given {name} and {now[name]}, which are one (dataclasses.replace gives the second)"
                    )
                _say(f"{cls.__name__}({name}=...)", now[name])
                named[now[name]] = named.pop(name)
            build(self, *values, **named)

        setattr(cls, "__init__", build_by_any_name)  # noqa: B010
        for old, new in now.items():
            setattr(cls, old, property(attrgetter(new)))
        return cls

    return decorate


def current(overrides: Sequence[str]) -> list[str]:
    """The words of a command line, `--optim.decay` as `--optim.weight_decay`."""
    words = []
    for word in overrides:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in RENAMED:
            _say(f"--{name}", f"--{RENAMED[name]}")
            word = f"--{RENAMED[name]}{equals}{value}"
        words.append(word)
    return words


def current_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config as `where` (a run's header) keeps it, under the names of today."""
    return _translated(config, RENAMED, lambda old, new: _say(f"{old} in {where}", new))


def former_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config under the names that it had at first, without what was added since and is at its default: what was hashed then
    has the same hash."""
    config = _translated(config, {new: old for old, new in RENAMED.items()}, lambda *_: None)
    return {part: _without(part, value) for part, value in config.items()}


def _without(part: str, value: Any) -> Any:
    """A part of a config, but for fields of ADDED that have the values which stand there."""
    if isinstance(value, list | tuple):
        return [_without(part, one) for one in value]
    if not isinstance(value, dict):
        return value
    added = ADDED.get(part, {})
    return {name: _without(name, one) for name, one in value.items() if name not in added or one != added[name]}


def _translated(config: dict, names: dict[str, str], say: Callable[[str, str], None]) -> dict:
    config = {part: dict(value) if isinstance(value, dict) else value for part, value in config.items()}
    for old, new in names.items():
        part, _, field = old.partition(".")
        if isinstance(config.get(part), dict) and field in config[part]:
            config[part][new.partition(".")[2]] = config[part].pop(field)
            say(old, new)
    return config


def _say(old: str, new: str) -> None:
    if old not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(old)
        print(f"note: {old} is now called {new}", file=sys.stderr)
