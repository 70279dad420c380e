"""Features by id, from an Arrow IPC file that is mapped into memory: what a request does not bring.

The file has a key column and feature columns, as log rows have them. In one record batch without compression nothing of it
is read before it is asked for; otherwise it is read into memory. It is replaced, never written over (see
`recsys_moe.serving.watch`); who still reads the old one keeps it.

For each model the columns are transformed once, when model or file are new: a request takes rows of what came out.
"""

import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.columns import as_category
from recsys_moe.errors import UserError
from recsys_moe.hashing import hash_texts
from recsys_moe.transforms import Encoded, Transform


class FeatureTable:
    """Rows by the values of column `key`, compared in a category's text form: 7, 7.0 and "7" are one.

    The index holds each key's 64-bit hash and row, sorted: 12 bytes a row.

    Raises:
        UserError: the file is no Arrow IPC file, or `key` is missing, null somewhere or not unique.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self.key = path, key
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all().combine_chunks()
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"feature file {str(path)!r} can't be read ({reason}); write an Arrow IPC file") from None
        if key not in table.column_names:
            raise UserError(f"feature file {str(path)!r} has no column {key!r}; add it, or set serve.item_key or user_key")
        self._table = table
        texts = as_category(table[key], key)
        if texts.null_count:
            raise UserError(f"feature file {str(path)!r} has a row without {key!r}; leave it out")
        hashes = hash_texts(texts)
        self._rows = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._rows]
        self._encoded = weakref.WeakKeyDictionary[Transform, Mapping[str, Encoded]]()
        again = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(again):
            twice = texts[int(self._rows[again[0]])].as_py()
            raise UserError(f"feature file {str(path)!r} has {key!r} = {twice!r} in two rows; keep one of them")

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._table.column_names) - {self.key}

    def find(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """The row of each key `[N]`, −1 where the file has none; `texts` are in the form of `as_category`."""
        if not len(self):
            return np.full(len(texts), -1, np.int32)
        wanted = hash_texts(texts)
        place = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        rows = np.where(self._hashes[place] == wanted, self._rows[place], -1)
        # Two texts may have one hash: the row's key is compared as well.
        found = as_category(self._table[self.key].take(pa.array(np.maximum(rows, 0))), self.key)
        same = pc.fill_null(pc.equal(found, texts), False).to_numpy(zero_copy_only=False)
        return np.where(same, rows, -1).astype(np.int32)

    def encoded(self, transform: Transform) -> Mapping[str, Encoded]:
        """A model's features among the columns, for all rows and, behind them, for a row without any value: 4 bytes for each
        number that the model reads of a row.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        if transform not in self._encoded:
            wanted = [name for name in self.names if name in transform.schema.feature_columns]
            columns = {name: pa.chunked_array([*(c := self._table[name]).chunks, pa.nulls(1, c.type)]) for name in wanted}
            try:
                self._encoded[transform] = {name: transform.encode(name, column) for name, column in columns.items()}
            except UserError as error:
                raise UserError(f"feature file {str(self._path)!r} does not fit the model: {error}") from None
        return self._encoded[transform]

    def take(self, name: str, rows: npt.NDArray[np.int32]) -> pa.ChunkedArray:
        """A column of these rows, null where the row is −1."""
        return self._table[name].take(pa.array(rows, mask=rows < 0))
