"""What a grid of trained models says: means with intervals, paired differences, costs; as a table and a page.

Every figure is of the test part, which has chosen nothing. Shapes: N test rows, S scores, T tasks.
"""

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recsys_moe.batches import ordered_rows
from recsys_moe.columns import signed_log1p
from recsys_moe.console import number
from recsys_moe.costs import Cost
from recsys_moe.heads import BinaryHead, Head, Heads, MulticlassHead, OrdinalHead, RegressionHead
from recsys_moe.intervals import (
    Interval,
    Statistic,
    auc_of,
    bootstrap,
    concordance_of,
    difference,
    gauc_of,
    mean_of,
    r2_of,
    seed_interval,
)
from recsys_moe.shards import PreparedData
from recsys_moe.webpage import web_image, web_page, web_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
MEAN = "mean"
"""The row of means over the tasks."""
LOWER_IS_BETTER = ("logloss",)


@dataclass(frozen=True)
class Result:
    """One trained model of the grid: scores `[S, N]` of its fold's test rows and how fast it trained."""

    label: str
    seed: int
    scores: Array
    samples_per_s: float | None = None
    fold: int = 0


@dataclass(frozen=True)
class FoldRows:
    """What is known of a fold's test rows: labels and weights `[T, N]`, groups `[N]` where there are any."""

    labels: Array
    weights: Array
    groups: Array | None = None

    @classmethod
    def of(cls, data: PreparedData) -> "FoldRows":
        """Those of prepared data, without the inputs that come with them."""
        rows = [(r.labels, r.weights, r.groups) for r in ordered_rows(data, "test")]
        labels, weights = (np.concatenate([r[i] for r in rows], 1) for i in (0, 1))
        groups = [r[2] for r in rows if r[2] is not None]
        return cls(labels, weights, np.concatenate(groups) if groups else None)


@dataclass(frozen=True)
class Line:
    """A model on a task (or the mean over them) by one metric: over seeds, and against the baseline (None: it is that)."""

    model: str
    task: str
    metric: str
    seeds: int
    score: Interval
    gap: Interval | None

    @property
    def verdict(self) -> str:
        """ahead, behind or level, as the interval of the difference allows; unknown without one."""
        if self.gap is None:
            return "baseline"
        if math.isnan(self.gap.low):
            return "unknown"
        if not self.gap.clear:
            return "level"
        return "ahead" if (self.gap.low > 0) != (self.metric in LOWER_IS_BETTER) else "behind"


@dataclass(frozen=True)
class Comparison:
    """The lines by task, metric and model, and each model's cost (None: no network) and training rates."""

    data: str
    baseline: str
    rows: int
    folds: int
    draws: int
    by_group: bool
    lines: tuple[Line, ...]
    costs: dict[str, Cost | None]
    samples_per_s: dict[str, float | None]

    @property
    def models(self) -> list[str]:
        return list(self.costs)

    def of(self, model: str, task: str, metric: str) -> Line | None:
        return next((x for x in self.lines if (x.model, x.task, x.metric) == (model, task, metric)), None)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lines": [asdict(line) | {"verdict": line.verdict} for line in self.lines]}


# ---- measuring --------------------------------------------------------------------------------------------------------


def compare_results(
    data: str,
    heads: Sequence[Heads],
    tests: Sequence[FoldRows],
    results: Sequence[Result],
    costs: dict[str, Cost | None],
    baseline: str,
    draws: int,
    seed: int = 0,
    on_draw: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure all models on the same test rows, fold by fold (`heads` and `tests` have one a fold); a figure is the mean over
    the folds. Rows are drawn from those of all folds, a group with all its rows."""
    edges = np.cumsum([0, *(test.labels.shape[1] for test in tests)])
    places = [slice(low, high) for low, high in itertools.pairwise(edges)]
    # By label, fold and seed; then by label and seed, over the folds.
    by_fold: dict[str, list[list[dict[str, Statistic]]]] = {label: [[] for _ in tests] for label in costs}
    for r in sorted(results, key=lambda r: r.seed):
        of_fold = _statistics(heads[r.fold], r.scores, tests[r.fold])
        by_fold[r.label][r.fold].append({name: _on_rows(places[r.fold], s) for name, s in of_fold})
    statistics = {label: [_over_folds(of_seed) for of_seed in zip(*folds, strict=True)] for label, folds in by_fold.items()}
    rows = int(edges[-1])
    groups = [test.groups for test in tests if test.groups is not None]
    units = np.unique(np.concatenate(groups), return_inverse=True)[1] if groups else None
    ones = np.ones(rows)
    measured_fn = {
        label: _with_means({n: np.array([[s[n](ones) for s in of_seeds] for of_seeds in folds]) for n in folds[0][0]})
        for label, folds in by_fold.items()
    }
    drawn = bootstrap(statistics, units, rows, draws, seed, lambda done: on_draw(done, draws))
    drawn = {label: _with_means(values) for label, values in drawn.items()}
    lines = []
    for name, of_baseline in measured_fn[baseline].items():
        task, metric = name.rsplit("/", 1)
        for label, of_labels in measured_fn.items():
            found_fn, gap = of_labels[name], None
            if label != baseline:
                gap = difference(drawn[label][name], drawn[baseline][name], found_fn, of_baseline)
            lines.append(Line(label, task, metric, found_fn.shape[1], seed_interval(found_fn.mean(0)), gap))
    rates: dict[str, float | None] = {}
    for label in costs:
        known = [r.samples_per_s for r in results if r.label == label and r.samples_per_s]
        rates[label] = float(np.median(known)) if known else None
    return Comparison(data, baseline, rows, len(tests), draws, bool(groups), tuple(lines), costs, rates)


def _statistics(heads: Heads, scores: Array, test: FoldRows) -> Any:
    """(task/metric, statistic over all test rows of a fold) of each task."""
    low = 0
    for task, head, y, w in zip(heads.tasks, heads.heads, test.labels, test.weights, strict=True):
        high = low + len(head.score_names(task))
        seen = np.flatnonzero(w > 0)
        groups = None if test.groups is None else test.groups[seen]
        of_task = _of_head(head, scores[low:high][:, seen], y[seen], groups)
        for metric, statistic in of_task.items():
            yield f"{task}/{metric}", _on_rows(seen, statistic)
        low = high


def _over_folds(of_folds: Sequence[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    def mean(statistics: Sequence[Statistic]) -> Statistic:
        return lambda weights: sum(statistic(weights) for statistic in statistics) / len(statistics)

    return {name: mean([fold[name] for fold in of_folds]) for name in of_folds[0]}


def _on_rows(rows: Array | slice, statistic: Statistic) -> Statistic:
    return lambda weights: statistic(weights[rows])


def _of_head(head: Head, scores_sn: Array, y: Array, groups: Array | None) -> dict[str, Statistic]:
    first = np.asarray(scores_sn[0], np.float64)
    if isinstance(head, BinaryHead):
        p = np.clip(first, np.finfo(np.float32).tiny, 1 - np.finfo(np.float32).epsneg)
        found = {"auc": auc_of(scores_sn[0], y), "logloss": mean_of(-(y * np.log(p) + (1 - y) * np.log1p(-p)))}
        return (
            found
            if groups is None
            else {"auc": found["auc"], "gauc": gauc_of(scores_sn[0], y, groups), "logloss": found["logloss"]}
        )
    if isinstance(head, RegressionHead):
        return {"r2": r2_of(signed_log1p(first), signed_log1p(y)) if head.log1p else r2_of(first, y)}
    if isinstance(head, MulticlassHead):
        truth = y.astype(np.int64)
        likelihood = np.maximum(np.asarray(scores_sn, np.float64)[truth, np.arange(len(truth))], np.finfo(np.float32).tiny)
        return {"accuracy": mean_of((scores_sn.argmax(0) == truth).astype(np.float64)), "logloss": mean_of(-np.log(likelihood))}
    assert isinstance(head, OrdinalHead)
    return {"auc": concordance_of(scores_sn[0], y.astype(np.int64))}


def _with_means(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and, of a metric that several tasks have, their mean over the tasks in which it is defined."""
    out = dict(values)
    for metric in dict.fromkeys(name.rsplit("/", 1)[1] for name in values):
        of_tasks = [value for name, value in values.items() if name.endswith(f"/{metric}")]
        if len(of_tasks) > 1:
            stacked = np.stack([np.asarray(v, np.float64) for v in of_tasks])
            known = np.isfinite(stacked)
            count = known.sum(0)
            mean = np.divide(np.where(known, stacked, 0).sum(0), count, out=np.full(count.shape, math.nan), where=count > 0)
            out[f"{MEAN}/{metric}"] = float(mean) if mean.ndim == 0 else mean
    return out


# ---- telling ----------------------------------------------------------------------------------------------------------


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people: a line for each task, metric and model."""
    header = ["task", "metric", "model", "mean ± 95 %", f"against {comparison.baseline}", "95 % interval", ""]
    rows = []
    for (task, metric), lines in itertools.groupby(comparison.lines, key=lambda line: (line.task, line.metric)):
        for first, line in enumerate(lines):
            half = (line.score.high - line.score.low) / 2
            score = number(line.score.value) + ("" if math.isnan(half) else f" ± {half:.4f}")
            gap = "" if line.gap is None else _signed(line.gap.value)
            interval = "" if line.gap is None else f"{_signed(line.gap.low)} … {_signed(line.gap.high)}"
            rows.append(
                [task if not first else "", metric if not first else "", line.model, score, gap, interval, line.verdict]
            )
    return header, rows


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.4f}"


def cost_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what each model costs."""
    rows = []
    for model, cost in comparison.costs.items():
        rate = comparison.samples_per_s[model]
        figures = ["–", "–"] if cost is None else [f"{cost.params:,}", f"{cost.flops:,}"]
        rows.append([model, *figures, "–" if rate is None else f"{rate:,.0f}"])
    return ["model", "dense parameters", "FLOPs a sample", "samples/s in training"], rows


def quality_metric(comparison: Comparison) -> tuple[str, str]:
    """What a single figure should be of: GAUC or AUC if there is one, else the first metric; the tasks' mean if any."""
    first = comparison.lines[0]
    for metric in ("gauc", "auc", first.metric):
        for task in (MEAN, first.task):
            if comparison.of(comparison.baseline, task, metric) is not None:
                return task, metric
    return first.task, first.metric


def page(comparison: Comparison, figures: Mapping[str, "Figure"]) -> str:
    """One HTML page that needs nothing but itself; call it inside of `pictures.drawing`."""
    unit = "whole groups of rows" if comparison.by_group else "rows"
    folds = f" in {comparison.folds} folds" if comparison.folds > 1 else ""
    body = [
        f"<p>{comparison.rows:,} test rows{folds}. Means over seeds with Student's 95 % interval; differences to "
        f"{html.escape(comparison.baseline)} on the same rows with the 95 % interval of {comparison.draws:,} bootstrap draws "
        f"of {unit} and of seeds (these as wide as Student's interval). <i>level</i>: the interval holds 0.</p>",
        web_table(*table(comparison)),
        "<h2>Cost</h2>",
        web_table(*cost_table(comparison)),
    ]
    for caption, figure in figures.items():
        body.append(f"<h2>{html.escape(caption)}</h2>{web_image(figure, caption)}")
    return web_page(f"Comparison on {comparison.data}", "\n".join(body))
