"""Log files and the protocol that splits their rows: read in chunks, so that size does not matter.

A source is Parquet or CSV (`.csv`, `.csv.gz`; every other name is taken for Parquet). Its rows are numbered through all
files in the order given; the protocol gives each row to `train`, `validation` or `test`; a chunk is a run of rows that one
worker reads, transforms and writes. What the log files lack may come from second tables, joined by key while rows are read.
"""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow.fs import FileType
from pydantic import Field

from recsys_moe import storage
from recsys_moe.columns import is_number
from recsys_moe.errors import UserError, nearest
from recsys_moe.schema import Name, Numeric, Schema, load_schema
from recsys_moe.storage import AnyPath, Remote, locate
from recsys_moe.transforms import as_category
from recsys_moe.typed import typed

PARTS = ("train", "validation", "test")
CHUNK_ROWS = 131_072
CSV_TYPES = (pa.null(), pa.int64(), pa.float64(), pa.bool_(), pa.string())
"""What the text of a CSV column may mean, narrowest first."""

Size = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]


@typed
class Split:
    """How the rows are shared out: the first `train`, the next `validation`, the last `test` of them, in `order`.

    Sizes are rows (whole numbers) or shares (between 0 and 1). `order`: `given` (the files' own, right for logs in time
    order), `sorted` by the column `by` (numbers or times, rising; equal ones keep the files' order) or `permuted` by
    `numpy.random.default_rng(seed).permutation`. With `held_out` files, `files` are the training part whole, `train` is not
    used, and the sizes share out the held-out rows.

    With `folds`, `fold` (from 0 on) says which rows are tested, and all that are neither tested nor validated on are trained
    on. `permuted` cuts all rows into `folds` parts, each of which is tested once; of rows in an order, the last `folds` windows
    of `test` rows are tested one after the other, each by a model of the rows before it (`train` is not used).
    """

    train: Size = 0.8
    validation: Size = 0.1
    test: Size = 0.1
    order: Literal["given", "permuted", "sorted"] = "permuted"
    by: Name | None = None
    seed: int = 0
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.fold >= (self.folds or 1):
            raise ValueError(f"'data.split.fold' is {self.fold}, but data.split.folds is {self.folds}; folds count from 0")
        if (self.order == "sorted") != (self.by is not None):
            raise ValueError(
                f"'data.split.by' is {self.by!r} with data.split.order={self.order}; name a column with order=sorted, and "
                "only there"
            )


@typed
class Join:
    """A second table: each row gets the columns of the row of `file` that has the same value of the column `key`.

    `file` is Parquet or CSV, below the source's folder unless its path is absolute; it is kept in memory, and a value of
    `key` stands in one of its rows only. A row without a counterpart gets nulls. Only columns that the schema names and the
    log file lacks are taken.
    """

    file: Name
    key: Name


@typed
class DataConfig:
    """A data set: where its rows are, its schema and its protocol.

    `source` is a folder or a file, on this machine or in object storage (see `recsys_moe.storage`); `files` and `held_out`
    are glob patterns below a folder. A file that both match is held out; one that is joined is neither. `schema` is a file,
    or the name of one in `conf/schema`. `tasks` picks some of the
    schema's tasks; empty means all.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    source: str
    schema: str
    files: tuple[str, ...] = ("*.parquet", "*.csv", "*.csv.gz", "*.CSV")
    held_out: tuple[str, ...] = ()
    join: tuple[Join, ...] = ()
    tasks: tuple[str, ...] = ()
    split: Split = Split()

    def __post_init__(self) -> None:
        for text in (self.source, *(join.file for join in self.join)):
            if "://" in text:
                locate(text)  # credentials end here, before they are written anywhere

    def load_schema(self, shipped: Path) -> Schema:
        """The schema with the chosen tasks; `shipped` is the folder of those that come with the package.

        Raises:
            UserError: no such schema, or a mistake in it.
        """
        path = Path(self.schema)
        if path.suffix not in (".yaml", ".yml"):
            path = shipped / f"{self.schema}.yaml"
            if not path.exists():
                names = sorted(p.stem for p in shipped.glob("*.yaml"))
                raise UserError(
                    f"data.schema {self.schema!r} is not a shipped schema; name a .yaml file, or {nearest(self.schema, names)}"
                )
        schema = load_schema(path)
        return schema.select_tasks(self.tasks) if self.tasks else schema


@dataclass(frozen=True)
class Chunk:
    """Rows `start` … `start + len(parts)` of all rows; in `path`, from its row `offset` on. `parts` indexes PARTS.

    The files of `joins` have whole paths.
    """

    index: int
    path: AnyPath
    offset: int
    start: int
    parts: npt.NDArray[np.int8]
    joins: tuple[Join, ...] = ()


def list_joins(config: DataConfig) -> tuple[Join, ...]:
    """The joined tables with their files' whole paths."""
    if not config.join:
        return ()
    source = locate(config.source)
    folder = source.parent if source.is_file() else source
    return tuple(replace(join, file=str(_below(folder, join.file))) for join in config.join)


def _below(folder: AnyPath, file: str) -> AnyPath:
    return locate(file) if "://" in file or Path(file).is_absolute() else folder / file


def list_files(config: DataConfig) -> tuple[list[AnyPath], list[AnyPath]]:
    """The data files and the held-out files, each file once, in the order of the patterns, then by name.

    Raises:
        UserError: nothing there, nothing that a pattern matches, or a file that is to be trained on and held out.
    """
    source = locate(config.source)
    for join in list_joins(config) if source.exists() else ():
        if not locate(join.file).is_file():
            raise UserError(f"data.join: {join.file!r} is no file; name a Parquet or CSV file below data.source")
    if source.is_file():
        if config.held_out:
            raise UserError(
                f"data.held_out {list(config.held_out)} needs a folder, but data.source {str(source)!r} is a file; name the "
                "folder, or share out the file's rows with data.split"
            )
        return [source], []
    if not source.is_dir():
        raise UserError(f"data.source {str(source)!r} does not exist; name the folder or file with the log rows")
    default = DataConfig.__dataclass_fields__["files"].default
    files = _matches(source, "data.files", config.files, together=config.files == default)
    held_out = _matches(source, "data.held_out", config.held_out, together=False)
    spoken_for = {locate(join.file).resolve(): "data.join names" for join in list_joins(config)}
    spoken_for |= dict.fromkeys(held_out, "data.held_out matches")
    for path, pattern in files.values():
        # A pattern that spells a file out means just that file; a wildcard means whatever is not spoken for.
        if path.resolve() in spoken_for and not any(sign in pattern for sign in "*?["):
            by = spoken_for[path.resolve()]
            raise UserError(f"data.files names {pattern!r}, which {by} too; take it out of one of them")
    training = [path for path, _ in files.values() if path.resolve() not in spoken_for]
    if not training:
        by = "data.held_out matches" if held_out else "data.join names"
        raise UserError(f"{by} every file that data.files matches, which leaves none to train on; narrow it")
    return training, [path for path, _ in held_out.values()]


def _matches(source: AnyPath, key: str, patterns: tuple[str, ...], together: bool) -> dict[AnyPath, tuple[AnyPath, str]]:
    """The files that the patterns match, each under its real path so that it counts once, with the pattern that found it."""
    found: dict[AnyPath, tuple[AnyPath, str]] = {}
    for pattern in patterns:
        try:
            found_here: Any = source.glob(pattern)  # of one kind of place, which sort among themselves
            paths: list[AnyPath] = sorted(found_here)
        except (NotImplementedError, ValueError):  # what pathlib says to an absolute or an empty pattern
            raise UserError(f"{key}: {pattern!r} is no pattern below {str(source)!r}; write one such as '*.parquet'") from None
        if not paths and not together:
            raise UserError(f"{key}: no file matches {pattern!r} in {str(source)!r}; check data.source and {key}")
        for path in paths:
            if path.is_dir():
                raise UserError(
                    f"{key}: {pattern!r} matches the folder {str(path)!r}; name the files in it, as 'folder/*.parquet'"
                )
            found.setdefault(path.resolve(), (path, pattern))
    if patterns and not found:
        raise UserError(f"{key}: no file in {str(source)!r} matches any of {', '.join(patterns)}; check data.source")
    return found


def digest_files(paths: Sequence[AnyPath]) -> str:
    """SHA-256 over the files' names and what stands for their contents (see `storage.digest`)."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path.name}:{storage.digest(path)}\n".encode())
    return whole.hexdigest()


def plan_chunks(config: DataConfig, schema: Schema, chunk_rows: int = CHUNK_ROWS) -> list[Chunk]:
    """Number the rows, apply the protocol and cut the files into chunks.

    Raises:
        UserError: an empty or damaged file, a label or number of another type in another file, a table that can't be joined, or
            a split that the rows can't fill.
    """
    files, held_out = list_files(config)
    joins = list_joins(config)
    counts, kinds = zip(*(_survey(path, schema.columns, schema, joins) for path in (*files, *held_out)), strict=True)
    _check_forms([*files, *held_out], kinds, schema)
    _check_joins(files[0], schema, joins)
    shared_out, rows = (held_out, sum(counts[len(files) :])) if held_out else (files, sum(counts))
    keys = None if config.split.by is None else _sort_keys(shared_out, config.split.by, schema, joins)
    parts = _share_out(config.split, rows, (1, 2) if held_out else (0, 1, 2), keys)
    if held_out:
        parts = np.concatenate([np.zeros(sum(counts[: len(files)]), np.int8), parts])
    chunks: list[Chunk] = []
    start = 0
    for path, rows in zip((*files, *held_out), counts, strict=True):
        # A CSV file can only be read from its beginning: it is one chunk, which its reader takes in blocks.
        step = rows if is_csv(path) else chunk_rows
        for offset in range(0, rows, step):
            size = min(step, rows - offset)
            chunks.append(Chunk(len(chunks), path, offset, start, parts[start : start + size], joins))
            start += size
    return chunks


def _check_forms(paths: list[AnyPath], kinds: Sequence[pa.Schema], schema: Schema) -> None:
    """Refuse a label or a numeric feature that is a number in one file and text in another; a category is the same in both.

    Raises:
        UserError: names the column and both files.
    """
    roles = dict.fromkeys(schema.label_columns, "label")
    roles |= {f.name: "feature" for f in schema.features if isinstance(f, Numeric)}
    first: dict[tuple[str, bool], tuple[AnyPath, pa.DataType]] = {}
    for path, fields in zip(paths, kinds, strict=True):
        for field in fields:
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if field.name not in roles or pa.types.is_null(kind):
                continue
            first.setdefault((field.name, is_number(kind)), (path, kind))
            here, other = first[field.name, is_number(kind)], first.get((field.name, not is_number(kind)))
            if other:
                raise UserError(
                    f"{roles[field.name]} column {field.name!r} is {other[1]} in {str(other[0])!r} and {here[1]} in "
                    f"{str(here[0])!r}; write it in one type in all files"
                )


def _share_out(
    split: Split, rows: int, part_numbers: tuple[int, ...], keys: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.int8]:
    """The part of each of the rows; `keys` are the values of `split.by`."""
    if keys is not None:
        order = np.argsort(keys, kind="stable")
    else:
        order = np.random.default_rng(split.seed).permutation(rows) if split.order == "permuted" else np.arange(rows)
    if split.folds is not None:
        return _fold(split, order, part_numbers)
    wanted = [getattr(split, PARTS[number]) for number in part_numbers]
    sizes = [_size(size, rows) for size in wanted]
    shares = all(isinstance(size, float) for size in wanted)
    if shares and abs(sum(wanted) - 1) < 1e-9:
        sizes[-1] = rows - sum(sizes[:-1])
    if sum(sizes) > rows or min(sizes) < 1:
        raise UserError(
            f"data.split asks for {' + '.join(map(str, wanted))} of {rows:,} rows, which leaves a part empty or asks for "
            "more than there is; change data.split"
        )
    parts = np.full(rows, -1, np.int8)
    edges = np.cumsum([0, *sizes])
    for number, low, high in zip(part_numbers, edges, edges[1:], strict=False):
        parts[order[low:high]] = number
    return parts


def _size(size: Size, rows: int) -> int:
    return int(size * rows + 0.5) if isinstance(size, float) else size


def _fold(split: Split, order: npt.NDArray[np.int64], part_numbers: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The parts of one fold: the tested rows, those validated on before them (in a permutation: behind them), the rest."""
    if len(part_numbers) < len(PARTS):
        raise UserError("data.split.folds is for one set of files; leave data.held_out empty or data.split.folds out")
    assert split.folds is not None
    rows, validation = len(order), _size(split.validation, len(order))
    if split.order == "permuted":
        low, high = rows * split.fold // split.folds, rows * (split.fold + 1) // split.folds
        others = np.concatenate([order[high:], order[:low]])
        held, trained = others[:validation], others[validation:]
    else:
        window = _size(split.test, rows)
        high = rows - (split.folds - 1 - split.fold) * window
        low = high - window
        held, trained = order[max(0, low - validation) : max(0, low)], order[: max(0, low - validation)]
    if min(high - max(low, 0), len(held), len(trained)) < 1 or len(held) < validation:
        raise UserError(
            f"data.split asks for {split.folds} folds with {split.validation} of {rows:,} rows for validation, which leaves a "
            f"part of fold {split.fold} empty; change data.split"
        )
    parts = np.full(rows, -1, np.int8)
    for number, which in enumerate((trained, held, order[low:high])):
        parts[which] = number
    return parts


def _sort_keys(paths: list[AnyPath], by: str, schema: Schema, joins: tuple[Join, ...]) -> npt.NDArray[Any]:
    """The values of the column that the rows are sorted by: numbers as they are, times in microseconds."""
    pieces, first = list[npt.NDArray[Any]](), dict[str, AnyPath]()
    for path in paths:
        rows = 0
        for table in _read(path, (by,), schema, joins=joins):
            values, form = _sort_key(table[by], by, path, rows)
            pieces.append(values)
            rows += len(values)
            first.setdefault(form, path)
            if len(first) > 1:
                (form, path), (other, elsewhere) = first.items()
                raise UserError(
                    f"data.split.by: column {by!r} holds {form} in {str(path)!r} and {other} in {str(elsewhere)!r}, which have "
                    "no common order; write them in one form"
                )
    return np.concatenate(pieces)


def _sort_key(column: pa.ChunkedArray, by: str, path: AnyPath, row: int) -> tuple[npt.NDArray[Any], str]:
    """The values from a file's row `row` on, and what they are: numbers, or times with or without a time zone."""
    lost = pc.index(pc.is_null(column, nan_is_null=True), True).as_py()
    if lost >= 0:
        raise UserError(
            f"data.split.by: column {by!r} of {str(path)!r} is {column[lost].as_py() or 'null'} in row {row + lost:,} (counted "
            "from 0), which has no place in the order; leave such rows out or sort by another column"
        )
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return np.asarray(column.to_numpy()), "numbers"
    forms = {"numbers": pa.int64(), "times": pa.timestamp("us"), "times with a time zone": pa.timestamp("us", "UTC")}
    if pa.types.is_timestamp(column.type):
        forms = {"times with a time zone" if column.type.tz else "times": pa.timestamp("us", column.type.tz)}
    for form, kind in forms.items():
        try:
            values = pc.cast(column, kind, safe=not pa.types.is_timestamp(column.type))
            return np.asarray(values.cast(pa.int64()).to_numpy()), form
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    # What the first value is, some value is not.
    fits = [kind for kind in forms.values() if casts(column[:1], kind)]
    strange = next((n for n in range(len(column)) if not any(casts(column[n : n + 1], kind) for kind in fits)), 0)
    raise UserError(
        f"data.split.by: column {by!r} of {str(path)!r} is {column[strange].as_py()!r} in row {row + strange:,} (counted from "
        "0), which is neither a number nor a time like those before it; write all in one form, with a time zone in all rows or "
        "in none, or sort by another column"
    )


def read_rows(path: AnyPath, schema: Schema, labels: bool = True, joins: tuple[Join, ...] = ()) -> Iterator[pa.Table]:
    """All rows of a file, in order, with the schema's columns only; without `labels`, the feature columns only.

    Raises:
        UserError: it is not there, empty or damaged, or lacks a column that no joined table has.
    """
    rows = 0
    for table in _read(path, schema.columns if labels else schema.feature_columns, schema, joins=joins):
        rows += table.num_rows
        yield table
    if not rows:
        raise _empty(path)


def count_rows(path: AnyPath, schema: Schema, labels: bool = False, joins: tuple[Join, ...] = ()) -> int:
    """The rows of a file.

    Raises:
        UserError: it is not there, empty or damaged, or lacks a column that no joined table has.
    """
    return _survey(path, schema.columns if labels else schema.feature_columns, schema, joins)[0]


def _survey(path: AnyPath, columns: Sequence[str], schema: Schema, joins: tuple[Join, ...]) -> tuple[int, pa.Schema]:
    """The rows of a file, and its columns' types; of a CSV file, those of `columns`."""
    own, _ = _find_columns(path, columns, schema, joins)
    if is_csv(path):
        rows, kinds = 0, pa.schema([])
        for batch in _open_csv(path, schema, own):
            rows, kinds = rows + batch.num_rows, batch.schema
    else:
        file = open_parquet(path)
        rows, kinds = file.metadata.num_rows, file.schema_arrow
    if not rows:
        raise _empty(path)
    return rows, kinds


def read_chunk(chunk: Chunk, schema: Schema) -> Iterator[tuple[pa.Table, npt.NDArray[np.int8]]]:
    """The rows of a chunk and the part of each, in pieces of bounded size."""
    rows, position = len(chunk.parts), 0
    for table in _read(chunk.path, schema.columns, schema, chunk.offset, rows, chunk.joins):
        yield table, chunk.parts[position : position + table.num_rows]
        position += table.num_rows


def read_part(config: DataConfig, schema: Schema, part: str) -> Iterator[pa.Table]:
    """The raw rows of one part of the protocol, in the order of the files."""
    for chunk in plan_chunks(config, schema):
        for table, parts in read_chunk(chunk, schema):
            chosen = table.filter(pa.array(parts == PARTS.index(part)))
            if chosen.num_rows:
                yield chosen


def _read(
    path: AnyPath,
    columns: Sequence[str],
    schema: Schema,
    offset: int = 0,
    rows: int | None = None,
    joins: tuple[Join, ...] = (),
) -> Iterator[pa.Table]:
    own, lookups = _find_columns(path, columns, schema, joins)
    for table in _read_file(path, own, schema, offset, rows):
        for join, names in lookups:
            table = _add_columns(table, join, names, schema)
        yield table.select(list(columns))


def _read_file(path: AnyPath, columns: Sequence[str], schema: Schema, offset: int, rows: int | None) -> Iterator[pa.Table]:
    if is_csv(path):
        for batch in _open_csv(path, schema, columns):
            yield pa.Table.from_batches([batch])
        return
    file = open_parquet(path)
    end = file.metadata.num_rows if rows is None else offset + rows
    first = 0
    try:
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if first < end and last > offset:
                table = _without_views(file.read_row_group(group, columns=list(columns)))
                low, high = max(offset - first, 0), min(end, last) - first
                for piece in range(low, high, CHUNK_ROWS):
                    yield table.slice(piece, min(CHUNK_ROWS, high - piece))
            first = last
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def _without_views(table: pa.Table) -> pa.Table:
    """Texts and bytes that are views (as polars and DuckDB write them) in the form that Arrow's functions take."""
    for place, field in enumerate(table.schema):
        kind = without_views(field.type)
        if kind != field.type:
            table = table.set_column(place, field.name, table[place].cast(kind))
    return table


def without_views(kind: pa.DataType) -> pa.DataType:
    """The type that values of `kind` have once they are no views; lists of views too.

    >>> without_views(pa.list_(pa.string_view()))
    ListType(list<item: large_string>)
    """
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    for is_list, list_of in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind) and (value := without_views(kind.value_type)) != kind.value_type:
            return list_of(value)
    return kind


def _find_columns(
    path: AnyPath, wanted: Sequence[str], schema: Schema, joins: tuple[Join, ...]
) -> tuple[list[str], list[tuple[Join, tuple[str, ...]]]]:
    """Which columns to read from the file itself, and which from which joined table."""
    present = column_names(path)
    missing = [name for name in wanted if name not in present]
    own = [name for name in wanted if name in present]
    lookups = []
    for join in joins if missing else ():
        there = column_names(locate(join.file))
        _check_columns(locate(join.file), there, [join.key])
        names = tuple(name for name in missing if name in there)
        if names:
            _check_columns(path, present, [join.key])
            lookups.append((join, names))
            own += [] if join.key in own else [join.key]
            missing = [name for name in missing if name not in names]
            present = [*present, *names]
    roles = {schema.group or "": "group"}
    roles |= dict.fromkeys(schema.label_columns, "label") | dict.fromkeys(schema.feature_columns, "feature")
    _check_columns(path, present, wanted, roles, joins)
    return own, lookups


def _add_columns(table: pa.Table, join: Join, names: tuple[str, ...], schema: Schema) -> pa.Table:
    found, other = _look_up(table[join.key], join, names, schema)
    for name in names:
        table = table.append_column(name, other[name].take(found))
    return table


def _look_up(column: pa.ChunkedArray, join: Join, names: tuple[str, ...], schema: Schema) -> tuple[pa.Array, pa.Table]:
    """The row of the joined table that each value of the key belongs to (null: none), and the table."""
    stamp = storage.info(locate(join.file)).mtime_ns
    other = _joined_table(join, names, schema, not pa.types.is_integer(column.type), stamp)
    keys = _key(column, join.key, as_text=not pa.types.is_integer(other[join.key].type))
    return pc.index_in(keys, value_set=other[join.key]), other


@lru_cache(maxsize=8)
def _joined_table(join: Join, names: tuple[str, ...], schema: Schema, as_text: bool, stamp: int) -> pa.Table:
    """A joined table with its key in comparable form and these columns, each in one piece; without rows that lack a key.

    Kept for the next chunk while the file's `stamp` is the same.
    """
    path = locate(join.file)
    columns = tuple(dict.fromkeys((join.key, *names)))
    tables = list(_read_file(path, columns, schema, 0, None))
    if not tables:
        raise _empty(path)
    table = pa.concat_tables(tables).select(columns).combine_chunks()
    key = _key(table[join.key], join.key, as_text or not pa.types.is_integer(table[join.key].type))
    table = table.set_column(columns.index(join.key), join.key, key).filter(pc.is_valid(key))
    counts = pc.value_counts(table[join.key])
    if len(counts) < table.num_rows:
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise UserError(
            f"data.join: {join.key} {repeated['values']!r} stands in {repeated['counts']:,} rows of {str(path)!r}; keep one "
            "row for each"
        )
    return table.combine_chunks()


def _key(column: pa.ChunkedArray, name: str, as_text: bool) -> pa.Array:
    """A key in the form in which it is compared: whole numbers as they are, anything else as a category's text."""
    if as_text:
        return as_category(column, name)
    return pc.cast(column, pa.int64(), safe=False).combine_chunks()


def _check_joins(path: AnyPath, schema: Schema, joins: tuple[Join, ...]) -> None:
    """Nulls in every row would pass for missing values: a key that never fits is a mistake."""
    _, lookups = _find_columns(path, schema.columns, schema, joins)
    for join, names in lookups:
        table = next(_read_file(path, [join.key], schema, 0, CHUNK_ROWS), None)
        if table is not None and not pc.any(pc.is_valid(_look_up(table[join.key], join, names, schema)[0])).as_py():
            raise UserError(
                f"data.join: none of the first {table.num_rows:,} rows of {str(path)!r} finds its {join.key} in {join.file!r}; "
                "check the table and its key"
            )


def column_names(path: AnyPath) -> list[str]:
    """The names of a file's columns, in order.

    Raises:
        UserError: it is not there, empty or damaged.
    """
    _check_there(path)
    if not is_csv(path):
        return list(open_parquet(path).schema_arrow.names)
    try:
        with _bytes_of(path) as stream:
            names = next(csv.reader(io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")), [])
        if any("\0" in name for name in names):
            raise csv.Error("its header is not UTF-8 text")
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise not_csv(path, error) from None
    return names


def open_parquet(path: AnyPath) -> pq.ParquetFile:
    """Open a Parquet file; nothing but its footer is read.

    Raises:
        UserError: it is damaged.
    """
    try:
        return pq.ParquetFile(storage.open_file(path), pre_buffer=not isinstance(path, Path))
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def _open_csv(path: AnyPath, schema: Schema, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    numeric = {f.name for f in schema.features if isinstance(f, Numeric)}
    # Categories stay strings whatever they look like.
    types = {n: pa.float64() if n in numeric else pa.string() for n in schema.feature_columns if n in columns}
    try:
        types |= settle_types(path, [name for name in columns if name not in types])
        yield from stream_csv(path, types)
    except (pa.ArrowException, OSError) as error:
        raise not_csv(path, error, types) from None


def stream_csv(path: AnyPath, types: dict[str, pa.DataType], threads: bool = True) -> Iterator[pa.RecordBatch]:
    """The columns of `types` in blocks of about a megabyte; an empty field is null.

    Without `threads`, Arrow's errors have the row.
    """
    read = pyarrow.csv.ReadOptions(use_threads=threads)
    convert = pyarrow.csv.ConvertOptions(
        column_types=types, include_columns=list(types), strings_can_be_null=True, null_values=[""]
    )
    with _bytes_of(path) as stream:
        yield from pyarrow.csv.open_csv(stream, read, convert_options=convert)


def _bytes_of(path: AnyPath) -> pa.NativeFile:
    return storage.open_stream(path, "gzip" if path.suffix.lower() == ".gz" else None)


def is_csv(path: AnyPath) -> bool:
    return path.name.lower().endswith((".csv", ".csv.gz"))


def settle_types(path: AnyPath, columns: list[str]) -> dict[str, pa.DataType]:
    """The narrowest type that every value of each column has, from the whole file: Arrow would guess from its beginning."""
    possible = {name: list(CSV_TYPES) for name in columns}
    if columns:
        for batch in stream_csv(path, dict.fromkeys(columns, pa.string())):
            for name in columns:
                possible[name] = [kind for kind in possible[name] if casts(batch[name], kind)]
    return {name: kinds[0] for name, kinds in possible.items()}


def casts(values: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether every value has a meaning as this type."""
    if pa.types.is_null(kind):
        return bool(values.null_count == len(values))
    try:
        values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _check_there(path: AnyPath) -> None:
    found = storage.info(path)
    if found.type != FileType.File:
        what = "is a folder" if found.type == FileType.Directory else "does not exist"
        raise UserError(f"{str(path)!r} {what}; name a Parquet or CSV file")
    if not found.size:
        raise _empty(path)


def _check_columns(
    path: AnyPath,
    present: Sequence[str],
    wanted: Sequence[str],
    roles: Mapping[str, str] = MappingProxyType({}),
    joins: tuple[Join, ...] = (),
) -> None:
    repeated = {name for name, times in Counter(present).items() if times > 1}
    for column in wanted:
        if column in repeated:
            raise UserError(f"column {column!r} stands in {str(path)!r} more than once; rename or remove the others")
        if column not in present:
            role = roles.get(column, "key")
            beside = "".join(f" nor in {join.file!r}" for join in joins)
            raise UserError(
                f"{role} column {column!r} is not in {str(path)!r}{beside}; {nearest(column, present)} Mend the schema or the "
                "file"
            )


def _empty(path: AnyPath) -> UserError:
    return UserError(f"{str(path)!r} is empty; write at least one row or leave the file out")


def not_csv(path: AnyPath, error: Exception, types: dict[str, pa.DataType] | None = None) -> UserError:
    """What to say of a CSV file that `error` came from; with the `types` that it was read as, which row and column it was."""
    if types and isinstance(error, pa.ArrowInvalid):
        try:
            for _ in stream_csv(path, types, threads=False):
                pass
        except (pa.ArrowException, OSError) as counted:
            error = counted
    if isinstance(path, Remote) and isinstance(error, OSError):
        return storage.trouble(path, error)
    reason = " ".join(str(error).split())[:300].rstrip(".")
    if found := re.match(r"In CSV column #(\d+): ", reason):
        reason = f"column {column_names(path)[int(found[1])]!r}: {reason[found.end() :]}"
    reason = re.sub(r"\bRow #(\d+)", r"row \1, the header being row 1", reason)
    remedy = ", or declare the feature's kind: categorical" if "to double" in reason else ""
    return UserError(f"{str(path)!r} can't be read as CSV ({reason}); mend the file{remedy}")


def damaged(path: AnyPath, error: Exception) -> UserError:
    """What to say of a Parquet file that `error` came from."""
    if isinstance(path, Remote) and isinstance(error, OSError):
        return storage.trouble(path, error)
    reason = str(error).split("\n")[0].rstrip(".")
    return UserError(f"{str(path)!r} is not a whole Parquet file ({reason}); write or fetch it again")
