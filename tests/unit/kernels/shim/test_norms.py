"""The norms of mamba_ssm in the shim, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from bestiary.kernels.shim import norms


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_with_residual(rms, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 5, 8)
    w, b = torch.randn(8), torch.randn(8)
    total = x.float() + residual
    if rms:
        want = total / torch.sqrt(total.square().mean(-1, keepdim=True) + 1e-3) * w + b
    else:
        want = F.layer_norm(total, (8,), w, b, 1e-3)
    both = [(norms.rms_norm_fn, norms.rms_norm_fn_v1), (norms.layer_norm_fn, norms.layer_norm_fn_v1)][not rms]
    for function in both:
        y, kept = function(x, w, b, residual=residual, eps=1e-3, prenorm=True, residual_in_fp32=True)
        assert (y.dtype, kept.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(y.float(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
        torch.testing.assert_close(kept, total)
        assert function(x, w, b, prenorm=True)[1].dtype == dtype
        assert function(x, w, b, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    if rms:
        module = norms.RMSNorm(8, eps=1e-3)
        torch.testing.assert_close(
            module(x, residual).float(), ((want - b) / w).to(dtype).float(), rtol=1e-2, atol=1e-2
        )
        assert list(dict(module.named_parameters())) == ["weight"]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_gated_norms(group, rms, before):
    torch.manual_seed(0)
    x, z = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    module = (norms.GatedRMSNorm if rms else norms.GatedLayerNorm)(
        8, eps=1e-3, group_size=group, norm_before_gate=before
    )
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    t = x if before else x * F.silu(z)
    t = t.reshape(2, 5, -1, group or 8)
    t = t if rms else t - t.mean(-1, keepdim=True)
    want = (t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-3)).reshape(2, 5, 8) * module.weight
    want = want if rms else want + module.bias
    want = want * F.silu(z) if before else want
    torch.testing.assert_close(module(x, z), want, rtol=1e-5, atol=1e-5)
    assert [n for n, _ in module.named_parameters()] == (["weight"] if rms else ["weight", "bias"])
