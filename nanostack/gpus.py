"""The one table of GPUs: the peak of their arithmetic and the memory that torch can have of each."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A kind of GPU."""

    name: str
    """What --gpu takes; capitals, spaces and hyphens do not matter."""
    device_words: str
    """Words of the name that the device gives itself (torch.cuda.get_device_name)."""
    peak_bf16: float
    """Dense bf16 peak, FLOP/s, from NVIDIA's data sheet of the GPU."""
    memory_gib: int | None
    """GiB that torch can have, rounded down; None where nobody has looked."""


GPUS = (
    GPU("h200", "H200", 989e12, 139),
    GPU("h200-nvl", "H200 NVL", 835e12, None),
    GPU("gh200", "GH200", 989e12, None),
    GPU("h100", "H100", 989e12, 78),  # SXM
    GPU("h100-pcie", "H100 PCIe", 756e12, None),
    GPU("h100-nvl", "H100 NVL", 835e12, None),
    GPU("a100", "A100", 312e12, 78),
    GPU("a100-40", "A100 40GB", 312e12, 39),
    GPU("b200", "B200", 2250e12, 177),
    GPU("gb200", "GB200", 2500e12, None),
    GPU("l40s", "L40S", 362e12, 44),
    GPU("rtx4090", "RTX 4090", 165e12, 23),
    GPU("rtx3090", "RTX 3090", 71e12, 23),
)
OTHER_KINDS = {"laptop", "max", "d"}  # a laptop's GPU has the words of the desktop's, and another peak


def find(name: str) -> GPU | None:
    """The GPU called `name`, as --gpu takes it or as the device calls itself; None for one that the table lacks.

    The entry with the most words of a device's name counts: an H100 PCIe is no H100 of the SXM kind.
    """
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted in (_plain(gpu.name), _plain(gpu.device_words)):
            return gpu
    words = set(re.split(r"[ -]+", name.lower()))
    found = [gpu for gpu in GPUS if set(gpu.device_words.lower().split()) <= words and not OTHER_KINDS & words]
    return max(found, key=lambda gpu: len(gpu.device_words), default=None)


def _plain(name: str) -> str:
    return re.sub(r"[ -]", "", name.lower())
