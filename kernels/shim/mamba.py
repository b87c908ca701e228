"""``mamba_ssm.modules.mamba_simple``: the Mamba-1 module of mamba-ssm and of its vision forks.

Constructor, parameter names, shapes and order of random numbers are theirs, so checkpoints and seeds carry over. For
new code there is :class:`bestiary.shared.nn.mamba.Mamba`.

Shape legend: B batch, L tokens, D model width, E inner width, N states, W width of the convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.kernels.mamba_inner.branch import Walk, add_branch, branch_weights, init_A_log, init_dt
from bestiary.kernels.shim import ops

TYPES = ("none", "v1", "v2", "v3")


class Mamba(nn.Module):
    """Mamba-1 with the constructor of ``mamba_ssm.modules.mamba_simple.Mamba`` and its forks.

    What ``bimamba_type`` means depends on the fork, which is told by the arguments it is given:

    - "none": one direction, as mamba-ssm.
    - "v1" without ``nslices``: Vision Mamba's, one convolution and two scans, the second reversed with ``A_b_log``.
    - "v1" with ``nslices``: ASM-UNet's, one direction; it has parameters ``_b`` and ``_s`` and uses none.
    - "v2": Vision Mamba's, a forward and a reversed direction, each with its own parameters (``_b``).
    - "v3": SegMamba's, those two and one (``_s``) that visits ``nslices`` slices in turn, a token of each.

    Source: the official code of mamba-ssm, Vision Mamba (arXiv:2401.09417), SegMamba (arXiv:2401.13560) and ASM-UNet
    (arXiv:2508.07237). Differs from it: ``use_fast_path=False`` gives the same result as True (in the forks it drops
    all directions but the first); states of a cache are float32 unless a dtype is asked for.

    Args:
        d_model: D.
        d_state: N.
        d_conv: W.
        expand: ``E = expand * D``.
        dt_rank: rank of the projection to the step, "auto" for ``ceil(D / 16)``.
        dt_min: smallest step at initialisation.
        dt_max: largest step at initialisation.
        dt_init: "random" or "constant".
        dt_scale: factor of the step projection's initial weight.
        dt_init_floor: lower bound of the step at initialisation.
        conv_bias: give the convolution a bias.
        bias: give the in and out projections a bias.
        use_fast_path: accepted; there is one path.
        layer_idx: key of this layer in a cache.
        device: of the parameters.
        dtype: of the parameters but A and D.
        bimamba_type: see above.
        nslices: slices of "v3", 5 by default.
        if_devide_out: halve the sum of "v2" (spelled as in the fork).
        init_layer_scale: scale the output by a learned ``gamma`` that begins here.
        if_divide_out: the same as ``if_devide_out``.

    Raises:
        ValueError: for an unknown ``bimamba_type`` or ``dt_init``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        bimamba_type: str | None = "none",
        nslices: int | None = None,
        if_devide_out: bool = False,
        init_layer_scale: float | None = None,
        if_divide_out: bool = False,
    ) -> None:
        super().__init__()
        bimamba_type = bimamba_type or "none"
        if bimamba_type not in TYPES:
            raise ValueError(f"bimamba_type must be one of {', '.join(TYPES)}, not {bimamba_type!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx, self.bimamba_type = use_fast_path, layer_idx, bimamba_type
        self.nslices, self.if_devide_out = nslices or 5, if_devide_out or if_divide_out
        self.activation, self.act = "silu", nn.SiLU()
        self.init_layer_scale = init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))

        sizes = (self.d_inner, d_state, d_conv, self.dt_rank, conv_bias, device, dtype)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, device=device, dtype=dtype)
        add_branch(self, "", *sizes)
        dt_proj: nn.Linear = self.dt_proj  # type: ignore[assignment]
        init_dt(dt_proj, dt_min, dt_max, dt_init_floor, dt_init, dt_scale)
        dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        sliced_fork = nslices is not None and bimamba_type != "none"
        self.vim_v1 = bimamba_type == "v1" and not sliced_fork
        if self.vim_v1:
            self.A_b_log = init_A_log(self.d_inner, d_state, device)
        if sliced_fork or bimamba_type in ("v2", "v3"):
            add_branch(self, "_b", *sizes)
        if sliced_fork or bimamba_type == "v3":
            add_branch(self, "_s", *sizes)
        for name, parameter in self.named_parameters():
            if name.endswith("_log") or name in ("D", "D_b", "D_s"):
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor, inference_params: Any = None) -> torch.Tensor:
        """(B, L, D) to (B, L, D).

        With ``inference_params`` the states of its cache are filled, or, after the first call, a single token is a
        step.

        Raises:
            ValueError: if "v3" meets a number of tokens that ``nslices`` does not divide.
            NotImplementedError: for a cache with more than one direction.
        """
        if inference_params is not None:
            out = self._with_cache(hidden_states, inference_params)
        else:
            xz_BEL = self.in_proj(hidden_states).transpose(1, 2)
            if self.bimamba_type in ("v2", "v3"):
                y_BLE = self._directions(xz_BEL).transpose(1, 2)
                out = F.linear(y_BLE, self.out_proj.weight, self.out_proj.bias)
            else:
                out = self._one_convolution(xz_BEL)
        return out if self.init_layer_scale is None else out * self.gamma

    def _one_convolution(self, xz_BEL: torch.Tensor) -> torch.Tensor:
        w = branch_weights(self)
        projections = (w.conv1d_weight, w.conv1d_bias, w.x_proj_weight, w.delta_proj_weight)
        out_proj = (self.out_proj.weight, self.out_proj.bias)
        options = {"D": w.D, "delta_bias": w.delta_bias}
        if not self.vim_v1:
            return ops.mamba_inner_fn(xz_BEL, *projections, *out_proj, w.A, **options)
        A_b = -torch.exp(self.A_b_log.to(torch.promote_types(self.A_b_log.dtype, torch.float32)))
        return ops.bimamba_inner_fn(xz_BEL, *projections, *out_proj, w.A, A_b, **options)

    def _directions(self, xz_BEL: torch.Tensor) -> torch.Tensor:
        def direction(suffix: str, **walk: Any) -> torch.Tensor:
            w = branch_weights(self, suffix)
            return ops.mamba_inner_fn_no_out_proj(
                xz_BEL, w.conv1d_weight, w.conv1d_bias, w.x_proj_weight, w.delta_proj_weight, w.A,
                D=w.D, delta_bias=w.delta_bias, **walk,
            )  # fmt: skip

        B, _, L = xz_BEL.shape
        if self.bimamba_type == "v3" and L % self.nslices:
            raise ValueError(f'bimamba_type="v3": nslices={self.nslices} must divide the number of tokens, {L}')
        y_BEL = direction("") + direction("_b", reverse=True)
        if self.bimamba_type == "v2":
            return y_BEL / 2 if self.if_devide_out else y_BEL
        order = torch.arange(L, device=xz_BEL.device).view(self.nslices, -1).t().reshape(1, -1).expand(B, -1)
        return y_BEL + direction("_s", scan_order=order)

    def _with_cache(self, hidden_states: torch.Tensor, inference_params: Any) -> torch.Tensor:
        if self.vim_v1 or self.bimamba_type in ("v2", "v3"):
            raise NotImplementedError(f'bimamba_type="{self.bimamba_type}" looks at later tokens and cannot decode')
        conv_state, ssm_state = self._get_states_from_cache(inference_params, len(hidden_states))
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        x_BEL, z_BEL = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        y_BEL, _, last = ops.prefill_branch(x_BEL, z_BEL, branch_weights(self), Walk(), return_states=True)
        assert last is not None
        with torch.no_grad():
            conv_state.copy_(F.pad(x_BEL, (self.d_conv - x_BEL.shape[-1], 0)))  # pads, or crops if negative
            ssm_state.copy_(last)
        return self.out_proj(y_BEL.transpose(1, 2))

    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One token (B, 1, D), the states brought forward in place; ``(out (B, 1, D), conv_state, ssm_state)``.

        Raises:
            ValueError: if there is more than one token.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token, (B, 1, D), got {tuple(hidden_states.shape)}")
        x_BE, z_BE = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)
        y_BE = ops.step_branch(x_BE, z_BE, conv_state, ssm_state, branch_weights(self))
        return self.out_proj(y_BE)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Zero states (B, E, W) and (B, E, N); the length does not matter."""
        weight = self.in_proj.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or weight.dtype)
        work = dtype or torch.promote_types(weight.dtype, torch.float32)
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=work)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return states_from_cache(self, inference_params, batch_size, initialize_states)


def states_from_cache(
    module: Any, inference_params: Any, batch_size: int, initialize_states: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's states in the cache, made there if missing, zeroed if asked for.

    Raises:
        ValueError: if the layer has no ``layer_idx``.
    """
    if module.layer_idx is None:
        raise ValueError(f"{type(module).__name__} needs layer_idx= to keep its states in inference_params")
    cache = inference_params.key_value_memory_dict
    if module.layer_idx not in cache:
        cache[module.layer_idx] = module.allocate_inference_cache(batch_size, 0)
    states = cache[module.layer_idx]
    if initialize_states:
        for state in states:
            state.zero_()
    return states


class Block(nn.Module):
    """Add, norm, mixer, and with an MLP add, norm, MLP: the residual block of mamba-ssm.

    Args:
        dim: D.
        mixer_cls: ``mixer_cls(dim)`` is the mixer.
        mlp_cls: ``mlp_cls(dim)`` is the MLP; ``nn.Identity`` for none.
        norm_cls: ``norm_cls(dim)`` is a norm.
        fused_add_norm: accepted; add and norm are always one function here.
        residual_in_fp32: keep the residual in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Any,
        mlp_cls: Any = nn.Identity,
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(output of the last part, residual)``; the caller adds them up, or the next block does."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(self, norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None):
        if residual is not None:
            x = x + residual
        elif self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight: Any = norm.weight
        return norm(x.to(weight.dtype)), x

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs: Any) -> Any:
        """The mixer's states."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class BlockV1(Block):
    """The block of mamba-ssm 1.x, which has no MLP; arguments in its order.

    Args:
        dim: D.
        mixer_cls: as :class:`Block`, like all that follow.
        norm_cls: see there.
        fused_add_norm: see there.
        residual_in_fp32: see there.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Any,
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


class GatedMLP(nn.Module):
    """``fc2(y * act(gate))`` with ``y, gate = fc1(x)``: ``mamba_ssm.modules.mlp.GatedMLP``.

    Args:
        in_features: D.
        hidden_features: inner width before rounding up, ``8 D / 3`` by default.
        out_features: D by default.
        activation: of the gate.
        bias: give both projections a bias.
        multiple_of: the inner width is rounded up to it.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Any = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        hidden = hidden_features if hidden_features is not None else int(8 * in_features / 3)
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        out = in_features if out_features is None else out_features
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, out)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))
