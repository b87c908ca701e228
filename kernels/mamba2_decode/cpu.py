"""One decoding step of a Mamba-2 layer in C++, in place on its states.

It has no gradient: where one is asked for, the reference runs.
"""

from __future__ import annotations

import torch

from bestiary.kernels.backends import native
from bestiary.kernels.backends.library import define


def mamba2_step_cpu(
    zxbcdt: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    norm_weight: torch.Tensor,
    rows: torch.Tensor | None,
    ngroups: int,
    eps: float,
    dt_limit: tuple[float, float],
) -> torch.Tensor:
    """See :func:`bestiary.kernels.mamba2_step`; arguments are taken as checked."""
    parameters = (conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    return _step(zxbcdt, conv_state, ssm_state, *parameters, rows, ngroups, eps, *dt_limit)


def _run(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *rest):
    out = zxbcdt.new_empty((zxbcdt.shape[0], norm_weight.shape[0]))
    native.ops().mamba2_step(
        zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *rest, out
    )
    return out


def _fake(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *rest):
    return zxbcdt.new_empty((zxbcdt.shape[0], norm_weight.shape[0]))


_step = define(
    "mamba2_step(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor dt_bias, Tensor A, Tensor D, Tensor norm_weight, Tensor? rows, int groups, float eps, float low, "
    "float high) -> Tensor",
    _run,
    _fake,
)
