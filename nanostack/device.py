"""The device that a process computes on: which one, in what dtype, with how much memory."""

import ctypes
import math
import os
from pathlib import Path

import torch

from nanostack.errors import UserError
from nanostack.kernels import dispatch

AMD_WITH_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # MI100 and later, RDNA3 and later


def open_device(index: int, compile: bool) -> torch.device:
    """The GPU of this number, where there is one, else the CPU; made ready to train on.

    UserError where there is no GPU of this number, or no compiler for `compile`.
    """
    if not torch.cuda.is_available():
        device = torch.device("cpu")
        keep_freed_memory()
    else:
        if index >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} CUDA devices cannot serve rank {index} of this machine")
        device = torch.device("cuda", index)
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # Growth asks for large blocks between many small ones: segments that can grow leave no gaps. torch may have read
            # these variables when it was imported, so it is told here.
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if compile:
        check_compiler(device)
    return device


def check_compiler(device: torch.device) -> None:
    """Raise `UserError` where torch.compile would find no compiler at the first step."""
    if device.type == "cuda":
        missing = None if dispatch.HAS_TRITON and dispatch.launcher_compiler() else "triton and a C compiler (gcc or clang)"
    else:
        from torch._inductor import cpp_builder
        from torch._inductor.exc import InvalidCxxCompiler

        missing = None
        try:
            cpp_builder.get_cpp_compiler()
        except InvalidCxxCompiler:
            missing = "a C++ compiler"
    if missing:
        raise UserError(f"--compile: torch.compile needs {missing}, which this machine has not; install that, or leave it out")


def keep_freed_memory() -> None:
    """Have glibc's malloc keep the tensors a step frees for the next: handed back to the kernel, every step faults its pages
    in again, which took 12 % of a quickstart step on two cores."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # <malloc.h>: no allocation by mmap, no giving back from the top of the heap
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def compute_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """The dtype that a config names; "auto" is bfloat16 where the device multiplies it in hardware."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for it; other GPUs emulate it, which torch calls support."""
    if device.type != "cuda":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    arch = dispatch.arch_of(device)
    return arch.startswith(AMD_WITH_BF16) if isinstance(arch, str) else arch is not None and arch >= 80


def free_bytes(device: torch.device) -> float:
    """Memory that is free there, what torch holds in reserve included; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def check_room(device: torch.device, needed: float, what: str) -> None:
    """Raise `UserError` unless so many bytes are free there."""
    if needed > (free := free_bytes(device)):
        raise UserError(f"{what} needs {needed / 2**30:.2f} GiB on {device}, which has {free / 2**30:.2f} GiB free")


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the GPU where there is one. UserError where there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"the device is auto, cpu, cuda or cuda:1 and the like, not {name!r}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error
