"""The mixture-of-experts layer ``E``: sigmoid router, shared expert, and the latent variant of Nemotron 3.

Shape legend: B rows, T tokens, D width, V width the experts work in (D, or the latent size), F inner width of an
expert, E experts, K experts of a token, R = tokens times K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.grouped import grouped_linear
from bestiary.shared.language.hybrid.layout import Layout
from bestiary.shared.language.hybrid.mlp import MLP, squared_relu


@dataclass
class Routing:
    """Which experts the tokens go to.

    Attributes:
        experts: (tokens, K) int64. weights: (tokens, K) float32. scores: (tokens, E) float32, sigmoids.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor


class Router(nn.Module):
    """Chooses by ``sigmoid(x W^T) + bias``; weighs by the sigmoid alone.

    The bias is no parameter: after each optimiser step it moves by ``rate`` towards balance (auxiliary-loss-free
    balancing), up for experts with less than the mean load. All in float32.

    Paper: arXiv:2412.19437 Sec. 2.1.2 (DeepSeek-V3), arXiv:2512.20848 (Nemotron 3 Nano).

    Attributes:
        weight: (E, D). e_score_correction_bias: (E,) float32 buffer.
        load: (E,) tokens sent to each expert since the last optimiser step, by this process; a layer that is computed
            again for the backward pass counts again, which changes no share.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.top_k, self.groups, self.kept_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalised, self.scale, self.rate = (
            config.norm_topk_prob,
            config.routed_scaling_factor,
            config.router_bias_rate,
        )
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.zeros(experts, config.hidden_size))
        self.e_score_correction_bias: torch.Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        self.load: torch.Tensor
        self.register_buffer("load", torch.zeros(experts, dtype=torch.float32), persistent=False)

    def forward(self, x: torch.Tensor) -> Routing:
        """(tokens, D) to their :class:`Routing`."""
        work = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.to(work), self.weight.to(work)))
            choice = scores.detach() + self.e_score_correction_bias
            if self.groups > 1:
                grouped = choice.unflatten(-1, (self.groups, -1))
                best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
                kept = best.topk(self.kept_groups, dim=-1).indices
                out = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
                choice = grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)
            experts = choice.topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, experts)
            if self.normalised:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return Routing(experts, weights * self.scale, scores)

    def _apply(self, fn, recurse=True):
        """Move with the model, but stay in float32: counts and small steps would be lost in less."""
        exact = self.e_score_correction_bias, self.load
        super()._apply(fn, recurse)
        for name, tensor in zip(("e_score_correction_bias", "load"), exact, strict=True):
            if getattr(self, name).dtype != torch.float32 and not tensor.is_meta:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def rebalance(self, load: torch.Tensor) -> None:
        """Move the bias one step towards balance, given the load (E,) of all processes."""
        self.e_score_correction_bias += self.rate * torch.sign(load.mean() - load)


class Experts(nn.Module):
    """All experts in one pair of tensors; tokens are sorted by expert and multiplied group by group in one call.

    Attributes:
        up_proj: (E, F, V). down_proj: (E, V, F).
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        width = config.moe_latent_size or config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """(tokens, V) to the weighted sum of each token's experts, (tokens, V)."""
        flat_R = routing.experts.flatten()
        order_R = flat_R.argsort(stable=True)
        load_E = torch.zeros(self.up_proj.shape[0], dtype=torch.int32, device=x.device)
        ends_E = load_E.index_add(0, flat_R, torch.ones_like(flat_R, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        rows_RV = x[order_R // routing.experts.shape[1]]
        inner_RF = squared_relu(grouped_linear(rows_RV, self.up_proj, ends_E))
        out_RV = grouped_linear(inner_RF, self.down_proj, ends_E)
        weight_R = routing.weights.flatten()[order_R].to(out_RV.dtype)
        # Back to (token, choice), then summed over choices in a fixed order: the same bits on every run.
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x.device))
        return (out_RV * weight_R[:, None])[back_R].unflatten(0, routing.experts.shape).sum(1)


class MoE(nn.Module):
    """``sum_k w_k E_k(x) + Shared(x)``; with a latent size, ``fc2(sum_k w_k E_k(fc1(x))) + Shared(x)``.

    Routing and the shared expert always see the full width. Paper: arXiv:2512.20856 (LatentMoE).
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        bias, width, latent = config.mlp_bias, config.hidden_size, config.moe_latent_size
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = MLP(width, shared, bias) if shared else None
        self.fc1_latent_proj = nn.Linear(width, latent, bias=bias) if latent else None
        self.fc2_latent_proj = nn.Linear(latent, width, bias=bias) if latent else None

    def forward(self, x_BTD: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) to the same, and in training the balance loss of :func:`sequence_balance`."""
        x = x_BTD.flatten(0, 1)
        routing = self.gate(x)
        balance = None
        if self.training and torch.is_grad_enabled():
            real = None if layout.real is None else layout.real.flatten()
            with torch.no_grad():
                chosen = torch.ones_like(routing.weights) if real is None else real[:, None].expand_as(routing.weights)
                self.gate.load.index_add_(0, routing.experts.flatten(), chosen.flatten().to(self.gate.load.dtype))
            balance = sequence_balance(routing, _sequences(layout), real)
        inner = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        out = self.experts(inner, routing)
        if self.fc2_latent_proj is not None:
            out = self.fc2_latent_proj(out)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out.to(x.dtype).unflatten(0, x_BTD.shape[:2]), balance


def _sequences(layout: Layout) -> torch.Tensor:
    """(B * T,) the number of each token's sequence: its row, or its part of a packed row."""
    rows = torch.arange(layout.batch, device=layout.device)[:, None].expand(-1, layout.length)
    if layout.seq_idx is None:
        return rows.flatten()
    begins = F.pad(layout.seq_idx.diff(dim=1) != 0, (1, 0), value=True).flatten()
    return begins.cumsum(0) - 1


def sequence_balance(routing: Routing, sequences: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The sequence-wise balance loss: mean over sequences of ``sum_e f_e P_e``; 1 for even loads.

    f_e is the share of a sequence's choices that fell on e, times E; P_e the mean of its normalised scores.

    Paper: arXiv:2412.19437 Eq. 17-20, without the factor.

    Args:
        routing: of all tokens.
        sequences: (tokens,) int64, the sequence of each token, below the number of tokens.
        real: (tokens,) bool, false on padding, or None.

    Returns:
        A scalar.
    """
    experts = routing.scores.shape[1]
    weight = torch.ones_like(routing.scores[:, 0]) if real is None else real.to(routing.scores.dtype)
    shares = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20) * weight[:, None]
    probability = torch.zeros_like(routing.scores).index_add(0, sequences, shares)
    chosen = torch.zeros_like(routing.scores).scatter_add(
        1, routing.experts, weight[:, None].expand_as(routing.experts)
    )
    load = torch.zeros_like(routing.scores).index_add(0, sequences, chosen)
    length = torch.zeros_like(weight).index_add(0, sequences, weight)
    per_sequence = (load * probability).sum(-1) * experts / routing.experts.shape[1] / length.clamp(min=1).square()
    return per_sequence.sum() / (length > 0).sum().clamp(min=1)
