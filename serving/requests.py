"""The wire forms: what JSON is taken, and Arrow columns made of it, value for value what preparation makes of log rows."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from recsys_moe.columns import category_text
from recsys_moe.errors import UserError
from recsys_moe.schema import Cross, Embedding, Multi, Schema
from recsys_moe.schema import Feature as AnyFeature
from recsys_moe.schema import Sequence as SequenceFeature
from recsys_moe.serving.config import FormulaConfig

Id = StrictStr | StrictInt
Form = TypeVar("Form", bound=BaseModel)


class ScoreRequest(BaseModel):
    """Rows to score. Each row names every feature of the model; null stands for a missing value.

    A feature of many values and a vector are lists. `model` is the name that it is served under (the first one).
    """

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]


class ScoreResponse(BaseModel):
    """One score per row, in the rows' order: of a task its probability, value or expected level; of each class of a
    multiclass task, as `task.class`, its probability. `model` is its family and a digest of its weights."""

    model: str
    scores: dict[str, list[float]]


class ErrorResponse(BaseModel):
    """Why there is no other answer, in one sentence."""

    error: str


class Candidates(BaseModel):
    """What is to be ranked, as columns: `ids`, and for each feature of an item a list as long as `ids`."""

    model_config = ConfigDict(extra="forbid")
    ids: Annotated[list[Id], Field(min_length=1)]
    features: dict[str, list[Any]] = {}


class RankHead(BaseModel):
    """A ranking request without its candidates."""

    model_config = ConfigDict(extra="forbid")
    request_id: Annotated[str, Field(max_length=200)] | None = None
    model: str | None = None
    user_id: Id | None = None
    user: dict[str, Any] = {}
    context: dict[str, Any] = {}
    tasks: Annotated[list[str], Field(min_length=1)] | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    formula: FormulaConfig | None = None


class RankRequest(RankHead):
    """A user, a context and candidates to rank for them.

    A feature is taken from `candidates.features`, `context`, `user`, the ids (`serve.item_key`, `serve.user_key`) or the
    service's feature files, whichever has it first; null stands for a missing value. Names that are no features of the model
    are told back as `ignored`. `tasks` says whose scores are returned (all), `top_n` how many candidates (all).
    """

    candidates: Candidates


class ServedModel(BaseModel):
    """Which model scored: the name that it is served under, its version in the registry, its family and weights' digest."""

    name: str
    version: str
    digest: str


class RankResponse(BaseModel):
    """The candidates' ids, best first (of equals, the one that was sent first), with their places in the request, their fused
    score and the tasks' scores, all in this order."""

    request_id: str
    model: ServedModel
    ranking: list[Id]
    positions: list[int]
    fused: list[float]
    scores: dict[str, list[float]]
    candidates: int
    ignored: list[str]
    unknown_ids: int
    timings_ms: dict[str, float]


@dataclass(frozen=True)
class Items:
    """Candidates in whatever form they came: their ids, and feature columns as JSON values or as Arrow has them."""

    ids: list[Id]
    features: Mapping[str, list[Any] | pa.ChunkedArray]


def parse_rank(body: bytes) -> tuple[RankHead, Items]:
    """The request in a JSON body.

    Raises:
        UserError: no JSON, or not a request; names the field and the value.
    """
    request = parse_json(RankRequest, body)
    return request, Items(request.candidates.ids, request.candidates.features)


def parse_json(kind: type[Form], body: bytes | str) -> Form:
    """A request of that form in JSON.

    Raises:
        UserError: no JSON, or not of that form; names the field and the value.
    """
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise UserError(sentence(error.errors()[0])) from None


def sentence(first: Any) -> str:
    """What pydantic complains of, as one sentence."""
    if first["type"] == "json_invalid":
        reason = str(first["ctx"]["error"])[:120]
        return f"the body can't be read as JSON ({reason}; UTF-8, no deep nesting, numbers below 4,300 digits); see /docs"
    path = ".".join(str(part) for part in first["loc"])
    value = "" if first["type"] == "missing" else f" is {reprlib.repr(first['input'])}"
    return f"{path or 'the body'}{value}: {first['msg'][0].lower()}{first['msg'][1:]}; see /docs for the request's form"


def rows_to_table(rows: list[dict[str, Any]], schema: Schema) -> pa.Table:
    """The feature columns of JSON rows as a table.

    Raises:
        UserError: a row without a feature, or a value of the wrong kind; names the row, the field and the value.
    """
    columns: dict[str, pa.Array] = {}
    for feature in schema.features:
        if isinstance(feature, Cross):  # of columns that others read
            continue
        try:
            values = [row[feature.name] for row in rows]
        except KeyError:
            number = next(i for i, row in enumerate(rows) if feature.name not in row)
            raise UserError(f"row {number} has no feature {feature.name!r}; add it, or null if it is not known") from None
        columns[feature.name] = to_column(values, feature, "row {}")
    return pa.table(columns)


def to_column(values: Sequence[Any], feature: AnyFeature, whose: str) -> pa.Array:
    """JSON values of a feature as a column; `whose` values they are, says a mistake (`row {}`).

    Raises:
        UserError: a value of the wrong kind; names its place, the field and the value.
    """
    column = _at_once(values, feature)
    return _one_by_one(values, feature, whose) if column is None else column


def as_json(value: Any, feature: AnyFeature) -> Any:
    """A value of a log row in the form that `to_column` takes it from JSON.

    Raises:
        UserError: a value of the wrong kind.
    """
    read, _ = _JSON[feature.kind]
    return read(value, feature)


_NUMBERS, _TEXTS, _WHOLES, _LISTS = {int, float, type(None)}, {str, type(None)}, {int, type(None)}, {list, type(None)}


def _at_once(values: Sequence[Any], feature: AnyFeature) -> pa.Array | None:
    """The column, where Arrow alone can make it of these values; None where each must be looked at."""
    kinds = set(map(type, values))
    try:
        match feature.kind:
            case "numeric" if kinds <= _NUMBERS:
                return pa.array(values, pa.float64())
            case "categorical" | "hashed" if kinds <= _TEXTS:
                return pa.array(values, pa.string())
            case "categorical" | "hashed" if kinds <= _WHOLES:
                return pa.array(values, pa.int64())
            case "multi" | "sequence" if kinds <= _LISTS:
                inner = set(map(type, chain.from_iterable(v for v in values if v is not None)))
                if inner <= _TEXTS:
                    return pa.array(values, pa.list_(pa.string()))
                if inner <= _WHOLES:
                    return pa.array(values, pa.list_(pa.int64()))
    except (pa.ArrowException, OverflowError, UnicodeError):  # numbers beyond 64 bits or 2^53, halves of characters
        pass
    return None


def _one_by_one(values: Sequence[Any], feature: AnyFeature, whose: str) -> pa.Array:
    read, kind = _JSON[feature.kind]
    out = []
    for number, value in enumerate(values):
        try:
            out.append(read(value, feature))
        except UserError as error:
            raise UserError(f"{whose.format(number)} has {feature.name!r} = {reprlib.repr(value)}, {error}") from None
    return pa.array(out, kind)


def as_float(value: Any, feature: Any = None) -> float | None:
    """A number as preparation reads it: whole numbers beyond 2^53 are rounded.

    Raises:
        UserError: no number, or one that float64 does not reach.
    """
    if value is None:
        return None
    if isinstance(value, list | dict):
        raise UserError("which is not one value; send a number or null")
    if isinstance(value, str | bool):
        raise UserError("which is not a number; send a number or null")
    try:
        return float(value)
    except OverflowError:
        raise UserError("which is too large a number; send one below 1e308 or null") from None


def as_text(value: Any, feature: Any = None) -> str | None:
    """A category in the form that the vocabulary has it in.

    Raises:
        UserError: an infinite number, or a text that UTF-8 can't hold.
    """
    if value is None:
        return None
    if isinstance(value, list | dict):
        raise UserError("which is not one value; send a string, a number, true, false or null")
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            raise UserError("which is no category; send a string, a number or null")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            raise UserError("which is not Unicode text; send whole characters or null") from None
    return category_text(str(value))


def as_texts(value: Any, feature: Multi | SequenceFeature) -> list[str | None] | None:
    """A list of categories, or the text that the feature's separator takes apart.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, str) and feature.separator is not None:
        value = value.split(feature.separator) if value else None
    if value is None:
        return None
    if not isinstance(value, list):
        raise UserError("which is not a list; send a list of values or null")
    if any(isinstance(v, list | dict) for v in value):
        raise UserError("which is not one value or a list of values; send those or null")
    return [as_text(v) for v in value]


def as_vector(value: Any, feature: Embedding) -> list[float | None] | None:
    """A list of the feature's `dim` numbers.

    Raises:
        UserError: anything else.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != feature.dim:
        raise UserError(f"which is not a list of {feature.dim} numbers; send all of them or null")
    return [as_float(v) for v in value]


_JSON: dict[str, tuple[Callable[[Any, Any], Any], pa.DataType]] = {
    "categorical": (as_text, pa.string()),
    "hashed": (as_text, pa.string()),
    "numeric": (as_float, pa.float64()),
    "multi": (as_texts, pa.list_(pa.string())),
    "sequence": (as_texts, pa.list_(pa.string())),
    "embedding": (as_vector, pa.list_(pa.float64())),
}
