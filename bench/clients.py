"""What people's programs make of an exported folder: python -m bench.clients [NAME...] --out bench/results/clients.json

Each client gets a virtual environment of its own below --at, torch first and by constraints.txt, and there runs what
bench/client_probes.py has for it on one folder that `nanostack export --gguf` wrote, beside what our model says: logarithms of
probabilities, greedy tokens, ids of texts. The weights are random, and so large that tokens differ. It takes a network and
about 1 GB a client, and is not run in CI: mergekit and transformers are judges in tests/hf, llama.cpp where it is installed.
"""

import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro

from bench import ROOT
from nanostack import checkpoint
from nanostack.commands import export
from nanostack.config import Optim
from nanostack.errors import UserError, command_line
from nanostack.model import Llama, LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer
from nanostack.text.corpus import CorpusConfig, prepare
from nanostack.text.manifest import manifest_sha256


class Client(NamedTuple):
    packages: tuple[str, ...]
    pinned: bool = True  # by constraints.txt; else they are of another time, and torch alone is
    torch: bool = True  # whether it takes torch at all


CLIENTS = {
    "transformers 5": Client(("transformers==5.24.0", "accelerate")),
    "transformers 4.45": Client(("transformers==4.45.2", "accelerate==1.0.1", "numpy<2.5"), pinned=False),
    "peft": Client(("transformers==5.24.0", "peft")),
    "onnx": Client(("transformers==5.24.0", "onnx", "onnxscript", "onnxruntime")),
    "litgpt": Client(("litgpt==0.5.13",), pinned=False),
    "ctranslate2": Client(("transformers==5.24.0", "ctranslate2")),
    "llama.cpp": Client(("xllamacpp", "numpy"), torch=False),
}
SHAPE = LlamaConfig(n_layer=4, n_head=8, n_kv_head=4, d_model=128, d_ff=352, vocab_size=512, seq_len=256)
PROMPTS = ["def ", "import os\n\nclass", "x = [1234, 5678]\n", "naïve ☃ 中文 🙂", "    return self"]
ODD = [
    *PROMPTS,
    "",
    " ",
    "\n \n  ",
    "\t\t\r\n",
    "12345678901",
    "don't DON'T I'M",
    "\x00\x1f\x7f",
    "👩‍💻 é",
    "字" * 40,
    " " * 99,
    "a  b   c\n\n\n",
]
TOKENS = 24  # that each prompt is continued with


@dataclass
class Options:
    """Run people's programs on an exported folder."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Clients; all of them unless given."""
    at: Path = ROOT / "out/clients"
    """Folder of the environments, which are kept, and of the model."""
    out: Path | None = None
    """JSON; what it holds of other clients is kept."""
    table: bool = False
    """Print the rows of the docs from --out, and run nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


def main(options: Options) -> dict:
    if unknown := [name for name in options.names if name not in CLIENTS]:
        raise UserError(f"there is no client {unknown[0]!r}; there are {', '.join(CLIENTS)}")
    found = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    if options.table:
        print("\n".join(table(found)))
        return found
    write_model(options.at)
    for name in options.names or CLIENTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        found[name] = probe(name, options.at)
        found = {client: found[client] for client in CLIENTS if client in found}
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    return found


def table(found: dict) -> list[str]:
    """The rows of docs/use_it_elsewhere.md."""
    words = {
        "log_probabilities": "log-probabilities to {:.0e}",
        "logits": "logits to {:.0e}",
        "loss": "first loss to {:.0e}",
        "fell": "then from {0[0]:.2f} to {0[1]:.2f}",
        "greedy": "greedy tokens of {} prompts",
        "texts": "texts of {} prompts",
        "ids": "ids of {} texts",
    }
    rows = []
    for name, said in found.items():
        shown = ", ".join(f"{package} {version}" for package, version in said["versions"].items() if package != "tokenizers")
        for use, near in said.items():
            if use != "versions":
                close = ", ".join(words[key].format(value) for key, value in near.items())
                rows.append(f"| {name} | {use} | {close} | {shown} |")
                shown = ""
    return rows


def probe(name: str, at: Path) -> dict:
    """What a client said; of one that could not be installed or failed, the last line of its error."""
    python = environment(at / name.replace(" ", "-"), CLIENTS[name])
    command = [python, ROOT / "bench/client_probes.py", name, at]
    done = subprocess.run(command, capture_output=True, text=True, cwd=at)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def environment(folder: Path, client: Client) -> Path:
    """The Python of a virtual environment with a client; torch comes first, so that nothing else asks for another."""
    python = folder / "bin/python"
    if (folder / "ready").exists():
        return python
    venv.create(folder, clear=True, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    pinned = ["--constraint", ROOT / "constraints.txt"]
    (pin,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    if client.torch:
        subprocess.run([*install, *pinned, pin], check=True)
    subprocess.run([*install, *(pinned if client.pinned else [pin]), *client.packages], check=True)
    (folder / "ready").touch()
    return python


def write_model(at: Path) -> None:
    """at/model, as the real command exports it, and what ours says: at/said.json, at/log_probabilities.npy."""
    texts = [path.read_text() for path in sorted((ROOT / "nanostack").glob("*.py"))]
    prepare(CorpusConfig([str(ROOT / "nanostack")], at / "data", f"bpe:{SHAPE.vocab_size}", workers=1, overwrite=True))
    text = tokenizer.load(at / "data")
    state = State.create(SHAPE, Optim(), Placement(torch.device("cpu")), 0)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            parameter.uniform_(0.5, 1.5, generator=drawn) if "norm" in name else parameter.normal_(0, 0.1, generator=drawn)
    checkpoint.write(checkpoint.pack(state, manifest_sha256(at / "data")), at / "ckpt.pt")
    export.main(export.Command(at / "ckpt.pt", at / "model", at / "data", gguf=True, overwrite=True))
    ids = text.encode(texts[0])[:64]
    with torch.no_grad():
        told = state.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    losses = -told[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    texts = [*ODD, *(line for whole in texts[:3] for line in whole.splitlines(keepends=True))]
    said = {
        "ids": ids,
        "texts": texts,
        "text_ids": text.encode_batch(texts),
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "eot": text.eot,
    }
    said |= {"greedy": [greedy(state.model, text.encode(prompt), text.eot) for prompt in PROMPTS]}
    said |= {"padded_loss": float(torch.cat([losses, losses[:49]]).mean())}  # of these ids and of their first 50
    (at / "said.json").write_text(json.dumps(said))
    np.save(at / "log_probabilities.npy", told.numpy())


@torch.no_grad()
def greedy(model: Llama, ids: list[int], eot: int) -> list[int]:
    """The likeliest tokens but for end-of-text, at which programs would stop."""
    for _ in range(TOKENS):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[eot] = -torch.inf
        ids = [*ids, int(logits.argmax())]
    return ids[-TOKENS:]


if __name__ == "__main__":
    command_line(Options, main, __doc__)
