"""Fixtures that several test files share."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings

# The same examples everywhere, and no clock: a busy machine must not fail a test.
settings.register_profile(
    "recsys_moe", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("recsys_moe")

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes cores of its own: what each of them starts then stays out of the others' way."""
    name, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = sorted(os.sched_getaffinity(0))
    if name is not None and len(cores) >= count:
        os.sched_setaffinity(0, cores[int(name.removeprefix("gw")) :: count])


def _real_data(name: str) -> Path:
    folder = Path(os.environ.get("RECSYS_MOE_DATA", ROOT / "../shared/data")) / name
    if not folder.is_dir():
        pytest.skip(f"no {name} data at {folder} (RECSYS_MOE_DATA names the data folder)")
    return folder


@pytest.fixture
def census() -> Path:
    """The folder of the real census files; the test is skipped where they are absent."""
    return _real_data("census_income")


@pytest.fixture
def kuairand() -> Path:
    """The folder of the real KuaiRand files; the test is skipped where they are absent."""
    return _real_data("kuairand")


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """`real_data(name)`: a folder of real data; the test is skipped where it is absent."""
    return _real_data


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cli("evaluate", …, cwd=…)`: a command in this process, which has imported already what takes a new one seconds."""
    from recsys_moe.cli import main

    def command(*arguments: str, cwd: Path = Path()) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["recsys-moe", *arguments])
            patch.setattr("recsys_moe.cli.interrupt_once", lambda: None)
            with pytest.raises(SystemExit) as ended:
                main()
        return subprocess.CompletedProcess(arguments, int(str(ended.value.code)), out.getvalue(), err.getvalue())

    return command


CLICKS_SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "colour", "kind": "categorical"},
        {"name": "price", "kind": "numeric", "buckets": 4, "missing_indicator": True},
    ],
    "tasks": [
        {"name": "click", "label": "click == 1"},
        {"name": "buy", "label": "buy == 1", "mask": "click == 1"},
    ],
    "group": "user",
}


@pytest.fixture(scope="session")
def clicks_schema() -> Any:
    """Two features, two tasks (`buy` is observed where a click happened) and a group."""
    from recsys_moe.schema import Schema
    from recsys_moe.typed import parse

    return parse(Schema, CLICKS_SCHEMA, "schema")


@pytest.fixture(scope="session")
def clicks() -> Callable[..., pa.Table]:
    """`clicks(rows, seed)` draws raw rows for `clicks_schema`; red things are clicked, cheap ones bought."""

    def draw(rows: int, seed: int = 0) -> pa.Table:
        random = np.random.default_rng(seed)
        colour = random.choice(["red", "green", "blue"], rows)
        price = random.normal(size=rows)
        click = random.random(rows) < np.where(colour == "red", 0.9, 0.2)
        buy = click & (random.random(rows) < np.where(price < 0, 0.9, 0.2))
        return pa.table(
            {
                "colour": pa.array(colour, mask=random.random(rows) < 0.05),
                "price": pa.array(price, mask=random.random(rows) < 0.05),
                "user": random.integers(0, 20, rows),
                "click": click.astype(int),
                "buy": buy.astype(int),
            }
        )

    return draw


@pytest.fixture(scope="session")
def write_prepared() -> Callable[..., Any]:
    """`write_prepared(folder, schema, {part: [table, …]})`: a prepared folder by hand, one shard for each table.

    The statistics are those of the training tables, or `start` extended by them.
    """
    from recsys_moe.labels import group_ids, task_labels
    from recsys_moe.shards import FORMAT, Manifest, PreparedData, Rows, write_json, write_shard
    from recsys_moe.transforms import PartialStatistics, Transform, extend
    from recsys_moe.typed import dump

    def write(folder: Path, schema: Any, parts: dict[str, list[pa.Table]], start: Any = None) -> PreparedData:
        folder.mkdir()
        train = pa.concat_tables(parts["train"])
        fitted = PartialStatistics.of(train, schema)
        fitted.merge(PartialStatistics.of_labels(*task_labels(train, schema), schema))
        statistics = fitted.finish(schema)
        if start is not None:
            statistics = extend(schema, start, statistics)
        transform = Transform(schema, statistics)
        shards = []
        for part, tables in parts.items():
            for number, table in enumerate(tables):
                rows = Rows(transform(table), *task_labels(table, schema), group_ids(table, schema))
                shards.append(write_shard(folder / f"{part}-{number:05d}.arrow", part, rows, transform))
        write_json(folder / "schema.json", dump(schema))
        write_json(folder / "statistics.json", dump(statistics))
        manifest = Manifest(FORMAT, "by_hand", "0" * 64, "nowhere", tuple(shards), ())
        write_json(folder / "manifest.json", dump(manifest))
        return PreparedData(folder)

    return write


@pytest.fixture
def prepared_clicks(tmp_path: Path, write_prepared: Any, clicks_schema: Any, clicks: Any) -> Any:
    """Two training shards of 700 and 333 rows, 400 validation rows and 300 test rows."""
    return write_prepared(
        tmp_path / "prepared",
        clicks_schema,
        {"train": [clicks(700, 1), clicks(333, 2)], "validation": [clicks(400, 3)], "test": [clicks(300, 4)]},
    )
