"""Preparation through Ray Data: what it writes, and what it says about bad input."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys_moe.batches import ordered_rows
from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.pipelines import prepare as prepare_module
from recsys_moe.pipelines.cluster import local_ray
from recsys_moe.pipelines.prepare import prepare
from recsys_moe.schema import Schema
from recsys_moe.shards import FORMAT, Manifest, PreparedData, Shard, write_json
from recsys_moe.sources import PARTS, DataConfig, Split, plan_chunks
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import dump, parse

ROOT = Path(__file__).resolve().parent.parent
SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "x", "kind": "numeric", "buckets": 4, "missing_indicator": True},
        {"name": "color", "kind": "categorical"},
    ],
    "tasks": [{"name": "click", "label": "clicked == 1"}],
    "group": "user",
}


@pytest.fixture(scope="module", autouse=True)
def ray_instance() -> Iterator[None]:
    """One Ray for all tests here, started with the checkout as working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        with local_ray():
            yield


def rows(n: int = 600) -> pd.DataFrame:
    r = np.random.default_rng(0)
    x = r.normal(size=n)
    x[::17] = np.nan
    return pd.DataFrame(
        {
            "x": x,
            "color": r.choice(["red", "green", "blue", None], n),
            "clicked": (r.random(n) < 0.4).astype("float64"),
            "user": r.choice(["a", "b", "c"], n),
        }
    )


def data_set(folder: Path, frame: pd.DataFrame, schema: dict[str, Any] = SCHEMA) -> DataConfig:
    folder.mkdir(exist_ok=True)
    frame.to_parquet(folder / "rows.parquet", row_group_size=100)
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    return DataConfig(name="small", source=str(folder), schema=str(folder / "schema.yaml"))


def test_summaries_are_handed_on_in_order_as_they_arrive(tmp_path: Path) -> None:
    config = data_set(tmp_path / "source", rows())
    schema: Any = parse(Schema, SCHEMA, "schema")
    chunks = plan_chunks(config, schema, chunk_rows=20)
    told: list[int] = []
    found = []
    for summary in prepare_module._map_chunks(chunks, lambda chunk: {"start": chunk.start}, told.append):
        found.append((summary["start"], len(told)))
    assert [start for start, _ in found] == list(range(0, 600, 20))
    assert found[0][1] < len(chunks)  # the first was here before the last had arrived
    assert told[-1] == 600


def test_shards_hold_the_transformed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many small chunks: statistics are merged over workers, parts are spread over shards.
    plan = prepare_module.plan_chunks
    monkeypatch.setattr(prepare_module, "plan_chunks", lambda config, schema: plan(config, schema, chunk_rows=70))
    frame = rows()
    seen: list[tuple[str, int, int]] = []
    data = prepare(data_set(tmp_path / "source", frame), tmp_path / "runs", lambda *step: seen.append(step))
    assert seen[-1] == ("transform", 600, 600)
    order = np.random.default_rng(0).permutation(600)
    for part, index in (("train", order[:480]), ("validation", order[480:540]), ("test", order[540:])):
        index = np.sort(index)
        found = list(ordered_rows(data, part))
        chosen = frame.iloc[index]
        expected = Transform(data.schema, data.transform.statistics)(pa.Table.from_pandas(chosen, preserve_index=False))
        np.testing.assert_array_equal(np.concatenate([f.inputs.ids for f in found], 1), expected.ids)
        np.testing.assert_array_equal(np.concatenate([f.inputs.dense for f in found], 1), expected.dense)
        np.testing.assert_array_equal(np.concatenate([f.labels[0] for f in found]), chosen["clicked"])
    train = frame.iloc[order[:480]]
    (x,) = data.transform.statistics.numeric
    assert x.mean == pytest.approx(train["x"].mean(), rel=1e-12)
    assert x.std == pytest.approx(train["x"].std(ddof=0), rel=1e-12)
    (color,) = data.transform.statistics.categorical
    assert list(color.vocabulary) == list(train["color"].value_counts().index)


def test_csv_is_written_in_shards_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One chunk, since it can only be read from its start: yet it must never be in memory whole.
    frame = rows(60_000)
    config = data_set(tmp_path / "source", frame)
    frame.to_csv(tmp_path / "source" / "rows.csv", index=False)
    schema = config.load_schema(Path())
    statistics = PartialStatistics.of(pa.Table.from_pandas(frame), schema).finish(schema)
    monkeypatch.setattr(prepare_module, "CHUNK_ROWS", 20_000)
    found = {}
    for kind in ("parquet", "csv"):
        (tmp_path / kind).mkdir()
        write = prepare_module._TransformAndWrite(dump(schema), dump(statistics), str(tmp_path / kind))
        chunks = prepare_module.plan_chunks(replace(config, files=(f"rows.{kind}",)), schema)
        assert len(chunks) == 1
        shards = [parse(Shard, shard, "shard") for shard in write(chunks[0])["shards"]]
        assert len({shard.file for shard in shards}) == len(shards)
        manifest = Manifest(FORMAT, "d", "0" * 64, "nowhere", tuple(shards), ())
        for name, content in (("schema", schema), ("statistics", statistics), ("manifest", manifest)):
            write_json(tmp_path / kind / f"{name}.json", dump(content))
        data = PreparedData(tmp_path / kind)
        found[kind] = [np.concatenate([r.inputs.ids for r in ordered_rows(data, part)], 1) for part in PARTS]
        # A block of CSV is a megabyte, some 30,000 of these rows: what comes in pieces may be half as large again.
        sizes = [shard.rows for shard in shards if shard.part == "train"]
        assert len(sizes) >= 2
        assert max(sizes) < 40_000
    for parquet, csv in zip(found["parquet"], found["csv"], strict=True):
        np.testing.assert_array_equal(parquet, csv)


def test_a_folder_that_another_run_has_finished_is_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two runs prepare the same data: the first may already be reading what the second would replace.
    config = data_set(tmp_path / "source", rows())
    write = prepare_module._write
    others: list[int] = []

    def slower(*arguments: Any) -> None:
        monkeypatch.setattr(prepare_module, "_write", write)
        others.append(prepare(config, tmp_path / "runs").folder.stat().st_ino)
        write(*arguments)

    monkeypatch.setattr(prepare_module, "_write", slower)
    mine = prepare(config, tmp_path / "runs")
    assert [mine.folder.stat().st_ino] == others
    assert [path.name for path in mine.folder.parent.iterdir()] == [mine.folder.name]
    # Asked to prepare again, it replaces it, even if another run does the same meanwhile.
    monkeypatch.setattr(prepare_module, "_write", slower)
    again = prepare(config, tmp_path / "runs", force=True)
    assert again.folder.stat().st_ino not in others
    assert [path.name for path in again.folder.parent.iterdir()] == [mine.folder.name]
    assert PreparedData(again.folder).manifest == mine.manifest


def test_statistics_come_from_the_training_part_only(tmp_path: Path) -> None:
    frame = rows()
    frame.loc[480:, "color"] = "only later"
    frame.loc[480:, "x"] = 1e9
    config = replace(data_set(tmp_path / "source", frame), split=Split(order="given"))
    statistics = prepare(config, tmp_path / "runs").transform.statistics
    assert "only later" not in statistics.categorical[0].vocabulary
    assert statistics.numeric[0].mean < 1


def test_a_change_of_source_schema_or_protocol_is_prepared_anew(tmp_path: Path) -> None:
    config = data_set(tmp_path / "source", rows())
    first = prepare(config, tmp_path / "runs")
    assert prepare(config, tmp_path / "runs").folder == first.folder
    folders = {first.folder, prepare(replace(config, split=Split(seed=1)), tmp_path / "runs").folder}
    folders.add(prepare(data_set(tmp_path / "source", rows(601)), tmp_path / "runs").folder)
    changed = SCHEMA | {"group": None}
    folders.add(prepare(data_set(tmp_path / "source", rows(), changed), tmp_path / "runs").folder)
    assert len(folders) == 4


def test_every_kind_is_prepared_in_pieces_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = prepare_module.plan_chunks
    monkeypatch.setattr(prepare_module, "plan_chunks", lambda config, schema: plan(config, schema, chunk_rows=70))
    r = np.random.default_rng(1)
    tags = [r.choice(list("abcdef"), r.integers(0, 4)).tolist() for _ in range(600)]
    frame = rows().assign(tags=tags, path=["/".join(t) for t in tags], v=list(r.normal(size=(600, 2))), z=r.normal(5, 3, 600))
    frame["size"] = r.integers(1, 5, 600)
    schema = {
        "features": [
            {"name": "color", "kind": "hashed", "buckets": 30},
            {"name": "size", "kind": "categorical"},
            {"name": "both", "kind": "cross", "of": ["color", "size"], "buckets": 30},
            {"name": "tags", "kind": "multi"},
            {"name": "path", "kind": "sequence", "separator": "/", "max_length": 2},
            {"name": "v", "kind": "embedding", "dim": 2},
        ],
        "tasks": [
            {"name": "click", "label": "clicked == 1"},
            {"name": "z", "label": "z", "kind": "regression"},
            {"name": "o", "label": "user", "kind": "ordinal", "levels": ["a", "b", "c"]},
        ],
    }
    data = prepare(data_set(tmp_path / "source", frame, schema), tmp_path / "runs")
    order = np.random.default_rng(0).permutation(600)
    for part, index in (("train", order[:480]), ("test", order[540:])):
        raw = pa.Table.from_pandas(frame.iloc[np.sort(index)], preserve_index=False)
        expected, got = data.transform(raw), list(ordered_rows(data, part))
        assert np.array_equal(np.concatenate([g.inputs.ids for g in got], 1), expected.ids)
        assert np.array_equal(np.concatenate([g.inputs.dense for g in got], 1), expected.dense)
        for n, jagged in enumerate(expected.lists):
            assert np.array_equal(np.concatenate([g.inputs.lists[n].values for g in got]), jagged.values)
            lengths = np.concatenate([np.diff(g.inputs.lists[n].offsets) for g in got])
            assert np.array_equal(lengths, np.diff(jagged.offsets))
    train = frame.iloc[order[:480]]
    click, z, o = data.transform.statistics.targets
    assert click.counts[1] == (train["clicked"] == 1).sum()
    assert (z.rows, z.mean, z.std) == (
        480,
        pytest.approx(train["z"].mean(), rel=1e-6),
        pytest.approx(train["z"].std(ddof=0), rel=1e-6),
    )
    assert o.counts == tuple((train["user"] == name).sum() for name in "abc")
    positives = {(c.task, c.part): c.positive for c in data.manifest.counts}
    assert positives["z", "train"] is positives["o", "test"] is None
    assert positives["click", "train"] == click.counts[1]


def test_a_list_in_one_file_and_text_in_another(tmp_path: Path) -> None:
    # Mixed types in one column: what both files say in one form is taken, what they don't is named.
    schema = {"features": [{"name": "tags", "kind": "multi"}], "tasks": SCHEMA["tasks"]}
    config = data_set(tmp_path / "source", rows().assign(tags=[[1, 2]] * 600), schema)
    again = rows().assign(tags=[["1", "two"]] * 600)
    again.to_parquet(tmp_path / "source" / "second.parquet")
    data = prepare(config, tmp_path / "runs")
    assert set(data.transform.statistics.categorical[0].vocabulary) == {"1", "2", "two"}
    again.assign(tags="1").to_parquet(tmp_path / "source" / "second.parquet")
    with pytest.raises(UserError, match="column 'tags' holds text, not lists"):
        prepare(config, tmp_path / "runs")


def infinite_label(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    return frame.assign(clicked=np.where(np.arange(len(frame)) == 7, np.inf, frame["clicked"]))


def all_one_class(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    return frame.assign(clicked=1.0)


def empty_mask(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["tasks"][0]["mask"] = 'color == "mauve"'
    return frame


def missing_label(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    return frame.drop(columns="clicked")


def unknown_feature(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["features"][1]["name"] = "colour"
    return frame


def string_in_numeric(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    return frame.assign(x=frame["x"].astype(object).where(frame.index != 5, "five").astype(str))


def no_rows(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    return frame.iloc[:0]


def label_as_input(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["features"].append({"name": "clicked", "kind": "numeric"})
    return frame


def timestamp_feature(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["features"][1] = {"name": "at", "kind": "categorical"}
    return frame.assign(at=pd.Timestamp("2022-04-08", tz="Asia/Shanghai"))


def ragged_embedding(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["features"].append({"name": "v", "kind": "embedding", "dim": 2})
    return frame.assign(v=[[1.0, 2.0]] * 599 + [[1.0]])


def infinite_value_of_a_row_that_is_tested(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    last = np.random.default_rng(0).permutation(len(frame))[-1]  # which statistics are not fitted on
    return frame.assign(x=frame["x"].where(frame.index != last, np.inf))


def text_among_labels(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    return frame.assign(clicked=frame["clicked"].astype(str).where(frame.index != 5, "yes"))


def single_values_for_lists(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["features"][1] |= {"kind": "multi"}
    return frame


def undeclared_class(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["tasks"] = [{"name": "user", "label": "user", "kind": "multiclass", "classes": ["a", "b"]}]
    del schema["group"]
    return frame


def class_that_never_varies(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["tasks"] = [{"name": "k", "label": "k", "kind": "multiclass", "classes": ["a", "b"]}]
    return frame.assign(k="b")


def number_that_never_varies(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["tasks"] = [{"name": "n", "label": "n", "kind": "regression"}]
    return frame.assign(n=0.1)


def column_named_twice(frame: pd.DataFrame, schema: dict[str, Any]) -> pa.Table:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return table.append_column("x", table["x"])


def schema_of_another_data_set(frame: pd.DataFrame, schema: dict[str, Any]) -> pd.DataFrame:
    schema["features"] = [{"name": "age", "kind": "numeric"}, {"name": "race", "kind": "categorical"}]
    return frame


BAD = {
    timestamp_feature: r"column 'at' is timestamp.*Asia/Shanghai.*depends on its unit and time zone",
    ragged_embedding: r"'.*rows\.parquet': column 'v' holds a list of 1 numbers, but the embedding's dim is 2",
    infinite_value_of_a_row_that_is_tested: r"'.*rows\.parquet': column 'x' holds an infinite value",
    text_among_labels: r"'.*rows\.parquet': expression 'clicked == 1' can't be evaluated, since clicked is .* such as 'yes'",
    single_values_for_lists: "column 'color' holds text, not lists; declare the feature's separator",
    undeclared_class: "label 'user' of task 'user' gives 'c', which the task does not declare",
    class_that_never_varies: "task 'k' has only class b in its 480 training rows",
    number_that_never_varies: "task 'n' has only one value in its 480 training rows",
    column_named_twice: "column 'x' stands in",
    schema_of_another_data_set: "feature column 'age' is not in",
    infinite_label: r"'.*rows\.parquet': label column 'clicked' of task 'click' holds an infinite value in 1 rows; use null",
    all_one_class: "task 'click' has only class 1 in its 480 training rows",
    empty_mask: "task 'click' has no row left among the 480 training rows",
    missing_label: "label column 'clicked' is not in",
    unknown_feature: "feature column 'colour' is not in .*did you mean 'color'",
    string_in_numeric: "column 'x' is numeric in the schema but holds 'five'",
    no_rows: "is empty; write at least one row",
    label_as_input: "column 'clicked' can't be a feature: it is read by the label of task 'click'",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_input_is_told_in_one_sentence(spoil: Any, tmp_path: Path) -> None:
    schema = yaml.safe_load(yaml.safe_dump(SCHEMA))
    spoilt = spoil(rows(), schema)
    config = data_set(tmp_path / "source", rows(), schema)
    table = spoilt if isinstance(spoilt, pa.Table) else pa.Table.from_pandas(spoilt, preserve_index=False)
    pq.write_table(table, tmp_path / "source" / "rows.parquet")
    with pytest.raises(UserError, match=BAD[spoil]) as error:
        prepare(config, tmp_path / "runs")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "runs").rglob("*.arrow"))


@pytest.mark.parametrize("keep", [0, 0.5])
def test_an_empty_or_truncated_file_is_named(keep: float, tmp_path: Path) -> None:
    config = data_set(tmp_path / "source", rows())
    path = tmp_path / "source" / "rows.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match="is empty" if keep == 0 else "is not a whole Parquet file") as error:
        prepare(config, tmp_path / "runs")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_damaged_shard_is_refused(harm: str, tmp_path: Path) -> None:
    config = data_set(tmp_path / "source", rows())
    shard = next(prepare(config, tmp_path / "runs").folder.glob("train-*.arrow"))
    if harm == "missing":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    sentence = "is missing" if harm == "missing" else "does not match the checksum"
    with pytest.raises(UserError, match=f"{shard.name}.*{sentence}.*prepare the data again"):
        prepare(config, tmp_path / "runs")
    # The remedy that it names works.
    assert prepare(config, tmp_path / "runs", force=True).manifest.rows("train") == 480


def test_a_full_disk_is_told_and_a_rerun_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path / "source", rows())
    runs = tmp_path / "runs"

    def full(path: Path, *rest: Any) -> Any:
        path.write_bytes(b"half")  # and then the kernel's own refusal
        with open("/dev/full", "wb") as disk:
            disk.write(b"x")

    monkeypatch.setattr(
        prepare_module, "_map_chunks", lambda chunks, work, progress: [json.loads(json.dumps(work(chunk))) for chunk in chunks]
    )
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_shard", full)
        sentence = r"the disk is full at '.*prepared', where [\d,]+ MB are free; free some space, or choose another runs_dir"
        with pytest.raises(UserError, match=sentence):
            prepare(config, runs)
    assert not list((runs / "prepared").iterdir())
    assert prepare(config, runs).manifest.rows("train") == 480


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(UserError, match="can't be written"):
        prepare(data_set(tmp_path / "source", rows()), tmp_path / "runs")


@pytest.mark.long
def test_ten_thousand_columns(tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    columns = {f"c{n}": r.integers(0, 20, 2000) for n in range(5000)} | {f"x{n}": r.normal(size=2000) for n in range(5000)}
    kinds = [{"name": name, "kind": "categorical" if name[0] == "c" else "numeric"} for name in columns]
    frame = pd.DataFrame(columns | {"clicked": r.integers(0, 2, 2000)})
    config = data_set(tmp_path / "source", frame, {"features": kinds, "tasks": SCHEMA["tasks"]})
    start = time.monotonic()
    data = prepare(config, tmp_path / "runs")
    trainer = Trainer(data, MMoEConfig(), TrainConfig(epochs=1, batch_size=512))
    assert trainer.fit().epochs == 1
    assert time.monotonic() - start < 300


def test_transformers_imports_inside_a_ray_task() -> None:
    # Ray puts the directory that it is started from, here the checkout, on its workers' path unless that is seen to.
    import ray

    @ray.remote
    def imports() -> tuple[bool, list[str]]:
        import sys

        import transformers

        assert transformers.PreTrainedModel
        return "kernels" in sys.modules, sys.path

    found, paths = ray.get(imports.remote())
    assert not found
    assert str(ROOT) not in paths
