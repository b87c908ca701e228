"""Research scripts under the shim, against formulas of their own."""

import textwrap

import pytest

# What the scripts compare with: written for them, from the equations, nothing of ours.
FORMULAS = '''
import torch, torch.nn.functional as F

def scan(u, delta, A, B, C, D=None, z=None, bias=None, softplus=False):
    """(B, D, L); B and C (B, N, L) or (B, G, N, L)."""
    dt = delta if bias is None else delta + bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    B, C = (m if m.ndim == 4 else m[:, None] for m in (B, C))
    B, C = (m.repeat_interleave(u.shape[1] // m.shape[1], 1) for m in (B, C))
    h, ys = 0, []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)

def conv(x, weight, bias):
    weight = weight.reshape(len(weight), 1, -1)
    return F.silu(F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, bias, groups=len(weight)))

def branch(m, xz, suffix="", A_b=None):
    """The gated scan of one set of parameters of a Mamba module, (B, 2E, L) to (B, E, L)."""
    def p(name):
        return getattr(m, name)
    x, z = xz.chunk(2, 1)
    u = conv(x, p("conv1d" + suffix).weight, p("conv1d" + suffix).bias)
    params = p("x_proj" + suffix)(u.transpose(1, 2))
    dt, B, C = params.split([m.dt_rank, m.d_state, m.d_state], -1)
    delta = (dt @ p("dt_proj" + suffix).weight.T).transpose(1, 2)
    A = -torch.exp(p("A" + suffix + "_log"))
    rest = [B.transpose(1, 2), C.transpose(1, 2), p("D" + suffix), z, p("dt_proj" + suffix).bias, True]
    y = scan(u, delta, A, *rest)
    if A_b is not None:
        flip = [t.flip(-1) if t.ndim == 3 else t for t in rest[:4]] + rest[4:]
        y = y + scan(u.flip(-1), delta.flip(-1), A_b, *flip).flip(-1)
    return y

def close(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)

def same_gradients(found, want, leaves, tol=1e-4):
    w = torch.randn_like(want)
    mine = torch.autograd.grad((found * w).sum(), leaves, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad((want * w).sum(), leaves, retain_graph=True, allow_unused=True)
    assert any(g is not None for g in mine)
    for a, b in zip(mine, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(1.0, float(b.abs().max())))
'''

OPS = """
import torch, torch.nn.functional as F
from formulas import *
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_ref
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj, bimamba_inner_fn
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
import selective_scan_cuda, causal_conv1d_cuda
import selective_scan_cuda_oflex, selective_scan_cuda_core

torch.manual_seed(0)
B, D, L, N, R, M = 2, 4, 9, 3, 2, 5
def rand(*s): return torch.randn(*s).requires_grad_()
u, delta, z, Bm, Cm = rand(B, D, L), rand(B, D, L), rand(B, D, L), rand(B, N, L), rand(B, N, L)
A, Ds, bias = (-torch.rand(D, N)).requires_grad_(), rand(D), rand(D)
leaves = [u, delta, A, Bm, Cm, Ds, z, bias]
want = scan(u, delta, A, Bm, Cm, Ds, z, bias, True)
for fn in (selective_scan_fn, selective_scan_ref):
    found = fn(u, delta, A, Bm, Cm, Ds, z=z, delta_bias=bias, delta_softplus=True)
    close(found, want); same_gradients(found, scan(u, delta, A, Bm, Cm, Ds, z, bias, True), leaves)
out, last = selective_scan_fn(u, delta, A, Bm, Cm, Ds, z, bias, True, True)
close(out, want); assert last.shape == (B, D, N)

# as the autograd functions of old forks call the extension
class OldScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias):
        out, x, out_z = selective_scan_cuda.fwd(u, delta, A, B[:, None], C[:, None], D, z, bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, x, out)
        return out_z, x[:, :, -1, 1::2], x
    @staticmethod
    def backward(ctx, dout, _, __):
        u, delta, A, B, C, D, z, bias, x, out = ctx.saved_tensors
        dz = torch.empty_like(z)
        grads = selective_scan_cuda.bwd(u, delta, A, B[:, None], C[:, None], D, z, bias, dout, x, out, dz, True, True)
        du, ddelta, dA, dB, dC, dD, dbias, dz_, out_z = grads
        assert dz_ is dz
        close(out_z, want.detach())
        return du, ddelta, dA, dB[:, 0], dC[:, 0], dD, dz, dbias
found, state, x = OldScan.apply(*leaves)
close(found, want); close(state, last)
steps = F.softplus(delta + bias[:, None]).sum(-1)
close(x[:, :, -1, ::2], torch.exp(steps[..., None] * A))
same_gradients(found, scan(u, delta, A, Bm, Cm, Ds, z, bias, True), leaves)

# VMamba: four directions as groups, no gate, positional, float32 out for half in
class Oflex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
        ctx.backend, ctx.softplus = backend, delta_softplus
        if backend == "core":
            out, x, *rest = selective_scan_cuda_core.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1)
        else:
            out, x, *rest = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1, oflex)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out
    @staticmethod
    def backward(ctx, dout, *args):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        module = selective_scan_cuda_core if ctx.backend == "core" else selective_scan_cuda_oflex
        du, ddelta, dA, dB, dC, dD, dbias, *rest = module.bwd(
            u, delta, A, B, C, D, delta_bias, dout, x, ctx.softplus, 1)
        return du, ddelta, dA, dB, dC, dD, dbias, None, None, None
xs, dts, Bs, Cs = rand(B, 4 * D, L), rand(B, 4 * D, L), rand(B, 4, N, L), rand(B, 4, N, L)
As, Dv, bv = (-torch.rand(4 * D, N)).requires_grad_(), rand(4 * D), rand(4 * D)
four = [xs, dts, As, Bs, Cs, Dv, bv]
for backend in (None, "core"):
    found = Oflex.apply(*four, True, True, backend)
    wanted = scan(xs, dts, As, Bs, Cs, Dv, None, bv, True)
    close(found, wanted); same_gradients(found, wanted, four)
half = [t.detach().bfloat16() for t in (xs, dts)], [t.detach().bfloat16() for t in (Bs, Cs)]
assert Oflex.apply(*half[0], As, *half[1], Dv, bv).dtype == torch.float32
assert Oflex.apply(*half[0], As, *half[1], None, None, True, False).dtype == torch.bfloat16
half[0][0].requires_grad_()
Oflex.apply(*half[0], As, *half[1], Dv, bv).sum().backward()
assert half[0][0].grad.dtype == torch.bfloat16

x, weight, cb = rand(B, D, L), rand(D, 4), rand(D)
for options in ({"activation": "silu"}, None):
    found = causal_conv1d_fn(x, weight, cb, **options) if options else causal_conv1d_fn(x, weight, cb, "silu")
    close(found, conv(x, weight, cb)); same_gradients(found, conv(x, weight, cb), [x, weight, cb])
w = torch.randn(B, D, L)
wanted = torch.autograd.grad((conv(x, weight, cb) * w).sum(), [x, weight, cb])
for middle in ((), (None,), (None, None, None)):
    close(causal_conv1d_cuda.causal_conv1d_fwd(x, weight, cb, *middle, True), conv(x, weight, cb))
dx = torch.empty(B, D, L)
for middle in ((dx,), (None, dx), (None, None, None, dx, False)):
    grads = causal_conv1d_cuda.causal_conv1d_bwd(x, weight, cb, w, *middle, True)
    assert grads[0] is dx
    for a, b in zip(grads, wanted): close(a, b)

xz = rand(B, 2 * D, L)
cw, xw, dw, ow, ob = rand(D, 1, 4), rand(R + 2 * N, D), rand(D, R), rand(M, D), rand(M)
class P: pass
m = P(); m.dt_rank, m.d_state, m.A_log, m.D = R, N, torch.log(-A), Ds
m.conv1d, m.x_proj, m.dt_proj = P(), lambda t: t @ xw.T, P()
m.conv1d.weight, m.conv1d.bias, m.dt_proj.weight, m.dt_proj.bias = cw, cb, dw, bias
leaves = [xz, cw, cb, xw, dw, ow, ob, A, Ds, bias]
for fn in (mamba_inner_fn, mamba_inner_ref):
    found = fn(xz, cw, cb, xw, dw, ow, ob, A, None, None, Ds, delta_bias=bias, delta_softplus=True)
    want = F.linear(branch(m, xz).transpose(1, 2), ow, ob)
    close(found, want); same_gradients(found, want, leaves)
close(mamba_inner_fn_no_out_proj(xz, cw, cb, xw, dw, A, None, None, Ds, delta_bias=bias, delta_softplus=True),
      branch(m, xz))
A_b = (-torch.rand(D, N)).requires_grad_()
found = bimamba_inner_fn(xz, cw, cb, xw, dw, ow, ob, A, A_b, None, None, Ds, delta_bias=bias, delta_softplus=True)
want = F.linear(branch(m, xz, A_b=A_b).transpose(1, 2), ow, ob)
close(found, want); same_gradients(found, want, [*leaves, A_b])
print("all equal")
"""

VISION = """
import torch, torch.nn as nn, torch.nn.functional as F
from formulas import *
from mamba_ssm import Mamba
import mamba_ssm.modules.mamba_simple

class MambaLayer(nn.Module):  # as segmentation nets have it
    def __init__(self, dim, **options):
        super().__init__()
        self.dim, self.norm = dim, nn.LayerNorm(dim)
        self.mamba = Mamba(d_model=dim, d_state=4, d_conv=4, expand=2, **options)
    def forward(self, x):
        B, C = x.shape[:2]
        tokens = x.reshape(B, C, -1).transpose(-1, -2)
        return self.mamba(self.norm(tokens)).transpose(-1, -2).reshape(x.shape) + x

def directions(m, tokens, kind):
    xz = m.in_proj(tokens).transpose(1, 2)
    y = branch(m, xz)
    if kind in ("v2", "v3"):
        y = y + branch(m, xz.flip(-1), "_b").flip(-1)
    if kind == "v3":
        n, L = m.nslices, xz.shape[-1]
        sliced = torch.stack(xz.chunk(n, -1), -1).flatten(-2)
        y_s = branch(m, sliced, "_s")
        y = y + y_s.reshape(*y_s.shape[:2], L // n, n).permute(0, 1, 3, 2).flatten(-2)
    return m.out_proj(y.transpose(1, 2))

def check(kind, wanted, **options):
    torch.manual_seed(1)
    layer = MambaLayer(6, bimamba_type=kind, **options)
    with torch.no_grad():
        for p in layer.parameters(): p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 6, 2, 3, 5, requires_grad=True)
    found = layer(x)
    tokens = layer.norm(x.flatten(2).transpose(1, 2))
    want = wanted(layer.mamba, tokens).transpose(1, 2).reshape(x.shape) + x
    close(found, want); same_gradients(found, want, [x, *layer.parameters()])
    return layer.mamba, {n for n, p in layer.mamba.named_parameters()}

one = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log",
       "D", "out_proj.weight"}
def further(s):
    return {f"conv1d{s}.weight", f"conv1d{s}.bias", f"x_proj{s}.weight", f"dt_proj{s}.weight", f"dt_proj{s}.bias",
            f"A{s}_log", f"D{s}"}
m, names = check("none", lambda m, t: directions(m, t, "none"), use_fast_path=False, layer_idx=3)
assert names == one
m, names = check("v3", lambda m, t: directions(m, t, "v3"), nslices=5)
assert names == one | further("_b") | further("_s")
m, names = check("v2", lambda m, t: directions(m, t, "v2"))
assert names == one | further("_b")
m, names = check("v2", lambda m, t: directions(m, t, "v2") / 2 * m.gamma, if_devide_out=True, init_layer_scale=0.3)
assert names == one | further("_b") | {"gamma"}
def v1(m, t):
    y = branch(m, m.in_proj(t).transpose(1, 2), A_b=-torch.exp(m.A_b_log))
    return m.out_proj(y.transpose(1, 2))
m, names = check("v1", v1)
assert names == one | {"A_b_log"}
m, names = check("v1", lambda m, t: directions(m, t, "none"), nslices=5)  # ASM-UNet's
assert names == one | further("_b") | further("_s")

m = Mamba(16, dt_init="constant", bias=True)
assert torch.allclose(m.dt_proj.weight, torch.ones(32, 1)), "rank 1"
assert m.in_proj.bias is not None and m.dt_proj.bias._no_reinit and m.A_log._no_weight_decay
dt = F.softplus(m.dt_proj.bias)
assert 0.99e-3 < float(dt.min()) and float(dt.max()) < 0.101
for bad in (dict(bimamba_type="v9"), dict(dt_init="odd")):
    try: Mamba(8, **bad)
    except ValueError as error: print(error)
    else: raise AssertionError(bad)
try: Mamba(8, bimamba_type="v3", nslices=5)(torch.zeros(1, 7, 8))
except ValueError as error: assert "nslices=5" in str(error)
else: raise AssertionError
# in bfloat16 and under autocast
for half in (Mamba(8, dtype=torch.bfloat16)(torch.randn(1, 5, 8, dtype=torch.bfloat16)),):
    assert half.dtype == torch.bfloat16
with torch.autocast("cpu", torch.bfloat16):
    assert torch.isfinite(Mamba(8, bimamba_type="v2")(torch.randn(1, 5, 8))).all()
print("all equal")
"""

LANGUAGE = """
import sys, torch, torch.nn.functional as F
from formulas import *
from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel as Same, create_block
from mamba_ssm.utils.generation import InferenceParams
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ssm.modules.mamba2 import Mamba2 as Same2
from causal_conv1d import causal_conv1d_update
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
assert Same is MambaLMHeadModel and Same2 is Mamba2
torch.manual_seed(0)

B, L, H, P, N, G = 2, 12, 4, 3, 5, 2
x, dt, A = torch.randn(B, L, H, P), torch.randn(B, L, H), -torch.rand(H)
Bm, Cm, D, bias = torch.randn(B, L, G, N), torch.randn(B, L, G, N), torch.randn(H), torch.randn(H)
def wide(t): return t.repeat_interleave(H // G, 2)
want = torch.stack([scan(x[:, :, h].transpose(1, 2), dt[:, :, h, None].expand(B, L, P).transpose(1, 2),
                         A[h].expand(P, N), wide(Bm)[:, :, h].transpose(1, 2), wide(Cm)[:, :, h].transpose(1, 2),
                         D[h].expand(P), None, bias[h].expand(P), True).transpose(1, 2) for h in range(H)], 2)
close(mamba_chunk_scan_combined(x, dt, A, Bm, Cm, 4, D=D, dt_bias=bias, dt_softplus=True), want, 1e-3)
d = F.softplus(dt + bias)
y, _ = ssd_minimal_discrete(x * d[..., None], A * d, wide(Bm), wide(Cm), 4)
close(y + D[:, None] * x, want, 1e-3)

state = torch.zeros(B, H, P, N)
for t in range(L):
    y = selective_state_update(
        state, x[:, t], dt[:, t, :, None].expand(B, H, P), A[:, None, None].expand(H, P, N), Bm[:, t], Cm[:, t],
        D[:, None].expand(H, P), dt_bias=bias[:, None].expand(H, P), dt_softplus=True)
    close(y, want[:, t], 1e-3)

x, weight, cb = torch.randn(2, 4, 7), torch.randn(4, 3), torch.randn(4)
state = torch.zeros(2, 4, 3)
for t in range(7):
    close(causal_conv1d_update(x[..., t], state, weight, cb, "silu"), conv(x, weight, cb)[..., t])
close(state, x[..., -3:])
packed = torch.randn(7, 4)
states = causal_conv1d_varlen_states(packed, torch.tensor([0, 2, 7], dtype=torch.int32), 3)
close(states[1], packed[4:].T); close(states[0], F.pad(packed[:2].T, (1, 0)))

def greedy(model, ids, length):
    while ids.shape[1] < length:
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids

for cfg in ({}, {"layer": "Mamba2", "d_state": 8, "headdim": 4}):
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=30, ssm_cfg=cfg, d_intermediate=20 if cfg else 0)
    model = MambaLMHeadModel(config).eval()
    ids = torch.randint(0, 30, (2, 6))
    logits = model(ids).logits
    assert logits.shape == (2, 6, 32), logits.shape
    assert model.lm_head.weight is model.backbone.embedding.weight
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    # the residual stream by hand
    h = model.backbone.embedding(ids)
    for layer in model.backbone.layers:
        def rms(n, t): return t / torch.sqrt(t.square().mean(-1, keepdim=True) + n.eps) * n.weight
        h = h + layer.mixer(rms(layer.norm, h))
        if layer.mlp is not None:
            y, gate = (rms(layer.norm2, h) @ layer.mlp.fc1.weight.T).chunk(2, -1)
            h = h + (y * F.silu(gate)) @ layer.mlp.fc2.weight.T
    close(logits, rms(model.backbone.norm_f, h) @ model.lm_head.weight.T)
    with torch.no_grad():
        out = model.generate(ids, max_length=12, return_dict_in_generate=True, output_scores=True, cg=True)
        assert torch.equal(out.sequences, greedy(model, ids, 12)) and len(out.scores) == 6
        assert model.generate(ids[:, :1], max_length=9, top_k=5, top_p=0.9, temperature=0.7).shape == (2, 9)
        cache = InferenceParams(max_seqlen=12, max_batch_size=2)
        first = model(ids[:, :3], inference_params=cache, num_last_tokens=1).logits
        close(first[:, 0], logits[:, 2]); cache.seqlen_offset += 3
        for t in range(3, 6):
            close(model(ids[:, t : t + 1], inference_params=cache).logits[:, 0], logits[:, t])
            cache.seqlen_offset += 1
    folder = sys.argv[1] + "/" + cfg.get("layer", "Mamba1")
    model.save_pretrained(folder)
    again = MambaLMHeadModel.from_pretrained(folder).eval()
    close(again(ids).logits, logits)
try: MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m")
except FileNotFoundError as error: assert "downloads nothing" in str(error)
else: raise AssertionError

u = torch.randn(2, 9, 16, requires_grad=True)
for options in ({}, {"ngroups": 2, "D_has_hdim": True, "norm_before_gate": True}, {"rmsnorm": False, "d_ssm": 24}):
    fast = Mamba2(16, d_state=4, headdim=4, chunk_size=4, **options)
    slow = Mamba2(16, d_state=4, headdim=4, chunk_size=4, use_mem_eff_path=False, **options)
    slow.load_state_dict(fast.state_dict())
    close(fast(u), slow(u)); same_gradients(fast(u), slow(u), [u])
    close(fast(u.flatten(0, 1), seqlen=9), slow(u).flatten(0, 1))
print("all equal")
"""


@pytest.fixture(autouse=True)
def formulas(tmp_path):
    (tmp_path / "formulas.py").write_text(FORMULAS)


def calls(stderr):
    """The report as {function: {backend: calls}}."""
    found = {}
    for line in stderr.splitlines():
        if " call" in line and ": " in line and line.startswith("  "):
            name, counts = line.split(": ", 1)
            pairs = (pair.split() for pair in counts.split(", "))
            found[name.rsplit("  ", 1)[0].strip()] = {backend: int(n) for backend, n in pairs}
    return found


def test_ops_and_raw_extensions(run):
    result = run(OPS)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all equal\n"
    found = calls(result.stderr)
    assert sum(found["selective_scan_fn"].values()) == 2
    assert sum(found["mamba_inner_fn"].values()) == 1
    assert sum(found["selective_scan_cuda.bwd"].values()) == 1
    assert sum(found["selective_scan_cuda_oflex.fwd"].values()) == 4
    assert "selective_scan_ref" not in found
    assert all(set(backends) <= {"cpu", "reference"} for backends in found.values())
    assert "stood in for mamba_ssm, causal_conv1d, causal_conv1d_cuda, selective_scan_cuda" in result.stderr


def test_vision_modules(run):
    result = run(VISION)
    assert result.returncode == 0, result.stderr
    assert "bimamba_type must be one of none, v1, v2, v3" in result.stdout
    assert result.stdout.endswith("all equal\n")
    assert sum(calls(result.stderr)["mamba_inner_fn_no_out_proj"].values()) == 9


def test_language_model_and_mamba2(run, tmp_path):
    result = run(LANGUAGE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all equal\n")
    assert "mamba_split_conv1d_scan_combined" in calls(result.stderr)


def test_backend_of_the_report_is_the_one_that_ran(run):
    text = """
    import torch
    from mamba_ssm import selective_scan_fn
    u = torch.randn(1, 4, 5)
    for dtype in (torch.float32, torch.float64):
        selective_scan_fn(*(t.to(dtype) for t in (u, u, -torch.ones(4, 2), torch.ones(1, 2, 5), torch.ones(1, 2, 5))))
    """
    result = run(textwrap.dedent(text), env={"BESTIARY_KERNELS": "reference"})
    assert calls(result.stderr) == {"selective_scan_fn": {"reference": 2}}
