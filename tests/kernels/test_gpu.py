"""The compiled kernels on a GPU: each in each dtype at a realistic size and at an odd one, and what only a GPU has.

Whatever a shape can show, test_operations.py and test_attention.py show in the interpreter. This file is to take less than
a minute of a machine with 16 cores (an estimate until it has run): most of it is compiling, which -n divides.
"""

import importlib
import time

import pytest
import torch
from kernel_oracle import (
    GPU,
    GPU_DEVICE,
    assert_obeys_error_rule,
    on_gpu,
    outputs_and_gradients,
    plain_attention,
    plain_rms_norm,
    plain_swiglu,
    randn,
)

import kernels

pytestmark = pytest.mark.gpu
EPS = 1e-5
BF16 = (GPU_DEVICE, "triton", torch.bfloat16)
MANY = 2**31 + 2**16  # elements: an int32 offset to the last of them is negative
in_bf16 = pytest.mark.parametrize("target", GPU[-1:])


def check(kernel, plain, reference, inputs, monkeypatch):
    """The error rule, and the same bits from a second run."""
    assert_obeys_error_rule(kernel, plain, reference, inputs, monkeypatch)
    assert all(map(torch.equal, *(outputs_and_gradients(kernel, inputs) for _ in range(2))))


@pytest.fixture(autouse=True)
def give_memory_back():
    """Leave the memory to the tests that run beside this one in processes of their own."""
    yield
    torch.cuda.empty_cache()


def take_gigabytes(n: int) -> None:
    """Have so much in this process's pool before the test begins: tests beside it may hold it for some seconds."""
    for attempt in range(41):
        try:
            torch.empty(n << 30, dtype=torch.int8, device="cuda")  # what is freed at once stays in the pool
            return
        except torch.OutOfMemoryError:
            if attempt < 40:
                time.sleep(0.5)
    pytest.skip(f"needs {n} GiB of GPU memory, {torch.cuda.mem_get_info()[0] / 2**30:.0f} are free")


@on_gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (3, 333, 781)], ids=str)
def test_norms(shape, target, monkeypatch):
    x, residual, weight = (randn(*s, target=target, seed=i) for i, s in enumerate((shape, shape, shape[-1:])))
    check(
        lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
        lambda x, r, w: (plain_rms_norm(x + r, w, EPS), x + r),
        lambda x, r, w: (kernels.rms_norm_reference(x + r, w, EPS), x + r),
        (x, residual, weight),
        monkeypatch,
    )


@in_bf16
@pytest.mark.parametrize("shape", [(16384, 2048), (999, 16384), (65536, 256)], ids=str)
def test_norm_alone(shape, target, monkeypatch):
    check(
        lambda x, w: kernels.rms_norm(x, w, EPS),
        lambda x, w: plain_rms_norm(x, w, EPS),
        lambda x, w: kernels.rms_norm_reference(x, w, EPS),
        (randn(*shape, target=target), randn(shape[-1], target=target, seed=1).detach().float().requires_grad_()),
        monkeypatch,
    )


@on_gpu
@pytest.mark.parametrize(("batch", "seq", "n_head", "n_kv_head", "d_head"), [(2, 4096, 32, 8, 128), (3, 333, 5, 1, 80)])
def test_rotary(batch, seq, n_head, n_kv_head, d_head, target, monkeypatch):
    fused = randn(batch, seq, n_head + 2 * n_kv_head, d_head, target=target, grad=False)
    q, k, _ = (x.requires_grad_() for x in fused.split([n_head, n_kv_head, n_kv_head], 2))
    angle = torch.outer(torch.arange(seq + 0.0), 1e4 ** -torch.linspace(0, 1, d_head // 2)).to(target[0])
    cos, sin = angle.cos(), angle.sin()

    def reference(q, k):
        return kernels.rotary_reference(q, k, cos.to(q.dtype) if q.dtype == torch.float64 else cos, sin)

    check(lambda q, k: kernels.rotary(q, k, cos, sin), reference, reference, (q, k), monkeypatch)


@on_gpu
@pytest.mark.parametrize(("batch", "seq", "n_head", "d_head"), [(2, 4096, 32, 128), (3, 333, 5, 80)])
def test_norm_rotary(batch, seq, n_head, d_head, target, monkeypatch):
    x = randn(batch, seq, n_head + 2, d_head, target=target, grad=False)[:, :, :-2].requires_grad_()
    gain = randn(d_head, target=target, seed=1).detach().float().requires_grad_()
    angle = torch.outer(torch.arange(seq + 0.0), 1e4 ** -torch.linspace(0, 1, d_head // 2)).to(target[0])

    def apart(norm):
        def function(x, gain):
            tables = [table.to(torch.promote_types(x.dtype, torch.float32)) for table in (angle.cos(), angle.sin())]
            y = norm(x, gain, EPS)
            return kernels.rotary_reference(y, y[:, :, :0], *tables)[0]

        return function

    def kernel(x, gain):
        return kernels.norm_rotary(x, gain, angle.cos(), angle.sin(), EPS)

    check(kernel, apart(plain_rms_norm), apart(kernels.rms_norm_reference), (x, gain), monkeypatch)


@on_gpu
@pytest.mark.parametrize("shape", [(8192, 2 * 5632), (3, 333, 2 * 781)], ids=str)
def test_swiglu(shape, target, monkeypatch):
    check(kernels.swiglu, plain_swiglu, kernels.swiglu_reference, (randn(*shape, target=target),), monkeypatch)


@on_gpu
@pytest.mark.parametrize(("rows", "width", "vocab"), [(3000, 2048, 32000), (37, 100, 50257)])
def test_linear_cross_entropy(rows, width, vocab, target, monkeypatch):
    x, weight = randn(rows, width, target=target), randn(vocab, width, target=target, seed=1, scale=width**-0.5)
    targets = torch.arange(rows, device=target[0]) * 7919 % vocab
    targets[::7] = -100

    def reference(x, weight):
        return kernels.linear_cross_entropy_reference(x, weight, targets, z_loss=1e-4)

    check(lambda x, w: kernels.linear_cross_entropy(x, w, targets, z_loss=1e-4), reference, reference, (x, weight), monkeypatch)


def check_attention(shape, target, monkeypatch, edges=None, causal=True):
    """shape: batch, length of q, of k and v, heads of q, of k and v, d_head."""
    batch, q_len, kv_len, n_head, n_kv_head, d_head = shape
    q = randn(batch, q_len, n_head, d_head, target=target)
    k, v = (randn(batch, kv_len, n_kv_head, d_head, target=target, seed=seed) for seed in (1, 2))
    cu_seqlens = None if edges is None else torch.tensor(edges, dtype=torch.int32, device=target[0])
    options = {"causal": causal, "cu_seqlens": cu_seqlens}
    check(
        lambda *qkv: kernels.flash_attention(*qkv, **options),
        lambda *qkv: plain_attention(*qkv, **options),
        lambda *qkv: kernels.flash_attention_reference(*qkv, **options),
        (q, k, v),
        monkeypatch,
    )


@on_gpu
@pytest.mark.parametrize(
    ("shape", "edges"), [((1, 4096, 4096, 8, 2, 128), None), ((1, 1023, 1023, 6, 2, 80), [0, 7, 600, 600, 1023])], ids=str
)
def test_attention(shape, edges, target, monkeypatch):
    check_attention(shape, target, monkeypatch, edges)


@in_bf16
@pytest.mark.parametrize("shape", [(1, 4096, 4096, 8, 8, 64), (1, 1000, 1000, 2, 1, 256), (2, 333, 333, 3, 1, 32)], ids=str)
def test_attention_of_every_width(shape, target, monkeypatch):
    check_attention(shape, target, monkeypatch)


@in_bf16
@pytest.mark.parametrize("shape", [(1, 300, 777, 4, 4, 64), (2, 1, 700, 4, 2, 48)], ids=str)
def test_attention_to_keys_of_another_length(shape, target, monkeypatch):
    check_attention(shape, target, monkeypatch, causal=False)


@on_gpu
def test_attention_of_one_token(target, monkeypatch):
    """Triton makes a constant of a length of 1: its dK/dV did not compile [Triton 3.6 to 3.8]."""
    check_attention((2, 1, 1, 2, 1, 64), target, monkeypatch)


@in_bf16
@pytest.mark.parametrize("d_head", [64, 128])
def test_attention_inside_documents(d_head, target, monkeypatch):
    check_attention((1, 2048, 2048, 8, 2, d_head), target, monkeypatch, edges=[0, 7, 1100, 2048])


@in_bf16
@pytest.mark.parametrize("seq", [1000, 4096])
def test_attention_with_tma_and_with_pointers_agrees(seq, target):
    """Rows of 64 + 4 elements apart start on 8 bytes: TMA cannot read them, pointers can."""
    q, k, v = (randn(2, seq, 4, 64, target=target, seed=seed) for seed in range(3))
    apart = [torch.nn.functional.pad(x.detach(), (0, 4))[..., :64].requires_grad_() for x in (q, k, v)]
    for ours, theirs in zip(*(outputs_and_gradients(kernels.flash_attention, x) for x in ((q, k, v), apart)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


@in_bf16
def test_rotary_attention_is_rotary_then_attention(target):
    qkv = randn(2, 1000, 8 + 2 * 2, 64, target=target)
    angle = torch.outer(torch.arange(1000.0), 1e4 ** -torch.linspace(0, 1, 32)).to(target[0])
    cos, sin = angle.cos(), angle.sin()
    cu_seqlens = torch.tensor([0, 300, 1200, 2000], dtype=torch.int32, device=target[0])

    def apart(qkv):
        q, k, v = qkv.split([8, 2, 2], 2)
        q, k = kernels.rotary(q, k, cos, sin)
        q, k, v = (x.reshape(1, 2000, -1, 64) for x in (q, k, v))
        return kernels.flash_attention(q, k, v, cu_seqlens=cu_seqlens).reshape(2, 1000, 8, 64)

    together = outputs_and_gradients(lambda qkv: kernels.rotary_attention(qkv, 2, cos, sin, cu_seqlens), (qkv,))
    assert all(map(torch.equal, together, outputs_and_gradients(apart, (qkv,))))


def block(x, head, weight, angle, targets):
    """All operations, on rows of 256."""
    y, x = kernels.add_rms_norm(x, kernels.rms_norm(x, weight, EPS), weight, EPS)
    q, k = kernels.rotary(*y.view(2, -1, 4, 64).split(2, 2), angle, angle)
    y = kernels.flash_attention(q, k, k).reshape(len(x), 128)
    return kernels.linear_cross_entropy(torch.cat((kernels.swiglu(x), y), -1), head, targets)


def block_inputs(seed: int = 0):
    """What `block` gets a gradient for, and the rest of it."""
    wanted = (randn(1000, 256, target=BF16, seed=seed), randn(1000, 256, target=BF16, seed=seed + 1))
    return wanted, (torch.rand(256, device="cuda"), torch.rand(500, 32, device="cuda"), torch.arange(1000, device="cuda"))


def test_compiled_model_block_gives_the_numbers_of_eager():
    wanted, rest = block_inputs()
    eager, compiled = (
        outputs_and_gradients(lambda *inputs, f=f: f(*inputs, *rest), wanted)
        for f in (block, torch.compile(block, fullgraph=True))
    )
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)


def test_graph_of_all_operations_replays_with_new_inputs():
    """Forward and backward are captured once; what is replayed reads what the inputs hold then."""
    wanted, rest = block_inputs()

    def run():
        loss = block(*wanted, *rest)
        return loss, *torch.autograd.grad(loss, wanted)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x, other in zip(wanted, block_inputs(seed=5)[0], strict=True):
            x.copy_(other)
    graph.replay()
    replayed = [x.clone() for x in captured]
    torch.testing.assert_close(replayed, list(run()), rtol=1e-2, atol=1e-4)


def test_kernels_run_on_the_stream_that_is_current():
    """The inputs are written on a stream that is kept busy first: a launch on any other would read what was there before."""
    x, ones = torch.zeros(1000, 256, dtype=torch.bfloat16, device="cuda"), torch.ones(1000, 256, dtype=torch.bfloat16)
    ones = ones.pin_memory()
    kernels.swiglu(x)  # compiled and loaded now, which takes longer than the stream is busy
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        x.copy_(ones, non_blocking=True)
        y = kernels.swiglu(x)
    torch.cuda.synchronize()
    assert torch.equal(y, kernels.swiglu(x)) and y.abs().min() > 0.5


def test_scratch_memory_of_descriptors_is_given_back():
    """A kernel with TMA makes its descriptors in memory of torch's; autograd's thread has an allocator of its own."""
    q = randn(1, 512, 4, 64, target=BF16)
    outputs_and_gradients(kernels.flash_attention, (q, q, q))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        outputs_and_gradients(kernels.flash_attention, (q, q, q))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def assert_end_as_alone(function, inputs, sliced, rows=4):
    """The last rows of a result past 2^31 elements are those of the last rows alone, forward and backward."""
    alone = [x.detach()[-rows:].clone().requires_grad_() if i in sliced else x for i, x in enumerate(inputs)]
    out, expected = function(*inputs), function(*alone)
    assert torch.equal(out[-rows:], expected)
    dout = torch.ones_like(out)
    gradients = torch.autograd.grad(out, [inputs[i] for i in sliced], dout)
    wanted = torch.autograd.grad(expected, [alone[i] for i in sliced], dout[-rows:])
    assert all(torch.equal(gradient[-rows:], w) for gradient, w in zip(gradients, wanted, strict=True))


def big(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda").requires_grad_()


def test_offsets_past_2_to_the_31():
    take_gigabytes(40)
    width = 16384
    x, weight = big(MANY // width, width), torch.ones(width, device="cuda")
    assert_end_as_alone(lambda x, w: kernels.rms_norm(x, w, EPS), (x, weight), (0,))
    assert_end_as_alone(kernels.swiglu, (x,), (0,))
    heads = x.detach().view(-1, 2, 64, 128).requires_grad_()
    angle = torch.arange(128.0, device="cuda").view(2, 64)
    turned = lambda q: kernels.rotary(q, q, angle.cos(), angle.sin())[0]  # noqa: E731
    assert_end_as_alone(turned, (heads,), (0,))
    heads = x.detach().view(-1, 64, 2, 128).requires_grad_()
    assert_end_as_alone(lambda q: kernels.flash_attention(q, q, q), (heads,), (0,))


def test_logits_past_2_to_the_31(monkeypatch):
    take_gigabytes(24)
    rows, vocab = 20000, 131072
    monkeypatch.setattr(importlib.import_module("kernels.linear_cross_entropy"), "CHUNK_ROWS", rows)
    x, weight, targets = big(rows, 64), big(vocab, 64), torch.randint(vocab, (rows,), device="cuda")

    def function(x):
        return kernels.linear_cross_entropy(x, weight.detach(), targets[-len(x) :], reduction="none")

    loss, expected = function(x), function(x.detach()[-4:])
    torch.testing.assert_close(loss[-4:], expected, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx[-4:].isfinite().all() and dx[-4:].abs().sum() > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    x = torch.randn(8, 64, device="cuda:1")
    torch.testing.assert_close(kernels.rms_norm(x, x[0], EPS), kernels.rms_norm(x, x[0], EPS, backend="torch"))
