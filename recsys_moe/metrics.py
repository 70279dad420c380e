"""Metrics by kind of task: of probabilities, of numbers, of classes, of levels.

The first field of each is its quality: higher is better, and what is worth nothing is at 0 or a half (see `quality`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from recsys_moe.columns import signed_log1p

Floats = npt.NDArray[np.floating]
ECE_BINS = 15


@dataclass(frozen=True)
class BinaryMetrics:
    """One task on one set of rows. NaN (None in JSON) where a metric is not defined.

    - `auc`: probability that a positive row scores above a negative one, ties half; NaN if one class is missing.
    - `gauc`: Σ_g n_g·AUC_g / Σ_g n_g over groups with both classes, n_g the group's rows (Zhu et al. 2017). Groups of a
      single class are left out and counted in `gauc_left_out`. NaN without a group column.
    - `logloss`: mean binary cross-entropy in nats.
    - `ne`: logloss / entropy of the rows' positive rate (He et al. 2014): 1 is no better than the mean.
    - `calibration`: mean score / positive rate.
    - `ece`: Σ_b n_b/n·|mean score − positive rate| over 15 bins of equal width (Guo et al. 2017).
    - `rows`: how many rows were observed.
    """

    auc: float
    gauc: float
    gauc_left_out: int
    logloss: float
    ne: float
    calibration: float
    ece: float
    rows: int


@dataclass(frozen=True)
class RegressionMetrics:
    """One task's predictions on one set of rows.

    - `r2`: 1 − Σ(z − ẑ)² / Σ(z − z̄)² on the scale that the task is trained on (z = log1p(y) if it asks for that): 0 is no
      better than the mean. NaN where all labels are equal.
    - `rmse`, `mae`: √mean (y − ŷ)² and mean |y − ŷ| in the label's own units.
    - `rows`: how many rows were observed.
    """

    r2: float
    rmse: float
    mae: float
    rows: int


@dataclass(frozen=True)
class MulticlassMetrics:
    """One task's class probabilities on one set of rows. The predicted class is the most probable, of equals the first.

    - `accuracy`: the share of rows whose class is predicted.
    - `macro_f1`: the mean of the classes' F1, over those that occur among labels or predictions.
    - `logloss`: mean −log of the probability of the row's class, in nats.
    - `rows`: how many rows were observed.
    """

    accuracy: float
    macro_f1: float
    logloss: float
    rows: int


@dataclass(frozen=True)
class OrdinalMetrics:
    """One task's expected levels on one set of rows.

    - `auc`: over pairs of rows of unlike level, the probability that the higher one has the higher score, ties half
      (Harrell's concordance; with two levels the AUC). NaN if there is one level only.
    - `qwk`: quadratic weighted kappa (Cohen 1968) between the level and the one nearest to the score:
      1 − Σ(i − j)²·O_ij / Σ(i − j)²·E_ij over positions i, j. NaN where both are always the same one.
    - `mae`: mean |level − score|, in levels' own numbers.
    - `rows`: how many rows were observed.
    """

    auc: float
    qwk: float
    mae: float
    rows: int


QUALITY_NAMES = {"auc": "AUC", "r2": "R²", "accuracy": "accuracy"}
TaskMetrics = BinaryMetrics | RegressionMetrics | MulticlassMetrics | OrdinalMetrics


def quality(metrics: TaskMetrics) -> float:
    """The number that training is to raise: a task's AUC, R², accuracy or concordance. NaN where it is not defined.

    >>> quality(RegressionMetrics(r2=0.5, rmse=2.0, mae=1.0, rows=9))
    0.5
    """
    value: float = getattr(metrics, fields(metrics)[0].name)
    return value


def quality_name(metrics: TaskMetrics) -> str:
    """What people call it: AUC, R², accuracy."""
    return QUALITY_NAMES[fields(metrics)[0].name]


def binary_metrics(scores: Floats, labels: Floats, groups: npt.NDArray[np.int64] | None = None) -> BinaryMetrics:
    """All metrics of probabilities `scores` against 0/1 `labels`, both `[N]`.

    >>> m = binary_metrics(np.array([0.9, 0.2, 0.6]), np.array([1.0, 0.0, 0.0]))
    >>> m.auc, m.rows
    (1.0, 3)
    """
    rows = len(labels)
    if not rows:
        return BinaryMetrics(math.nan, math.nan, 0, math.nan, math.nan, math.nan, math.nan, 0)
    scores, labels = np.asarray(scores), np.asarray(labels)
    area = auc(scores, labels)
    gauc, left_out = grouped_auc(scores, labels, groups) if groups is not None else (math.nan, 0)
    rate = float(labels.mean(dtype=np.float64))
    loss = log_loss(scores, labels)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else 0.0
    return BinaryMetrics(
        auc=area,
        gauc=gauc,
        gauc_left_out=left_out,
        logloss=loss,
        ne=loss / entropy if entropy else math.nan,
        calibration=float(scores.mean(dtype=np.float64)) / rate if rate else math.nan,
        ece=expected_calibration_error(scores, labels),
        rows=rows,
    )


def regression_metrics(predictions: Floats, labels: Floats, log1p: bool = False) -> RegressionMetrics:
    """All metrics of `predictions` against `labels`, both `[N]`; `log1p`: the task is trained on log1p of its labels.

    >>> regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    RegressionMetrics(r2=0.5, rmse=0.5773502691896257, mae=0.3333333333333333, rows=3)
    """
    predictions, labels = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if not len(labels):
        return RegressionMetrics(math.nan, math.nan, math.nan, 0)
    error = predictions - labels
    scaled, target = (signed_log1p(predictions), signed_log1p(labels)) if log1p else (predictions, labels)
    spread = float(((target - target.mean()) ** 2).sum())
    r2 = 1 - float(((target - scaled) ** 2).sum()) / spread if spread else math.nan
    return RegressionMetrics(r2, math.sqrt(float((error**2).mean())), float(np.abs(error).mean()), len(labels))


def multiclass_metrics(probabilities: Floats, labels: Floats) -> MulticlassMetrics:
    """All metrics of `probabilities` `[N, K]` against class positions `labels` `[N]`.

    >>> multiclass_metrics(np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 0])).accuracy
    0.5
    """
    truth, p = np.asarray(labels).astype(np.int64), np.asarray(probabilities, np.float64)
    rows, classes = p.shape
    if not rows:
        return MulticlassMetrics(math.nan, math.nan, math.nan, 0)
    predicted = p.argmax(1)
    hits = np.bincount(truth[truth == predicted], minlength=classes)
    occurs = np.bincount(truth, minlength=classes) + np.bincount(predicted, minlength=classes)
    f1 = 2 * hits[occurs > 0] / occurs[occurs > 0]
    likelihood = np.maximum(p[np.arange(rows), truth], np.finfo(np.float32).tiny)
    return MulticlassMetrics(float(hits.sum() / rows), float(f1.mean()), float(-np.log(likelihood).mean()), rows)


def ordinal_metrics(scores: Floats, labels: Floats, levels: Floats) -> OrdinalMetrics:
    """All metrics of expected levels `scores` against positions `labels`, both `[N]`, among rising `levels` `[K]`.

    >>> ordinal_metrics(np.array([1.2, 2.0, 4.4]), np.array([0, 1, 4]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])).auc
    1.0
    """
    scores, truth = np.asarray(scores, np.float64), np.asarray(labels).astype(np.int64)
    rows, k = len(truth), len(levels)
    if not rows:
        return OrdinalMetrics(math.nan, math.nan, math.nan, 0)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, scores)
    observed = np.bincount(truth * k + nearest, minlength=k * k).reshape(k, k)
    expected = np.outer(observed.sum(1), observed.sum(0)) / rows
    distance = (np.arange(k)[:, None] - np.arange(k)) ** 2
    chance = float((distance * expected).sum())
    qwk = 1 - float((distance * observed).sum()) / chance if chance else math.nan
    return OrdinalMetrics(concordance(scores, truth), qwk, float(np.abs(levels[truth] - scores).mean()), rows)


def concordance(scores: Floats, levels: npt.NDArray[np.int64]) -> float:
    """Over pairs of unlike level, the share in which the higher one has the higher score, ties half; NaN without any."""
    right, pairs = 0.0, 0
    for level in np.unique(levels)[1:]:
        below = levels < level
        these = below | (levels == level)
        auc, _ = grouped_auc(scores[these], (~below[these]).astype(np.float64), np.zeros(int(these.sum()), np.int64))
        count = int(below.sum()) * int((these & ~below).sum())
        right, pairs = right + auc * count, pairs + count
    return right / pairs if pairs else math.nan


def log_loss(scores: Floats, labels: Floats) -> float:
    """Mean of −y·log(p) − (1−y)·log(1−p), with p kept one float32 step away from 0 and 1."""
    total = 0.0
    for s, y in _some_rows(scores, labels):
        p = np.clip(s, np.finfo(np.float32).tiny, 1 - np.finfo(np.float32).epsneg)
        total -= float(np.sum(y * np.log(p) + (1 - y) * np.log1p(-p)))
    return total / len(scores)


def expected_calibration_error(scores: Floats, labels: Floats) -> float:
    """ECE over equal-width bins; a score of exactly 1 belongs to the last one."""
    gap = np.zeros(ECE_BINS)
    for s, y in _some_rows(scores, labels):
        bins = np.minimum((s * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        gap += np.bincount(bins, s, ECE_BINS) - np.bincount(bins, y, ECE_BINS)
    return float(np.abs(gap).sum() / len(labels))


_SOME_ROWS = 2**18


def _some_rows(scores: Floats, labels: Floats) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Both as float64, some rows at a time: what is computed from them is several times as large."""
    for low in range(0, len(scores), _SOME_ROWS):
        high = low + _SOME_ROWS
        yield np.asarray(scores[low:high], np.float64), np.asarray(labels[low:high], np.float64)


def auc(scores: Floats, labels: Floats) -> float:
    """AUC of 0/1 `labels` from the mid-ranks of the positive ones (Mann-Whitney); NaN if one class is missing.

    Beside a sorted copy of the scores it needs memory for the positives only.
    """
    rising = np.sort(scores)
    found = scores[labels > 0]
    p, n = len(found), len(scores) - len(found)
    if not p or not n:
        return math.nan
    below, up_to = (np.searchsorted(rising, found, side) for side in ("left", "right"))
    rank_sum = (float(below.sum()) + float(up_to.sum()) + p) / 2
    return (rank_sum - p * (p + 1) / 2) / (p * n)


def grouped_auc(scores: Floats, labels: Floats, groups: npt.NDArray[np.int64]) -> tuple[float, int]:
    """AUC of each group from mid-ranks, averaged by rows; and the number of single-class groups.

    One sort for many groups: a loop over users would take minutes where this takes a second. Some groups at a time, so that
    what is sorted stays small.
    """
    parts = 1 + len(scores) // _SOME_ROWS
    weighted, rows, left_out = 0.0, 0, 0
    for part in range(parts):
        own = groups % parts == part if parts > 1 else slice(None)
        area, size, without = _grouped_auc(scores[own], labels[own], groups[own])
        weighted, rows, left_out = weighted + area * size, rows + size, left_out + without
    return weighted / rows if rows else math.nan, left_out


def _grouped_auc(scores: Floats, labels: Floats, groups: npt.NDArray[np.int64]) -> tuple[float, int, int]:
    """The mean AUC, the rows that it is over, and the number of single-class groups."""
    areas, sizes, _ = group_aucs(scores, labels, groups)
    both = np.isfinite(areas)
    if not both.any():
        return 0.0, 0, len(sizes)
    return float(np.average(areas[both], weights=sizes[both])), int(sizes[both].sum()), int((~both).sum())


def group_aucs(
    scores: Floats, labels: Floats, groups: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """AUC (NaN: one class only) and rows of each group, and for each row the place of its group among them.

    >>> group_aucs(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, 1.0]), np.array([7, 7, 3]))
    (array([nan,  1.]), array([1, 2]), array([1, 1, 0]))
    """
    if not len(scores):
        return np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.lexsort((scores, groups))
    s, y, g = scores[order], labels[order], groups[order]
    rows = len(s)
    new_group = np.r_[True, g[1:] != g[:-1]]
    starts = np.flatnonzero(new_group)
    number = np.cumsum(new_group) - 1
    # Runs of equal scores within a group share the mean of their ranks.
    new_run = new_group | np.r_[True, s[1:] != s[:-1]]
    run_starts = np.flatnonzero(new_run)
    run_ends = np.r_[run_starts[1:], rows]
    middle = ((run_starts + run_ends + 1) / 2)[np.cumsum(new_run) - 1]
    rank = middle - starts[number]
    size = np.bincount(number)
    p = np.bincount(number, y)
    n = size - p
    both = (p > 0) & (n > 0)
    areas = np.full(len(size), math.nan)
    areas[both] = (np.bincount(number, rank * y)[both] - p[both] * (p[both] + 1) / 2) / (p[both] * n[both])
    place = np.empty(rows, np.int64)
    place[order] = number
    return areas, size, place
