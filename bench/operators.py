"""Draw what each depth operator makes of a base of four layers: `python bench/operators.py` writes docs/growth.png."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose kernels.py would stand before the package of that name

from nanostack.growth import OPERATORS, TAKES_G, connection_rate, plan  # noqa: E402

BASE = 4
COLOURS = ("#264653", "#2a9d8f", "#e9c46a", "#e76f51")
EXAMPLES = [(op, {"g": 2} if op in TAKES_G else {}) for op in OPERATORS] + [("stack", {"layers": "0,1-2*3,3"})]
HATCH = {"kept": None, "copied": "//", "zeroed": "xx", "random": ".."}
SAID = {
    "kept": "base layer, in its own storage",
    "copied": "copy",
    "zeroed": "copy whose outputs are zero",
    "random": "fresh, ramped in",
}


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 5.4), dpi=130)
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
        xlim=(-0.6, len(EXAMPLES) + 0.6), ylim=(-1.1, 9.2), title="depth operators on a base of four layers; the input is below"
    )
    axes.axis("off")
    patches = [Patch(facecolor="#888888", hatch=HATCH[rule], edgecolor="white", label=said) for rule, said in SAID.items()]
    axes.legend(handles=patches, frameon=False, ncols=4, loc="upper center", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/growth.png")


if __name__ == "__main__":
    main()
