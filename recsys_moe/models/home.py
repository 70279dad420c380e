"""HoME, a hierarchy of multi-gate experts (Kuaishou, arXiv 2408.05430).

    Sum(w, {e_i}) = Σ_i w_i·e_i,   G(x) = softmax(W·x + b) over the experts in the braces beside it
    meta layer, of the shared group and of each category C of tasks:
        z_shared = Sum(G_shared(v), {E_shared, E_C1, E_C2, …}) + Sum(Self_shared(v), {E_shared})
        z_C      = Sum(G_C(v), {E_shared, E_C}) + Sum(Self_C(v), {E_C})
    task layer, of task t in category C:
        z_t      = Sum(G_t(z_C ⊕ z_shared), {E'_shared(z_shared), E'_C(z_C), E_t(z_C)}) + Sum(Self_t(z_C), {E_t})
        ŷ_t      = Tower_t(z_t)
    expert normalization:   E(x) = Swish(BatchNorm(MLP(x ⊙ Fea_Gate(x))))
    feature gate:           Fea_Gate(x) = Sum(softmax(W·x + b), {Fea_LoRA_1(x), …, Fea_LoRA_L(x)}),   Fea_LoRA(x) = 2·σ(A·B·x)
    self gate:              Self(x) = softmax(W·x + b), of a single expert σ(W·x + b)

v is the input of a row, ⊕ joins two vectors, ⊙ multiplies element by element; E stands for a group of experts, and every group
has a feature gate of its own.

Written from memory of the paper, where public ports disagree or the paper leaves it open: the task layer's experts read the z
of their own group; self gates are linear, read what their group's feature gate reads, and stand in both layers beside a gate of
their own only (the task layer's shared and category groups have none); of an MLP of several layers, norm and Swish follow each.

Shapes: B rows, D inputs, C categories, T tasks, G groups of n experts, L heads of a feature gate, H expert units.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_moe.errors import UserError, nearest
from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.kernels import Activation, FeatureGate
from recsys_moe.models.family import Family
from recsys_moe.routing import (
    PlanNames,
    RoutingPlan,
    SoftPlan,
    SoftRouter,
    Units,
    UnitStack,
    joined,
    sigmoid,
    stack_units,
    unit_products,
)
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class HoMEConfig:
    """Experts a group and their widths, hidden widths of the towers, width of each feature's embedding, and HoME's parts.

    `categories` names each task's category, as `{like: interaction, comment: interaction, long_view: watch_time}`; without it
    the schema's `category` of each task counts (see `recsys_moe.models.settle`), and where there is no schema all are of one.
    `dropout` is of the embeddings and of the experts' units; `norm` is the towers'.

    Each part can be switched off: `expert_norm` (experts are then ReLU(MLP(x)), as MMoE's), `hierarchy_mask` (every gate then
    sees every expert of its layer), `feature_gates` (0 heads: none), `self_gates`, `task_experts`.
    """

    name: Literal["home"] = "home"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    categories: dict[str, str] | None = None
    experts_per_group: Annotated[int, Field(ge=1)] = 2
    expert_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (64,)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    expert_norm: bool = True
    hierarchy_mask: bool = True
    feature_gates: Annotated[int, Field(ge=0)] = 2
    self_gates: bool = True
    task_experts: bool = True


HoMELayer = tuple[SoftRouter, "SelfGates | None", "ExpertGroups", tuple[int, ...], tuple[tuple[int, ...], ...]]
"""A layer's gates, self gates and experts, the input that each group reads, and those that each gate reads in turn."""


class HoME(Family):
    """v `[B, D]` → outputs `[B, Σ widths]` and the plans of both layers, "meta" (gates of the shared group and of each
    category) and "task". `tasks` has the width of each task's tower by its name, `dtype` is the precision of the experts and
    of their feature gates; softmax and self gates and the towers are fp32.

    Raises:
        UserError: `categories` that leave a task out, name one that the schema does not have, or are called like a task.

    >>> config = HoMEConfig(categories={"like": "interaction", "share": "interaction", "finish": "watch_time"})
    >>> model = HoME(config, in_dim=12, tasks={"like": 1, "share": 1, "finish": 3}, dtype=torch.float32).eval()
    >>> outputs, plans = model(torch.zeros(5, 12))
    >>> outputs.shape, plans["meta"].weights.shape, plans["task"].weights.shape
    (torch.Size([5, 5]), torch.Size([5, 3, 6]), torch.Size([5, 3, 12]))
    >>> model.plan_names["meta"].gates, model.plan_names["task"].experts[-2:]
    (('shared', 'interaction', 'watch_time'), ('finish 0', 'finish 1'))
    """

    def __init__(self, config: HoMEConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        category_of = categories_of(config.categories, tuple(tasks))
        categories = list(dict.fromkeys(category_of))
        n, width = config.experts_per_group, config.expert_dims[-1]
        # Groups and inputs of both layers: the shared one is 0, category c is 1 + c; the task layer's own groups follow.
        of_task = tuple(1 + categories.index(c) for c in category_of)
        meta = ["shared", *categories]
        task = [*meta, *tasks] if config.task_experts else meta
        self.of_task, self.meta_source = of_task, (0,) * len(meta)
        self.task_source = (*range(len(meta)), *of_task) if config.task_experts else tuple(range(len(meta)))

        sees_meta = [list(range(len(meta))), *([0, c] for c in range(1, len(meta)))]
        own_task = [[len(meta) + t] if config.task_experts else [] for t in range(len(tasks))]
        sees_task = [[0, c, *own] for c, own in zip(of_task, own_task, strict=True)]
        if not config.hierarchy_mask:
            sees_meta, sees_task = [list(range(len(meta)))] * len(meta), [list(range(len(task)))] * len(tasks)
        self.meta_gates = SoftRouter(in_dim, len(meta), n * len(meta), group_mask(sees_meta, len(meta), n))
        self.task_gates = SoftRouter(2 * width, len(tasks), n * len(task), group_mask(sees_task, len(task), n))
        self.meta_self = self.task_self = None
        if config.self_gates:
            self.meta_self = SelfGates(in_dim, group_mask([[g] for g in range(len(meta))], len(meta), n))
        if config.self_gates and config.task_experts:
            self.task_self = SelfGates(width, group_mask(own_task, len(task), n))
        self.meta_experts = ExpertGroups(config, len(meta), in_dim, dtype)
        self.task_experts = ExpertGroups(config, len(task), width, dtype)
        self.towers = Towers(width, config.tower_dims, config.norm, tuple(tasks.values()))

        def names(groups: list[str]) -> tuple[str, ...]:
            return tuple(f"{group} {e}" for group in groups for e in range(n))

        self._kept = dict[SoftRouter, UnitStack]()  # what `freeze` has joined
        self.plan_names = {"meta": PlanNames(tuple(meta), names(meta)), "task": PlanNames(tuple(tasks), names(task))}

    def freeze(self) -> None:
        """Join the gates' weights once, for inference from now on: they must not change any more."""
        with torch.no_grad():
            self._kept = {layer[0]: self._units(*layer) for layer in (self._meta_layer, self._task_layer)}

    def forward(self, v_bd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        meta, z_bgh = self._layer(v_bd, *self._meta_layer)  # z_shared, z_C1, z_C2, …
        task, z_bth = self._layer(z_bgh, *self._task_layer)
        return self.towers(z_bth), {"meta": meta, "task": task}

    @property
    def _meta_layer(self) -> "HoMELayer":
        return self.meta_gates, self.meta_self, self.meta_experts, self.meta_source, (self.meta_source,)

    @property
    def _task_layer(self) -> "HoMELayer":
        shared = (0,) * len(self.of_task)
        return self.task_gates, self.task_self, self.task_experts, self.task_source, (self.of_task, shared)  # z_C ⊕ z_shared

    def _layer(
        self,
        x: Tensor,
        gates: SoftRouter,
        self_gates: "SelfGates | None",
        experts: "ExpertGroups",
        source: tuple[int, ...],
        sources: tuple[tuple[int, ...], ...],
    ) -> tuple[SoftPlan, Tensor]:
        """A layer's plan and z. All that is linear in its gates is one product for each input: groups read `source`, the gates
        `sources`, one after the other, and the self gates the first of these."""
        units = self._kept.get(gates) or self._units(gates, self_gates, experts, source, sources)
        logits = unit_products(x, units, not (self.training or torch.is_grad_enabled()))
        rest = iter(logits[len(sources) :])
        residual = None if self_gates is None else self_gates(next(rest))
        plan = gates(x, logits_bn=joined(logits[: len(sources)]), residual_bte=residual)
        gate = None if experts.feature_gate is None else experts.feature_gate(next(rest))
        return plan, plan.mix(experts.experts(x, source, gate))

    def _units(
        self,
        gates: SoftRouter,
        self_gates: "SelfGates | None",
        experts: "ExpertGroups",
        source: tuple[int, ...],
        sources: tuple[tuple[int, ...], ...],
    ) -> UnitStack:
        stacks = gates.products(*sources)
        if self_gates is not None:
            stacks += self_gates.router.products(sources[0])
        if experts.feature_gate is not None:
            stacks.append(experts.feature_gate.units(source))
        return stack_units(stacks)


class ExpertGroups(nn.Module):
    """G groups of n experts, and their feature gates."""

    def __init__(self, config: HoMEConfig, groups: int, in_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.feature_gate = FeatureGates(groups, in_dim, config.feature_gates, dtype) if config.feature_gates else None
        experts = groups * config.experts_per_group
        norm: Norm = "batch" if config.expert_norm else "none"
        activation: Activation = "silu" if config.expert_norm else "relu"
        self.experts = MLPExperts(experts, in_dim, config.expert_dims, norm, config.dropout, activation=activation, dtype=dtype)


class FeatureGates(nn.Module):
    """Fea_Gate of G groups: the logits of their softmax, fp32 `[B, G·L]` → the gates' parts. `units` makes the logits: group g
    reads input `source[g]`.

    The L heads of a group have rank ⌊D/L⌋, at least 1 (B: D → D/L, A: D/L → D). A starts at zero and the gate therefore at 1.

    >>> from recsys_moe.kernels import feature_gate_values
    >>> x, source = torch.randn(5, 6), (0, 0, 0)
    >>> gates = FeatureGates(3, 6, heads=2, dtype=torch.float32)
    >>> gate = gates(*unit_products(x, stack_units([gates.units(source)]), invariant=False))
    >>> feature_gate_values(x, gate, source).allclose(torch.ones(5, 3, 6))
    True
    """

    def __init__(self, groups: int, in_dim: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        rank = max(1, in_dim // heads)
        self.down = MLPExperts(groups * heads, in_dim, (), linear_out=rank, bias=False, dtype=dtype)
        self.up = MLPExperts(groups * heads, rank, (), linear_out=in_dim, bias=False, dtype=dtype)
        nn.init.zeros_(self.up.weights[0])
        self.weigh = MLPExperts(groups, in_dim, (), linear_out=heads)

    def units(self, source: tuple[int, ...]) -> Units:
        (weigh,) = self.weigh.layers()
        assert weigh.bias is not None
        heads = weigh.weight.shape[1]
        return Units(weigh.weight.flatten(0, 1), weigh.bias.flatten(), tuple(s for s in source for _ in range(heads)))

    def forward(self, logits_bn: Tensor) -> FeatureGate:
        (down,), (up,) = self.down.layers(), self.up.layers()
        return FeatureGate(logits_bn.unflatten(1, (self.weigh.weights[0].shape[0], -1)), down.weight, up.weight)


class SelfGates(nn.Module):
    """Self of T gates over the experts of their own (`own_te`, as many for each): the router's logits `[B, n]` → weights, fp32
    `[B, T, E]`, 0 for the others.

    >>> gates = SelfGates(4, torch.tensor([[True, False], [False, True]]))
    >>> gates(gates.router.pair_logits(torch.zeros(1, 2, 4), (0, 1))).shape
    torch.Size([1, 2, 2])
    """

    def __init__(self, in_dim: int, own_te: Tensor) -> None:
        super().__init__()
        self.router = SoftRouter(in_dim, own_te.shape[0], own_te.shape[1], own_te)

    def forward(self, logits_bn: Tensor) -> Tensor:
        logits_btn = logits_bn.unflatten(1, (self.router.num_tasks, -1))
        weights_btn = sigmoid(logits_btn) if logits_btn.shape[2] == 1 else logits_btn.softmax(2)
        return self.router.spread(weights_btn.flatten(1))


def categories_of(categories: Mapping[str, str] | None, tasks: tuple[str, ...]) -> list[str]:
    """Each task's category.

    >>> categories_of({"finish": "watch_time", "like": "interaction"}, ("like", "finish"))
    ['interaction', 'watch_time']
    """
    if categories is None:
        return ["all tasks"] * len(tasks)
    for task in categories:
        if task not in tasks:
            raise UserError(f"model.categories names the task {task!r}, which the schema does not have; {nearest(task, tasks)}")
    for task in tasks:
        if task not in categories:
            raise UserError(f"model.categories has no category for the task {task!r}; add {task}: CATEGORY")
    for category in categories.values():
        if category in ("shared", *tasks):
            raise UserError(f"model.categories calls a category {category!r}, as a task or the shared experts; rename it")
    return [categories[task] for task in tasks]


def group_mask(groups_of_gates: list[list[int]], groups: int, n: int) -> Tensor:
    """Which experts each gate sees, bool `[T, G·n]`, from the groups that it sees.

    >>> group_mask([[0], [0, 1]], 2, 2).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    return torch.tensor([[g in seen for g in range(groups)] for seen in groups_of_gates]).repeat_interleave(n, 1)
