"""What a comparison says of scores whose truth is known: verdicts, tables, pictures, the page."""

import json
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recsys_moe.comparison import (
    Comparison,
    FoldRows,
    Result,
    compare_results,
    cost_table,
    page,
    quality_metric,
    table,
)
from recsys_moe.costs import Cost
from recsys_moe.heads import Heads
from recsys_moe.pictures import draw_differences, draw_pareto, drawing
from recsys_moe.schema import Schema
from recsys_moe.transforms import Statistics
from recsys_moe.typed import parse, plain

ROWS = 600
SCHEMA = {
    "features": [{"name": "c", "kind": "categorical"}],
    "tasks": [
        {"name": "click", "label": "y"},
        {"name": "buy", "label": "z"},
        {"name": "minutes", "kind": "regression", "label": "m"},
        {"name": "ending", "kind": "multiclass", "label": "e", "classes": ["a", "b"]},
        {"name": "stars", "kind": "ordinal", "label": "s", "levels": [1, 2, 3]},
    ],
}
COSTS: dict[str, Cost | None] = {"good": Cost(1000, 2000), "<b>bad</b>": Cost(500, 900), "trees": None}


@pytest.fixture(scope="module")
def heads() -> Heads:
    return Heads(parse(Schema, SCHEMA, "schema"), Statistics((), ()))


@pytest.fixture(scope="module")
def compared(heads: Heads) -> Comparison:
    random = np.random.default_rng(0)
    labels = np.stack([random.integers(2, size=ROWS), random.integers(2, size=ROWS), random.normal(size=ROWS) + 3,
                       random.integers(2, size=ROWS), random.integers(3, size=ROWS)]).astype(np.float32)  # fmt: skip
    weights = np.ones_like(labels)
    weights[1] = labels[0]  # buy is observed where a click happened

    def scores(noise: float, seed: int) -> Any:
        own = np.random.default_rng(seed)
        e = np.clip(labels[3] * 0.6 + 0.2 + noise * own.normal(size=ROWS), 0.01, 0.99)
        binary = [np.clip(0.3 + 0.4 * y + noise * own.normal(size=ROWS), 0.01, 0.99) for y in labels[:2]]
        numbers = labels[2] + 2 * noise * own.normal(size=ROWS)
        stars = labels[4] + 1 + 3 * noise * own.normal(size=ROWS)
        return np.stack([*binary, numbers, 1 - e, e, stars]).astype(np.float32)

    results = [Result("good", s, scores(0.2, s), 100.0 + s) for s in range(3)]
    results += [Result("<b>bad</b>", s, scores(0.6, 10 + s), 300.0) for s in range(3)]
    results.append(Result("trees", 0, scores(0.2, 99)))
    groups = np.arange(ROWS) % 60
    return compare_results("feed", [heads], [FoldRows(labels, weights, groups)], results, COSTS, "good", draws=200)


def test_verdicts_follow_the_truth(compared: Comparison) -> None:
    verdicts = {(line.model, line.task, line.metric): line.verdict for line in compared.lines}
    bad = {v for (model, _, _), v in verdicts.items() if model == "<b>bad</b>"}
    assert bad == {"behind"}  # by AUC, which falls, and by logloss, which rises
    assert verdicts["trees", "click", "auc"] == "level"
    assert verdicts["good", "click", "auc"] == "baseline"
    line = compared.of("<b>bad</b>", "click", "logloss")
    assert line is not None
    assert line.gap is not None
    assert line.gap.low > 0


def test_values_are_the_metrics_of_the_heads(compared: Comparison, heads: Heads) -> None:
    metrics = {(line.task, line.metric) for line in compared.lines}
    own = {("click", "auc"), ("click", "gauc"), ("click", "logloss"), ("buy", "auc"), ("buy", "gauc"), ("buy", "logloss"),
           ("minutes", "r2"), ("ending", "accuracy"), ("ending", "logloss"), ("stars", "auc")}  # fmt: skip
    assert metrics == own | {("mean", "auc"), ("mean", "gauc"), ("mean", "logloss")}
    mean = compared.of("good", "mean", "auc")
    tasks = [compared.of("good", task, "auc") for task in ("click", "buy", "stars")]
    assert mean is not None
    assert mean.score.value == pytest.approx(np.mean([t.score.value for t in tasks if t]))
    assert quality_metric(compared) == ("mean", "gauc")
    one_seed = compared.of("trees", "click", "auc")
    assert one_seed is not None
    assert math.isnan(one_seed.score.low)
    assert one_seed.gap is not None
    assert one_seed.gap.low < 0


def test_what_people_are_shown(compared: Comparison) -> None:
    header, rows = table(compared)
    assert header[4] == "against good"
    assert [len(row) for row in rows] == [7] * len(rows)
    assert rows[0][:3] == ["click", "auc", "good"]
    assert rows[1][:3] == ["", "", "<b>bad</b>"]
    assert cost_table(compared)[1][2] == ["trees", "–", "–", "–"]
    with drawing():
        text = page(compared, {"Cost": draw_pareto(compared), "Gaps": draw_differences(compared)})
    assert "&lt;b&gt;bad&lt;/b&gt;" in text
    assert "<b>bad</b>" not in text
    assert text.count("data:image/png;base64,") == 2
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    json.dumps(plain(compared.to_json()), allow_nan=False)


def test_what_is_not_defined_is_neither_level_nor_a_number(heads: Heads) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(2, size=(5, 80)).astype(np.float32)
    labels[0] = 0  # nobody clicks: there is no AUC
    scores = [random.random((6, 80)).astype(np.float32) for _ in range(2)]
    costs: dict[str, Cost | None] = {"a": None, "b": None}
    results = [Result(label, 0, s) for label, s in zip(costs, scores, strict=True)]
    found = compare_results("d", [heads], [FoldRows(labels, np.ones_like(labels))], results, costs, "a", draws=20)
    of_click = found.of("b", "click", "auc")
    assert of_click is not None
    assert of_click.verdict == "unknown"
    assert table(found)[1][1][3:] == ["–", "–", "– … –", "unknown"]
    undrawn = compare_results("d", [heads], [FoldRows(labels, np.ones_like(labels))], results, costs, "a", draws=0)
    assert {line.verdict for line in undrawn.lines} == {"baseline", "unknown"}


def test_a_draws_rows_are_the_same_for_all_tasks(compared: Comparison) -> None:
    """The mean's interval is of the tasks' values in one draw: no wider than theirs."""
    mean = compared.of("<b>bad</b>", "mean", "auc")
    widths = [
        line.gap.high - line.gap.low for t in ("click", "buy") if (line := compared.of("<b>bad</b>", t, "auc")) and line.gap
    ]
    assert mean is not None
    assert mean.gap is not None
    assert mean.gap.high - mean.gap.low < max(widths)


def test_figures_are_means_over_folds(heads: Heads) -> None:
    random = np.random.default_rng(0)
    tests = [FoldRows(random.integers(2, size=(5, n)).astype(np.float32), np.ones((5, n), np.float32)) for n in (200, 300)]
    results = [
        Result(label, 0, random.random((6, test.labels.shape[1])).astype(np.float32), fold=fold)
        for label in ("a", "b")
        for fold, test in enumerate(tests)
    ]
    found = compare_results("d", [heads] * 2, tests, results, {"a": None, "b": None}, "a", draws=20)
    line = found.of("b", "click", "auc")
    aucs = [roc_auc_score(test.labels[0], r.scores[0]) for r, test in zip(results[2:], tests, strict=True)]
    assert line is not None
    assert line.score.value == pytest.approx(np.mean(aucs))
    assert (found.rows, found.folds, found.by_group) == (500, 2, False)
