"""The MMoE paper's synthetic data: two regression tasks whose relatedness is a number (Ma et al., KDD 2018, section 3).

    u1 ⟂ u2 unit vectors of R^d,   w1 = c·u1,   w2 = c·(p·u1 + √(1−p²)·u2),   x ~ N(0, I_d)
    y_j = w_jᵀx + Σ_{i=1..m} sin(α_i·w_jᵀx + β_i) + ε,   ε ~ N(0, noise)

p = cos(w1, w2) is the control; the correlation of the labels is measured on the rows. The sines are the same for both tasks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field

from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.shards import write_json
from recsys_moe.synth import BLOCK_ROWS, FILE_ROWS, new_folder
from recsys_moe.typed import dump, parse, typed

LABELS = ("y1", "y2")

Floats = npt.NDArray[np.float64]


@typed
class CorrelatedConfig:
    """The generator's numbers; `noise` is a variance."""

    version: str
    p: Annotated[float, Field(ge=-1, le=1)]
    c: Annotated[float, Field(gt=0)]
    dim: Annotated[int, Field(ge=2)]
    m: Annotated[int, Field(ge=0)]
    alpha_seed: Annotated[int, Field(ge=0)]
    beta_seed: Annotated[int, Field(ge=0)]
    noise: Annotated[float, Field(ge=0)]


def load_correlated_config(changes: Sequence[str] = ()) -> CorrelatedConfig:
    """The configuration in `conf/synth`, changed by `name=number`.

    >>> load_correlated_config(["p=0.9"]).p
    0.9

    Raises:
        UserError: a change of something else than one of the numbers, or out of its range.
    """
    data = yaml.safe_load((conf_dir() / "synth" / "task_correlation.yaml").read_text())
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator or name == "version":
            raise UserError(f"{change!r} changes nothing; write a generator's number, such as p=0.9")
        data[name] = yaml.safe_load(value)
    config: CorrelatedConfig = parse(CorrelatedConfig, data, "task_correlation")
    return config


class Tasks:
    """The two tasks of a seed: weights `[2, d]` and the sines' `alpha` and `beta` `[m]`."""

    def __init__(self, config: CorrelatedConfig, seed: int) -> None:
        self.config = config
        u1, u2 = np.linalg.qr(np.random.default_rng((seed, 0)).normal(size=(config.dim, 2)))[0].T
        self.weights = config.c * np.stack([u1, config.p * u1 + np.sqrt(1 - config.p**2) * u2])
        self.alpha = np.random.default_rng(config.alpha_seed).normal(size=config.m)
        self.beta = np.random.default_rng(config.beta_seed).normal(size=config.m)

    def expected(self, x_nd: Floats) -> Floats:
        """The labels without their noise, `[2, N]`."""
        z = self.weights @ x_nd.T
        return np.asarray(z + sum(np.sin(a * z + b) for a, b in zip(self.alpha, self.beta, strict=True)))


def draw(tasks: Tasks, seed: int, number: int, rows: int) -> tuple[npt.NDArray[np.float32], Floats, Floats]:
    """Rows number·BLOCK_ROWS …: features `[N, d]`, labels and labels without noise `[2, N]`.

    The same whatever else is drawn, and fewer rows are the beginning of more.
    """
    config = tasks.config
    x = np.random.default_rng((seed, 1, number)).normal(size=(rows, config.dim)).astype(np.float32)
    noise = np.random.default_rng((seed, 2, number)).normal(size=(rows, 2)).T
    expected = tasks.expected(x.astype(np.float64))  # of the features as they are written
    return x, expected + np.sqrt(config.noise) * noise, expected


def synthesise_correlated(
    config: CorrelatedConfig, folder: Path, rows: int, seed: int, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Write `rows` rows to `folder` (logs/ with x000 … and y1, y2; truth/ with the labels before noise; synth.json).

    Returns what synth.json says: the numbers, and the Pearson correlation of the labels as measured. Memory does not grow
    with `rows`. The folder appears whole or not at all.

    Raises:
        UserError: the folder is there already, or can't be written.
    """
    tasks = Tasks(config, seed)
    sums, products = np.zeros(2), np.zeros((2, 2))
    with new_folder(folder) as temporary:
        for file_number, file_start in enumerate(range(0, rows, FILE_ROWS)):
            name = f"part-{file_number:05d}.parquet"
            features = [(f"x{number:03d}", pa.float32()) for number in range(config.dim)]
            labels = [(label, pa.float32()) for label in LABELS]
            with (
                pq.ParquetWriter(temporary / "logs" / name, pa.schema(features + labels)) as logs,
                pq.ParquetWriter(temporary / "truth" / name, pa.schema(labels)) as truth,
            ):
                for start in range(file_start, min(file_start + FILE_ROWS, rows), BLOCK_ROWS):
                    x, y, expected = draw(tasks, seed, start // BLOCK_ROWS, min(BLOCK_ROWS, rows - start))
                    written, before = y.astype(np.float32), expected.astype(np.float32)
                    logs.write_table(pa.table([*x.T, *written], logs.schema))
                    truth.write_table(pa.table(list(before), truth.schema))
                    sums += y.sum(1)
                    products += y @ y.T
                    progress(start + len(x))
        covariance = products / rows - np.outer(sums, sums) / rows**2
        spread = np.sqrt(covariance[0, 0] * covariance[1, 1])
        summary = dump(config) | {
            "seed": seed,
            "rows": rows,
            "correlation": float(covariance[0, 1] / spread) if spread > 0 else None,
            "std": [float(s) for s in np.sqrt(np.diag(covariance))],
        }
        write_json(temporary / "synth.json", summary)
    return summary
