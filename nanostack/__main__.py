"""One door: `nanostack COMMAND ...`, or `python -m nanostack COMMAND ...`."""

import importlib
import sys

COMMANDS = {  # name: (module in nanostack.commands, what it does)
    "prepare": ("prepare", "text to tokens"),
    "sample": ("sample", "let a model write"),
    "evaluate": ("evaluate", "tasks of lm-eval, and loss on validation text"),
    "export": ("export", "a checkpoint to a Hugging Face folder"),
    "import": ("import_hf", "a Hugging Face Llama to a checkpoint"),
    "fit": ("fit", "the largest micro-batch that fits a GPU"),
    "plan": ("plan", "when to grow, how much, and what it may save"),
    "plot": ("plot", "draw the curves of runs"),
    "track": ("track", "show runs in TensorBoard or wandb"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: nanostack COMMAND ...; nanostack COMMAND --help tells its options", "", *lines])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in (None, "-h", "--help"):
        print(usage())
        sys.exit(2 if name is None else 0)
    if name not in COMMANDS:
        print(f"error: nanostack has no command {name!r}; it has {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"nanostack {name}"]
    importlib.import_module(f"nanostack.commands.{COMMANDS[name][0]}").run()


if __name__ == "__main__":
    main()
