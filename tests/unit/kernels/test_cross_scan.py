"""Walks in several directions against loops over their tokens."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import cross_merge_fn, cross_orders, cross_scan_fn, selective_scan_fn

F64 = torch.float64


def grid_orders(shape, scans):
    """Token numbers in walking order, counted out on the grid."""
    if len(shape) == 3:
        Z, H, W = shape

        def number(z, h, w):
            return (z * H + h) * W + w

        plain = list(range(Z * H * W))
        if scans == 0:
            forward = [
                plain,
                [number(z, h, w) for h in range(H) for w in range(W) for z in range(Z)],
                [number(z, h, w) for w in range(W) for z in range(Z) for h in range(H)],
            ]
        else:
            forward = [plain] * 3
        return forward * 2 if scans == 1 else forward + [order[::-1] for order in forward]
    H, W = shape
    rows = list(range(H * W))
    columns = [h * W + w for w in range(W) for h in range(H)]
    if scans == 0:
        return [rows, columns, rows[::-1], columns[::-1]]
    if scans == 1:
        return [rows] * 4
    if scans == 2:
        return [rows, rows, rows[::-1], rows[::-1]]
    quarter = [h * W + w for w in reversed(range(W)) for h in range(H)]  # turned to the left: the last column first
    return [rows, quarter, rows[::-1], quarter[::-1]]


CASES = [((3, 5), s) for s in range(4)] + [((1, 4), 0), ((4, 1), 3), ((2, 3, 4), 0), ((2, 3, 4), 1), ((3, 2, 2), 2)]


@pytest.mark.parametrize(("shape", "scans"), CASES, ids=str)
def test_orders_and_scan(shape, scans):
    want = torch.tensor(grid_orders(shape, scans))
    orders = cross_orders(shape, scans)
    assert orders.dtype == torch.int64
    assert torch.equal(orders, want)
    x = torch.randn(2, 3, *shape)
    found = cross_scan_fn(x, scans=scans)
    assert found.shape == (2, len(want), 3, x[0, 0].numel())
    for k, order in enumerate(want):
        assert torch.equal(found[:, k], x.flatten(2)[..., order])
    last = x.movedim(1, -1)
    for inside in (True, False):
        for outside in (True, False):
            y = cross_scan_fn(x if inside else last, inside, outside, scans=scans)
            assert torch.equal(y, found if outside else found.permute(0, 3, 1, 2))
            assert y.is_contiguous()


def test_rotations_are_torchs():
    x = torch.randn(1, 2, 3, 5)
    for k in range(4):
        assert torch.equal(cross_scan_fn(x, scans=3)[:, k], torch.rot90(x, k, (2, 3)).flatten(2))


@pytest.mark.parametrize(("shape", "scans"), CASES, ids=str)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_merge_is_the_adjoint(shape, scans, apart, outside, inside):
    """<scan(x), y> = <x, merge(y)>, and each is the other's gradient."""
    K = 2 * len(shape)
    x = torch.randn(2, *([K] if apart else []), 3, *shape, dtype=F64)
    if not inside:
        x = x.flatten(2 if not apart else 3).movedim(-1, 1).unflatten(1, shape)
    x = x.requires_grad_()
    walked = cross_scan_fn(x, inside, outside, apart, scans)
    y = torch.randn_like(walked)
    image = y.unflatten(3, shape) if outside else y.unflatten(1, shape)
    image = image.detach().requires_grad_()
    merged = cross_merge_fn(image, inside, outside, apart, scans)
    flat = (x.flatten(-len(shape)) if inside else x.flatten(1, len(shape))).detach()
    assert merged.shape == flat.shape
    torch.testing.assert_close((walked * y).sum(), (flat * merged).sum())
    (grad,) = torch.autograd.grad(walked, x, y)
    torch.testing.assert_close(grad.reshape(merged.shape), merged)
    (grad,) = torch.autograd.grad(merged, image, flat)
    torch.testing.assert_close(grad.reshape(walked.shape), walked)


def test_one_by_one_takes_copy_k_in_direction_k():
    x = torch.randn(2, 4, 3, 3, 5)
    found = cross_scan_fn(x, one_by_one=True)
    back = cross_merge_fn(found.unflatten(-1, (3, 5)), one_by_one=True)
    for k in range(4):
        assert torch.equal(found[:, k], cross_scan_fn(x[:, k])[:, k])
    assert torch.equal(back, x.flatten(3))
    copies = x[:, :1].expand(-1, 4, -1, -1, -1)
    assert torch.equal(cross_scan_fn(copies, one_by_one=True), cross_scan_fn(x[:, 0]))
    y = found.unflatten(-1, (3, 5))
    torch.testing.assert_close(cross_merge_fn(y), cross_merge_fn(y, one_by_one=True).sum(1))


def test_there_and_back_is_k_times_the_image():
    for shape in ((4, 3), (2, 3, 4)):
        x = torch.randn(2, 3, *shape, dtype=F64)
        merged = cross_merge_fn(cross_scan_fn(x).unflatten(-1, shape))
        torch.testing.assert_close(merged, 2 * len(shape) * x.flatten(2))


def test_scan_merge_equals_orders():
    """What VMamba does with copies is a scan in several orders of tokens that stay where they are."""
    shape, K, D, N = (3, 4), 4, 2, 3
    x, delta = torch.randn(2, 2, D, *shape, dtype=F64).unbind(1)
    A = -torch.rand(D, N, dtype=F64)
    B, C = torch.randn(2, 2, N, *shape, dtype=F64).unbind(1)
    flat = [cross_scan_fn(t).flatten(0, 1) for t in (x, delta, B, C)]
    y = selective_scan_fn(flat[0], flat[1], A, flat[2], flat[3], delta_softplus=True)
    want = cross_merge_fn(y.unflatten(0, (2, K)).unflatten(-1, shape))
    orders = cross_orders(shape)[None].expand(2, -1, -1)
    tokens = [t.flatten(2) for t in (x, delta, B, C)]
    found = selective_scan_fn(tokens[0], tokens[1], A, *tokens[2:], delta_softplus=True, scan_order=orders)
    torch.testing.assert_close(found.sum(1), want)


def test_gradients():
    x = torch.randn(1, 2, 2, 3, dtype=F64, requires_grad=True)
    for scans in range(4):
        assert gradcheck(lambda x, s=scans: cross_scan_fn(x.square(), scans=s), [x])
        assert gradgradcheck(lambda x, s=scans: cross_scan_fn(x.square(), False, True, scans=s), [x])
    y = torch.randn(1, 6, 2, 2, 1, 3, dtype=F64, requires_grad=True)
    assert gradcheck(lambda y: cross_merge_fn(y.square()), [y])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.complex64])
def test_any_dtype_strides_and_an_empty_batch(dtype):
    x = torch.arange(2 * 6 * 5 * 3).reshape(2, 6, 5, 3).to(dtype).transpose(1, 3)[:, :, ::2]
    assert torch.equal(cross_scan_fn(x)[:, 1], x.transpose(2, 3).flatten(2))
    assert cross_scan_fn(x[:0]).shape == (0, 4, 3, 18)
    assert cross_merge_fn(cross_scan_fn(x[:0]).unflatten(-1, (3, 6))).shape == (0, 3, 18)


def test_compiles_whole():
    def both(x):
        y = cross_scan_fn(x)
        return cross_merge_fn(y.unflatten(-1, x.shape[2:]).square())

    x = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cross_scan_fn(torch.zeros(2, 3, 4)), r"needs \(B, C, …\)"),
        (lambda: cross_scan_fn(torch.zeros(2, 3, 4), False), r"needs \(B, …, C\)"),
        (lambda: cross_scan_fn(torch.zeros(2, 3, 4, 5), one_by_one=True), r"needs \(B, K, C, …\)"),
        (lambda: cross_scan_fn(torch.zeros(2, 3, 3, 4, 5), one_by_one=True), "needs 4 directions"),
        (lambda: cross_scan_fn(torch.zeros(2, 3, 4, 5), scans=4), "scans=4 is none of"),
        (lambda: cross_scan_fn(torch.zeros(2, 3, 3, 4, 5), scans=3), "scans=3 is none of"),
        (lambda: cross_merge_fn(torch.zeros(2, 4, 3, 12)), "needs"),
        (lambda: cross_merge_fn(torch.zeros(2, 3, 3, 4, 5)), "needs 4 directions"),
        (lambda: cross_orders((3,)), "needs a shape"),
    ],
)
def test_wrong_arguments_are_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()
