"""Going on with a trained model: old ids keep their rows and scores, new ones get rows, and what does not fit is refused."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_moe.bundle import ADAGRAD_FILE, FORMAT, BundleConfig, save_bundle
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.predictor import Predictor
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig, Trainer, evaluate
from recsys_moe.warm_start import StartBundle

MMOE = MMoEConfig(embedding_dim=4, num_experts=3, expert_dims=(8,), tower_dims=(4,), dropout=0.3)
CONFIG = TrainConfig(epochs=2, batch_size=128, patience=0)


def save(trainer: Trainer, folder: Path) -> Path:
    data = DataConfig(name="clicks", source="nowhere", schema="-")
    described = BundleConfig(FORMAT, MMOE, "fp32", data, "0" * 64)
    save_bundle(folder, trainer.whole_weights(), described, trainer.data.transform, {}, trainer.whole_adagrad())
    return folder


def with_violet(table: pa.Table, every: int = 4) -> pa.Table:
    """Rows of another day: some things have a colour that was never seen before."""
    colours = ["violet" if n % every == 0 else old for n, old in enumerate(table["colour"].to_pylist())]
    return table.set_column(0, "colour", pa.array(colours))


@pytest.fixture
def champion(prepared_clicks: Any, tmp_path: Path) -> StartBundle:
    trainer = Trainer(prepared_clicks, MMOE, CONFIG)
    trainer.fit()
    return StartBundle(save(trainer, tmp_path / "champion"))


@pytest.fixture
def tuesday(champion: StartBundle, tmp_path: Path, write_prepared: Any, clicks_schema: Any, clicks: Any) -> Any:
    parts = {part: [with_violet(clicks(rows, seed))] for part, rows, seed in (("train", 900, 11), ("validation", 400, 12))}
    return write_prepared(tmp_path / "tuesday", clicks_schema, parts, champion.statistics)


def test_a_vocabulary_grows_at_its_end_and_the_rest_stays(champion: StartBundle, tuesday: Any, clicks: Any) -> None:
    before, after = champion.statistics, tuesday.transform.statistics
    assert after.categorical[0].vocabulary == (*before.categorical[0].vocabulary, "violet")
    assert (after.numeric, after.targets) == (before.numeric, before.targets)


def test_without_a_step_old_rows_score_as_before_bit_for_bit(
    champion: StartBundle, tuesday: Any, clicks: Any, tmp_path: Path
) -> None:
    trainer = Trainer(tuesday, MMOE, CONFIG, start=champion)
    rows = clicks(500, 7)
    grown = Predictor(save(trainer, tmp_path / "grown"))
    np.testing.assert_array_equal(grown.score(rows), Predictor(champion.folder).score(rows))
    table = grown.bundle.model.state_dict()["embeddings.embedding_bags.colour.weight"]
    assert table.shape[0] == len(champion.statistics.categorical[0].vocabulary) + 3
    assert table[-1].any()
    assert not trainer.model.adagrad()["embeddings.embedding_bags.colour.weight"][-1].any()
    assert trainer.model.adagrad()["embeddings.embedding_bags.colour.weight"][2:-1].all()


def test_before_is_what_the_champion_itself_makes_of_the_new_rows(champion: StartBundle, tuesday: Any, clicks: Any) -> None:
    told: list[dict[str, Any]] = []
    trainer = Trainer(tuesday, MMOE, replace(CONFIG, epochs=1), told.append, start=champion)
    table = trainer.model.state_dict()["embeddings.embedding_bags.colour.weight"]
    drawn = table.clone()
    trainer._measure(champion)
    torch.testing.assert_close(table, drawn, rtol=0, atol=0)  # new ids train from fresh rows all the same
    rows = with_violet(clicks(400, 12))  # a quarter of them unknown to the champion
    expected = Predictor(champion.folder).evaluate([rows])
    assert told[0]["before"] == {task: asdict(measured) for task, measured in expected.items()}
    # If no epoch is better, what is kept is the champion, on new ids too.
    trainer.model.load_state_dict(trainer.best_weights)
    assert evaluate(trainer.model, tuesday, "validation") == expected


def test_training_goes_on_from_what_was_learnt(champion: StartBundle, tuesday: Any) -> None:
    told: list[dict[str, Any]] = []
    first = Trainer(tuesday, MMOE, replace(CONFIG, lr=1e-3), told.append, start=champion)
    result = first.fit()
    assert told[0]["kind"] == "before"
    losses = [event["train.loss"] for event in told if event["kind"] == "epoch"]
    assert losses[0] < 0.9 * fresh_loss(tuesday)
    assert result.best_quality >= told[0]["before.mean_quality"]


def fresh_loss(data: Any) -> float:
    told: list[dict[str, Any]] = []
    Trainer(data, MMOE, replace(CONFIG, lr=1e-3, epochs=1), told.append).fit()
    return float(next(e for e in reversed(told) if e["kind"] == "epoch")["train.loss"])


def test_what_no_epoch_improves_is_kept(
    champion: StartBundle, tmp_path: Path, write_prepared: Any, clicks_schema: Any, clicks: Any
) -> None:
    wrong = clicks(900, 11)
    wrong = wrong.set_column(3, "click", pa.array(1 - wrong["click"].to_numpy()))
    wrong = wrong.set_column(4, "buy", pa.array(np.arange(900) % 2))
    data = write_prepared(
        tmp_path / "wrong", clicks_schema, {"train": [wrong], "validation": [clicks(400, 12)]}, champion.statistics
    )
    told: list[dict[str, Any]] = []
    trainer = Trainer(data, MMOE, CONFIG, told.append, start=champion)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    result = trainer.fit()
    assert (result.best_epoch, result.epochs) == (0, 2)
    assert any(event["kind"] == "warning" and "its weights are kept" in event["message"] for event in told)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_an_interrupted_training_that_went_on_goes_on_to_the_same_bits(
    champion: StartBundle, tuesday: Any, tmp_path: Path
) -> None:
    config = replace(CONFIG, checkpoint_steps=3)
    whole = Trainer(tuesday, MMOE, config, start=champion)
    whole.fit()

    class Killed(Exception):
        pass

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint":
            raise Killed

    with pytest.raises(Killed):  # within the first epoch: the best so far is what training started from
        Trainer(tuesday, MMOE, config, kill, Checkpoints(tmp_path / "state"), champion).fit()
    told: list[dict[str, Any]] = []
    again = Trainer(tuesday, MMOE, config, told.append, Checkpoints(tmp_path / "state"), champion)
    assert again.step == 3
    assert again.progress.best is not None
    again.fit()
    assert not any(event["kind"] == "before" for event in told)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_another_schema_or_model_is_refused_by_its_first_difference(champion: StartBundle, tuesday: Any) -> None:
    with pytest.raises(UserError, match=r"model\.num_experts is 4, but the model to start from has 3"):
        Trainer(tuesday, replace(MMOE, num_experts=4), CONFIG, start=champion)
    sentence = r"train\.precision is 'bf16', but the model to start from has 'fp32'; set train\.precision=fp32"
    with pytest.raises(UserError, match=sentence):
        Trainer(tuesday, MMOE, replace(CONFIG, precision="bf16"), start=champion)
    schema = champion.schema
    fewer = replace(schema, tasks=schema.tasks[:1])
    with pytest.raises(UserError, match=r"schema\.tasks is \['click'\], but the model to start from has \['click', 'buy'\]"):
        champion.check_schema(fewer)
    many = [replace(schema.features[0], name=f"f{n}") for n in range(40)]
    sentence = r"schema\.features is \['f0', 'f1', .*'f5', …\], but the model to start from has \['colour', 'price'\];"
    with pytest.raises(UserError, match=sentence):
        champion.check_schema(replace(schema, features=tuple(many)))
    other = replace(schema, features=(schema.features[0], replace(schema.features[1], buckets=5)))
    with pytest.raises(UserError, match=r"schema\.features\.price\.buckets is 5, but the model to start from has 4"):
        champion.check_schema(other)


def test_a_damaged_or_foreign_bundle_is_refused(champion: StartBundle, tuesday: Any, tmp_path: Path) -> None:
    weights = champion.folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        Trainer(tuesday, MMOE, CONFIG, start=champion)
    weights.write_bytes(whole)
    with pytest.raises(UserError, match=r"is not a bundle: it has no config\.json"):
        StartBundle(tmp_path)


def test_sums_that_a_bundle_lacks_start_anew_and_that_is_told(champion: StartBundle, tuesday: Any) -> None:
    told: list[dict[str, Any]] = []
    Trainer(tuesday, MMOE, replace(CONFIG, epochs=1), told.append, start=champion).fit()
    assert not any(event["kind"] == "warning" for event in told)
    (champion.folder / ADAGRAD_FILE).unlink()  # made by hand, or by an older version
    trainer = Trainer(tuesday, MMOE, replace(CONFIG, epochs=1), told.append, start=champion)
    assert not any(sums.any() for sums in trainer.model.adagrad().values())
    trainer.fit()
    (warning,) = [event["message"] for event in told if event["kind"] == "warning"]
    assert f"'{champion.folder}' has no adagrad.safetensors: the embeddings' Adagrad sums start anew" in warning


def test_new_ids_have_their_own_rows_again_whatever_happens(champion: StartBundle, tuesday: Any) -> None:
    model = Trainer(tuesday, MMOE, CONFIG, start=champion).model
    table = model.state_dict()["embeddings.embedding_bags.colour.weight"]
    drawn = table.clone()

    def fail() -> None:
        with champion.new_ids_unknown(model):
            assert torch.equal(table[-1], table[1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(table, drawn)
