"""What a compiled kernel needs and holds: registers, stack, shared memory and instructions, of NVIDIA's GPUs and of AMD's.

An architecture is 90 for NVIDIA's sm_90, and "gfx942" for AMD's. NVIDIA's machine code is read by the two tools that come with
Triton; of AMD's Triton keeps the assembly, whose end says what a thread takes: there the stack is called scratch, and shared
memory LDS.
"""

import re
import struct
import subprocess
import tempfile
from itertools import islice
from pathlib import Path

from .dispatch import AMD, Arch, triton

ARCHITECTURES: tuple[Arch, ...] = (80, 86, 89, 90, 100, 120, *AMD)
NVIDIA_INSTRUCTIONS = {  # that are counted in the machine code: by name, how they are spelled there
    "HGMMA": r"\bHGMMA",
    "HMMA": r"\bHMMA",
    "UTCMMA": r"\bUTC\w*MMA",
    "TMA": r"\bUTMALDG",
    "copy": r"\bLDGSTS",
    "load 16 B": r"\bLDG\w*\.E\.(\w+\.)*128|\bLDGSTS\.E\.(\w+\.)*128",
}
AMD_INSTRUCTIONS = {
    "MFMA": r"\bv_s?mfmac?_",
    "WMMA": r"\bv_s?wmmac?_",
    "load 16 B": r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b",
}


def named(arch: Arch) -> str:
    """As compilers call it: sm_90, gfx942."""
    return arch if isinstance(arch, str) else f"sm_{arch}"


def target(arch: Arch):
    """What Triton compiles for."""
    from triton.backends.compiler import GPUTarget

    if isinstance(arch, str):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", arch, 32)


def shared_memory(arch: Arch) -> int:
    """Bytes that a block may use. 8.0 has more than its relatives, for which its rows are too."""
    if isinstance(arch, str):
        return 64 * 1024
    return (227 if arch // 10 in (9, 10) else 99) * 1024


def matrix_instruction(arch: Arch) -> str:
    """The name of the one that products should use."""
    if isinstance(arch, str):
        return "MFMA" if arch.startswith("gfx9") else "WMMA"
    return {9: "HGMMA", 10: "UTCMMA"}.get(arch // 10, "HMMA")


def resources(compiled) -> tuple[int, int]:
    """Registers and stack bytes (spills) of a thread of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        names = (r"\.vgpr_count", r"\.private_segment_fixed_size")
        registers, stack = (int(re.findall(rf"{name}:\s*(\d+)", compiled.asm["amdgcn"])[0]) for name in names)
    else:
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", data=compiled.asm["cubin"])
        registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return registers, stack


def instructions(compiled) -> bytes:
    """The code of a compiled kernel, from which `listings` makes its listing."""
    return compiled.asm["amdgcn"].encode() if "amdgcn" in compiled.asm else sections_of(compiled.asm["cubin"])


def listings(codes: list[bytes], arch: Arch) -> list[str]:
    """What each of them holds, an instruction a line."""
    return [code.decode() for code in codes] if isinstance(arch, str) else disassemble(codes, arch)


def counted(listing: str, arch: Arch) -> dict[str, int]:
    """How often each instruction that is looked for stands in it."""
    patterns = AMD_INSTRUCTIONS if isinstance(arch, str) else NVIDIA_INSTRUCTIONS
    return {name: len(re.findall(pattern, listing)) for name, pattern in patterns.items()}


def sections_of(cubin: bytes) -> bytes:
    """The instructions of a cubin, a 64-bit ELF file: its sections .text.*, one after another."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_section = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]  # name, _, _, _, offset, length
    names = cubin[sections[names_section][4] :]
    return b"".join(cubin[x[4] : x[4] + x[5]] for x in sections if names.startswith(b".text.", x[0]))


def disassemble(codes: list[bytes], arch: int) -> list[str]:
    """The listing of each of them, a line for an instruction of 16 bytes, from one run of NVIDIA's disassembler."""
    target = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    text = _nvidia_tool("nvdisasm", "--binary", target, data=b"".join(codes)) if any(codes) else ""
    lines = (line for line in text.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line))
    listings = ["\n".join(islice(lines, len(code) // 16)) for code in codes]
    if next(lines, None) is not None or sum(map(len, codes)) // 16 != sum(len(x.splitlines()) for x in listings):
        raise RuntimeError("nvdisasm printed another number of instructions than it was given")
    return listings


def _nvidia_tool(name: str, *options: str, data: bytes) -> str:
    """What one of the tools that come with Triton prints about a file that holds `data`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
