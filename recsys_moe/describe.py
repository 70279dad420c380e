"""A first look at somebody's log rows: what is in each column, and a schema to train on them with.

What is proposed is meant to run as it is and to err on the safe side: a column that may be known only after the event, or
that gives a label away, is left out of the features and listed under `outcomes`, with the reason beside it.
"""

import datetime
import hashlib
import json
import keyword
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from recsys_moe.errors import UserError, nearest
from recsys_moe.expressions import Expression
from recsys_moe.schema import BUCKET_SUFFIX, MISSING_SUFFIX
from recsys_moe.sources import CSV_TYPES, DataConfig, casts, column_names, damaged, is_csv, list_files, open_parquet, stream_csv
from recsys_moe.storage import AnyPath, Remote, trouble

SAMPLE_ROWS = 200_000
SAMPLE_CELLS = 20_000_000
"""A sample has at most so many rows, and so many values."""
READ_ROWS = 4_000_000
"""Of Parquet files with more rows, row groups spread evenly over all of them are read, of about so many rows together."""

FEW = 50
"""Whole numbers with at most so many values are taken for categories."""
LOW_RATE = 0.1
LEAK_AUC = 0.99
_BINS = 256
_YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")

# fmt: off
_LABEL_WORDS = {
    "accept", "accepted", "bought", "buy", "cancel", "canceled", "cancelled", "cart", "churn", "churned", "click",
    "clicked", "collect", "collected", "comment", "commented", "complete", "completed", "conversion", "convert",
    "converted", "default", "defaulted", "dislike", "disliked", "enter", "entered", "favorite", "favourite", "finish",
    "finished", "follow", "followed", "forward", "forwarded", "fraud", "hate", "hated", "install", "installed", "label",
    "like", "liked", "love", "loved", "order", "ordered", "outcome", "paid", "pay", "purchase", "purchased", "refund",
    "refunded", "replay", "repost", "response", "return", "returned", "share", "shared", "skip", "skipped", "subscribe",
    "subscribed", "survived", "target", "view", "viewed", "watch", "watched", "win", "won", "y",
}
"""A two-valued column with one of these in its name is suspected of being a label."""
_OUTCOME_WORDS = {
    "dwell", "stay", "stayed", "watched", "revenue", "refund", "refunded", "paid", "payment", "delivered", "returned",
    "cancelled",
}
_OUTCOME_PAIRS = {
    "play time", "play duration", "play ms", "watch time", "watch duration", "watch ms", "view time", "view duration",
    "read time", "listen time", "time spent", "order status", "order total", "order amount", "order value",
}
_OUTCOME_NAMES = {"rating", "stars"}
"""A column with one of these words, or pairs of words, in its name, or that is called so, is suspected of being known only
after the event."""
_WEIGHT_PAIRS = {"instance weight", "sample weight", "survey weight", "case weight", "row weight"}
# fmt: on
_ID = re.compile(r"(^|_)(id|uid|uuid|guid|key|hash|sku)$|(user|item|video|product|author|movie|session|device|customer|ad)id$")
_TIME = re.compile(r"(^|_)(time|timestamp|ts|date|datetime|day|dt|at)(_|$)")
_CODE = re.compile(
    r"(^|_)(code|type|kind|category|cat|class|tag|segment|zip|region|city|country|state|status|group|onehot)(_|$)"
)
_GROUPS = (
    "user",
    "uid",
    "member",
    "customer",
    "visitor",
    "viewer",
    "account",
    "person",
    "client",
    "device",
    "session",
    "query",
)
_POSITIVE = ("1", "true", "yes", "y", "t")


COLUMN_TITLES = ("column", "type", "values", "missing", "proposed as", "what they are", "why")


@dataclass(frozen=True)
class Column:
    """What was found in a column of the sample, and what it is proposed for.

    `use`: feature, label, suspected label, outcome (known too late, or a leak) or left out; `feature` is its line in the
    schema; `rate` and `positive` (an expression) belong to columns of two values.
    """

    name: str
    type: str
    distinct: int | None = None
    missing: float = 0.0
    values: str = ""
    use: str = "feature"
    note: str = ""
    feature: dict[str, Any] = field(default_factory=dict)
    positive: str | None = None
    rate: float | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class Description:
    """The columns, the tasks (named, or else suspected), what else the schema says, and the schema's text."""

    source: AnyPath
    rows: int
    sampled: int
    columns: tuple[Column, ...]
    tasks: tuple[dict[str, Any], ...]
    named: bool
    group: str | None
    time: str | None
    schema: str = ""

    def train_command(self, schema: Path | None) -> str:
        """What to run next."""
        if not self.named or schema is None:
            chosen = [task["column"] for task in self.tasks][: None if self.named else 1] or ["COLUMN"]
            labels = [part for column in chosen for part in ("--label", column)]
            return shlex.join(["recsys-moe", "data", "describe", str(self.source), *labels, "--output", "schema.yaml"])
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", self.source.name.split(".")[0]) or "mine"
        split = ["data.split.order=sorted", f"data.split.by={self.time}"] if self.time else []
        keys = ["data=custom", f"data.name={name}", f"data.schema={schema}", f"data.source={self.source}", *split]
        return shlex.join(["recsys-moe", "train", *keys])

    def table(self) -> list[tuple[str, ...]]:
        """A row of printable text for each column, under COLUMN_TITLES."""
        rows = []
        for c in self.columns:
            use = c.feature["kind"] if c.use == "feature" else c.use
            distinct = "" if c.distinct is None else f"{c.distinct:,}"
            missing = _percent(c.missing) if c.missing else ""
            rows.append((c.name, c.type, distinct, missing, use, c.values, c.note))
        return [tuple(map(_printable, row)) for row in rows]

    def to_json(self) -> dict[str, Any]:
        hidden = ("positive", "same_as")
        shown = (asdict(c if c.use == "feature" else replace(c, feature={})) for c in self.columns)
        columns = [{k: v for k, v in column.items() if k not in hidden} for column in shown]
        tasks = [{k: v for k, v in task.items() if k != "column"} for task in self.tasks]
        return {
            "source": str(self.source),
            "rows": self.rows,
            "sampled": self.sampled,
            "columns": columns,
            "tasks": tasks,
            "named": self.named,
            "group": self.group,
            "time": self.time,
            "schema": self.schema,
        }


def describe(
    source: AnyPath, labels: Sequence[str] = (), progress: Callable[[int, int], None] = lambda done, total: None
) -> Description:
    """Look at a Parquet or CSV file, or at a folder of them, and propose a schema.

    `labels` are columns of two values, or `NAME=EXPRESSION`; without any, what looks like a label is proposed as a comment.
    Everything is judged by a random sample of at most SAMPLE_ROWS rows, the same for the same file; memory does not grow
    with the file.

    Raises:
        UserError: a source that can't be read, a label that is not there or is none, no column that could be a feature.
    """
    files, _ = list_files(DataConfig(name="described", source=str(source), schema="-"))
    sample, rows, left_out = _read_sample(files, progress)
    complete = sample.num_rows == rows
    looks = [
        left_out.get(name) or _look(name, sample[name], complete) for name in dict.fromkeys([*sample.column_names, *left_out])
    ]
    looks = _mark_duplicates(looks, sample)
    named = [_named_task(label, looks, sample) for label in labels]
    looks = _mark_labels(looks, named)
    tasks = named or [_task(c, looks) for c in looks if c.use == "suspected label"]
    looks = _mark_leaks(looks, tasks, sample)
    looks = _mark_collisions(looks)
    if not any(c.use == "feature" for c in looks):
        raise UserError(f"{str(source)!r} has no column that could be a feature; see what is said of each with --json")
    found = Description(
        source, rows, sample.num_rows, tuple(looks), tuple(tasks), bool(named), _group(looks), _time(looks, sample)
    )
    return replace(found, schema=_render(found))


# The sample


def _read_sample(files: list[AnyPath], progress: Callable[[int, int], None]) -> tuple[pa.Table, int, dict[str, Column]]:
    """A sample of the rows of all files, how many rows there are in all, and the columns that are no use as they are."""
    headers = [column_names(path) for path in files]
    for path, header in zip(files, headers, strict=True):
        for name, times in Counter(header).items():
            if name and times > 1:
                raise UserError(f"column {name!r} stands in {str(path)!r} more than once; rename or remove the others")
    if len({is_csv(path) for path in files}) > 1:
        raise UserError(f"{str(files[0].parent)!r} holds Parquet and CSV files; describe one of them alone")
    names = list(dict.fromkeys(name for header in headers for name in header))
    everywhere = set.intersection(*map(set, headers))
    left_out = {n: Column(n, "", use="left out", note="not in every file") for n in names if n not in everywhere}
    left_out |= {n: Column(n, "", use="left out", note="a column without a name") for n in names if not n}
    names = [n for n in names if n not in left_out]
    limit = max(1, min(SAMPLE_ROWS, SAMPLE_CELLS // max(len(names), 1)))
    if is_csv(files[0]):
        sample, rows = _sample_csv(files, names, limit, progress)
    else:
        schemas = [open_parquet(path).schema_arrow for path in files]
        types = {n: {_plain(schema.field(n).type) for schema in schemas} for n in names}
        for n, kinds in types.items():
            if len(kinds) > 1 and not all(map(_is_number, kinds)):
                note = f"{' and '.join(sorted(map(str, kinds)))} in different files"
                left_out[n] = Column(n, "", use="left out", note=note)
        schema = pa.schema([(n, next(iter(k)) if len(k) == 1 else pa.float64()) for n, k in types.items() if n not in left_out])
        sample, rows = _sample_parquet(files, schema, limit, progress)
    return sample, rows, left_out


class _Thinned:
    """Rows kept with one probability for all of them, which halves whenever there are twice too many."""

    def __init__(self, limit: int) -> None:
        self._limit, self._share, self._random = limit, 1.0, np.random.default_rng(0)
        self._tables: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        self._tables.append(self._keep(table, self._share))
        self._rows += self._tables[-1].num_rows
        while self._rows > 2 * self._limit:
            self._share /= 2
            self._tables = [self._keep(pa.concat_tables(self._tables), 0.5)]
            self._rows = self._tables[0].num_rows

    def _keep(self, table: pa.Table, share: float) -> pa.Table:
        return table if share == 1 else table.filter(pa.array(self._random.random(table.num_rows) < share))

    def table(self) -> pa.Table:
        table = pa.concat_tables(self._tables)
        if table.num_rows > self._limit:
            table = table.take(np.sort(self._random.choice(table.num_rows, self._limit, replace=False)))
        return table.combine_chunks()


def _sample_csv(
    files: list[AnyPath], names: list[str], limit: int, progress: Callable[[int, int], None]
) -> tuple[pa.Table, int]:
    """A sample and the number of all rows; a column has the narrowest type that all its values have, not only the sample's."""
    possible = {name: list(CSV_TYPES) for name in names}
    rows, texts = 0, _Thinned(limit)
    for path in files:
        try:
            for batch in stream_csv(path, dict.fromkeys(names, pa.string())):
                for name in names:
                    possible[name] = [kind for kind in possible[name] if kind == pa.string() or casts(batch[name], kind)]
                texts.add(pa.Table.from_batches([batch]))
                rows += batch.num_rows
                progress(rows, rows)
        except (pa.ArrowException, OSError) as error:
            if isinstance(path, Remote) and isinstance(error, OSError):
                raise trouble(path, error) from None
            reason = str(error).split("\n")[0]
            raise UserError(f"{str(path)!r} can't be read as CSV ({reason}); mend the file") from None
    if not rows:
        raise _empty(files[0])
    if len(names) == 1 and (found := re.search("[;\t|]", names[0])):
        raise UserError(f"{str(files[0])!r} has one column {names[0]!r}; fields must be split by commas, not by {found[0]!r}")
    table = texts.table()
    return pa.table({name: table[name].cast(possible[name][0]) for name in names}), rows


def _sample_parquet(
    files: list[AnyPath], schema: pa.Schema, limit: int, progress: Callable[[int, int], None]
) -> tuple[pa.Table, int]:
    """A sample of all row groups, or of some spread evenly over all, and the number of all rows."""
    sizes = [
        [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        for metadata in (open_parquet(path).metadata for path in files)
    ]
    rows = sum(map(sum, sizes))
    if not rows:
        raise _empty(files[0])
    groups = [(number, group) for number, groups in enumerate(sizes) for group in range(len(groups))]
    if rows > READ_ROWS:
        count = max(1, READ_ROWS // max(map(max, filter(None, sizes))))
        groups = [groups[n] for n in np.unique(np.linspace(0, len(groups) - 1, count).astype(int))]
    done, total, thinned = 0, sum(sizes[number][group] for number, group in groups), _Thinned(limit)
    batch_rows = max(256, min(65_536, 10_000_000 // max(len(schema), 1)))
    for number, path in enumerate(files):
        chosen = [group for file, group in groups if file == number]
        try:
            for batch in open_parquet(path).iter_batches(batch_rows, chosen, columns=schema.names) if chosen else ():
                table = pa.Table.from_batches([batch])
                thinned.add(pa.table([table[n].cast(schema.field(n).type) for n in schema.names], schema=schema))
                done += batch.num_rows
                progress(done, total)
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from None
    return thinned.table(), rows


def _empty(path: AnyPath) -> UserError:
    return UserError(f"{str(path)!r} is empty; name a file with rows")


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return pa.large_string() if pa.types.is_string_view(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


# One column


def _look(name: str, column: pa.ChunkedArray, complete: bool) -> Column:
    """A column by itself: its figures, and which feature it makes if it is one."""
    kind = column.type
    if pa.types.is_null(kind):
        return Column(name, str(kind), 0, 1.0, use="left out", note="empty")
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return Column(name, str(kind), None, column.null_count / len(column), use="left out", note=_nested_note(kind))
    if pa.types.is_temporal(kind) and not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return Column(name, str(kind), use="left out", note="a time of day or a duration: make it a number")
    present = _present(column)
    missing = round(1 - len(present) / len(column), 6)
    distinct = pc.count_distinct(present).as_py()
    look = Column(name, str(kind), distinct, missing, _values(present, distinct))
    if distinct == 0:
        return replace(look, use="left out", note="empty")
    if distinct == 1 and not missing:
        return replace(look, use="left out", note="the same in every row")
    if time := _time_note(name, present):
        return replace(look, use="left out", note=time)
    if distinct == 2:
        look = replace(look, **_two_values(name, present))
    if _is_text(kind) or pa.types.is_boolean(kind):
        return _look_at_text(look, present)
    return _look_at_number(look, present, complete)


def _present(column: pa.ChunkedArray) -> pa.Array:
    """The values that are not missing: null, NaN and the empty text are."""
    values = column.combine_chunks().drop_null()
    if pa.types.is_floating(values.type):
        return values.filter(pc.invert(pc.is_nan(values)))
    if _is_text(values.type):
        return values.filter(pc.not_equal(values, ""))
    return values


def _nested_note(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"several values a row ({kind.value_type}): a multi-valued feature, a sequence or an embedding"
    return "neither a category nor a number"


def _values(present: pa.Array, distinct: int) -> str:
    """A few words on what the values are: a range, or the most frequent ones."""
    if not distinct:
        return ""
    if (_is_number(present.type) and distinct > 8) or pa.types.is_temporal(present.type):
        low, high = pc.min_max(present).as_py().values()
        return f"{_short(low)} … {_short(high)}"
    counts = pc.value_counts(present)
    first = np.argsort(-counts.field("counts").to_numpy(), kind="stable")[:3]
    top = counts.take(pa.array(first)).to_pylist()
    shown = ", ".join(f"{_short(pair['values'])} {100 * pair['counts'] / len(present):.3g} %" for pair in top)
    return shown + (", …" if distinct > 3 else "")


def _short(value: Any) -> str:
    text = _printable(f"{value:g}" if isinstance(value, float) else str(value))
    return text if len(text) <= 32 else text[:31] + "…"


def _printable(text: str) -> str:
    """Other people's text must not steer a terminal or end a comment."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _time_note(name: str, present: pa.Array) -> str:
    """What kind of time a column holds; empty if none."""
    if pa.types.is_timestamp(present.type) or pa.types.is_date(present.type):
        return "a time"
    if _is_text(present.type):
        texts = present[:1000].cast(pa.string())
        return "a time (as text)" if any(casts(texts, pa.timestamp("us", zone)) for zone in (None, "UTC")) else ""
    if pa.types.is_integer(present.type) and _TIME.search("_".join(_words(name))):
        low, high = pc.min_max(present).as_py().values()
        if low >= 19_000_101 and high <= 21_001_231 and all(map(_is_day, pc.unique(present)[:100].to_pylist())):
            return "a time (a day as YYYYMMDD)"
        for unit, scale in (("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)):
            if low >= 631_152_000 * scale and high < 4_102_444_800 * scale:  # 1990 … 2100
                return f"a time (in {unit} since 1970)"
    return ""


def _is_day(number: int) -> bool:
    try:
        datetime.datetime.strptime(str(number), "%Y%m%d")
    except ValueError:
        return False
    return True


def _two_values(name: str, present: pa.Array) -> dict[str, Any]:
    """Which of two values counts as positive (1, true, yes, or else the rarer one), as an expression, and its share."""
    counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(present).to_pylist()}
    said = [value for value in counts if _short(value).lower() in _POSITIVE]
    value = said[0] if len(said) == 1 else min(counts, key=lambda v: (counts[v], str(v)))
    rate = counts[value] / len(present)
    if not name.isidentifier() or keyword.iskeyword(name):
        return {"rate": rate}
    if isinstance(value, bool):
        return {"rate": rate, "positive": name if value else f"not {name}"}
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return {"rate": rate, "positive": f"{name} == {value if isinstance(value, int | float) else repr(str(value))}"}


def _look_at_text(look: Column, present: pa.Array) -> Column:
    distinct = look.distinct or 0
    if not pa.types.is_boolean(present.type):
        if distinct == len(present) >= 100:
            return replace(look, use="left out", note="another one in every row")
        lengths = pc.mean(pc.utf8_length(present)).as_py()
        if lengths > 60 and distinct > len(present) / 10:
            return replace(look, use="left out", note=f"free text of {lengths:.0f} characters")
    look = replace(look, feature=_categorical(look))
    if distinct > FEW:
        texts = pc.unique(present)[:10_000].to_pylist()
        strange = [text for text in texts if not _reads_as_number(text)]
        if len(strange) <= 3 and not _ID.search("_".join(_words(look.name))):
            what = f"numbers but for {', '.join(map(_short, strange))}" if strange else "numbers as text"
            return replace(look, note=f"{what}: numeric once it holds numbers only")
        if separator := _separator(texts):
            return replace(look, note=f"several values split by {separator!r}? each combination is one category")
    return look


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _separator(texts: list[str]) -> str | None:
    for separator in ("|", ";", ","):
        parts = [text.split(separator) for text in texts]
        split = sum(len(p) > 1 for p in parts)
        # Much fewer parts than texts: values that come again in other combinations.
        if split > len(texts) / 5 and len({part for p in parts for part in p}) < len(texts) / 2:
            return separator
    return None


def _categorical(look: Column) -> dict[str, Any]:
    feature: dict[str, Any] = {"name": look.name, "kind": "categorical"}
    return feature | ({"min_count": 2} if (look.distinct or 0) > 1000 else {})


def _look_at_number(look: Column, present: pa.Array, complete: bool) -> Column:
    distinct, name = look.distinct or 0, "_".join(_words(look.name))
    whole = pa.types.is_integer(present.type)
    if pa.types.is_floating(present.type) and complete:  # one fraction outside of a sample would end the preparation
        whole = casts(present, pa.int64())
    if whole:
        if _ID.search(name):
            if distinct == len(present) >= 100:
                return replace(look, use="left out", note="another one in every row")
            return replace(look, feature=_categorical(look), note="an id")
        if distinct <= FEW or _CODE.search(name):
            return replace(look, feature=_categorical(look))
        low, high = pc.min_max(present).as_py().values()
        if distinct == len(present) == high - low + 1:
            return replace(look, use="left out", note="a number for every row")
    x: npt.NDArray[np.float64] = pc.cast(present, pa.float64(), safe=False).to_numpy()
    if np.abs(x).max() > np.finfo(np.float32).max:
        return replace(look, use="left out", note="infinite, or too large for float32")
    feature: dict[str, Any] = {"name": look.name, "kind": "numeric"}
    size = np.abs(x)
    if size.max() >= 1000 and np.median(size) < size.max() / 50:
        feature["log1p"] = True
    feature["buckets"] = min(32, distinct)
    if look.missing:
        feature["missing_indicator"] = True
    return replace(look, feature=feature)


def _words(name: str) -> list[str]:
    """The words of a column's name, in lower case.

    >>> _words("isClick"), _words("play_time-ms")
    (['is', 'click'], ['play', 'time', 'ms'])
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


# Columns together


def _mark_duplicates(looks: list[Column], sample: pa.Table) -> list[Column]:
    """Leave out what repeats an earlier column value for value."""
    seen: dict[bytes, str] = {}
    out = []
    for look in looks:
        if look.use != "feature":
            out.append(look)
            continue
        codes = _dictionary(sample[look.name])
        whole = hashlib.sha256(codes.indices.fill_null(-1).to_numpy().astype(np.int64).tobytes())
        for text in codes.dictionary.cast(pa.string()).to_pylist():
            whole.update(f"{text}\0".encode())
        first = seen.setdefault(whole.digest(), look.name)
        again = replace(look, use="left out", note=f"the same as {first}", same_as=first)
        out.append(look if first == look.name else again)
    return out


def _dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.combine_chunks().dictionary_encode()


def _named_task(label: str, looks: list[Column], sample: pa.Table) -> dict[str, Any]:
    """The task of a label that the user has named: a column of two values, or NAME=EXPRESSION."""
    columns = {c.name: c for c in looks}
    if match := re.fullmatch(r"([A-Za-z_]\w*)\s*=(?!=)\s*(.+)", label):
        expression = Expression(match[2])
        for name in expression.columns:
            _known(name, columns, label)
        values = expression(sample.select(list(expression.columns)))
        if not expression.columns or not pa.types.is_boolean(values.type):
            raise UserError(f"--label {label!r} is not true or false; compare a column, such as 'like=rating >= 4'")
        rate = pc.mean(pc.cast(values, pa.float64())).as_py()
        if rate in (None, 0, 1):
            what = {None: "never known", 0: "never true", 1: "always true"}[rate]
            raise UserError(f"--label {label!r} is {what} in the {len(values):,} rows looked at; mend the condition")
        return {"name": match[1], "label": match[2], "column": label, "columns": expression.columns, "rate": rate}
    column = columns[_known(label, columns, label)]
    if column.distinct != 2:
        raise UserError(
            f"--label {label!r} has {column.distinct or 'no countable'} values ({column.values}), not two; say which ones "
            "count, such as --label 'like=rating >= 4'"
        )
    if column.positive is None:
        raise UserError(f"--label {label!r} can't stand in an expression; rename the column to a word without blanks")
    return _task(column, looks)


def _known(name: str, columns: Iterable[str], label: str) -> str:
    if name not in columns:
        raise UserError(
            f"--label {label!r}: there is no column {name!r}; {nearest(name, columns)} A condition is written NAME=CONDITION"
        )
    return name


def _task(column: Column, looks: list[Column]) -> dict[str, Any]:
    """The task whose label a column is: named like it, without is_ where nothing else is called so."""
    short = column.name.removeprefix("is_")
    taken = short in {c.name for c in looks} or not short.isidentifier()
    name = column.name if taken else short
    return {"name": name, "label": column.positive, "column": column.name, "columns": (column.name,), "rate": column.rate}


def _mark_labels(looks: list[Column], named: list[dict[str, Any]]) -> list[Column]:
    """Find the labels, and what is known only after the event by its name."""
    labels = {name for task in named for name in task["columns"]}
    # Whatever repeats a label gives it away.
    copies = {c.same_as for c in looks if c.name in labels}
    pairs = {c.name: c for c in looks if c.positive and c.use == "feature" and c.name not in labels | copies}
    strong = {name for name in pairs if not _LABEL_WORDS.isdisjoint(_words(name))}
    weak = {name for name, c in pairs.items() if name not in strong and _may_be_label(c)}
    suspected = strong or (set() if named else weak)
    out = []
    for look in looks:
        if look.name in labels:
            look = replace(look, use="label", note="")
        elif look.name in copies:
            look = replace(look, use="outcome", note="the same as a label")
        elif look.name in suspected:
            look = replace(look, use="suspected label", note=f"a label? {_percent(look.rate)} positive")
        elif look.use == "feature" and (note := _outcome_note(look.name)):
            look = replace(look, use="outcome", note=note)
        elif look.name in weak:
            look = replace(look, note=f"or a label? {_percent(look.rate)} positive")
        out.append(look)
    return out


def _outcome_note(name: str) -> str:
    """Why a column of that name is no input; empty if it may be one."""
    words = _words(name)
    pairs = {f"{a} {b}" for a, b in pairwise(words)}
    if not _WEIGHT_PAIRS.isdisjoint(pairs):
        return "a weight of the row, by its name: a task can take it as its weight"
    if not _OUTCOME_WORDS.isdisjoint(words) or not _OUTCOME_PAIRS.isdisjoint(pairs) or name.lower() in _OUTCOME_NAMES:
        return "known only after the event, by its name"
    return ""


def _may_be_label(look: Column) -> bool:
    flag = _words(look.name)[:1] in (["is"], ["has"])
    return flag or (look.rate is not None and look.rate <= LOW_RATE)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def _mark_leaks(looks: list[Column], tasks: list[dict[str, Any]], sample: pa.Table) -> list[Column]:
    """Leave out what predicts a label almost perfectly, alone."""
    truth = {}
    for task in tasks:
        y = Expression(task["label"])(sample)
        observed = pc.is_valid(y).to_numpy()
        truth[task["name"]] = (pc.fill_null(pc.cast(y, pa.bool_()), False).to_numpy(), observed)
    out = []
    for look in looks:
        notes: list[str] = []
        if look.use == "feature" and truth:
            codes = _codes(sample[look.name])
            notes = [_leak_note(name, codes, y, observed) for name, (y, observed) in truth.items()]
        note = next(filter(None, notes), None)
        out.append(replace(look, use="outcome", note=note) if note else look)
    return out


def _leak_note(name: str, codes: npt.NDArray[np.int64], y: npt.NDArray[np.bool_], observed: npt.NDArray[np.bool_]) -> str:
    """Why a column gives a label away; empty if it does not."""
    auc = _auc_alone(codes, y, observed)
    if auc >= LEAK_AUC:
        return f"a leak? predicts {name} alone with AUC {auc:.4f}"
    there = observed & (codes > 0)
    if there.sum() >= 20 and there.sum() < observed.sum() and y[there].all() and y[observed].mean() < 0.9:
        return f"a leak? there only where {name} is true"
    return ""


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A small whole number for each row: its value, or its quantile where there are many numbers; missing is one too."""
    encoded = _dictionary(column)
    codes: npt.NDArray[np.int64] = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    if _is_number(column.type) and not pa.types.is_integer(column.type) and len(encoded.dictionary) > _BINS:
        x = pc.cast(column, pa.float64(), safe=False).to_numpy()
        edges = np.nanquantile(x, np.linspace(0, 1, _BINS + 1)[1:-1])
        codes = np.where(np.isnan(x), -1, np.searchsorted(edges, x, side="right"))
    return codes + 1


def _auc_alone(codes: npt.NDArray[np.int64], y: npt.NDArray[np.bool_], observed: npt.NDArray[np.bool_]) -> float:
    """AUC of a label's rate for each code, fitted on one half of the rows and measured on the other; 0.5 if too few."""
    codes, y = codes[observed], y[observed]
    if min(y.sum(), len(y) - y.sum()) < 20:
        return 0.5
    half = np.random.default_rng(0).random(len(y)) < 0.5
    size = int(codes.max()) + 1
    aucs = []
    for fit in (half, ~half):
        seen = np.bincount(codes[fit], minlength=size)
        rate = (np.bincount(codes[fit & y], minlength=size) + y.mean()) / (seen + 1)
        negative, positive = (np.bincount(codes[~fit & (y == side)], minlength=size) for side in (False, True))
        _, where = np.unique(rate, return_inverse=True)
        negative, positive = np.bincount(where, negative), np.bincount(where, positive)
        below = np.cumsum(negative) - negative
        total = negative.sum() * positive.sum()
        aucs.append(float((positive * (below + negative / 2)).sum() / total) if total else 0.5)
    return sum(aucs) / 2


def _mark_collisions(looks: list[Column]) -> list[Column]:
    """Leave out a feature whose inputs would be called like another one's."""
    taken: set[str] = set()
    out = []
    for look in looks:
        if look.use == "feature":
            table = look.name + (BUCKET_SUFFIX if look.feature["kind"] == "numeric" else "")
            inputs = {f"table {table.replace('.', '__')}"}
            if look.feature["kind"] == "numeric":
                inputs |= {f"dense {look.name}", f"dense {look.name}{MISSING_SUFFIX}"}
            if taken & inputs:
                look = replace(look, use="left out", note="its inputs would be called like another feature's: rename it")
            else:
                taken |= inputs
        out.append(look)
    return out


def _group(looks: list[Column]) -> str | None:
    """Whose rows GAUC should rank: users before sessions."""
    ids = [c for c in looks if c.use == "feature" and _ID.search("_".join(_words(c.name)))]
    for word in _GROUPS:
        for look in ids:
            if word in {part for w in _words(look.name) for part in (w, w.removesuffix("id"))}:
                return look.name
    return None


def _time(looks: list[Column], sample: pa.Table) -> str | None:
    """The finest time that rows can be sorted by."""
    times = [c for c in looks if c.note.startswith("a time") and not c.missing and c.use == "left out"]
    return (
        max(times, key=lambda c: (c.distinct or 0, pa.types.is_temporal(sample[c.name].type)), default=Column("", "")).name
        or None
    )


# The schema's text


def _render(found: Description) -> str:
    def lines() -> Iterator[str]:
        sampled = "" if found.sampled == found.rows else f", judged by a random sample of {found.sampled:,}"
        yield f"# Proposed by `recsys-moe data describe` for {_short(found.source.name)}: {found.rows:,} rows{sampled}."
        if found.time:
            yield f"# Rows have a time: split them by it with data.split.order=sorted data.split.by={_short(found.time)}"
        yield "features:"
        for look in found.columns:
            if look.use == "feature":
                yield f"  - {_flow(look.feature)}  # {_comment(look)}"
        if left_out := [look for look in found.columns if look.use == "left out"]:
            yield "# Left out:"
            yield from (f"#   {_short(look.name) or '(no name)'}: {_comment(look)}" for look in left_out)
        yield "tasks:" + ("" if found.named else "  # uncomment what is to be learnt, or name it with --label")
        for task in found.tasks:
            mark = "" if found.named else "# "
            yield f"  {mark}- {_flow({'name': task['name'], 'label': task['label']})}  # {_percent(task['rate'])} positive"
        if found.group:
            yield f"group: {_flow(found.group)}"
        if late := [look for look in found.columns if look.use in ("outcome", "suspected label")]:
            yield "outcomes:  # never inputs; move one to the features if it is known beforehand"
            yield from (f"  - {_flow(look.name)}  # {_comment(look)}" for look in late)

    return "\n".join(lines()) + "\n"


def _comment(look: Column) -> str:
    missing = f"{_percent(look.missing)} missing" if look.missing else ""
    distinct = "" if look.distinct is None else f"{look.distinct:,} values"
    return _printable("; ".join(part for part in (look.note, look.type, distinct, missing, look.values) if part))


def _flow(value: Any) -> str:
    """YAML on one line; text is quoted wherever it might be taken for something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*( (==|<=?|>=?) [0-9]+)?", value) and value.lower() not in _YAML_WORDS:
            return value
        quoted: str = yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True)
        return quoted.rstrip("\n")
    return json.dumps(value)
