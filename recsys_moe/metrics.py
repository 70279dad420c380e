"""Metrics of binary tasks: ranking (AUC, GAUC), likelihood (logloss, normalized entropy) and calibration (ratio, ECE)."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def binary_metrics(scores: Floats, labels: Floats, groups: npt.NDArray[np.int64] | None = None) -> BinaryMetrics:
    """All metrics of probabilities `scores` against 0/1 `labels`, both `[N]`.

    >>> m = binary_metrics(np.array([0.9, 0.2, 0.6]), np.array([1.0, 0.0, 0.0]))
    >>> m.auc, m.rows
    (1.0, 3)
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    rows = len(labels)
    if not rows:
        return BinaryMetrics(math.nan, math.nan, 0, math.nan, math.nan, math.nan, math.nan, 0)
    gauc, left_out = grouped_auc(scores, labels, groups) if groups is not None else (math.nan, 0)
    rate = float(labels.mean())
    loss = log_loss(scores, labels)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else 0.0
    return BinaryMetrics(
        auc=grouped_auc(scores, labels, np.zeros(rows, np.int64))[0],
        gauc=gauc,
        gauc_left_out=left_out,
        logloss=loss,
        ne=loss / entropy if entropy else math.nan,
        calibration=float(scores.mean()) / rate if rate else math.nan,
        ece=expected_calibration_error(scores, labels),
        rows=rows,
    )


def log_loss(scores: Floats, labels: Floats) -> float:
    """Mean of −y·log(p) − (1−y)·log(1−p), with p kept one float32 step away from 0 and 1."""
    p = np.clip(scores, np.finfo(np.float32).tiny, 1 - np.finfo(np.float32).epsneg)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def expected_calibration_error(scores: Floats, labels: Floats) -> float:
    """ECE over equal-width bins; a score of exactly 1 belongs to the last one."""
    bins = np.minimum((scores * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gap = np.bincount(bins, scores, ECE_BINS) - np.bincount(bins, labels, ECE_BINS)
    return float(np.abs(gap).sum() / len(labels))


def grouped_auc(scores: Floats, labels: Floats, groups: npt.NDArray[np.int64]) -> tuple[float, int]:
    """AUC of each group from mid-ranks (Mann-Whitney), averaged by rows; and the number of single-class groups.

    One sort for all groups: a loop over users would take minutes where this takes a second.
    """
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
    positive = np.bincount(number, y)
    negative = size - positive
    both = (positive > 0) & (negative > 0)
    if not both.any():
        return math.nan, len(size)
    rank_sum = np.bincount(number, rank * y)[both]
    p, n = positive[both], negative[both]
    auc = (rank_sum - p * (p + 1) / 2) / (p * n)
    return float(np.average(auc, weights=size[both])), int((~both).sum())
