"""Mamba-1 layers on :mod:`bestiary.kernels`, and the stack that segmentation blocks are made of.

Shape legend: B batch, L tokens, D model width (``d_model``), E inner width (``d_inner``), N states, R rank of dt.

Parameters bear the names of mamba-ssm (and, for the sliced one, of SegMamba's fork of it), so weights map one to
one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.kernels import causal_conv1d_fn, selective_scan_fn


class Mamba(nn.Module):
    """One-direction Mamba-1.

    ``x, z = in_proj(u)``; x goes through a causal depthwise convolution with SiLU, then the selective scan whose
    step, B and C are projected from it; times ``silu(z)``; ``out_proj``. The scan runs in float32 under autocast.

    Paper: arXiv:2312.00752 Sec. 3.4. Source: the official code of mamba-ssm.

    Args:
        d_model: width of the tokens.
        d_state: states per channel (N).
        d_conv: width of the convolution.
        expand: ``d_inner = expand * d_model``.
        dt_rank: rank of the projection to dt, ``"auto"`` for ``ceil(d_model / 16)``.
        dt_min: smallest step at initialisation; steps are log-uniform in ``[dt_min, dt_max]``.
        dt_max: largest step at initialisation.
        dt_init_floor: lower bound of the step at initialisation.
        conv_bias: give the convolution a bias.
        bias: give the in and out projections a bias.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.conv_bias = d_model, d_state, d_conv, conv_bias
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self._add_branch("", conv_bias)
        _init_dt(self.get_submodule("dt_proj"), self.dt_rank, dt_min, dt_max, dt_init_floor)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def _add_branch(self, suffix: str, conv_bias: bool) -> None:
        """The parameters of one scan direction: ``conv1d{suffix}``, …, ``A{suffix}_log``, ``D{suffix}``."""
        E, N, R = self.d_inner, self.d_state, self.dt_rank
        conv = nn.Conv1d(E, E, self.d_conv, groups=E, padding=self.d_conv - 1, bias=conv_bias)
        setattr(self, f"conv1d{suffix}", conv)
        setattr(self, f"x_proj{suffix}", nn.Linear(E, R + 2 * N, bias=False))
        setattr(self, f"dt_proj{suffix}", nn.Linear(R, E))
        states = torch.arange(1, N + 1, dtype=torch.float32)
        setattr(self, f"A{suffix}_log", nn.Parameter(torch.log(states).repeat(E, 1)))
        setattr(self, f"D{suffix}", nn.Parameter(torch.ones(E)))

    def _branch(self, x_BLE: torch.Tensor, suffix: str = "", reverse: bool = False) -> torch.Tensor:
        """Convolution and scan of one direction, without the gate; (B, L, E) to (B, L, E) float32."""
        conv = getattr(self, f"conv1d{suffix}")
        dt_proj = getattr(self, f"dt_proj{suffix}")
        x_BEL = x_BLE.transpose(1, 2)
        x_BEL = causal_conv1d_fn(x_BEL, conv.weight[:, 0], conv.bias, activation="silu", reverse=reverse)
        assert isinstance(x_BEL, torch.Tensor)
        params = getattr(self, f"x_proj{suffix}")(x_BEL.transpose(1, 2))
        with torch.autocast(x_BLE.device.type, enabled=False):
            # dt in half precision would round the decay of every step; these are small tensors
            work = torch.promote_types(params.dtype, torch.float32)
            dt, B_BLN, C_BLN = params.to(work).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            y_BEL = selective_scan_fn(
                x_BEL.to(work),
                F.linear(dt, dt_proj.weight.to(work)).transpose(1, 2),
                -torch.exp(getattr(self, f"A{suffix}_log").to(work)),
                B_BLN.transpose(1, 2),
                C_BLN.transpose(1, 2),
                getattr(self, f"D{suffix}"),
                delta_bias=dt_proj.bias,
                delta_softplus=True,
                reverse=reverse,
            )
        assert isinstance(y_BEL, torch.Tensor)
        return y_BEL.transpose(1, 2)

    def _mix(self, x_BLE: torch.Tensor) -> torch.Tensor:
        return self._branch(x_BLE)

    def forward(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, d_model) to (B, L, d_model).

        Raises:
            ValueError: if the tokens have another shape.
        """
        if tokens_BLD.ndim != 3 or tokens_BLD.shape[-1] != self.d_model:
            raise ValueError(f"Mamba needs tokens (B, L, {self.d_model}), got {tuple(tokens_BLD.shape)}")
        x_BLE, z_BLE = self.in_proj(tokens_BLD).chunk(2, dim=-1)
        return self.out_proj((self._mix(x_BLE) * F.silu(z_BLE)).to(x_BLE.dtype))


class SlicedMamba(Mamba):
    """Three-branch Mamba: forward, backward, and a walk that jumps between ``num_slices`` slices.

    ``out_proj(y_fwd + y_bwd + y_slice)``. The slice branch cuts the sequence into n contiguous chunks and visits
    the first token of each, then the second of each, and so on. Each branch has its own convolution, projections,
    A and D; in_proj and out_proj are shared, and the branches are summed.

    Source: official code of arXiv:2508.07237 (``bimamba_type="v3"`` of SegMamba's fork of mamba-ssm). As there,
    the dt projections of the two further branches keep PyTorch's default initialisation.

    Differs from paper: the official code fails unless n divides the number of tokens. Here the sequence of the
    slice branch is padded with zero tokens and cropped, which is the same where n divides it.

    Args:
        d_model: width of the tokens.
        num_slices: n.
        **options: as :class:`Mamba`.
    """

    def __init__(self, d_model: int, num_slices: int = 5, **options) -> None:
        super().__init__(d_model, **options)
        if num_slices < 1:
            raise ValueError(f"num_slices must be at least 1, not {num_slices}")
        self.num_slices = num_slices
        self._add_branch("_b", self.conv_bias)
        self._add_branch("_s", self.conv_bias)

    def _mix(self, x_BLE: torch.Tensor) -> torch.Tensor:
        # each branch is gated by its own equally permuted z, so the sum can be gated once (in forward)
        y_BLE = self._branch(x_BLE) + self._branch(x_BLE, "_b", reverse=True)
        B, L, E = x_BLE.shape
        n = self.num_slices
        padded = F.pad(x_BLE, (0, 0, 0, -L % n))
        sliced = padded.reshape(B, n, -1, E).transpose(1, 2).reshape(B, -1, E)
        y_slice = self._branch(sliced, "_s").reshape(B, -1, n, E).transpose(1, 2).reshape(B, -1, E)
        return y_BLE + y_slice[:, :L]


class MambaLayer(nn.Module):
    """``U <- LayerNorm(U + Mamba(ReLU(LayerNorm(Linear(U)))))``.

    Source: official code of arXiv:2508.07237, one layer of the stack that follows the reordering.

    Args:
        dim: width of the tokens.
        **options: as :class:`Mamba`.
    """

    def __init__(self, dim: int, **options) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, **options)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) to (B, L, dim)."""
        return self.out_norm(tokens_BLD + self.mamba(F.relu(self.norm(self.linear(tokens_BLD)))))


class MambaStack(nn.Module):
    """``depth`` layers of :class:`MambaLayer`.

    Args:
        dim: width of the tokens.
        depth: number of layers.
        **options: as :class:`Mamba`.
    """

    def __init__(self, dim: int, depth: int = 2, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MambaLayer(dim, **options) for _ in range(depth))

    def forward(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) to (B, L, dim)."""
        for layer in self.layers:
            tokens_BLD = layer(tokens_BLD)
        return tokens_BLD


def _init_dt(dt_proj: nn.Module, rank: int, dt_min: float, dt_max: float, floor: float) -> None:
    """Weight uniform in +-rank^-0.5; bias such that softplus(bias) is log-uniform in [dt_min, dt_max]."""
    assert isinstance(dt_proj, nn.Linear)
    with torch.no_grad():
        dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand_like(dt_proj.bias) * (high - low) + low).clamp(min=floor)
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
