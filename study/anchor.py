"""An anchor from outside: nanoGPT's characters of Shakespeare on a CPU, beside a Llama of ours of the same size, also grown.

    python -m study.anchor tinyshakespeare.txt

nanoGPT's README trains 4 layers × 128 with a context of 64 on a batch of 12 for 2,000 steps on a CPU, and tells a validation
loss of 1.88 nats per character. Here as there: the first nine tenths of the text are for training and the rest is judged by,
as many tokens are seen, the rate falls from 1e-3 to 1e-4. Ours sees bytes, which these characters are. The grown model spends
the FLOPs of the other: 1 layer for a tenth of them, then 4.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from rich.console import Console
from rich.table import Table

from nanostack.config import Data, Optim, Stage, Train, grow
from nanostack.device import choose_device
from nanostack.errors import UserError, command_line
from nanostack.files import replacing
from nanostack.flops import flops_per_token, n_params
from nanostack.model import LlamaConfig
from nanostack.provenance import device_name, git_commit, versions
from nanostack.runs import read_run
from nanostack.text.corpus import CorpusConfig, prepare
from study import training_run

PUBLISHED = {"label": "nanoGPT, as its README says", "val_loss": 1.88, "source": "github.com/karpathy/nanoGPT, README.md"}
SHAPE = LlamaConfig(n_layer=4, n_head=4, n_kv_head=4, d_model=128, d_ff=344, vocab_size=None, seq_len=64)
BATCH = 12  # sequences
RATES = {"lr": 1e-3, "min_lr": 1e-4}


@dataclass(frozen=True)
class Command:
    """Train nanoGPT's Shakespeare by ours."""

    text: tyro.conf.Positional[Path]
    """Karpathy's tinyshakespeare, 1.1 MB."""
    steps: int = 2000
    seeds: int = 1
    out: Path = Path("bench/results/anchor.json")
    json: bool = False
    """Print the result as one JSON object; everything else goes to standard error."""


def split(text: Path, folder: Path) -> Path:
    """The prepared text: its first nine tenths to train on, the rest to judge by."""
    try:
        characters = text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{text} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    if not characters.isascii():
        raise UserError(f"{text} has characters of more than a byte: a loss per byte would be none per character")
    cut = int(0.9 * len(characters))
    for name, part in (("train", characters[:cut]), ("val", characters[cut:])):
        (folder / f"{name}.txt").write_text(part)
    options = {"tokenizer": "bytes", "val": (str(folder / "val.txt"),), "workers": 1}
    prepare(CorpusConfig(sources=[str(folder / "train.txt")], out=folder / "data", **options))
    return folder / "data"


def arms(steps: int) -> dict[str, tuple[LlamaConfig, tuple[Stage, ...]]]:
    """The shape that each begins with, and its stages: of equal FLOPs."""
    tokens, warmup = steps * BATCH * SHAPE.seq_len, steps // 20 * BATCH * SHAPE.seq_len
    base, whole = replace(SHAPE, n_layer=1, vocab_size=384), replace(SHAPE, vocab_size=384)
    spent = 0.1 * tokens * flops_per_token(whole)

    def batches(flops: float, model: LlamaConfig) -> int:
        return max(1, round(flops / flops_per_token(model) / (BATCH * SHAPE.seq_len))) * BATCH * SHAPE.seq_len

    first = Stage(tokens=batches(spent, base), lr=RATES["lr"], schedule="constant", warmup_tokens=warmup)
    then = grow("stack", g=4, moments_old="keep", moments_new="zero", tokens=batches(9 * spent, whole), **RATES)
    return {
        "4 layers from scratch": (SHAPE, (Stage(tokens=tokens, warmup_tokens=warmup, **RATES),)),
        "1 → 4 layers": (replace(SHAPE, n_layer=1), (first, then)),
    }


def main(command: Command) -> dict:
    if command.steps < 20 or command.seeds < 1:
        raise UserError(f"at least 20 steps and 1 seed are needed, not {command.steps} and {command.seeds}")
    if not command.out.parent.is_dir():
        raise UserError(f"there is no folder {command.out.parent} for the result: name another --out")
    console = Console(stderr=command.json, highlight=False, width=None if sys.stdout.isatty() else 120)
    found: dict = {"steps": command.steps, "published": PUBLISHED, "device": device_name(choose_device("auto")), "arms": {}}
    with TemporaryDirectory() as folder:
        data = split(command.text, Path(folder))
        for label, (model, stages) in arms(command.steps).items():
            runs = found["arms"][label] = []
            for seed in range(command.seeds):
                config = Train(
                    data=Data(str(data), val_tokens=2**40),  # all of them
                    model=model,
                    stages=stages,
                    optim=Optim(betas=(0.9, 0.99)),  # nanoGPT's, for small batches
                    batch_tokens=BATCH * SHAPE.seq_len,
                    micro_batch=BATCH,
                    out=f"{folder}/{label}-{seed}",
                    dtype="float32",
                    seed=seed,
                    log_interval=max(1, sum(stage.tokens for stage in stages) // 5),
                    eval_interval=2**62,
                    save_interval=2**62,
                )
                training_run(config).train()
                last = read_run(Path(config.out))[1][-1]
                runs.append({name: last[name] for name in ("val_loss", "tokens", "flops", "seconds")} | {"seed": seed})
    found |= {"n_params": n_params(replace(SHAPE, vocab_size=384)), "git_commit": git_commit(), "versions": versions()}
    table = Table("", "validation loss, nats per character", "tokens", "FLOPs", "seconds", title="characters of Shakespeare")
    table.add_row(PUBLISHED["label"], f"{PUBLISHED['val_loss']}", f"{command.steps * BATCH * 64:,}", "", "")
    for label, runs in found["arms"].items():
        losses = ", ".join(f"{run['val_loss']:.3f}" for run in runs)
        table.add_row(label, losses, f"{runs[0]['tokens']:,}", f"{runs[0]['flops']:.3g}", f"{runs[0]['seconds']:.0f}")
    console.print(table)
    with replacing(command.out) as file:
        file.write(json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {command.out}", soft_wrap=True)
    return found


if __name__ == "__main__":
    command_line(Command, main, __doc__)
