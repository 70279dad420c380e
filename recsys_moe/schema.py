"""The schema: which columns are features, what the tasks are. Written by a person in YAML, kept in every bundle.

features:
  - {name: age, kind: numeric, buckets: 32}
  - {name: class_of_worker, kind: categorical}
tasks:
  - {name: income, label: 'income == "50000+."'}
group: user_id          # optional: the column whose values GAUC averages over
outcomes: [weight]      # optional: further columns that must never become inputs
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from recsys_moe.errors import UserError, nearest
from recsys_moe.expressions import Expression
from recsys_moe.typed import parse, typed

BUCKET_SUFFIX, MISSING_SUFFIX = ".bucket", ".missing"
"""What the names of a numeric feature's further inputs end in."""

Name = Annotated[str, Field(min_length=1)]


@typed
class Categorical:
    """One of many values: id 0 is missing (null), 1 is out-of-vocabulary, 2… follow the vocabulary.

    The vocabulary holds the values of the training part, most frequent first, that occur at least `min_count` times, at
    most `max_size` of them. Values are compared as strings; whole numbers lose no digit on the way, and `272`, `272.0` and
    `"272"` are one value, as are `true` and `True`. An empty string is missing.
    """

    name: Name
    kind: Literal["categorical"]
    min_count: Annotated[int, Field(ge=1)] = 1
    max_size: Annotated[int, Field(ge=1)] = 1_000_000


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


Feature = Annotated[Categorical | Numeric, Field(discriminator="kind")]


@typed
class Task:
    """A binary task: `label` is an expression that is true, false or (where null) unobserved.

    `mask` selects the rows that the task is trained and measured on; `weight` (a column or expression ≥ 0) weighs its
    rows in the loss, and leaves out rows of weight 0 or null as the mask does; `loss_weight` weighs the task against the
    others; `category` groups tasks (watch time, …).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    label: str
    kind: Literal["binary"] = "binary"
    mask: str | None = None
    weight: str | None = None
    category: str = "default"
    loss_weight: Annotated[float, Field(gt=0)] = 1.0


@typed
class Schema:
    """Features and tasks of a data set.

    Raises:
        UserError: a name used twice or by two inputs, a label or outcome column among the features, an expression that
            can't be read.
    """

    features: Annotated[tuple[Feature, ...], Field(min_length=1)]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    group: str | None = None
    outcomes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, names in (("feature", self.feature_names), ("task", self.task_names)):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what} {name!r} is declared twice; keep one of them")
        self._check_input_names()
        outcomes = dict.fromkeys(self.outcomes, "listed under outcomes")
        for task in self.tasks:
            outcomes |= dict.fromkeys(Expression(task.label).columns, f"read by the label of task {task.name!r}")
            for text in (task.mask, task.weight):
                if text:
                    Expression(text)
        for name in self.feature_names:
            if name in outcomes:
                raise ValueError(
                    f"column {name!r} can't be a feature: it is {outcomes[name]}, which a served row does not have; "
                    "take it out of features"
                )

    def _check_input_names(self) -> None:
        numeric = [f for f in self.features if isinstance(f, Numeric)]
        embedded = [(f.name, f.name) for f in self.features if isinstance(f, Categorical)]
        embedded += [(f.name + BUCKET_SUFFIX, f.name) for f in numeric if f.buckets]
        # An embedding table's name takes no dots.
        embedded = [(name.replace(".", "__"), feature) for name, feature in embedded]
        dense = [(f.name, f.name) for f in numeric]
        dense += [(f.name + MISSING_SUFFIX, f.name) for f in numeric if f.missing_indicator]
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
        return tuple(dict.fromkeys((*self.feature_names, *self.label_columns, *group)))

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
