"""Rotary and norm_rotary against the references beside them in fp64: as test_operations.py, run three times."""

import torch
from kernel_oracle import assert_obeys_error_rule, in_turn, on_every_target, plain_rms_norm, randn

import kernels

EPS = 1e-5


@in_turn(shape=[(2, 1, 1, 1, 2, 0), (1, 37, 8, 1, 32, 3), (2, 5, 4, 2, 80, 0), (1, 3, 6, 6, 128, 7), (1, 2, 40, 5, 256, 1)])
def test_rotary_obeys_error_rule_on_slices_of_a_fused_projection(shape, target, monkeypatch):
    batch, seq, n_head, n_kv_head, d_head, offset = shape
    fused = randn(batch, seq, n_head + 2 * n_kv_head, d_head, target=target, grad=False)
    q, k, _ = (x.requires_grad_() for x in fused.split([n_head, n_kv_head, n_kv_head], 2))
    angle = torch.outer(torch.arange(offset + seq + 2.0), 1e4 ** -torch.linspace(0, 1, d_head // 2)).to(target[0])
    cos, sin = angle.cos(), angle.sin()

    def reference(q, k):
        return kernels.rotary_reference(q, k, cos.to(q.dtype) if q.dtype == torch.float64 else cos, sin, offset)

    def kernel(q, k):
        return kernels.rotary(q, k, cos, sin, offset, backend=target[1])

    assert_obeys_error_rule(kernel, reference, reference, (q, k), monkeypatch)


@in_turn(shape=[(2, 1, 1, 32, 0), (1, 37, 8, 80, 3), (2, 5, 6, 256, 0)])
def test_norm_rotary_obeys_error_rule_on_slices_of_a_fused_projection(shape, target, monkeypatch):
    batch, seq, n_head, d_head, offset = shape
    x = randn(batch, seq, n_head + 2, d_head, target=target, grad=False)[:, :, 1:-1].requires_grad_()
    gain = randn(d_head, target=target, seed=1).detach().float().requires_grad_()
    angle = torch.outer(torch.arange(offset + seq + 2.0), 1e4 ** -torch.linspace(0, 1, d_head // 2)).to(target[0])

    def apart(norm):
        def function(x, gain):
            tables = [table if x.dtype != torch.float64 else table.double() for table in (angle.cos(), angle.sin())]
            y = norm(x, gain, EPS)
            return kernels.rotary_reference(y, y[:, :, :0], *tables, offset)[0]

        return function

    def kernel(x, gain):
        return kernels.norm_rotary(x, gain, angle.cos(), angle.sin(), EPS, offset, backend=target[1])

    assert_obeys_error_rule(kernel, apart(plain_rms_norm), apart(kernels.rms_norm_reference), (x, gain), monkeypatch)


@on_every_target
def test_rotary_turns_by_relative_position_only(target):
    """The scalar product of a rotated q and k depends on the distance of their positions, not on the positions."""
    q, k = (randn(1, 1, 1, 64, target=(target[0], target[1], torch.float32), seed=seed) for seed in (0, 1))
    angle = torch.outer(torch.arange(50.0), 1e4 ** -torch.linspace(0, 1, 32)).to(target[0])

    def product(q_position, k_position):
        rotated = [kernels.rotary(q, k, angle.cos(), angle.sin(), p, backend=target[1]) for p in (q_position, k_position)]
        return (rotated[0][0] * rotated[1][1]).sum()

    torch.testing.assert_close(product(3, 9), product(41, 47))
