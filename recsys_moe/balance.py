"""Balance of a sparse layer: capacity, the losses that even out the load, and what a plan looks like in numbers.

Each loss is a function of one layer's plan. Add losses over layers (`sum_over_layers`), never counts: pooled over layers,
one layer's overload cancels another's.

Shapes: R routed rows, K slots a row, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from recsys_moe.kernels import sort_by_expert
from recsys_moe.routing import RoutingPlan, SoftPlan, SparsePlan

# -- capacity


def apply_capacity(
    plan: SparsePlan, capacity_factor: float, policy: Literal["position", "weight", "random"] = "position"
) -> SparsePlan:
    """The plan with at most C = ⌈`capacity_factor` · chosen slots / E⌉ slots an expert; the others are dropped (id −1).

    For training only, before the experts run: a row's plan then depends on its batch, which serving refuses
    (`require_invariant`). Weights of what is left stay as they are; `plan.dropped_rows` have nothing left.

    Args:
        policy: who stays: `"position"`, first choices before second ones, then earlier rows (GShard, 2006.16668; Switch,
            2101.03961); `"weight"`, larger weights (batch-prioritised routing, 2106.05974); `"random"`.

    Raises:
        ValueError: a capacity factor ≤ 0; an unknown policy.

    >>> from recsys_moe.routing import sparse_plan
    >>> plan = sparse_plan(torch.tensor([[0], [0], [0], [1]], dtype=torch.int32), torch.ones(4, 1), 2)
    >>> capped = apply_capacity(plan, capacity_factor=1.0)
    >>> capped.expert_ids.flatten().tolist(), capped.dropped_rows.tolist()
    ([0, 0, -1, 1], [False, False, True, False])
    """
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor is {capacity_factor}; it must be > 0 (1: no expert takes more than an even share)")
    rows, k = plan.expert_ids.shape
    slots, device = rows * k, plan.expert_ids.device
    if policy == "position":
        queue = torch.arange(slots, device=device).view(rows, k).t().reshape(-1)
    elif policy == "weight":
        queue = torch.sort(plan.weights.detach().reshape(-1), descending=True, stable=True).indices
    elif policy == "random":
        queue = torch.randperm(slots, device=device)
    else:
        raise ValueError(f"policy is {policy!r}; valid: 'position', 'weight', 'random'")
    # Sorting the queue by expert keeps its order within each: a slot's place behind its expert's first one is its rank.
    ids = plan.expert_ids.reshape(-1)[queue]
    order, offsets = sort_by_expert(ids.unsqueeze(1), plan.num_experts)
    ids = ids[order.long()]
    rank = torch.arange(slots, device=device) - offsets[ids.clamp_min(0).long()]
    capacity = torch.ceil(offsets[-1] * capacity_factor / plan.num_experts)
    kept = torch.empty_like(ids, dtype=torch.bool).scatter(0, queue[order.long()], rank < capacity).view(rows, k)
    ids_rk = torch.where(kept, plan.expert_ids, -1)
    order, offsets = sort_by_expert(ids_rk, plan.num_experts)
    weights_rk = torch.where(ids_rk < 0, 0, plan.weights)
    return replace(plan, expert_ids=ids_rk, weights=weights_rk, order=order, offsets=offsets)


# -- losses of one layer


def sum_over_layers(loss: Callable[[SparsePlan], Tensor], plans: Sequence[SparsePlan]) -> Tensor:
    """Σ over the layers of the loss of each layer's own plan."""
    return torch.stack([loss(plan) for plan in plans]).sum()


def expert_load(plan: SparsePlan) -> Tensor:
    """fp32 `[E]`: how many slots chose each expert, dropped ones included: what balance is about, and `update_bias`."""
    ids = plan.chosen_ids.reshape(-1).long()
    counts = torch.zeros(plan.num_experts, device=ids.device)
    return counts.scatter_add(0, ids.clamp_min(0), (ids >= 0).float())


def auxiliary_loss(plan: SparsePlan) -> Tensor:
    """L = E · Σ_e f_e·P_e: f_e the share of the slots that chose e, P_e its mean probability (Switch, 2101.03961, eq. 4).

    1 when even, up to E when all rows insist on one expert. GShard's (2006.16668) is this one over E². With k choices a row f
    is a share of all R·K of them, as in DeepSeekMoE (2401.06066); transformers' loss is k times this one.

    >>> from recsys_moe.routing import sparse_plan
    >>> even, one = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([[0], [0]], dtype=torch.int32)
    >>> auxiliary_loss(sparse_plan(even, torch.ones(2, 1), 2, logits=torch.zeros(2, 2))).item()
    1.0
    >>> auxiliary_loss(sparse_plan(one, torch.ones(2, 1), 2, logits=torch.tensor([[99.0, 0.0]] * 2))).item()
    2.0
    """
    load_e = expert_load(plan)
    share_e = load_e / load_e.sum().clamp_min(1)
    return plan.num_experts * (share_e * _mean(plan.probabilities)).sum()


def importance_loss(plan: RoutingPlan) -> Tensor:
    """CV² of the experts' importance, the sum of the weights that the rows give them (Shazeer et al., 1701.06538, eq. 6–7).

    >>> importance_loss(SoftPlan(torch.zeros(5, 2, 4))).item()
    0.0
    """
    return _cv_squared(_weights(plan).sum(0))


def load_loss(plan: SparsePlan) -> Tensor:
    """CV² of the experts' smooth load, Σ over rows of the chance to be chosen (Shazeer et al., 1701.06538, eq. 8–11).

    Raises:
        ValueError: a plan that no noisy top-k router made in training.

    >>> from recsys_moe.routing import NoisyTopKRouter
    >>> plan = NoisyTopKRouter(4, num_experts=3, k=3)(torch.zeros(5, 4))
    >>> load_loss(plan).item()
    0.0
    """
    if plan.chance is None:
        raise ValueError("the load loss needs the chances of a NoisyTopKRouter in training mode; this plan has none")
    return _cv_squared(plan.chance.sum(0))


def z_loss(plan: RoutingPlan) -> Tensor:
    """mean over rows of logsumexp(logits)²: keeps a router's logits small (ST-MoE, Zoph et al., 2202.08906, eq. 5).

    Raises:
        ValueError: a plan without logits.

    >>> round(z_loss(SoftPlan(torch.zeros(5, 2, 4))).item(), 4)  # ln² 4
    1.9218
    """
    if plan.logits is None:
        raise ValueError("this plan has no logits (a hash or random router made it): there is no z-loss")
    logits = plan.masked_logits.flatten(0, 1) if isinstance(plan, SoftPlan) else plan.logits
    return _mean(torch.logsumexp(logits, dim=-1).square())


def entropy_loss(plan: RoutingPlan) -> Tensor:
    """mean over rows of −Σ_e P_e·ln P_e: keeps top-p routing sparse (Huang et al., 2403.07652).

    >>> round(entropy_loss(SoftPlan(torch.zeros(5, 2, 4))).item(), 4)  # ln 4
    1.3863
    """
    return _mean(_entropy(plan.weights.flatten(0, 1) if isinstance(plan, SoftPlan) else plan.probabilities))


# -- statistics


@dataclass(frozen=True)
class PlanStatistics:
    """How a plan uses its experts. For soft plans load and importance are the same thing.

    Fields:
        load: fp32 `[E]`, each expert's share of the chosen slots (soft: mean weight); sums to 1.
        importance: fp32 `[E]`, mean over rows of the weight on each expert.
        entropy: mean over rows of the entropy of the router's probabilities, in nats (of the weights where the router has
            no probabilities): 0 is certain, ln E is indifferent.
        dropped_share: share of the chosen slots that capacity dropped.
        dead_experts: experts that no row uses.
    """

    load: Tensor
    importance: Tensor
    entropy: float
    dropped_share: float
    dead_experts: tuple[int, ...]


@torch.no_grad()
def plan_statistics(plan: RoutingPlan) -> PlanStatistics:
    """What to log of a layer's plan; for use outside of compiled code.

    >>> from recsys_moe.routing import sparse_plan
    >>> plan = sparse_plan(torch.tensor([[0], [2], [0], [0]], dtype=torch.int32), torch.ones(4, 1), 3)
    >>> statistics = plan_statistics(apply_capacity(plan, capacity_factor=1.5))
    >>> statistics.load.tolist(), statistics.dropped_share, statistics.dead_experts
    ([0.75, 0.0, 0.25], 0.25, (1,))
    """
    weights_re = _weights(plan)
    importance_e = _mean(weights_re)
    if isinstance(plan, SoftPlan):
        load_e, dropped_share, probabilities_re = importance_e, 0.0, weights_re
    else:
        load_e = expert_load(plan)
        chosen = load_e.sum().clamp_min(1)
        load_e, dropped_share = load_e / chosen, float(plan.dropped.sum() / chosen)
        probabilities_re = weights_re / weights_re.sum(-1, keepdim=True).clamp_min(1e-20)
        if plan.logits is not None:
            probabilities_re = plan.probabilities
    dead = tuple((load_e == 0).nonzero().flatten().tolist())
    return PlanStatistics(load_e, importance_e, float(_mean(_entropy(probabilities_re))), dropped_share, dead)


def _weights(plan: RoutingPlan) -> Tensor:
    """`[R, E]`"""
    return plan.weights.flatten(0, 1) if isinstance(plan, SoftPlan) else plan.dense_weights


def _mean(x: Tensor) -> Tensor:
    """Over the rows; 0 where there is none, so that an empty batch adds nothing to a loss."""
    return x.sum(0) / max(x.shape[0], 1)


def _entropy(probabilities_re: Tensor) -> Tensor:
    return torch.special.entr(probabilities_re).sum(-1)


def _cv_squared(x_e: Tensor) -> Tensor:
    """(standard deviation / mean)², 0 for zeros."""
    return x_e.var(correction=0) / x_e.mean().square().clamp_min(1e-10)
