"""A bundle's self-test: a few raw rows with the scores that they got where the bundle was made.

Whoever is about to serve a bundle scores them again: a wrong vocabulary, a wrong table or a library that computes something
else shows here and not at a client. The same rows warm a model up, and their scores are what served ones are compared with.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_moe.bundle import SELFTEST_FILE
from recsys_moe.errors import UserError
from recsys_moe.predictor import Predictor

ROWS = 512
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""How far a score may be off, relative to 1 or to itself, whichever is more: processors may sum in another order."""

_FEATURE, _SCORE = "feature.", "score."


def write_selftest(folder: Path, tables: Iterable[pa.Table]) -> None:
    """Give the bundle in `folder` at most `ROWS` rows of the first of `tables`, evenly spaced, and its scores of them."""
    predictor = Predictor(folder)
    for table in tables:
        rows = table.select(list(predictor.bundle.schema.feature_columns))
        if rows.num_rows > ROWS:
            rows = rows.take(np.linspace(0, rows.num_rows - 1, ROWS).astype(np.int64))
        columns = {_FEATURE + name: rows[name] for name in rows.column_names}
        columns |= {_SCORE + n: pa.array(s) for n, s in zip(predictor.score_names, predictor.score(rows), strict=True)}
        temporary = folder / f"{SELFTEST_FILE}.tmp"
        whole = pa.table(columns).combine_chunks()
        with pa.ipc.new_file(temporary, whole.schema) as file:
            file.write_table(whole)
        os.replace(temporary, folder / SELFTEST_FILE)
        return


def read_selftest(predictor: Predictor) -> tuple[pa.Table, npt.NDArray[np.float32]] | None:
    """The rows and their scores `[S, N]`; None if the bundle has none, as one made before there were self-tests.

    Raises:
        UserError: the file is damaged or of other features or tasks.
    """
    path = predictor.bundle.folder / SELFTEST_FILE
    if not path.is_file():
        return None
    features = list(predictor.bundle.schema.feature_columns)
    try:
        with pa.OSFile(str(path)) as source:  # no map: the file may be replaced
            table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
        rows = table.select([_FEATURE + name for name in features]).rename_columns(features)
        scores = np.stack([table[_SCORE + name].to_numpy() for name in predictor.score_names]).astype(np.float32)
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(path)!r} can't be read ({reason}); fetch the bundle again") from None
    return rows, scores


def check(predictor: Predictor) -> None:
    """Score the self-test's rows again.

    Raises:
        UserError: a score is another one, or not finite; names the task and both.
    """
    found = read_selftest(predictor)
    if found is None:
        return
    rows, expected = found
    failed = f"{str(predictor.bundle.folder)!r} fails its self-test"
    try:
        scores = predictor.score(rows)
    except UserError as error:
        raise UserError(f"{failed}: {error}; fetch or train the bundle again") from error
    limit = TOLERANCE[predictor.bundle.config.precision]
    wrong = ~(np.abs(scores - expected) <= limit * np.maximum(1, np.abs(expected)))  # NaN is wrong, too
    if wrong.any():
        score, row = np.argwhere(wrong)[0]
        raise UserError(
            f"{failed}: row {row} gets {scores[score, row]:.6g} for "
            f"{predictor.score_names[score]!r}, not {expected[score, row]:.6g}; fetch or train the bundle again"
        )
