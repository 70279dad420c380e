"""A column of somebody's log rows by itself: its figures, which feature it makes if it is one, and which task as a label."""

import datetime
import keyword
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.columns import category_text, reads_as_number
from recsys_moe.sampling import is_plain_number
from recsys_moe.sources import casts

FEW = 50
"""Whole numbers with at most so many values are taken for categories."""
MANY = 100_000
"""What has more values is hashed: its vocabulary would grow with the rows."""
LEVELS, CLASSES = 10, 20
"""A label of at most so many whole numbers is ordinal, of so many texts multiclass."""
LONGEST = 50
"""Sequences are cut to the length that 95 % of them have, and to this one."""
_MAX_BUCKETS = 2**24
ID = re.compile(r"(^|_)(id|uid|uuid|guid|key|hash|sku)$|(user|item|video|product|author|movie|session|device|customer|ad)id$")
_TIME = re.compile(r"(^|_)(time|timestamp|ts|date|datetime|day|dt|at)(_|$)")
_CODE = re.compile(
    r"(^|_)(code|type|kind|category|cat|class|tag|segment|zip|region|city|country|state|status|group|onehot)(_|$)"
)
_ORDERED_WORDS = {
    *("history", "hist", "seq", "sequence", "last", "recent", "recently", "past", "previous", "prev", "viewed", "clicked"),
    *("visited", "path", "journey", "session"),
}
"""A column of lists with one of these in its name is taken for a sequence."""
_POSITIVE = ("1", "true", "yes", "y", "t")


@dataclass(frozen=True)
class Column:
    """What was found in a column of the sample, and what it is proposed for.

    `use`: feature, label, suspected label, outcome (known too late, or a leak) or left out; `feature` is its line in the
    schema; `task` the one that it makes as a label, but for the name; `rate` belongs to columns of two values; `is_time`: rows
    can be sorted by it.
    """

    name: str
    type: str
    distinct: int | None = None
    missing: float = 0.0
    values: str = ""
    use: str = "feature"
    note: str = ""
    feature: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    rate: float | None = None
    is_time: bool = False
    same_as: str | None = None


def look_at(name: str, column: pa.ChunkedArray, rows: int) -> Column:
    """A column by itself, as a sample of all `rows` has it."""
    kind, share = column.type, len(column) / rows
    if pa.types.is_null(kind):
        return Column(name, str(kind), 0, 1.0, use="left out", note="empty")
    if _is_list(kind):
        return _look_at_lists(name, column, share)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        note = "neither a category nor a number"
        return Column(name, str(kind), None, column.null_count / len(column), use="left out", note=note)
    if pa.types.is_temporal(kind) and not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return Column(name, str(kind), use="left out", note="a time of day or a duration: make it a number")
    present = _present(column.combine_chunks())
    missing = round(1 - len(present) / len(column), 6)
    distinct = pc.count_distinct(present).as_py()
    look = Column(name, str(kind), distinct, missing, _values(present, distinct))
    if distinct == 0:
        return replace(look, use="left out", note="empty")
    if distinct == 1 and not missing:
        return replace(look, use="left out", note="the same in every row")
    if time := _time_note(name, present):
        return replace(look, use="left out", note=time, is_time=True)
    if distinct == 2:
        look = replace(look, **_two_values(name, present))
    elif distinct > 2 and is_a_word(name):
        look = replace(look, task=_task_of_many(look, present, share))
    if _is_text(kind) or pa.types.is_boolean(kind):
        return _look_at_text(look, present, share)
    return _look_at_number(look, present, share)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_a_word(name: str) -> bool:
    """Whether an expression can name a column."""
    return name.isidentifier() and not keyword.iskeyword(name)


def _present(column: pa.Array) -> pa.Array:
    """The values that are not missing: null, NaN and the empty text are."""
    values = column.drop_null()
    if pa.types.is_floating(values.type):
        return values.filter(pc.invert(pc.is_nan(values)))
    if _is_text(values.type):
        return values.filter(pc.not_equal(values, ""))
    return values


def _values(present: pa.Array, distinct: int) -> str:
    """A few words on what the values are: a range, or the most frequent ones."""
    if not distinct:
        return ""
    if (is_plain_number(present.type) and distinct > 8) or pa.types.is_temporal(present.type):
        try:
            low, high = pc.min_max(present).as_py().values()
        except pa.ArrowInvalid:
            return f"in the time zone {present.type.tz!r}, which is not known here"
        return f"{short(low)} … {short(high)}"
    counts = pc.value_counts(present)
    first = np.argsort(-counts.field("counts").to_numpy(), kind="stable")[:3]
    top = counts.take(pa.array(first)).to_pylist()
    shown = ", ".join(f"{short(pair['values'])} {100 * pair['counts'] / len(present):.3g} %" for pair in top)
    return shown + (", …" if distinct > 3 else "")


def short(value: Any) -> str:
    text = printable(f"{value:g}" if isinstance(value, float) else str(value))
    return text if len(text) <= 32 else text[:31] + "…"


def printable(text: str) -> str:
    """Other people's text must not steer a terminal or end a comment."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _time_note(name: str, present: pa.Array) -> str:
    """What kind of time a column holds; empty if none."""
    if pa.types.is_timestamp(present.type) or pa.types.is_date(present.type):
        return "a time"
    if _is_text(present.type):
        texts = present.cast(pa.string())
        return "a time (as text)" if any(casts(texts, pa.timestamp("us", zone)) for zone in (None, "UTC")) else ""
    if pa.types.is_integer(present.type) and _TIME.search("_".join(words(name))):
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


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def words(name: str) -> list[str]:
    """The words of a column's name, in lower case.

    >>> words("isClick"), words("play_time-ms")
    (['is', 'click'], ['play', 'time', 'ms'])
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


# What it is as a label


def _two_values(name: str, present: pa.Array) -> dict[str, Any]:
    """Which of two values counts as positive (1, true, yes, or else the rarer one), as an expression, and its share."""
    counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(present).to_pylist()}
    said = [value for value in counts if short(value).lower() in _POSITIVE]
    value = said[0] if len(said) == 1 else min(counts, key=lambda v: (counts[v], str(v)))
    rate = counts[value] / len(present)
    if not is_a_word(name) or value in (math.inf, -math.inf):  # which has no name in an expression
        return {"rate": rate}
    if isinstance(value, bool):
        return {"rate": rate, "task": {"label": name if value else f"not {name}"}}
    if is_plain_number(present.type):
        value = int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)
    shown = value if isinstance(value, int | float) else repr(str(value))
    return {"rate": rate, "task": {"label": f"{name} == {shown}"}}


def _task_of_many(look: Column, present: pa.Array, share: float) -> dict[str, Any]:
    """The task of a label of three values or more: few whole numbers are levels, few texts classes, other numbers a value."""
    counts = pc.value_counts(present)
    distinct, values = len(counts), counts.field("values")
    if _is_text(present.type):
        texts = values.to_pylist() if distinct <= CLASSES else []
        if len({category_text(text) for text in texts} - {None}) < distinct:
            return {}
        order = np.argsort(-counts.field("counts").to_numpy(), kind="stable")
        return {"kind": "multiclass", "label": look.name, "classes": [texts[n] for n in order]}
    if not is_plain_number(present.type):
        return {}
    if distinct <= LEVELS and _is_whole(present, share):
        levels = sorted(int(value) for value in values.to_pylist())
        if _CODE.search("_".join(words(look.name))):  # numbers of things that have no order
            return {"kind": "multiclass", "label": look.name, "classes": levels}
        return {"kind": "ordinal", "label": look.name, "levels": levels}
    x = _as_floats(present)
    return {"kind": "regression", "label": look.name} | heavy_tail(x) if np.abs(x).max() <= np.finfo(np.float32).max else {}


def heavy_tail(x: npt.NDArray[np.float64]) -> dict[str, bool]:
    """`log1p` where the largest numbers are far from the usual ones."""
    size = np.abs(x)
    return {"log1p": True} if size.max() >= 1000 and np.median(size) < size.max() / 50 else {}


def _as_floats(present: pa.Array) -> npt.NDArray[np.float64]:
    x: npt.NDArray[np.float64] = pc.cast(present, pa.float64(), safe=False).to_numpy()
    return x


def _is_whole(present: pa.Array, share: float) -> bool:
    """Whether all numbers are whole. Of floats a sample can't tell: one fraction outside of it would end the preparation."""
    if pa.types.is_integer(present.type):
        return True
    return pa.types.is_floating(present.type) and share == 1 and casts(present, pa.int64())


# What it is as a feature


def _look_at_text(look: Column, present: pa.Array, share: float) -> Column:
    distinct = look.distinct or 0
    if not pa.types.is_boolean(present.type):
        if distinct == len(present) >= 100:
            note = f"another one in every row; {_as_numbers(present)}".removesuffix("; ")
            return replace(look, use="left out", note=note)
        lengths = pc.mean(pc.utf8_length(present)).as_py()
        if lengths > 60 and distinct > len(present) / 10:
            return replace(look, use="left out", note=f"free text of {lengths:.0f} characters")
    if distinct > FEW and not ID.search("_".join(words(look.name))):
        if note := _as_numbers(present):
            return replace(_category(look, present, share), note=note)
        if separator := _separator(pc.unique(present)[:10_000].to_pylist()):
            lists = pc.split_pattern(present, separator)
            feature = {"name": look.name, "separator": separator}
            return replace(_many_values(look, lists, feature, share), note=f"several values split by {separator!r}")
    return _category(look, present, share)


def _as_numbers(present: pa.Array) -> str:
    """What to say of texts that are numbers, all but a few; empty of others."""
    strange = [text for text in pc.unique(present)[:10_000].to_pylist() if not reads_as_number(text)]
    if len(strange) > 3:
        return ""
    what = f"numbers but for {', '.join(map(short, strange))}" if strange else "numbers as text"
    return f"{what}: numeric once it holds numbers only"


def _category(look: Column, present: pa.Array, share: float) -> Column:
    """A column of single values: with a vocabulary, or hashed where that would grow with the rows."""
    feature, note = {"name": look.name, "kind": "categorical"}, look.note
    if (many := _estimate(present, share)) > MANY:
        feature["kind"] = "hashed"
        note = "; ".join(filter(None, (note, f"about {many:,} values: with collisions: none, each has a row of its own")))
    return replace(look, feature=feature | _size(many, "buckets"), note=note)


def _size(values: int, hashed: str) -> dict[str, int]:
    """What bounds a table of so many values: a third more rows than values, or a vocabulary of what occurs twice."""
    if values > MANY:
        return {hashed: min(_MAX_BUCKETS, 1 << math.ceil(math.log2(values * 4 / 3)))}
    return {"min_count": 2} if values > 1000 else {}


def _estimate(present: pa.Array, share: float) -> int:
    """How many values all rows have: those of the sample, what occurs once standing for 1/√share (Charikar et al. 2000, GEE).

    >>> _estimate(pa.array([1, 2, 2]), 0.25)
    3
    """
    counts = pc.value_counts(present).field("counts").to_numpy()
    return round(len(counts) + (counts == 1).sum() * (share**-0.5 - 1))


def _look_at_lists(name: str, column: pa.ChunkedArray, share: float) -> Column:
    """A list a row: an embedding where all are numbers of one length, else a multi-valued feature or a sequence."""
    kind = column.type.value_type
    present = column.combine_chunks().drop_null()
    values = present.flatten()
    missing = round(1 - len(present) / len(column), 6)
    if values.null_count == len(values):
        return Column(name, str(column.type), 0, missing, use="left out", note="empty")
    lengths = pc.list_value_length(present).to_numpy()
    look = Column(name, str(column.type), None, missing, f"{lengths.min()} … {lengths.max()} a row")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        if lengths.min() != lengths.max():
            return replace(look, use="left out", note="lists of numbers of different lengths")
        if values.null_count or not (np.abs(_as_floats(values)) <= np.finfo(np.float32).max).all() or lengths[0] > 65536:
            return replace(look, use="left out", note="lists of numbers, some of them null or not finite in float32")
        feature = {"name": name, "kind": "embedding", "dim": int(lengths[0])}
        return replace(look, values="", feature=feature, note="all of one length")
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        return replace(look, use="left out", note=f"lists of {kind}: neither categories nor numbers")
    known = _present(values)
    distinct = pc.count_distinct(known).as_py()
    if not distinct:
        return replace(look, use="left out", note="empty")
    look = replace(look, distinct=distinct, values=f"{look.values}: {_values(known, distinct)}")
    return _many_values(look, present, {"name": name}, share)


def _many_values(look: Column, lists: pa.Array, feature: dict[str, Any], share: float) -> Column:
    """Several values a row: a sequence if its name speaks of order, else in no order."""
    feature |= {"kind": "multi"}
    note = "or a sequence, if their order tells something"
    if not _ORDERED_WORDS.isdisjoint(words(look.name)):
        usual = int(np.percentile(pc.list_value_length(lists).to_numpy(), 95))
        feature |= {"kind": "sequence", "max_length": max(1, min(LONGEST, usual))}
        note = "oldest first?"
    many = _estimate(_present(lists.flatten()), share)
    return replace(look, feature=feature | _size(many, "buckets"), note=note)


def _separator(texts: list[str]) -> str | None:
    for separator in ("|", ";", ","):
        parts = [text.split(separator) for text in texts]
        split = sum(len(p) > 1 for p in parts)
        # Much fewer parts than texts: values that come again in other combinations.
        if split > len(texts) / 5 and len({part for p in parts for part in p}) < len(texts) / 2:
            return separator
    return None


def _look_at_number(look: Column, present: pa.Array, share: float) -> Column:
    distinct, name = look.distinct or 0, "_".join(words(look.name))
    if _is_whole(present, share):
        if ID.search(name):
            if distinct == len(present) >= 100:
                return replace(look, use="left out", note="another one in every row")
            return _category(replace(look, note="an id"), present, share)
        if distinct <= FEW or _CODE.search(name):
            return _category(look, present, share)
        low, high = pc.min_max(present).as_py().values()
        if distinct == len(present) == high - low + 1:
            return replace(look, use="left out", note="a number for every row")
    x = _as_floats(present)
    if np.abs(x).max() > np.finfo(np.float32).max:
        return replace(look, use="left out", note="infinite, or too large for float32")
    feature: dict[str, Any] = {"name": look.name, "kind": "numeric"} | heavy_tail(x) | {"buckets": min(32, distinct)}
    if look.missing:
        feature["missing_indicator"] = True
    return replace(look, feature=feature)


def encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column as codes and the values that they stand for; lists as text."""
    if _is_list(column.type):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), ",")
    return column.combine_chunks().dictionary_encode()
