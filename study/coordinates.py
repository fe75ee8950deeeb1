"""Do activations and their updates keep their size with depth? A coordinate check of `residual_scale` (arXiv 2505.01618).

    python -m study.coordinates data/stdlib

Models of one width and 2 to 32 layers take a few steps at one rate on the same text. Two sizes are told for each: the root
mean square of the residual stream behind the last block at first, and of what the steps changed of it. Where a rate is to
travel with depth, neither may rise or fall with it: on axes in powers of 2 their lines lie flat.
"""

import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from nanostack.config import Optim
from nanostack.device import keep_freed_memory
from nanostack.errors import command_line
from nanostack.files import replacing
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer
from nanostack.provenance import git_commit, versions
from nanostack.text.dataset import Tokens
from study import ROOT

DEPTHS = (2, 4, 8, 16, 32)
SHAPE = LlamaConfig(n_layer=2, n_head=2, n_kv_head=2, d_model=64, d_ff=176, vocab_size=1024, seq_len=64)
WAYS = {  # how a model differs from SHAPE, and what trains it
    "AdamW": ({}, Optim()),
    "AdamW, residual_scale 2": ({"residual_scale": 2.0}, Optim()),
    "Muon": ({}, Optim("muon")),
    "Muon, residual_scale 2": ({"residual_scale": 2.0}, Optim("muon")),
}


@dataclass(frozen=True)
class Command:
    """A coordinate check over depth."""

    data: tyro.conf.Positional[Path]
    """Prepared text."""
    steps: int = 10
    lr: float = 4e-3
    seeds: int = 3
    out: Path = Path("bench/results/coordinates.json")
    picture: Path = ROOT / "docs/coordinates.png"
    json: bool = False
    """Print the sizes as one JSON object too."""


def sizes(config: LlamaConfig, optim: Optim, text: Tokens, steps: int, lr: float, seed: int) -> tuple[float, float]:
    """(Root mean square of the residual stream of a model that begins, of its change by so many steps), on the first batch."""
    model = Llama(replace(config, vocab_size=text.vocab_size), seed)
    optimizer = make_optimizer(model, optim)
    streams: list[torch.Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda norm, arguments: streams.append(arguments[0].detach()))
    batches = [torch.from_numpy(text.batch(8 * i, 8 * i + 8)) for i in range(steps)]
    with torch.no_grad():
        model(batches[0][:, :-1])
    for batch in batches:
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        guarded_step(optimizer, loss.detach(), lr, 1e9)
    with torch.no_grad():
        model(batches[0][:, :-1])
    hook.remove()
    return rms(streams[0]), rms(streams[-1] - streams[0])


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def slope(depths: tuple[int, ...], values: list[float]) -> float:
    """Of the line through (log depth, log value): 0 where the depth makes no difference, 1 where they rise together."""
    return statistics.linear_regression([math.log(d) for d in depths], [math.log(v) for v in values]).slope


def measured(
    text: Tokens, steps: int, lr: float, seeds: int, depths: tuple[int, ...] = DEPTHS, ways: dict = WAYS, say=lambda name: None
) -> dict:
    """{way: {size: {values by depth, slope}}}, each value the mean over the seeds."""
    found = {}
    for name, (changes, optim) in ways.items():
        say(name)
        of_depth = []
        for depth in depths:
            config = replace(SHAPE, n_layer=depth, seq_len=text.seq_len, **changes)
            each = [sizes(config, optim, text, steps, lr, seed) for seed in range(seeds)]
            of_depth.append([statistics.mean(values) for values in zip(*each, strict=True)])
        found[name] = {
            what: {"values": list(values), "slope": slope(depths, list(values))}
            for what, values in zip(("stream", "change"), zip(*of_depth, strict=True), strict=True)
        }
    return found


def draw(found: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), dpi=140, layout="constrained")
    titles = {"stream": "residual stream at first", "change": "its change by the first steps"}
    for panel, (what, title) in zip(panels, titles.items(), strict=True):
        for number, (name, sizes_of) in enumerate(found["ways"].items()):
            line = {"color": ("#d1495b", "#00798c")[number // 2], "ls": "-" if number % 2 else "--", "marker": "os"[number % 2]}
            panel.plot(found["depths"], sizes_of[what]["values"], **line, label=f"{name}: slope {sizes_of[what]['slope']:+.2f}")
        panel.set(xscale="log", yscale="log", xlabel="layers", ylabel="root mean square", title=title)
        panel.set_xticks(found["depths"], [str(depth) for depth in found["depths"]])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(out)
    plt.close(figure)


def main(command: Command) -> dict:
    keep_freed_memory()
    text, console = Tokens(command.data, "train", SHAPE.seq_len), Console(stderr=True, highlight=False)
    found: dict = {"depths": list(DEPTHS), "steps": command.steps, "lr": command.lr, "seeds": command.seeds}
    found["ways"] = measured(text, command.steps, command.lr, command.seeds, say=lambda name: console.print(f"{name} …"))
    found |= {"git_commit": git_commit(), "versions": versions()}
    table = Table("", *(f"{depth} layers" for depth in DEPTHS), "slope", title="change of the residual stream")
    for name, of_way in found["ways"].items():
        values = [f"{value:.3f}" for value in of_way["change"]["values"]]
        table.add_row(name, *values, f"{of_way['change']['slope']:+.2f}")
    console.print(table)
    with replacing(command.out) as file:
        file.write(json.dumps(found, indent=1) + "\n")
    draw(found, command.picture)
    console.print(f"wrote {command.out} and {command.picture}", soft_wrap=True)
    return found


if __name__ == "__main__":
    command_line(Command, main)
