"""Orders, inverses and gathering."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import argsort_order, gather_tokens, invert_order


def test_argsort_is_stable_and_carries_no_gradient():
    scores = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    order = argsort_order(scores)
    assert order.tolist() == [[1, 3, 0, 2, 4]]
    assert not order.requires_grad
    equal = argsort_order(torch.zeros(2, 3, 4000))
    assert torch.equal(equal, torch.arange(4000).expand(2, 3, 4000))


@pytest.mark.parametrize("L", [1, 2, 65])
def test_inverse(L):
    order = torch.rand(4, L).argsort(-1)
    inverse = invert_order(order)
    steps = torch.arange(L).expand(4, L)
    assert torch.equal(inverse.gather(1, order), steps)
    assert torch.equal(order.gather(1, inverse), steps)
    assert torch.equal(inverse, order.argsort(-1))
    assert torch.equal(invert_order(order.int()), inverse)


def test_gather_and_back():
    x, order = torch.randn(3, 7, 5), torch.rand(3, 7).argsort(-1)
    out = gather_tokens(x, order)
    for b in range(3):
        assert torch.equal(out[b], x[b][order[b]])
    assert torch.equal(gather_tokens(out, invert_order(order)), x)


@pytest.mark.parametrize("given", [True, False])
def test_gradients(given):
    x, order = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.rand(2, 5).argsort(-1)
    inverse = invert_order(order) if given else None

    def function(x):
        return gather_tokens(x, order, inverse) ** 2

    assert gradcheck(function, [x])
    assert gradgradcheck(function, [x])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="needs tokens"):
        gather_tokens(torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="order must be"):
        gather_tokens(torch.zeros(3, 7, 2), torch.zeros(3, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="int32 or int64"):
        invert_order(torch.zeros(3, 7))
