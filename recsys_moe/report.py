"""`recsys-moe inspect`: a trained model looked at on labelled rows, as one HTML file that needs nothing else.

The rows are read once, as a stream: scores and labels are counted in bins of fixed number. What needs the rows themselves
(metrics, the experts' health, permutation importance) is measured on a random sample of them.

Shapes: N rows, T tasks, S scores, E experts.
"""

import html
import math
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from recsys_moe.batches import Batch
from recsys_moe.errors import UserError
from recsys_moe.heads import BinaryHead, MulticlassHead, OrdinalHead
from recsys_moe.health import Finding, Floats, Health, HealthConfig, find_anomalies, measure
from recsys_moe.labels import group_ids, task_labels
from recsys_moe.metrics import Floats as AnyFloats
from recsys_moe.metrics import quality, quality_name
from recsys_moe.predictor import Predictor
from recsys_moe.schema import Cross
from recsys_moe.shards import Rows
from recsys_moe.typed import plain
from recsys_moe.webpage import web_image, web_page, web_table

HEALTH_ROWS = 4096
"""As many rows of the sample are enough for the experts' health, and each task's gradient at each expert fits into memory."""
REPEATS = 3
"""Permutations of each feature: their spread says how much of an importance is chance."""

Progress = Callable[[str, int, int | None], None]


# ---- what is counted of the stream ---------------------------------------------------------------------------------------


class Spectrum:
    """Numbers counted in 2¹⁶ bins, whatever their range: a bin is what float32 numbers share in their first 16 bits (sign,
    exponent and 7 bits of the mantissa), so that it is at most 0.8 % wide. `sums` adds up something else for each bin.

    >>> spectrum = Spectrum(1)
    >>> spectrum.add(np.array([0.5, 0.25, 0.5]), np.array([[1.0, 0.0, 0.0]]))
    >>> [(count, total.item()) for _, count, total in spectrum.quantiles(3)], round(spectrum.quantile(0.9), 3)
    ([(1, 0.0), (2, 1.0)], 0.502)
    """

    _VALUES = (np.arange(2**16, dtype=np.uint32) << 16) + 2**15

    def __init__(self, sums: int = 0) -> None:
        self.counts = np.zeros(2**16, np.int64)
        self.sums = np.zeros((sums, 2**16))

    @property
    def values(self) -> Floats:
        """The middle of each bin; the bins of what is no number are at 0 and empty."""
        rising = np.where(self._VALUES >> 31 > 0, self._VALUES & 0x7FFFFFFF, ~self._VALUES).view(np.float32)
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(rising.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)

    def add(self, numbers: npt.NDArray[Any], others: npt.NDArray[Any] | None = None) -> None:
        """Count finite numbers `[N]`; `others` `[sums, N]` are added up in their bins."""
        bits = numbers.astype(np.float32).view(np.uint32)
        place = np.where(bits >> 31 > 0, ~bits, bits | np.uint32(0x80000000)) >> 16
        self.counts += np.bincount(place, minlength=2**16)
        for row in range(len(self.sums)):
            assert others is not None
            self.sums[row] += np.bincount(place, others[row], 2**16)

    def quantiles(self, parts: int) -> list[tuple[slice, int, Floats]]:
        """At most `parts` runs of bins of about as many numbers each: the run, its numbers and its sums."""
        total = self.counts.cumsum()
        ends = np.searchsorted(total, -(-np.arange(1, parts + 1) * total[-1] // parts)) + 1
        found, low = [], 0
        for high in np.unique(ends):
            run = slice(low, int(high))
            if count := int(self.counts[run].sum()):
                found.append((run, count, self.sums[:, run].sum(1)))
            low = int(high)
        return found

    def histogram(self, edges: Floats) -> Floats:
        """The share of all numbers between each two edges; what lies beyond the ends counts to the bins there."""
        place = np.clip(np.searchsorted(edges, self.values, side="right") - 1, 0, len(edges) - 2)
        shares: Floats = np.bincount(place, self.counts, len(edges) - 1) / max(int(self.counts.sum()), 1)
        return shares

    def quantile(self, share: float) -> float:
        """The number below which that share of the numbers lies."""
        total = self.counts.cumsum()
        return float(self.values[min(int(np.searchsorted(total, share * total[-1])), 2**16 - 1)])


@dataclass(frozen=True)
class CurvePoint:
    """Rows of about one score: their number, mean score, mean label and its 95 % interval."""

    rows: int
    score: float
    label: float
    low: float
    high: float


class TaskCurve:
    """One task's scores against its labels, counted.

    Of a multiclass task the score is the predicted class's probability, the label whether it is the row's.
    """

    def __init__(self, task: str, head: Any) -> None:
        self.task, self._head = task, head
        self.two_classes = isinstance(head, BinaryHead | MulticlassHead)
        self.scores = Spectrum(sums=3)  # of the scores, the labels and their squares
        # For the histogram: the scores of either outcome, or the labels.
        self.positives, self.negatives, self.labels = Spectrum(), Spectrum(), Spectrum()

    def add(self, scores_sn: AnyFloats, labels_n: AnyFloats) -> None:
        """Count rows that observe the task."""
        labels = labels_n.astype(np.float64)
        if isinstance(self._head, MulticlassHead):
            scores, labels = scores_sn.max(0), (scores_sn.argmax(0) == labels).astype(np.float64)
        else:
            scores = scores_sn[0]
            if isinstance(self._head, OrdinalHead):
                labels = np.asarray(self._head.values)[labels.astype(np.int64)]
        scores = scores.astype(np.float64)
        self.scores.add(scores, np.stack([scores, labels, labels**2]))
        if self.two_classes:
            self.positives.add(scores[labels > 0])
            self.negatives.add(scores[labels == 0])
        else:
            self.labels.add(labels)

    def points(self, parts: int = 15) -> list[CurvePoint]:
        """The reliability curve, from `parts` sets of equally many rows, by rising score.

        The interval is Wilson's (1927) for a rate, and mean ± 1.96 standard errors for a number.
        """
        found = []
        for _, n, (score, label, squares) in self.scores.quantiles(parts):
            mean = label / n
            if self.two_classes:
                z = 1.96
                middle, half = mean + z * z / (2 * n), z * math.sqrt(max(mean * (1 - mean), 0) / n + z * z / (4 * n * n))
                low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
            else:
                half = 1.96 * math.sqrt(max(squares / n - mean**2, 0) / n)
                low, high = mean - half, mean + half
            # At a rate of 0 or 1 an end of the interval is the rate itself, but for rounding.
            found.append(CurvePoint(n, score / n, mean, min(low, mean), max(high, mean)))
        return found


class Sample:
    """A random sample of a stream of rows, in their order: the rows of the smallest of as many random numbers.

    It depends on the rows and the seed, not on how the stream is cut into tables.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._random = rows, np.random.default_rng(seed)
        self._limit = 1.0
        self._tables: list[pa.Table] = []
        self._keys: list[Floats] = []

    def add(self, table: pa.Table) -> None:
        keys = self._random.random(table.num_rows)
        kept = keys <= self._limit
        self._tables.append(table.filter(pa.array(kept)))
        self._keys.append(keys[kept])
        if sum(map(len, self._keys)) > 2 * self._rows:
            self.table()

    def table(self) -> pa.Table:
        """What is chosen of the rows so far."""
        table, keys = pa.concat_tables(self._tables), np.concatenate(self._keys)
        if len(keys) > self._rows:
            self._limit = float(np.partition(keys, self._rows - 1)[self._rows - 1])
            kept = keys <= self._limit
            table, keys = table.filter(pa.array(kept)), keys[kept]
        self._tables, self._keys = [table.combine_chunks()], [keys]
        return self._tables[0]


# ---- what is measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Importance:
    """What permuting each feature costs each task's quality: mean and standard deviation `[features, T]` over `REPEATS`
    permutations; NaN where a task has no quality in these rows."""

    features: tuple[str, ...]
    mean: Floats
    deviation: Floats


@dataclass(frozen=True, eq=False)
class Inspection:
    """Everything that a report shows: `metrics` and what follows are of the sample, `curves` of all `rows`."""

    model: str
    data: str
    rows: int
    sampled: int
    seed: int
    curves: list[TaskCurve]
    metrics: dict[str, dict[str, Any]]
    quality_names: tuple[str, ...]
    health: Health
    findings: list[Finding]
    importance: Importance

    def to_json(self) -> dict[str, Any]:
        """The figures without the pictures."""
        i = self.importance
        tasks = list(self.metrics)
        importance = {
            feature: {task: {"mean": float(i.mean[f, t]), "std": float(i.deviation[f, t])} for t, task in enumerate(tasks)}
            for f, feature in enumerate(i.features)
        }
        return {
            "rows": self.rows,
            "sampled": self.sampled,
            "anomalies": [finding.message for finding in self.findings],
            "metrics": self.metrics,
            "importance": plain(importance),
        }


def inspect(
    predictor: Predictor,
    tables: Iterable[pa.Table],
    model: str,
    data: str,
    rows: int,
    seed: int,
    progress: Progress = lambda phase, done, total: None,
) -> Inspection:
    """Look at a bundle's model on raw rows that have the label columns; `rows` of them make the sample.

    `model` and `data` are what they are called in the report.

    Raises:
        UserError: no row observes any task.
    """
    bundle = predictor.bundle
    heads, schema = bundle.heads, bundle.schema
    curves = [TaskCurve(task, head) for task, head in zip(heads.tasks, heads.heads, strict=True)]
    sample, done = Sample(rows, seed), 0
    for table in tables:
        scores = heads.by_task(predictor.score(table))
        labels, weights = task_labels(table, schema)
        for t, curve in enumerate(curves):
            seen = weights[t] > 0
            curve.add(scores[t][:, seen], labels[t][seen])
        sample.add(table)
        done += table.num_rows
        progress("score", done, None)
    progress("score", done, done)
    if not any(curve.scores.counts.any() for curve in curves):
        raise UserError(f"no row of {data!r} has a label that counts for a task; inspect rows with labels")
    chosen = sample.table()
    labels, weights = task_labels(chosen, schema)
    measured = heads.metrics([(predictor.score(chosen), labels, weights, group_ids(chosen, schema))])
    health = _health(predictor, chosen.slice(0, HEALTH_ROWS))
    return Inspection(
        model=model,
        data=data,
        rows=done,
        sampled=chosen.num_rows,
        seed=seed,
        curves=curves,
        metrics={task: plain(asdict(m)) for task, m in measured.items()},
        quality_names=tuple(map(quality_name, measured.values())),
        health=health,
        findings=find_anomalies(health, HealthConfig()),
        importance=permutation_importance(predictor, chosen, seed, progress),
    )


def _health(predictor: Predictor, table: pa.Table) -> Health:
    bundle = predictor.bundle
    batch = Batch.of(Rows(bundle.transform(table), *task_labels(table, bundle.schema), None))
    with torch.no_grad():
        x_bd = bundle.model.represent(batch.ids_bf, batch.dense_bd, batch.lists)
        first_bo = bundle.model.first_order_outputs(batch.ids_bf, batch.dense_bd, batch.lists)
    return measure(bundle.model.network, bundle.heads, x_bd, batch.labels_bt, batch.weights_bt, first_bo)


def permutation_importance(
    predictor: Predictor, table: pa.Table, seed: int, progress: Progress = lambda phase, done, total: None
) -> Importance:
    """How much of each task's quality is lost when a feature's column is permuted among the rows (Breiman 2001).

    A cross follows the columns that it reads. Of two features that say the same, each alone costs little.
    """
    schema, heads = predictor.bundle.schema, predictor.bundle.heads
    labels, weights = task_labels(table, schema)

    def qualities(rows: pa.Table) -> Floats:
        measured = heads.metrics([(predictor.score(rows), labels, weights, None)])
        return np.array([quality(m) for m in measured.values()])

    features = [f.name for f in schema.features if not isinstance(f, Cross)]
    whole, lost = qualities(table), list[list[Floats]]()
    for number, feature in enumerate(features):
        place = table.column_names.index(feature)
        random = np.random.default_rng((seed, number))
        lost.append([])
        for _ in range(REPEATS):
            column = table[feature].take(pa.array(random.permutation(table.num_rows)))
            lost[-1].append(whole - qualities(table.set_column(place, feature, column)))
        progress("permute features", number + 1, len(features))
    losses = np.array(lost)
    return Importance(tuple(features), losses.mean(1), losses.std(1))


# ---- the page ------------------------------------------------------------------------------------------------------------

_WELL = "No anomaly: no expert has collapsed, none is held by one task, no task leaves its own experts aside."


def write_report(page: str, path: Path) -> None:
    """Write a page; it appears whole or not at all.

    Raises:
        UserError: it can't be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"--output {str(path)!r} can't be written ({error.strerror}); name another file") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def page_of(inspection: Inspection) -> str:
    """The whole page: pictures inside, no script, nothing from elsewhere."""
    from recsys_moe import pictures  # matplotlib

    i = inspection
    text = html.escape
    with pictures.drawing():
        health = []
        if len(i.health.tasks) > 1:
            health.append(web_image(pictures.draw_cosines(i.health), "Cosines of the tasks' gradients"))
        for name, plan in i.health.plans.items():
            health.append(web_image(pictures.draw_plan(name, plan, i.health.tasks), f"Health of the experts of {name}"))
        reliability = web_image(pictures.draw_reliability(i.curves), "Reliability curve of each task")
        histograms = web_image(pictures.draw_scores(i.curves), "Histogram of each task's scores")
        importance = web_image(
            pictures.draw_importance(i.importance.features, list(i.metrics), i.quality_names, i.importance.mean),
            "Permutation importance of each feature for each task",
        )
    anomalies = "".join(f'<p class="warning">{text(f.message)}</p>' for f in i.findings) or f'<p class="well">{_WELL}</p>'
    if not i.health.plans:
        anomalies = "<p>This model has no gates and no experts.</p>"
    sample = f"a random sample of {i.sampled:,} (seed {i.seed})" if i.sampled < i.rows else "all of them"
    spread = i.importance.deviation
    lost = [
        [feature, *(_figure(m, s) for m, s in zip(i.importance.mean[f], spread[f], strict=True))]
        for f, feature in enumerate(i.importance.features)
    ]
    body = f"""<p>{i.rows:,} rows scored. Metrics and importance are of {sample}, the experts' health is of up to
{HEALTH_ROWS:,} of them.</p>
<nav><a href="#tasks">Tasks</a> <a href="#experts">Experts</a> <a href="#reliability">Reliability</a>
<a href="#scores">Scores</a> <a href="#importance">Importance</a></nav>
<h2 id="tasks">Tasks</h2>
{_metric_tables(i.metrics)}
<h2 id="experts">Experts</h2>
{anomalies}
{"".join(health)}
<details><summary>Every expert's figures</summary>{web_table(*i.health.table()) if i.health.plans else ""}</details>
<h2 id="reliability">Reliability</h2>
<p>Rows of about the same score, about as many a point, and what became of them: a calibrated model's points lie on the
diagonal. Bars are 95 % intervals.</p>
{reliability}
<h2 id="scores">Scores</h2>
<p>How scores are spread: of a task with two outcomes apart for each, of a number or level beside what was observed.</p>
{histograms}
<h2 id="importance">Importance</h2>
<p>What a task loses of its quality when a feature's values are shuffled among the rows, {REPEATS} times over. Of two features
that say the same, each alone costs little; a cross of features moves with them.</p>
{importance}
<details><summary>Every feature's loss, ± its standard deviation</summary>
{web_table(["feature", *i.metrics], lost)}</details>"""
    return web_page(f"{i.model} on {i.data}", body)


def _metric_tables(metrics: dict[str, dict[str, Any]]) -> str:
    """A table for each kind of task; GAUC only where one is known."""
    grouped = any(values.get("gauc") is not None for values in metrics.values())
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for task, values in metrics.items():
        shown = {name: value for name, value in values.items() if grouped or not name.startswith("gauc")}
        kinds.setdefault(tuple(shown), []).append([task, *map(_cell, shown.values())])
    return "".join(web_table(["task", *names], rows) for names, rows in kinds.items())


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _figure(mean: float, spread: float) -> str:
    return "–" if math.isnan(mean) else f"{mean:.4f} ± {spread:.4f}"
