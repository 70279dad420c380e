"""Expert health: HoME's three anomalies of a mixture (Kuaishou, arXiv 2408.05430, §1), as numbers and as warnings.

    collapse       an expert whose units put out zeros (ReLU: more than 90 % of them), or whose output the row hardly moves:
                   the experts' distributions differ
    degradation    a shared expert whose weight one task holds alone
    underfitting   a task that leans on shared experts and leaves its own aside, or an expert that no gradient reaches

Measured on rows of the validation part, in evaluation mode and eagerly: nothing of the training step knows of it, and no random
number, moment or gradient of it moves. A sparse plan's experts are all computed here, also for the rows that don't choose them.

Shapes: B probe rows, D inputs, T tasks, G gates of a plan, E experts of a plan, H expert units.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys_moe.batches import Batch, piece
from recsys_moe.distributed import agreed, gather_pieces, rank, world_size
from recsys_moe.experts import MLPExperts
from recsys_moe.heads import Heads
from recsys_moe.ranker import Ranker
from recsys_moe.routing import PlanNames, RoutingPlan, SoftPlan, SparsePlan
from recsys_moe.shards import PreparedData
from recsys_moe.typed import typed

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Tell = Callable[[dict[str, Any]], None]
Share = Annotated[float, Field(ge=0, le=1)]

ZERO = 1e-6
"""An activation below it is zero: what ReLU cuts off, and Swish of anything below −17."""
_FEWEST = 64
"""Rows that even the shortest training looks at."""


@typed
class HealthConfig:
    """When experts are looked at in training, and from where on they are warned of.

    `rows` of the validation part (0: nobody looks; fewer in a short training, of which a look is not to take over 1 %) are
    measured at up to `probes` steps spread evenly over the run and once at its end; a look is skipped while those before have
    taken more than the share `budget` of the training time.

    - `zero_rate`: collapse, above this share of zero activations. HoME's own figure for collapsed ReLU experts; a healthy one
      has about half.
    - `flatness`: collapse, below this ratio of the variance of an expert's outputs to the median of its plan's experts.
    - `held`: degradation, above this share of a shared expert's weight with one task.
    - `own_weight`: underfitting, below this ratio of what a task's gate gives its own experts to an even share.
    - `gradient`: underfitting, below this share of a task's gradient norm (over all experts of a plan).
    """

    rows: Annotated[int, Field(ge=0)] = 1024
    probes: Annotated[int, Field(ge=1)] = 16
    budget: Annotated[float, Field(ge=0)] = 0.015
    zero_rate: Share = 0.9
    flatness: Share = 0.01
    held: Share = 0.9
    own_weight: Share = 0.2
    gradient: Share = 0.01


@dataclass(frozen=True, eq=False)
class PlanHealth:
    """What the rows of a probe say of one plan's gates and experts; figures of `Floats` unless said otherwise.

    Fields:
        sees: bool `[G, E]`, what each gate may use.
        zero: `[E]`, the share of an expert's activations (rows × units) that are zero.
        dead: `[E]`, the share of its units that are zero in every row.
        mean, variance: `[E]`, of its outputs: over rows and units; over the rows, averaged over the units.
        weight, deviation: `[G, E]`, mean and standard deviation over the rows of a gate's weight on an expert.
        entropy: `[G]`, mean over the rows of −Σ_e w_e·ln w_e, in nats: 0 is certain, ln of the experts seen is indifferent.
        share: `[G, E]`, the same with a plan's residual weights (HoME's self gates, AdaTT's residual), as shares of each gate.
        gradient: `[T, E]`, ‖∂L_t/∂y_e‖ of each task's mean loss and an expert's outputs in the probe's rows; NaN for a task
            that none of them observes.
    """

    gates: tuple[str, ...]
    experts: tuple[str, ...]
    sees: Bools
    zero: Floats
    dead: Floats
    mean: Floats
    variance: Floats
    weight: Floats
    deviation: Floats
    entropy: Floats
    share: Floats
    gradient: Floats

    @property
    def owners(self) -> list[int | None]:
        """For each expert the gate whose own it is: `like 0` is the gate `like`'s. None: it is shared.

        Names that all begin alike (MMoE's `expert 0`, …) say nothing.
        """
        owners = [name.rpartition(" ")[0] for name in self.experts]
        if len(set(owners)) == 1:
            return [None] * len(owners)
        return [self.gates.index(owner) if owner in self.gates and owner != "shared" else None for owner in owners]

    @property
    def own(self) -> Bools:
        """bool `[G, E]`: each gate's own experts."""
        own = np.zeros(self.weight.shape, bool)
        for expert, gate in enumerate(self.owners):
            if gate is not None:
                own[gate, expert] = True
        return own

    @property
    def own_weight(self) -> Floats:
        """`[G]`: the share of a gate's weight, residual included, on its own experts; NaN where it has none."""
        own = self.own
        return np.where(own.any(1), (self.share * own).sum(1), np.nan)

    @property
    def even_own_weight(self) -> Floats:
        """`[G]`: what `own_weight` is if a gate weighs all experts that it sees alike."""
        return self.own.sum(1) / self.sees.sum(1)

    @property
    def holding(self) -> Floats:
        """`[G, E]`: each gate's share of a shared expert's weight; NaN for experts of one owner or with one user, and for the
        gate of the shared stream itself, which is no task's."""
        users = self.sees & np.array([gate != "shared" for gate in self.gates])[:, None]
        users &= (users.sum(0) > 1) & np.array([owner is None for owner in self.owners])
        weight = np.where(users, self.weight, 0.0)
        return np.where(users, weight / np.maximum(weight.sum(0), 1e-12), np.nan)

    @property
    def gradient_share(self) -> Floats:
        """`[T, E]`: each expert's part of the length of a task's gradient at the plan's experts; its squares sum to 1.

        NaN for an infinite gradient: the look came while the loss exploded.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self.gradient / np.maximum(np.sqrt((self.gradient**2).sum(1, keepdims=True)), 1e-30)


@dataclass(frozen=True, eq=False)
class Health:
    """A look at a model: each of its plans, and `cosine` `[T, T]` between the tasks' gradients with respect to the shared
    representation, the network's input; NaN where a task has no gradient in the probe's rows."""

    tasks: tuple[str, ...]
    cosine: Floats
    plans: dict[str, PlanHealth]

    def to_json(self) -> dict[str, Any]:
        """Plain data, None for what is not known; `from_json` builds the same."""
        plans = {name: {f.name: _plain(getattr(plan, f.name)) for f in fields(PlanHealth)} for name, plan in self.plans.items()}
        return {"tasks": list(self.tasks), "cosine": _plain(self.cosine), "plans": plans}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Health":
        def plan(values: dict[str, Any]) -> PlanHealth:
            made: dict[str, Any] = {key: tuple(values[key]) for key in ("gates", "experts")}
            made |= {k: np.array(v, bool if k == "sees" else float) for k, v in values.items() if k not in made}
            return PlanHealth(**made)

        return cls(tuple(data["tasks"]), np.array(data["cosine"], float), {k: plan(v) for k, v in data["plans"].items()})

    def metrics(self) -> dict[str, float]:
        """Every figure by a name such as `health.task.like_0.dead`, `health.task.like_0.weight.share`,
        `health.task.entropy.like`; what is not known is left out."""
        found = {
            f"health.cosine.{a}.{b}": self.cosine[i, j]
            for i, a in enumerate(self.tasks)
            for j, b in enumerate(self.tasks)
            if i < j
        }
        for name, plan in self.plans.items():
            where = f"health.{_key(name)}"
            for e, expert in enumerate(plan.experts):
                at = f"{where}.{_key(expert)}"
                found |= {f"{at}.{key}": getattr(plan, key)[e] for key in ("zero", "dead", "mean", "variance")}
                found |= {f"{at}.weight.{_key(g)}": plan.weight[i, e] for i, g in enumerate(plan.gates) if plan.sees[i, e]}
                found |= {f"{at}.gradient.{t}": plan.gradient[i, e] for i, t in enumerate(self.tasks)}
                if not np.isnan(plan.holding[:, e]).all():
                    found[f"{at}.held"] = np.nanmax(plan.holding[:, e])
            found |= {f"{where}.entropy.{_key(g)}": plan.entropy[i] for i, g in enumerate(plan.gates)}
            found |= {f"{where}.own_weight.{_key(g)}": plan.own_weight[i] for i, g in enumerate(plan.gates)}
        return {key: float(value) for key, value in found.items() if math.isfinite(value)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A header and a row for each expert, as text; what does not apply is empty."""
        gates = list(dict.fromkeys(gate for plan in self.plans.values() for gate in plan.gates))
        header = ["plan", "expert", "zero", "dead", "mean", "variance", "held", "held by"]
        header += [*(f"gradient.{task}" for task in self.tasks), *(f"weight.{gate}" for gate in gates)]
        rows = []
        for name, plan in self.plans.items():
            for e, expert in enumerate(plan.experts):
                holding = np.nan_to_num(plan.holding[:, e], nan=-1.0)
                held, holder = holding.max(), plan.gates[int(holding.argmax())]
                weights = dict(zip(plan.gates, np.where(plan.sees[:, e], plan.weight[:, e], np.nan), strict=True))
                figures = [plan.zero[e], plan.dead[e], plan.mean[e], plan.variance[e], held if held >= 0 else math.nan]
                texts = [*map(_text, figures), holder if held >= 0 else ""]
                texts += [*map(_text, plan.gradient[:, e]), *(_text(weights.get(gate, math.nan)) for gate in gates)]
                rows.append([name, expert, *texts])
        return header, rows


def _text(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if value.dtype == bool:
        return value.tolist()
    known: Any = np.where(np.isfinite(value), value, None)
    return known.tolist()


def _key(name: str) -> str:
    return name.replace(" ", "_")


# ---- warnings ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """An anomaly: which, where, and a sentence with the figure and a remedy."""

    anomaly: str
    plan: str
    experts: tuple[str, ...]
    message: str


def find_anomalies(health: Health, limits: HealthConfig) -> list[Finding]:
    """What crosses a threshold, worst anomaly first: collapse, degradation, underfitting."""
    found = []
    for name, plan in health.plans.items():
        found += [*_collapsed(name, plan, limits), *_degraded(name, plan, limits), *_underfitted(name, health, limits)]
    return sorted(found, key=lambda f: ("collapse", "degradation", "underfitting").index(f.anomaly))


def _collapsed(name: str, plan: PlanHealth, limits: HealthConfig) -> Iterator[Finding]:
    usual = float(np.median(plan.variance))
    for e, expert in enumerate(plan.experts):
        if plan.zero[e] > limits.zero_rate:
            said = f"{plan.zero[e]:.0%} of its activations are zero (limit {limits.zero_rate:.0%})"
        elif plan.variance[e] < limits.flatness * usual:
            said = f"its outputs vary by {plan.variance[e]:.2g} where its neighbours' vary by {usual:.2g}, hardly with the row"
        else:
            continue
        remedy = "normalise the experts (model.norm=batch, in HoME model.expert_norm=true) or lower train.lr"
        yield Finding("collapse", name, (expert,), f"expert {expert!r} of {name!r} has collapsed: {said}; {remedy}")


def _degraded(name: str, plan: PlanHealth, limits: HealthConfig) -> Iterator[Finding]:
    for e, expert in enumerate(plan.experts):
        shares = np.nan_to_num(plan.holding[:, e])
        holder = int(shares.argmax())
        # Where nobody uses an expert, who uses it least little is no matter.
        if shares[holder] > limits.held and plan.weight[holder, e] > 0.5 / plan.sees[holder].sum():
            said = f"it gives {shares[holder]:.0%} of the expert's weight (limit {limits.held:.0%})"
            remedy = "give each task experts of its own and fewer shared ones (model=ple or model=home)"
            message = f"shared expert {expert!r} of {name!r} is held by {plan.gates[holder]!r} alone: {said}; {remedy}"
            yield Finding("degradation", name, (expert,), message)


def _underfitted(name: str, health: Health, limits: HealthConfig) -> Iterator[Finding]:
    plan = health.plans[name]
    reaches = plan.gradient_share
    remedy = "raise the task's loss_weight, lower that of the tasks with many positives, or use model=home with its self gates"
    left_aside: set[int] = set()
    for g, gate in enumerate(plan.gates):
        own = np.flatnonzero(plan.own[g])
        if not len(own):
            continue
        even, weight = plan.even_own_weight[g], plan.own_weight[g]
        length = math.nan
        if gate in health.tasks:
            length = float(np.sqrt((reaches[health.tasks.index(gate), own] ** 2).sum()))
            left_aside |= set(own) if math.isnan(length) else set()
        if weight < limits.own_weight * even:
            said = f"gives them {weight:.1%} of its weight (even: {even:.0%}, limit {limits.own_weight * even:.1%})"
        elif length < limits.gradient:
            said = f"sends them {length:.2%} of the length of its gradient (limit {limits.gradient:.0%})"
        else:
            continue
        left_aside |= set(own)
        experts = tuple(plan.experts[e] for e in own)
        named = " and ".join(map(repr, experts)) if len(experts) < 3 else f"{experts[0]!r} … {experts[-1]!r}"
        message = f"{gate!r} leaves its own experts {named} of {name!r} aside: it {said}; {remedy}"
        yield Finding("underfitting", name, experts, message)
    reaches = np.nan_to_num(reaches)
    if not reaches.any():
        return
    remedy = "use fewer experts, or let the gates spread (a lower train.lr, a larger model.top_k)"
    for e, expert in enumerate(plan.experts):
        most = reaches[:, e].max()
        if e not in left_aside and most < limits.gradient:
            said = f"no task sends it more than {most:.2%} of the length of its gradient (limit {limits.gradient:.0%})"
            message = f"expert {expert!r} of {name!r} learns nothing: {said}; {remedy}"
            yield Finding("underfitting", name, (expert,), message)


# ---- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WatchedPlan(SoftPlan):
    """A plan that remembers the experts' outputs `[B, E, H]` that it mixes. A sparse one mixes those of all experts, by weights
    that are 0 for the experts that a row did not choose."""

    of: RoutingPlan | None = None
    mixed: list[Tensor] = field(default_factory=list)

    @classmethod
    def watch(cls, plan: RoutingPlan, rows: int) -> "WatchedPlan":
        if isinstance(plan, SoftPlan):
            return cls(plan.logits, plan.mask_te, plan.residual, plan)
        return cls(plan.dense_weights.view(rows, -1, plan.num_experts), None, None, plan)

    @property
    def weights(self) -> Tensor:
        return self.logits if isinstance(self.of, SparsePlan) else super().weights

    def mix(self, experts_beh: Tensor) -> Tensor:
        self.mixed.append(experts_beh)
        if not isinstance(self.of, SparsePlan):
            return super().mix(experts_beh)
        outputs_beh = experts_beh.float()
        return torch.bmm(self.weights, F.normalize(outputs_beh, dim=-1) if self.of.unit_norm else outputs_beh)


@contextmanager
def _watching(network: nn.Module) -> Iterator[list[Tensor]]:
    """Let the network's routers make watched plans, and the network run as it is written, whatever was compiled of it.

    Yields what its stacks of experts put out, `[B, E, H]` each, in the order in which they run.
    """
    made: list[Tensor] = []

    def watch(router: nn.Module, inputs: tuple[Any, ...], plan: RoutingPlan) -> WatchedPlan:
        return WatchedPlan.watch(plan, inputs[0].shape[0])

    def keep(experts: nn.Module, inputs: tuple[Any, ...], outputs_beh: Tensor) -> None:
        made.append(outputs_beh)

    hooks = [m.register_forward_hook(watch) for m in network.modules() if hasattr(m, "batch_invariant")]
    stacks = [m for name, m in network.named_modules() if isinstance(m, MLPExperts) and not name.startswith("towers.")]
    hooks += [m.register_forward_hook(keep) for m in stacks]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield made
    finally:
        for hook in hooks:
            hook.remove()


def _watched(plan: RoutingPlan, made: list[Tensor], rows: int) -> WatchedPlan:
    """The plan with what it mixes. Where a family mixes by means of its own, that is the one stack of as many experts; it stays
    unknown where there are several, or where no router made the plan."""
    if not isinstance(plan, WatchedPlan):
        return WatchedPlan.watch(plan, rows)
    if not plan.mixed:
        fitting = [y_beh for y_beh in made if y_beh.shape[1] == plan.num_experts]
        plan.mixed.extend(fitting if len(fitting) == 1 else [])
    return plan


def measure(
    network: Any, heads: Heads, x_bd: Tensor, labels_bt: Tensor, weights_bt: Tensor, first_bo: Tensor | None = None
) -> Health:
    """Look at a family's network in evaluation mode, on rows as the embeddings have made them.

    Args:
        network: a family's network, as `Ranker.network`; its `plan_names` name the gates and experts.
        x_bd: fp32 `[B, D]`, the shared representation.
        labels_bt, weights_bt: fp32 `[B, T]`, as batches have them.
        first_bo: what stands beside the network, as `Ranker.first_order_outputs`.

    What a plan's experts put out, and the gradients at it, are NaN where they can't be told (see `_watched`).

    >>> from recsys_moe.models.mmoe import MMoE, MMoEConfig
    >>> from recsys_moe.schema import BinaryTask, Categorical, Schema
    >>> from recsys_moe.transforms import Statistics
    >>> schema = Schema((Categorical("c", "categorical"),), (BinaryTask("click", "a"), BinaryTask("like", "b")))
    >>> network = MMoE(MMoEConfig(num_experts=4), in_dim=12, tasks={"click": 1, "like": 1}, dtype=torch.float32).eval()
    >>> health = measure(network, Heads(schema, Statistics((), ())), torch.randn(64, 12), torch.ones(64, 2), torch.ones(64, 2))
    >>> health.plans["experts"].gradient.shape, health.cosine.shape
    ((2, 4), (2, 2))
    """
    x_bd = x_bd.detach().requires_grad_()
    with torch.enable_grad(), _watching(network) as made:
        outputs, returned = network(x_bd)
        outputs = outputs if first_bo is None else outputs + first_bo
        losses_bt, trained_bt = network.objective(outputs, heads.losses(outputs, labels_bt), labels_bt, weights_bt)
        means_t = (losses_bt * trained_bt).sum(0) / trained_bt.sum(0).clamp_min(1e-12)
    plans = {name: _watched(plan, made, len(x_bd)) for name, plan in returned.items()}
    mixed = [outputs_beh for plan in plans.values() for outputs_beh in plan.mixed]
    at_x, at_mixed = [], []
    for mean in means_t:
        gradients = torch.autograd.grad(mean, [x_bd, *mixed], retain_graph=True, allow_unused=True, materialize_grads=True)
        at_x.append(gradients[0].flatten().double())
        at_mixed.append([g.float().square().sum((0, 2)) for g in gradients[1:]])
    squares, found = iter(zip(*at_mixed, strict=True)), {}
    for name, plan in plans.items():
        gradient_te = torch.full((len(means_t), plan.num_experts), torch.nan, device=x_bd.device)
        if plan.mixed:
            gradient_te = torch.stack([torch.stack(next(squares)) for _ in plan.mixed]).sum(0).sqrt()
        gradient_te[trained_bt.sum(0) == 0] = torch.nan  # no row observes the task: nobody knows
        found[name] = _plan_health(network.plan_names[name], plan, gradient_te)
    return Health(heads.tasks, _cosines(torch.stack(at_x)), found)


@torch.no_grad()
def _plan_health(names: PlanNames, plan: WatchedPlan, gradient_te: Tensor) -> PlanHealth:
    y_beh = torch.cat(plan.mixed).float() if plan.mixed else torch.full((1, plan.num_experts, 1), torch.nan)
    weights_bge = plan.weights
    total_bge = weights_bge
    if plan.residual is not None:
        total_bge = total_bge + plan.residual.abs()
    sees_ge = torch.ones_like(weights_bge[0], dtype=torch.bool) if plan.mask_te is None else plan.mask_te
    total_ge = (total_bge * sees_ge).mean(0)
    zero_beh = (y_beh.abs() < ZERO).float().masked_fill(y_beh.isnan(), torch.nan)
    figures = {
        "zero": zero_beh.mean((0, 2)),
        "dead": zero_beh.amin(0).mean(1),
        "mean": y_beh.mean((0, 2)),
        "variance": y_beh.var(0, correction=0).mean(1),
        "weight": weights_bge.mean(0),
        "deviation": weights_bge.std(0, correction=0),
        "entropy": torch.special.entr(weights_bge).sum(2).mean(0),
        "share": total_ge / total_ge.sum(1, keepdim=True).clamp_min(1e-12),
        "gradient": gradient_te,
    }
    return PlanHealth(
        gates=names.gates,
        experts=names.experts,
        sees=sees_ge.cpu().numpy(),
        **{name: value.double().cpu().numpy() for name, value in figures.items()},
    )


def _cosines(gradients_tn: Tensor) -> Floats:
    lengths_t = gradients_tn.norm(dim=1)
    cosines_tt = gradients_tn @ gradients_tn.t() / torch.outer(lengths_t, lengths_t)  # NaN where a length is 0
    cosines: Floats = cosines_tt.clamp(-1, 1).cpu().numpy()
    return cosines


def probe_rows(data: PreparedData, part: str, rows: int, runs: int = 16) -> Batch:
    """`rows` rows of a part (all, if it has no more), in up to `runs` runs of neighbours spread evenly over its shards."""
    shards = data.shards(part)
    whole = sum(map(len, shards))
    rows = min(rows, whole)
    runs = max(1, min(runs, rows))
    starts = [run * rows // runs + run * (whole - rows) // runs for run in range(runs)]  # no run reaches into the next
    lengths = [(run + 1) * rows // runs - run * rows // runs for run in range(runs)]
    pieces, first = [], 0
    for shard in shards:
        for start, length in zip(starts, lengths, strict=True):
            low, high = max(start - first, 0), min(start + length - first, len(shard))
            if low < high:
                pieces.append(Batch.of(shard.rows(low, high), first + low))
        first += len(shard)
    return Batch.concatenate(pieces)


# ---- in training ---------------------------------------------------------------------------------------------------------


class Monitor:
    """Looks at the experts of a model in training, and tells: events `{"kind": "health", "step", "seconds", "health"}` with a
    look's plain data, and a warning for each anomaly, once a run.

    Of several workers all take their piece of the probe's rows through the embedding tables, which are shared out among them;
    the first then looks at all rows while the others wait. `seconds` is what all looks took.
    """

    def __init__(self, data: PreparedData, heads: Heads, config: HealthConfig, epochs: int, on_event: Tell) -> None:
        self._heads, self._config, self._on_event = heads, config, on_event
        # A look goes forward once, and back to the inputs for each task; training goes back to the weights as well, once.
        passes = (1 + 1.5 * len(heads.tasks)) / 3
        affordable = int(0.01 * epochs * data.manifest.rows("train") / passes)
        rows = min(config.rows, max(affordable, _FEWEST))
        self._batch = probe_rows(data, "validation", rows) if rows else None
        self._warned: set[tuple[str, str, tuple[str, ...]]] = set()
        self.seconds = 0.0

    def look(self, model: Ranker, step: int, total_steps: int, seconds: float, final: bool = False) -> float:
        """Look where a step is due, `seconds` of training from its start, and at the end; the seconds that it took.

        All workers must ask at every step.
        """
        every = max(1, total_steps // self._config.probes)
        due = final or (step < total_steps and step % every == 0)
        if self._batch is None or not due or not (final or agreed(self.seconds <= self._config.budget * seconds)):
            return 0.0
        start = time.perf_counter()
        was_training = model.training
        model.eval()
        health = self._measure(model)
        model.train(was_training)
        if health is not None:
            took = round(time.perf_counter() - start, 4)
            self._on_event({"kind": "health", "step": step, "seconds": took, "health": health.to_json()})
            self._warn(health, step)
        spent = time.perf_counter() - start
        self.seconds += spent
        return spent

    def _measure(self, model: Ranker) -> Health | None:
        assert self._batch is not None
        rows = len(self._batch)
        batch = self._batch
        if world_size() > 1:
            batch = batch.take(torch.arange(rows)[piece(rows, rank(), world_size())])
        batch = batch.to(model.device)
        with torch.no_grad():
            x_bd = gather_pieces(model.represent(batch.ids_bf, batch.dense_bd, batch.lists), rows)
            first_bo = model.first_order_outputs(batch.ids_bf, batch.dense_bd, batch.lists)
            first_bo = None if first_bo is None else gather_pieces(first_bo, rows)
        if rank():
            return None
        whole = self._batch.to(model.device)
        return measure(model.network, self._heads, x_bd, whole.labels_bt, whole.weights_bt, first_bo)

    def _warn(self, health: Health, step: int) -> None:
        for finding in find_anomalies(health, self._config):
            which = (finding.anomaly, finding.plan, finding.experts)
            if which not in self._warned:
                self._warned.add(which)
                where = {"anomaly": finding.anomaly, "plan": finding.plan, "experts": list(finding.experts)}
                self._on_event({"kind": "warning", "message": f"step {step:,}: {finding.message}", **where})
