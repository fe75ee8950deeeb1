"""How each Triton kernel is launched: tiles, warps and pipeline stages by architecture and shape class.

A row is looked up and never searched for: autotuning at start costs a user minutes [triton#7932]. The class of a shape is the
smallest size listed that holds it (d_head of attention, the width of a norm's row; ANY where one row serves all).
`python -m kernels.tune` measures a GPU and prints rows to paste here; `python -m kernels.aot` compiles every row without a GPU
and reads registers, stack, shared memory and instructions off the machine code.

No row has been chosen by measuring yet: they follow from the machine code (few spills, 16-byte loads, HGMMA and TMA on 9.0) and
from what others report of such kernels. Those of rms_norm and rotary have been timed on an H100 (docs/kernels.md).

Rows of 90 are for 9.0, and for 10.x where it has none of its own. Rows of 80 are for all the rest of NVIDIA's, for a kernel
that has no others, and for tensors that TMA cannot read: they keep to the 99 KiB of shared memory of 8.6, 8.9 and 12.0, so
that these three need rows of their own once only (12.0). Rows of cdna and rdna3 are
for AMD's gfx90a and gfx942, whose warps are 64 threads, and for its gfx1100; none has TMA. Rows of FP32 are for float32 and for
the interpreter, where a kernel has them: in attention small tiles of unlike height and width, which show more than fast ones
would. SHARED says whose rows serve where a kernel has none.
"""

from dataclasses import dataclass, field

import torch

from .dispatch import AMD, Arch, arch_of

ANY = 1 << 62
FP32 = 0
CHECKED = 64  # bytes of stack that attention in float32 may need: it is for checking, and nobody waits for it

By = dict[Arch, tuple[int, int]]  # (stack, odd_stack) of a Config, by architecture


@dataclass(frozen=True)
class Config:
    """One row. `tiles` are constexpr arguments of the kernel."""

    tiles: dict[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1  # of a persistent kernel
    stack: int = 0  # bytes per thread that may be spilled: more than 0 needs its reason beside the row
    odd_stack: int = 0  # the same, where it is more, for strides, widths or lengths that 16 does not divide
    by: By = field(default_factory=dict, hash=False)  # both of an architecture that needs more

    def launch(self) -> dict[str, int]:
        """Keyword arguments of the kernel's launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def may_spill(self, arch: Arch, odd: bool) -> int:
        """Bytes of stack per thread that its code for this architecture may need, for an `odd` call or one of training."""
        stack, odd_stack = self.by.get(arch, (self.stack, self.odd_stack))
        return max(stack, odd_stack) if odd else stack


def row(
    num_warps: int,
    num_stages: int = 1,
    programs_per_sm: int = 1,
    stack: int = 0,
    odd_stack: int = 0,
    by: By | None = None,
    **tiles: int,
) -> Config:
    return Config(tiles, num_warps, num_stages, programs_per_sm, stack, odd_stack, by or {})


def attention(BLOCK_M: int, BLOCK_N: int, num_warps: int, num_stages: int, TMA: bool = False, **spills) -> Config:
    return row(num_warps, num_stages, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TMA=TMA, **spills)


TABLE: dict[str, dict[Arch, dict[int, Config]]] = {  # kernel, architecture, size
    "attention_forward": {
        90: {
            32: attention(128, 64, 4, 3, TMA=True),
            64: attention(128, 128, 8, 3, TMA=True),
            128: attention(128, 128, 8, 2, TMA=True),
            256: attention(128, 64, 8, 2, TMA=True),
        },
        80: {
            32: attention(128, 64, 4, 3, odd_stack=16),
            64: attention(128, 64, 8, 3),
            128: attention(128, 64, 8, 2, odd_stack=72, by={120: (0, 120)}),
            256: attention(64, 32, 8, 2, odd_stack=168),
        },
        "cdna": {
            64: attention(128, 64, 4, 2),
            128: attention(128, 64, 4, 2),
            256: attention(128, 32, 4, 2),
        },
        "rdna3": {64: attention(128, 64, 8, 1, odd_stack=432)},
        "rdna3 fp32": {64: attention(32, 16, 4, 1, stack=CHECKED)},
        FP32: {64: attention(32, 16, 4, 1, stack=CHECKED), 256: attention(32, 16, 8, 1, stack=CHECKED)},
    },
    "attention_dq": {
        90: {
            32: attention(128, 64, 8, 2, TMA=True),
            64: attention(128, 128, 8, 2, TMA=True),
            128: attention(128, 64, 8, 3, TMA=True),
            256: attention(64, 64, 8, 2, TMA=True),
        },
        80: {
            32: attention(64, 64, 4, 2),
            64: attention(128, 64, 8, 2),
            128: attention(64, 64, 8, 2, odd_stack=8),
            256: attention(32, 32, 8, 2),
        },
        "cdna": {
            64: attention(128, 64, 4, 2),
            128: attention(128, 32, 4, 2),
            256: attention(64, 32, 4, 1),
        },
        "rdna3": {
            32: attention(128, 64, 8, 1),
            64: attention(128, 32, 8, 1, odd_stack=228),
        },
        "rdna3 fp32": {64: attention(16, 16, 8, 1)},
        FP32: {
            64: attention(32, 16, 4, 1, stack=CHECKED),
            128: attention(16, 16, 8, 1, stack=CHECKED),
            # q and dout stay in the registers for products without matrix units: not even the smallest tile fits
            256: attention(16, 16, 8, 1, stack=288),
        },
    },
    "attention_dk_dv": {
        90: {
            32: attention(64, 128, 8, 2, TMA=True),
            64: attention(64, 128, 8, 3, TMA=True, odd_stack=64),  # by Triton 3.6, with documents
            # with documents; 32 rows of q do not spill, but make every Sᵀ and dPᵀ a wgmma of half the width
            128: attention(64, 128, 8, 2, TMA=True, stack=56, odd_stack=104),
            256: attention(32, 64, 8, 1, TMA=True),
        },
        80: {
            32: attention(64, 64, 4, 2, stack=48, odd_stack=88),  # by Triton 3.6, with documents; by 3.7 none
            64: attention(32, 128, 8, 2, odd_stack=16),
            128: attention(64, 64, 8, 2, odd_stack=40),
            256: attention(32, 32, 8, 2),
        },
        "cdna": {
            32: attention(64, 128, 4, 2, odd_stack=272),  # by Triton 3.6; by 3.7 164
            64: attention(64, 128, 4, 1),
            128: attention(32, 128, 4, 1),
            256: attention(16, 64, 4, 1),
        },
        # Its matrix unit takes 16 rows at least, and a warp holds these of k and v twice: of wider heads every tile spills
        # (of 128 at least 176 bytes), so torch's attention serves them.
        "rdna3": {
            32: attention(32, 128, 8, 1, odd_stack=52),
            64: attention(16, 64, 8, 1),
        },
        "rdna3 fp32": {64: attention(16, 16, 8, 1)},
        "cdna fp32": {256: attention(16, 32, 4, 1)},
        FP32: {128: attention(16, 32, 4, 1, stack=CHECKED), 256: attention(16, 32, 8, 1, stack=CHECKED)},
    },
    "rms_norm_forward": {
        80: {
            256: row(4, BLOCK_ROWS=8, odd_stack=8),
            512: row(4, BLOCK_ROWS=4),
            1024: row(4, BLOCK_ROWS=2),
            2048: row(4, BLOCK_ROWS=1),
            4096: row(8, BLOCK_ROWS=1),
            8192: row(16, BLOCK_ROWS=1),
            16384: row(32, by={100: (0, 8), 120: (0, 8)}, BLOCK_ROWS=1),
        },
    },
    "rms_norm_backward": {
        80: {
            256: row(4, 3, 4, BLOCK_ROWS=8, odd_stack=8),
            512: row(4, 3, 4, BLOCK_ROWS=4, odd_stack=8),
            1024: row(4, 3, 4, BLOCK_ROWS=2),
            2048: row(4, 3, 4, BLOCK_ROWS=1, by={"gfx1100": (0, 16)}),
            4096: row(8, 3, 2, BLOCK_ROWS=1, odd_stack=8, by={"gfx1100": (0, 16)}),
            8192: row(16, 3, 1, BLOCK_ROWS=1, odd_stack=24, by={86: (0, 40), 89: (0, 40)}),
            # 1024 threads have 64 registers each, too few for x, dy, weight and dweight of 16 columns in fp32
            16384: row(32, 1, 1, stack=80, odd_stack=288, by={100: (96, 328), 120: (80, 296)}, BLOCK_ROWS=1),
        },
        FP32: {  # twice the bytes: at 8192 three stages would need twice the shared memory there is
            2048: row(4, 2, 2, BLOCK_ROWS=1),
            8192: row(16, 1, 1, BLOCK_ROWS=1),
            16384: row(32, 1, 1, stack=96, by={86: (112, 0), 89: (112, 0), 100: (120, 0)}, BLOCK_ROWS=1),  # as above
        },
    },
    "rotary": {
        80: {
            16: row(2, BLOCK_HEAD=32),
            32: row(4, BLOCK_HEAD=32),
            64: row(4, BLOCK_HEAD=16),
            128: row(4, BLOCK_HEAD=8),
        },
    },
    "norm_rotary_forward": {
        80: {
            16: row(4, BLOCK_ROWS=64),
            32: row(4, BLOCK_ROWS=32),
            64: row(4, BLOCK_ROWS=16),
            128: row(4, BLOCK_ROWS=8),
        },
    },
    "norm_rotary_backward": {
        80: {
            16: row(4, 2, 4, BLOCK_ROWS=64),
            32: row(4, 2, 4, BLOCK_ROWS=32),
            64: row(4, 2, 4, BLOCK_ROWS=16),
            128: row(4, 2, 4, BLOCK_ROWS=8),
        },
    },
    "swiglu_forward": {80: {ANY: row(4, BLOCK=1024)}, "cdna": {ANY: row(2, BLOCK=1024)}},
    "swiglu_backward": {80: {ANY: row(4, BLOCK=1024)}, "cdna": {ANY: row(2, BLOCK=1024)}},
    "cross_entropy": {80: {ANY: row(8, BLOCK_V=4096)}},
}

# On sm_100 those of 90 spill, up to 160 bytes. Of 256 no tile with TMA did without: it takes registers, too.
TABLE["attention_dk_dv"][100] = TABLE["attention_dk_dv"][90] | {
    128: attention(64, 64, 8, 2, TMA=True),
    256: attention(32, 64, 8, 1, odd_stack=160),
}
# On sm_120 the row of 80 spills 8 bytes, with documents
TABLE["attention_dq"][120] = TABLE["attention_dq"][80] | {256: attention(64, 32, 8, 1, odd_stack=16)}
# A block has 1024 threads at most, and these are 16 warps of CDNA.
TABLE["rms_norm_forward"]["cdna"] = TABLE["rms_norm_forward"][80] | {16384: row(16, BLOCK_ROWS=1)}
TABLE["rms_norm_backward"]["cdna"] = TABLE["rms_norm_backward"][80] | {16384: row(16, odd_stack=72, BLOCK_ROWS=1)}
TABLE["rms_norm_backward"]["cdna fp32"] = TABLE["rms_norm_backward"][FP32] | {16384: row(16, BLOCK_ROWS=1)}

SHARED: dict[Arch, tuple[Arch, ...]] = {  # whose rows serve a kernel that has none of these, the nearest first
    80: (),
    90: (80,),
    100: (90, 80),
    120: (80,),
    "cdna": (80,),
    "rdna3": (80,),
    FP32: (80,),
    "cdna fp32": (FP32, "cdna", 80),
    "rdna3 fp32": (FP32, "rdna3", 80),
}


def architecture(device: torch.device, dtype: torch.dtype) -> Arch:
    """The rows that serve tensors of this dtype on this device, as SHARED calls them."""
    found = arch_of(device)
    served = isinstance(found, int) or found in AMD  # on other GPUs of AMD's no kernel runs
    return rows_of(found, dtype == torch.float32) if found is not None and served else FP32


def rows_of(arch: Arch, fp32: bool = False) -> Arch:
    """The rows that serve a GPU of this architecture, as SHARED calls them."""
    if isinstance(arch, str):
        return f"{AMD[arch]} fp32" if fp32 else AMD[arch]
    return FP32 if fp32 else {9: 90, 10: 100, 12: 120}.get(arch // 10, 80)


def owner(kernel: str, rows: Arch) -> Arch:
    """Whose rows a kernel has for these."""
    return next(name for name in (rows, *SHARED[rows]) if name in TABLE[kernel])


def rows_for(kernel: str, rows: Arch) -> dict[int, Config]:
    """The rows of a kernel by size, as `rows_of` calls them."""
    return TABLE[kernel][owner(kernel, rows)]


def lookup(kernel: str, size: int, device: torch.device, dtype: torch.dtype) -> Config:
    """The row that serves this kernel for this size, which must not be larger than the largest there is."""
    return fitting(rows_for(kernel, architecture(device, dtype)), size)


def for_pointers(kernel: str, size: int, config: Config) -> Config:
    """The row that serves in place of this one where TMA cannot read the tensors."""
    return fitting(rows_for(kernel, 80), size) if config.tiles.get("TMA") else config


def fitting(rows: dict[int, Config], size: int) -> Config:
    """The row of the smallest size that holds this one."""
    return next(config for limit, config in rows.items() if size <= limit)
