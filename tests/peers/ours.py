"""What the adapters build on: the operations of `kernels` in one backend, and stand-ins for modules of the peer's."""

import ast
import functools
import math
import sys
import types
import typing
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import kernels

REFUSALS = {  # what our operations say, and what it is called in the table
    "takes float32, float16 only": "dtype: interpreted Triton takes float32 and float16",
    "takes float32 and bfloat16 only": "dtype: C takes float32 and bfloat16",
    "causal attention and cu_seqlens need q and k of one length": "causal with q and k of different lengths",
    "the kernel takes a d_head of at most": "d_head above 256 in Triton",
    "the kernel takes rows of at most": "rows above 16384 in Triton",
    "it must be even": "rotary of an odd d_head",
    "it must not be negative": "rotary at negative positions",
}


def refuse(reason: str):
    """End the case: our operation does not offer this. Not an Exception, so that no `except` of the peer's swallows it."""
    pytest.skip(f"refused: {reason}")


class Ours:
    """The operations of `kernels` in one backend. Counts calls, and turns their documented refusals into the case's outcome."""

    def __init__(self, backend: str):
        self.backend, self.calls = backend, 0

    def __getattr__(self, name: str):
        operation = getattr(kernels, name)

        @functools.wraps(operation)
        def call(*args, **options):
            self.calls += 1
            try:
                return operation(*args, backend=self.backend, **options)
            except ValueError as error:
                for words, reason in REFUSALS.items():
                    if words in str(error):
                        refuse(reason)
                raise

        return call

    def norm(self, x, weight, eps, offset=0.0):
        """rms_norm where the peer allows no weight, or one that is counted from `offset`."""
        if weight is None:
            return self.rms_norm(x, torch.ones(x.shape[-1]), eps)
        return self.rms_norm(x, weight.float() + offset if offset else weight, eps)

    def rotate(self, x, cos, sin, interleaved=False, offsets=0, cu_seqlens=None):
        """rotary of x (B, T, H, K), or of packed documents (T, H, K), as the peers' functions take it.

        cos and sin may turn a part of K only; `interleaved` pairs neighbours, which is another order of the same dimensions;
        offsets is one number, or one for each row or document.
        """
        width = 2 * cos.shape[-1]
        if width < x.shape[-1]:
            turned = self.rotate(x[..., :width], cos, sin, interleaved, offsets, cu_seqlens)
            return torch.cat([turned, x[..., width:]], -1)
        if interleaved:
            halves = torch.cat([x[..., ::2], x[..., 1::2]], -1)
            turned = self.rotate(halves, cos, sin, False, offsets, cu_seqlens)
            return torch.stack(turned.chunk(2, -1), -1).flatten(-2)
        several = isinstance(offsets, torch.Tensor) and offsets.ndim > 0
        if cu_seqlens is not None:
            parts = [x[None, start:end] for start, end in pairwise(cu_seqlens.tolist())]
        else:
            parts = x.split(1) if several else [x]
        each = offsets.tolist() if several else [int(offsets or 0)] * len(parts)
        tables = cos.float(), sin.float()
        turned = [self.rotary(p, p[:, :, :1].detach(), *tables, o)[0] for p, o in zip(parts, each, strict=True)]
        return torch.cat(turned) if cu_seqlens is None else torch.cat(turned, 1)[0]

    def rotate_qkv(self, qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None):
        """q and k turned of qkv (B, T, 3, H, K), or of (B, T, H + 2 · H_kv, K)."""
        if num_heads_q is None:
            q, k, v = qkv.unbind(2)
        else:
            rest = (qkv.shape[2] - num_heads_q) // 2
            q, k, v = qkv.split([num_heads_q, rest, rest], 2)
        q = self.rotate(q, cos, sin, interleaved, seqlen_offsets)
        k = self.rotate(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, seqlen_offsets)
        return torch.stack([q, k, v], 2) if num_heads_q is None else torch.cat([q, k, v], 2)

    def rotate_kv(self, kv, cos, sin, interleaved=False, seqlen_offsets=0):
        """k turned of kv (B, T, 2, H, K)."""
        k, v = kv.unbind(2)
        return torch.stack([self.rotate(k, cos, sin, interleaved, seqlen_offsets), v], 2)


def module(name: str, path: Path | None = None, **members) -> types.ModuleType:
    """Stand in for a module, or with `path` for a package whose __init__ is not run and whose other modules are the peer's."""
    made = types.ModuleType(name)
    if path is not None:
        made.__path__ = [str(path)]
    vars(made).update(members)
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, made)
    return made


def named(path: Path, names: tuple[str, ...]) -> list[ast.stmt]:
    """Functions, classes and constants of these names at the top of a file."""

    def name_of(node):
        return getattr(node.targets[0], "id", None) if isinstance(node, ast.Assign) else getattr(node, "name", None)

    found = [node for node in ast.parse(path.read_text()).body if name_of(node) in names]
    missing = set(names) - set(map(name_of, found))
    if missing:
        raise LookupError(f"{path} has no {', '.join(sorted(missing))}; this adapter is for another commit")
    return found


def members_of(path: Path, *names: str, **known) -> dict:
    """Members of a peer's file that cannot be imported whole, evaluated by themselves."""
    namespace = {
        "math": math,
        "torch": torch,
        "nn": torch.nn,
        "Tensor": torch.Tensor,
        "F": torch.nn.functional,
        "__name__": path.stem,
    }
    namespace |= {name: getattr(typing, name) for name in ("Optional", "Union", "Literal", "Callable", "Any")} | known
    exec(compile(ast.Module(named(path, names), []), str(path), "exec"), namespace)
    return {name: namespace[name] for name in names}


def cut(path: Path, names: tuple[str, ...], imports: str, out: Path) -> Path:
    """Write a test file that has these members of a peer's file only, below `imports`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"{imports}\n{ast.unparse(ast.Module(named(path, names), []))}\n")
    return out
