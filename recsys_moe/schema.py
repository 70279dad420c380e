"""The schema: which columns are features, what the tasks are. Written by a person in YAML, kept in every bundle.

features:
  - {name: age, kind: numeric, buckets: 32}
  - {name: class_of_worker, kind: categorical}
  - {name: user_id, kind: hashed, buckets: 1000000}
  - {name: genres, kind: multi, separator: "|"}
  - {name: watched, kind: sequence, max_length: 50, pooling: last}
  - {name: picture, kind: embedding, dim: 64}
  - {name: class_by_user, kind: cross, of: [class_of_worker, user_id], buckets: 100000}
tasks:
  - {name: income, label: 'income == "50000+."'}
  - {name: minutes, kind: regression, label: watch_ms / 60000, log1p: true}
  - {name: ending, kind: multiclass, label: how_it_ended, classes: [finished, skipped, left]}
  - {name: stars, kind: ordinal, label: rating, levels: [1, 2, 3, 4, 5]}
group: user_id          # optional: the column whose values GAUC averages over
outcomes: [weight]      # optional: further columns that must never become inputs
"""

from collections import Counter
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag

from recsys_moe.columns import category_text
from recsys_moe.errors import UserError, nearest
from recsys_moe.expressions import Expression
from recsys_moe.typed import parse, typed

BUCKET_SUFFIX, MISSING_SUFFIX = ".bucket", ".missing"
"""What the names of a numeric feature's further inputs end in."""

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Buckets = Annotated[int, Field(ge=1, le=2_000_000_000)]
MAX_SIZE = 1_000_000


@typed
class Categorical:
    """One of many values: id 0 is missing (null), 1 is out-of-vocabulary, 2… follow the vocabulary.

    The vocabulary holds the values of the training part, most frequent first, that occur at least `min_count` times, at
    most `max_size` of them. Values are compared as strings; whole numbers lose no digit on the way, and `272`, `272.0` and
    `"272"` are one value, as are `true` and `True`. An empty string is missing.
    """

    name: Name
    kind: Literal["categorical"]
    min_count: Count = 1
    max_size: Count = MAX_SIZE


@typed
class Hashed:
    """One of ever so many values: id 0 is missing, 2 + hash(value) mod `buckets` any other (see `recsys_moe.hashing`).

    Nothing is fitted: a value that training never met has a row of its own or shares one. Id 1 is never given.

    With `collisions: none` values get rows of their own as training meets them, `buckets` at most, and what is seen rarely
    makes room (see `recsys_moe.own_rows`); id 1 is then a value that has no row.
    """

    name: Name
    kind: Literal["hashed"]
    buckets: Buckets
    collisions: Literal["shared", "none"] = "shared"


@typed
class Cross:
    """The values of two or more categorical or hashed features together, hashed into `buckets`; missing if one of them is.

    It reads the columns of the features in `of`, whose order matters, and has no column of its own.
    """

    name: Name
    kind: Literal["cross"]
    of: Annotated[tuple[Name, ...], Field(min_length=2)]
    buckets: Buckets


@typed
class Multi:
    """Any number of values a row, in no order: their embeddings' mean or sum, zero where there is none.

    The column holds lists, or text that `separator` takes apart (exactly as written: ", " is not ","). Values are categories
    with a vocabulary or, with `buckets`, hashed ones. Missing ones are left out; of more than `max_length` the first stay.
    """

    name: Name
    kind: Literal["multi"]
    separator: Name | None = None
    pooling: Literal["mean", "sum"] = "mean"
    max_length: Count | None = None
    buckets: Buckets | None = None
    min_count: Count = 1
    max_size: Count = MAX_SIZE

    def __post_init__(self) -> None:
        _check_vocabulary(self)


@typed
class Sequence:
    """Values in order, oldest first, of which the last `max_length` stay.

    Read as a `Multi` is, but a missing value keeps its place, so that two sequences of a row stay aligned. `pooling` says
    what becomes of their embeddings: their mean, their sum, or that of the last one alone.
    """

    name: Name
    kind: Literal["sequence"]
    max_length: Count
    separator: Name | None = None
    pooling: Literal["mean", "sum", "last"] = "mean"
    buckets: Buckets | None = None
    min_count: Count = 1
    max_size: Count = MAX_SIZE

    def __post_init__(self) -> None:
        _check_vocabulary(self)


@typed
class Embedding:
    """A vector that was computed elsewhere: a list of `dim` finite numbers, taken as it is; zeros where the list is null."""

    name: Name
    kind: Literal["embedding"]
    dim: Annotated[int, Field(ge=1, le=65536)]


@typed
class Numeric:
    """A number, as a dense input and, on request, also as an embedded quantile bucket.

    Dense: x → sign(x)·log(1+|x|) if `log1p` → (x − mean) / std if `standardise`; null and NaN become 0 after that, and
    `missing_indicator` adds a 0/1 input that says so. `buckets` > 0 adds a categorical input: id 0 is missing, 1… are
    the buckets between the training part's quantiles; a value that alone fills a bucket's share gets its own bucket.
    """

    name: Name
    kind: Literal["numeric"]
    log1p: bool = False
    standardise: bool = True
    buckets: Annotated[int, Field(ge=0, le=65536)] = 0
    missing_indicator: bool = False


Feature = Annotated[
    Categorical | Hashed | Cross | Multi | Sequence | Embedding | Numeric,
    Field(discriminator="kind"),
]


def _check_vocabulary(feature: Multi | Sequence) -> None:
    if feature.buckets and (feature.min_count > 1 or feature.max_size != MAX_SIZE):
        raise ValueError(
            f"feature {feature.name!r} has buckets, so it has no vocabulary that min_count or max_size could cut; keep "
            "buckets or the others"
        )


@typed
class Task:
    """What tasks of every kind have: a `label`, an expression over columns that is null where it was not observed.

    `mask` selects the rows that the task is trained and measured on; `weight` (a column or expression ≥ 0) weighs its
    rows in the loss, and leaves out rows of weight 0 or null as the mask does; `loss_weight` weighs the task against the
    others; `category` groups tasks (watch time, …). What a kind's loss, scores and metrics are: `recsys_moe.heads`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    label: str
    mask: str | None = None
    weight: str | None = None
    category: str = "default"
    loss_weight: Annotated[float, Field(gt=0)] = 1.0

    @property
    def classes_as_text(self) -> tuple[str, ...]:
        """What the labels are called that are stored as 0, 1, …; empty where the label is a number."""
        return ()


@typed
class BinaryTask(Task):
    """True or false. The kind of a task that names none."""

    _: KW_ONLY
    kind: Literal["binary"] = "binary"

    @property
    def classes_as_text(self) -> tuple[str, ...]:
        return ("0", "1")


@typed
class RegressionTask(Task):
    """A number y, predicted as (y − mean) / std if `standardise`, of sign(y)·log(1+|y|) if `log1p`.

    `loss`: the squared error on that scale, or Huber's, which beyond `huber_delta` grows only linearly.
    """

    _: KW_ONLY
    kind: Literal["regression"]
    log1p: bool = False
    standardise: bool = True
    loss: Literal["mse", "huber"] = "mse"
    huber_delta: Annotated[float, Field(gt=0)] = 1.0


@typed
class MulticlassTask(Task):
    """One of the declared `classes`, compared as categories are (`1` and `"1"` are one)."""

    _: KW_ONLY
    kind: Literal["multiclass"]
    classes: Annotated[tuple[str | int | bool, ...], Field(min_length=2)]

    def __post_init__(self) -> None:
        _check_classes(self, "classes", self.classes)

    @property
    def classes_as_text(self) -> tuple[str, ...]:
        return tuple(category_text(str(value)) or "" for value in self.classes)


@typed
class OrdinalTask(Task):
    """One of the declared `levels`, lowest first. Whole numbers count as what they are, other levels as 0, 1, …"""

    _: KW_ONLY
    kind: Literal["ordinal"]
    levels: Annotated[tuple[str | int, ...], Field(min_length=2)]

    def __post_init__(self) -> None:
        _check_classes(self, "levels", self.levels)
        if any(low >= high for low, high in zip(self.values, self.values[1:], strict=False)):
            raise ValueError(f"task {self.name!r} has levels {list(self.levels)}, which do not rise; list the lowest first")

    @property
    def classes_as_text(self) -> tuple[str, ...]:
        return tuple(category_text(str(value)) or "" for value in self.levels)

    @property
    def values(self) -> tuple[float, ...]:
        """The number that each level stands for."""
        numbers = [level for level in self.levels if isinstance(level, int)]
        return tuple(map(float, numbers if len(numbers) == len(self.levels) else range(len(self.levels))))


def _check_classes(task: Task, key: str, values: tuple[Any, ...]) -> None:
    for text, count in Counter(task.classes_as_text).items():
        if not text or count > 1:
            raise ValueError(
                f"task {task.name!r} has {key} {list(values)}, of which {text!r} is {'empty' if not text else 'named twice'}; "
                "name each once"
            )


def kind(task: Any) -> Any:
    """What tells the kinds of tasks apart: a task of YAML that names none is binary."""
    return task.get("kind", "binary") if isinstance(task, dict) else getattr(task, "kind", None)


AnyTask = Annotated[
    Annotated[BinaryTask, Tag("binary")]
    | Annotated[RegressionTask, Tag("regression")]
    | Annotated[MulticlassTask, Tag("multiclass")]
    | Annotated[OrdinalTask, Tag("ordinal")],
    Discriminator(kind),
]


@typed
class Schema:
    """Features and tasks of a data set.

    Raises:
        UserError: a name used twice or by two inputs, a label or outcome column among the features, a cross of what is no
            category, an expression that can't be read.
    """

    features: Annotated[tuple[Feature, ...], Field(min_length=1)]
    tasks: Annotated[tuple[AnyTask, ...], Field(min_length=1)]
    group: str | None = None
    outcomes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, names in (("feature", self.feature_names), ("task", self.task_names)):
            name, times = Counter(names).most_common(1)[0]
            if times > 1:
                raise ValueError(f"{what} {name!r} is declared twice; keep one of them")
        self._check_input_names()
        self._check_crosses()
        outcomes = dict.fromkeys(self.outcomes, "listed under outcomes")
        for task in self.tasks:
            outcomes |= dict.fromkeys(Expression(task.label).columns, f"read by the label of task {task.name!r}")
            for text in (task.mask, task.weight):
                if text:
                    Expression(text)
        for name in self.feature_columns:
            if name in outcomes:
                raise ValueError(
                    f"column {name!r} can't be a feature: it is {outcomes[name]}, which a served row does not have; "
                    "take it out of features"
                )

    def _check_crosses(self) -> None:
        crossable = {f.name for f in self.features if isinstance(f, Categorical | Hashed)}
        for feature in self.features:
            for name in feature.of if isinstance(feature, Cross) else ():
                if name not in crossable:
                    raise ValueError(
                        f"cross {feature.name!r} is of {name!r}, which is no categorical or hashed feature; "
                        f"{nearest(name, crossable)}"
                    )

    def _check_input_names(self) -> None:
        numeric = [f for f in self.features if isinstance(f, Numeric)]
        embedded = [(f.name, f.name) for f in self.features if not isinstance(f, Numeric | Embedding)]
        embedded += [(f.name + BUCKET_SUFFIX, f.name) for f in numeric if f.buckets]
        # An embedding table's name takes no dots.
        embedded = [(name.replace(".", "__"), feature) for name, feature in embedded]
        dense = [(f.name, f.name) for f in numeric]
        dense += [(f.name + MISSING_SUFFIX, f.name) for f in numeric if f.missing_indicator]
        dense += [(f"{f.name}.{i}", f.name) for f in self.features if isinstance(f, Embedding) for i in range(f.dim)]
        for inputs in (embedded, dense):
            owners: dict[str, str] = {}
            for name, feature in inputs:
                other = owners.setdefault(name, feature)
                if other != feature:
                    raise ValueError(f"features {other!r} and {feature!r} both have an input {name!r}; rename one of them")

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.features)

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """The columns that the features read: all that scoring needs."""
        return tuple(f.name for f in self.features if not isinstance(f, Cross))

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tasks)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that labels, masks and weights read: needed to train and evaluate, never to score."""
        texts = [text for t in self.tasks for text in (t.label, t.mask, t.weight) if text]
        return tuple(sorted({column for text in texts for column in Expression(text).columns}))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that preparing reads, each once."""
        group = (self.group,) if self.group else ()
        return tuple(dict.fromkeys((*self.feature_columns, *self.label_columns, *group)))

    def select_tasks(self, names: tuple[str, ...]) -> "Schema":
        """The same schema with these tasks only, in this order; the others' label columns stay outcomes.

        Raises:
            UserError: a task that the schema does not have.
        """
        tasks = {t.name: t for t in self.tasks}
        for name in names:
            if name not in tasks:
                raise UserError(f"data.tasks names task {name!r}, which the schema lacks; {nearest(name, tasks)}")
        labels = {c for t in self.tasks for c in Expression(t.label).columns}
        outcomes = tuple(sorted(labels | set(self.outcomes)))
        return Schema(self.features, tuple(tasks[n] for n in names), self.group, outcomes)


def load_schema(path: Path) -> Schema:
    """Read a schema file.

    Raises:
        UserError: no such file, not YAML, or not a schema; names the key.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"schema {str(path)!r} can't be read ({error.strerror}); name a schema file") from None
    except yaml.YAMLError as error:
        raise UserError(f"schema {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    schema: Schema = parse(Schema, data, f"schema {str(path)!r}")
    return schema
