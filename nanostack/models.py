"""The one way to read a model for use: from a checkpoint or a Hugging Face folder, with its optimizer or without."""

from pathlib import Path

from nanostack import checkpoint, hf, sharded
from nanostack.config import Optim
from nanostack.optimizer import name_of
from nanostack.parallel import Placement
from nanostack.state import State


def read(source: str | Path) -> dict:
    """The contents of a checkpoint or a Hugging Face folder, in the form of `checkpoint.load`. UserError if unreadable.

    The weights of a folder are read when they are asked for. Hugging Face's has no optimizer, but its "dtype" and "eot".
    """
    source = Path(source)
    return hf.load(source) if is_hf_folder(source) else checkpoint.load(source)


def is_hf_folder(source: Path) -> bool:
    """Whether it is a folder, and not that of a sharded checkpoint."""
    return source.is_dir() and sharded.folder_of(source) is None


def restore(saved: dict, placement: Placement, optimizer: bool = False) -> State:
    """The state that `read` has read, with the ramp of a growth that it is in. Without `optimizer` its moments stay unread."""
    state = saved["optimizer"] if optimizer else {}
    name = name_of(state)
    return State.restore(saved | {"optimizer": state}, Optim() if name is None else Optim(name=name), placement)
