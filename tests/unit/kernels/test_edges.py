"""Inputs at the rim of what is allowed, on every backend against float64: mixed groups, nothing at all, huge, NaN."""

from __future__ import annotations

import pytest
import torch

from bestiary.kernels import causal_conv1d_fn, selective_scan_fn, selective_state_update

OP = "selective_scan"  # every op that is used here has the same backends


def close(found, truth, tolerance=1e-5):
    for a, b in zip(found, truth, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * (1 + b.abs().max())


@pytest.mark.parametrize(
    "forms", [((2, 4, 70), (2, 4, 4, 70)), ((2, 4, 4, 70), (2, 4, 70)), ((2, 2, 4, 70), (2, 4, 4, 70))]
)
def test_scan_with_groups_of_one_map_alone(forms, backend):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 70), (2, 8, 70), (8, 4), *forms)
    inputs = [torch.rand(*s, generator=g) * (-1 if s == (8, 4) else 1) for s in shapes]

    def run(tensors, **options):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = selective_scan_fn(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    close(run(inputs, backend=backend), run([t.double() for t in inputs], backend="reference"))


@pytest.mark.parametrize("forms", [((1, 4), (1, 2, 4)), ((1, 2, 4), (1, 4))])
def test_step_with_groups_of_one_map_alone(forms, backend):
    g = torch.Generator().manual_seed(0)
    rest = [torch.randn(*s, generator=g) for s in ((1, 2, 3), (1, 2, 3), (2, 3, 4), *forms)]
    state = torch.randn(1, 2, 3, 4, generator=g)
    wide = state.double()
    out = selective_state_update(state, *rest, backend=backend)
    truth = selective_state_update(wide, *(t.double() for t in rest), backend="reference")
    close((out, state), (truth, wide))


@pytest.mark.parametrize("value", [-3.4e38, -1e36, -1e20, -100.0, -88.5, -87.5, 88.5, 1e20, 1e36])
def test_silu_of_any_size(value, backend):
    x = torch.full((1, 1, 1), value, requires_grad=True)
    out = causal_conv1d_fn(x, torch.ones(1, 1), activation="silu", backend=backend)
    (slope,) = torch.autograd.grad(out, x)
    assert out.item() == pytest.approx(value if value > 0 else 0.0, rel=1e-6, abs=1e-35)
    assert slope.item() == pytest.approx(float(value > 0), abs=1e-35)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1])
def test_nan_stays(bits, backend):
    A = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    one, x = torch.ones(1, 1), torch.ones(1, 1, 3)
    assert selective_scan_fn(x, x, A, one, one, backend=backend)[..., 1:].isnan().all()
    z = A.expand(1, 1, 3)
    assert selective_scan_fn(x, x, -one, one, one, None, z, backend=backend).isnan().all()


@pytest.mark.parametrize(("D", "N", "L"), [(3, 0, 5), (0, 3, 5)])
def test_without_channels_or_states(D, N, L, backend):
    shapes = ((2, D, L), (2, D, L), (2, N, L), (2, N, L))
    u, delta, B, C = (torch.ones(*shape, requires_grad=True) for shape in shapes)
    skip = torch.ones(D)
    torch.use_deterministic_algorithms(True)  # fills what is not written
    try:
        out = selective_scan_fn(u, delta, -torch.ones(D, N), B, C, skip, None, None, True, backend=backend)
        du, *others = torch.autograd.grad(out.sum(), (u, delta, B, C))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, u)
    assert torch.equal(du, torch.ones_like(du))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in others)


def test_no_rows_and_a_map_of_stride_0(backend):
    x, maps = torch.zeros(0, 3, 5), torch.randn(2, 5).expand(0, 2, 5)
    assert selective_scan_fn(x, x, -torch.ones(3, 2), maps, maps, backend=backend).shape == (0, 3, 5)


def test_no_orders_are_refused(backend):
    x, maps = torch.ones(1, 3, 5), torch.ones(1, 2, 5)
    with pytest.raises(ValueError, match="scan_order must be"):
        selective_scan_fn(x, x, -torch.ones(3, 2), maps, maps, scan_order=torch.zeros(1, 0, 5).long(), backend=backend)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.bool])
def test_any_integers_name_sequences(dtype, backend):
    x, seq = torch.ones(1, 1, 4), torch.tensor([[0, 0, 1, 1]])
    out = causal_conv1d_fn(x, torch.ones(1, 2), seq_idx=seq.to(dtype), backend=backend)
    assert out.flatten().tolist() == [1, 2, 1, 2]
    ones = torch.ones(1, 1)
    out = selective_scan_fn(x, x, 0 * ones, ones, ones, seq_idx=seq.to(dtype), backend=backend)
    assert out.flatten().tolist() == [1, 2, 1, 2]


def test_what_cpu_does_not_give_goes_to_the_reference():
    x = torch.ones(1, 1, 3)
    assert causal_conv1d_fn(x, torch.ones(1, 2), out_dtype=torch.float64).dtype == torch.float64
