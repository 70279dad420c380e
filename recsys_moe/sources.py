"""Log files and the protocol that splits their rows: read in chunks, so that size does not matter.

A source is Parquet or CSV (`.csv`, `.csv.gz`; every other name is taken for Parquet). Its rows are numbered through all
files in the order given; the protocol gives each row to `train`, `validation` or `test`; a chunk is a run of rows that one
worker reads, transforms and writes.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import Field

from recsys_moe.errors import UserError, nearest
from recsys_moe.schema import Numeric, Schema, load_schema
from recsys_moe.typed import typed

PARTS = ("train", "validation", "test")
CHUNK_ROWS = 131_072

Size = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]


@typed
class Split:
    """How the rows are shared out: the first `train`, the next `validation`, the last `test` of them, in `order`.

    Sizes are rows (whole numbers) or shares (between 0 and 1). `order`: `given` (the files' own, right for logs in time
    order) or `permuted` by `numpy.random.default_rng(seed).permutation`. With `held_out` files, `files` are the training
    part whole, `train` is not used, and the sizes share out the held-out rows.
    """

    train: Size = 0.8
    validation: Size = 0.1
    test: Size = 0.1
    order: Literal["given", "permuted"] = "permuted"
    seed: int = 0


@typed
class DataConfig:
    """A data set: where its rows are, its schema and its protocol.

    `source` is a folder or a file; `files` and `held_out` are glob patterns below a folder. A file that both match is held
    out. `schema` is a file, or the name of one in `conf/schema`. `tasks` picks some of the schema's tasks; empty means all.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    source: str
    schema: str
    files: tuple[str, ...] = ("*.parquet", "*.csv", "*.csv.gz", "*.CSV")
    held_out: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    split: Split = Split()

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
    """Rows `start` … `start + len(parts)` of all rows; in `path`, from its row `offset` on. `parts` indexes PARTS."""

    index: int
    path: Path
    offset: int
    start: int
    parts: npt.NDArray[np.int8]


def list_files(config: DataConfig) -> tuple[list[Path], list[Path]]:
    """The data files and the held-out files, each file once, in the order of the patterns, then by name.

    Raises:
        UserError: nothing there, nothing that a pattern matches, or a file that is to be trained on and held out.
    """
    source = Path(config.source).absolute()
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
    for path, pattern in files.values():
        # A pattern that spells a file out means just that file; a wildcard means whatever is not spoken for.
        if path.resolve() in held_out and not any(sign in pattern for sign in "*?["):
            raise UserError(f"data.files names {pattern!r}, which data.held_out matches too; take it out of one of them")
    training = [path for path, _ in files.values() if path.resolve() not in held_out]
    if held_out and not training:
        raise UserError("data.held_out matches every file that data.files matches, which leaves none to train on; narrow it")
    return training, [path for path, _ in held_out.values()]


def _matches(source: Path, key: str, patterns: tuple[str, ...], together: bool) -> dict[Path, tuple[Path, str]]:
    """The files that the patterns match, each under its real path so that it counts once, with the pattern that found it."""
    found: dict[Path, tuple[Path, str]] = {}
    for pattern in patterns:
        try:
            paths = sorted(source.glob(pattern))
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


def digest_files(paths: list[Path]) -> str:
    """SHA-256 over the files' names and contents."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def plan_chunks(config: DataConfig, schema: Schema, chunk_rows: int = CHUNK_ROWS) -> list[Chunk]:
    """Number the rows, apply the protocol and cut the files into chunks.

    Raises:
        UserError: an empty or damaged file, or a split that the rows can't fill.
    """
    files, held_out = list_files(config)
    counts = [count_rows(path, schema, labels=True) for path in (*files, *held_out)]
    in_files = sum(counts[: len(files)])
    if held_out:
        parts = np.concatenate([np.zeros(in_files, np.int8), _share_out(config.split, sum(counts[len(files) :]), (1, 2))])
    else:
        parts = _share_out(config.split, in_files, (0, 1, 2))
    chunks: list[Chunk] = []
    start = 0
    for path, rows in zip((*files, *held_out), counts, strict=True):
        # A CSV file can only be read from its beginning: it is one chunk, which its reader takes in blocks.
        step = rows if _is_csv(path) else chunk_rows
        for offset in range(0, rows, step):
            size = min(step, rows - offset)
            chunks.append(Chunk(len(chunks), path, offset, start, parts[start : start + size]))
            start += size
    return chunks


def _share_out(split: Split, rows: int, part_numbers: tuple[int, ...]) -> npt.NDArray[np.int8]:
    wanted = [getattr(split, PARTS[number]) for number in part_numbers]
    sizes = [int(size * rows + 0.5) if isinstance(size, float) else size for size in wanted]
    shares = all(isinstance(size, float) for size in wanted)
    if shares and abs(sum(wanted) - 1) < 1e-9:
        sizes[-1] = rows - sum(sizes[:-1])
    if sum(sizes) > rows or min(sizes) < 1:
        raise UserError(
            f"data.split asks for {' + '.join(map(str, wanted))} of {rows:,} rows, which leaves a part empty or asks for "
            "more than there is; change data.split"
        )
    order = np.random.default_rng(split.seed).permutation(rows) if split.order == "permuted" else np.arange(rows)
    parts = np.full(rows, -1, np.int8)
    edges = np.cumsum([0, *sizes])
    for number, low, high in zip(part_numbers, edges, edges[1:], strict=False):
        parts[order[low:high]] = number
    return parts


def read_rows(path: Path, schema: Schema, labels: bool = True) -> Iterator[pa.Table]:
    """All rows of a file, in order, with the schema's columns only; without `labels`, the feature columns only.

    Raises:
        UserError: it is not there, empty or damaged, or lacks a column.
    """
    rows = 0
    for table in _read(path, schema.columns if labels else schema.feature_columns, schema):
        rows += table.num_rows
        yield table
    if not rows:
        raise _empty(path)


def count_rows(path: Path, schema: Schema, labels: bool = False) -> int:
    """The rows of a file.

    Raises:
        UserError: it is not there, empty or damaged, or lacks a column.
    """
    columns = schema.columns if labels else schema.feature_columns
    _check_there(path)
    if _is_csv(path):
        rows = sum(batch.num_rows for batch in _open_csv(path, schema, columns))
    else:
        file = _open_parquet(path)
        _check_columns(path, file.schema_arrow.names, columns, schema)
        rows = file.metadata.num_rows
    if not rows:
        raise _empty(path)
    return rows


def read_chunk(chunk: Chunk, schema: Schema) -> Iterator[tuple[pa.Table, npt.NDArray[np.int8]]]:
    """The rows of a chunk and the part of each, in pieces of bounded size."""
    rows, position = len(chunk.parts), 0
    for table in _read(chunk.path, schema.columns, schema, chunk.offset, rows):
        yield table, chunk.parts[position : position + table.num_rows]
        position += table.num_rows


def read_part(config: DataConfig, schema: Schema, part: str) -> Iterator[pa.Table]:
    """The raw rows of one part of the protocol, in the order of the files."""
    for chunk in plan_chunks(config, schema):
        for table, parts in read_chunk(chunk, schema):
            chosen = table.filter(pa.array(parts == PARTS.index(part)))
            if chosen.num_rows:
                yield chosen


def _read(path: Path, columns: tuple[str, ...], schema: Schema, offset: int = 0, rows: int | None = None) -> Iterator[pa.Table]:
    _check_there(path)
    if _is_csv(path):
        for batch in _open_csv(path, schema, columns):
            yield pa.Table.from_batches([batch])
        return
    file = _open_parquet(path)
    _check_columns(path, file.schema_arrow.names, columns, schema)
    end = file.metadata.num_rows if rows is None else offset + rows
    first = 0
    try:
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if first < end and last > offset:
                table = file.read_row_group(group, columns=list(columns))
                low, high = max(offset - first, 0), min(end, last) - first
                for piece in range(low, high, CHUNK_ROWS):
                    yield table.slice(piece, min(CHUNK_ROWS, high - piece)).select(list(columns))
            first = last
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _open_csv(path: Path, schema: Schema, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    numeric = {f.name for f in schema.features if isinstance(f, Numeric)}
    # Categories stay strings whatever they look like.
    types = {n: pa.float64() if n in numeric else pa.string() for n in schema.feature_columns if n in columns}
    try:
        with _bytes_of(path) as stream:
            header = next(csv.reader(io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")), [])
        _check_columns(path, header, columns, schema)
        types |= _settle_types(path, [name for name in columns if name not in types])
        yield from _stream_csv(path, types)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{str(path)!r} can't be read as CSV ({reason}); mend the value or its feature's kind") from None


def _stream_csv(path: Path, types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    convert = pyarrow.csv.ConvertOptions(
        column_types=types, include_columns=list(types), strings_can_be_null=True, null_values=[""]
    )
    with _bytes_of(path) as stream:
        yield from pyarrow.csv.open_csv(stream, convert_options=convert)


def _bytes_of(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="gzip" if path.suffix.lower() == ".gz" else None)


def _is_csv(path: Path) -> bool:
    return path.name.lower().endswith((".csv", ".csv.gz"))


def _settle_types(path: Path, columns: list[str]) -> dict[str, pa.DataType]:
    """The narrowest type that every value of each column has, from the whole file: Arrow would guess from its beginning."""
    possible = {name: [pa.int64(), pa.float64(), pa.bool_(), pa.string()] for name in columns}
    if columns:
        for batch in _stream_csv(path, dict.fromkeys(columns, pa.string())):
            for name in columns:
                possible[name] = [kind for kind in possible[name] if _casts(batch[name], kind)]
    return {name: kinds[0] for name, kinds in possible.items()}


def _casts(values: pa.Array, kind: pa.DataType) -> bool:
    try:
        values.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _check_there(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{str(path)!r} {what}; name a Parquet or CSV file")
    if not path.stat().st_size:
        raise _empty(path)


def _check_columns(path: Path, present: list[str], wanted: tuple[str, ...], schema: Schema) -> None:
    times = Counter(present)
    for column in wanted:
        if times[column] != 1:
            role = "feature" if column in schema.feature_columns else "label" if column in schema.label_columns else "group"
            if times[column]:
                raise UserError(
                    f"{role} column {column!r} is {times[column]} times in {str(path)!r}; give each column a name of its own"
                )
            raise UserError(
                f"{role} column {column!r} is not in {str(path)!r}; {nearest(column, present)} Mend the schema or the file"
            )


def _empty(path: Path) -> UserError:
    return UserError(f"{str(path)!r} is empty; write at least one row or leave the file out")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n")[0].rstrip(".")
    return UserError(f"{str(path)!r} is not a whole Parquet file ({reason}); write or fetch it again")
