"""Our functions against the same in plain PyTorch by others: mamba-ssm, causal-conv1d, transformers."""

import pytest
import torch

from bestiary.kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
    selective_scan_fn,
    selective_state_update,
    ssd_minimal_discrete,
)
from bestiary.kernels.ssd.split_conv1d import rms_norm_gated

OP = "ssd"  # all ops have the same backends


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(found, want, tolerance=1e-5):
    for f, w in zip(found, want, strict=True):
        assert f.shape == w.shape
        assert f.dtype == w.dtype
        torch.testing.assert_close(f, w, rtol=0, atol=tolerance * float(w.abs().max() + 1e-6))


def same(ours, theirs, tensors, tolerance=1e-5):
    """Both on the same tensors: outputs, and gradients of their sum of squares."""
    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(o.abs().square().sum() for o in outputs).backward()
        results.append([[o.detach() for o in outputs], [leaf.grad for leaf in leaves]])
    close(results[0][0], results[1][0], tolerance)
    close(results[0][1], results[1][1], 10 * tolerance)


def scan_inputs(D=6, N=4, L=20, G=2, B=2, complex_A=False):
    A = -torch.rand(D, N) - 0.1
    A = torch.complex(A, torch.randn(D, N)) if complex_A else A
    maps = (B, G, N, 2 * L if complex_A else L)
    return [torch.randn(B, D, L), torch.randn(B, D, L), A, torch.randn(maps), torch.randn(maps), torch.randn(D),
            torch.randn(B, D, L), torch.randn(D)]  # fmt: skip


@pytest.mark.parametrize("complex_A", [False, True])
def test_selective_scan(upstream, backend, complex_A):
    if complex_A and backend != "reference":
        pytest.skip("complex A is the reference's")
    same(lambda *t: selective_scan_fn(*t, True, True, backend=backend),
         lambda *t: upstream.selective_scan_ref(*t, True, True), scan_inputs(complex_A=complex_A))  # fmt: skip


@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(upstream, backend, activation):
    tensors = [torch.randn(2, 6, 20), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 3)]
    options = dict(return_final_states=True, activation=activation)
    same(lambda x, w, b, s: causal_conv1d_fn(x, w, b, initial_states=s, backend=backend, **options),
         lambda x, w, b, s: upstream.causal_conv1d_ref(x, w, b, s, **options), tensors)  # fmt: skip


@pytest.mark.parametrize("seen", [None, torch.tensor([5, 0], dtype=torch.int32)])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 3)])
def test_causal_conv1d_update(upstream, backend, seen, shape):
    x, state, weight, bias = torch.randn(shape), torch.randn(2, 6, 5), torch.randn(6, 4), torch.randn(6)
    mine, theirs = state.clone(), state.clone()
    found = causal_conv1d_update(x, mine, weight, bias, "silu", seen, backend=backend)
    want = upstream.causal_conv1d_update_ref(x, theirs, weight, bias, "silu", seen)
    close([found, mine], [want, theirs])


@pytest.mark.parametrize("heads", [(6,), (4, 3)])
def test_selective_state_update(upstream, backend, heads):
    maps = (2, 5) if len(heads) == 1 else (2, 2, 5)
    tensors = [torch.randn(2, *heads), torch.randn(2, *heads), -torch.rand(*heads, 5), torch.randn(maps),
               torch.randn(maps), torch.randn(heads), torch.randn(2, *heads), torch.randn(heads)]  # fmt: skip
    state = torch.randn(2, *heads, 5)
    mine, theirs = state.clone(), state.clone()
    found = selective_state_update(mine, *tensors, True, backend=backend)
    want = upstream.selective_state_update_ref(theirs, *tensors, True)
    close([found, mine], [want, theirs])


def ssd_inputs(L=24, H=4, P=6, G=2, N=5, B=2):
    return [torch.randn(B, L, H, P), torch.randn(B, L, H), -torch.rand(H) - 0.1, torch.randn(B, L, G, N),
            torch.randn(B, L, G, N)]  # fmt: skip


@pytest.mark.parametrize("wide_skip", [False, True])
def test_chunk_scan(upstream, backend, wide_skip):
    rest = [torch.randn(4, 6) if wide_skip else torch.randn(4), torch.randn(2, 24, 4, 6), torch.randn(4)]

    def ours(x, dt, A, B, C, D, z, bias):
        return mamba_chunk_scan_combined(x, dt, A, B, C, 8, D, z, bias, dt_softplus=True, backend=backend)

    def chunked(x, dt, A, B, C, D, z, bias):
        return upstream.ssd_chunk_scan_combined_ref(x, dt, A, B, C, 8, D, z, bias, True)

    def scanned(x, dt, A, B, C, D, z, bias):
        return upstream.ssd_selective_scan(x, dt, A, B, C, D, z, bias, True)

    same(ours, chunked, ssd_inputs() + rest)
    same(ours, scanned, ssd_inputs() + rest)


def test_minimal(upstream):
    x, dt, A, B, C = ssd_inputs(G=4)
    tensors = [x, A * dt.abs(), B, C, torch.randn(2, 1, 4, 6, 5)]
    same(lambda x, a, B, C, s: ssd_minimal_discrete(x, a, B, C, 8, s),
         lambda x, a, B, C, s: upstream.ssd_minimal_discrete(x, a, B, C, 8, s), tensors)  # fmt: skip


@pytest.mark.parametrize("before", [False, True])
def test_norm(upstream, before):
    tensors = [torch.randn(2, 3, 12), torch.randn(12), torch.randn(2, 3, 12)]
    same(lambda x, w, z: rms_norm_gated(x, w, z, eps=1e-5, group_size=4, norm_before_gate=before),
         lambda x, w, z: upstream.rms_norm_gated_ref(x, w, None, z, 1e-5, 4, before), tensors)  # fmt: skip


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_split_conv1d(upstream, backend, norm, before):
    H, P, N, W = 4, 6, 5, 4
    conv = H * P + 2 * N  # one group: upstream's reference norms over all channels whatever the groups
    shapes = [(2, 20, H * P + conv + H), (conv, W), (conv,), (H,), (H,), (H,), (H * P,), (7, H * P), (7,)]
    tensors = [torch.randn(s) for s in shapes]
    tensors[4] = -tensors[4].abs() - 0.1

    def with_function(function, **options):
        def run(zxbcdt, weight, bias, dt_bias, A, D, rms, out_weight, out_bias):
            rms, out_bias = (rms, out_bias) if norm else (None, out_bias + rms.sum())  # every tensor has a gradient
            return function(zxbcdt, weight, bias, dt_bias, A, D, 8, rmsnorm_weight=rms, outproj_weight=out_weight,
                            outproj_bias=out_bias, headdim=P, norm_before_gate=before, **options)  # fmt: skip

        return run

    same(with_function(mamba_split_conv1d_scan_combined, backend=backend),
         with_function(upstream.mamba_split_conv1d_scan_ref), tensors)  # fmt: skip


def test_mamba_inner(upstream):
    D, N, R, W, out = 6, 4, 3, 4, 5
    tensors = [torch.randn(2, 2 * D, 20), torch.randn(D, 1, W), torch.randn(D), torch.randn(R + 2 * N, D) * 0.3,
               torch.randn(D, R), torch.randn(out, D), torch.randn(out), -torch.rand(D, N) - 0.1, torch.randn(D),
               torch.randn(D)]  # fmt: skip

    def with_function(function):
        return lambda *t: function(*t[:8], D=t[8], delta_bias=t[9])

    same(with_function(mamba_inner_fn), with_function(upstream.mamba_inner_ref), tensors)


@pytest.mark.parametrize("L", [1, 20, 37])
def test_transformers_mixer(backend, L):
    """The block as transformers computes it without kernels."""
    pytest.importorskip("transformers")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(hidden_size=12, num_heads=4, head_dim=6, expand=2, state_size=5, n_groups=2, chunk_size=16,
                          num_hidden_layers=1, time_step_limit=(0.01, 0.5))  # fmt: skip
    mixer = Mamba2Mixer(config, 0)
    torch.nn.init.normal_(mixer.norm.weight)

    def ours(u):
        return mamba_split_conv1d_scan_combined(
            mixer.in_proj(u), mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias,
            -torch.exp(mixer.A_log), mixer.D, 16, dt_limit=(0.01, 0.5), rmsnorm_weight=mixer.norm.weight,
            rmsnorm_eps=mixer.norm.variance_epsilon, outproj_weight=mixer.out_proj.weight,
            outproj_bias=mixer.out_proj.bias, headdim=6, ngroups=2, norm_before_gate=False, backend=backend,
        )  # fmt: skip

    same(ours, lambda u: mixer(u), [torch.randn(2, L, 12)])
