"""Each fused operation beside what one would use instead, at the shapes of real models, and the least that it must spend."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanostack import kernels

EPS = 1e-5
OURS = "nanostack"

try:
    from torch.nn import LinearCrossEntropyOptions  # younger than the oldest torch that we run on
except ImportError:
    LinearCrossEntropyOptions = None
try:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
except ImportError:
    LigerRMSNormFunction = None


@dataclass(frozen=True)
class Apart:
    """A way with inputs of its own: laid out as it likes them best, or because it writes to them."""

    way: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Work:
    """One operation at one shape: inputs, the ways to compute it, and the least it must spend forward and backward."""

    inputs: tuple[Tensor, ...]
    ways: dict[str, Callable[..., Tensor | tuple[Tensor, ...]] | Apart]
    unit: str  # "bytes" or "flops", whichever limits it
    forward: int
    backward: int
    backward_alone: bool = True  # False where some ways compute gradients in the forward pass already


def dtype_on(device: torch.device) -> torch.dtype:
    """What one trains in there."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def randn(*shape: int, like: torch.device) -> Tensor:
    return torch.randn(shape, device=like, dtype=dtype_on(like)).requires_grad_()


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def rms_norm(device: torch.device, rows: int, width: int) -> Work:
    def eager(x, w):
        return F.rms_norm(x, (width,), w, EPS)

    ways = {OURS: lambda x, w: kernels.rms_norm(x, w, EPS), "torch eager": eager, "torch.compile": compiled(eager)}
    if LigerRMSNormFunction:
        ways["Liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    size = rows * width * dtype_on(device).itemsize
    return Work((randn(rows, width, like=device), randn(width, like=device)), ways, "bytes", 2 * size, 3 * size)


def add_rms_norm(device: torch.device, rows: int, width: int) -> Work:
    def eager(x, r, w):
        added = x + r
        return F.rms_norm(added, (width,), w, EPS), added

    ways = {OURS: lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS), "torch eager": eager, "torch.compile": compiled(eager)}
    if LigerRMSNormFunction:
        ways["Liger"] = lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)
    size = rows * width * dtype_on(device).itemsize
    inputs = (randn(rows, width, like=device), randn(rows, width, like=device), randn(width, like=device))
    return Work(inputs, ways, "bytes", 4 * size, 4 * size)


def angles(device: torch.device, seq: int, d_head: int) -> tuple[Tensor, Tensor]:
    """cos and sin (seq, d_head/2)."""
    angle = torch.outer(torch.arange(seq, device=device), 1e4 ** -torch.linspace(0, 1, d_head // 2, device=device))
    return angle.cos(), angle.sin()


def wide(tables: tuple[Tensor, Tensor]) -> list[Tensor]:
    """cos and sin for whole heads (seq, 1, d_head), as Hugging Face has them."""
    return [torch.cat((table, table), -1)[:, None].to(dtype_on(table.device)) for table in tables]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary as Hugging Face has it."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def rotary(device: torch.device, batch: int, seq: int, n_head: int, n_kv_head: int, d_head: int) -> Work:
    tables = angles(device, seq, d_head)
    cos, sin = wide(tables)

    def eager(q, k):
        return turned(q, cos, sin), turned(k, cos, sin)

    def liger(q, k):  # works on (batch, head, seq, d_head)
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos[:, 0][None], sin[:, 0][None])
        return q.transpose(1, 2), k.transpose(1, 2)

    ways = {OURS: lambda q, k: kernels.rotary(q, k, *tables), "torch eager": eager, "torch.compile": compiled(eager)}
    inputs = (randn(batch, seq, n_head, d_head, like=device), randn(batch, seq, n_kv_head, d_head, like=device))
    if LigerRMSNormFunction:  # turns its inputs in place
        ways["Liger"] = Apart(liger, tuple(x.detach().clone().requires_grad_() for x in inputs))
    size = 2 * batch * seq * (n_head + n_kv_head) * d_head * dtype_on(device).itemsize
    return Work(inputs, ways, "bytes", size, size)


def norm_rotary(device: torch.device, batch: int, seq: int, n_head: int, n_kv_head: int, d_head: int) -> Work:
    """Of q and of k, as Qwen3 has it."""
    tables = angles(device, seq, d_head)
    cos, sin = wide(tables)

    def ours(q, k, gain):
        return kernels.norm_rotary(q, gain, *tables, EPS), kernels.norm_rotary(k, gain, *tables, EPS)

    def eager(q, k, gain):
        return tuple(turned(F.rms_norm(x, (d_head,), gain, EPS), cos, sin) for x in (q, k))

    ways = {OURS: ours, "torch eager": eager, "torch.compile": compiled(eager)}
    inputs = (randn(batch, seq, n_head, d_head, like=device), randn(batch, seq, n_kv_head, d_head, like=device))
    size = batch * seq * (n_head + n_kv_head) * d_head * dtype_on(device).itemsize
    return Work((*inputs, randn(d_head, like=device)), ways, "bytes", 2 * size, 3 * size)


def swiglu(device: torch.device, rows: int, d_ff: int) -> Work:
    def eager(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    ways = {OURS: kernels.swiglu, "torch eager": eager, "torch.compile": compiled(eager)}
    if LigerRMSNormFunction:  # takes the halves apart, and its backward writes over them
        halves = (randn(rows, d_ff, like=device), randn(rows, d_ff, like=device))
        ways["Liger"] = Apart(lambda gate, up: LigerSiLUMulFunction.apply(gate, up), halves)
    size = rows * d_ff * dtype_on(device).itemsize
    return Work((randn(rows, 2 * d_ff, like=device),), ways, "bytes", 3 * size, 5 * size)


def flash_attention(device: torch.device, batch: int, seq: int, n_head: int, n_kv_head: int, d_head: int) -> Work:
    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n_head != n_kv_head).transpose(1, 2)

    def forced(backend):
        def attention(q, k, v):
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return attention

    ways = {OURS: kernels.flash_attention}
    if device.type == "cuda":
        ways |= {"SDPA flash": forced(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": forced(SDPBackend.CUDNN_ATTENTION)}
    ways |= {"torch eager": sdpa, "torch.compile": compiled(sdpa)}
    shapes = [(batch, seq, heads, d_head) for heads in (n_head, n_kv_head, n_kv_head)]
    count = kernels.flash_attention_flops
    needed = [count(batch, seq, seq, n_head, d_head, causal=True, backward=backward) for backward in (False, True)]
    return Work(tuple(randn(*shape, like=device) for shape in shapes), ways, "flops", *needed)


def linear_cross_entropy(device: torch.device, rows: int, width: int, vocab: int) -> Work:
    targets = torch.randint(vocab, (rows,), device=device)

    def eager(x, w):
        return F.cross_entropy((x @ w.t()).float(), targets)

    ways = {
        OURS: lambda x, w: kernels.linear_cross_entropy(x, w, targets),
        "torch eager": eager,
        "torch.compile": compiled(eager),
    }
    if LinearCrossEntropyOptions:
        in_chunks = LinearCrossEntropyOptions(allow_retain_graph=False)  # without options it is the eager form
        ways["F.linear_cross_entropy"] = lambda x, w: F.linear_cross_entropy(x, w, targets, options=in_chunks)
    if LigerRMSNormFunction:
        ways["Liger"] = lambda x, w: LigerFusedLinearCrossEntropyFunction.apply(x, w, targets)[0]
    x, weight = randn(rows, width, like=device), (randn(vocab, width, like=device).detach() * width**-0.5).requires_grad_()
    product = 2 * rows * width * vocab
    return Work((x, weight), ways, "flops", product, 2 * product, backward_alone=False)


OPS = {
    function.__name__: function
    for function in (rms_norm, add_rms_norm, rotary, norm_rotary, swiglu, flash_attention, linear_cross_entropy)
}
SHAPES = {  # the 1B, 3B and 7B of the paper, and longer text; a few rows where there is no GPU
    "cuda": {
        "rms_norm": [(16384, 2048), (8192, 4096), (4096, 4096), (4096, 8192)],
        "add_rms_norm": [(16384, 2048), (8192, 4096), (4096, 8192)],
        "rotary": [(4, 4096, 32, 32, 64), (2, 4096, 32, 8, 128)],
        "norm_rotary": [(2, 4096, 32, 8, 128)],
        "swiglu": [(16384, 5632), (8192, 11008)],
        "flash_attention": [
            (4, 4096, 32, 32, 64),
            (2, 8192, 32, 32, 64),
            (4, 4096, 16, 16, 128),
            (2, 8192, 16, 16, 128),
            (2, 8192, 32, 8, 128),
        ],
        "linear_cross_entropy": [(16384, 2048, 32000), (8192, 4096, 32000), (4096, 4096, 128256)],
    },
    "cpu": {
        "rms_norm": [(4096, 192)],
        "add_rms_norm": [(4096, 192)],
        "rotary": [(16, 256, 3, 3, 64)],
        "norm_rotary": [(16, 256, 3, 3, 64)],
        "swiglu": [(4096, 512)],
        "flash_attention": [(16, 256, 3, 3, 64)],
        "linear_cross_entropy": [(4096, 192, 1024)],
    },
}
