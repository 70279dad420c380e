"""A bundle's self-test tells a bundle that scores as it did from one that does not."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from recsys_moe.bundle import SELFTEST_FILE
from recsys_moe.errors import UserError
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.pipelines import worker
from recsys_moe.predictor import Predictor
from recsys_moe.selftest import ROWS, check, read_selftest, write_selftest
from recsys_moe.shards import PreparedData
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.typed import dump
from tests.test_serving import save

TABLE = pa.table(
    {"colour": ["red", "green", None, "blue"] * 300, "price": [*map(float, range(1199)), None], "label": [1] * 1200}
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = save(tmp_path / "bundle")
    write_selftest(folder, iter([TABLE, TABLE]))
    return folder


def test_it_holds_rows_of_all_the_table_and_their_scores(bundle: Path) -> None:
    predictor = Predictor(bundle)
    found = read_selftest(predictor)
    assert found is not None
    rows, scores = found
    assert rows.column_names == ["colour", "price"]
    assert (rows.num_rows, rows["price"][0].as_py(), rows["price"].null_count) == (ROWS, 0.0, 1)
    np.testing.assert_array_equal(scores, predictor.score(rows))
    check(predictor)


def test_a_bundle_without_one_passes(tmp_path: Path) -> None:
    folder = save(tmp_path / "bundle")
    write_selftest(folder, [])
    assert not (folder / SELFTEST_FILE).exists()
    check(Predictor(folder))


def other_weights(bundle: Path) -> None:
    weights = safetensors.numpy.load_file(bundle / "model.safetensors")
    weights = {name: -value if value.dtype == np.float32 else value for name, value in weights.items()}
    safetensors.numpy.save_file(weights, bundle / "model.safetensors")


def no_numbers(bundle: Path) -> None:
    weights = safetensors.numpy.load_file(bundle / "model.safetensors")
    weights = {name: value * np.float32("nan") if value.dtype == np.float32 else value for name, value in weights.items()}
    safetensors.numpy.save_file(weights, bundle / "model.safetensors")


def other_vocabulary(bundle: Path) -> None:
    statistics = json.loads((bundle / "statistics.json").read_text())
    statistics["numeric"][0]["mean"] += 1000
    (bundle / "statistics.json").write_text(json.dumps(statistics))


@pytest.mark.parametrize("spoil", [other_weights, no_numbers, other_vocabulary])
def test_a_bundle_that_scores_otherwise_fails(bundle: Path, spoil: Any) -> None:
    spoil(bundle)
    told = r"(row \d+ gets \S+ for '(click|buy)', not 0\.\d+|the router's logits of row 0 are not finite .*); fetch"
    with pytest.raises(UserError, match="fails its self-test: " + told):
        check(Predictor(bundle))


def test_a_damaged_one_is_told(bundle: Path, tmp_path: Path) -> None:
    path = bundle / SELFTEST_FILE
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"junk" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"can't be read .*; fetch the bundle again"):
            check(Predictor(bundle))
    shutil.copy(bundle / "model.safetensors", path)
    with pytest.raises(UserError, match="can't be read"):
        check(Predictor(bundle))


def test_training_lets_its_tables_go_before_the_selftest_loads_the_bundles(
    prepared_clicks: PreparedData, clicks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def trainers() -> int:
        return sum(isinstance(thing, Trainer) for thing in gc.get_objects())

    def write(folder: Path, tables: Any) -> None:
        left.append(trainers())
        write_selftest(folder, tables)

    monkeypatch.setattr(worker, "write_selftest", write)
    monkeypatch.setattr(worker, "read_part", lambda *of: [clicks(700, 3)])
    job = {
        "prepared": str(prepared_clicks.folder),
        "model": dump(SharedBottomConfig(embedding_dim=4, bottom_dims=(8,), tower_dims=(4,))),
        "train": dump(TrainConfig(epochs=2)),
        "data": dump(DataConfig(name="clicks", source="nowhere", schema="-")),
        "start": None,
        "bundle": str(tmp_path / "bundle"),
        "state": str(tmp_path / "state"),
    }
    gc.collect()
    before = trainers()
    assert worker.train_ranker(job, lambda event: None)["kind"] == "done"
    assert left == [before]
    found = read_selftest(Predictor(tmp_path / "bundle"))
    assert found is not None
    assert found[0].num_rows == ROWS
