"""What a task of each kind means to a model: outputs of its tower, start, loss, scores, metrics.

| kind       | outputs | loss of a row                                            | score                        | quality  |
|------------|---------|----------------------------------------------------------|------------------------------|----------|
| binary     | 1       | −log of the label's probability (cross-entropy)           | probability that it is true  | AUC      |
| regression | 1       | (z − ẑ)², or Huber's, z = (log1p(y) − mean) / std         | ŷ in the label's units       | R² of z  |
| multiclass | K       | −log of the class's probability (cross-entropy)           | the K probabilities          | accuracy |
| ordinal    | K − 1   | mean cross-entropy of "above level k", k = 1 … K − 1      | expected level               | AUC      |

The quality is what early stopping raises: the mean of the tasks' qualities, over the tasks that have one. Everything is
measured on the scores, as a client has them.

Shapes: B rows, T tasks, n tasks of equal heads, W outputs of one of them, O = Σ outputs, S = Σ scores.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_moe.metrics import (
    Floats,
    TaskMetrics,
    binary_metrics,
    multiclass_metrics,
    ordinal_metrics,
    quality,
    regression_metrics,
)
from recsys_moe.routing import sigmoid, softplus
from recsys_moe.schema import AnyTask, BinaryTask, MulticlassTask, OrdinalTask, RegressionTask, Schema
from recsys_moe.transforms import Statistics, TargetStatistics

Groups = npt.NDArray[np.int64] | None


class Head(Protocol):
    """A kind of task with its settings. Equal heads are computed together."""

    @property
    def outputs(self) -> int:
        """How many numbers the tower ends in."""

    def start(self, target: TargetStatistics) -> list[float]:
        """The outputs `[W]` of a model that knows the training part's labels and nothing of a row."""

    def losses(self, outputs_bnw: Tensor, labels_bn: Tensor) -> Tensor:
        """The loss of each row and task `[B, n]`."""

    def scores(self, outputs_bnw: Tensor) -> Tensor:
        """Scores fp32 `[B, n, S]`, whose bits depend on their row alone."""

    def score_names(self, task: str) -> tuple[str, ...]:
        """What the S scores are called."""

    def metrics(self, scores_ns: Floats, labels_n: Floats, groups: Groups) -> TaskMetrics:
        """How good scores are on rows that observe the task."""


@dataclass(frozen=True)
class BinaryHead:
    """σ(o) is the probability of a true label; it starts at (positive + ½) / (rows + 1)."""

    outputs: ClassVar[int] = 1

    def start(self, target: TargetStatistics) -> list[float]:
        negative, positive = target.counts or (0, 0)
        return [float(np.log((positive + 0.5) / (negative + 0.5)))]

    def losses(self, outputs_bnw: Tensor, labels_bn: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs_bnw.squeeze(2), labels_bn, reduction="none")

    def scores(self, outputs_bnw: Tensor) -> Tensor:
        return sigmoid(outputs_bnw)

    def score_names(self, task: str) -> tuple[str, ...]:
        return (task,)

    def metrics(self, scores_ns: Floats, labels_n: Floats, groups: Groups) -> TaskMetrics:
        return binary_metrics(scores_ns[:, 0], labels_n, groups)


@dataclass(frozen=True)
class RegressionHead:
    """o predicts z = (y − mean) / std, of log1p(y) if the task says so; it starts at the mean.

    The score goes the same way back. From a logarithm that is nearer to y's median than to its mean.
    """

    outputs: ClassVar[int] = 1
    log1p: bool
    huber_delta: float | None
    mean: float
    std: float

    def start(self, target: TargetStatistics) -> list[float]:
        return [(target.mean - self.mean) / self.std]

    def losses(self, outputs_bnw: Tensor, labels_bn: Tensor) -> Tensor:
        y_bn = labels_bn.sign() * labels_bn.abs().log1p() if self.log1p else labels_bn
        z_bn, predicted_bn = (y_bn - self.mean) / self.std, outputs_bnw.squeeze(2)
        if self.huber_delta is None:
            return F.mse_loss(predicted_bn, z_bn, reduction="none")
        return F.huber_loss(predicted_bn, z_bn, reduction="none", delta=self.huber_delta)

    def scores(self, outputs_bnw: Tensor) -> Tensor:
        # numpy in float64: PyTorch's expm1 takes a tensor's last few elements through other code than the rest.
        y = outputs_bnw.numpy().astype(np.float64) * self.std + self.mean
        limit = np.finfo(np.float32).max
        if self.log1p:
            y = np.sign(y) * np.expm1(np.minimum(np.abs(y), np.log(limit)))
        return torch.from_numpy(y.clip(-limit, limit).astype(np.float32))

    def score_names(self, task: str) -> tuple[str, ...]:
        return (task,)

    def metrics(self, scores_ns: Floats, labels_n: Floats, groups: Groups) -> TaskMetrics:
        return regression_metrics(scores_ns[:, 0], labels_n, self.log1p)


@dataclass(frozen=True)
class MulticlassHead:
    """softmax(o)_k is the probability of class k; it starts at (count + ½) / (rows + K/2)."""

    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        return len(self.classes)

    def start(self, target: TargetStatistics) -> list[float]:
        counts = np.asarray(target.counts or [0] * len(self.classes)) + 0.5
        log_rates: list[float] = np.log(counts / counts.sum()).tolist()
        return log_rates

    def losses(self, outputs_bnw: Tensor, labels_bn: Tensor) -> Tensor:
        return F.cross_entropy(outputs_bnw.transpose(1, 2), labels_bn.long(), reduction="none")

    def scores(self, outputs_bnw: Tensor) -> Tensor:
        return torch.softmax(outputs_bnw, 2)

    def score_names(self, task: str) -> tuple[str, ...]:
        return tuple(f"{task}.{name}" for name in self.classes)

    def metrics(self, scores_ns: Floats, labels_n: Floats, groups: Groups) -> TaskMetrics:
        return multiclass_metrics(scores_ns, labels_n)


@dataclass(frozen=True)
class OrdinalHead:
    """P(y above level k) = σ(o_1 − Σ_{1<j≤k} softplus(o_j)): it falls with k whatever the outputs are.

    A cumulative link model (McCullagh 1980) whose thresholds may move with the row, with CORAL's loss (Cao et al. 2020)
    divided by K − 1, so that a task of many levels weighs no more. The expected level is v_1 + Σ_k (v_{k+1} − v_k)·P(y above
    k). It starts at the training part's shares.
    """

    values: tuple[float, ...]

    @property
    def outputs(self) -> int:
        return len(self.values) - 1

    def start(self, target: TargetStatistics) -> list[float]:
        counts = np.asarray(target.counts or [0] * len(self.values)) + 0.5
        above = counts[::-1].cumsum()[::-1][1:] / counts.sum()
        logits = np.log(above / (1 - above))
        falls = -np.diff(logits)
        return [float(logits[0]), *np.log(np.expm1(falls)).tolist()]

    def _logits(self, outputs: Tensor, softplus: Callable[[Tensor], Tensor]) -> list[Tensor]:
        first, *others = outputs.unbind(-1)
        return list(itertools.accumulate([first, *map(softplus, others)], torch.sub))

    def losses(self, outputs_bnw: Tensor, labels_bn: Tensor) -> Tensor:
        logits_bnw = torch.stack(self._logits(outputs_bnw, F.softplus), 2)
        above_bnw = (labels_bn.unsqueeze(2) > torch.arange(self.outputs, device=labels_bn.device)).float()
        return F.binary_cross_entropy_with_logits(logits_bnw, above_bnw, reduction="none").mean(2)

    def scores(self, outputs_bnw: Tensor) -> Tensor:
        steps = np.diff(self.values).tolist()
        parts = [step * sigmoid(z_bn) for step, z_bn in zip(steps, self._logits(outputs_bnw, softplus), strict=True)]
        return (reduce(torch.add, parts) + self.values[0]).unsqueeze(2)

    def score_names(self, task: str) -> tuple[str, ...]:
        return (task,)

    def metrics(self, scores_ns: Floats, labels_n: Floats, groups: Groups) -> TaskMetrics:
        return ordinal_metrics(scores_ns[:, 0], labels_n, np.asarray(self.values))


def head_of(task: AnyTask, target: TargetStatistics) -> Head:
    """The head of a task, with what was fitted of its labels."""
    match task:
        case BinaryTask():
            return BinaryHead()
        case RegressionTask():
            # All labels equal: nothing to divide by.
            mean, std = (target.mean, target.std or 1.0) if task.standardise else (0.0, 1.0)
            return RegressionHead(task.log1p, task.huber_delta if task.loss == "huber" else None, mean, std)
        case MulticlassTask():
            return MulticlassHead(task.classes_as_text)
        case OrdinalTask():
            return OrdinalHead(task.values)


class Heads:
    """The heads of a schema's tasks, side by side.

    >>> from recsys_moe.schema import Categorical
    >>> classes = MulticlassTask(name="ending", label="e", kind="multiclass", classes=("finished", "left"))
    >>> schema = Schema((Categorical("c", "categorical"),), (BinaryTask("click", "y"), classes))
    >>> heads = Heads(schema, Statistics((), ()))
    >>> heads.widths, heads.score_names
    ({'click': 1, 'ending': 2}, ('click', 'ending.finished', 'ending.left'))
    """

    def __init__(self, schema: Schema, statistics: Statistics) -> None:
        targets = {t.name: t for t in statistics.targets}
        self.tasks = schema.task_names
        self._targets = [targets.get(task, TargetStatistics(task)) for task in self.tasks]
        self.heads = [head_of(*pair) for pair in zip(schema.tasks, self._targets, strict=True)]
        self.widths = {task: head.outputs for task, head in zip(self.tasks, self.heads, strict=True)}
        names = [head.score_names(task) for head, task in zip(self.heads, self.tasks, strict=True)]
        self.score_names = tuple(itertools.chain(*names))
        self._score_slices = _slices([len(n) for n in names])
        # Neighbours with equal heads, as (head, their outputs, their number, their tasks).
        runs = [(head, len(list(run))) for head, run in itertools.groupby(self.heads)]
        tasks, outputs = _slices([number for _, number in runs]), _slices([number * head.outputs for head, number in runs])
        self._runs = [(head, o, number, t) for (head, number), o, t in zip(runs, outputs, tasks, strict=True)]

    def start(self) -> list[list[float]]:
        """Each task's outputs before anything of a row is known."""
        return [head.start(target) for head, target in zip(self.heads, self._targets, strict=True)]

    def losses(self, outputs_bo: Tensor, labels_bt: Tensor) -> Tensor:
        """The loss of each row and task `[B, T]`, observed or not."""
        losses = [
            head.losses(outputs_bo[:, outputs].unflatten(1, (number, -1)), labels_bt[:, tasks])
            for head, outputs, number, tasks in self._runs
        ]
        return losses[0] if len(losses) == 1 else torch.cat(losses, 1)

    def scores(self, outputs_bo: Tensor) -> npt.NDArray[np.float32]:
        """Scores fp32 `[S, B]`, in the order of `score_names`."""
        pieces = [
            head.scores(outputs_bo[:, outputs].unflatten(1, (number, -1))).flatten(1) for head, outputs, number, _ in self._runs
        ]
        scores: npt.NDArray[np.float32] = torch.cat(pieces, 1).t().contiguous().numpy()
        return scores

    def by_task(self, scores: Floats) -> list[Floats]:
        """Each task's own scores `[·, N]`, from those of all `[S, N]`."""
        return [scores[own] for own in self._score_slices]

    def metrics(self, pieces: list[tuple[Any, Any, Any, Any]]) -> dict[str, TaskMetrics]:
        """Metrics by task, over the rows that observe it, from pieces of scores `[S, N]`, labels and weights `[T, N]`, and
        groups `[N]` or None."""
        if len(pieces) > 1:
            scores, labels, weights = (np.concatenate([piece[i] for piece in pieces], axis=1) for i in range(3))
            groups = None if pieces[0][3] is None else np.concatenate([piece[3] for piece in pieces])
        else:
            ((scores, labels, weights, groups),) = pieces
        out = {}
        for row, (task, head) in enumerate(zip(self.tasks, self.heads, strict=True)):
            seen = weights[row] > 0
            own = scores[self._score_slices[row]][:, seen].T
            out[task] = head.metrics(own, labels[row][seen], None if groups is None else groups[seen])
        return out


def mean_quality(metrics: dict[str, TaskMetrics]) -> float:
    """The mean of the tasks' qualities, over the tasks that have one; NaN if none has."""
    known = [q for q in map(quality, metrics.values()) if not np.isnan(q)]
    return float(np.mean(known)) if known else float("nan")


def _slices(widths: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(widths, initial=0))
    return [slice(low, high) for low, high in itertools.pairwise(ends)]
