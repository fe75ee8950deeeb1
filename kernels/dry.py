"""A GPU that is not there: what a call would launch on it is compiled and checked, and not run.

    with DryGPU(90):  # CPU tensors stand for tensors on an sm_90
        kernels.rms_norm(x, weight, 1e-5)

Each launch is specialised as the JIT does it there: sizes that are 1, divisibility by 16, alignment, dtypes
(`JITFunction.warmup` under a driver that names the target). The tests run so with --dry-gpu (tests/dry_gpu.py). Nothing is
computed: an output holds what was in memory, and no number says anything about a kernel.
"""

import re
from types import SimpleNamespace
from typing import Any

import torch

from . import dispatch
from .aot import one_line, too_much
from .configs import Config
from .dispatch import HAS_TRITON, INTERPRETED, Arch, triton
from .machine_code import ARCHITECTURES, named, resources, target

MOST_BOX = 256  # elements of a TMA box along each dimension
MOST_GRID = (2**31 - 1, 65535, 65535)
DESCRIPTOR = re.compile(r"tt\.make_tensor_descriptor .*<((?:\d+x)+)([a-z]+)(\d+)>")


class DryFault(RuntimeError):
    """A launch that a real GPU would refuse, or that needs more than its row of configs.py allows."""


class DryGPU:
    """A GPU of this architecture (90 for sm_90, "gfx942"), for the block that `with` it begins.

    Raises ValueError for an architecture that nobody knows, and where Triton cannot compile; within the block a launch raises
    DryFault if it does not compile, spills more than its row allows, needs more shared memory than there is, exceeds a grid,
    or gives TMA what it refuses: a box above 256, rows that do not start on 16 bytes. What it allows to spill is what a row
    allows to odd calls; of those that people train with, the gate (aot.py) asks for more.
    """

    multiprocessors = 132

    def __init__(self, arch: Arch):
        if arch not in ARCHITECTURES:
            raise ValueError(f"there is no {named(arch)} here; there are {', '.join(map(named, ARCHITECTURES))}")
        if not HAS_TRITON:
            raise ValueError("Triton is not installed, and nothing else compiles its kernels (pip install triton)")
        if INTERPRETED:
            raise ValueError("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled: unset it")
        self.arch = arch
        self.compiled: dict[str, tuple[int, int]] = {}  # registers and stack by the hash of what was compiled
        self.launches = 0

    def __enter__(self) -> "DryGPU":
        compiled_for = target(self.arch)
        self._driver = triton.runtime.driver._active
        triton.runtime.driver.set_active(  # the JIT keeps what it compiles by device, so an architecture is a device
            SimpleNamespace(
                get_current_target=lambda: compiled_for,
                get_current_device=lambda: self.arch,
                get_current_stream=lambda device=None: 0,
            )
        )
        self._dry_run = dispatch.dry_run(self)
        self._dry_run.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._dry_run.__exit__(*error)
        triton.runtime.driver._active = self._driver

    def launch(self, kernel, grid: tuple[int, ...], config: Config, x: torch.Tensor, *arguments, **constants) -> None:
        """Compile what dispatch.launch would launch. Raises DryFault."""
        kernel = kernel if isinstance(kernel, triton.JITFunction) else kernel.kernel  # of torch's wrapper
        self.launches += 1
        try:
            compiled = kernel.warmup(x, *arguments, grid=grid, **constants)
        except Exception as error:  # whatever the compiler raises
            raise DryFault(f"{kernel.__name__} does not compile for {named(self.arch)}: {one_line(error)}") from error
        if compiled.hash not in self.compiled:
            self.compiled[compiled.hash] = resources(compiled)
        _, stack = self.compiled[compiled.hash]
        faults = too_much(self.arch, config, stack, compiled.metadata.shared, odd=True)
        faults += [f"a grid of {grid}" for n, most in zip(grid, MOST_GRID, strict=False) if not 0 < n <= most]
        boxes = DESCRIPTOR.findall(compiled.asm["ttir"])
        faults += [fault for box in boxes for fault in _refused_box(*box)]
        if boxes:
            given = dict(zip((parameter.name for parameter in kernel.params), (x, *arguments), strict=False))
            faults += _refused_tensors(given)
        if faults:
            raise DryFault(f"{kernel.__name__} on {named(self.arch)} by {config}: {'; '.join(dict.fromkeys(faults))}")


def _refused_box(sizes: str, kind: str, bits: str) -> list[str]:
    """What TMA refuses of a box of "128x64x" elements of so many bits."""
    shape = [int(size) for size in sizes.split("x") if size]
    faults = [f"a TMA box of {'×'.join(map(str, shape))}, {MOST_BOX} at most"] if max(shape) > MOST_BOX else []
    inner = shape[-1] * int(bits) // 8
    return faults + ([f"a TMA box of {inner} bytes a row, no multiple of 16"] if inner % 16 else [])


def _refused_tensors(named: dict[str, Any]) -> list[str]:
    """What TMA refuses of tensors x_ptr whose strides are arguments stride_x_…: it reads from 16 bytes to 16 bytes."""
    faults = []
    for pointer, tensor in named.items():
        name = pointer.removesuffix("_ptr")
        strides = {key: value for key, value in named.items() if key.startswith(f"stride_{name}_")}
        if not isinstance(tensor, torch.Tensor) or not strides:
            continue
        if tensor.data_ptr() % 16:
            faults.append(f"TMA reads {name}, which starts {tensor.data_ptr() % 16} bytes behind a multiple of 16")
        wrong = [f"{key} = {value}" for key, value in strides.items() if value * tensor.element_size() % 16]
        faults += [f"TMA reads {name} of {', '.join(wrong)} elements, no multiple of 16 bytes"] if wrong else []
        if strides.get(f"stride_{name}_seq") == 0:
            faults.append(f"TMA reads {name}, which repeats one row")
    return faults


def architectures(names: str) -> list[Arch]:
    """[90, 80] of "sm_90,sm_80". Raises ValueError for anything else."""
    words = [word.strip() for word in names.split(",") if word.strip()]
    known = {named(arch): arch for arch in ARCHITECTURES}
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise ValueError(f"it takes architectures by comma, of {', '.join(known)}, not {', '.join(unknown) or 'nothing'}")
    return [known[word] for word in words]
