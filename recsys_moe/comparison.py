"""What a grid of trained models says: means with intervals, paired differences, costs; as a table, pictures and a page.

Every figure is of the test part, which has chosen nothing. Shapes: N test rows, S scores, T tasks.
"""

import base64
import html
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
        """ahead, behind or level, as the interval of the difference allows."""
        if self.gap is None:
            return "baseline"
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
    statistics: dict[str, list[dict[str, Statistic]]] = {label: [] for label in costs}
    for (label, _), own in itertools.groupby(sorted(results, key=_label_and_seed), key=_label_and_seed):
        folds = [(places[r.fold], dict(_statistics(heads[r.fold], r.scores, tests[r.fold]))) for r in own]
        statistics[label].append({name: _over_folds([(place, s[name]) for place, s in folds]) for name in folds[0][1]})
    rows = int(edges[-1])
    groups = [test.groups for test in tests if test.groups is not None]
    units = np.unique(np.concatenate(groups), return_inverse=True)[1] if groups else None
    ones = np.ones(rows)
    measured = {
        label: [_with_means({name: s(ones) for name, s in of_seed.items()}) for of_seed in of_seeds]
        for label, of_seeds in statistics.items()
    }
    drawn = bootstrap(statistics, units, rows, draws, seed, lambda done: on_draw(done, draws))
    drawn = {label: _with_means(values) for label, values in drawn.items()}
    lines = []
    for name in measured[baseline][0]:
        task, metric = name.rsplit("/", 1)
        for label, of_seeds in measured.items():
            values = [seed_values[name] for seed_values in of_seeds]
            score, gap = seed_interval(values), None
            if label != baseline:
                base = float(np.mean([seed_values[name] for seed_values in measured[baseline]]))
                gap = difference(drawn[label][name], drawn[baseline][name], score.value - base)
            lines.append(Line(label, task, metric, len(values), score, gap))
    rates: dict[str, float | None] = {}
    for label in costs:
        known = [r.samples_per_s for r in results if r.label == label and r.samples_per_s]
        rates[label] = float(np.median(known)) if known else None
    return Comparison(data, baseline, rows, len(tests), draws, bool(groups), tuple(lines), costs, rates)


def _label_and_seed(result: Result) -> tuple[str, int]:
    return result.label, result.seed


def _over_folds(parts: list[tuple[slice, Statistic]]) -> Statistic:
    return lambda weights: sum(statistic(weights[place]) for place, statistic in parts) / len(parts)


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


def _on_rows(rows: Array, statistic: Statistic) -> Statistic:
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
            gap = "" if line.gap is None else f"{line.gap.value:+.4f}"
            interval = "" if line.gap is None else f"{line.gap.low:+.4f} … {line.gap.high:+.4f}"
            rows.append(
                [task if not first else "", metric if not first else "", line.model, score, gap, interval, line.verdict]
            )
    return header, rows


def cost_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what each model costs."""
    rows = []
    for model, cost in comparison.costs.items():
        rate = comparison.samples_per_s[model]
        figures = ["–", "–"] if cost is None else [f"{cost.params:,}", f"{cost.flops:,}"]
        rows.append([model, *figures, "–" if rate is None else f"{rate:,.0f}"])
    return ["model", "dense parameters", "FLOPs a sample", "samples/s in training"], rows


def quality_metric(comparison: Comparison) -> tuple[str, str]:
    """What a single figure should be of: the mean GAUC or AUC if there is one, else the first task's first metric."""
    for metric in ("gauc", "auc"):
        for task in (MEAN, comparison.lines[0].task):
            if comparison.of(comparison.baseline, task, metric) is not None:
                return task, metric
    return comparison.lines[0].task, comparison.lines[0].metric


def draw_pareto(comparison: Comparison) -> "Figure":
    """Quality against cost, with the front of what nothing beats on both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    task, metric = quality_metric(comparison)
    lines = {model: comparison.of(model, task, metric) for model in comparison.models}
    networks = [m for m, cost in comparison.costs.items() if cost is not None]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=True)
    rated = [m for m in networks if comparison.samples_per_s[m]]
    flops = {m: float(comparison.costs[m].flops) for m in networks}  # type: ignore[union-attr]
    _scatter(axes[0], networks, flops, lines, cheaper_is=-1)
    _scatter(axes[1], rated, {m: comparison.samples_per_s[m] for m in rated}, lines, cheaper_is=1)
    axes[0].set_xlabel("FLOPs a sample in scoring (dense part)")
    axes[1].set_xlabel("samples/s in training")
    axes[0].set_ylabel(f"{'mean ' if task == MEAN else task + ' '}{metric.upper()}, test part")
    for axis in axes:
        for model in comparison.models:
            line = lines[model]
            if model not in networks and line is not None:
                axis.axhline(line.score.value, color="0.5", linewidth=1, linestyle="--")
                axis.annotate(
                    model, (0.01, line.score.value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="0.35"
                )
        axis.grid(alpha=0.3)
    figure.suptitle(f"{comparison.data}: quality against cost (bars: 95 % over seeds; line: not beaten on both)")
    return figure


def _scatter(
    axis: Any, models: Sequence[str], xs: Mapping[str, Any], lines: Mapping[str, Line | None], cheaper_is: int
) -> None:
    points = {m: line.score for m in models if (line := lines[m]) is not None}
    for n, (model, score) in enumerate(points.items()):
        half = 0 if math.isnan(score.high) else (score.high - score.low) / 2
        axis.errorbar(xs[model], score.value, yerr=half, fmt="o", color=f"C{n % 10}", capsize=3)
        axis.annotate(model, (xs[model], score.value), xytext=(6, 5), textcoords="offset points", fontsize=9)
    front = [
        m for m in points
        if not any(points[o].value >= points[m].value and cheaper_is * (xs[o] - xs[m]) > 0 for o in points)
    ]  # fmt: skip
    front.sort(key=lambda m: xs[m])
    axis.plot([xs[m] for m in front], [points[m].value for m in front], color="0.6", linewidth=1, zorder=0)
    if len(points) > 1:
        axis.set_xscale("log")
        axis.margins(x=0.35)


def draw_differences(comparison: Comparison) -> "Figure":
    """A forest plot: each model's difference to the baseline by task, with its interval; clear ones are filled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, metric = quality_metric(comparison)
    first = {line.task: line.metric for line in reversed(comparison.lines)}
    wanted = [(t, metric if comparison.of(comparison.baseline, t, metric) else first[t]) for t in dict.fromkeys(first)]
    wanted.reverse()
    others = [m for m in comparison.models if m != comparison.baseline]
    height = max(2.5, 0.32 * len(wanted) * max(len(others), 1) + 1.4)
    figure, axis = plt.subplots(figsize=(9, height), layout="constrained")
    for n, model in enumerate(others):
        for row, (task, name) in enumerate(wanted):
            line = comparison.of(model, task, name)
            if line is None or line.gap is None:
                continue
            y = row + (n + 0.5) / len(others) * 0.8 - 0.4
            axis.plot([line.gap.low, line.gap.high], [y, y], color=f"C{n % 10}", linewidth=2)
            face = f"C{n % 10}" if line.gap.clear else "white"
            axis.plot(line.gap.value, y, "o", color=f"C{n % 10}", markerfacecolor=face, label=model if row == 0 else None)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(wanted)), [f"{task} ({name})" for task, name in wanted])
    axis.invert_yaxis()
    axis.set_xlabel(
        f"difference to {comparison.baseline}, test part (95 %, bootstrap over rows and seeds; filled: 0 lies outside)"
    )
    axis.grid(alpha=0.3, axis="x")
    if others:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c;background:#fff}}
table{{border-collapse:collapse;margin:1rem 0}}th,td{{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}}
th{{border-bottom:2px solid #888}}td:nth-child(-n+3),th:nth-child(-n+3){{text-align:left}}.cost td:nth-child(n+2),
.cost th:nth-child(n+2){{text-align:right}}img{{max-width:100%}}.ahead{{color:#0a6b2d;font-weight:600}}
.behind{{color:#a3200d;font-weight:600}}.level,.baseline{{color:#666}}
</style></head><body><h1>{title}</h1><p>{intro}</p>{body}</body></html>
"""


def page(comparison: Comparison, figures: Mapping[str, "Figure"]) -> str:
    """One HTML page that needs nothing but itself."""
    unit = "whole groups of rows" if comparison.by_group else "rows"
    folds = f" in {comparison.folds} folds" if comparison.folds > 1 else ""
    intro = (
        f"{comparison.rows:,} test rows{folds}. Means over seeds with Student's 95 % interval; differences to "
        f"<b>{html.escape(comparison.baseline)}</b> on the same rows with the 95 % interval of {comparison.draws:,} bootstrap "
        f"draws of {unit} and of seeds. <i>level</i>: the interval holds 0."
    )
    body = [_html_table(*table(comparison)), "<h2>Cost</h2>", _html_table(*cost_table(comparison), kind="cost")]
    for caption, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        coded = base64.b64encode(png.getvalue()).decode()
        body.append(f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="data:image/png;base64,{coded}">')
    return PAGE.format(title=f"Comparison on {html.escape(comparison.data)}", intro=intro, body="".join(body))


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "lines") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    verdicts = ("ahead", "behind", "level", "baseline")

    def cell(text: str) -> str:
        return f'<td class="{text}">{text}</td>' if text in verdicts else f"<td>{html.escape(text)}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{head}</tr>{body}</table>'
