"""The demo's own decisions; its road is the one that test_road.py walks."""

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_moe import demo
from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.schema import load_schema
from recsys_moe.synth import load_synth_config, synthesise


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the demo would have run."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "_run", lambda commands_, *arguments: commands.append(arguments))
    return commands


def feed_of(folder: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True)
    found = {"version": load_synth_config().version, "rows": 20_000, "seed": 0, "tasks": {}} | keys
    (folder / "synth.json").write_text(json.dumps(found))
    return folder


def test_a_feed_of_the_asked_size_is_kept(tmp_path: Path, ran: list[tuple[str, ...]]) -> None:
    feed = feed_of(tmp_path / "feed")
    demo._make_feed([], feed, 20_000)
    assert ran == []
    assert (feed / "synth.json").exists()


@pytest.mark.parametrize("other", [{"rows": 30_000}, {"version": "short_video-0"}, {"seed": 1}], ids=str)
def test_another_feed_is_replaced(tmp_path: Path, ran: list[tuple[str, ...]], other: dict[str, Any]) -> None:
    feed = feed_of(tmp_path / "feed", **other)
    demo._make_feed([], feed, 20_000)
    assert not feed.exists()
    assert ran == [("data", "synth", str(feed), "--rows", "20000", "--seed", "0")]


def test_a_folder_that_is_no_feed_is_not_deleted(tmp_path: Path, ran: list[tuple[str, ...]]) -> None:
    (tmp_path / "feed").mkdir()
    (tmp_path / "feed" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"feed' is not a synthetic feed; .* --folder"):
        demo._make_feed([], tmp_path / "feed", 20_000)
    assert (tmp_path / "feed" / "diary.txt").exists()


def result(validation: list[float | None], test: list[float | None]) -> dict[str, Any]:
    return {part: {f"task{n}": {"auc": auc} for n, auc in enumerate(aucs)} for part, aucs in locals().items()}


def test_the_better_model_is_chosen_on_the_validation_part() -> None:
    # The test part prefers the other one: it must not be asked.
    results = {"shared_bottom": result([0.7, 0.8, None], [0.6, 0.6, 0.6]), "mmoe": result([0.7, 0.7, None], [0.9, 0.9, 0.9])}
    assert demo._better(results) == "shared_bottom"


def test_the_request_is_a_row_that_every_task_observes_without_its_labels(tmp_path: Path) -> None:
    synthesise(tmp_path / "feed", 500, 0)
    schema = load_schema(conf_dir() / "schema" / "short_video.yaml")
    row = demo._request_row(tmp_path / "feed", schema)
    assert set(row) == set(schema.feature_columns)
    json.dumps(row)
    logs = pq.read_table(tmp_path / "feed" / "logs").to_pylist()
    (position,) = [n for n, r in enumerate(logs) if all(r[c] == v for c, v in row.items())]
    observed = [all(r[t] is not None for t in schema.task_names) for r in logs]
    assert observed[position]
    assert not any(observed[:position])
    assert not observed[0]  # or this test would show nothing


def test_a_feed_without_such_a_row_still_gives_one(tmp_path: Path) -> None:
    synthesise(tmp_path / "feed", 500, 0)
    schema = load_schema(conf_dir() / "schema" / "short_video.yaml")
    (file,) = (tmp_path / "feed" / "logs").glob("*.parquet")
    table = pq.read_table(file)
    at = table.column_names.index("purchase")
    pq.write_table(table.set_column(at, "purchase", pa.nulls(table.num_rows, pa.int8())), file)
    assert set(demo._request_row(tmp_path / "feed", schema)) == set(schema.feature_columns)


def test_the_commands_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stdout = 0, "progress\n{}\n"

    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: Done)
    commands: list[str] = []
    arguments = ("train", "runs_dir=my runs", "data.tasks=[like,follow]", "a'b")
    demo._run(commands, *arguments)
    assert shlex.split(commands[0]) == ["recsys-moe", *arguments]


def test_the_schema_has_no_feature_that_a_short_feed_does_not_vary() -> None:
    # Half a second a row: a million rows are less than six days, and the default demo is 28 hours.
    assert "weekday" not in load_schema(conf_dir() / "schema" / "short_video.yaml").feature_names
