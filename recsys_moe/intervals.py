"""How sure a figure is: intervals over seeds, and paired differences by a bootstrap over test rows and seeds.

Two models are compared on the same resampled rows: what makes a row hard for both cancels. Where rows have groups (users),
whole groups are drawn, since a user's rows are not independent. Seeds are drawn too: a difference that another seed would turn
round is none. What drawn seeds add is made as wide as Student's interval is: where seeds are what differs, a plain bootstrap's
95 % interval of three seeds holds the truth in 80 % of cases.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from recsys_moe.metrics import Floats, group_aucs

Weights = npt.NDArray[np.floating]
Statistic = Callable[[Weights], float]


@dataclass(frozen=True)
class Interval:
    """A figure and its interval. NaN bounds: there is nothing to tell them from."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of independent runs with Student's interval: x̄ ± t·s/√n.

    >>> seed_interval([0.5, 0.7]).value
    0.6
    >>> seed_interval([0.5])
    Interval(value=0.5, low=nan, high=nan)
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


# ---- statistics of weighted rows: what a resampled part would give ----------------------------------------------------


def auc_of(scores: Floats, labels: Floats) -> Statistic:
    """AUC of 0/1 `labels` with a weight a row: the weighted share of pairs in the right order, ties half.

    >>> statistic = auc_of(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0.0, 0.0, 1.0, 1.0]))
    >>> statistic(np.ones(4)), statistic(np.array([1.0, 0.0, 1.0, 1.0]))
    (0.875, 1.0)
    """
    order = np.argsort(scores, kind="stable")
    rising, rows = np.asarray(scores)[order], len(order)
    positives = np.flatnonzero(np.asarray(labels)[order] > 0)
    # Each positive's run of equal scores, as places among all rows and among the positives. These are few where a task is
    # sparse: only the sum over all rows has to be taken anew for other weights.
    starts = np.flatnonzero(np.r_[True, rising[1:] != rising[:-1]][:rows])
    run = np.searchsorted(starts, positives, side="right") - 1
    begin, end = starts[run], np.r_[starts[1:], rows][run]
    first, last = np.searchsorted(positives, begin), np.searchsorted(positives, end)

    def statistic(weights: Weights) -> float:
        w = weights[order].astype(np.float64)
        up, below, up_below = w[positives], np.zeros(rows + 1), np.zeros(len(positives) + 1)
        np.cumsum(w, out=below[1:])
        np.cumsum(up, out=up_below[1:])
        pairs = up_below[-1] * (below[-1] - up_below[-1])
        right = up @ (below[begin] - up_below[first] + below[end] - up_below[last]) / 2  # half of the negatives in its own run
        return float(right / pairs) if pairs else math.nan

    return statistic


def mean_of(values: Floats) -> Statistic:
    """The weighted mean, of losses or hits.

    >>> mean_of(np.array([1.0, 3.0]))(np.array([3.0, 1.0]))
    1.5
    """

    def statistic(weights: Weights) -> float:
        total = weights.sum()
        return float(weights @ values / total) if total else math.nan

    return statistic


def r2_of(predictions: Floats, labels: Floats) -> Statistic:
    """1 − Σ w(y − ŷ)² / Σ w(y − ȳ)², ȳ the weighted mean.

    >>> r2_of(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))(np.ones(3))
    0.5
    """
    y, error = np.asarray(labels, np.float64), (np.asarray(labels, np.float64) - predictions) ** 2

    def statistic(weights: Weights) -> float:
        total = weights.sum()
        spread = weights @ (y - weights @ y / total) ** 2 if total else 0.0
        return float(1 - weights @ error / spread) if spread else math.nan

    return statistic


def gauc_of(scores: Floats, labels: Floats, groups: npt.NDArray[np.int64]) -> Statistic:
    """GAUC where rows of a group have one weight: the groups' AUCs, by their weighted rows; single-class groups left out.

    >>> statistic = gauc_of(np.array([0.1, 0.9, 0.5, 0.4]), np.array([0.0, 1.0, 0.0, 1.0]), np.array([7, 7, 3, 3]))
    >>> statistic(np.ones(4)), statistic(np.array([3.0, 3.0, 1.0, 1.0]))
    (0.5, 0.75)
    """
    areas, _, place = group_aucs(scores, labels, groups)
    area = areas[place]
    counted = np.isfinite(area)
    mean = mean_of(area[counted])
    return lambda weights: mean(weights[counted])


def concordance_of(scores: Floats, levels: npt.NDArray[np.int64]) -> Statistic:
    """The weighted share of pairs of unlike level in which the higher one has the higher score, ties half.

    >>> concordance_of(np.array([0.1, 0.5, 0.4]), np.array([0, 1, 2]))(np.ones(3)) == 2 / 3
    True
    """
    parts = []
    for level in np.unique(levels)[1:]:
        rows = np.flatnonzero(levels <= level)
        parts.append((rows, levels[rows] == level, auc_of(scores[rows], (levels[rows] == level).astype(np.float64))))

    def statistic(weights: Weights) -> float:
        right = pairs = 0.0
        for rows, high, auc in parts:
            w = weights[rows]
            count = float(w[high].sum() * w[~high].sum())
            if count:
                right, pairs = right + auc(w) * count, pairs + count
        return right / pairs if pairs else math.nan

    return statistic


# ---- the bootstrap ----------------------------------------------------------------------------------------------------


def bootstrap(
    statistics: Mapping[str, Sequence[Mapping[str, Statistic]]],
    units: npt.NDArray[np.int64] | None,
    rows: int,
    draws: int,
    seed: int = 0,
    on_draw: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """Each model's figures on drawn rows, the mean over its seeds: `[draws]` by model and figure. All models are measured on
    the same rows in a draw.

    Args:
        statistics: for each model, for each of its seeds, statistics by name, all over the same `rows` rows.
        units: for each row the number (0, 1, …) of the group that is drawn as one; None: rows are drawn one by one.
    """
    random = np.random.default_rng(seed)
    number = rows if units is None else int(units.max(initial=-1)) + 1
    out = {model: {name: np.full(draws, math.nan) for name in of_seeds[0]} for model, of_seeds in statistics.items()}
    for draw in range(draws):
        counts = np.bincount(random.integers(number, size=number), minlength=number).astype(np.float64)
        weights = counts if units is None else counts[units]
        for model, of_seeds in statistics.items():
            for name, values in out[model].items():
                values[draw] = sum(of_seed[name](weights) for of_seed in of_seeds) / len(of_seeds)
        on_draw(draw + 1)
    return out


def drawn_seeds(figures_fn: Floats, draws: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """What other seeds would add to the mean of n seeds' figures in F folds, `[draws]`: n of them are drawn in each fold.

    The mean of n drawn of n varies by (n − 1)/n of the variance that the mean of n has; that is made good.
    """
    folds, n = figures_fn.shape
    times_dfn = random.multinomial(n, np.full(n, 1 / n), size=(draws, folds))
    deviations: npt.NDArray[np.float64] = ((times_dfn - 1) * figures_fn).mean((1, 2)) * math.sqrt(n / max(n - 1, 1))
    return deviations


def widening(model_fn: Floats, baseline_fn: Floats, level: float = 0.95) -> float:
    """How much wider Student's interval of the difference of two models' means is than the normal one, with Welch's degrees of
    freedom: a model's variance is pooled from its n seeds in each of F folds, `[F, n]`, and has F·(n − 1) of them.

    >>> round(widening(np.array([[0.5, 0.7, 0.6]]), np.array([[0.5, 0.7, 0.6]])), 2)  # 2.776 (4 degrees of freedom) / 1.960
    1.42
    """
    spread = [(f.var(1, ddof=1).mean() / f.shape[1], f.size - len(f)) for f in (model_fn, baseline_fn) if f.shape[1] > 1]
    whole = sum(v for v, _ in spread)
    if not whole > 0:  # one seed only, or seeds that agree: they add nothing
        return 1.0
    freedom = whole**2 / sum(v**2 / d for v, d in spread)
    return float(stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2))


def difference(
    model: npt.NDArray[np.float64],
    baseline: npt.NDArray[np.float64],
    model_fn: Floats,
    baseline_fn: Floats,
    level: float = 0.95,
) -> Interval:
    """The difference of two models' means with the percentile interval of drawn rows and seeds.

    Args:
        model, baseline: their figures on drawn rows, `[draws]`, as `bootstrap` has them.
        model_fn, baseline_fn: their figures on all rows, in F folds of n seeds each.
    """
    random = np.random.default_rng(0)
    of_seeds = [drawn_seeds(figures_fn, len(model), random) for figures_fn in (model_fn, baseline_fn)]
    gaps = model - baseline + widening(model_fn, baseline_fn, level) * (of_seeds[0] - of_seeds[1])
    measured = float(model_fn.mean() - baseline_fn.mean())
    gaps = gaps[np.isfinite(gaps)]
    if not len(gaps):
        return Interval(measured, math.nan, math.nan)
    low, high = np.quantile(gaps, [(1 - level) / 2, (1 + level) / 2])
    return Interval(measured, float(low), float(high))
