"""Trees and linear models on prepared data: every kind of task, against scikit-learn used by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from recsys_moe.baselines import Baseline, LogisticConfig, Part, TreesConfig
from recsys_moe.metrics import quality
from recsys_moe.schema import Schema
from recsys_moe.typed import parse

TREES = TreesConfig(iterations=20, leaves=7)
KINDS = {
    "features": [
        {"name": "user", "kind": "hashed", "buckets": 5000},
        {"name": "own", "kind": "hashed", "buckets": 50, "collisions": "none"},
        {"name": "colour", "kind": "categorical"},
        {"name": "price", "kind": "numeric", "buckets": 8},
        {"name": "seen", "kind": "sequence", "max_length": 5},
        {"name": "picture", "kind": "embedding", "dim": 2},
    ],
    "tasks": [
        {"name": "click", "label": "click == 1"},
        {"name": "minutes", "kind": "regression", "label": "minutes", "log1p": True},
        {"name": "ending", "kind": "multiclass", "label": "ending", "classes": ["a", "b", "never"]},
        {"name": "stars", "kind": "ordinal", "label": "stars", "levels": [1, 2, 5]},
        {"name": "constant", "label": "nothing == 1", "mask": "click == 1"},
    ],
}


def draw(rows: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    user, price = random.integers(300, size=rows), random.normal(size=rows)
    taste = np.random.default_rng(9).normal(size=300)[user]
    click = random.random(rows) < 1 / (1 + np.exp(-2 * taste - price))
    return pa.table(
        {
            "user": user,
            "own": user % 40,
            "colour": np.where(price > 0.3, "red", "blue"),
            "price": price,
            "seen": [list(random.choice(["x", "y"], length)) for length in random.integers(0, 4, rows)],
            "picture": list(random.normal(size=(rows, 2)).astype(np.float32)),
            "click": click.astype(int),
            "minutes": np.exp(price + random.normal(size=rows) / 4),
            "ending": np.where(taste > 0, "a", "b"),
            "stars": np.where(price > 1, 5, np.where(price > -1, 2, 1)),
            "nothing": np.zeros(rows, int),
        }
    )


@pytest.mark.parametrize("config", [TREES, LogisticConfig(c=(1.0,))], ids=["trees", "logistic"])
def test_every_kind_of_task_is_learnt(config: Any, tmp_path: Path, write_prepared: Callable[..., Any]) -> None:
    schema = parse(Schema, KINDS, "schema")
    parts = {"train": [draw(1500, 1), draw(500, 2)], "validation": [draw(500, 3)], "test": [draw(500, 4)]}
    data = write_prepared(tmp_path / "data", schema, parts)
    told: list[tuple[int, int]] = []
    baseline = Baseline(config, data, 0, lambda done, total: told.append((done, total)))
    test = Part(data, "test")
    scores = baseline.scores(test)
    assert scores.shape == (len(baseline.heads.score_names), 500)
    assert scores.dtype == np.float32
    found = baseline.heads.metrics([(scores, test.labels, test.weights, test.groups)])
    assert [task for task, m in found.items() if quality(m) > 0.6] == ["click", "minutes", "ending", "stars"]
    assert scores[-1].max() == 0  # a label that training never met
    assert scores[2:5].sum(0) == pytest.approx(1)
    assert scores[4].max() < 0.01
    assert told[-1] == (5, 5)
    assert np.array_equal(scores, Baseline(config, data, 0).scores(test))


def test_a_linear_model_is_scikit_learns_on_one_hot_rows(prepared_clicks: Any) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    baseline = Baseline(LogisticConfig(c=(0.5,)), prepared_clicks, 0)
    train, test = Part(prepared_clicks, "train"), Part(prepared_clicks, "test")
    names = prepared_clicks.transform.sparse_names
    assert names == ["colour", "price.bucket"]
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    ids = np.column_stack([train.categories, train.buckets])
    x = np.column_stack([encoder.fit_transform(ids), train.numbers])
    seen = train.weights[1] > 0  # `buy` is observed where a click happened
    model = LogisticRegression(C=0.5, max_iter=200).fit(x[seen], train.labels[1][seen])
    x_test = np.column_stack([encoder.transform(np.column_stack([test.categories, test.buckets])), test.numbers])
    assert baseline.scores(test)[1] == pytest.approx(model.predict_proba(x_test)[:, 1], abs=1e-3)


def test_trees_see_large_ids_by_their_targets(tmp_path: Path, write_prepared: Callable[..., Any]) -> None:
    """A label that only the user tells, with more users than a tree's categories may have."""
    random = np.random.default_rng(0)

    def users(rows: int) -> pa.Table:
        user = random.integers(600, size=rows)
        return pa.table({"user": user, "y": (user * 7919 % 11 < 4).astype(int)})

    schema = parse(
        Schema, {"features": [{"name": "user", "kind": "categorical"}], "tasks": [{"name": "y", "label": "y == 1"}]}, "s"
    )
    data = write_prepared(tmp_path / "data", schema, {"train": [users(6000)], "validation": [users(500)], "test": [users(500)]})
    test = Part(data, "test")
    assert roc_auc_score(test.labels[0], Baseline(TREES, data, 0).scores(test)[0]) > 0.95
