"""The C functions of the CPU: how they are built, chosen and left alone; test_operations.py checks their numbers."""

import json

import pytest
import torch
from conftest import start_python

import kernels
from kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"no C functions: {cpu.unavailable_reason()}")


ANSWER = """
import json, sys
import torch
import kernels

x = torch.arange(-8.0, 8.0).view(2, 8)
try:
    same = torch.equal(kernels.swiglu(x), kernels.swiglu(x, backend={backend!r}))
    print(json.dumps([kernels.cpu.unavailable_reason(), same]))
except ValueError as error:
    print(json.dumps(str(error)))
"""


def ask(*questions: tuple[str, dict]) -> list:
    """The answer to each (backend, environment), at the same time, from a process of its own: why there are no C functions, and
    whether the backend that is chosen by itself agrees with this one; or the error."""
    started = [start_python("-c", ANSWER.format(backend=backend), env=environment) for backend, environment in questions]
    done = [process.done() for process in started]
    assert not any(one.returncode for one in done), done
    return [json.loads(one.stdout) for one in done]


def test_without_a_compiler_the_torch_paths_run():
    without = {"NANOSTACK_CC": ""}
    said = "NANOSTACK_CC is empty, which turns them off."
    assert ask(("torch", without), ("c", without)) == [[said, True], f'backend="c" is impossible: {said}']


def test_compiler_that_fails_is_told(tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = {"NANOSTACK_CC": str(broken), "XDG_CACHE_HOME": str(tmp_path)}
    assert ask(("torch", environment)) == [["they could not be built: no such flag", True]]


def test_many_processes_build_at_once_into_an_empty_cache(tmp_path):
    assert ask(*[("c", {"XDG_CACHE_HOME": str(tmp_path)})] * 3) == [[None, True]] * 3
    assert [path.suffix for path in (tmp_path / "nanostack").iterdir()] == [".so"] * 2, "one library a dtype, no leftovers"


def test_cache_that_cannot_be_written_to_is_done_without(tmp_path):
    (tmp_path / "nanostack").write_text("in the way")
    assert ask(("c", {"XDG_CACHE_HOME": str(tmp_path)})) == [[None, True]]


def test_torch_is_what_torch_was_asked_for(monkeypatch):
    def never(*_):
        raise AssertionError("C was called")

    monkeypatch.setattr(cpu, "_call", never)
    x = torch.ones(2, 8)
    kernels.swiglu(x, backend="torch")
    kernels.swiglu(x.double())
    kernels.swiglu(x.half())
    kernels.flash_attention(*[torch.ones(1, 1, 2, 8)] * 3)  # a single new token
    with pytest.raises(AssertionError, match="C was called"):
        kernels.swiglu(x)
    with pytest.raises(AssertionError, match="C was called"):
        kernels.flash_attention(*[torch.ones(1, 3, 2, 8, dtype=torch.bfloat16)] * 3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 8, dtype=torch.float64), "takes float32 and bfloat16 only, not torch.float64"),
        (torch.ones(2, 8, device="meta"), "needs tensors on the cpu, not on meta"),
    ],
)
def test_what_c_cannot_do_is_refused_where_it_is_asked_for(x, message):
    with pytest.raises(ValueError, match=message):
        kernels.swiglu(x, backend="c")


EXTREMES = [float("nan"), float("inf"), -float("inf"), 200.0, -200.0]


@pytest.mark.parametrize("value", EXTREMES)
def test_extremes_come_out_as_from_torch(value):
    """The trainer looks for what is not finite: it must not be lost on the way. What is finite stays so."""
    x = torch.full((3, 40), 0.5)
    x[1, 7] = value
    weight = torch.ones(40)
    functions = {
        "swiglu": lambda backend: kernels.swiglu(x, backend=backend),
        "rms_norm": lambda backend: kernels.rms_norm(x, weight, 1e-5, backend=backend),
        "loss": lambda backend: kernels.linear_cross_entropy(
            x, torch.eye(40), torch.arange(3), reduction="none", backend=backend
        ),
    }
    for name, function in functions.items():
        ours, theirs = function("c"), function("torch")
        finite = ours.isfinite()
        assert torch.equal(finite, theirs.isfinite()), name
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", EXTREMES)
def test_attention_loses_nothing_that_is_not_finite(value):
    """Against each query alone with the keys that it sees. A nan behind the diagonal may show: it is multiplied by 0."""
    x = torch.full((1, 3, 1, 40), 0.5)
    x[:, 1, :, 7] = value
    ours = kernels.flash_attention(x, x, x, backend="c")
    seen = [kernels.flash_attention(x[:, i : i + 1], *[x[:, : i + 1]] * 2, causal=False, backend="torch") for i in range(3)]
    theirs = torch.cat(seen, 1)
    assert not (ours.isfinite() & ~theirs.isfinite()).any()
    both = ours.isfinite() & theirs.isfinite()
    torch.testing.assert_close(ours[both], theirs[both], rtol=1e-5, atol=1e-6)
    assert both[0, 0, 0, :7].all() and (both.all() or not both[0, 1:, 0, 7].any())


def test_number_of_threads_changes_rounding_only():
    x, weight = torch.randn(300, 96, requires_grad=True), torch.ones(96, requires_grad=True)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs = [
                torch.autograd.grad(kernels.rms_norm(x, weight, 1e-5, backend="c").square().sum(), (x, weight)) for _ in "ab"
            ]
            assert all(map(torch.equal, *runs)), "the same number of threads gives the same bits"
            found[threads] = runs[0]
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        assert torch.equal(found[threads][0], found[1][0])
        torch.testing.assert_close(found[threads][1], found[1][1])


def test_attention_is_the_same_with_any_number_of_threads():
    q = torch.randn(1, 331, 4, 24, requires_grad=True)
    k, v = (torch.randn(1, 331, 2, 24, requires_grad=True) for _ in "kv")
    documents, before, found = torch.tensor([0, 1, 130, 130, 331], dtype=torch.int32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = kernels.flash_attention(q, k, v, cu_seqlens=documents, backend="c")
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


UNREADABLE = {
    "gaps": lambda x: torch.stack((x, x), -1)[..., 0],
    "another dtype": torch.Tensor.double,
    "another device": lambda x: x.to("meta"),
    "a sign to be turned": torch._neg_view,
    "a subclass": lambda x: x.as_subclass(type("Subclass", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_no_tensor_reaches_c_that_it_would_read_wrongly(how):
    """Whatever function is called, with whatever argument: the address of a tensor is to be had in one way only."""
    asked = set()
    for name, kinds in cpu.SIGNATURES.items():
        for i, kind in enumerate(kinds):
            if kind in (cpu.L, cpu.F, cpu.I, cpu.A):
                continue
            dtype = kind if isinstance(kind, torch.dtype) else torch.float32
            arguments = [None if other is not cpu.T else torch.ones(1, 2, 1, 4) for other in kinds]
            arguments[i] = UNREADABLE[how](torch.ones(1, 2, 1, 4, dtype=dtype))
            with pytest.raises(ValueError, match="a C function got a "):
                cpu._call(name, torch.float32, *arguments)
            asked.add((name, i))
    assert len(asked) > 40
    with pytest.raises(ValueError, match="a C function got a "):
        cpu._Angles.of(torch.ones(2, 4), UNREADABLE[how](torch.ones(2, 4)))


def test_attention_operations_take_any_layout_and_no_misfit():
    """Called by name, without the checks of kernels.flash_attention."""
    forward, backward = torch.ops.nanostack.flash_attention_c, torch.ops.nanostack.flash_attention_backward_c
    apart = UNREADABLE["gaps"]
    q, k, v, dout = (torch.randn(1, 12, heads, 8) for heads in (4, 2, 2, 4))
    edges, table = torch.tensor([0, 5, 12], dtype=torch.int32), torch.rand(12, 4)
    out, lse = forward(q, k, v, table, table, edges, True, 0.3)
    strided = forward(*map(apart, (q, k, v, table, table, edges)), True, 0.3)
    assert torch.equal(strided[0], out) and torch.equal(strided[1], lse)
    given = (dout, q, k, v, table, table, edges, out, lse)
    results = [[torch.empty_like(x) for x in (q, k, v)] for _ in "ab"]
    backward(*given, *results[0], True, 0.3)
    backward(*map(apart, given), *results[1], True, 0.3)
    assert all(map(torch.equal, *results))
    for i, misfit in ((0, dout[:, :7]), (2, k[:, :7]), (3, v[:, :, :1]), (5, table[:3]), (6, edges * 9), (7, out[:, :2])):
        with pytest.raises(ValueError, match=r"has shape .* the C function takes|must rise from 0 to 12"):
            backward(*given[:i], misfit, *given[i + 1 :], *results[0], True, 0.3)
    with pytest.raises(ValueError, match="lse has shape"):
        backward(*given[:-1], lse[..., :3], *results[0], True, 0.3)
    with pytest.raises(ValueError, match="contiguous along its last dimension"):
        backward(*given, apart(results[0][0]), *results[0][1:], True, 0.3)


def test_cross_entropy_rows_take_no_misfit():
    x, weight = torch.ones(3, 8), torch.ones(5, 8)
    with pytest.raises(ValueError, match="targets has shape"):
        torch.ops.nanostack.linear_cross_entropy_rows(x, weight, torch.tensor([0]), None, -100, 0.0, False, "c")
