"""Prepared data on disk: memory-mappable columnar shards, the fitted schema and a manifest with counts and checksums.

    manifest.json               what is here, with row counts and a SHA-256 for each shard
    schema.json statistics.json the features and tasks, and what was fitted
    train-00000-000.arrow …     Arrow IPC, uncompressed: one int32 column per embedded feature (two, the halves of a hash,
                                where ids have rows of their own), one list<int32> column per feature of many ids, one
                                float32 column per dense input, `label.<task>` and `weight.<task>` as float32, `group`
                                as int64

A folder is written under a temporary name and renamed when it is whole: a half-written one is never taken for data.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_moe.errors import UserError
from recsys_moe.schema import Schema
from recsys_moe.transforms import Inputs, Jagged, Statistics, Transform
from recsys_moe.typed import parse, typed

FORMAT = 3

T = TypeVar("T", np.int32, np.float32)


@typed
class Shard:
    """One file of the prepared data."""

    file: str
    part: str
    rows: int
    bytes: int
    sha256: str


@typed
class TaskCount:
    """Rows of a part that count for a task, and how many of them are positive (of a binary task)."""

    task: str
    part: str
    observed: int
    positive: int | None


@typed
class Manifest:
    """What a prepared folder holds. `digest` covers source contents, schema, protocol and what `start` digests: the
    statistics that were extended, if any."""

    format: int
    name: str
    digest: str
    source: str
    shards: tuple[Shard, ...]
    counts: tuple[TaskCount, ...]
    start: str | None = None

    def rows(self, part: str) -> int:
        return sum(s.rows for s in self.shards if s.part == part)


@dataclass
class Rows:
    """Transformed rows: model inputs, labels and weights `[T, N]`, and groups `[N]` where the schema has a group."""

    inputs: Inputs
    labels: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    groups: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return self.labels.shape[1]


def write_shard(path: Path, part: str, rows: Rows, transform: Transform) -> Shard:
    """Write one shard and describe it."""
    tasks = transform.schema.task_names
    columns: dict[str, Any] = dict(zip(transform.id_names, rows.inputs.ids, strict=True))
    columns |= {
        f"list.{feature.name}": pa.ListArray.from_arrays(jagged.offsets, jagged.values)
        for feature, jagged in zip(transform.lists, rows.inputs.lists, strict=True)
    }
    columns |= {f"dense.{name}": values for name, values in zip(transform.dense_names, rows.inputs.dense, strict=True)}
    columns |= {f"label.{name}": values for name, values in zip(tasks, rows.labels, strict=True)}
    columns |= {f"weight.{name}": values for name, values in zip(tasks, rows.weights, strict=True)}
    if rows.groups is not None:
        columns["group"] = rows.groups
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(path.name, part, len(rows), path.stat().st_size, _sha256(path))


def write_json(path: Path, data: object) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


class PreparedData:
    """A prepared folder, opened and checked.

    Raises:
        UserError: no such folder, a shard that is missing, cut short or changed, or that holds ids beyond a feature's
            table; names the file and the remedy.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        self.manifest: Manifest = parse(Manifest, _read_json(folder / "manifest.json"), str(folder / "manifest.json"))
        if self.manifest.format != FORMAT:
            raise UserError(f"{str(folder)!r} has data format {self.manifest.format}, not {FORMAT}; prepare it again")
        schema = parse(Schema, _read_json(folder / "schema.json"), str(folder / "schema.json"))
        statistics = parse(Statistics, _read_json(folder / "statistics.json"), str(folder / "statistics.json"))
        self.transform = Transform(schema, statistics)
        if verify:
            for shard in self.manifest.shards:
                self._verify(shard)

    @property
    def schema(self) -> Schema:
        return self.transform.schema

    def _verify(self, shard: Shard) -> None:
        path = self.folder / shard.file
        remedy = f"delete {str(self.folder)!r} and prepare the data again"
        if not path.exists():
            raise UserError(f"shard {str(path)!r} is missing; {remedy}")
        if path.stat().st_size != shard.bytes or _sha256(path) != shard.sha256:
            raise UserError(f"shard {str(path)!r} does not match the checksum in the manifest; {remedy}")
        # The embedding kernel looks up whatever it is told, beyond a table's end too.
        for name, rows, highest in MappedShard(path, self.transform).highest_ids():
            if highest >= rows:
                raise UserError(
                    f"shard {str(path)!r} has id {highest} of {name!r}, whose table ends at {rows - 1}: its statistics were "
                    f"changed; {remedy}"
                )

    def shards(self, part: str) -> list["MappedShard"]:
        """The shards of a part, memory-mapped: nothing is read before it is used."""
        return [MappedShard(self.folder / s.file, self.transform) for s in self.manifest.shards if s.part == part]


class MappedShard:
    """One shard, memory-mapped; `rows(low, high)` copies only what it returns."""

    def __init__(self, path: Path, transform: Transform) -> None:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        tasks = transform.schema.task_names

        def views(names: list[str]) -> list[npt.NDArray[Any]]:
            return [table[name].chunk(0).to_numpy() for name in names]

        self._transform = transform
        self._ids = views(transform.id_names)
        self._lists = [table[f"list.{feature.name}"].chunk(0) for feature in transform.lists]
        self._dense = views([f"dense.{name}" for name in transform.dense_names])
        self._labels = views([f"label.{name}" for name in tasks])
        self._weights = views([f"weight.{name}" for name in tasks])
        self._group = views(["group"])[0] if "group" in table.column_names else None
        self._rows = table.num_rows

    def __len__(self) -> int:
        return self._rows

    def rows(self, low: int, high: int) -> Rows:
        """Rows low … high-1."""

        def stack(columns: list[npt.NDArray[Any]], dtype: type[T]) -> npt.NDArray[T]:
            out = np.empty((len(columns), min(high, self._rows) - low), dtype)
            for row, column in enumerate(columns):
                out[row] = column[low:high]
            return out

        lists = tuple(_slice(array, low, min(high, self._rows)) for array in self._lists)
        return Rows(
            Inputs(stack(self._ids, np.int32), stack(self._dense, np.float32), lists),
            stack(self._labels, np.float32),
            stack(self._weights, np.float32),
            None if self._group is None else self._group[low:high].astype(np.int64),
        )

    def highest_ids(self) -> Iterator[tuple[str, int, int]]:
        """Each embedded feature with its table's rows and its highest id here (−1: it has none)."""
        t = self._transform
        fixed = len(t.sparse_names) - len(t.own_rows)  # what follows are hashes, which the model gives rows
        for name, rows, ids in zip(t.sparse_names[:fixed], t.cardinalities[:fixed], self._ids[:fixed], strict=True):
            yield name, rows, int(ids.max(initial=-1))
        for feature, array in zip(t.lists, self._lists, strict=True):
            yield feature.name, feature.cardinality, int(array.values.to_numpy().max(initial=-1))


def _slice(array: pa.ListArray, low: int, high: int) -> Jagged:
    offsets = array.offsets.to_numpy()[low : high + 1]
    return Jagged(array.values.to_numpy()[offsets[0] : offsets[-1]].copy(), offsets - offsets[0])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{str(path)!r} can't be read ({error.strerror}); prepare the data again") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not whole ({error}); prepare the data again") from None
