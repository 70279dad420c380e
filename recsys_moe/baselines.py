"""What every network has to beat: gradient-boosted trees and logistic regression, by scikit-learn, one model a task.

They read the same prepared data as the networks and are measured on the same rows. Trees see a category of up to 255 values as
one, the ids of larger tables by their smoothed target mean (cross-fitted on the training part; Micci-Barreca 2001); a linear
model sees every id, and every bucket of a number, as an input of its own. Of a list both see its last id and its length.
Everything lies in memory: N·F numbers of 4 bytes.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy import sparse

from recsys_moe.batches import ordered_rows
from recsys_moe.heads import Head, Heads, MulticlassHead, OrdinalHead, RegressionHead
from recsys_moe.metrics import quality
from recsys_moe.schema import BUCKET_SUFFIX
from recsys_moe.shards import PreparedData
from recsys_moe.typed import typed

MAX_CATEGORIES = 255
Progress = Callable[[int, int], None]
Array = npt.NDArray[Any]


@typed
class TreesConfig:
    """Histogram gradient boosting: `iterations` trees of `leaves` leaves, fewer once the validation loss stops falling."""

    name: Literal["trees"] = "trees"
    iterations: Annotated[int, Field(ge=1)] = 400
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    leaves: Annotated[int, Field(ge=2)] = 31
    min_leaf: Annotated[int, Field(ge=1)] = 20
    l2: Annotated[float, Field(ge=0)] = 0.0


@typed
class LogisticConfig:
    """Logistic regression (a number's task: ridge regression) with the `c`, the inverse strength of the penalty, that is best
    on the validation part, after at most `iterations` steps of L-BFGS."""

    name: Literal["logistic"] = "logistic"
    c: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.01, 0.1, 1.0)
    iterations: Annotated[int, Field(ge=1)] = 200


BaselineConfig = Annotated[TreesConfig | LogisticConfig, Field(discriminator="name")]
BASELINES: dict[str, type[Any]] = {"trees": TreesConfig, "logistic": LogisticConfig}


class Baseline:
    """One fitted model for each task. `scores(part)` are fp32 `[S, N]`, as `recsys_moe.heads` has them."""

    def __init__(self, config: Any, data: PreparedData, seed: int, on_task: Progress = lambda done, total: None) -> None:
        self.data, self.heads = data, Heads(data.schema, data.transform.statistics)
        train, validation = Part(data, "train"), Part(data, "validation")
        fit = _fit_trees if isinstance(config, TreesConfig) else _fit_linear
        self._models: list[Callable[[Part], Array]] = []
        for task, head in enumerate(self.heads.heads):
            self._models.append(fit(config, head, task, train, validation, seed))
            on_task(task + 1, len(self.heads.heads))

    def scores(self, part: "Part") -> npt.NDArray[np.float32]:
        """Scores of all rows of a part, observed or not."""
        columns = [model(part) for model in self._models]
        return np.concatenate(columns, 1).T.astype(np.float32)


class Part:
    """A part of prepared data in memory: ids int32 `[N, F]` of categories and list ends, of buckets, numbers fp32 `[N, D]`."""

    def __init__(self, data: PreparedData, part: str) -> None:
        t = data.transform
        rows = list(ordered_rows(data, part))
        bucketed = [name.endswith(BUCKET_SUFFIX) for name in t.sparse_names[: len(t.sparse_names) - len(t.own_rows)]]
        # A row of one's own is known by its hash: its lower half will do.
        bucketed += [False, True] * len(t.own_rows)
        ids = np.concatenate([r.inputs.ids for r in rows], 1).T if rows else np.empty((0, len(t.id_names)), np.int32)
        drop = {f"high.{name}" for name in t.own_rows}
        keep = [i for i, name in enumerate(t.id_names) if name not in drop]
        is_bucket = np.array(bucketed, bool)[keep]
        dense = [r.inputs.dense.T for r in rows]
        ends, lengths = [], []
        for i in range(len(t.lists)):
            jagged = [r.inputs.lists[i] for r in rows]
            ends.append(np.concatenate([_last(j.values, j.offsets) for j in jagged]))
            lengths.append(np.concatenate([np.diff(j.offsets) for j in jagged]).astype(np.float32))
        self.categories = np.column_stack([ids[:, keep][:, ~is_bucket], *ends]).astype(np.int32)
        self.buckets = ids[:, keep][:, is_bucket]
        self.numbers = np.column_stack([np.concatenate(dense), *lengths]).astype(np.float32)
        self.labels, self.weights = (np.concatenate([getattr(r, name) for r in rows], 1) for name in ("labels", "weights"))
        self.groups = None if data.schema.group is None else np.concatenate([r.groups for r in rows if r.groups is not None])

    def __len__(self) -> int:
        return self.labels.shape[1]

    def observed(self, task: int) -> npt.NDArray[np.bool_]:
        return np.asarray(self.weights[task] > 0)


def _last(values: Array, offsets: Array) -> Array:
    """The last id of each list, −1 of an empty one."""
    ends = np.diff(offsets) > 0
    return np.where(ends, values[np.maximum(offsets[1:] - 1, 0)] if len(values) else 0, -1)


# ---- trees ------------------------------------------------------------------------------------------------------------


def _fit_trees(config: TreesConfig, head: Head, task: int, train: Part, validation: Part, seed: int) -> Callable[[Part], Array]:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.model_selection import KFold
    from sklearn.preprocessing import TargetEncoder

    number = isinstance(head, RegressionHead)
    seen, held = train.observed(task), validation.observed(task)
    y, y_held = _target(head, train.labels[task][seen]), _target(head, validation.labels[task][held])
    large = train.categories.max(0, initial=-1) >= MAX_CATEGORIES
    folds = KFold(5, shuffle=True, random_state=seed)
    encoder = TargetEncoder(target_type="continuous", cv=folds) if large.any() else None
    means = [encoder.fit_transform(train.categories[seen][:, large], y)] if encoder else []

    def matrix(part: Part, rows: Any, of_large: list[Array]) -> Array:
        # A category beyond those of the training part has no meaning to a tree: it is missing.
        small = part.categories[rows][:, ~large].astype(np.float32)
        small[(small < 0) | (small >= MAX_CATEGORIES)] = np.nan
        return np.column_stack([small, part.numbers[rows], *of_large])

    def encoded(part: Part, rows: Any) -> Array:
        return matrix(part, rows, [encoder.transform(part.categories[rows][:, large])] if encoder else [])

    if len(np.unique(y)) < 2:
        return lambda part: _constant(head, y, len(part))
    names = ["categorical"] * int((~large).sum())
    kind = HistGradientBoostingRegressor if number else HistGradientBoostingClassifier
    stop = bool(held.any()) and set(np.unique(y_held)) <= set(np.unique(y)) if not number else bool(held.any())
    model = kind(
        learning_rate=config.learning_rate,
        max_iter=config.iterations,
        max_leaf_nodes=config.leaves,
        min_samples_leaf=config.min_leaf,
        l2_regularization=config.l2,
        categorical_features=list(range(len(names))) or None,
        early_stopping=stop,
        n_iter_no_change=20,
        random_state=seed,
    )
    extra = (
        {"X_val": encoded(validation, held), "y_val": y_held, "sample_weight_val": validation.weights[task][held]}
        if stop
        else {}
    )
    model.fit(matrix(train, seen, means), y, sample_weight=train.weights[task][seen], **extra)

    def predict(part: Part) -> Array:
        rows = encoded(part, slice(None))
        return _scores(head, model.predict(rows)) if number else _scores(head, model.predict_proba(rows), model.classes_)

    return predict


# ---- linear models ----------------------------------------------------------------------------------------------------


def _fit_linear(
    config: LogisticConfig, head: Head, task: int, train: Part, validation: Part, seed: int
) -> Callable[[Part], Array]:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import OneHotEncoder

    number = isinstance(head, RegressionHead)
    seen, held = train.observed(task), validation.observed(task)
    y = _target(head, train.labels[task][seen])
    if len(np.unique(y)) < 2:
        return lambda part: _constant(head, y, len(part))
    one_hot = OneHotEncoder(handle_unknown="ignore", dtype=np.float32).fit(_ids(train))

    def matrix(part: Part, rows: Any) -> Any:
        return sparse.hstack([one_hot.transform(_ids(part)[rows]), sparse.csr_matrix(part.numbers[rows])], format="csr")

    inputs, weights = matrix(train, seen), train.weights[task][seen]

    def predict(model: Any, rows: Any) -> Array:
        return _scores(head, model.predict(rows)) if number else _scores(head, model.predict_proba(rows), model.classes_)

    best: Any = None
    best_quality = -np.inf
    for c in config.c:
        model = Ridge(alpha=1 / c) if number else LogisticRegression(C=c, max_iter=config.iterations, random_state=seed)
        with warnings.catch_warnings(category=ConvergenceWarning, action="ignore"):  # the steps are bounded on purpose
            model.fit(inputs, y, sample_weight=weights)
        found = np.nan
        if held.any():
            measured = head.metrics(predict(model, matrix(validation, held)), validation.labels[task][held], None)
            found = quality(measured)
        if best is None or found > best_quality:
            best, best_quality = model, found
    return lambda part: predict(best, matrix(part, slice(None)))


def _ids(part: Part) -> Array:
    return np.column_stack([part.categories, part.buckets])


# ---- from and to what a task's head means -----------------------------------------------------------------------------


def _target(head: Head, labels: Array) -> Array:
    """What a model of this task is fitted to: the class's number, or the standardised value."""
    if not isinstance(head, RegressionHead):
        return labels.astype(np.int64)
    y = np.sign(labels) * np.log1p(np.abs(labels)) if head.log1p else labels
    return (y - head.mean) / head.std


def _scores(head: Head, predicted: Array, classes: Array | None = None) -> Array:
    """The head's scores `[N, S]` from predicted values, or from the probabilities of some of its classes."""
    if classes is None:
        return head.scores(torch.from_numpy(np.asarray(predicted, np.float32))[:, None, None])[:, 0].numpy()
    whole = np.zeros((len(predicted), _classes(head)))
    whole[:, classes.astype(np.int64)] = predicted
    if isinstance(head, MulticlassHead):
        return whole
    values = np.asarray(head.values) if isinstance(head, OrdinalHead) else np.array([0.0, 1.0])
    return (whole @ values)[:, None]


def _classes(head: Head) -> int:
    if isinstance(head, MulticlassHead):
        return len(head.classes)
    return len(head.values) if isinstance(head, OrdinalHead) else 2


def _constant(head: Head, y: Array, rows: int) -> Array:
    """What is predicted where training has met one label, or none."""
    value = y[0] if len(y) else 0
    if isinstance(head, RegressionHead):
        return _scores(head, np.full(rows, value))
    return _scores(head, np.ones((rows, 1)), np.array([value]))
