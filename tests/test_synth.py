"""The synthetic feed: frozen, the same whatever its length, and as hard as it says."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import sklearn.metrics

from recsys_moe import synth
from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.metrics import expected_calibration_error
from recsys_moe.schema import load_schema
from recsys_moe.synth import World, digest_block, draw_block, load_synth_config, read_summary, read_truth, synthesise

# Figures of different models are compared on this feed: a change here makes all older ones worthless. Version it instead.
DIGEST_OF_20_000_ROWS_AT_SEED_0 = "c334cb5c65c31c921039c52d3352f97988c34a9d44555420eb2995c176a9edcd"

RATES = {
    "effective_view": 0.50,
    "long_view": 0.30,
    "finish": 0.18,
    "replay": 0.05,
    "like": 0.06,
    "profile_enter": 0.03,
    "comment": 0.015,
    "follow": 0.008,
    "forward": 0.005,
    "purchase": 0.003,
}
TASKS = list(RATES)


@pytest.fixture(scope="module")
def world() -> World:
    return World(load_synth_config(), 0)


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120,000 rows at seed 0: two blocks, the second one cut."""
    folder = tmp_path_factory.mktemp("synth") / "feed"
    synthesise(folder, 120_000, seed=0)
    return folder


def logs(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / "logs").glob("*.parquet"))])


def test_the_first_rows_are_frozen(world: World) -> None:
    digest = hashlib.sha256()
    digest_block(digest, draw_block(world, 0, 0, 20_000))
    assert digest.hexdigest() == DIGEST_OF_20_000_ROWS_AT_SEED_0


def test_the_summarys_digest_is_that_of_the_rows(tmp_path: Path) -> None:
    summary = synthesise(tmp_path / "feed", 20_000, seed=0)
    assert summary["digest"] == DIGEST_OF_20_000_ROWS_AT_SEED_0
    assert read_summary(tmp_path / "feed") == summary
    assert (summary["version"], summary["seed"], summary["rows"]) == ("short_video-1", 0, 20_000)


@pytest.mark.parametrize("rows", [1, 5000, 65_536, 65_537, 70_000])
def test_fewer_rows_are_the_beginning_of_more(feed: Path, tmp_path: Path, rows: int) -> None:
    synthesise(tmp_path / "short", rows, seed=0)
    assert logs(tmp_path / "short").equals(logs(feed).slice(0, rows))
    assert read_truth(tmp_path / "short").equals(read_truth(feed).slice(0, rows))


def test_another_seed_is_another_world(tmp_path: Path) -> None:
    first, other = (synthesise(tmp_path / str(seed), 1000, seed)["digest"] for seed in (0, 1))
    assert first != other


def test_the_feed_fits_the_shipped_schema(feed: Path) -> None:
    schema = load_schema(conf_dir() / "schema" / "short_video.yaml")
    table = logs(feed)
    assert set(schema.columns) <= set(table.column_names)
    assert list(schema.task_names) == TASKS
    assert {t.name: t.category for t in schema.tasks} == {t.name: t.category for t in load_synth_config().tasks}
    # One value of several a row: the multi-valued feature.
    assert pa.types.is_list(table.schema.field("tags").type)
    assert 1 <= min(map(len, table["tags"].to_pylist())) < max(map(len, table["tags"].to_pylist())) <= 5


def test_rows_are_in_time_order(feed: Path) -> None:
    assert (np.diff(logs(feed)["time_s"].to_numpy()) >= 0).all()


def test_labels_are_missing_exactly_where_documented(feed: Path) -> None:
    frame = logs(feed).to_pandas()
    offline = frame["network"] == "offline"
    assert 0.02 < offline.mean() < 0.06
    for task in ("long_view", "finish", "replay"):  # playback reports get lost offline
        assert frame[task].isna().equals(offline)
    assert frame["purchase"].isna().equals(~frame["is_shop"].astype(bool))  # purchases exist on shop items only
    assert frame["follow"].isna().mean() == pytest.approx(0.1, abs=0.005)  # of somebody already followed
    for task in ("effective_view", "like", "profile_enter", "comment", "forward"):
        assert frame[task].notna().all()
    assert set(frame[TASKS].stack().dropna().unique()) == {0, 1}
    # A new item has no click-through rate on record yet: null, not NaN, so that it reads as missing everywhere.
    ctr = logs(feed)["item_ctr"]
    assert 0 < ctr.null_count < len(frame) / 2
    assert not pc.any(pc.is_nan(ctr)).as_py()


def test_rates_go_from_half_to_three_in_a_thousand(feed: Path) -> None:
    for task, values in read_summary(feed)["tasks"].items():
        # 120,000 rows see the same few hundred popular items again and again: wider than the binomial error.
        assert values["rate"] == pytest.approx(RATES[task], rel=0.15), task


def test_labels_are_drawn_with_the_true_probabilities(feed: Path) -> None:
    table, truth = logs(feed).to_pandas(), read_truth(feed).to_pandas()
    assert len(table) == len(truth) == 120_000
    for task in TASKS:
        seen = table[task].notna().to_numpy()
        p, y = truth[task].to_numpy(float)[seen], table[task].to_numpy(float)[seen]
        standard_error = np.sqrt((p * (1 - p)).sum())
        assert abs(y.sum() - p.sum()) < 4 * standard_error, task
        # A truth in another order than the rows would miss by the spread of p.
        assert expected_calibration_error(p, y) < 4 * standard_error / len(p) + 1e-3, task


def test_best_auc_is_that_of_the_true_probabilities(feed: Path) -> None:
    table, truth, summary = logs(feed).to_pandas(), read_truth(feed).to_pandas(), read_summary(feed)
    for task in TASKS:
        seen = table[task].notna()
        reference = sklearn.metrics.roc_auc_score(table[task][seen], truth[task][seen])
        assert summary["tasks"][task]["best_auc"] == pytest.approx(reference, abs=1e-5), task
        assert summary["tasks"][task]["observed"] == seen.sum()
        assert summary["tasks"][task]["rate"] == pytest.approx(table[task][seen].mean())
        assert 0.7 < reference < 0.9  # neither noise nor a gift


def test_the_truth_is_not_in_the_logs(feed: Path) -> None:
    truth = read_truth(feed)
    assert truth.column_names == TASKS
    assert not any("prob" in name or "truth" in name for name in logs(feed).column_names)
    for task in TASKS:
        assert pa.types.is_integer(logs(feed).schema.field(task).type)


def test_files_are_cut_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "BLOCK_ROWS", 1000)
    monkeypatch.setattr(synth, "FILE_ROWS", 3000)
    told: list[int] = []
    synthesise(tmp_path / "many", 7500, 0, told.append)
    assert told == [1000, 2000, 3000, 4000, 5000, 6000, 7000, 7500]
    sizes = [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "many" / "logs").iterdir())]
    assert sizes == [3000, 3000, 1500]
    assert sizes == [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "many" / "truth").iterdir())]
    monkeypatch.setattr(synth, "FILE_ROWS", 100_000)
    synthesise(tmp_path / "one", 7500, 0)
    assert logs(tmp_path / "one").equals(logs(tmp_path / "many"))


def test_refuses_a_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine' exists already; name a new folder or delete it"):
        synthesise(tmp_path / "mine", 10, 0)
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't be written \(Not a directory\); choose another folder"):
        synthesise(tmp_path / "file" / "feed", 10, 0)


def test_an_interrupted_feed_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(tmp_path / "feed", 1000, 0, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_summary_is_json_with_numbers_that_a_reader_can_use(feed: Path) -> None:
    summary = json.loads((feed / "synth.json").read_text())
    assert set(summary) == {"version", "seed", "rows", "digest", "tasks"}
    assert list(summary["tasks"]) == TASKS
