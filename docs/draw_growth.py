"""Draw what the operators make of four layers, and of a weight: `python docs/draw_growth.py` writes docs/growth.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from nanostack import growth
from nanostack.growth import width
from nanostack.growth.depth import OPERATORS, TAKES_G, connection_rate, plan
from nanostack.growth.width import Width
from nanostack.model import Llama, LlamaConfig

BASE = 4
COLOURS = ("#264653", "#2a9d8f", "#e9c46a", "#e76f51")
EXAMPLES = [(op, {"g": 2} if op in TAKES_G else {}) for op in OPERATORS if op != "untie"]  # which makes the layers of stack
EXAMPLES += [("stack", {"layers": "0,1-2*3,3"})]
HATCH = {"kept": None, "copied": "//", "zeroed": "xx", "random": "..", "learned": "||"}
SAID = {
    "kept": "base layer, in its own storage",
    "copied": "copy",
    "zeroed": "copy whose outputs are zero",
    "random": "fresh, ramped in",
    "learned": "learned mixture, at first a copy",
}


NARROW = LlamaConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=8, d_ff=8, vocab_size=8, seq_len=8)
SHARES = (("split", None), ("split", 0.7), ("zero", None), ("random", None), ("learn", None))

ROOT = Path(__file__).resolve().parent.parent


def draw_depth(axes) -> None:
    for column, (op, options) in enumerate([("base", None), *EXAMPLES]):
        layers = [] if options is None else plan(BASE, op, **options)
        pairs = [(layer.source, layer.rule) for layer in layers] or [(i, "kept") for i in range(BASE)]
        for height, (source, rule) in enumerate(pairs):
            colour = "#cccccc" if source is None else COLOURS[source]
            axes.bar(column, 0.92, 0.7, height, color=colour, hatch=HATCH[rule], edgecolor="white", lw=0)
            around = [withStroke(linewidth=6, foreground=colour)]
            label = {"ha": "center", "va": "center", "color": "white", "weight": "bold", "path_effects": around}
            axes.text(column, height + 0.46, "" if source is None else source, **label)
        rate = "" if options is None else f"Rc {100 * connection_rate([source for source, _ in pairs]):.0f} %"
        name = op if options is None or "layers" not in options else options["layers"]
        axes.text(column, len(pairs) + 0.15, rate, ha="center", fontsize=8)
        axes.text(column, -0.25, name, ha="center", va="top", fontsize=9, rotation=20)
    axes.set(
        xlim=(-0.6, len(EXAMPLES) + 0.6),
        ylim=(-1.1, 9.2),
        title="depth: operators on a base of four layers; the input is below",
    )
    axes.axis("off")
    patches = [Patch(facecolor="#888888", hatch=HATCH[rule], edgecolor="white", label=said) for rule, said in SAID.items()]
    axes.legend(handles=patches, frameon=False, ncols=5, loc="upper center", fontsize=8)


def wide_weight(op: str, alpha: float | None) -> torch.Tensor:
    """What becomes of the gate and up projections, first half gate; of learn, what it starts with."""
    model, wider = Llama(NARROW, seed=3), Width(op, d_model=16, alpha=alpha)
    if op == "learn":
        grown = wider.config(NARROW)
        maps = width.axes(NARROW, grown, wider, torch.device("cpu"))
        return growth.learn.WidthMap(model, grown, maps, seed=3)("blocks.0.mlp.gate_up.weight").detach()[:16]
    growth.grow(model, wider=wider)
    return model.blocks[0].mlp.gate_up.weight.detach()[:16]


def draw_width(panels) -> None:
    pictures = [("base W, 8 × 8", Llama(NARROW, seed=3).blocks[0].mlp.gate_up.weight.detach()[:8])]
    pictures += [(op if alpha is None else f"{op}, α = {alpha}", wide_weight(op, alpha)) for op, alpha in SHARES]
    most = max(weight.abs().max().item() for _, weight in pictures)
    for panel, (name, weight) in zip(panels, pictures, strict=True):
        panel.imshow(weight, cmap="RdBu", vmin=-most, vmax=most, extent=(0, weight.shape[1], weight.shape[0], 0))
        panel.set(xlim=(0, 16), ylim=(16, 0), title=name, xticks=[], yticks=[])
        panel.title.set_fontsize(9)
        for line in (panel.axhline, panel.axvline):
            line(8, color="black", lw=0.8)
        for side in panel.spines.values():
            side.set_visible(False)


def main() -> None:
    figure = plt.figure(figsize=(10.5, 7.6), dpi=130, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5.2, 2.2))
    draw_depth(above.subplots())
    draw_width(below.subplots(1, 1 + len(SHARES)))
    below.suptitle("width: one weight (rows are outputs), 8 to 16 channels; white is zero", fontsize=11)
    figure.savefig(ROOT / "docs/growth.png")


if __name__ == "__main__":
    main()
