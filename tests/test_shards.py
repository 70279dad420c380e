"""Prepared data on disk: what is written is read back, and damage is told before anything trains on it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_moe.errors import UserError
from recsys_moe.labels import group_ids, task_labels
from recsys_moe.schema import Schema
from recsys_moe.shards import PreparedData, write_json
from recsys_moe.typed import parse


def test_rows_come_back_as_they_were_written(prepared_clicks: PreparedData, clicks: Any, clicks_schema: Schema) -> None:
    first, second = prepared_clicks.shards("train")
    for shard, table in ((first, clicks(700, 1)), (second, clicks(333, 2))):
        rows = shard.rows(0, len(shard))
        inputs = prepared_clicks.transform(table)
        labels, weights = task_labels(table, clicks_schema)
        assert len(shard) == len(rows) == table.num_rows
        for got, wrote in (
            (rows.inputs.ids, inputs.ids),
            (rows.inputs.dense, inputs.dense),
            (rows.labels, labels),
            (rows.weights, weights),
            (rows.groups, group_ids(table, clicks_schema)),
        ):
            assert got is not None
            assert got.dtype == wrote.dtype
            assert np.array_equal(got, wrote)


def test_a_range_of_rows_is_a_slice_and_stops_at_the_end(prepared_clicks: PreparedData) -> None:
    (shard,) = prepared_clicks.shards("test")
    whole, part = shard.rows(0, 300), shard.rows(290, 1000)
    assert len(part) == 10
    assert np.array_equal(part.inputs.ids, whole.inputs.ids[:, 290:])
    assert np.array_equal(part.inputs.dense, whole.inputs.dense[:, 290:])


def test_rows_are_copies(prepared_clicks: PreparedData) -> None:
    # A view into the mapped file would be read-only for torch, and die with the mapping.
    (shard,) = prepared_clicks.shards("test")
    rows = shard.rows(0, 10)
    before = rows.inputs.dense.copy()
    rows.inputs.dense += 1
    assert np.array_equal(shard.rows(0, 10).inputs.dense, before)


def test_manifest_counts_rows_by_part(prepared_clicks: PreparedData) -> None:
    assert [prepared_clicks.manifest.rows(part) for part in ("train", "validation", "test")] == [1033, 400, 300]


def test_schema_and_statistics_come_back(prepared_clicks: PreparedData, clicks_schema: Schema, clicks: Any) -> None:
    assert prepared_clicks.schema == clicks_schema
    # Most frequent first: all three colours are in the training part.
    assert set(prepared_clicks.transform.statistics.categorical[0].vocabulary) == {"red", "green", "blue"}


def test_data_without_a_group(tmp_path: Path, write_prepared: Any, clicks: Any, clicks_schema: Schema) -> None:
    schema = Schema(clicks_schema.features, clicks_schema.tasks)
    data = write_prepared(tmp_path / "p", schema, {"train": [clicks(50)]})
    assert data.shards("train")[0].rows(0, 50).groups is None


@pytest.mark.parametrize("group", [None, "user"])
def test_a_feature_may_be_called_group(tmp_path: Path, write_prepared: Any, group: str | None) -> None:
    # Columns of a shard that are not features must not take a feature's name.
    schema = parse(
        Schema,
        {
            "features": [{"name": "group", "kind": "categorical"}],
            "tasks": [{"name": "click", "label": "click"}],
            "group": group,
        },
        "schema",
    )
    table = pa.table({"group": ["a", "a", "b"], "user": [7, 8, 9], "click": [0, 1, 1]})
    rows = write_prepared(tmp_path / "p", schema, {"train": [table]}).shards("train")[0].rows(0, 3)
    assert rows.inputs.ids.tolist() == [[2, 2, 3]]
    assert (None if rows.groups is None else rows.groups.tolist()) == (None if group is None else [7, 8, 9])


MANY: Schema = parse(
    Schema,
    {
        "features": [
            {"name": "tags", "kind": "multi"},
            {"name": "watched", "kind": "sequence", "max_length": 3, "buckets": 10},
            {"name": "v", "kind": "embedding", "dim": 2},
        ],
        "tasks": [{"name": "y", "label": "y", "kind": "regression"}],
    },
    "schema",
)
MANY_ROWS = pa.table(
    {
        "tags": [["a", "b"], None, [], ["b"], ["c", "a", "b", "a"]],
        "watched": [[1, 2, 3, 4], [5], None, [], [6]],
        "v": [[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]],
        "y": [1.5, -2.0, None, 1e6, 0.0],
    }
)


def test_lists_and_vectors_come_back_in_any_range(tmp_path: Path, write_prepared: Any) -> None:
    (shard,) = write_prepared(tmp_path / "p", MANY, {"train": [MANY_ROWS]}).shards("train")
    transform = PreparedData(tmp_path / "p").transform
    for low, high in ((0, 5), (0, 1), (1, 4), (4, 9), (2, 2)):
        expected, got = transform(MANY_ROWS.slice(low, min(high, 5) - low)), shard.rows(low, high).inputs
        assert np.array_equal(got.dense, expected.dense)
        for mine, theirs in zip(got.lists, expected.lists, strict=True):
            assert mine.values.dtype == mine.offsets.dtype == np.int32
            assert mine.values.tolist() == theirs.values.tolist()
            assert mine.offsets.tolist() == theirs.offsets.tolist()
            mine.values[:] = 0  # a copy: nothing is written to the file
    labels = shard.rows(0, 5).labels
    assert labels.tolist() == [[1.5, -2.0, 0.0, 1e6, 0.0]]


def test_lists_without_a_value(tmp_path: Path, write_prepared: Any) -> None:
    empty = MANY_ROWS.slice(1, 1).set_column(0, "tags", pa.array([[]], pa.list_(pa.string())))
    rows = write_prepared(tmp_path / "p", MANY, {"train": [MANY_ROWS], "test": [empty]}).shards("test")[0].rows(0, 1)
    assert rows.inputs.lists[0].offsets.tolist() == [0, 0]


# -- damage


@pytest.mark.parametrize("vocabulary", [["red"], []])
def test_ids_beyond_a_table_are_refused(prepared_clicks: PreparedData, vocabulary: list[str]) -> None:
    # The lookup would read, and training write, behind the table's end.
    path = prepared_clicks.folder / "statistics.json"
    statistics = json.loads(path.read_text())
    statistics["categorical"][0]["vocabulary"] = vocabulary
    write_json(path, statistics)
    with pytest.raises(UserError, match=r"has id 4 of 'colour', whose table ends at \d: its statistics were changed; delete '"):
        PreparedData(prepared_clicks.folder)


def test_list_ids_beyond_a_table_are_refused_too(tmp_path: Path, write_prepared: Any) -> None:
    write_prepared(tmp_path / "p", MANY, {"train": [MANY_ROWS]})
    path = tmp_path / "p" / "statistics.json"
    write_json(path, json.loads(path.read_text().replace('"c"', '"c", "d"')))
    PreparedData(tmp_path / "p")  # a table may have rows that nobody uses
    write_json(path, json.loads(path.read_text()) | {"categorical": [{"name": "tags", "vocabulary": ["a", "b"]}]})
    with pytest.raises(UserError, match=r"has id 4 of 'tags', whose table ends at 3"):
        PreparedData(tmp_path / "p")


def test_a_missing_shard(prepared_clicks: PreparedData) -> None:
    (prepared_clicks.folder / "train-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"train-00001.arrow' is missing; delete '.*prepared' and prepare the data again"):
        PreparedData(prepared_clicks.folder)


def test_a_flipped_bit(prepared_clicks: PreparedData) -> None:
    path = prepared_clicks.folder / "train-00000.arrow"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train-00000.arrow' does not match the checksum in the manifest"):
        PreparedData(prepared_clicks.folder)


def test_a_truncated_shard(prepared_clicks: PreparedData) -> None:
    path = prepared_clicks.folder / "test-00000.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test-00000.arrow' does not match the checksum"):
        PreparedData(prepared_clicks.folder)


@pytest.mark.parametrize("name", ["manifest.json", "schema.json", "statistics.json"])
def test_a_json_file_that_is_cut_short_or_missing(prepared_clicks: PreparedData, name: str) -> None:
    path = prepared_clicks.folder / name
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UserError, match=rf"{name}' is not whole \(.*\); prepare the data again"):
        PreparedData(prepared_clicks.folder)
    path.write_bytes(b"\xff\x00 no text")
    with pytest.raises(UserError, match=name):
        PreparedData(prepared_clicks.folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}' can't be read \(No such file or directory\)"):
        PreparedData(prepared_clicks.folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 99}, r"has data format 99, not \d; prepare it again"),
        ({"shards": [{"file": "x"}]}, "'shards.0.part' is missing"),
        ({"shard": []}, "unknown key 'shard'; did you mean 'shards'"),
    ],
)
def test_a_manifest_of_another_form(prepared_clicks: PreparedData, changes: dict[str, Any], sentence: str) -> None:
    path = prepared_clicks.folder / "manifest.json"
    write_json(path, json.loads(path.read_text()) | changes)
    with pytest.raises(UserError, match=sentence):
        PreparedData(prepared_clicks.folder)


def test_statistics_that_lack_a_feature(prepared_clicks: PreparedData) -> None:
    path = prepared_clicks.folder / "statistics.json"
    write_json(path, json.loads(path.read_text()) | {"categorical": []})
    with pytest.raises(UserError, match="colour"):
        PreparedData(prepared_clicks.folder)


def test_write_json_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1.5, None]})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"é": [1.5, None]}
