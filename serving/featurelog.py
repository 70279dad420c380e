"""Some requests, with the very features and scores, as Parquet (see `recsys_moe.replay`)."""

import json
import logging
import os
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_moe.replay import DESCRIBED, FEATURE, SCORE
from recsys_moe.serving.models import Model

log = logging.getLogger(__name__)

ROWS, SECONDS = 10_000, 30.0
"""A file is written at so many rows, or when its first are so old."""


class FeatureLog:
    """Files in a folder; each appears when it is whole. A disk that is full costs rows, and a line in the log."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lock = folder, threading.Lock()
        self._tables: dict[tuple[str, bytes], list[pa.Table]] = {}
        self._rows, self._since = 0, time.monotonic()

    def add(self, request_id: str, model: Model, rows: pa.Table, scores_sn: npt.NDArray[np.float32]) -> None:
        """Keep a request's feature columns and scores, in its order."""
        columns = {"request_id": pa.array([request_id] * rows.num_rows), "position": np.arange(rows.num_rows, dtype=np.int32)}
        columns |= {FEATURE + name: _readable(rows[name]) for name in rows.column_names}
        columns |= {SCORE + name: scores for name, scores in zip(model.predictor.score_names, scores_sn, strict=True)}
        described = model.described | {"folder": str(model.predictor.bundle.folder)}
        table = pa.table(columns).replace_schema_metadata({DESCRIBED: json.dumps(described)})
        with self._lock:
            # A feature may come as text in one request and as a number in the next: columns of one file are of one type.
            self._tables.setdefault(_kind(table.schema), []).append(table)
            self._rows += table.num_rows
            full = self._rows >= ROWS
        if full:
            self.flush()

    def refresh(self) -> None:
        """Write what has waited long enough."""
        if self._rows and time.monotonic() - self._since > SECONDS:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            waiting, self._tables = self._tables, {}
            self._rows, self._since = 0, time.monotonic()
        for tables in waiting.values():
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.parquet"
            temporary = self._folder / f".{name}"
            try:
                pq.write_table(pa.concat_tables(tables), temporary, compression="zstd")
                os.replace(temporary, self._folder / name)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                log.error("%d requests are not in the feature log: %s", len(tables), error)


def _readable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of one size as lists of any: with a null among them, Parquet's reader refuses its writer's file."""
    kind = column.type
    return column.cast(pa.list_(kind.value_type)) if pa.types.is_fixed_size_list(kind) else column


def _kind(schema: pa.Schema) -> tuple[str, bytes]:
    return str(schema.remove_metadata()), schema.metadata[DESCRIBED]
