"""The norm before each layer, on each of the ways that it takes, against its definition in float64."""

import pytest
import torch

from bestiary.shared.language.hybrid import norms


def definition(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("rows", [1, 700])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_and_many_tokens_with_and_without_a_gradient(rows, gradient, dtype):
    g = torch.Generator().manual_seed(rows)
    norm = norms.RMSNorm(48, 1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight, 1, 0.1, generator=g)
    x = torch.randn(rows, 1, 48, generator=g).to(dtype).requires_grad_()
    assert (x.numel() > norms.SMALL) == (rows > 1)
    with torch.set_grad_enabled(gradient):
        out, want = norm(x), definition(x, norm.weight, 1e-3)
    assert out.dtype == dtype
    tolerance = 4e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=1e-7)
    assert out.requires_grad == gradient
    if gradient:
        found = torch.autograd.grad(out.double().sum(), [x, norm.weight])
        for a, b in zip(found, torch.autograd.grad(want.sum(), [x, norm.weight]), strict=True):
            torch.testing.assert_close(
                a.double(), b.double(), rtol=8 * tolerance, atol=8 * tolerance * float(b.abs().max())
            )
