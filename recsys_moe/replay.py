"""Served requests scored again from their logged features: the scores must have the very bits that the client got.

A feature log is a folder of Parquet files, each of one model: `feature.NAME` as served, `score.NAME` as answered, and with them
`request_id` and `position`. The file's metadata say which model (`DESCRIBED`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_moe.bundle import weights_digest
from recsys_moe.errors import UserError
from recsys_moe.predictor import Predictor

FEATURE, SCORE = "feature.", "score."
DESCRIBED = b"recsys_moe"
"""The metadata's key: JSON of the model's `name`, `version`, `digest` and bundle `folder`."""


@dataclass
class Replay:
    """What came out: `rows` scored again, how many of them `differ` in any bit, and the largest `difference` of a score."""

    files: int = 0
    rows: int = 0
    differ: int = 0
    difference: float = 0.0


def replay(log: Path, bundle: Path | None = None) -> Replay:
    """Score a feature log's rows again, by the bundles that they were served with or by `bundle`.

    Raises:
        UserError: no log, a file that is none, or a bundle that is gone or another one.
    """
    found, predictors = Replay(), dict[str, Predictor]()
    for path in _files(log):
        table, described = _read(path)
        folder = bundle or Path(described["folder"])
        if str(folder) not in predictors:
            predictors[str(folder)] = _predictor(folder)
        predictor = predictors[str(folder)]
        digest = weights_digest(folder)
        if digest != described["digest"]:
            raise UserError(
                f"{str(path)!r} was scored with {described['digest']} ({described['name']}, version {described['version']}), "
                f"but {str(folder)!r} is {digest}; name the bundle of that version"
            )
        names = list(predictor.bundle.schema.feature_columns)
        rows = table.select([FEATURE + name for name in names]).rename_columns(names)
        again = predictor.score(rows)
        served = np.stack([table[SCORE + name].to_numpy() for name in predictor.score_names]).astype(np.float32)
        differ = (again.view(np.uint32) != served.view(np.uint32)).any(0)
        found.files += 1
        found.rows += table.num_rows
        found.differ += int(differ.sum())
        found.difference = max(found.difference, float(np.abs(again - served).max(initial=0)))
    return found


def _files(log: Path) -> Iterator[Path]:
    files = sorted(log.glob("*.parquet")) if log.is_dir() else [log]
    if not files or not files[0].is_file():
        raise UserError(f"{str(log)!r} holds no feature log; name the folder that serve.feature_log names")
    yield from files


def _read(path: Path) -> tuple[pa.Table, dict[str, str]]:
    try:
        table = pq.read_table(path)
        described: dict[str, str] = json.loads((table.schema.metadata or {})[DESCRIBED])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(path)!r} is no feature log ({reason}); leave it out") from None
    return table, described


def _predictor(folder: Path) -> Predictor:
    if not folder.is_dir():
        raise UserError(f"the bundle {str(folder)!r} is gone from this disk; name one with --model")
    return Predictor(folder)
