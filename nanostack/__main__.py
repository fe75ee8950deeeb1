"""One door: `nanostack COMMAND ...`, or `python -m nanostack COMMAND ...`; with ranks, `torchrun -m nanostack train ...`."""

import difflib
import importlib
import os
import runpy
import select
import sys

from nanostack.version import __version__

SCRIPTS = {  # name: what it does, as the script of this name does at the top of a clone
    "train": "train a model in stages, each of which may grow it",
    "grow": "make a deeper model of a checkpoint",
}
COMMANDS = {  # name: (module in nanostack.commands, what it does)
    "prepare": ("prepare", "text to tokens"),
    "sample": ("sample", "let a model write"),
    "evaluate": ("evaluate", "tasks of lm-eval, and loss on validation text"),
    "export": ("export", "a checkpoint to a Hugging Face folder"),
    "consolidate": ("consolidate", "a sharded checkpoint to one file, and back"),
    "import": ("import_hf", "a Hugging Face model to a checkpoint"),
    "fit": ("fit", "the largest micro-batch that fits a GPU"),
    "plan": ("plan", "when to grow, how much, and what it may save"),
    "plot": ("plot", "draw the curves of runs"),
    "watch": ("watch", "watch runs in the browser while they train"),
    "track": ("track", "show runs in TensorBoard or wandb"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    about = SCRIPTS | {name: what for name, (_, what) in COMMANDS.items()}
    lines = [f"  {name:<{width}}  {what}" for name, what in about.items()]
    return "\n".join(["usage: nanostack COMMAND ...; nanostack COMMAND --help tells its options", "", *lines])


def run(name: str | None) -> None:
    """Run the command of this name with the words that follow it; without a name, list the commands."""
    if name in (None, "-h", "--help", "help"):
        print(usage())
        sys.exit(2 if name is None else 0)
    if name == "--version":
        print(__version__)
        return
    if name not in SCRIPTS | COMMANDS:
        from nanostack.errors import UserError, exits_cleanly

        near = difflib.get_close_matches(name.lower(), SCRIPTS | COMMANDS, 1)
        said = f"did you mean {near[0]}? It" if near else "it"
        with exits_cleanly():
            raise UserError(f"nanostack has no command {name!r}; {said} has {', '.join(SCRIPTS | COMMANDS)}")
    sys.argv[:2] = [f"nanostack {name}"]
    if name in SCRIPTS:
        runpy.run_module(f"nanostack.scripts.{name}", run_name="__main__")
        return
    importlib.import_module(f"nanostack.commands.{COMMANDS[name][0]}").run()


def reader_has_gone() -> bool:
    """Whether standard output is a pipe whose other end is closed, as `head` closes it."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main() -> None:
    try:
        try:
            run(sys.argv[1] if len(sys.argv) > 1 else None)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(141)  # what a shell says of a program that a closed pipe ended


if __name__ == "__main__":
    main()
