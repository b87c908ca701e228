"""Mamba-1 layers on :mod:`bestiary.kernels`, and the stack that segmentation blocks are made of.

Shape legend: B batch, L tokens, D model width (``d_model``), E inner width (``d_inner``), N states, W width of the
convolution.

Parameters bear the names of mamba-ssm (and, for the sliced one, of SegMamba's fork of it), so weights map one to
one. Tokens may be walked in any order, ``scan_order_BL[b, t]`` being the token that is visited at step t: they stay
where they stand, for every other part of a layer works on each token by itself.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.kernels.mamba_inner.branch import Walk, add_branch, branch_weights, init_dt, scan_branch, step_branch


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
        self._add_branch("")
        dt_proj = self.get_submodule("dt_proj")
        assert isinstance(dt_proj, nn.Linear)
        init_dt(dt_proj, dt_min, dt_max, dt_init_floor)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def _add_branch(self, suffix: str) -> None:
        add_branch(self, suffix, self.d_inner, self.d_state, self.d_conv, self.dt_rank, self.conv_bias)

    def _branch(
        self,
        x_BLE: torch.Tensor,
        suffix: str = "",
        reverse: bool = False,
        scan_order_BL: torch.Tensor | None = None,
        seq_idx_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Convolution and scan of one direction, without the gate; (B, L, E) to (B, L, E), float32 or wider."""
        walk = Walk(scan_order_BL, reverse, seq_idx_BL)
        y_BEL, _, _ = scan_branch(x_BLE.transpose(1, 2), None, branch_weights(self, suffix), walk, full_precision=True)
        return y_BEL.transpose(1, 2)

    def _project(self, tokens_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The halves of ``in_proj``: x and the gate z, each (B, L, E), views of one tensor."""
        if tokens_BLD.ndim != 3 or tokens_BLD.shape[-1] != self.d_model:
            raise ValueError(f"Mamba needs tokens (B, L, {self.d_model}), got {tuple(tokens_BLD.shape)}")
        x_BLE, z_BLE = self.in_proj(tokens_BLD).chunk(2, dim=-1)
        return x_BLE, z_BLE

    def forward(
        self,
        tokens_BLD: torch.Tensor,
        scan_order_BL: torch.Tensor | None = None,
        reverse: bool = False,
        seq_idx_BL: torch.Tensor | None = None,
        states: tuple[torch.Tensor, torch.Tensor] | None = None,
        return_states: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mix tokens along a walk.

        Args:
            tokens_BLD: (B, L, d_model).
            scan_order_BL: (B, L) permutation to walk by, raster order by default.
            reverse: walk from the last step to the first.
            seq_idx_BL: (B, L) integers, for rows packed of several sequences: nothing passes from one to another.
            states: ``(conv_state, ssm_state)`` to go on from, as :meth:`allocate_inference_cache` gives them.
            return_states: also return both states after the last step, for :meth:`step`.

        Returns:
            (B, L, d_model), or ``(out, conv_state, ssm_state)``.

        Raises:
            ValueError: if the tokens have another shape.
        """
        x_BLE, z_BLE = self._project(tokens_BLD)
        conv_state, ssm_state = states or (None, None)
        y_BEL, conv_state, ssm_state = scan_branch(
            x_BLE.transpose(1, 2),
            z_BLE.transpose(1, 2),
            branch_weights(self),
            Walk(scan_order_BL, reverse, seq_idx_BL),
            full_precision=True,
            out_dtype=x_BLE.dtype,
            conv_state=conv_state,
            ssm_state=ssm_state,
            return_states=return_states,
        )
        out_BLD = self.out_proj(y_BEL.transpose(1, 2))
        if return_states:
            assert conv_state is not None
            assert ssm_state is not None
            return out_BLD, conv_state, ssm_state
        return out_BLD

    def allocate_inference_cache(
        self, batch_size: int, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states before the first token.

        Args:
            batch_size: B.
            dtype: of the convolution's state, that of the weights by default. The scan's is float32 or wider, since
                rounding it adds up over the tokens.

        Returns:
            ``(conv_state, ssm_state)``, zeros of (B, E, W-1) and (B, E, N).
        """
        weight = self.in_proj.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv - 1, dtype=dtype or weight.dtype)
        work = torch.promote_types(weight.dtype, torch.float32)
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=work)

    def step(
        self, tokens_B1D: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One token of :meth:`forward`; both states are brought forward in place.

        Args:
            tokens_B1D: (B, 1, d_model).
            conv_state: (B, E, W-1).
            ssm_state: (B, E, N).

        Returns:
            ``(out, conv_state, ssm_state)`` with out (B, 1, d_model).

        Raises:
            ValueError: if there is not one token.
        """
        if tokens_B1D.shape[1] != 1:
            raise ValueError(f"step takes one token, (B, 1, {self.d_model}), got {tuple(tokens_B1D.shape)}")
        x_B1E, z_B1E = self._project(tokens_B1D)
        y_BE = step_branch(x_B1E[:, 0], z_B1E[:, 0], conv_state, ssm_state, branch_weights(self), full_precision=True)
        return self.out_proj(y_BE)[:, None], conv_state, ssm_state


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
        self._add_branch("_b")
        self._add_branch("_s")

    def forward(self, tokens_BLD: torch.Tensor, scan_order_BL: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, d_model) to the same; ``scan_order_BL`` as :class:`Mamba`.

        Raises:
            ValueError: if the tokens have another shape.
        """
        x_BLE, z_BLE = self._project(tokens_BLD)
        y_BLE = self._branch(x_BLE, "", False, scan_order_BL) + self._branch(x_BLE, "_b", True, scan_order_BL)
        B, L, _ = x_BLE.shape
        missing = -L % self.num_slices
        if missing:
            x_BLE = F.pad(x_BLE, (0, 0, 0, missing))
        order_BL = torch.arange(L + missing, device=x_BLE.device).view(self.num_slices, -1).t().reshape(1, -1)
        if scan_order_BL is None:
            order_BL = order_BL.expand(B, -1)
        else:
            ends = torch.arange(L, L + missing, device=x_BLE.device, dtype=scan_order_BL.dtype).expand(B, -1)
            order_BL = torch.cat([scan_order_BL, ends], dim=1).gather(1, order_BL.expand(B, -1))
        y_BLE = y_BLE + self._branch(x_BLE, "_s", False, order_BL)[:, :L]
        # each branch is gated by its own equally permuted z, so the sum can be gated once
        return self.out_proj((y_BLE * F.silu(z_BLE)).to(z_BLE.dtype))

    def allocate_inference_cache(self, batch_size: int, dtype: torch.dtype | None = None):
        """Not possible: a branch that walks backwards needs all tokens."""
        raise NotImplementedError(f"{type(self).__name__} looks at later tokens and cannot decode step by step")

    def step(self, tokens_B1D: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor):
        """Not possible, see :meth:`allocate_inference_cache`."""
        return self.allocate_inference_cache(len(tokens_B1D))


class BidirectionalMamba(Mamba):
    """Two-direction Mamba: ``out_proj((y_fwd + y_bwd) * silu(z))``, each direction with parameters of its own.

    in_proj and out_proj are shared; the parameters of the backward direction end in ``_b``.

    Paper: arXiv:2401.09417 Sec. 3.3. Source: the official code (``bimamba_type="v2"`` of Vision Mamba's fork of
    mamba-ssm); as there, the dt projection of the backward direction keeps PyTorch's default initialisation.

    Args:
        d_model: width of the tokens.
        if_divide_out: halve the sum of the two directions (the official code's ``if_devide_out``).
        **options: as :class:`Mamba`.
    """

    def __init__(self, d_model: int, if_divide_out: bool = False, **options) -> None:
        super().__init__(d_model, **options)
        self.if_divide_out = if_divide_out
        self._add_branch("_b")

    def forward(
        self,
        tokens_BLD: torch.Tensor,
        scan_order_BL: torch.Tensor | None = None,
        seq_idx_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, d_model) to the same; the options as :class:`Mamba`.

        Raises:
            ValueError: if the tokens have another shape.
        """
        x_BLE, z_BLE = self._project(tokens_BLD)
        y_BLE = self._branch(x_BLE, "", False, scan_order_BL, seq_idx_BL)
        y_BLE = y_BLE + self._branch(x_BLE, "_b", True, scan_order_BL, seq_idx_BL)
        if self.if_divide_out:
            y_BLE = y_BLE / 2
        return self.out_proj((y_BLE * F.silu(z_BLE)).to(z_BLE.dtype))

    allocate_inference_cache = SlicedMamba.allocate_inference_cache
    step = SlicedMamba.step


class MambaLayer(nn.Module):
    """``U <- LayerNorm(U + Mamba(ReLU(LayerNorm(Linear(U)))))``.

    Source: official code of arXiv:2508.07237, one layer of the stack that follows the reordering.

    Args:
        dim: width of the tokens.
        kind: which Mamba: the one-direction one, or another that takes a scan order.
        **options: as that class.
    """

    def __init__(self, dim: int, kind: type[Mamba] = Mamba, **options) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mamba = kind(dim, **options)
        self.out_norm = nn.LayerNorm(dim)

    def forward(
        self,
        tokens_BLD: torch.Tensor,
        scan_order_BL: torch.Tensor | None = None,
        projected_BLD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, dim) to (B, L, dim).

        Args:
            tokens_BLD: U.
            scan_order_BL: (B, L) permutation that Mamba walks by.
            projected_BLD: ``Linear(U)``, from a caller that has a cheaper way to it.
        """
        if projected_BLD is None:
            projected_BLD = self.linear(tokens_BLD)
        return self.out_norm(tokens_BLD + self.mamba(F.relu(self.norm(projected_BLD)), scan_order_BL))


class MambaStack(nn.Module):
    """``depth`` layers of :class:`MambaLayer`.

    Args:
        dim: width of the tokens.
        depth: number of layers.
        kind: as :class:`MambaLayer`.
        **options: as :class:`MambaLayer`.
    """

    def __init__(self, dim: int, depth: int = 2, kind: type[Mamba] = Mamba, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MambaLayer(dim, kind, **options) for _ in range(depth))

    def forward(
        self,
        tokens_BLD: torch.Tensor,
        scan_order_BL: torch.Tensor | None = None,
        projected_BLD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, dim) to (B, L, dim); arguments as :class:`MambaLayer`, ``projected_BLD`` for the first layer."""
        for layer in self.layers:
            tokens_BLD = layer(tokens_BLD, scan_order_BL, projected_BLD)
            projected_BLD = None
        return tokens_BLD
