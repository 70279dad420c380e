"""Every kind of feature and task on the whole road without its Ray, MLflow and HTTP parts: rows → shards → a trained model →
a bundle → scores, the same from a file, a table and a request."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient

from recsys_moe import batches
from recsys_moe.batches import Batch, ShuffledBatches, ordered_rows
from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.embeddings import padded
from recsys_moe.front import FrontConfig
from recsys_moe.metrics import quality
from recsys_moe.models import settle
from recsys_moe.models.adatt import AdaTTConfig
from recsys_moe.models.aitm import AITMConfig
from recsys_moe.models.esmm import ESMMConfig
from recsys_moe.models.home import HoMEConfig
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.ple import PLEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.models.single_task import SingleTaskConfig
from recsys_moe.models.stem import STEMConfig
from recsys_moe.predictor import Predictor, score_file
from recsys_moe.schema import Schema
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.requests import rows_to_table
from recsys_moe.shards import PreparedData
from recsys_moe.sources import DataConfig, read_rows
from recsys_moe.trainer import TrainConfig, Trainer, evaluate
from recsys_moe.typed import parse
from recsys_moe.warm_start import StartBundle

SCHEMA: Schema = parse(
    Schema,
    {
        "features": [
            {"name": "shape", "kind": "categorical"},
            {"name": "user", "kind": "hashed", "buckets": 500},
            {"name": "shape_user", "kind": "cross", "of": ["shape", "user"], "buckets": 2000},
            {"name": "tags", "kind": "multi"},
            {"name": "genres", "kind": "multi", "separator": "|", "pooling": "sum", "buckets": 50, "max_length": 3},
            {"name": "watched", "kind": "sequence", "max_length": 4, "pooling": "last"},
            {"name": "seen", "kind": "sequence", "max_length": 3, "separator": " "},
            {"name": "picture", "kind": "embedding", "dim": 3},
            {"name": "price", "kind": "numeric", "buckets": 4},
        ],
        "tasks": [
            {"name": "click", "label": "click"},
            {"name": "minutes", "kind": "regression", "label": "seconds / 60", "log1p": True, "loss": "huber"},
            {"name": "ending", "kind": "multiclass", "label": "ending", "classes": ["done", "left", "skipped"]},
            {"name": "stars", "kind": "ordinal", "label": "stars", "levels": [1, 2, 3, 5], "mask": "stars != 4"},
            {"name": "share", "label": "share == 1", "weight": "w"},
        ],
    },
    "schema",
)
COLUMNS = list(SCHEMA.feature_columns)


def draw(rows: int, seed: int) -> pa.Table:
    """Each task's label depends on features that no other kind of input could stand in for."""
    r = np.random.default_rng(seed)
    shape, user = r.choice(["round", "square"], rows), r.integers(0, 8, rows)
    tags = [r.choice(["a", "b", "c", "d"], r.integers(0, 4), replace=False).tolist() for _ in range(rows)]
    genres = [r.choice(["x", "y", "z"], r.integers(0, 4)).tolist() for _ in range(rows)]
    watched = [r.integers(0, 6, r.integers(0, 7)).tolist() for _ in range(rows)]
    picture = r.normal(size=(rows, 3)).astype(np.float32)
    taste = (user % 2 == 1) ^ (shape == "round")  # neither alone says anything
    last = np.array([row[-1] if row else 3 for row in watched])
    ys = np.array([row[:3].count("y") for row in genres])
    return pa.table(
        {
            "shape": shape,
            "user": user,
            "tags": pa.array(tags, mask=np.array([not t for t in tags]) & (r.random(rows) < 0.5)),
            "genres": ["|".join(g) for g in genres],
            "watched": watched,
            "seen": [" ".join(map(str, row)) for row in watched],
            "picture": pa.array(list(picture), pa.list_(pa.float32()), mask=r.random(rows) < 0.02),
            "price": pa.array(r.normal(size=rows), mask=r.random(rows) < 0.05),
            "click": np.array(["a" in t for t in tags]).astype(int),
            "seconds": 60 * np.expm1(1 + picture[:, 0] + 0.3 * r.normal(size=rows)),
            "ending": np.array(["done", "left", "skipped"])[last % 3],
            "stars": np.array([1, 2, 3, 5])[ys] + 0,
            "share": taste.astype(int),
            "w": r.choice([0.0, 1.0, 2.0], rows),
        }
    )


MODEL = MMoEConfig(embedding_dim=8, num_experts=3, expert_dims=(32, 16), tower_dims=(8,), dropout=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_prepared: Any) -> PreparedData:
    parts = {"train": [draw(3000, 0), draw(1500, 1)], "validation": [draw(500, 2)], "test": [draw(700, 3)]}
    prepared: PreparedData = write_prepared(tmp_path_factory.mktemp("kinds") / "prepared", SCHEMA, parts)
    return prepared


@pytest.fixture(scope="module")
def trainer(data: PreparedData) -> Trainer:
    trainer = Trainer(data, MODEL, TrainConfig(epochs=5, batch_size=128, lr=5e-3))
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def bundle(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds") / "bundle"
    source = DataConfig(name="kinds", source="nowhere", schema="-")
    save_bundle(
        folder,
        trainer.model.state_dict(),
        BundleConfig(FORMAT, MODEL, "fp32", source, "0" * 64),
        trainer.data.transform,
        {},
        trainer.whole_adagrad(),
    )
    return folder


def test_every_kind_of_task_learns_from_its_kind_of_feature(trainer: Trainer, data: PreparedData) -> None:
    metrics: Any = evaluate(trainer.model, data, "test")
    assert metrics["click"].auc > 0.98  # the tags
    assert metrics["ending"].accuracy > 0.95  # the last one watched
    assert metrics["stars"].auc > 0.97  # how many genres are y
    assert metrics["stars"].qwk > 0.9
    assert metrics["share"].auc > 0.97  # the cross
    # The picture's first number, seen through noise of 0.3 at a spread of √1.09.
    assert metrics["minutes"].r2 > 0.85 * (1 - 0.09 / 1.09)
    raw = draw(700, 3).to_pandas()
    typical = np.abs(raw["seconds"] / 60 - (raw["seconds"] / 60).median()).mean()
    assert metrics["minutes"].mae < 0.6 * typical  # in the label's own units
    assert metrics["share"].rows == (raw["w"] > 0).sum()


def test_lists_grow_and_old_ids_score_as_before(
    trainer: Trainer, data: PreparedData, bundle: Path, tmp_path: Path, write_prepared: Any
) -> None:
    start = StartBundle(bundle)
    day = draw(600, 5)
    tags = pa.array([tags and [*tags, "new"] for tags in day["tags"].to_pylist()])
    watched = pa.array([[77 if item == 5 else item for item in row] for row in day["watched"].to_pylist()])
    for name, column in (("tags", tags), ("watched", watched)):
        day = day.set_column(day.column_names.index(name), name, column)
    grown = write_prepared(tmp_path / "day", SCHEMA, {"train": [day], "validation": [day]}, start.statistics)
    found = {s.name: s.vocabulary for s in grown.transform.statistics.categorical}
    for old in start.statistics.categorical:
        added = {"tags": ("new",), "watched": ("77",)}.get(old.name, ())
        assert found[old.name] == old.vocabulary + added
    told: list[dict[str, Any]] = []
    more = Trainer(grown, MODEL, TrainConfig(epochs=1), told.append, start=start)
    before, now = trainer.model.state_dict(), more.model.state_dict()
    for name, table in before.items():
        assert torch.equal(now[name][: len(table)] if table.dim() else now[name], table), name
    new = [name for name, table in before.items() if now[name].shape != table.shape]
    assert sorted(name.split(".")[-2] for name in new) == ["tags", "watched"]
    assert all(now[name][len(before[name]) :].any(1).all() for name in new)
    # Old ids to the bit, and new ones as the champion scores them: unknown.
    save_bundle(tmp_path / "grown", now, start.config, grown.transform, {})
    old_rows = draw(300, 6)
    np.testing.assert_array_equal(Predictor(tmp_path / "grown").score(old_rows), Predictor(bundle).score(old_rows))
    more._measure(start)
    measured = {task: asdict(m) for task, m in Predictor(bundle).evaluate([day]).items()}
    assert told[0]["before"] == measured


FAMILIES: dict[str, tuple[Any, Any]] = {
    "shared_bottom bf16": (SharedBottomConfig(bottom_dims=(32, 16), tower_dims=(8,), dropout=0.0), "bf16"),
    "omoe and first order": (replace(MODEL, name="omoe", front=FrontConfig(first_order=True)), "fp32"),
    "mmoe top-k bf16": (replace(MODEL, gate="topk"), "bf16"),
    "ple": (PLEConfig(expert_dims=(16,), tower_dims=(8,), dropout=0.1), "fp32"),
    "adatt bf16": (AdaTTConfig(expert_dims=(16,), tower_dims=(8,), dropout=0.1), "bf16"),
    "home": (HoMEConfig(expert_dims=(16,), tower_dims=(8,), dropout=0.1), "fp32"),
    "home bf16": (
        HoMEConfig(
            categories={"click": "a", "minutes": "time", "ending": "time", "stars": "b", "share": "a"},
            expert_dims=(16,),
            tower_dims=(8,),
            dropout=0.0,
        ),
        "bf16",
    ),
    "single_task bf16": (SingleTaskConfig(bottom_dims=(32, 16), tower_dims=(8,), dropout=0.0), "bf16"),
    "cgc bf16": (PLEConfig(name="cgc", levels=1, expert_dims=(16,), tower_dims=(8,), dropout=0.1), "bf16"),
    "stem": (STEMConfig(expert_dims=(16,), tower_dims=(8,), dropout=0.1), "fp32"),
    "aitm bf16": (AITMConfig(chain=("click", "share"), bottom_dims=(32, 16), tower_dims=(8,), dropout=0.0), "bf16"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_every_kind_of_task(name: str, data: PreparedData, tmp_path: Path) -> None:
    model, precision = FAMILIES[name]
    trainer = Trainer(data, model, TrainConfig(epochs=2, batch_size=128, lr=5e-3, precision=precision))
    validation: Any = trainer.fit().validation
    assert validation["click"].auc > 0.9
    assert validation["ending"].accuracy > 0.6
    assert validation["minutes"].r2 > 0.5
    assert validation["stars"].auc > 0.8
    source = DataConfig(name="kinds", source="nowhere", schema="-")
    described = BundleConfig(FORMAT, model, precision, source, "0" * 64)
    save_bundle(tmp_path / "bundle", trainer.model.state_dict(), described, data.transform, {})
    predictor, table = Predictor(tmp_path / "bundle"), draw(700, 3)
    online, offline = evaluate(trainer.model, data, "test"), predictor.evaluate([table])
    for task, metrics in online.items():
        assert quality(offline[task]) == pytest.approx(quality(metrics), abs=1e-6)
    names: Any = predictor.bundle.model.network.plan_names
    for key, weights in predictor.gates(table).items():
        assert weights.shape == (700, len(names[key].gates), len(names[key].experts))


def test_esmm_learns_a_conversion_beside_every_kind_of_task(tmp_path: Path, write_prepared: Any) -> None:
    click, *others, share = SCHEMA.tasks
    tasks = (replace(click, label="click == 1"), *others, replace(share, mask="click == 1"))
    parts = {"train": [draw(3000, 0), draw(1500, 1)], "validation": [draw(500, 2)]}
    data = write_prepared(tmp_path / "prepared", replace(SCHEMA, tasks=tasks), parts)
    model = settle(ESMMConfig(bottom_dims=(32, 16), tower_dims=(8,), dropout=0.0), data.schema)
    assert model.conversions == {"share": "click"}
    validation: Any = Trainer(data, model, TrainConfig(epochs=4, batch_size=128, lr=5e-3, precision="bf16")).fit().validation
    assert validation["click"].auc > 0.9
    assert validation["ending"].accuracy > 0.6
    assert validation["minutes"].r2 > 0.5
    assert validation["stars"].auc > 0.8
    assert validation["share"].auc > 0.8  # of the rows with a click alone, on which its own loss never was
    raw = draw(500, 2).to_pandas()
    assert validation["share"].rows == ((raw["click"] == 1) & (raw["w"] > 0)).sum()


def test_without_its_feature_a_task_learns_nothing(trainer: Trainer, data: PreparedData, bundle: Path) -> None:
    # The control: the same scores with one column emptied.
    predictor, table = Predictor(bundle), draw(700, 3)
    for column, task in {
        "tags": "click",
        "picture": "minutes",
        "watched": "ending",
        "genres": "stars",
        "user": "share",
    }.items():
        gone = table.set_column(table.column_names.index(column), column, pa.nulls(700, table[column].type))
        assert quality(predictor.evaluate([gone])[task]) < 0.65, column


def test_raw_rows_are_measured_as_training_measures_prepared_ones(trainer: Trainer, data: PreparedData, bundle: Path) -> None:
    online, table = evaluate(trainer.model, data, "test"), draw(700, 3)
    offline = Predictor(bundle).evaluate([table.slice(0, 13), table.slice(13)])
    for task, metrics in online.items():
        for name, value in vars(metrics).items():
            assert getattr(offline[task], name) == pytest.approx(value, abs=1e-6, nan_ok=True), (task, name)


def test_a_row_has_the_same_bits_alone_and_among_others(bundle: Path) -> None:
    predictor, table = Predictor(bundle), draw(60, 4)
    alone = np.concatenate([predictor.score(table.slice(n, 1)) for n in range(60)], 1)
    assert np.array_equal(predictor.score(table), alone)


def test_one_score_for_each_task_and_class(bundle: Path, tmp_path: Path) -> None:
    predictor, table = Predictor(bundle), draw(90, 5)
    scores = dict(zip(predictor.score_names, predictor.score(table), strict=True))
    classes = ["ending.done", "ending.left", "ending.skipped"]
    assert list(scores) == ["click", "minutes", *classes, "stars", "share"]
    assert sum(scores[name] for name in classes) == pytest.approx(np.ones(90), abs=1e-6)
    assert scores["stars"].min() >= 1
    assert scores["stars"].max() <= 5
    pq.write_table(table.select(COLUMNS), tmp_path / "in.parquet")
    assert score_file(bundle, tmp_path / "in.parquet", tmp_path / "out.parquet") == 90
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.column_names == list(scores)
    for name, values in scores.items():
        assert written[name].to_numpy() == pytest.approx(values, abs=1e-6)


def test_a_request_gets_the_scores_of_the_table(bundle: Path) -> None:
    table = draw(50, 6).select(COLUMNS)
    with TestClient(build_api(bundle, ServeConfig())) as client:
        rows = json.loads(json.dumps(table.to_pylist()))
        rows[0] |= {"tags": None, "genres": ["x", "y"], "seen": ["1", 2, 3.0], "picture": None}
        answer = client.post("/v1/score", json={"rows": rows})
        described = client.get("/v1/model").json()
    assert answer.status_code == 200, answer.json()
    first = table.slice(0, 1).to_pylist()[0] | {"tags": None, "genres": "x|y", "seen": "1 2 3", "picture": None}
    expected = Predictor(bundle).score(pa.concat_tables([pa.Table.from_pylist([first], table.schema), table.slice(1)]))
    assert list(answer.json()["scores"]) == described["scores"]
    np.testing.assert_allclose(list(answer.json()["scores"].values()), expected, atol=1e-6)


def test_parquet_csv_and_json_have_the_same_inputs(data: PreparedData, tmp_path: Path) -> None:
    columns = ["shape", "user", "genres", "seen", "price"]  # what a CSV file can hold
    kept = [f for f in SCHEMA.features if f.name in (*columns, "shape_user")]
    schema = Schema(tuple(kept), SCHEMA.tasks)
    frame = draw(200, 7).select(columns).to_pandas()
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    forms = [pa.concat_tables(read_rows(tmp_path / f"rows.{kind}", schema, labels=False)) for kind in ("parquet", "csv")]
    forms.append(rows_to_table(json.loads(frame.to_json(orient="records")), schema))
    transform = type(data.transform)(schema, data.transform.statistics)
    first, *others = map(transform, forms)
    assert len(first.ids) == 4
    for other in others:
        assert np.array_equal(other.ids, first.ids)
        np.testing.assert_allclose(other.dense, first.dense, rtol=1e-6)
        for mine, theirs in zip(other.lists, first.lists, strict=True):
            assert np.array_equal(mine.values, theirs.values)
            assert np.array_equal(mine.offsets, theirs.offsets)


# -- requests that can't be


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tags": "a"}, "row 0 has 'tags' = 'a', which is not a list; send a list of values or null"),
        ({"tags": 7}, "row 0 has 'tags' = 7, which is not a list"),
        ({"tags": [["a"]]}, "row 0 has 'tags' = [['a']], which is not one value or a list of values"),
        ({"tags": [{"a": 1}]}, "row 0 has 'tags' = [{'a': 1}], which is not one value or a list of values"),
        ({"watched": [float("inf")]}, "row 0 has 'watched' = [inf], which is no category"),
        ({"picture": [1.0, 2.0]}, "row 0 has 'picture' = [1.0, 2.0], which is not a list of 3 numbers; send all of them"),
        ({"picture": [1.0, 2.0, "x"]}, "row 0 has 'picture' = [1.0, 2.0, 'x'], which is not a number"),
        ({"picture": [1.0, 2.0, None]}, "column 'picture' holds a list with a null in it"),
        ({"picture": 1.0}, "row 0 has 'picture' = 1.0, which is not a list of 3 numbers"),
        ({"shape": ["round"]}, "row 0 has 'shape' = ['round'], which is not one value"),
        ({"price": [1.0]}, "row 0 has 'price' = [1.0], which is not one value; send a number or null"),
    ],
    ids=str,
)
def test_a_bad_row_is_told_in_one_sentence(bundle: Path, change: dict[str, Any], expected: str) -> None:
    row = draw(1, 0).select(COLUMNS).to_pylist()[0] | change
    with TestClient(build_api(bundle, ServeConfig()), raise_server_exceptions=False) as client:
        answer = client.post("/v1/score", content=json.dumps({"rows": [row]}), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.json()
    assert expected in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


# -- prepared rows


@pytest.mark.parametrize(("block", "pool"), [(32_768, 262_144), (100, 700), (7, 7)])
def test_lists_stay_with_their_rows_however_they_are_shuffled(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch, block: int, pool: int
) -> None:
    monkeypatch.setattr(batches, "BLOCK_ROWS", block)
    monkeypatch.setattr(batches, "POOL_ROWS", pool)

    def rows(found: list[Batch]) -> list[tuple[Any, ...]]:
        out = []
        for batch in found:
            lists = [jagged.to_dense() for jagged in batch.lists]
            for n in range(len(batch)):
                ids = tuple(tuple(jagged[n].tolist()) for jagged in lists)
                out.append((tuple(batch.ids_bf[n].tolist()), tuple(batch.dense_bd[n].tolist()), ids))
        return sorted(out)

    expected = rows([Batch.of(r) for r in itertools.islice(ordered_rows(data, "validation", 64), 99)])
    assert rows(list(ShuffledBatches(data, "validation", 64, 0).epoch(0))) == expected


def test_a_sequence_can_be_had_as_a_block(data: PreparedData) -> None:
    # What attention over a sequence will read.
    batch = Batch.of(next(ordered_rows(data, "test", 50)))
    names = [f.name for f in data.transform.lists]
    ids, lengths = padded(batch.lists[names.index("watched")], 4)
    vocabulary = next(s.vocabulary for s in data.transform.statistics.categorical if s.name == "watched")
    assert ids.shape == (50, 4)
    for row, kept, length in zip(draw(700, 3)["watched"].to_pylist(), ids.tolist(), lengths.tolist(), strict=False):
        known = [2 + vocabulary.index(str(item)) for item in row[-4:]]
        assert (kept, length) == (known + [0] * (4 - len(known)), len(known))


def test_pandas_lists_are_lists(data: PreparedData) -> None:
    # What pandas writes of columns of Python lists and numpy arrays.
    table = draw(20, 8).select(COLUMNS)
    again = pa.Table.from_pandas(pd.DataFrame(table.to_pandas()))
    first, second = data.transform(table), data.transform(again)
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.dense, second.dense)
    assert all(np.array_equal(a.values, b.values) for a, b in zip(first.lists, second.lists, strict=True))
