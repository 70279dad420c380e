"""Log rows → prepared shards, with Ray Data: statistics from the training part, then the transforms.

Two passes over the same chunks. Each chunk is one Ray Data row, read, worked on and summarised where it is; only
statistics and counts travel. The folder appears whole or not at all, under a name that digests source, schema and protocol:
what has been prepared once is found again.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.labels import group_ids, task_labels
from recsys_moe.schema import BinaryTask, Schema
from recsys_moe.shards import FORMAT, Manifest, PreparedData, Rows, Shard, TaskCount, write_json, write_shard
from recsys_moe.sources import (
    CHUNK_ROWS,
    PARTS,
    Chunk,
    DataConfig,
    digest_files,
    list_files,
    list_joins,
    plan_chunks,
    read_chunk,
)
from recsys_moe.storage import locate
from recsys_moe.transforms import PartialStatistics, Statistics, Transform, extend
from recsys_moe.typed import dump, parse
from recsys_moe.warm_start import StartBundle

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the rows done and the rows in all."""


def prepare(
    config: DataConfig,
    runs_dir: Path,
    progress: Progress = lambda phase, done, total: None,
    force: bool = False,
    start: StartBundle | None = None,
    cluster: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> PreparedData:
    """The prepared data of `config`: found under its digest and verified, or made now.

    Args:
        start: a model that will go on with these rows: its vocabularies are extended, its other statistics used.
        cluster: what Ray runs in, entered once it is needed. Mistakes and data that is there already need none, which
            takes ten seconds to start.

    Raises:
        UserError: whatever is wrong with the source, the schema or the protocol, or does not fit `start`.
    """
    schema = config.load_schema(conf_dir() / "schema")
    if start is not None:
        start.check_schema(schema)
    digest = digest_data(config, schema, start.digest if start else None)
    folder = runs_dir / "prepared" / f"{config.name}-{digest[:12]}"
    if folder.exists() and not force:
        return PreparedData(folder)
    chunks = plan_chunks(config, schema)
    with cluster(), _unfinished(folder) as temporary, _full_disk(folder.parent):
        _write(config, schema, digest, start, chunks, temporary, progress)
        _put(temporary, folder, force)
    return PreparedData(folder, verify=False)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder to write what will be `folder`: nobody's data yet, as its name says, which is never looked up.

    Its lock says that somebody is at work on it. What a killed preparation left has none, and is removed.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent):
                for other in folder.parent.glob(f".{folder.name}.*"):
                    with suppress(OSError), _locked(other, fcntl.LOCK_NB):
                        shutil.rmtree(other, ignore_errors=True)
                temporary.mkdir()
                stack.enter_context(_locked(temporary))
        except OSError as error:
            raise UserError(f"{str(folder.parent)!r} can't be written ({error.strerror}); choose another runs_dir") from None
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Tell of a disk that is full in a sentence; what has been written goes, a rerun starts anew."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full at {str(folder)!r}, where {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free; free some "
            "space, or choose another runs_dir, and run the same command again"
        ) from None


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(handle)  # and with it the lock


def _put(temporary: Path, folder: Path, force: bool) -> None:
    """Give what is whole its name. What another run has put there meanwhile is the same data: only `force` replaces it."""
    while True:
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if not force:
            return
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
        with suppress(FileNotFoundError):  # another forced run was faster
            os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def digest_data(config: DataConfig, schema: Schema, start: str | None = None) -> str:
    """SHA-256 over the source's contents, the schema, the protocol, the format of the shards and the statistics (their digest)
    that were extended."""
    files, held_out = list_files(config)
    protocol = {
        "format": FORMAT,
        "schema": dump(schema),
        "split": {key: value for key, value in asdict(config.split).items() if value is not None},
        "files": [len(files), len(held_out), digest_files([*files, *held_out])],
    }
    if config.join:
        joins = list_joins(config)
        protocol["join"] = [[join.key for join in joins], digest_files([locate(join.file) for join in joins])]
    if start is not None:
        protocol["start"] = start
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def _write(
    config: DataConfig,
    schema: Schema,
    digest: str,
    start: StartBundle | None,
    chunks: list[Chunk],
    folder: Path,
    progress: Progress,
) -> None:
    total = sum(len(c.parts) for c in chunks)
    fit = _Fit(dump(schema))
    partial = PartialStatistics.empty()
    counts = np.zeros((len(PARTS), len(schema.tasks), 2), np.int64)
    for summary in _map_chunks(chunks, fit, lambda done: progress("statistics", done, total)):
        partial.merge(PartialStatistics.from_json(summary["statistics"]))
        counts += np.asarray(summary["counts"])
    statistics = partial.finish(schema)
    _check_targets(schema, statistics, chunks)
    if start is not None:
        statistics = extend(schema, start.statistics, statistics)
    transform = _TransformAndWrite(dump(schema), dump(statistics), str(folder))
    shards: list[Shard] = []
    for summary in _map_chunks(chunks, transform, lambda done: progress("transform", done, total)):
        shards += [parse(Shard, shard, "shard") for shard in summary["shards"]]
    write_json(folder / "schema.json", dump(schema))
    write_json(folder / "statistics.json", dump(statistics))
    task_counts = tuple(
        TaskCount(task.name, part, int(counts[p, t, 0]), int(counts[p, t, 1]) if isinstance(task, BinaryTask) else None)
        for p, part in enumerate(PARTS)
        for t, task in enumerate(schema.tasks)
    )
    source = str(locate(config.source).resolve())
    manifest = Manifest(FORMAT, config.name, digest, source, tuple(shards), task_counts, start.digest if start else None)
    write_json(folder / "manifest.json", dump(manifest))


def _map_chunks(
    chunks: list[Chunk], work: Callable[[Chunk], dict[str, Any]], progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Run `work` on every chunk through Ray Data; yields the summaries in the chunks' order.

    A summary travels as JSON. A user's mistake travels as a value: as an exception it would arrive as a traceback.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [{"index": i} for i in range(len(chunks))]

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"index": row["index"], "json": json.dumps(work(chunks[row["index"]]))}
        except UserError as error:
            return {"index": row["index"], "json": json.dumps({"error": str(error)})}

    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(run)
    found: dict[int, dict[str, Any]] = {}
    done = due = 0
    for row in dataset.iter_rows():
        summary = json.loads(row["json"])
        if "error" in summary:
            raise UserError(summary["error"])
        found[row["index"]] = summary
        done += len(chunks[row["index"]].parts)
        progress(done)
        while due in found:  # handed on as early as can be: all of them together would grow with the rows
            yield found.pop(due)
            due += 1


@contextmanager
def _named(chunk: Chunk) -> Iterator[None]:
    """Say which file a mistake is in."""
    try:
        yield
    except UserError as error:
        path = repr(str(chunk.path))
        raise error if path in str(error) else UserError(f"{path}: {error}") from None


@dataclass
class _Fit:
    """First pass over a chunk: statistics of its training rows, label counts of all its rows."""

    schema: dict[str, Any]

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        schema: Schema = parse(Schema, self.schema, "schema")
        partial = PartialStatistics.empty()
        counts = np.zeros((len(PARTS), len(schema.tasks), 2), np.int64)
        with _named(chunk):
            for table, parts in read_chunk(chunk, schema):
                labels, weights = task_labels(table, schema)
                for part in range(len(PARTS)):
                    seen = (weights > 0) & (parts == part)
                    counts[part, :, 0] += seen.sum(1)
                    counts[part, :, 1] += (seen & (labels > 0)).sum(1)
                train = parts == PARTS.index("train")
                partial.merge(PartialStatistics.of(table.filter(pa.array(train)), schema))
                partial.merge(PartialStatistics.of_labels(labels[:, train], weights[:, train], schema))
        return {"statistics": partial.to_json(), "counts": counts.tolist()}


@dataclass
class _TransformAndWrite:
    """Second pass over a chunk, block by block: a shard for each part that a block has rows of."""

    schema: dict[str, Any]
    statistics: dict[str, Any]
    folder: str

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        schema: Schema = parse(Schema, self.schema, "schema")
        transform = Transform(schema, parse(Statistics, self.statistics, "statistics"))
        shards, folder = [], Path(self.folder)
        with _full_disk(folder.parent), _named(chunk):
            for block, (table, parts) in enumerate(_blocks(chunk, schema)):
                for number, part in enumerate(PARTS):
                    rows = table.filter(pa.array(parts == number))
                    if rows.num_rows:
                        path = folder / f"{part}-{chunk.index:05d}-{block:03d}.arrow"
                        prepared = Rows(transform(rows), *task_labels(rows, schema), group_ids(rows, schema))
                        shards.append(dump(write_shard(path, part, prepared, transform)))
        return {"shards": shards}


def _blocks(chunk: Chunk, schema: Schema) -> Iterator[tuple[pa.Table, npt.NDArray[np.int8]]]:
    """The rows of a chunk in blocks of about CHUNK_ROWS: a chunk of Parquet is one, one of CSV has any number of rows."""
    tables: list[pa.Table] = []
    parts: list[npt.NDArray[np.int8]] = []
    for table, part in read_chunk(chunk, schema):
        tables.append(table)
        parts.append(part)
        if sum(map(len, parts)) >= CHUNK_ROWS:
            yield pa.concat_tables(tables), np.concatenate(parts)
            tables, parts = [], []
    if tables:
        yield pa.concat_tables(tables), np.concatenate(parts)


def _check_targets(schema: Schema, statistics: Statistics, chunks: list[Chunk]) -> None:
    rows = int(sum((c.parts == 0).sum() for c in chunks))
    for task, target in zip(schema.tasks, statistics.targets, strict=True):
        if not target.rows:
            raise UserError(
                f"task {task.name!r} has no row left among the {rows:,} training rows (label {task.label!r}, mask "
                f"{task.mask!r}); mend the mask or the label"
            )
        # float32, which labels are trained in, tells no smaller differences apart.
        if target.std <= 1e-7 * abs(target.mean):
            classes = task.classes_as_text
            only = f"class {classes[round(target.mean)]}" if classes else "one value"
            raise UserError(
                f"task {task.name!r} has only {only} in its {target.rows:,} training rows (label {task.label!r}); nothing can "
                "be learnt from it: mend the label or leave the task out with data.tasks"
            )
