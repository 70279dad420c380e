"""The plain predictor: rows in, scores out. Offline scoring, evaluation and serving all go through it."""

import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys_moe.bundle import Bundle
from recsys_moe.embeddings import jagged_tensors
from recsys_moe.errors import UserError
from recsys_moe.experts import freeze
from recsys_moe.labels import group_ids, task_labels
from recsys_moe.metrics import TaskMetrics
from recsys_moe.routing import RoutingPlan, finite_routers
from recsys_moe.sources import count_rows, list_joins, read_rows
from recsys_moe.storage import AnyPath, put
from recsys_moe.transforms import Inputs


class Predictor:
    """Scores raw rows with a bundle's own transforms and model."""

    def __init__(self, folder: Path) -> None:
        self.bundle = Bundle(folder)
        freeze(self.bundle.model)

    @property
    def score_names(self) -> tuple[str, ...]:
        """What is scored: a task by its name, a class of a multiclass task as `task.class`."""
        return self.bundle.heads.score_names

    def score(self, table: pa.Table) -> npt.NDArray[np.float32]:
        """Scores, fp32 `[S, N]`, of the rows of `table`, which has at least the feature columns.

        One of each binary task (its probability), regression (the value) and ordinal task (the expected level), one for each
        class of a multiclass task (its probability): `score_names` has their order.

        Raises:
            UserError: a value of the wrong kind; names the column and the value. Numbers that make a router's logits infinite;
                names the row.
        """
        return self.score_inputs(self.bundle.transform(table))

    def score_inputs(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Scores, fp32 `[S, N]`, of rows that the bundle's transform has been applied to."""
        return self.bundle.heads.scores(self._forward(inputs)[0])

    def gates(self, table: pa.Table) -> dict[str, npt.NDArray[np.float32]]:
        """Gate weights, fp32 `[N, T, E]`, of each of the model's plans; `bundle.model.network.plan_names` says of what."""
        plans = self._forward(self.bundle.transform(table))[1]
        return {name: p.dense_weights.view(table.num_rows, -1, p.num_experts).numpy() for name, p in plans.items()}

    def _forward(self, inputs: Inputs) -> tuple[torch.Tensor, dict[str, RoutingPlan]]:
        with torch.no_grad(), finite_routers():
            ids_bf, dense_bd = torch.from_numpy(inputs.ids).t(), torch.from_numpy(inputs.dense).t().contiguous()
            outputs: tuple[torch.Tensor, dict[str, RoutingPlan]] = self.bundle.model(ids_bf, dense_bd, jagged_tensors(inputs))
            return outputs

    def evaluate(self, tables: Iterable[pa.Table]) -> dict[str, TaskMetrics]:
        """Metrics of each task over raw rows that have the label columns too."""
        schema = self.bundle.schema
        collected = [(self.score(t), *task_labels(t, schema), group_ids(t, schema)) for t in tables]
        return self.bundle.heads.metrics(collected)


def score_file(
    folder: Path, source: AnyPath, target: AnyPath, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Score every row of a Parquet or CSV file into `target`, one fp32 column per score, in order; returns the rows.

    Feature columns that the file lacks are joined as they were for training.

    Raises:
        UserError: a source that can't be read, a target that can't be written or is the source. An older target is then
            still whole.
    """
    if target.is_dir():
        raise UserError(f"OUT {str(target)!r} is a folder; name a Parquet file to write")
    if source.exists() and target.exists() and _same(source, target):
        raise UserError(f"OUT {str(target)!r} is the file that is to be scored; choose another OUT")
    predictor = Predictor(folder)
    schema = pa.schema([(name, pa.float32()) for name in predictor.score_names])
    # An object appears when it is closed, whole or not: it is written here first.
    beside = target.parent if isinstance(target, Path) else Path(tempfile.gettempdir())
    temporary = beside / f".{target.name}.{uuid.uuid4().hex[:8]}"
    joins = list_joins(predictor.bundle.config.data)
    rows, total = 0, count_rows(source, predictor.bundle.schema, joins=joins)
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for table in read_rows(source, predictor.bundle.schema, labels=False, joins=joins):
                writer.write_table(pa.table(dict(zip(predictor.score_names, predictor.score(table), strict=True)), schema))
                rows += table.num_rows
                progress(rows, total)
        put(temporary, target)
    except OSError as error:
        raise UserError(f"{str(target)!r} can't be written ({error.strerror or error}); choose another OUT") from None
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def _same(source: AnyPath, target: AnyPath) -> bool:
    return source.samefile(target) if isinstance(source, Path) and isinstance(target, Path) else source == target
