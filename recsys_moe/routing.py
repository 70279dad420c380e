"""Routers: features → `RoutingPlan`, the one description of which experts a row uses and how much.

Shapes: B rows, D inputs, E experts, T tasks (gates) a row, R = B·T routed rows (a row's tasks one after the other),
K slots a routed row. Router arithmetic is fp32, whatever the precision of the input and of autocast.

A router with `batch_invariant` gives a row, at inference (evaluation mode, no gradients), the same bits whatever rows come
with it; serving takes no other (`require_invariant`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.errors import UserError
from recsys_moe.kernels import (
    Layer,
    Scoring,
    check_choice,
    check_finite,
    expert_mlp,
    gate_mix,
    route,
    route_topk,
    sort_by_expert,
)


@dataclass(frozen=True, eq=False)
class SoftPlan:
    """Each of T tasks uses all the experts that its mask allows, by the softmax of its logits; there is nothing to sort.

    `logits` is fp32 `[B, T, E]`, `mask_te` bool `[T, E]` (None: every task sees every expert). `residual`, fp32 `[B, T, E]`,
    are weights beside the softmax's (HoME's self gates).

    >>> SoftPlan(torch.zeros(1, 1, 3), torch.tensor([[True, False, True]])).weights
    tensor([[[0.5000, 0.0000, 0.5000]]])
    """

    logits: Tensor
    mask_te: Tensor | None = None
    residual: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    def mix(self, experts_beh: Tensor) -> Tensor:
        """Each task's weighted sum of the experts' outputs, fp32 or bf16 `[B, E, H]` → fp32 `[B, T, H]`."""
        return gate_mix(self.logits, experts_beh, mask_te=self.mask_te, residual_bte=self.residual)

    @property
    def masked_logits(self) -> Tensor:
        """`[B, T, E]`, −inf where the mask forbids."""
        return self.logits if self.mask_te is None else self.logits.masked_fill(~self.mask_te, -torch.inf)

    @property
    def weights(self) -> Tensor:
        """The softmax: `[B, T, E]` fp32, non-negative, sum to 1 over the experts."""
        return torch.softmax(self.masked_logits, dim=-1)

    @property
    def dense_weights(self) -> Tensor:
        """fp32 `[B·T, E]`: each routed row's weight on each expert, as a sparse plan has it."""
        return self.weights.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """Each of R routed rows uses the experts in its K slots; −1 is a slot without an expert, so k may vary by row.

    Fields:
        expert_ids: int32 `[R, K]`, the experts that run.
        chosen_ids: int32 `[R, K]`, the experts that the router chose: more than run where capacity dropped some.
        weights: fp32 `[R, K]`, 0 where there is no expert.
        order, offsets: int32 `[R·K]` and `[E + 1]`, the slots sorted by expert (`sort_by_expert` of `expert_ids`).
        logits: fp32 `[R, E]` without noise; None where the router has none (hash, random).
        scoring: what turns the logits into probabilities.
        chance: fp32 `[R, E]`, of noisy top-k in training: how likely a fresh draw of an expert's noise chooses it.
        unit_norm: experts' outputs are scaled to length 1 before they are summed (norm-based routing).

    >>> plan = sparse_plan(torch.tensor([[2, 0], [2, -1]], dtype=torch.int32), torch.tensor([[0.7, 0.3], [0.9, 0.0]]), 3)
    >>> plan.order.tolist(), plan.offsets.tolist()
    ([1, 0, 2, 3], [0, 1, 1, 3])
    >>> plan.dense_weights
    tensor([[0.3000, 0.0000, 0.7000],
            [0.0000, 0.0000, 0.9000]])
    """

    expert_ids: Tensor
    chosen_ids: Tensor
    weights: Tensor
    order: Tensor
    offsets: Tensor
    logits: Tensor | None = None
    scoring: Literal["softmax", "sigmoid", "softplus"] = "softmax"
    chance: Tensor | None = None
    unit_norm: bool = False

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def probabilities(self) -> Tensor:
        """fp32 `[R, E]`, sum to 1: what the balance losses push on. Sigmoid and softplus scores are divided by their sum.

        Raises:
            ValueError: a router without logits.
        """
        if self.logits is None:
            raise ValueError("this plan has no logits (a hash or random router made it), so there is nothing to balance")
        if self.scoring == "softmax":
            return torch.softmax(self.logits, dim=-1)
        scores = torch.sigmoid(self.logits) if self.scoring == "sigmoid" else F.softplus(self.logits)
        return scores / (scores.sum(-1, keepdim=True) + 1e-20)

    @property
    def dense_weights(self) -> Tensor:
        """fp32 `[R, E]`: each row's weight on each expert."""
        rows, experts = self.expert_ids.shape[0], self.num_experts
        column = torch.where(self.expert_ids < 0, experts, self.expert_ids).long()
        return self.weights.new_zeros(rows, experts + 1).scatter_add(1, column, self.weights)[:, :experts]

    @property
    def dropped(self) -> Tensor:
        """bool `[R, K]`: slots that capacity emptied."""
        return self.expert_ids != self.chosen_ids

    @property
    def dropped_rows(self) -> Tensor:
        """bool `[R]`: rows that no expert sees, all dropped or never chosen. Their sum of experts is 0: pass them by."""
        return (self.expert_ids < 0).all(1)


RoutingPlan = SoftPlan | SparsePlan


@dataclass(frozen=True)
class PlanNames:
    """What a plan's T gates and E experts are called."""

    gates: tuple[str, ...]
    experts: tuple[str, ...]


# `torch.export` returns plans only if it may take them apart.
for _plan in (SoftPlan, SparsePlan):
    torch.export.register_dataclass(_plan)


def sparse_plan(ids_rk: Tensor, weights_rk: Tensor, num_experts: int, **fields: Any) -> SparsePlan:
    """The plan of these experts (int32 `[R, K]`, −1: none) and weights, sorted; `fields` are the plan's other fields."""
    order, offsets = sort_by_expert(ids_rk, num_experts)
    return SparsePlan(ids_rk, ids_rk, weights_rk, order, offsets, **fields)


class PlanWatcher:
    """A router's forward hook that looks at plans and at nothing else, so that an operator which routes on its way can tell it,
    too. Any other hook, on whatever module, sees the modules run one by one.
    """

    def __init__(self, tell: Callable[[SparsePlan], None]) -> None:
        self.tell = tell

    def __call__(self, router: nn.Module, inputs: tuple[Any, ...], plan: SparsePlan) -> None:
        self.tell(plan)


def require_invariant(model: nn.Module) -> None:
    """Check that a served row's output can't depend on the rows beside it; call it on whatever is going to serve.

    Other people's rows in the batch could crowd a row out of its experts (2402.05526) or read its input off its routing
    (2410.22884).

    Raises:
        ValueError: a router that looks at the whole batch or draws at random, one that is still in training mode (noise), or
            a module whose `capacity_factor` is set; it names the module, the value and the remedy.

    >>> require_invariant(SoftRouter(4, 1, 2).eval())
    >>> require_invariant(nn.Sequential(ExpertChoiceRouter(4, 2, capacity_factor=1.0)).eval())
    Traceback (most recent call last):
    ValueError: 0 (ExpertChoiceRouter) chooses by the whole batch or at random: serving needs a router with batch_invariant
    """
    for path, module in model.named_modules():
        name = f"{path or 'the model'} ({type(module).__name__})"
        if not getattr(module, "batch_invariant", True):
            raise ValueError(f"{name} chooses by the whole batch or at random: serving needs a router with batch_invariant")
        if hasattr(module, "batch_invariant") and module.training:
            raise ValueError(f"{name} is in training mode, where routers may add noise: call .eval() before serving")
        if (factor := getattr(module, "capacity_factor", None)) is not None:
            raise ValueError(f"{name} has capacity_factor {factor}, but serving drops nothing: set it to None (dropless)")


@contextlib.contextmanager
def finite_routers(told: Callable[[str], str] = str) -> Iterator[None]:
    """A router names the row whose logits are not finite, and can't know where it came from: here that becomes a UserError, in
    the words that `told` makes of it.

    >>> with finite_routers(lambda told: told.replace("the router", "gate 1")):
    ...     _ = SoftRouter(2, 1, 2)(torch.full((1, 2), torch.nan))
    Traceback (most recent call last):
    recsys_moe.errors.UserError: gate 1's logits of row 0 are not finite ([nan, nan] …); look at its input
    """
    try:
        yield
    except ValueError as error:
        if "logits of row" not in str(error):
            raise
        raise UserError(told(str(error))) from error


# -- arithmetic that gives a row the same bits in every batch


class Gate(nn.Linear):
    """x `[B, D]` → fp32 logits `[R, E]`: a linear layer for each of T tasks, in fp32 even under autocast.

    >>> Gate(3, num_experts=4, num_tasks=2)(torch.zeros(5, 3, dtype=torch.bfloat16)).shape
    torch.Size([10, 4])
    """

    def __init__(self, in_dim: int, num_experts: int, num_tasks: int = 1, bias: bool = False) -> None:
        if min(in_dim, num_experts, num_tasks) < 1:
            raise ValueError(
                f"a router of {in_dim} inputs, {num_experts} experts and {num_tasks} tasks: each must be at least 1"
            )
        super().__init__(in_dim, num_tasks * num_experts, bias=bias)
        self.num_experts = num_experts

    def forward(self, x_bd: Tensor) -> Tensor:
        """Raises ValueError for an input that isn't floating-point `[B, D]`."""
        if x_bd.dim() != 2 or x_bd.shape[1] != self.in_features or not x_bd.is_floating_point():
            raise ValueError(f"x_bd is {x_bd.dtype} {list(x_bd.shape)}, not floating-point [B, D] with D = {self.in_features}")
        with torch.autocast(x_bd.device.type, enabled=False):
            x_bd, weight, bias = x_bd.float(), self.weight.float(), None if self.bias is None else self.bias.float()
            # BLAS chooses its kernel by the number of rows and splits D among threads, so F.linear's bits depend on both; the
            # experts' product does not at inference, and for so few outputs it is the faster one in training.
            one_expert = Layer(weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0))
            inference = not (self.training or torch.is_grad_enabled())
            return expert_mlp(x_bd, one_expert, invariant=inference).view(-1, self.num_experts)


# `torch.sigmoid` and `F.softplus` round the last few elements of a tensor in another way than the rest (a scalar tail after
# the vector loop), so a row's bits would depend on where it lies. Softmax and logsumexp go row by row.


def sigmoid(x: Tensor) -> Tensor:
    """1/(1 + e^−x) of each element, whose bits depend on it alone."""
    return torch.softmax(F.pad(x.unsqueeze(-1), (0, 1)), dim=-1)[..., 0]


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) of each element, whose bits depend on it alone."""
    return torch.logsumexp(F.pad(x.unsqueeze(-1), (0, 1)), dim=-1)


class Units(NamedTuple):
    """Linear units of which unit n reads input `source[n]`: weight `[N, D]`, bias `[N]` or None."""

    weight: Tensor
    bias: Tensor | None
    source: tuple[int, ...]


class UnitStack(NamedTuple):
    """Several stacks of units as one layer, in fp32: its units' inputs, and how many are whose."""

    layer: Layer
    source: tuple[int, ...]
    sizes: list[int]


def stack_units(units: Sequence[Units]) -> UnitStack:
    """All units side by side."""
    weight = torch.cat([stack.weight for stack in units]).float()
    biases = [stack.weight.new_zeros(len(stack.weight)) if stack.bias is None else stack.bias for stack in units]
    layer = Layer(weight.unsqueeze(1), torch.cat(biases).float().unsqueeze(1))
    return UnitStack(layer, tuple(chain.from_iterable(stack.source for stack in units)), [len(stack.weight) for stack in units])


def unit_products(x: Tensor, units: UnitStack, invariant: bool) -> list[Tensor]:
    """w_n·x_source[n] + b_n, fp32 `[B, N]`, for each of the stacks: one product for each input of `[B, S, D]`, or the one
    `[B, D]`.

    >>> stacks = [Units(torch.ones(2, 3), None, (1, 0)), Units(torch.ones(1, 3), torch.ones(1), (1,))]
    >>> first, second = unit_products(torch.tensor([[[1.0, 2, 3], [4, 5, 6]]]), stack_units(stacks), invariant=True)
    >>> first.tolist(), second.tolist()
    ([[15.0, 6.0]], [[16.0]])
    """
    with torch.autocast(x.device.type, enabled=False):
        outputs = expert_mlp(x.float(), units.layer, source=units.source, invariant=invariant).squeeze(2)
    return list(outputs.split(units.sizes, 1))


def joined(products: list[Tensor]) -> Tensor:
    """Their sum, from the first on."""
    return functools.reduce(torch.add, products)


# -- soft


class SoftRouter(nn.Module):
    """One softmax gate per task over the experts it may use: g_t(x) = softmax over mask_t of (W_t·x + b_t), in fp32.

    Without a mask that is MMoE (Ma et al., KDD 2018); with one CGC (Tang et al., RecSys 2020: shared experts and the task's
    own) or HoME (2408.05430: the experts of the task's group). There are weights for what the mask allows, and no others.

    The input is `[B, D]`, one for all gates, or `[B, S, ·]`, of which gate t reads input `source[t]`; with several sources it
    reads their inputs one after the other, which are D wide together.

    Args:
        mask_te: bool `[T, E]`; each task needs at least one expert.

    Raises:
        ValueError: a mask of another shape, or one that leaves a task no expert; in forward, an input of another shape or
            dtype, sources that do not fit it, logits that are not finite.

    >>> mask = torch.tensor([[True, True, False], [False, True, True]])
    >>> plan = SoftRouter(in_dim=4, num_tasks=2, num_experts=3, mask_te=mask)(torch.zeros(5, 4))
    >>> plan.weights.shape, plan.weights[0, 0, 2].item()
    (torch.Size([5, 2, 3]), 0.0)
    """

    batch_invariant = True

    def __init__(self, in_dim: int, num_tasks: int, num_experts: int, mask_te: Tensor | None = None) -> None:
        super().__init__()
        self.num_tasks, self.num_experts = num_tasks, num_experts
        if mask_te is not None:
            if mask_te.dtype != torch.bool or mask_te.shape != (num_tasks, num_experts):
                raise ValueError(
                    f"mask_te is {mask_te.dtype} {list(mask_te.shape)}, not bool [T, E] = {[num_tasks, num_experts]}"
                )
            if len(without := (~mask_te.any(1)).nonzero().flatten()):
                raise ValueError(f"mask_te leaves task {int(without[0])} no expert: allow each task at least one")
            if bool(mask_te.all()):
                mask_te = None
        self._counts = [num_experts] * num_tasks if mask_te is None else mask_te.sum(1).tolist()
        self.linear = Gate(in_dim, sum(self._counts), bias=True)
        self.mask_te: Tensor | None
        self.register_buffer("mask_te", mask_te, persistent=False)
        self.place: Tensor | None
        self.register_buffer("place", None if mask_te is None else mask_te.flatten().nonzero().flatten(), persistent=False)

    def forward(
        self, x: Tensor, *sources: tuple[int, ...], logits_bn: Tensor | None = None, residual_bte: Tensor | None = None
    ) -> SoftPlan:
        """`logits_bn`: `pair_logits`, where they are there already."""
        logits_bn = self.pair_logits(x, *sources) if logits_bn is None else logits_bn
        check_finite(logits_bn)
        return SoftPlan(self.spread(logits_bn), self.mask_te, residual_bte)

    def pair_logits(self, x: Tensor, *sources: tuple[int, ...]) -> Tensor:
        """The logits of what the mask allows, gate by gate: fp32 `[B, n]`."""
        if x.dim() == 2 and not sources:
            return self.linear(x).flatten(1)
        gates, width = [len(source) for source in sources], x.shape[-1] * len(sources)
        if x.dim() != 3 or not x.is_floating_point() or width != self.linear.in_features or {*gates} != {self.num_tasks}:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} with sources of {gates} gates: it must be floating-point [B, D], or [B, S, ·] "
                f"with sources of {self.num_tasks} gates, {self.linear.in_features} wide together"
            )
        inference = not (self.training or torch.is_grad_enabled())
        return joined(unit_products(x, stack_units(self.products(*sources)), inference))

    def products(self, *sources: tuple[int, ...]) -> list[Units]:
        """The logits as products of one input each, to be added up: W·(a ⊕ b) = W_a·a + W_b·b, and nothing is joined."""
        weights, biases = self.linear.weight.chunk(len(sources), 1), [self.linear.bias, *[None] * (len(sources) - 1)]
        reads = [tuple(s for s, count in zip(source, self._counts, strict=True) for _ in range(count)) for source in sources]
        return [Units(*units) for units in zip(weights, biases, reads, strict=True)]

    def spread(self, values_bn: Tensor) -> Tensor:
        """What each allowed pair has, `[B, n]`, where it lies in `[B, T, E]`; 0 elsewhere."""
        if self.place is not None:
            size = self.num_tasks * self.num_experts
            values_bn = values_bn.new_zeros(values_bn.shape[0], size).index_copy(1, self.place, values_bn)
        return values_bn.view(-1, self.num_tasks, self.num_experts)


# -- the k best


class TopKRouter(nn.Module):
    """The k experts of the largest score, s = softmax or sigmoid of W·x, each with its score as weight.

    What the published routers are made of:

    - `scoring="softmax"`, with `renormalize` (weights divided by their sum) Mixtral (2401.04088), without Qwen1.5-MoE,
      DeepSeekMoE (2401.06066); `scoring="softmax_after"`, softmax over the k chosen logits only: gpt-oss.
    - `scoring="sigmoid"` with `correction_bias`: b_e is added to the scores for the choice only, and `update_bias` moves it
      towards an even load (DeepSeek-V3, 2412.19437; Wang et al., 2408.15664).
    - `num_groups` > 1: only the `topk_groups` groups of the largest group score are open (ties to the lowest group);
      a group's score is its best expert's (`"max"`, DeepSeek-V2, 2405.04434) or the sum of its two best (`"top2_sum"`,
      DeepSeek-V3).
    - `scale` multiplies the weights in the end (DeepSeek's routed_scaling_factor).

    With `num_tasks` = T there are T gates a row, for MMoE with sparse gates, and one bias for all of them.

    Raises:
        ValueError: k > E; an unknown scoring or group score; groups that don't divide E or can't hold k experts; in forward,
            logits that are not finite.

    >>> router = TopKRouter(3, num_experts=3, k=2, renormalize=True)
    >>> _ = nn.init.eye_(router.linear.weight)
    >>> plan = router(torch.tensor([[0.0, 2.0, 2.0]]))
    >>> plan.expert_ids.tolist(), plan.weights.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """

    batch_invariant = True

    def __init__(
        self,
        in_dim: int,
        num_experts: int,
        k: int,
        *,
        num_tasks: int = 1,
        scoring: Scoring = "softmax",
        renormalize: bool = False,
        bias: bool = False,
        correction_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: Literal["max", "top2_sum"] = "max",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice(k, num_experts, scoring=scoring)
        if group_score not in ("max", "top2_sum"):
            raise ValueError(f"group_score is {group_score!r}; valid: 'max', 'top2_sum'")
        self.k, self.scoring, self.renormalize, self.scale = k, scoring, renormalize, scale
        self.num_groups, self.topk_groups, self.group_score = num_groups, topk_groups, group_score
        self._check_groups(num_experts)
        self.linear = Gate(in_dim, num_experts, num_tasks, bias)
        self.correction_bias: Tensor | None
        self.register_buffer("correction_bias", torch.zeros(num_experts) if correction_bias else None)

    def forward(self, x_bd: Tensor) -> SparsePlan:
        if self.num_groups == 1 and not (self.training or torch.is_grad_enabled()):
            gate = self.linear
            ids_rk, weights_rk, order, offsets, logits_re = route(
                x_bd,
                gate.weight,
                gate.bias,
                gate.num_experts,
                self.k,
                scoring=self.scoring,
                renormalize=self.renormalize,
                bias_e=self.correction_bias,
                scale=self.scale,
            )
            return SparsePlan(ids_rk, ids_rk, weights_rk, order, offsets, logits_re, self.plan_scoring)
        logits_re = self.linear(x_bd)
        allowed_re = None if self.num_groups == 1 else self._open_experts(logits_re.detach())
        ids_rk, weights_rk = route_topk(
            logits_re,
            self.k,
            scoring=self.scoring,
            renormalize=self.renormalize,
            bias_e=self.correction_bias,
            allowed_be=allowed_re,
        )
        if self.scale != 1:
            weights_rk = weights_rk * self.scale
        return sparse_plan(ids_rk, weights_rk, self.linear.num_experts, logits=logits_re, scoring=self.plan_scoring)

    @property
    def plan_scoring(self) -> Literal["softmax", "sigmoid"]:
        """What turns the plan's logits into probabilities."""
        return "sigmoid" if self.scoring == "sigmoid" else "softmax"

    @torch.no_grad()
    def update_bias(self, load_e: Tensor, rate: float) -> None:
        """b_e += rate·sign(mean load − load_e), once a step (2408.15664). `load_e` `[E]` counts the global batch.

        Raises:
            ValueError: a router without a correction bias.

        >>> router = TopKRouter(3, num_experts=3, k=1, scoring="sigmoid", correction_bias=True)
        >>> router.update_bias(torch.tensor([5.0, 0.0, 1.0]), rate=0.125)
        >>> router.correction_bias
        tensor([-0.1250,  0.1250,  0.1250])
        """
        if self.correction_bias is None:
            raise ValueError("this router has no correction bias to update: build it with correction_bias=True")
        load_e = load_e.to(self.correction_bias)
        self.correction_bias += rate * torch.sign(load_e.mean() - load_e)

    def _open_experts(self, logits_re: Tensor) -> Tensor:
        """bool `[R, E]`: the experts of the groups that are open to a row."""
        scores_re = logits_re
        if self.scoring != "softmax_after":
            scores_re = sigmoid(logits_re) if self.scoring == "sigmoid" else torch.softmax(logits_re, dim=-1)
        if self.correction_bias is not None:
            scores_re = scores_re + self.correction_bias
        by_group_rge = scores_re.unflatten(1, (self.num_groups, -1))
        best_of_group = 1 if self.group_score == "max" else 2
        group_scores_rg = by_group_rge.topk(best_of_group, dim=-1).values.sum(-1)
        # A stable sort takes the lowest index among equals; topk does not promise that.
        best = torch.sort(group_scores_rg, dim=-1, descending=True, stable=True).indices[:, : self.topk_groups]
        open_rg = torch.zeros_like(group_scores_rg, dtype=torch.bool).scatter(1, best, True)
        return open_rg.repeat_interleave(by_group_rge.shape[2], dim=1)

    def _check_groups(self, num_experts: int) -> None:
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(f"num_groups is {self.num_groups}, which does not divide {num_experts} experts")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(f"topk_groups is {self.topk_groups}, not 1 … {self.num_groups} (num_groups)")
        size = num_experts // self.num_groups
        if self.num_groups > 1 and self.k > self.topk_groups * size:
            raise ValueError(f"k is {self.k}, but {self.topk_groups} groups of {size} experts hold {self.topk_groups * size}")
        if self.group_score == "top2_sum" and size < 2:
            raise ValueError(f"group_score 'top2_sum' adds a group's two best experts, but groups have {size}")

    def _apply(self, fn: Any, recurse: bool = True) -> "TopKRouter":
        """The bias stays fp32 when a model is cast: its updates are smaller than bf16's steps."""
        bias = self.correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.correction_bias is not None and self.correction_bias.dtype != torch.float32:
            self.correction_bias = bias.to(self.correction_bias.device)
        return self


class NoisyTopKRouter(nn.Module):
    """Noisy top-k (Shazeer et al., 1701.06538): H = x·W + N(0, 1)·softplus(x·W_noise), softmax over the k largest of H.

    In training only; in evaluation H = x·W. Both weights start at 0: no signal, some noise, and so an even load. In training
    the plan says how likely each expert is among the k under a fresh draw of its noise, for `load_loss`:
    P_e = Φ((x·W − the k-th largest of the others' H)_e / softplus(x·W_noise)_e).

    Raises:
        ValueError: k > E; in forward, logits that are not finite.

    >>> router = NoisyTopKRouter(3, num_experts=3, k=1).eval()
    >>> _ = nn.init.eye_(router.linear.weight)
    >>> router(torch.tensor([[0.0, 1.0, 2.0]])).expert_ids.tolist()
    [[2]]
    """

    batch_invariant = True

    def __init__(self, in_dim: int, num_experts: int, k: int, num_tasks: int = 1) -> None:
        super().__init__()
        check_choice(k, num_experts)
        self.k = k
        self.linear = Gate(in_dim, num_experts, num_tasks)
        self.noise = Gate(in_dim, num_experts, num_tasks)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x_bd: Tensor) -> SparsePlan:
        logits_re = noisy_re = self.linear(x_bd)
        chance_re = None
        if self.training:
            std_re = softplus(self.noise(x_bd))
            noisy_re = logits_re + torch.randn_like(logits_re) * std_re
            chance_re = self._chance(logits_re, noisy_re, std_re)
        ids_rk, weights_rk = route_topk(noisy_re, self.k, scoring="softmax_after")
        return sparse_plan(ids_rk, weights_rk, self.linear.num_experts, logits=logits_re, chance=chance_re)

    def _chance(self, logits_re: Tensor, noisy_re: Tensor, std_re: Tensor) -> Tensor:
        if self.k == logits_re.shape[1]:
            return torch.ones_like(logits_re)
        best = noisy_re.topk(self.k + 1, dim=-1).values
        kth, next_one = best[:, self.k - 1 : self.k], best[:, self.k :]
        # The k-th largest of the others: for an expert among the k, that is the one behind them.
        threshold_re = torch.where(noisy_re > next_one, next_one, kth)
        return torch.special.ndtr((logits_re - threshold_re) / std_re.clamp_min(1e-6))


class GShardRouter(nn.Module):
    """GShard top-2 (Lepikhin et al., 2006.16668): g = softmax(W·x); weights g₁ and g₂ over g₁ + g₂.

    In training the second expert is, as `second` says,

    - `"sample"`: drawn from the others in proportion to g (Gumbel-max: the largest of W·x + Gumbel noise), or
    - `"drop"`: the second best, left out where 2·g₂ < U(0, 1), with g₂ already normalised; g₁ stays as it is.

    In evaluation it is the second best.

    Raises:
        ValueError: fewer than 2 experts; in forward, logits that are not finite.

    >>> router = GShardRouter(3, num_experts=3, second="drop").eval()
    >>> _ = nn.init.eye_(router.linear.weight)
    >>> plan = router(torch.tensor([[0.0, 1.0, 1.0]]))
    >>> plan.expert_ids.tolist(), plan.weights.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """

    batch_invariant = True

    def __init__(self, in_dim: int, num_experts: int, *, second: Literal["sample", "drop"], num_tasks: int = 1) -> None:
        super().__init__()
        check_choice(2, num_experts)
        if second not in ("sample", "drop"):
            raise ValueError(f"second is {second!r}; valid: 'sample', 'drop'")
        self.second = second
        self.linear = Gate(in_dim, num_experts, num_tasks)

    def forward(self, x_bd: Tensor) -> SparsePlan:
        logits_re = self.linear(x_bd)
        if self.training and self.second == "sample":
            ids_rk, weights_rk = self._sample(logits_re)
        else:
            ids_rk, weights_rk = route_topk(logits_re, 2, renormalize=True)
        if self.training and self.second == "drop":
            left_out = 2 * weights_rk < torch.rand_like(weights_rk)
            left_out = left_out & torch.tensor([False, True], device=left_out.device)
            ids_rk, weights_rk = ids_rk.masked_fill(left_out, -1), weights_rk.masked_fill(left_out, 0)
        return sparse_plan(ids_rk, weights_rk, self.linear.num_experts, logits=logits_re)

    def _sample(self, logits_re: Tensor) -> tuple[Tensor, Tensor]:
        first, _ = route_topk(logits_re, 1)
        gumbel_re = -torch.empty_like(logits_re).exponential_().log()
        others_re = torch.ones_like(logits_re, dtype=torch.bool).scatter(1, first.long(), False)
        second, _ = route_topk(logits_re.detach() + gumbel_re, 1, scoring="softmax_after", allowed_be=others_re)
        ids_rk = torch.cat([first, second], 1)
        weights_rk = torch.softmax(logits_re, dim=-1).gather(1, ids_rk.long())
        return ids_rk, weights_rk / weights_rk.sum(-1, keepdim=True)


class SwitchRouter(nn.Module):
    """Switch (Fedus et al., 2101.03961): the one expert of the largest softmax(W·x), with that probability as weight.

    In training the input is jittered: each element times U(1 − `jitter`, 1 + `jitter`).

    Raises:
        ValueError: jitter outside [0, 1); in forward, logits that are not finite.

    >>> router = SwitchRouter(2, num_experts=2, jitter=0.01).eval()
    >>> _ = nn.init.eye_(router.linear.weight)
    >>> plan = router(torch.tensor([[0.0, 1.0]]))
    >>> plan.expert_ids.tolist(), round(plan.weights.item(), 4)
    ([[1]], 0.7311)
    """

    batch_invariant = True

    def __init__(self, in_dim: int, num_experts: int, jitter: float = 0.0, num_tasks: int = 1) -> None:
        super().__init__()
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is {jitter}, not in [0, 1): inputs are multiplied by U(1 − jitter, 1 + jitter)")
        self.jitter = jitter
        self.linear = Gate(in_dim, num_experts, num_tasks)

    def forward(self, x_bd: Tensor) -> SparsePlan:
        if self.training and self.jitter:
            x_bd = x_bd.float()
            x_bd = x_bd * torch.empty_like(x_bd).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_re = self.linear(x_bd)
        ids_r1, weights_r1 = route_topk(logits_re, 1)
        return sparse_plan(ids_r1, weights_r1, self.linear.num_experts, logits=logits_re)


class TopPRouter(nn.Module):
    """Top-p (Huang et al., 2403.07652): experts by falling P = softmax(W·x), until their sum reaches p; weights are P.

    A row has as many experts as it needs: all E slots are there, −1 in those behind the last expert. `entropy_loss` keeps
    the rows' distributions narrow; without it a router can spread out to more and more experts.

    Raises:
        ValueError: p outside (0, 1]; in forward, logits that are not finite.

    >>> router = TopPRouter(3, num_experts=3, p=0.6)
    >>> _ = nn.init.eye_(router.linear.weight)
    >>> router(torch.tensor([[0.0, 9.0, 0.0], [1.0, 1.0, 0.0]])).expert_ids.tolist()
    [[1, -1, -1], [0, 1, -1]]
    """

    batch_invariant = True

    def __init__(self, in_dim: int, num_experts: int, p: float, num_tasks: int = 1) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise ValueError(f"p is {p}, not in (0, 1]: the share of the probability that the chosen experts must reach")
        self.p = p
        self.linear = Gate(in_dim, num_experts, num_tasks)

    def forward(self, x_bd: Tensor) -> SparsePlan:
        logits_re = self.linear(x_bd)
        ids_re, weights_re = route_topk(logits_re, self.linear.num_experts)
        # An expert is needed if those before it don't reach p.
        before_re = F.pad(weights_re.detach().cumsum(-1), (1, -1))
        needless_re = before_re >= self.p
        ids_re, weights_re = ids_re.masked_fill(needless_re, -1), weights_re.masked_fill(needless_re, 0)
        return sparse_plan(ids_re, weights_re, self.linear.num_experts, logits=logits_re)


class NormRouter(nn.Module):
    """Norm-based routing (kexue.fm 10699): the router predicts the length p_e ≥ 0 of each expert's output, k largest win.

    y = Σ over the k largest p_e of p_e·v_e/‖v_e‖, v_e the expert's output: `unit_norm` tells the experts to scale theirs.
    Here p = softplus(W·x), which is never 0, so an expert that isn't chosen yet can still come back.

    Raises:
        ValueError: k > E; in forward, logits that are not finite.

    >>> router = NormRouter(2, num_experts=2, k=1)
    >>> _ = nn.init.eye_(router.linear.weight)
    >>> plan = router(torch.tensor([[-1.0, 3.0]]))
    >>> plan.expert_ids.tolist(), round(plan.weights.item(), 4), plan.unit_norm
    ([[1]], 3.0486, True)
    """

    batch_invariant = True

    def __init__(self, in_dim: int, num_experts: int, k: int, num_tasks: int = 1) -> None:
        super().__init__()
        check_choice(k, num_experts)
        self.k = k
        self.linear = Gate(in_dim, num_experts, num_tasks)

    def forward(self, x_bd: Tensor) -> SparsePlan:
        logits_re = self.linear(x_bd)
        # Softplus rises, so the largest logits are the largest lengths.
        ids_rk, _ = route_topk(logits_re, self.k, scoring="softmax_after")
        lengths_rk = softplus(logits_re.gather(1, ids_rk.long()))
        return sparse_plan(ids_rk, lengths_rk, self.linear.num_experts, logits=logits_re, scoring="softplus", unit_norm=True)


# -- experts choose


class ExpertChoiceRouter(nn.Module):
    """Expert choice (Zhou et al., 2202.09368): S = softmax(W·x) over the experts; each expert takes the C rows of largest S.

    C = ⌈R·`capacity_factor`/E⌉, at most R: the load is even, and a row has `capacity_factor` experts on average, from none to
    all E (its slot e is expert e or −1). Ties go to the lowest row. A row's experts depend on the whole batch, and in a
    sequence on what comes later: for training and study, not for serving.

    Raises:
        ValueError: a capacity factor ≤ 0; in forward, logits that are not finite.

    >>> router = ExpertChoiceRouter(2, num_experts=2, capacity_factor=1.0)
    >>> _ = nn.init.eye_(router.linear.weight)
    >>> router(torch.tensor([[3.0, 0.0], [2.0, 0.0]])).expert_ids.tolist()
    [[0, -1], [-1, 1]]
    """

    batch_invariant = False

    def __init__(self, in_dim: int, num_experts: int, capacity_factor: float, num_tasks: int = 1) -> None:
        super().__init__()
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor is {capacity_factor}; it must be > 0: the experts of a row, on average")
        self.capacity_factor = capacity_factor
        self.linear = Gate(in_dim, num_experts, num_tasks)

    def forward(self, x_bd: Tensor) -> SparsePlan:
        logits_re = self.linear(x_bd)
        check_finite(logits_re)
        rows, experts = logits_re.shape
        scores_re = torch.softmax(logits_re, dim=-1)
        capacity = min(rows, math.ceil(rows * self.capacity_factor / experts))
        taken = torch.sort(scores_re.detach(), dim=0, descending=True, stable=True).indices[:capacity]
        chosen_re = torch.zeros_like(scores_re, dtype=torch.bool).scatter(0, taken, True)
        ids_re = torch.where(chosen_re, torch.arange(experts, dtype=torch.int32, device=x_bd.device), -1)
        return sparse_plan(ids_re, scores_re * chosen_re, experts, logits=logits_re)


# -- without a gate


class HashRouter(nn.Module):
    """Hash layer (Roller et al., 2106.04426): a fixed pseudo-random expert for each id; weight 1, nothing to learn.

    int64 ids `[R]` (tokens, users) are mixed with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014) and taken modulo
    E: the same expert on every machine and in every version.

    Raises:
        ValueError: no expert; in forward, ids that are not whole numbers.

    >>> HashRouter(num_experts=8)(torch.tensor([0, 1, 2, 3, 1])).expert_ids.flatten().tolist()
    [7, 0, 7, 6, 0]
    """

    batch_invariant = True

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        check_choice(1, num_experts)
        self.num_experts = num_experts

    def forward(self, ids_r: Tensor) -> SparsePlan:
        _check_ids(ids_r)
        mixed = ids_r.long() + _signed(0x9E3779B97F4A7C15)
        mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(0x94D049BB133111EB)
        mixed = mixed ^ _shift_right(mixed, 31)
        ids_r1 = (_shift_right(mixed, 1) % self.num_experts).int().unsqueeze(1)
        return sparse_plan(ids_r1, torch.ones(ids_r1.shape, device=ids_r.device), self.num_experts)


class RandomRouter(nn.Module):
    """k different experts for each row, drawn afresh in every call, with weight 1/k (THOR, Zuo et al., 2110.04260).

    The floor that a learned router must beat. A row's plan is not its own: serving refuses it.

    Raises:
        ValueError: k > E.

    >>> plan = RandomRouter(num_experts=4, k=2)(torch.zeros(5, 3))
    >>> plan.expert_ids.shape, plan.weights[0].tolist()
    (torch.Size([5, 2]), [0.5, 0.5])
    """

    batch_invariant = False

    def __init__(self, num_experts: int, k: int) -> None:
        super().__init__()
        check_choice(k, num_experts)
        self.num_experts, self.k = num_experts, k

    def forward(self, x_bd: Tensor) -> SparsePlan:
        draw_be = torch.rand(x_bd.shape[0], self.num_experts, device=x_bd.device)
        ids_bk = draw_be.topk(self.k, dim=-1).indices.int()
        return sparse_plan(ids_bk, torch.full(ids_bk.shape, 1 / self.k, device=x_bd.device), self.num_experts)


class TaskRouter(nn.Module):
    """Task-level routing (Kudugunta et al., 2110.03742): all rows of a task share its experts.

    The top k of softmax(w_task), w learned, weights divided by their sum. A task needs only its own experts when served.

    Raises:
        ValueError: k > E; in forward, task ids `[R]` outside 0 … num_tasks − 1, or not whole numbers.

    >>> router = TaskRouter(num_tasks=2, num_experts=3, k=1)
    >>> _ = router.logits.weight.data.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> router(torch.tensor([0, 1, 1])).expert_ids.tolist()
    [[1], [2], [2]]
    """

    batch_invariant = True

    def __init__(self, num_tasks: int, num_experts: int, k: int) -> None:
        super().__init__()
        check_choice(k, num_experts)
        self.k = k
        self.logits = nn.Embedding(num_tasks, num_experts)

    def forward(self, task_ids_r: Tensor) -> SparsePlan:
        _check_ids(task_ids_r)
        tasks = self.logits.num_embeddings
        if not torch.compiler.is_compiling() and ((bad := (task_ids_r < 0) | (task_ids_r >= tasks)).any()):
            raise ValueError(f"task id {int(task_ids_r[bad][0])} is not in 0 … {tasks - 1}")
        logits_re = self.logits(task_ids_r).float()
        ids_rk, weights_rk = route_topk(logits_re, self.k, renormalize=True)
        return sparse_plan(ids_rk, weights_rk, self.logits.embedding_dim, logits=logits_re)


def _check_ids(ids_r: Tensor) -> None:
    if ids_r.dim() != 1 or ids_r.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"the ids are {ids_r.dtype} {list(ids_r.shape)}, not int32 or int64 [R]")


def _signed(bits: int) -> int:
    """A 64-bit constant as torch's int64 has it."""
    return bits - (1 << 64) if bits >> 63 else bits


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Shift in zeros: torch's own shift repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
