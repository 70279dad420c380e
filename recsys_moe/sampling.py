"""A random sample of somebody's log rows, whatever size the files have, and the types of their columns."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_moe.errors import UserError
from recsys_moe.sources import CSV_TYPES, casts, column_names, damaged, is_csv, not_csv, open_parquet, stream_csv, without_views
from recsys_moe.storage import AnyPath

SAMPLE_ROWS = 200_000
SAMPLE_CELLS = 20_000_000
"""A sample has at most so many rows, and so many values."""
READ_ROWS = 4_000_000
"""Of Parquet files with more rows, row groups spread evenly over all of them are read, of about so many rows together."""


def read_sample(files: list[AnyPath], progress: Callable[[int, int], None]) -> tuple[pa.Table, int, dict[str, str]]:
    """A sample of the rows of all files, how many rows there are in all, and why which columns are no use as they are."""
    headers = [column_names(path) for path in files]
    for path, header in zip(files, headers, strict=True):
        for name, times in Counter(header).items():
            if name and times > 1:
                raise UserError(f"column {name!r} stands in {str(path)!r} more than once; rename or remove the others")
    if len({is_csv(path) for path in files}) > 1:
        raise UserError(f"{str(files[0].parent)!r} holds Parquet and CSV files; describe one of them alone")
    names = list(dict.fromkeys(name for header in headers for name in header))
    everywhere = set.intersection(*map(set, headers))
    left_out = {n: "not in every file" for n in names if n not in everywhere}
    left_out |= {n: "a column without a name" for n in names if not n}
    names = [n for n in names if n not in left_out]
    if is_csv(files[0]):
        sample, rows = _sample_csv(files, names, _limit(len(names)), progress)
    else:
        schemas = [open_parquet(path).schema_arrow for path in files]
        types = {n: {_plain(schema.field(n).type) for schema in schemas} for n in names}
        for n, kinds in types.items():
            if len(kinds) > 1 and not all(map(is_plain_number, kinds)):
                left_out[n] = f"{' and '.join(sorted(map(str, kinds)))} in different files"
        schema = pa.schema([(n, next(iter(k)) if len(k) == 1 else pa.float64()) for n, k in types.items() if n not in left_out])
        sample, rows = _sample_parquet(files, schema, progress)
    return sample, rows, left_out


def _limit(cells: float) -> int:
    """How many rows of so many values each are sampled."""
    return max(1, min(SAMPLE_ROWS, int(SAMPLE_CELLS / max(cells, 1))))


class Thinned:
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
    rows, texts = 0, Thinned(limit)
    for path in files:
        try:
            for batch in stream_csv(path, dict.fromkeys(names, pa.string())):
                for name in names:
                    possible[name] = [kind for kind in possible[name] if kind == pa.string() or casts(batch[name], kind)]
                texts.add(pa.Table.from_batches([batch]))
                rows += batch.num_rows
                progress(rows, rows)
        except (pa.ArrowException, OSError) as error:
            raise not_csv(path, error, dict.fromkeys(names, pa.string())) from None
    if not rows:
        raise _empty(files[0])
    if len(names) == 1 and (found := re.search("[;\t|]", names[0])):
        raise UserError(f"{str(files[0])!r} has one column {names[0]!r}; fields must be split by commas, not by {found[0]!r}")
    table = texts.table()
    return pa.table({name: table[name].cast(possible[name][0]) for name in names}), rows


def _sample_parquet(files: list[AnyPath], schema: pa.Schema, progress: Callable[[int, int], None]) -> tuple[pa.Table, int]:
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
    number, group = max(groups, key=lambda pair: sizes[pair[0]][pair[1]])
    cells = _cells(open_parquet(files[number]).metadata.row_group(group))
    done, total, thinned = 0, sum(sizes[number][group] for number, group in groups), Thinned(_limit(cells))
    batch_rows = max(256, min(65_536, int(10_000_000 / max(cells, 1))))
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


def _cells(group: pq.RowGroupMetaData) -> float:
    """How many values a row of a row group has, those of its lists included."""
    return sum(group.column(n).num_values for n in range(group.num_columns)) / max(group.num_rows, 1)


def _empty(path: AnyPath) -> UserError:
    return UserError(f"{str(path)!r} is empty; name a file with rows")


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return without_views(kind)


def is_plain_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
