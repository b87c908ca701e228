"""The Mamba-2 block on :mod:`bestiary.kernels`, with a scan order.

Shape legend: B batch, L tokens, D model width.
"""

from __future__ import annotations

import torch

from bestiary.kernels import gather_tokens, invert_order
from bestiary.kernels.shim import mamba2


class Mamba2(mamba2.Mamba2):
    """Mamba-2 as :class:`bestiary.kernels.shim.mamba2.Mamba2`, whose constructor and parameters it has.

    ``allocate_inference_cache(batch_size)`` and ``step(token, conv_state, ssm_state)`` decode.

    Paper: arXiv:2405.21060 Sec. 7. Source: the official code of mamba-ssm.
    """

    def forward(  # type: ignore[override]
        self,
        u: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        scan_order: torch.Tensor | None = None,
        reverse: bool = False,
        return_states: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mix tokens along a walk.

        Args:
            u: (B, L, D).
            seq_idx: (B, L) integers, one per token, for rows packed of several sequences.
            scan_order: (B, L) permutation: the walk visits token ``scan_order[b, t]`` at step t. Tokens are gathered
                at the block's width, its narrowest place, and put back.
            reverse: walk from the last step to the first.
            return_states: also return the states after the last step, for :meth:`step`.

        Returns:
            (B, L, D), or ``(out, conv_state, ssm_state)``.

        Raises:
            ValueError: if the tokens have another shape.
        """
        if u.ndim != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"Mamba2 needs tokens (B, L, {self.d_model}), got {tuple(u.shape)}")
        inverse = None
        if scan_order is not None:
            inverse = invert_order(scan_order)
            u = gather_tokens(u, scan_order, inverse)
            seq_idx = None if seq_idx is None else seq_idx.gather(1, scan_order.long())
        if reverse:
            u = u.flip(1)
            seq_idx = None if seq_idx is None else seq_idx.flip(1)
        states = ()
        if return_states:
            out, *states = self._mix_with_states(u, seq_idx)
        else:
            out = self._mix(u, seq_idx)
        if reverse:
            out = out.flip(1)
        if inverse is not None:
            assert scan_order is not None
            out = gather_tokens(out, inverse, scan_order)
        return (out, *states) if return_states else out  # type: ignore[return-value]
