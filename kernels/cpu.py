"""The fused operations in C, for the CPU: cpu.c and cpu_attention.c, compiled on first use in about two seconds and kept.

torch runs an unfused operation as several passes over memory. The C functions do what the Triton kernels do, in float32 and
bfloat16. Matrix products stay torch's; torch.compile fuses by itself and sees the torch paths.

The library is built for the machine's own instructions into $XDG_CACHE_HOME/nanostack (~/.cache/nanostack).
NANOSTACK_CC names the compiler; NANOSTACK_CC= turns all of this off.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.c", "cpu_attention.c")]  # the first includes the others
# No -ffast-math: nan and inf must come out as they are, the trainer looks for them. No copies of functions: half the seconds.
FLAGS: tuple[str, ...] = ("-O3", "-fno-inline-functions", "-fno-ipa-cp", "-march=native", "-fno-math-errno")
FLAGS += ("-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-fPIC")
P, L, F, I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int  # noqa: E741
E = None  # stands for the dtype of the elements, float32 or bfloat16


class _Tensor(ctypes.Structure):
    """cpu_attention.c's tensor: data, and the strides of batch, position and head."""

    _fields_ = (("data", P), ("strides", L * 3))

    @classmethod
    def of(cls, x: torch.Tensor, dtype: torch.dtype) -> "_Tensor":
        return cls(_address(x, dtype, rows=True), (L * 3)(*x.stride()[:3]))


class _Angles(ctypes.Structure):
    """cpu_attention.c's angles: rotary's tables and how many positions they hold; NULL for None."""

    _fields_ = (("cosines", P), ("sines", P), ("period", L))

    @classmethod
    def of(cls, cos: torch.Tensor | None, sin: torch.Tensor | None) -> "_Angles":
        return cls() if cos is None else cls(_address(cos, torch.float32), _address(sin, torch.float32), len(cos))


T, A, F32, I32, I64 = _Tensor, _Angles, torch.float32, torch.int32, torch.int64
SIGNATURES = {  # a dtype is a pointer to the memory of a contiguous tensor of it, or NULL
    "swiglu_forward": (E, E, L, L, I),
    "swiglu_backward": (E, E, E, L, L, I),
    "rotary": (E, E, F32, F32, L, L, L, L, L, L, L, F, I),
    "norm_rotary_forward": (E, F32, F32, F32, E, L, L, L, L, L, L, L, F, I),
    "norm_rotary_backward": (E, E, F32, F32, F32, E, F32, L, L, L, L, L, L, L, F, I),
    "rms_norm_forward": (E, E, F32, E, E, F32, L, L, F, I),
    "rms_norm_backward": (E, E, E, F32, F32, E, F32, L, L, I),
    "cross_entropy": (F32, I64, F32, F32, E, L, L, L, F, I),
    "attention_forward": (T, T, T, T, F32, I32, A, L, L, L, L, L, L, L, I, F, F32, I),
    "attention_backward": (T, T, T, T, T, T, T, T, F32, I32, A, L, L, L, L, L, L, L, I, F, F32, I),
    "attention_scratch": (L, L),
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("NANOSTACK_CC", "cc"))


@functools.cache
def unavailable_reason() -> str | None:
    """One sentence on why the C functions cannot be had here; None if they can."""
    if sys.platform != "linux":
        return "they find torch's OpenMP on Linux only."
    if compiler() is None:
        named = os.environ.get("NANOSTACK_CC", "cc")
        return f"there is no C compiler ({named})." if named else "NANOSTACK_CC is empty, which turns them off."
    try:
        with ThreadPoolExecutor(2) as pool:  # two runs of the compiler, where there is none in the cache
            list(pool.map(_load, (torch.float32, torch.bfloat16)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or (error if isinstance(error, OSError) else f"{compiler()} failed silently")
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        return f"they could not be built: {said.strip().splitlines()[0]}"
    return None


def refusal(*tensors: torch.Tensor) -> str | None:
    """Why the C functions cannot work on these; None for plain CPU tensors with storage of float32 or bfloat16."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it needs tensors on the cpu, not on {x.device}."
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16 only, not {x.dtype}."
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, not {type(x).__name__}."
    return unavailable_reason()


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(..., 2F), gate first → (..., F)."""
    y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    _call("swiglu_forward", y.dtype, plain(gate_up), y, *_rows(y))
    return y


def swiglu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    dgate_up = gate_up.new_empty(gate_up.shape)
    _call("swiglu_backward", dy.dtype, plain(dy), plain(gate_up), dgate_up, *_rows(dy))
    return dgate_up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """x (B, T, H, K) turned by sign · the angles of cos, sin (T, K/2) → the same, contiguous."""
    x, out = plain(x), x.new_empty(x.shape)
    _expect("cos", cos, x.shape[1], x.shape[3] // 2)
    _expect("sin", sin, *cos.shape)
    sizes = (*x.shape[:3], x.shape[3] // 2, *x.stride()[:3], sign)
    _call("rotary", x.dtype, x, out, plain(cos), plain(sin), *sizes)
    return out


def norm_rotary(x: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """Each head of x (B, T, H, K) normalised, scaled by gain (K,), and turned by cos, sin (T, K/2) → the same, contiguous."""
    x, out = plain(x), x.new_empty(x.shape)
    _expect("cos", cos, x.shape[1], x.shape[3] // 2)
    _expect("sin", sin, *cos.shape)
    sizes = (*x.shape[:3], x.shape[3] // 2, *x.stride()[:3], eps)
    _call("norm_rotary_forward", x.dtype, x, plain(gain.float()), plain(cos), plain(sin), out, *sizes)
    return out


def norm_rotary_backward(
    dout: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, contiguous, and dgain in float32."""
    x, dx = plain(x), x.new_empty(x.shape)
    _expect("dout", dout, *x.shape)
    parts = x.new_empty((torch.get_num_threads(), x.shape[3]), dtype=torch.float32)
    given = plain(dout), x, plain(gain.float()), plain(cos), plain(sin)
    _call("norm_rotary_backward", x.dtype, *given, dx, parts, *x.shape[:3], x.shape[3] // 2, *x.stride()[:3], eps)
    return dx, parts.sum(0)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """y, x + residual (None without one) and the reciprocal of each row's root mean square."""
    y, (rows, width) = x.new_empty(x.shape), _rows(x)
    summed = None if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty(rows, dtype=torch.float32)
    given = plain(x), plain(residual), plain(weight.float())
    _call("rms_norm_forward", x.dtype, *given, y, summed, rstd, rows, width, eps)
    return y, summed, rstd


def rms_norm_backward(
    dy: torch.Tensor, dresidual: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, to which dresidual is added, and dweight in float32."""
    dx, (rows, width) = x.new_empty(x.shape), _rows(x)
    parts = x.new_empty((torch.get_num_threads(), width), dtype=torch.float32)
    given = plain(dy), plain(dresidual), plain(x), plain(weight.float()), rstd
    _call("rms_norm_backward", x.dtype, *given, dx, parts, rows, width)
    return dx, parts.sum(0)


def cross_entropy(logits, targets, row_scale, ignore_index, z_loss, loss, dlogits) -> None:
    """As linear_cross_entropy's kernel, into loss and dlogits; logits float32 and contiguous."""
    for name, x in (("targets", targets), ("row_scale", row_scale), ("loss", loss)):
        _expect(name, x, len(logits))
    dtype = torch.float32 if dlogits is None else dlogits.dtype
    _call("cross_entropy", dtype, logits, plain(targets), plain(row_scale), loss, dlogits, *logits.shape, ignore_index, z_loss)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q (B, T, H, K), k and v (B, T_kv, H_kv, K) → (B, T, H, K) and log of each row's sum (B, H, T).

    With cos and sin (n, K/2) q and k are first turned to their positions, which are counted modulo n.
    """
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    q, k, v = (plain(x, rows=True) for x in (q, k, v))
    cos, sin, cu_seqlens = plain(cos), plain(sin), plain(cu_seqlens)
    sizes = _attention_sizes(q, k, v, cos, sin, cu_seqlens, causal, scale)
    _call("attention_forward", q.dtype, q, k, v, out, lse, cu_seqlens, _Angles.of(cos, sin), *sizes)
    return out, lse


def attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, causal: bool, scale: float,
) -> None:  # fmt: skip
    """Into dq, dk, dv, which may have any strides but along K: those of q and k before they were turned."""
    dout, q, k, v, out = (plain(x, rows=True) for x in (dout, q, k, v, out))
    cos, sin, cu_seqlens, lse = plain(cos), plain(sin), plain(cu_seqlens), plain(lse)
    sizes = _attention_sizes(q, k, v, cos, sin, cu_seqlens, causal, scale)
    for name, x, like in (("dout", dout, q), ("out", out, q), ("dq", dq, q), ("dk", dk, k), ("dv", dv, k)):
        _expect(name, x, *like.shape)
    _expect("lse", lse, q.shape[0], q.shape[2], q.shape[1])
    _call("attention_backward", q.dtype, dout, q, k, v, out, dq, dk, dv, lse, cu_seqlens, _Angles.of(cos, sin), *sizes)


def _attention_sizes(q, k, v, cos, sin, cu_seqlens, causal, scale) -> tuple:
    """Tasks, sizes and scratch memory, as the C functions take them."""
    (batch, seq, heads, d), (kv_seq, kv_heads) = q.shape, k.shape[1:3]
    _expect("k", k, batch, seq if causal or cu_seqlens is not None else kv_seq, kv_heads, d)
    _expect("v", v, *k.shape)
    if cos is not None:
        _expect("cos", cos, len(cos), d // 2)
        _expect("sin", sin, *cos.shape)
    longest, tasks = kv_seq, kv_heads * batch
    if cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(edges)]
        if batch != 1 or not lengths or edges[0] != 0 or edges[-1] != seq or min(lengths) < 0:
            raise ValueError(f"cu_seqlens is {edges}; it must rise from 0 to {seq}, in a batch of 1")
        longest, tasks = max(lengths), kv_heads * len(lengths)
    each = _load(q.dtype).attention_scratch(longest, d)
    scratch = q.new_empty(torch.get_num_threads() * each, dtype=torch.float32)
    return tasks, seq, kv_seq, heads, kv_heads, d, longest, causal, scale, scratch


def _rows(x: torch.Tensor) -> tuple[int, int]:
    """How many rows x (..., D) has, and D."""
    return x.numel() // max(1, x.shape[-1]), x.shape[-1]


Maybe = TypeVar("Maybe", torch.Tensor, torch.Tensor | None)


def plain(x: Maybe, rows: bool = False) -> Maybe:
    """`x` as the C functions read it: contiguous, or its last dimension only with `rows`, and no sign yet to be turned."""
    if x is None:
        return x
    x = x.resolve_neg()
    return x if rows and x.stride(-1) == 1 else x.contiguous()


def _expect(name: str, x: torch.Tensor | None, *shape: int) -> None:
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; the C function takes {shape}")


def _address(x: torch.Tensor | None, dtype: torch.dtype, rows: bool = False) -> int | None:
    """The address of memory that C may read as it is. A tensor's is had here only; ValueError for one that C would misread."""
    if x is None:
        return None
    sound = type(x) in (torch.Tensor, torch.nn.Parameter) and x.dtype == dtype and x.device.type == "cpu" and not x.is_neg()
    if not sound or not (x.stride(-1) == 1 or x.shape[-1] == 1 if rows else x.is_contiguous()):
        raise ValueError(
            f"a C function got a {type(x).__name__} of {x.dtype} on {x.device} with strides {x.stride()}; it takes a plain "
            f"{dtype} tensor on the cpu that is contiguous{' along its last dimension' if rows else ''}"
        )
    return x.data_ptr()


def _call(name: str, dtype: torch.dtype, *arguments) -> None:
    """Call a function of cpu.c for elements of `dtype`, each argument as SIGNATURES says; it ends with the threads."""
    values = []
    for kind, value in zip(SIGNATURES[name], arguments, strict=False):
        if kind is T:
            value = T.of(value, dtype)
        elif kind is E or isinstance(kind, torch.dtype):
            value = _address(value, kind or dtype)
        values.append(value)
    getattr(_load(dtype), name)(*values, torch.get_num_threads())


@functools.cache
def _load(dtype: torch.dtype) -> ctypes.CDLL:
    define = "-DBF16" if dtype == torch.bfloat16 else "-DFP32"
    sources = [source.read_text() for source in SOURCES]
    about = "\n".join((str(compiler()), *FLAGS, define, *sources, str(torch.__version__), _processor()))
    name = f"cpu-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanostack"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            _build(define, folder / name)
    except (OSError, RuntimeError):  # a home that cannot be written to, or none
        folder = Path(tempfile.mkdtemp(prefix="nanostack-"))
        _build(define, folder / name)
    library = ctypes.CDLL(str(folder / name))
    for function, types in SIGNATURES.items():
        pointers = [P if kind is E or isinstance(kind, torch.dtype) else kind for kind in types]
        getattr(library, function).argtypes, getattr(library, function).restype = pointers, None
    library.attention_scratch.restype = L
    return library


def _build(define: str, path: Path) -> None:
    """Compile and link in two steps: linked without -fopenmp, it uses the OpenMP that torch has loaded, and its threads."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "cpu.o", Path(folder) / "cpu.so"
        for command in (
            (*FLAGS, define, "-c", str(SOURCES[0]), "-o", str(made[0])),
            ("-shared", str(made[0]), "-o", str(made[1]), "-lm"),
        ):
            subprocess.run([str(compiler()), *command], check=True, capture_output=True, text=True, timeout=120)
        os.replace(made[1], path)  # at once: others may be looking


def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()
