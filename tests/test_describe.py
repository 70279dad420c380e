"""`data describe`: what it finds in a stranger's columns, and that what it proposes trains and serves as it is."""

import datetime
import decimal
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
import torch
import yaml
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_moe import looks, sampling, targets
from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.describe import Description, describe
from recsys_moe.errors import UserError
from recsys_moe.labels import task_labels
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.predictor import Predictor
from recsys_moe.schema import Schema, load_schema
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.sources import DataConfig, Split, read_part, read_rows
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import parse

ROWS = 4000


def shop(rows: int = ROWS) -> pa.Table:
    """A shop's log with one of everything that a stranger's file may hold."""
    r = np.random.default_rng(0)
    user, price = r.integers(0, 300, rows), np.exp(r.normal(3, 1.5, rows))
    colour = r.choice(["red", "green", "blue"], rows)
    click = r.random(rows) < np.where(colour == "red", 0.7, 0.2)
    buy = click & (r.random(rows) < 0.2)
    start = datetime.datetime(2024, 3, 1)
    times = [start + datetime.timedelta(seconds=int(s)) for s in np.sort(r.integers(0, 10**6, rows))]
    return pa.table(
        {
            "event_id": [f"e{n}" for n in range(rows)],
            "userId": user,
            "item_id": r.integers(0, 2000, rows),
            "ts": times,
            "event_time": [int(t.timestamp()) for t in times],
            "day": [int(t.strftime("%Y%m%d")) for t in times],
            "when": [t.isoformat(" ") for t in times],
            "price": pa.array(price, mask=r.random(rows) < 0.1),
            "stock": r.integers(0, 400, rows),
            "colour": colour,
            "colour_again": colour,
            "size": pa.array(r.choice([36.0, 37.0, 38.0], rows), mask=r.random(rows) < 0.05),
            "genres": r.choice([f"{a}|{b}" for a in "abcdefghij" for b in "klmnopqrst"], rows),
            "amount": r.choice(["NA", *map(str, range(100))], rows),
            "review": r.choice([" ".join(r.choice(["very", "good", "bad", "thing"], 18)) for _ in range(500)], rows),
            "tags": [r.choice(["a", "b", "c"], n, replace=False).tolist() for n in r.integers(0, 4, rows)],
            "last_items": pa.array([r.integers(0, 90, n).tolist() for n in r.integers(1, 9, rows)], mask=r.random(rows) < 0.1),
            "picture": pa.array(list(r.normal(size=(rows, 4)).astype(np.float32)), pa.list_(pa.float32())),
            "prices": [[0.5] * n for n in r.integers(0, 3, rows)],
            "sentences": [[["a"]]] * rows,
            "shop": ["one"] * rows,
            "nothing": pa.nulls(rows),
            "member": r.random(rows) < 0.3,
            "is_click": click.astype(int),
            "buy": buy,
            "order_total": np.where(buy, price, 0.0),
            "carrier": pa.array(r.choice(["post", "van", "bike"], rows), mask=~buy),
            "dwell_ms": r.integers(0, 9999, rows),
            "stars": r.integers(1, 6, rows),
            "order_status": r.choice(["open", "paid", "sent back"], rows, p=[0.2, 0.7, 0.1]),
        }
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("describe") / "shop.parquet"
    pq.write_table(shop(), path, row_group_size=1000)
    return path


def uses(found: Description) -> dict[str, str]:
    return {c.name: c.feature["kind"] if c.use == "feature" else c.use for c in found.columns}


def notes(found: Description) -> dict[str, str]:
    return {c.name: c.note for c in found.columns}


EXPECTED = {
    "event_id": ("left out", "another one in every row"),
    "userId": ("categorical", "an id"),
    "item_id": ("categorical", "an id"),
    "ts": ("left out", "a time"),
    "event_time": ("left out", "a time (in seconds since 1970)"),
    "day": ("left out", "a time (a day as YYYYMMDD)"),
    "when": ("left out", "a time (as text)"),
    "price": ("numeric", ""),
    "stock": ("numeric", ""),
    "colour": ("categorical", ""),
    "colour_again": ("left out", "the same as colour"),
    "size": ("categorical", ""),
    "genres": ("multi", "several values split by '|'"),
    "amount": ("categorical", "numbers but for NA: numeric once it holds numbers only"),
    "review": ("left out", "free text of "),
    "tags": ("multi", "or a sequence, if their order tells something"),
    "last_items": ("sequence", "oldest first?"),
    "picture": ("embedding", "all of one length"),
    "prices": ("left out", "lists of numbers of different lengths"),
    "sentences": ("left out", "lists of list<element: string>: neither categories nor numbers"),
    "shop": ("left out", "the same in every row"),
    "nothing": ("left out", "empty"),
    "member": ("categorical", ""),
    "is_click": ("label", ""),
    "buy": ("suspected label", "a label? "),
    "order_total": ("outcome", "known only after the event, by its name"),
    "dwell_ms": ("outcome", "known only after the event, by its name"),
    "stars": ("outcome", "known only after the event, by its name"),
    "order_status": ("outcome", "known only after the event, by its name"),
}
# What CSV can't hold, or not as it is.
PARQUET_ONLY = ["tags", "last_items", "picture", "prices", "sentences", "nothing"]


def test_every_kind_of_column(file: Path) -> None:
    found = describe(file, ["is_click"])
    assert (found.rows, found.sampled, found.group, found.time) == (ROWS, ROWS, "userId", "ts")
    for name, (use, note) in EXPECTED.items():
        assert uses(found)[name] == use, name
        assert notes(found)[name].startswith(note), name
    features = {c.name: c.feature for c in found.columns}
    assert features["price"] == {"name": "price", "kind": "numeric", "log1p": True, "buckets": 32, "missing_indicator": True}
    assert features["stock"] == {"name": "stock", "kind": "numeric", "buckets": 32}
    assert features["item_id"] == {"name": "item_id", "kind": "categorical", "min_count": 2}
    assert features["genres"] == {"name": "genres", "kind": "multi", "separator": "|"}
    assert features["last_items"] == {"name": "last_items", "kind": "sequence", "max_length": 8}
    assert features["picture"] == {"name": "picture", "kind": "embedding", "dim": 4}
    price = next(c for c in found.columns if c.name == "price")
    assert price.missing == pytest.approx(shop()["price"].null_count / ROWS, abs=1e-6)
    assert price.distinct == ROWS - shop()["price"].null_count
    assert (found.tasks[0]["name"], found.tasks[0]["label"]) == ("click", "is_click == 1")
    assert found.tasks[0]["rate"] == pytest.approx(np.mean(shop()["is_click"].to_numpy()))


def test_what_gives_a_label_away_is_no_feature(file: Path) -> None:
    # order_total is an outcome by its name; carrier is there only where something was bought.
    found = describe(file, ["buy"])
    assert uses(found)["carrier"] == "outcome"
    assert re.fullmatch(r"a leak\? predicts buy alone with AUC 1.0000", notes(found)["carrier"])
    # Whoever buys has clicked, though few of those who click buy.
    assert notes(describe(file, ["is_click"]))["carrier"] == "a leak? there only where click is true"
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    assert {"carrier", "order_total", "is_click", "dwell_ms", "stars", "order_status"} == set(schema.outcomes)


def test_a_leak_is_judged_on_rows_that_it_was_not_fitted_on() -> None:
    r = np.random.default_rng(1)
    y = r.random(20_000) < 0.3
    score = y + r.normal(0, 1, 20_000)
    codes = targets._codes(pa.chunked_array([pa.array(score)]))
    alone = targets._auc_alone(codes, y, np.ones(20_000, bool))
    assert alone == pytest.approx(sklearn.metrics.roc_auc_score(y, score), abs=0.03)  # in 256 noisy bins
    # An id for each row knows each label by heart, and tells nothing.
    ids = np.arange(20_000)
    assert targets._auc_alone(ids, y, np.ones(20_000, bool)) == pytest.approx(0.5, abs=0.01)
    # Rows in which the label was not observed do not count; too few positives are no ground for a verdict.
    observed = r.random(20_000) < 0.5
    assert targets._auc_alone((y ^ ~observed).astype(int), y, observed) == 1.0
    few = np.zeros(20_000, bool)
    few[:19] = True
    assert targets._auc_alone(few.astype(int), few, np.ones(20_000, bool)) == 0.5


def test_a_copy_of_the_label_is_an_outcome_however_few_positives_there_are(tmp_path: Path) -> None:
    y = np.zeros(500, int)
    y[:5] = 1
    pq.write_table(pa.table({"mark": y, "x": np.arange(500) / 7, "done": y}), tmp_path / "a.parquet")
    assert uses(describe(tmp_path / "a.parquet", ["done"])) == {"mark": "outcome", "x": "numeric", "done": "label"}
    assert uses(describe(tmp_path / "a.parquet", ["mark"])) == {"mark": "label", "x": "numeric", "done": "left out"}


def test_what_may_be_a_label_is_proposed_as_a_comment(file: Path) -> None:
    found = describe(file)
    names = [task["name"] for task in found.tasks]
    assert names == ["click", "buy", "order_total", "dwell_ms", "stars", "order_status"]
    assert not found.named
    for task in names:
        text = re.sub(rf"^  # - {{name: {task},", f"  - {{name: {task},", found.schema, flags=re.MULTILINE)
        schema = parse(Schema, yaml.safe_load(text), "schema")
        assert schema.task_names == (task,)
        assert not {"is_click", "buy", "carrier"} & set(schema.feature_names)
    with pytest.raises(UserError, match="'tasks' is None"):
        parse(Schema, yaml.safe_load(found.schema), "schema")


def test_a_rare_value_of_two_is_suspected_where_no_name_tells(tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    table = pa.table(
        {
            "income": r.choice(["- 50000.", "50000+."], 1000, p=[0.94, 0.06]),
            "sex": r.choice(["f", "m"], 1000),
            "is_member": r.integers(0, 2, 1000),
            "age": r.integers(0, 90, 1000),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet")
    assert [(task["name"], task["label"]) for task in found.tasks] == [
        ("income", "income == '50000+.'"),
        ("member", "is_member == 1"),
    ]
    # Once a label is named, the others are features again, with a word of doubt.
    named = describe(tmp_path / "a.parquet", ["income"])
    assert uses(named) == {"income": "label", "sex": "categorical", "is_member": "categorical", "age": "numeric"}
    assert notes(named)["is_member"].startswith("or a label?")


@pytest.mark.parametrize(
    ("values", "expression"),
    [
        ([0, 1], "y == 1"),
        ([0.0, 1.0, None], "y == 1"),
        ([-1, 1], "y == 1"),
        ([True, False, None], "y"),
        (["no", "yes"], "y == 'yes'"),
        (["it's", "it's", '"so"'], """y == '"so"'"""),
        ([3, 7, 7], "y == 3"),
        ([0.25, 0.75, 0.75], "y == 0.25"),
        ([decimal.Decimal("0.5"), decimal.Decimal("2.0"), decimal.Decimal("2.0")], "y == 0.5"),
    ],
)
def test_the_positive_of_two_values(tmp_path: Path, values: list[Any], expression: str) -> None:
    column = [values[n % len(values)] for n in range(300)]
    pq.write_table(pa.table({"y": column, "x": np.arange(300) / 7}), tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet", ["y"])
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    assert schema.tasks[0].label == expression
    labels, weights = task_labels(pq.read_table(tmp_path / "a.parquet"), schema)
    assert weights.sum() == sum(v is not None for v in column)
    assert labels.sum() / weights.sum() == pytest.approx(found.tasks[0]["rate"])


def test_a_condition_may_be_a_label(file: Path) -> None:
    found = describe(file, ["red=colour == 'red' and price > 10", "is_click"])
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    assert schema.task_names == ("red", "click")
    assert schema.tasks[0].label == "colour == 'red' and price > 10"
    assert not {"colour", "price"} & set(schema.feature_names)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("is_clik", "--label 'is_clik': there is no column 'is_clik'; did you mean 'is_click'?"),
        (
            "genres",
            r"--label 'genres' has 100 values \(.*\), of which no task can be made; say what counts, such as --label",
        ),
        ("tags", r"--label 'tags' has 3 values \(0 … 3 a row: .*\), of which no task can be made"),
        ("picture", r"--label 'picture' has no countable values \(list<element: float>\)"),
        ("low=stok < 3", "there is no column 'stok'; did you mean 'stock'"),
        ("low=genres", "--label 'low=genres' has 100 values"),
        ("low=colour == 'red' and stock", "can't be evaluated"),
        ("zero=stock * 0", "--label 'zero=stock \\* 0' is always 0 in the 4,000 rows looked at"),
        ("low=stock < 0", "--label 'low=stock < 0' is always 0 in the 4,000 rows looked at"),
        ("low=stock <", "can't be read"),
    ],
)
def test_a_label_that_is_none(file: Path, label: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        describe(file, [label])


def test_a_label_that_no_expression_can_name(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"is click": [0, 1] * 50, "class": ["a", "b"] * 50, "x": np.arange(100) / 7}), tmp_path / "a.parquet"
    )
    for name in ("is click", "class"):
        with pytest.raises(UserError, match=f"--label '{name}' can't stand in an expression; rename the column"):
            describe(tmp_path / "a.parquet", [name])


CLASSES = ["paid", "open", "sent back"]  # the most frequent first
TASKS = {
    "is_click": {"name": "click", "label": "is_click == 1"},
    "stars": {"name": "stars", "kind": "ordinal", "label": "stars", "levels": [1, 2, 3, 4, 5]},
    "order_status": {
        "name": "order_status",
        "kind": "multiclass",
        "label": "order_status",
        "classes": CLASSES,
    },
    "order_total": {"name": "order_total", "kind": "regression", "label": "order_total", "log1p": True},
    "dwell_ms": {"name": "dwell_ms", "kind": "regression", "label": "dwell_ms"},
    "how=order_status": {
        "name": "how",
        "kind": "multiclass",
        "label": "order_status",
        "classes": CLASSES,
    },
    "seconds=dwell_ms / 1000": {"name": "seconds", "kind": "regression", "label": "dwell_ms / 1000"},
    "click=is_click": {"name": "click", "label": "is_click == 1"},
    "either=is_click * 1": {"name": "either", "label": "is_click * 1"},
}


@pytest.mark.parametrize("label", TASKS)
def test_a_label_has_the_task_that_its_values_ask_for(file: Path, label: str) -> None:
    found = describe(file, [label])
    assert yaml.safe_load(found.schema)["tasks"] == [TASKS[label]]
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    labels, weights = task_labels(shop(), schema)
    assert weights.all()
    assert labels.min() < labels.max()


def test_whole_numbers_of_a_code_have_no_order(tmp_path: Path) -> None:
    table = {"exit_code": np.arange(300) % 4, "score": np.arange(300) % 7 + 0.5, "x": np.arange(300) / 7}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert describe(tmp_path / "a.parquet", ["exit_code"]).tasks[0]["kind"] == "multiclass"
    assert describe(tmp_path / "a.parquet", ["score"]).tasks[0]["kind"] == "regression"


def test_a_column_that_says_that_it_is_the_target_is_suspected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"target": np.arange(300) % 97 / 3, "x": np.arange(300) / 7}), tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet")
    assert uses(found) == {"target": "suspected label", "x": "numeric"}
    assert "# - {name: target, kind: regression, label: target}  # 0 … 32" in found.schema


def test_what_gives_a_number_or_a_class_away_is_no_feature(tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    minutes, ending = r.gamma(2, 3, 2000), r.choice(["back", "link", "close"], 2000)
    table = pa.table(
        {
            "minutes": minutes,
            "seconds": minutes * 60,
            "ending": ending,
            "code": pa.array(ending).dictionary_encode().indices,
            "link": [[text, "x"] for text in ending],
            "x": r.normal(size=2000),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet", ["minutes", "ending"])
    assert uses(found) == {
        "minutes": "label",
        "seconds": "outcome",
        "ending": "label",
        "code": "outcome",
        "link": "outcome",
        "x": "numeric",
    }


def test_ids_without_end_are_hashed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "MANY", 1000)
    found = describe(file, ["is_click"])
    column = next(c for c in found.columns if c.name == "item_id")
    distinct = len(set(shop()["item_id"].to_pylist()))
    assert column.feature == {"name": "item_id", "kind": "hashed", "buckets": 4096}
    assert column.note == f"an id; about {distinct:,} values: with collisions: none, each has a row of its own"
    assert uses(found)["userId"] == "categorical"  # 300 of them
    assert column.note in found.schema
    monkeypatch.setattr(looks, "MANY", 80)
    features = {c.name: c.feature for c in describe(file, ["is_click"]).columns}
    assert features["last_items"] == {"name": "last_items", "kind": "sequence", "max_length": 8, "buckets": 128}
    assert "buckets" not in features["genres"]  # of 20 values, in 100 combinations
    assert parse(Schema, yaml.safe_load(found.schema), "schema")


@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_how_many_values_all_rows_have_is_guessed_within_its_bound(skew: float) -> None:
    # Charikar et al. prove a ratio of √(rows / sampled) for the worst case.
    r = np.random.default_rng(0)
    chance = np.arange(1, 50_001) ** -skew
    rows = r.choice(50_000, 400_000, p=chance / chance.sum())
    truth, sample = len(np.unique(rows)), r.choice(rows, 20_000, replace=False)
    assert 20**-0.5 < looks._estimate(pa.array(sample), 1 / 20) / truth < 20**0.5
    assert looks._estimate(pa.array(rows), 1.0) == truth


# Files


def test_csv_is_described_as_parquet_is(file: Path, tmp_path: Path) -> None:
    table = pq.read_table(file).drop_columns(PARQUET_ONLY)
    table.to_pandas().to_csv(tmp_path / "shop.csv", index=False)
    expected, found = describe(file, ["is_click"]), describe(tmp_path / "shop.csv", ["is_click"])
    assert uses(found) == {name: use for name, use in uses(expected).items() if name not in PARQUET_ONLY}
    assert found.group == "userId"
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    (read,) = read_rows(tmp_path / "shop.csv", schema)
    assert Transform(schema, PartialStatistics.of(read, schema).finish(schema))(read).ids.shape[1] == ROWS


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_large_file_is_judged_by_a_random_sample(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(sampling, "SAMPLE_ROWS", 500)
    table = pq.read_table(file).drop_columns(PARQUET_ONLY)
    path = tmp_path / f"shop.{suffix}"
    if suffix == "csv":
        # What only one row outside of the sample tells decides over the type all the same.
        frame = table.to_pandas()
        frame["stock"] = frame["stock"].astype(str)
        frame.loc[ROWS - 1, "stock"] = "sold out"
        frame.to_csv(path, index=False)
    else:
        pq.write_table(table, path, row_group_size=1000)
    found = describe(path, ["is_click"])
    assert (found.rows, found.sampled) == (ROWS, 500)
    assert f"{ROWS:,} rows, judged by a random sample of 500." in found.schema
    assert found == describe(path, ["is_click"])
    assert found.tasks[0]["rate"] == pytest.approx(np.mean(shop()["is_click"].to_numpy()), abs=0.08)
    # Of floats, a sample can't tell that all of them are whole.
    assert uses(found)["size"] == "numeric"
    assert uses(found)["stock"] == ("categorical" if suffix == "csv" else "numeric")


def test_row_groups_are_read_from_the_whole_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "READ_ROWS", 2000)
    found = describe(file, ["is_click"])
    assert (found.rows, found.sampled) == (ROWS, 2000)
    time = next(c for c in found.columns if c.name == "event_time")
    low, high = (int(n) for n in time.values.split(" … "))
    column = shop()["event_time"].to_numpy()
    assert (low, high) == (column.min(), column.max())  # the first group and the last


def test_thinning_keeps_every_row_with_the_same_chance() -> None:
    counts = np.zeros(10)
    for seed in range(200):
        thinned = sampling.Thinned(100)
        thinned._random = np.random.default_rng(seed)
        for block in range(10):
            thinned.add(pa.table({"block": np.full(137, block)}))
        kept = thinned.table()["block"].to_numpy()
        assert 60 < len(kept) <= 100
        assert (np.diff(kept) >= 0).all()
        counts += np.bincount(kept, minlength=10)
    assert counts / counts.sum() == pytest.approx(np.full(10, 0.1), rel=0.1)


def test_a_folder_is_one_data_set(file: Path, tmp_path: Path) -> None:
    table = pq.read_table(file)
    first, second = table.slice(0, 2500), table.slice(2500)
    second = second.set_column(8, "stock", second["stock"].cast(pa.float64())).drop_columns(["member"])
    second = second.set_column(second.column_names.index("colour"), "colour", pa.array(np.arange(1500)))
    pq.write_table(first, tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    found = describe(tmp_path, ["is_click"])
    assert found.rows == ROWS
    assert uses(found)["stock"] == "numeric"
    assert notes(found)["member"] == "not in every file"
    assert notes(found)["colour"] == "int64 and string in different files"
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    config = DataConfig(name="d", source=str(tmp_path), schema="-", split=Split(order="sorted", by=found.time))
    assert sum(t.num_rows for t in read_part(config, schema, "train")) == 3200


def test_files_that_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; name the folder or file"):
        describe(tmp_path / "absent.parquet")
    with pytest.raises(UserError, match=r"no file in .* matches any of"):
        describe(tmp_path)
    (tmp_path / "a.csv").write_text("x,y,x\n1,2,3\n")
    with pytest.raises(UserError, match=r"column 'x' stands in '.*a.csv' more than once"):
        describe(tmp_path)
    (tmp_path / "a.csv").write_text("x,y\n")
    with pytest.raises(UserError, match=r"a.csv' is empty; name a file with rows"):
        describe(tmp_path)
    (tmp_path / "a.csv").write_text("x;y\n1;2\n")
    with pytest.raises(UserError, match=r"has one column 'x;y'; fields must be split by commas, not by ';'"):
        describe(tmp_path)
    (tmp_path / "a.csv").write_text("x,y\n1,2,3\n")
    with pytest.raises(UserError, match=r"a.csv' can't be read as CSV \(.*Expected 2 columns, got 3"):
        describe(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="holds Parquet and CSV files; describe one of them alone"):
        describe(tmp_path)
    with pytest.raises(UserError, match="has no column that could be a feature"):
        describe(tmp_path / "b.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-8])
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        describe(tmp_path / "b.parquet")
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet' is empty; name a file with rows"):
        describe(tmp_path / "c.parquet")


def test_ten_thousand_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = np.random.default_rng(0)
    columns = {f"c{n}": r.normal(size=300) for n in range(10_000)}
    pq.write_table(pa.table(columns | {"click": r.integers(0, 2, 300)}), tmp_path / "wide.parquet")
    monkeypatch.setattr(sampling, "SAMPLE_CELLS", 2_000_000)
    found = describe(tmp_path / "wide.parquet", ["click"])
    assert (len(found.columns), found.sampled) == (10_001, 199)


# The proposal is taken as it is

NAMES = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=8
) | st.sampled_from(
    ["a.b", "a__b", "a.bucket", "a", "yes", "null", "1", "user_id", "time", "label", "rating", "is_x", "#", "a: b", "x\ny", "…"]
)
VALUES = st.sampled_from(
    [
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 3),
        st.floats(allow_nan=True, allow_infinity=True),
        st.floats(-1e3, 1e3),
        st.booleans(),
        st.text(max_size=6),
        st.sampled_from(["a|b", "NA", "1", "2022-03-04 05:06:07", "x" * 90]),
        st.decimals(-1000, 1000, places=2),
        st.datetimes(datetime.datetime(1990, 1, 1), datetime.datetime(2090, 1, 1)),
        st.dates(datetime.date(1990, 1, 1)),
        st.timedeltas(datetime.timedelta(-999), datetime.timedelta(999)),
        st.lists(st.integers(0, 9), max_size=3),
        st.binary(max_size=4),
        st.none(),
        st.fixed_dictionaries({"a": st.integers(0, 9)}),
    ]
)


@st.composite
def tables(draw: Any) -> pa.Table:
    rows = draw(st.sampled_from([1, 7, 120]))
    columns: dict[str, Any] = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=8, unique=True)):
        few = draw(st.lists(draw(VALUES) | st.none(), min_size=1, max_size=6))
        columns[name] = pa.array([few[n % len(few)] for n in range(rows)])
    return pa.table(columns | {"target": [n % 2 for n in range(rows)]})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_whatever_is_proposed_reads_and_transforms_every_row(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    try:
        found = describe(path, ["target"])
    except UserError as error:
        assert re.search("no column that could be a feature|'target' has 1 values", str(error))  # noqa: PT017
        return
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    assert schema.feature_names == tuple(c.name for c in found.columns if c.use == "feature")
    late = {c.name for c in found.columns if c.use in ("outcome", "suspected label")}
    assert set(schema.outcomes) == late
    read = pa.concat_tables(list(read_rows(path, schema)))
    inputs = Transform(schema, PartialStatistics.of(read, schema).finish(schema))(read)
    assert np.isfinite(inputs.dense).all()
    assert task_labels(read, schema)[1].all()
    for column in found.columns:  # what may be a label can be read as one
        values = table[column.name]
        if column.task and not (pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py()):
            features = [{"name": "-", "kind": "numeric"}]
            task = parse(Schema, {"features": features, "tasks": [{"name": "t"} | column.task]}, "schema")
            labels, weights = task_labels(table, task)
            assert len(set(labels[weights > 0])) > 1


def test_lists_and_every_kind_of_task_train_as_proposed(file: Path, tmp_path: Path, write_prepared: Any) -> None:
    found = describe(file, ["is_click", "stars", "order_status", "dwell_ms"])
    schema = parse(Schema, yaml.safe_load(found.schema), "schema")
    assert {"multi", "sequence", "embedding"} <= {f.kind for f in schema.features}
    data = write_prepared(tmp_path / "prepared", schema, {"train": [shop()], "validation": [shop(500)]})
    model = MMoEConfig(embedding_dim=4, num_experts=2, expert_dims=(16,), tower_dims=(8,))
    result = Trainer(data, model, TrainConfig(epochs=1, batch_size=512)).fit()
    assert set(result.validation) == {"click", "stars", "order_status", "dwell_ms"}


def test_from_a_strangers_csv_to_served_scores(tmp_path: Path, write_prepared: Any) -> None:
    """The road in one process; tests/test_road.py walks it through Ray, MLflow and HTTP."""
    table = shop().drop_columns(PARQUET_ONLY)
    table.to_pandas().to_csv(tmp_path / "shop.csv", index=False)
    found = describe(tmp_path / "shop.csv", ["is_click", "buy"])
    (tmp_path / "shop.yaml").write_text(found.schema)
    schema = load_schema(tmp_path / "shop.yaml")
    split = Split(order="sorted", by=found.time)
    config = DataConfig(name="shop", source=str(tmp_path / "shop.csv"), schema=str(tmp_path / "shop.yaml"), split=split)
    parts = {part: [pa.concat_tables(list(read_part(config, schema, part)))] for part in ("train", "validation", "test")}
    data = write_prepared(tmp_path / "prepared", schema, parts)
    model = MMoEConfig(embedding_dim=4, num_experts=2, expert_dims=(16,), tower_dims=(8,))
    torch.manual_seed(0)
    trainer = Trainer(data, model, TrainConfig(epochs=8, batch_size=256), lambda event: None)
    result = trainer.fit()
    # Red things are clicked: 0.7 against 0.2, which ranks at most to about 0.73.
    assert 0.65 < result.validation["click"].auc < 0.8
    save_bundle(
        tmp_path / "bundle",
        trainer.model.state_dict(),
        BundleConfig(FORMAT, model, "fp32", config, "0" * 64),
        data.transform,
        {},
    )
    rows = table.select(schema.feature_names).slice(0, 50).to_pylist()
    asked = [row | {"colour": colour} for colour in ("red", "blue") for row in rows]
    with TestClient(build_api(tmp_path / "bundle", ServeConfig())) as client:
        answer = client.post("/v1/score", json={"rows": asked}).json()
    scores = np.array(answer["scores"]["click"])
    assert (scores[:50] > scores[50:] + 0.05).all()
    expected = Predictor(tmp_path / "bundle").score(pa.Table.from_pylist(asked))
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)


# The command


def test_the_command_writes_a_schema_and_says_how_to_go_on(file: Path, tmp_path: Path, cli: Any) -> None:
    done = cli("data", "describe", str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == describe(file).schema
    assert "order_total" in done.stderr
    assert f"go on with  recsys-moe data describe {file} --label is_click --output schema.yaml" in done.stderr
    done = cli(
        "data", "describe", str(file), "--label", "is_click", "--label", "buy", "--output", "shop.yaml", "--json", cwd=tmp_path
    )
    answer = json.loads(done.stdout)
    assert load_schema(tmp_path / "shop.yaml").task_names == ("click", "buy")
    assert (answer["output"], answer["rows"], answer["group"]) == ("shop.yaml", ROWS, "userId")
    keys = f"data=custom data.name=shop data.schema=shop.yaml data.source={file} data.split.order=sorted data.split.by=ts"
    assert answer["next"] == f"recsys-moe train {keys}"
    assert {column["name"]: column["use"] for column in answer["columns"]}["carrier"] == "outcome"
    done = cli("data", "describe", str(file), "--output", "shop.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "--output 'shop.yaml' exists already; name a new file or delete it" in done.stderr


def test_a_file_without_anything_like_a_label(tmp_path: Path, cli: Any) -> None:
    pd.DataFrame({"x": np.arange(50) / 7, "z": list("abcde") * 10}).to_csv(tmp_path / "a.csv", index=False)
    done = cli("data", "describe", "a.csv", cwd=tmp_path)
    assert done.returncode == 0
    assert "no column looks like a label: name one with --label" in done.stderr
    assert "--label COLUMN" in done.stderr


def test_durations_are_no_time_to_split_by(tmp_path: Path) -> None:
    """They were once: the printed command tested on the longest sessions."""
    n = 200
    table = pa.table(
        {
            "length": pa.array(np.arange(n) * 1000, pa.int64()).cast(pa.duration("ms")),
            "of_day": pa.array(np.arange(n) % 24 * 3600, pa.int32()).cast(pa.time32("s")),
            "colour": ["red", "blue"] * (n // 2),
            "is_click": np.arange(n) % 3 == 0,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet", [])
    assert found.time is None
    assert "split" not in found.train_command(None)


def test_a_late_value_that_is_no_time_is_seen(tmp_path: Path) -> None:
    times = [f"2024-01-01 00:{i // 60 % 60:02d}:{i % 60:02d}" for i in range(2500)]
    times[2000] = "unknown"
    pq.write_table(
        pa.table({"at": times, "colour": ["red", "blue"] * 1250, "is_click": np.arange(2500) % 3 == 0}), tmp_path / "a.parquet"
    )
    assert describe(tmp_path / "a.parquet", []).time is None


def test_a_zone_that_nobody_knows_is_told(tmp_path: Path) -> None:
    at = pa.array(range(100), pa.timestamp("s", "Mars/Phobos"))
    pq.write_table(pa.table({"at": at, "x": np.arange(100) / 7, "is_click": np.arange(100) % 3 == 0}), tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet", [])
    assert found.time == "at"  # instants have an order, whatever they are called
    assert found.columns[0].values == "in the time zone 'Mars/Phobos', which is not known here"


def test_a_stray_text_among_numbers_is_named(tmp_path: Path) -> None:
    numbers = pd.DataFrame({"all_differ": np.arange(200) / 7, "some_differ": np.arange(200) // 2 / 7, "y": [0, 1] * 100})
    numbers.astype(str).replace("1.0", "one").to_csv(tmp_path / "a.csv", index=False)
    found = {column.name: column for column in describe(tmp_path / "a.csv", ["y"]).columns}
    assert found["all_differ"].note == "another one in every row; numbers but for one: numeric once it holds numbers only"
    assert found["some_differ"].note == "numbers but for one: numeric once it holds numbers only"


@pytest.mark.parametrize(("name", "values", "task"), [("Été", [0, 1], "Ete"), ("is_big", [1e30, 3e30], "big")])
def test_labels_of_odd_names_and_huge_values_are_proposed_as_they_can_be_read(
    name: str, values: list[float], task: str, tmp_path: Path
) -> None:
    column = np.where(np.arange(300) % 3 == 0, values[1], values[0])
    pq.write_table(pa.table({"colour": ["red", "blue"] * 150, name: column}), tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet", [name])
    schema = parse(Schema, yaml.safe_load(found.schema), "proposed")
    assert schema.task_names == (task,)
    labels, _ = task_labels(pq.read_table(tmp_path / "a.parquet"), schema)
    assert 0 < labels.mean() < 1
