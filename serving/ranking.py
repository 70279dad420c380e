"""A ranking request, from its columns to its answer. Nothing here runs once for each candidate."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_moe.columns import as_category
from recsys_moe.errors import UserError, nearest
from recsys_moe.schema import Categorical, Cross, Feature
from recsys_moe.serving.config import FormulaConfig, ServeConfig
from recsys_moe.serving.features import FeatureTable
from recsys_moe.serving.fuse import Formula
from recsys_moe.serving.models import Model
from recsys_moe.serving.requests import Items, RankHead, to_column
from recsys_moe.transforms import Encoded, Inputs, Transform


@dataclass(frozen=True)
class Stores:
    """The feature files, as they are while one request is answered."""

    items: FeatureTable | None = None
    user: FeatureTable | None = None


@dataclass
class Gathered:
    """Where each feature of a request comes from: its column, of one value where that holds for all `rows`, or a feature
    file. `ignored` are names that are no features, `unknown` how many ids (the candidates' and the user's) the files lack."""

    sources: "dict[str, Column | One | Lookup]"
    rows: int
    ignored: list[str]
    unknown: int

    def encoded(self, transform: Transform) -> dict[str, Encoded]:
        """What the columns become.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        return {name: source.encoded(name, transform) for name, source in self.sources.items()}

    def table(self) -> pa.Table:
        """The same as plain rows."""
        columns = {name: source.column(name) for name, source in self.sources.items()}
        every = {n: c if len(c) == self.rows else pa.repeat(c[0], self.rows) for n, c in columns.items()}
        return pa.table(every)


@dataclass
class Timer:
    """Milliseconds of each step, as they end."""

    ms: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def ended(self, step: str) -> None:
        now = time.perf_counter()
        self.ms[step] = round((now - self._last) * 1000, 3)
        self._last = now


def gather(request: RankHead, items: Items, model: Model, config: ServeConfig, stores: Stores) -> Gathered:
    """The columns of the model's features.

    Raises:
        UserError: a feature that is nowhere, a list of another length than `ids`, a value of the wrong kind; names it.
    """
    ids, given = items.ids, items.features
    for name, values in given.items():
        if len(values) != len(ids):
            raise UserError(
                f"candidates.features.{name} has {len(values):,} values for {len(ids):,} candidates; send one for each, or null"
            )
    sources, schema = dict[str, Column | One | Lookup](), model.predictor.bundle.schema
    of_items = Lookup(stores.items, ids, config.item_key, "candidate {}")
    of_user = Lookup(stores.user, [request.user_id], config.user_key, "user_id")
    for feature in schema.features:
        name = feature.name
        if isinstance(feature, Cross):  # of columns that others read
            continue
        if name in given:
            sources[name] = Column(given[name], feature)
        elif name in request.context:
            sources[name] = One(request.context[name], "context", model)
        elif name in request.user:
            sources[name] = One(request.user[name], "user", model)
        elif name == config.item_key:
            sources[name] = Column(ids, feature)
        elif name == config.user_key:
            sources[name] = One(request.user_id, "user_id", model)
        elif name in of_items:
            sources[name] = of_items
        elif name in of_user:
            sources[name] = of_user
        else:
            raise _missing(name, [*given, *request.context, *request.user])
    sent = dict.fromkeys([*given, *request.context, *request.user])
    found = [lookup for lookup in (of_items, of_user) if lookup in sources.values()]
    return Gathered(sources, len(ids), [n for n in sent if n not in sources], sum(lookup.unknown for lookup in found))


@dataclass
class Column:
    """A value for each candidate, as JSON or Arrow has them."""

    values: Sequence[Any] | pa.ChunkedArray
    feature: Feature

    def encoded(self, name: str, transform: Transform) -> Encoded:
        return transform.encode(name, self.column(name))

    def column(self, name: str) -> pa.ChunkedArray:
        if isinstance(self.values, pa.ChunkedArray):
            return self.values
        return pa.chunked_array([to_column(self.values, self.feature, "candidate {}")])


@dataclass
class One:
    """A value that holds for all candidates."""

    value: Any
    whose: str
    model: Model

    def encoded(self, name: str, transform: Transform) -> Encoded:
        return self.model.encode_one(name, self.value, self.whose)

    def column(self, name: str) -> pa.ChunkedArray:
        (feature,) = [f for f in self.model.predictor.bundle.schema.features if f.name == name]
        return pa.chunked_array([to_column([self.value], feature, self.whose)])


class Lookup:
    """The columns of a feature file for some ids, which are looked up when they are first needed."""

    def __init__(self, table: FeatureTable | None, ids: Sequence[Any], key: str | None, whose: str) -> None:
        self._table, self._ids, self._key, self._whose = table, ids, key or "", whose

    def __contains__(self, name: str) -> bool:
        return self._table is not None and name in self._table.names

    @cached_property
    def _rows(self) -> npt.NDArray[np.int32]:
        assert self._table is not None
        ids = to_column(self._ids, Categorical(self._key, "categorical"), self._whose)
        return self._table.find(as_category(ids, self._key))

    def encoded(self, name: str, transform: Transform) -> Encoded:
        """What a feature's column becomes, looked up where it has been computed."""
        assert self._table is not None
        return self._table.encoded(transform)[name].take(self._rows)

    def column(self, name: str) -> pa.ChunkedArray:
        assert self._table is not None
        return self._table.take(name, self._rows)

    @property
    def unknown(self) -> int:
        return int((self._rows < 0).sum())


def _missing(name: str, sent: list[str]) -> UserError:
    close = nearest(name, sent)
    hint = f" ({close})" if close.startswith("did you mean") else ""
    return UserError(
        f"feature {name!r} is in none of candidates.features, context and user{hint}, nor in a feature file; add it, or null "
        "if it is not known"
    )


def inputs_of(gathered: Gathered, model: Model) -> Inputs:
    """What the model reads of a request's rows: a column of one value is transformed once.

    Raises:
        UserError: a value of the wrong kind; names the column and the value.
    """
    transform = model.predictor.bundle.transform
    return transform.assemble(gathered.encoded(transform), gathered.rows)


def wanted_scores(request: RankHead, model: Model) -> list[str]:
    """The names of the scores that a request asks for.

    Raises:
        UserError: a task that the model has not.
    """
    tasks, heads = model.predictor.bundle.schema.task_names, model.predictor.bundle.heads
    for task in request.tasks or ():
        if task not in tasks:
            raise UserError(f"tasks names {task!r}, which model {model.name!r} does not have; {nearest(task, tasks)}")
    pairs = zip(heads.tasks, heads.heads, strict=True)
    return [name for task, head in pairs if task in (request.tasks or tasks) for name in head.score_names(task)]


def formula_of(request: RankHead, model: Model, configured: FormulaConfig, config: ServeConfig) -> Formula:
    """The formula that fuses a request's scores.

    Raises:
        UserError: the request brings one, though it may not, or one that does not fit the model.
    """
    if request.formula is not None and not config.request_formula:
        raise UserError("formula is the service's to choose; leave it out, or set serve.request_formula=true")
    return Formula(request.formula or configured, model.predictor.score_names)


def answer(
    request: RankHead, items: Items, model: Model, scores_sn: npt.NDArray[np.float32], fused_n: npt.NDArray[np.float64]
) -> dict[str, Any]:
    """The candidates in their order: everything of a response that the scores decide."""
    order = np.argsort(-fused_n, kind="stable")[: request.top_n]
    places, ids = order.tolist(), items.ids
    row = {name: number for number, name in enumerate(model.predictor.score_names)}
    return {
        "model": model.described,
        "ranking": [ids[place] for place in places],
        "positions": places,
        "fused": fused_n[order].tolist(),
        "scores": {name: scores_sn[row[name]][order].tolist() for name in wanted_scores(request, model)},
    }
