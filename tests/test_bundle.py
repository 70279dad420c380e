"""The bundle: what training saved scores the same wherever it is loaded, and a damaged one says so."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from recsys_moe.bundle import FILES, FORMAT, Bundle, BundleConfig, save_bundle
from recsys_moe.errors import UserError
from recsys_moe.front import FrontConfig
from recsys_moe.models import MODELS as FAMILIES
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.models.stem import STEMConfig
from recsys_moe.predictor import Predictor, score_file
from recsys_moe.routing import sigmoid
from recsys_moe.shards import write_json
from recsys_moe.sources import DataConfig, read_rows
from recsys_moe.trainer import TrainConfig, Trainer, evaluate

CROSSED = FrontConfig(cross_layers=2, cross_rank=4, first_order=True)
MODELS = {
    "mmoe": MMoEConfig(embedding_dim=4, num_experts=3, expert_dims=(8,), tower_dims=(4,)),
    "shared_bottom": SharedBottomConfig(embedding_dim=4, bottom_dims=(8,), tower_dims=(4,)),
    "stem": STEMConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(4,), front=CROSSED),
}


def save(trainer: Trainer, folder: Path) -> Path:
    data = DataConfig(name="clicks", source="nowhere", schema="-")
    model = next(model for model in MODELS.values() if isinstance(trainer.model.network, FAMILIES[type(model)]))
    config = BundleConfig(FORMAT, model, trainer.config.precision, data, "0" * 64)
    save_bundle(folder, trainer.model.state_dict(), config, trainer.data.transform, {"test": {"click": {"auc": 0.5}}})
    return folder


@pytest.fixture
def train(prepared_clicks: Any) -> Callable[..., Trainer]:
    def run(name: str = "mmoe", precision: Any = "fp32") -> Trainer:
        trainer = Trainer(prepared_clicks, MODELS[name], TrainConfig(epochs=1, batch_size=256, precision=precision))
        trainer.fit()
        return trainer

    return run


@pytest.fixture
def bundle(train: Any, tmp_path: Path) -> Path:
    return save(train(), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "precision"), [("mmoe", "fp32"), ("mmoe", "bf16"), ("shared_bottom", "fp32"), ("stem", "fp32")]
)
def test_a_loaded_bundle_scores_bit_for_bit_the_same(
    train: Any, clicks: Any, tmp_path: Path, name: str, precision: str
) -> None:
    trainer, table = train(name, precision), clicks(200, 9)
    inputs = trainer.data.transform(table)
    trainer.model.eval()
    with torch.no_grad():
        logits, _ = trainer.model(torch.from_numpy(inputs.ids).t(), torch.from_numpy(inputs.dense).t().contiguous())
    scores = Predictor(save(trainer, tmp_path / "bundle")).score(table)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, sigmoid(logits).numpy().T)
    predictor = Predictor(tmp_path / "bundle")
    assert np.array_equal(np.concatenate([predictor.score(table.slice(n, 1)) for n in range(20)], 1), scores[:, :20])


def test_what_was_saved_is_loaded(train: Any, tmp_path: Path) -> None:
    trainer = train()
    loaded = Bundle(save(trainer, tmp_path / "bundle"))
    assert loaded.schema == trainer.data.schema
    assert loaded.transform.statistics == trainer.data.transform.statistics
    assert loaded.config.model == MODELS["mmoe"]
    assert loaded.metrics == {"test": {"click": {"auc": 0.5}}}
    assert not loaded.model.training
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_evaluation_of_raw_rows_is_that_of_training(train: Any, clicks: Any, tmp_path: Path) -> None:
    trainer = train()
    raw = clicks(400, 3)
    offline = Predictor(save(trainer, tmp_path / "bundle")).evaluate([raw.slice(0, 7), raw.slice(7)])
    online = evaluate(trainer.model, trainer.data, "validation")
    for task, metrics in online.items():
        for field in ("auc", "gauc", "logloss", "ne", "calibration", "ece", "rows"):
            assert getattr(offline[task], field) == pytest.approx(getattr(metrics, field), abs=1e-6), (task, field)


def test_only_json_and_safetensors_and_no_pickle(bundle: Path, clicks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.name for path in bundle.iterdir()} == set(FILES)
    for path in bundle.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"
            safetensors.torch.load_file(path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading a bundle must not unpickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    Predictor(bundle).score(clicks(3))


def test_saving_replaces_an_older_bundle_whole(train: Any, bundle: Path) -> None:
    (bundle / "left over").touch()
    save(train(), bundle)
    assert {path.name for path in bundle.iterdir()} == set(FILES)
    assert not [path for path in bundle.parent.iterdir() if path.name.startswith("bundle.")]


def test_a_bundle_may_be_moved(bundle: Path, clicks: Any, tmp_path: Path) -> None:
    before = Predictor(bundle).score(clicks(20))
    moved = shutil.copytree(bundle, tmp_path / "elsewhere" / "b")
    shutil.rmtree(bundle)
    assert np.array_equal(Predictor(moved).score(clicks(20)), before)


# -- damage


def one_sentence(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Bundle(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert f"is not a bundle: it has no {name}; name the folder that training printed" in one_sentence(bundle)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "is not a bundle" in one_sentence(tmp_path / "absent")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda b: b[:-9],
    "cut to its start": lambda b: b[:20],
    "empty": lambda b: b"",
    "other bytes": lambda b: b"\xff\x00" * 50,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights(bundle: Path, damage: Callable[[bytes], bytes]) -> None:
    path = bundle / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = one_sentence(bundle)
    assert "model.safetensors' is damaged" in message
    assert "fetch or train the bundle again" in message


def test_pickled_weights_are_refused(bundle: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    (bundle / "model.safetensors").write_bytes(buffer.getvalue())
    assert "is damaged" in one_sentence(bundle)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_json(bundle: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = bundle / name
    path.write_bytes(damage(path.read_bytes()))
    assert f"{name}'" in one_sentence(bundle)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    write_json(path, data)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("config.json", lambda c: c["model"].update(num_experts=4), "does not fit config.json"),
        ("config.json", lambda c: c["model"].update(embedding_dim=8), "does not fit config.json"),
        ("config.json", lambda c: c["model"].update(norm="none"), "does not fit config.json"),
        ("config.json", lambda c: c["model"].update(expert_dims=[8, 8]), "does not fit config.json"),
        ("config.json", lambda c: c.update(model={"name": "shared_bottom"}), "does not fit config.json"),
        ("config.json", lambda c: c["model"].update(name="mmeo"), "'model.name' is 'mmeo'; did you mean 'mmoe'"),
        ("config.json", lambda c: c["model"].update(experts=4), "unknown key 'model.experts'"),
        ("config.json", lambda c: c.pop("precision"), "'precision' is missing"),
        ("config.json", lambda c: c.update(format=7), f"has bundle format 7, not {FORMAT}"),
        ("schema.json", lambda s: s["tasks"].pop(), "does not fit"),
        ("schema.json", lambda s: s["features"].pop(), "does not fit"),
        ("schema.json", lambda s: s["features"].append({"name": "size", "kind": "numeric"}), "'size'"),
        ("schema.json", lambda s: s["features"].append({"name": "shop", "kind": "categorical"}), "'shop'"),
        ("statistics.json", lambda s: s["categorical"][0]["vocabulary"].append("pink"), "does not fit"),
        ("statistics.json", lambda s: s["numeric"].clear(), "'price'"),
        ("statistics.json", lambda s: s["numeric"][0]["boundaries"].pop(), "does not fit"),
    ],
)
def test_files_that_do_not_fit_together(bundle: Path, name: str, change: Callable[[Any], None], sentence: str) -> None:
    edit(bundle / name, change)
    assert sentence in one_sentence(bundle)


# -- scoring files


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_file_is_scored_row_for_row(bundle: Path, clicks: Any, tmp_path: Path, suffix: str) -> None:
    # Without label columns: to score, nobody knows them yet.
    table = clicks(300, 8).select(["price", "colour"])
    source, target = tmp_path / f"in.{suffix}", tmp_path / "out.parquet"
    if suffix == "csv":
        pyarrow.csv.write_csv(table, source)
    else:
        pq.write_table(table, source, row_group_size=70)
    assert score_file(bundle, source, target) == 300
    got = pq.read_table(target)
    assert got.schema == pa.schema([("click", pa.float32()), ("buy", pa.float32())])
    expected = Predictor(bundle).score(table)
    assert np.stack([got["click"], got["buy"]]) == pytest.approx(expected, abs=1e-6)


def test_a_failed_scoring_keeps_the_older_output(bundle: Path, clicks: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    target.write_text("older")
    table = clicks(50)
    bad = table.set_column(table.column_names.index("price"), "price", [pa.array([float("inf")] * 50)])
    pq.write_table(bad, source)
    with pytest.raises(UserError, match="'price' holds an infinite value"):
        score_file(bundle, source, target)
    assert target.read_text() == "older"
    assert not list(tmp_path.glob(".out*"))


def test_the_input_is_never_overwritten(bundle: Path, clicks: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(clicks(5), source)
    before = source.read_bytes()
    (tmp_path / "soft.parquet").symlink_to(source)
    (tmp_path / "hard.parquet").hardlink_to(source)
    (tmp_path / "folder").symlink_to(tmp_path)
    for target in (source, tmp_path / "soft.parquet", tmp_path / "hard.parquet", tmp_path / "folder" / "in.parquet"):
        with pytest.raises(UserError, match=r"OUT '.*' is the file that is to be scored; choose another OUT"):
            score_file(bundle, source, target)
        assert source.read_bytes() == before


@pytest.mark.parametrize("name", [".", "..", "folder", "/"])
def test_an_output_that_is_a_folder(
    bundle: Path, clicks: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    pq.write_table(clicks(5), "in.parquet")
    with pytest.raises(UserError, match=f"OUT '{name}' is a folder; name a Parquet file to write"):
        score_file(bundle, Path("in.parquet"), Path(name))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_file_without_rows_cannot_be_evaluated(bundle: Path, clicks: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"zero.{suffix}"
    (pyarrow.csv.write_csv if suffix == "csv" else pq.write_table)(clicks(0), path)
    predictor = Predictor(bundle)
    with pytest.raises(UserError, match=f"zero.{suffix}' is empty; write at least one row"):
        predictor.evaluate(read_rows(path, predictor.bundle.schema))


def test_an_output_that_cannot_be_written(bundle: Path, clicks: Any, tmp_path: Path) -> None:
    pq.write_table(clicks(5), tmp_path / "in.parquet")
    with pytest.raises(UserError, match=r"absent/out.parquet' can't be written .*; choose another OUT"):
        score_file(bundle, tmp_path / "in.parquet", tmp_path / "absent" / "out.parquet")
