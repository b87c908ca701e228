"""The Mamba-2 layer ``M`` on :mod:`bestiary.kernels`, with padding, packing and states right on every backend.

Shape legend: B rows, T tokens, D width, I inner width (H heads of P), G groups, N states, C = I + 2 G N channels of the
convolution, W its width, E = I + C + H.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.kernels import causal_conv1d_fn, mamba2_step, mamba_chunk_scan_combined, rms_norm_gated
from bestiary.shared.language.hybrid.cache import HybridCache, MambaState, round_stochastically, state_noise
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.layout import Layout

_NO_LIMIT = (0.0, math.inf)


class GatedRMSNorm(nn.Module):
    """``rms(y * silu(z)) * weight`` over groups of channels: the gate first. Its ``weight`` is (I,)."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size, self.eps = size // groups, eps

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """(..., I) and the gate (..., I) to (..., I)."""
        return rms_norm_gated(y, self.weight, z, self.eps, self.group_size, norm_before_gate=False)


class Mamba2Mixer(nn.Module):
    """``z, xBC, dt = in_proj(u)``; a causal convolution with SiLU on xBC; the state space dual; gated norm; out_proj.

    Step sizes are bounded alike in prefill and decoding, by ``time_step_limit``. transformers bounds them from below
    by ``time_step_min``, in prefill alone, so that its decoding goes on from other states; ``transformers_clamp`` does
    the same.

    Paper: arXiv:2405.21060 Sec. 7. Source: transformers' nemotron_h for names and order.

    Args:
        config: the stack's. layer: number of this layer, which names its rounding noise.
    """

    def __init__(self, config: HybridConfig, layer: int = 0):
        super().__init__()
        self.config, self.layer = config, layer
        heads, inner = config.mamba_num_heads, config.d_inner
        self.in_proj = nn.Linear(config.hidden_size, inner + config.conv_dim + heads, bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            config.conv_dim,
            config.conv_dim,
            config.conv_kernel,
            groups=config.conv_dim,
            padding=config.conv_kernel - 1,
            bias=config.use_conv_bias,
        )
        self.dt_bias = nn.Parameter(torch.ones(heads))
        A_log = torch.log(torch.arange(1, heads + 1, dtype=torch.float32))
        self.A_log = nn.Parameter(A_log.to(torch.get_default_dtype()))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self, u_BTD: torch.Tensor, layout: Layout, state: MambaState | None = None, cache: HybridCache | None = None
    ) -> torch.Tensor:
        """(B, T, D) to the same; ``state``, this layer's part of ``cache``, is brought forward."""
        zxbcdt_BTE = self.in_proj(u_BTD)
        if state is not None and cache is not None and layout.length == 1 and cache.length > 0:
            return self.out_proj(self._step(zxbcdt_BTE[:, 0], layout, state, cache)[:, None])
        z_BTI, xBC_BTC, dt_BTH = self._parts(zxbcdt_BTE)
        return self.out_proj(self.norm(self._scan(xBC_BTC, dt_BTH, layout, state, cache), z_BTI))

    def _parts(self, zxbcdt_BTE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        config = self.config
        return zxbcdt_BTE.split([config.d_inner, config.conv_dim, config.mamba_num_heads], -1)

    def _scan(
        self,
        xBC_BTC: torch.Tensor,
        dt_BTH: torch.Tensor,
        layout: Layout,
        state: MambaState | None,
        cache: HybridCache | None,
    ) -> torch.Tensor:
        begun = cache is not None and cache.length > 0
        conv = state.conv if state is not None and begun else None
        ssm = state.ssm.to(_work(state.ssm)) if state is not None and begun else None
        y_BTHP, last = self._run(xBC_BTC, dt_BTH, layout, conv, ssm)
        if state is not None and cache is not None:
            before = (state.conv, state.ssm)
            state.conv = self._last_inputs(xBC_BTC, layout.order, layout.counts, state.conv)
            state.ssm = self._rounded(last, state.ssm.dtype, cache.seed, cache.length + layout.length)
            state.replay = self._replay(xBC_BTC, dt_BTH, layout, *before, cache) if cache.record else None
        return y_BTHP.flatten(2)

    def _run(
        self,
        xBC_BTC: torch.Tensor,
        dt_BTH: torch.Tensor,
        layout: Layout,
        conv: torch.Tensor | None,
        ssm: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution and scan; (B, T, H, P) and the last states (B, H, P, N)."""
        config, fused = self.config, True
        limit = config.time_step_limit
        if config.transformers_clamp:  # in passes, and not in single steps
            limit = _NO_LIMIT if layout.length == 1 and layout.past else (config.time_step_min, math.inf)
        dt_bias: torch.Tensor | None = self.dt_bias
        if layout.real is not None:
            # A step of zero leaves the state as it is: padding is passed over wherever it stands.
            dt_BTH, dt_bias, limit = self._step_sizes(dt_BTH, limit) * layout.real[..., None], None, _NO_LIMIT
            fused = False
        xBC_BCT = causal_conv1d_fn(
            xBC_BTC.transpose(1, 2),
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            layout.seq_idx,
            initial_states=None if conv is None else conv.transpose(1, 2),
            activation="silu",
            scan_order=layout.order,
        )
        assert isinstance(xBC_BCT, torch.Tensor)  # no states were asked for
        maps = config.n_groups * config.ssm_state_size
        x, B, C = xBC_BCT.transpose(1, 2).split([config.d_inner, maps, maps], dim=-1)
        y, last = mamba_chunk_scan_combined(
            x.unflatten(-1, (config.mamba_num_heads, -1)),
            dt_BTH,
            self._A(),
            B.unflatten(-1, (config.n_groups, -1)),
            C.unflatten(-1, (config.n_groups, -1)),
            config.chunk_size,
            D=self.D,
            dt_bias=dt_bias,
            initial_states=ssm,
            seq_idx=layout.seq_idx,
            dt_softplus=fused,
            dt_limit=limit,
            return_final_states=True,
            scan_order=layout.order,
        )
        return y, last

    def _step(self, zxbcdt_BE: torch.Tensor, layout: Layout, state: MambaState, cache: HybridCache) -> torch.Tensor:
        """One token, (B, I + C + H) to (B, I); the states are updated in place, but for rows of padding."""
        config = self.config
        if cache.record:
            _, xBC_BTC, dt_BTH = self._parts(zxbcdt_BE[:, None])
            state.replay = self._replay(xBC_BTC, dt_BTH, layout, state.conv, state.ssm, cache)
            state.conv, state.ssm = state.conv.clone(), state.ssm.clone()
        conv1d, exact = self.conv1d, state.ssm.to(_work(state.ssm))
        y_BI = mamba2_step(
            zxbcdt_BE,
            state.conv,
            exact,
            conv1d.weight[:, 0],
            conv1d.bias,
            self.dt_bias,
            self._A(),
            self.D,
            self.norm.weight,
            headdim=config.mamba_head_dim,
            ngroups=config.n_groups,
            eps=config.layer_norm_epsilon,
            dt_limit=_NO_LIMIT if config.transformers_clamp else config.time_step_limit,
            rows=None if layout.real is None else layout.rows,
        )
        if exact is not state.ssm:
            rounded = self._rounded(exact, state.ssm.dtype, cache.seed, cache.length + 1)
            # A row of padding keeps its state to the bit.
            state.ssm = (
                rounded if layout.real is None else torch.where(layout.real[..., None, None], rounded, state.ssm)
            )
        return y_BI

    def _replay(
        self,
        xBC_BTC: torch.Tensor,
        dt_BTH: torch.Tensor,
        layout: Layout,
        conv: torch.Tensor,
        ssm: torch.Tensor,
        cache: HybridCache,
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """What makes the states after fewer tokens of this chunk; no projection is needed for it."""
        seed, length = cache.seed, cache.length + layout.length

        @torch.no_grad()
        def states(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept = torch.arange(layout.length, device=counts.device) < counts[:, None]
            real = kept if layout.real is None else kept & layout.real
            order = None if layout.order is None else (~real).to(torch.uint8).argsort(dim=1, stable=True)
            part = Layout(layout.batch, layout.length, layout.past, layout.device, real=real, order=order)
            _, last = self._run(xBC_BTC, dt_BTH, part, conv, ssm.to(_work(ssm)))
            last = self._rounded(last, ssm.dtype, seed, length)
            return self._last_inputs(xBC_BTC, order, part.counts, conv), last

        return states

    def _last_inputs(
        self, xBC_BTC: torch.Tensor, order: torch.Tensor | None, counts: torch.Tensor | None, before: torch.Tensor
    ) -> torch.Tensor:
        """(B, W - 1, C) the last real inputs of each row, going back to those before this chunk."""
        width, length = before.shape[1], xBC_BTC.shape[1]
        if counts is None:
            new = xBC_BTC[:, max(0, length - width) :]
            return torch.cat([before[:, new.shape[1] :], new], dim=1)
        place = counts[:, None] - width + torch.arange(width, device=counts.device)
        token = place.clamp(min=0)
        if order is not None:
            token = order.gather(1, token)
        channels = (-1, -1, xBC_BTC.shape[2])
        new = xBC_BTC.gather(1, token[..., None].expand(channels))
        old = before.gather(1, (place + width).clamp(max=max(width - 1, 0))[..., None].expand(channels))
        return torch.where(place[..., None] >= 0, new, old)

    def _step_sizes(self, dt: torch.Tensor, limit: tuple[float, float]) -> torch.Tensor:
        work = torch.promote_types(dt.dtype, torch.float32)
        return F.softplus(dt.to(work) + self.dt_bias.to(work)).clamp(*limit)

    def _rounded(self, ssm: torch.Tensor, dtype: torch.dtype, seed: int, length: int) -> torch.Tensor:
        if dtype != torch.float16:
            return ssm.to(dtype)
        return round_stochastically(ssm, state_noise(seed, self.layer, length, ssm.device))

    def _A(self) -> torch.Tensor:
        # exp in half precision overflows
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))


def _work(state: torch.Tensor) -> torch.dtype:
    return torch.promote_types(state.dtype, torch.float32)
