"""The one way to read a model for use: from a checkpoint or a Hugging Face folder, with its optimizer or without."""

from pathlib import Path

from nanostack import checkpoint, hf
from nanostack.config import Optim
from nanostack.parallel import Placement
from nanostack.state import State


def read(source: str | Path) -> dict:
    """What a checkpoint or a Hugging Face folder holds, as `checkpoint.load` gives it. UserError where it cannot be read.

    The weights of a folder are read when they are asked for. A folder has no optimizer; it has "dtype" and "eot" besides.
    """
    source = Path(source)
    return hf.load(source) if source.is_dir() else checkpoint.load(source)


def restore(saved: dict, placement: Placement, optimizer: bool = False) -> State:
    """The state of what `read` gave, with the ramp of a growth that it is in; moments are read only with `optimizer`."""
    return State.restore(saved if optimizer else saved | {"optimizer": {}}, Optim(), placement)
