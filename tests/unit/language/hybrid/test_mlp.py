"""Squared ReLU against autograd, twice differentiable."""

import torch

from bestiary.shared.language.hybrid.mlp import squared_relu


def test_value_and_gradients():
    x = torch.tensor([-2.0, -0.5, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert squared_relu(x).tolist() == [0.0, 0.0, 0.25, 9.0]
    assert torch.autograd.gradcheck(squared_relu, x)
    assert torch.autograd.gradgradcheck(squared_relu, x)
