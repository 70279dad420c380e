"""Routers: features → `RoutingPlan`, the one description of which experts a row uses and how much."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RoutingPlan:
    """Which experts each of T tasks uses for each of B rows.

    `weights` `[B, T, E]` fp32, non-negative, sums to 1 over the experts. (Soft plans see all experts, so no ids.)
    """

    weights: Tensor


class SoftRouter(nn.Module):
    """One softmax gate per task over all experts (MMoE): g_t(x) = softmax(W_t·x + b_t), in fp32.

    A row's plan depends on the row alone (`batch_invariant`).

    >>> plan = SoftRouter(in_dim=4, num_tasks=2, num_experts=3)(torch.zeros(5, 4))
    >>> plan.weights.shape
    torch.Size([5, 2, 3])
    """

    batch_invariant = True

    def __init__(self, in_dim: int, num_tasks: int, num_experts: int) -> None:
        super().__init__()
        self.num_tasks, self.num_experts = num_tasks, num_experts
        self.linear = nn.Linear(in_dim, num_tasks * num_experts)

    def forward(self, x_bd: Tensor) -> RoutingPlan:
        """x fp32 `[B, D]`."""
        logits = self.linear(x_bd.float()).view(-1, self.num_tasks, self.num_experts)
        return RoutingPlan(torch.softmax(logits, dim=-1))
