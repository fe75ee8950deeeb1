"""The one switch between Triton, C and torch, and the checks every operation shares.

Each operation takes `backend=None | "torch" | "triton" | "c"`; None follows `set_backend`. "auto" means Triton for CUDA
tensors it can serve, C for CPU tensors where there is a compiler (cpu.py), and optimised torch for everything else. The
choice reads only Python values and tensor metadata, so torch.compile makes it once, while tracing.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import torch

from . import cpu

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows: the kernels below are still defined, and never launched
    triton = SimpleNamespace(jit=lambda kernel: kernel, __version__=None)
    tl = SimpleNamespace(constexpr=lambda value: value)

HAS_TRITON = triton.__version__ is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, so later is too late
# torch 2.11's refuses interpreted kernels. One name for both: torch reads the source of an operation for the kernels it wraps.
wrap_triton = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton
BACKENDS = ("auto", "torch", "triton", "c")
Arch = int | str  # of a GPU: 90 for NVIDIA's sm_90, "gfx942" for AMD's
AMD = {"gfx90a": "cdna", "gfx942": "cdna", "gfx1100": "rdna3"}  # those of AMD's that configs.py has rows for, by their family

_backend = "auto"
_traced: bool | None = None  # None: operations are run
_dry = None  # the dry.DryGPU for which launches are compiled and not run


def set_backend(name: str) -> None:
    """Choose what `backend=None` means in this process: "auto", "torch", "triton" or "c"."""
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    _backend = name


@contextlib.contextmanager
def traced(on_triton: bool):
    """Within it operations are only traced, on tensors without storage: as they would run on a CUDA device, or in torch."""
    global _traced
    _traced = on_triton
    try:
        yield
    finally:
        _traced = None


@contextlib.contextmanager
def dry_run(gpu):
    """Within it CPU tensors stand for tensors on `gpu`, a dry.DryGPU, which compiles every launch and runs none."""
    global _dry
    _dry = gpu
    try:
        yield
    finally:
        _dry = None


def arch_of(device: torch.device) -> Arch | None:
    """The architecture of the GPU on which tensors of `device` are; None where they are on none."""
    if _dry is not None:
        return _dry.arch
    if device.type != "cuda":
        return None
    if torch.version.hip:  # ROCm calls its devices cuda, and gfx9 reports major 9 as Hopper does
        return _gcn_arch(device)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@torch.compiler.assume_constant_result  # torch.compile cannot trace the properties of a device
def _gcn_arch(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]  # of "gfx942:sramecc+:xnack-"


def unavailable_reason(device: torch.device | str) -> str | None:
    """One sentence on why the Triton kernels cannot run on `device`; None if they can."""
    device = torch.device(device)
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton; it exists for Linux only)."
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device is visible to torch."
        arch = arch_of(device)
        if isinstance(arch, str) and arch not in AMD:
            return f"of AMD's GPUs the kernels have rows for {', '.join(AMD)}, and {device} is a {arch}."
        if isinstance(arch, int) and arch < 80:
            return f"the kernels need compute capability 8.0 or newer and {device} has {arch // 10}.{arch % 10}."
        return None
    if _dry is not None:
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"Triton needs a CUDA device, not {device.type} (with TRITON_INTERPRET=1 the kernels are interpreted on the CPU)."


def launcher_compiler() -> str | None:
    """The C compiler with which Triton, ours and torch.compile's, builds what launches a kernel on CUDA."""
    return os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")


def use_triton(backend: str | None, x: torch.Tensor, refusal: str | None = None) -> bool:
    """Whether an operation on `x` runs in Triton. Raises ValueError where "triton" is asked for and cannot be had.

    `refusal` says why the kernel cannot serve these shapes, if so.
    """
    name = _backend if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if _traced is not None:
        return _traced and refusal is None
    if name in ("torch", "c"):
        return False
    # The interpreter multiplies the raw bits of bfloat16 in tl.dot, and truncates where hardware rounds: never silently wrong.
    on_gpu = x.is_cuda or _dry is not None
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float32, torch.float16)
    if name == "auto":
        return refusal is None and on_gpu and x.dtype in dtypes and unavailable_reason(x.device) is None
    reason = unavailable_reason(x.device)
    if reason is not None:
        raise ValueError(f'backend="triton" is impossible: {reason}')
    if refusal is not None:
        raise ValueError(f'backend="triton" is impossible: {refusal}')
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f'backend="triton" on {x.device.type} takes {names} only, not {x.dtype}')
    return True


def use_c(backend: str | None, *tensors: torch.Tensor, torch_is_faster: bool = False) -> bool:
    """Whether an operation on these, which does not run in Triton, runs in C (cpu.py) and not in torch.

    Raises ValueError where "c" is asked for and cannot be had.
    """
    name = _backend if backend is None else backend
    if (
        name not in ("auto", "c")
        or (name == "auto" and torch_is_faster)
        or _traced is not None
        or torch.compiler.is_compiling()
    ):
        return False
    reason = cpu.refusal(*tensors)
    if reason is not None and name == "c":
        raise ValueError(f'backend="c" is impossible: {reason}')
    return reason is None


def upcast(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype we compute in: fp32, or fp64 for fp64 inputs. May be `x` itself, so never write to the result."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`. What an autograd.Function returns must come from here, not from x.to(dtype) or an operation in place:
    torch 2.11 compiles those into gradients of zero [pytorch#180642]."""
    return x if x.dtype == dtype else x.to(dtype)


class _Refusal(torch.autograd.Function):
    """The first `count` tensors, as functions of all the others that raise where someone asks for their gradients."""

    @staticmethod
    def forward(count, *tensors):
        return tensors[:count]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        refuse_second_derivative()


def refuse_second_derivative(*_):
    raise RuntimeError(
        "the operations of kernels/ have first derivatives only, and this asks for a second one through create_graph=True; "
        "write the operation in plain torch where you need it"
    )


def once_differentiable(backward):
    """Make `backward(ctx, saved, *gradients)` the backward of an autograd.Function; a second derivative is an error.

    torch's own decorator sees no second derivative where only what was saved depends on an input, and its error is not on
    the way to the inputs that torch.autograd.grad is asked for: either way the missing term is zero, silently.
    """

    @functools.wraps(backward)
    def once(ctx, *gradients):
        saved = ctx.saved_tensors  # once: activation checkpointing lets nobody take them twice
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # torch.compile refuses by itself
            return backward(ctx, saved, *gradients)
        inputs = (*saved, *gradients)
        detached = [x if x is None else x.detach() for x in inputs]
        results = backward(ctx, detached[: len(saved)], *detached[len(saved) :])
        results = results if isinstance(results, tuple) else (results,)
        return _Refusal.apply(len(results), *results, *inputs)

    return once


def unit_stride(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, copied where their last dimension is not contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., D) as (rows, D) with unit stride along D: a view where the strides allow it, a copy elsewhere."""
    return unit_stride(x.reshape(-1, x.shape[-1]))[0]


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; the interpreter gets 3, an odd number to catch bad strides."""
    if _dry is not None:
        return _dry.multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch(kernel, grid: tuple[int, ...], config, x: torch.Tensor, *arguments, **constants) -> None:
    """Launch a kernel, whose first argument is `x`, on the device of `x`, whichever device is current.

    `config` is its row of configs.py; `constants` are the kernel's other constexpr arguments and come before those of the row.
    The caller wraps the kernel (wrap_triton) by name: torch reads the source of an operation for the kernels it caches.
    """
    constants = config.launch() | constants
    if _dry is not None:
        return _dry.launch(kernel, grid, config, x, *arguments, **constants)
    elsewhere = x.is_cuda and torch.cuda.is_initialized() and torch.cuda.current_device() != x.device.index
    with torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext():
        if constants.get("TMA"):
            triton.set_allocator(_scratch)  # here, as it holds for the calling thread only and autograd brings its own
        kernel[grid](x, *arguments, **constants)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the tensor descriptors that a kernel makes for itself. torch aligns to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError with the message unless the condition holds. For checks before any launch.

    A message that names sizes is a function: torch.compile would make a constant of each size that it formats.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def require_tensor(name: str, tensor: object) -> None:
    """Raise ValueError unless it is a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is {tensor!r:.80}; it must be a torch.Tensor")


def require_number(name: str, value: object, whole: bool = False) -> None:
    """Raise ValueError unless it is a real number, or a `whole` one."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} is {value!r:.80}; it must be {'a whole number' if whole else 'a number'}")


def require_like(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor, dtype: bool = True) -> None:
    """Raise ValueError unless both are tensors on one device and (with `dtype`) of one dtype."""
    require_tensor(name, tensor)
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and {like_name} on {like.device}; they must be on the same device")
    if dtype and tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype} and {like_name} is {like.dtype}; they must have the same dtype")


def require_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless it is a tensor of real floating-point numbers."""
    require_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; it must be a floating-point tensor")
