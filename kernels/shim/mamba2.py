"""``mamba_ssm.modules.mamba2``: the Mamba-2 block, constructor and parameter names as upstream.

:class:`bestiary.shared.nn.mamba2.Mamba2` is this block with a scan order.

Shape legend: B batch, L tokens, D model width, E inner width, H heads, P channels of a head, G groups of B and C,
N states, W width of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.kernels.mamba_inner.branch import dt_bias_init
from bestiary.kernels.shim import ops
from bestiary.kernels.shim.mamba import states_from_cache
from bestiary.kernels.shim.norms import GatedRMSNorm

_INF = float("inf")


class Mamba2(nn.Module):
    """The Mamba-2 block: ``z, x, B, C, dt = in_proj(u)``; x, B and C go through a causal convolution with SiLU, then
    the state space dual; a gated RMS norm with z; ``out_proj``.

    Paper: arXiv:2405.21060 Sec. 7. Source: the official code of mamba-ssm. Differs from it: no tensor parallelism;
    ``dt_limit`` holds in :meth:`step` too; states of a cache are float32 unless a dtype is asked for.

    Args:
        d_model: D.
        d_state: N.
        d_conv: W.
        conv_init: bound of the convolution's uniform initial weight, None for PyTorch's.
        expand: ``E = expand * D``.
        headdim: P.
        d_ssm: channels that go through the state space, E by default; the rest is a gated MLP beside it.
        ngroups: G.
        A_init_range: A is drawn uniformly from it, then negated.
        D_has_hdim: a skip weight for each channel instead of one for each head.
        rmsnorm: the gated RMS norm; without it z gates the scan's output alone.
        norm_before_gate: norm, then gate.
        dt_min: smallest step at initialisation; steps are log-uniform in ``[dt_min, dt_max]``.
        dt_max: largest step at initialisation.
        dt_init_floor: lower bound of the step at initialisation.
        dt_limit: bounds of the step after its softplus.
        bias: give the in and out projections a bias.
        conv_bias: give the convolution a bias.
        chunk_size: tokens that are taken at once.
        use_mem_eff_path: one function from in_proj to the output, which keeps less for the backward pass.
        layer_idx: key of this layer in a cache.
        process_group: must be None.
        sequence_parallel: accepted.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if sizes do not divide or A_init_range is not positive.
        NotImplementedError: for a process group.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, _INF),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("Mamba2 here has no tensor parallelism: process_group must be None")
        self.d_model, self.d_state, self.d_conv, self.expand, self.headdim = d_model, d_state, d_conv, expand, headdim
        self.conv_init, self.ngroups, self.chunk_size = conv_init, ngroups, chunk_size
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.d_mlp = self.d_inner - self.d_ssm
        if self.d_ssm % headdim or self.d_mlp < 0:
            raise ValueError(f"headdim={headdim} must divide d_ssm={self.d_ssm}, at most d_inner={self.d_inner}")
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups or self.d_ssm % ngroups:
            raise ValueError(f"ngroups={ngroups} must divide the number of heads, {self.nheads}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range must be positive and ascending, got {A_init_range}")
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.activation, self.act = "silu", nn.SiLU()
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx

        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_mlp + self.d_ssm + conv_dim + self.nheads, bias=bias, **kwargs)
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1, bias=conv_bias, **kwargs
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(dt_bias_init(torch.rand(self.nheads, **kwargs), dt_min, dt_max, dt_init_floor))
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(torch.log(A).to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            self.norm = GatedRMSNorm(
                self.d_ssm, eps=1e-5, group_size=self.d_ssm // ngroups, norm_before_gate=norm_before_gate, **kwargs
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **kwargs)

    def forward(
        self,
        u: torch.Tensor,
        seqlen: int | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        inference_params: Any = None,
    ) -> torch.Tensor:
        """(B, L, D) to the same; or (B * L, D) to the same where ``seqlen`` says L.

        Args:
            u: tokens.
            seqlen: L of flattened rows.
            seq_idx: (B, L) int32, for rows packed of several sequences.
            cu_seqlens: not supported.
            inference_params: a cache to fill, or, after the first call, to go on from with one token.

        Raises:
            NotImplementedError: for ``cu_seqlens``.
        """
        if cu_seqlens is not None:
            raise NotImplementedError("Mamba2 here takes packed rows as seq_idx (B, L), not as cu_seqlens")
        tokens = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if inference_params is None:
            out = self._mix(tokens, seq_idx)
        else:
            conv_state, ssm_state = self._get_states_from_cache(inference_params, len(tokens))
            if inference_params.seqlen_offset > 0:
                return self.step(tokens, conv_state, ssm_state)[0]
            out, conv, last = self._mix_with_states(tokens, seq_idx)
            with torch.no_grad():
                conv_state.copy_(conv)
                ssm_state.copy_(last)
        return out if seqlen is None else out.flatten(0, 1)

    def _mix(self, u_BLD: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
        if not self.use_mem_eff_path:
            return self._mix_with_states(u_BLD, seq_idx)[0]
        return ops.mamba_split_conv1d_scan_combined(
            self.in_proj(u_BLD),
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            self._A(),
            self._skip(),
            self.chunk_size,
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )

    def _mix_with_states(
        self, u_BLD: torch.Tensor, seq_idx: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output, the last W inputs of the convolution (B, C, W), and the last state (B, H, P, N)."""
        z0, x0, z, xBC, dt = self._split(self.in_proj(u_BLD))
        columns = xBC.transpose(1, 2)
        conv_state = F.pad(columns, (self.d_conv - columns.shape[-1], 0))  # pads, or crops where it is negative
        xBC = ops.causal_conv1d_fn(columns, self.conv1d.weight[:, 0], self.conv1d.bias, seq_idx, activation="silu")
        x, B, C = xBC.transpose(1, 2).split([self.d_ssm] + 2 * [self.ngroups * self.d_state], dim=-1)
        y, last = ops.mamba_chunk_scan_combined(
            x.unflatten(-1, (-1, self.headdim)),
            dt,
            self._A(),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            self.chunk_size,
            D=self._skip(),
            z=None if self.rmsnorm else z.unflatten(-1, (-1, self.headdim)),
            dt_bias=self.dt_bias,
            seq_idx=seq_idx,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=True,
        )
        return self._finish(y.flatten(-2), z, z0, x0), conv_state, last

    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One token (B, 1, D), the states brought forward in place; ``(out (B, 1, D), conv_state, ssm_state)``.

        Raises:
            ValueError: if there is more than one token.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token, (B, 1, D), got {tuple(hidden_states.shape)}")
        z0, x0, z, xBC, dt = self._split(self.in_proj(hidden_states[:, 0]))
        xBC = ops.causal_conv1d_update(xBC, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
        x, B, C = xBC.split([self.d_ssm] + 2 * [self.ngroups * self.d_state], dim=-1)
        P, N = self.headdim, self.d_state
        skip, dt_bias, softplus = self._skip(), self.dt_bias, self.dt_limit == (0.0, _INF)
        if not softplus:
            work = torch.promote_types(dt.dtype, torch.float32)
            dt, dt_bias = F.softplus(dt.to(work) + self.dt_bias.to(work)).clamp(*self.dt_limit), None
        y = ops.selective_state_update(
            ssm_state,
            x.unflatten(-1, (-1, P)),
            dt[..., None].expand(-1, -1, P),
            self._A()[:, None, None].expand(-1, P, N),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            skip if self.D_has_hdim else skip[:, None].expand(-1, P),
            z=None if self.rmsnorm else z.unflatten(-1, (-1, P)),
            dt_bias=None if dt_bias is None else dt_bias[:, None].expand(-1, P),
            dt_softplus=softplus,
        )
        return self._finish(y.flatten(-2), z, z0, x0)[:, None], conv_state, ssm_state

    def _A(self) -> torch.Tensor:
        # exp in half precision overflows
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _skip(self) -> torch.Tensor:
        return self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D

    def _split(self, zxbcdt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        conv_dim = self.d_ssm + 2 * self.ngroups * self.d_state
        return zxbcdt.split([self.d_mlp, self.d_mlp, self.d_ssm, conv_dim, self.nheads], dim=-1)

    def _finish(self, y: torch.Tensor, z: torch.Tensor, z0: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_mlp:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int = 0, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Zero states: the last W inputs of the convolution (B, C, W), and (B, H, P, N); the length does not matter."""
        weight = self.in_proj.weight
        conv_state = weight.new_zeros(batch_size, self.conv1d.out_channels, self.d_conv, dtype=dtype or weight.dtype)
        work = dtype or torch.promote_types(weight.dtype, torch.float32)
        return conv_state, weight.new_zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=work)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return states_from_cache(self, inference_params, batch_size, initialize_states)
