"""Ids that have rows of their own: the policy against a dictionary, and a model that trains on more ids than it has rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys_moe import trainer as trainer_module
from recsys_moe.bundle import FORMAT, Bundle, BundleConfig, save_bundle
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.errors import UserError
from recsys_moe.front import FrontConfig
from recsys_moe.hashing import combine, hash_texts
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.stem import STEMConfig
from recsys_moe.own_rows import WAYS, OwnRows
from recsys_moe.pipelines.train import TrainJob, settle_model
from recsys_moe.predictor import Predictor
from recsys_moe.schema import Schema
from recsys_moe.shards import PreparedData
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig, Trainer, evaluate
from recsys_moe.transforms import Statistics, Transform
from recsys_moe.typed import dump, parse
from recsys_moe.warm_start import StartBundle

ROWS = 150  # three sets of 50
MODEL = MMoEConfig(embedding_dim=4, num_experts=2, expert_dims=(8,), tower_dims=(4,), dropout=0.2)
STEM = STEMConfig(embedding_dim=4, expert_dims=(32,), tower_dims=(16,), dropout=0.0)
CONFIG = TrainConfig(epochs=2, batch_size=128, patience=0, checkpoint_steps=5)


def schema(**user: Any) -> Schema:
    found: Schema = parse(
        Schema,
        {
            "features": [
                {"name": "user", "kind": "hashed", "buckets": ROWS, **user},
                {"name": "colour", "kind": "categorical"},
                {"name": "both", "kind": "cross", "of": ["colour", "user"], "buckets": 90},
            ],
            "tasks": [{"name": "click", "label": "click"}],
        },
        "schema",
    )
    return found


OWN = schema(collisions="none")


def draw(rows: int, seed: int) -> pa.Table:
    """Twenty users that come often and click or never do, and a thousand that come once or twice."""
    r = np.random.default_rng(seed)
    user = np.where(r.random(rows) < 0.5, r.integers(0, 20, rows), r.integers(20, 1020, rows))
    click = np.where(user < 20, user % 2, r.random(rows) < 0.5).astype(int)
    users = pa.array([f"u{n}" for n in user], mask=r.random(rows) < 0.05)
    return pa.table({"user": users, "colour": r.choice(["red", "green"], rows), "click": click})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_prepared: Any) -> PreparedData:
    parts = {"train": [draw(1200, 0), draw(800, 1)], "validation": [draw(400, 2)], "test": [draw(400, 3)]}
    prepared: PreparedData = write_prepared(tmp_path_factory.mktemp("own") / "prepared", OWN, parts)
    return prepared


@pytest.fixture(scope="module")
def trained(data: PreparedData) -> Trainer:
    trainer = Trainer(data, MODEL, CONFIG)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def bundle(trained: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "bundle"
    config = BundleConfig(FORMAT, MODEL, "fp32", DataConfig(name="own", source="nowhere", schema="-"), "0" * 64)
    save_bundle(folder, trained.model.state_dict(), config, trained.data.transform, {})
    return folder


# -- who has which row

Steps = st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12)


class Naive:
    """The policy of one set, id by id, in dictionaries."""

    def __init__(self, rows: int) -> None:
        self.slots: list[int | None] = [None] * rows
        self.count: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.step = 0

    def admit(self, ids: list[int]) -> list[int]:
        self.step += 1
        times = {i: ids.count(i) for i in ids if i}
        new = sorted((i for i in times if i not in self.slots), key=lambda i: (-times[i], i))
        for i in times:
            if i in self.slots:
                self.count[i] += times[i]
                self.seen[i] = self.step
        evicted = []
        for i in new:
            worth = {
                slot: 0.0 if old is None else float(np.float32(self.count[old]) / np.float32(self.step - self.seen[old] + 1))
                for slot, old in enumerate(self.slots)
                if old is None or self.seen[old] < self.step
            }
            if worth:
                slot = min(worth, key=lambda s: (worth[s], s))
                if self.slots[slot] is not None:
                    evicted.append(slot + 2)
                self.slots[slot], self.count[i], self.seen[i] = i, times[i], self.step
        return evicted

    def row(self, i: int) -> int:
        return 0 if i == 0 else self.slots.index(i) + 2 if i in self.slots else 1


@settings(max_examples=60, deadline=None)
@given(Steps, st.integers(1, 9))
def test_rows_go_to_whom_the_policy_says(steps: list[list[int]], rows: int) -> None:
    own, naive = OwnRows(rows), Naive(rows)
    for ids in steps:
        evicted = own.admit(torch.tensor(ids, dtype=torch.int64))
        assert sorted(evicted.tolist()) == sorted(naive.admit(ids))
        assert own(torch.arange(31)).tolist() == [naive.row(i) for i in range(31)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=80), max_size=6), st.integers(1, 3 * WAYS))
def test_no_two_ids_share_a_row(steps: list[list[int]], rows: int) -> None:
    own, met = OwnRows(rows), set[int]()
    for ids in steps:
        own.admit(torch.tensor(ids, dtype=torch.int64))
        met |= set(ids) - {0}
        found = own(torch.tensor(sorted(met), dtype=torch.int64))
        live = found[found > 1]
        assert len(live.unique()) == len(live) <= rows
        assert live.max().item() < rows + 2 if len(live) else True
        assert len(live) == (own.hashes != 0).sum()


def test_what_is_seen_often_stays_and_what_is_seen_once_goes() -> None:
    own = OwnRows(WAYS)
    often = torch.arange(1, 11)
    for step in range(50):
        once = torch.arange(WAYS) + 1000 + WAYS * step
        own.admit(torch.cat([often, often, once]))
    assert (own(often) > 1).all()
    assert (own.hashes != 0).all()
    assert (own(torch.arange(1000, 1000 + WAYS)) == 1).all()  # the first step's


# -- in tables


def test_hashes_arrive_whole() -> None:
    users, colours = ["u1", None, "u2"], ["red", "red", None]
    table = pa.table({"user": pa.array(users), "colour": pa.array(colours)})
    transform = Transform(OWN, Statistics((_vocabulary(),), ()))
    ids = torch.from_numpy(transform(table).ids).t()
    assert transform.sparse_names == ["colour", "both", "user"]
    assert transform.cardinalities == [3, 92, ROWS + 2]
    hashes = hash_texts(pa.array(users))
    assert ids[:, 2:].contiguous().view(torch.int64).squeeze(1).tolist() == hashes.astype(np.int64).tolist()
    both = combine([hash_texts(pa.array(colours)), hashes]) % np.uint64(90) + np.uint64(2)
    assert ids[:, 1].tolist() == [both[0], 0, 0]
    shared = Transform(schema(), Statistics((_vocabulary(),), ()))
    assert np.array_equal(shared(table).ids[2], ids[:, 1])  # a cross does not care


def _vocabulary() -> Any:
    from recsys_moe.transforms import CategoricalStatistics

    return CategoricalStatistics("colour", ("red",))


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (MODEL, "embeddings.embedding_bags.user"),
        (STEM, "embeddings.embedding_bags.user"),
        (STEM, "embeddings.embedding_bags.user of click"),
        (replace(MODEL, front=FrontConfig(first_order=True)), "first_order.embeddings.embedding_bags.user"),
    ],
    ids=["mmoe", "shared set", "task's set", "first order"],
)
def test_a_row_that_changes_hands_starts_anew(config: Any, table: str, data: PreparedData) -> None:
    trainer = Trainer(data, config, CONFIG)
    model, own = trainer.model.train(), trainer.model.own_rows["user"]
    tables = model.embeddings
    assert tables is not None

    def step(hashes: Tensor) -> None:
        halves = hashes.view(torch.int32).view(-1, 2)
        ids = torch.cat([torch.ones(len(hashes), 2, dtype=torch.int32), halves], 1)
        (model(ids, torch.empty(len(hashes), 0))[0] - 1).square().sum().backward()

    model.set_embedding_lr(0.5)
    model.set_first_order_lr(0.5)
    first = torch.arange(3, 3 * ROWS + 3, 3)  # all of set 0, which has 50 rows
    step(first[:50])
    name = f"{table}.weight"
    weight, sums = model.state_dict()[name], model.adagrad()[name]
    assert (sums[2:52] > 0).all()
    before, sums_before = weight.clone(), sums.clone()
    bound = (ROWS + 2) ** -0.5
    row = own(first[:1]).item()
    with torch.no_grad():
        weight[row] = 7.0
    model.eval()
    step(first[50:51])  # evaluation gives no rows
    assert own(first[50:51]).item() == 1
    model.train()
    ids = torch.cat([first[1:50], first[50:51]])  # the first one alone can go
    own.admit(ids[:49])
    halves = ids[49:].view(torch.int32).view(1, 2)
    with torch.no_grad():
        model(torch.cat([torch.ones(1, 2, dtype=torch.int32), halves], 1), torch.empty(1, 0))
    assert own(first[50:51]).item() == row
    assert own(first[:1]).item() == 1
    assert weight[row].abs().max() <= bound
    assert sums[row] == 0
    others = [r for r in range(2, 52) if r != row]
    assert torch.equal(weight[others], before[others])
    assert torch.equal(sums[others], sums_before[others])


def test_more_ids_than_rows_are_trained_on(trained: Trainer) -> None:
    own = trained.model.own_rows["user"]
    assert len(set(draw(1200, 0)["user"].to_pylist())) > 2 * ROWS
    assert (own.hashes != 0).all()
    often = torch.from_numpy(hash_texts(pa.array([f"u{n}" for n in range(20)])).astype(np.int64))
    assert (own(often) > 1).all()


def test_the_bundle_scores_as_training_did_and_unknown_ids_are_one(trained: Trainer, bundle: Path) -> None:
    assert {p.suffix for p in bundle.iterdir()} == {".json", ".safetensors"}
    loaded, kept = Bundle(bundle).model.state_dict(), trained.model.state_dict()
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    predictor, table = Predictor(bundle), draw(400, 3)
    first = predictor.score(table)
    assert np.array_equal(np.concatenate([predictor.score(table.slice(n, 1)) for n in range(60)], 1), first[:, :60])
    online = evaluate(trained.model, trained.data, "test")["click"]
    assert vars(predictor.evaluate([table])["click"]) == pytest.approx(vars(online), abs=1e-6, nan_ok=True)
    strangers = pa.table({"user": [f"new{n}" for n in range(500)], "colour": ["blue"] * 500})
    ids = torch.from_numpy(predictor.bundle.transform(strangers).ids).t()
    assert (predictor.bundle.model._rows_of(ids)[:, -1] == 1).all()
    predictor.score(strangers)
    assert all(torch.equal(value, kept[name]) for name, value in predictor.bundle.model.state_dict().items())


def test_a_resumed_training_ends_with_the_same_bits(data: PreparedData, trained: Trainer, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    first = Trainer(data, MODEL, CONFIG, checkpoints=Checkpoints(tmp_path / "state"))
    step = first._train_step

    def stopping(batch: Any) -> float:
        loss = step(batch)
        if first.step == 13:
            raise Stop
        return loss

    first._train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        first.fit()
    second = Trainer(data, MODEL, CONFIG, checkpoints=Checkpoints(tmp_path / "state"))
    assert second.step == 10
    second.fit()
    expected = trained.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())


def test_several_workers_are_refused(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"'user' has collisions: none, but there are 2 workers.*train\.workers=1"):
        Trainer(data, MODEL, CONFIG)


@pytest.mark.parametrize(("workers", "said"), [(2, "2"), ([1, 3], "up to 3")])
def test_several_workers_are_refused_before_preparation(tmp_path: Path, workers: Any, said: str) -> None:
    (tmp_path / "schema.yaml").write_text(json.dumps(dump(OWN)))
    config = DataConfig(name="own", source=str(tmp_path / "absent.parquet"), schema=str(tmp_path / "schema.yaml"))
    train = parse(TrainConfig, dump(CONFIG) | {"workers": workers}, "train")
    with pytest.raises(UserError, match=rf"has collisions: none, but there are {said} workers.*train\.workers=1"):
        settle_model(TrainJob(config, MODEL, train))


def test_another_word_is_refused() -> None:
    with pytest.raises(UserError, match=r"collisions.*'never'"):
        schema(collisions="never")


def test_another_day_goes_on_with_the_rows_that_were_given(
    trained: Trainer, bundle: Path, tmp_path: Path, write_prepared: Any
) -> None:
    start = StartBundle(bundle)
    day = write_prepared(tmp_path / "day", OWN, {"train": [draw(900, 7)], "validation": [draw(300, 8)]}, start.statistics)
    trainer = Trainer(day, MODEL, CONFIG, start=start)
    expected = trained.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    trainer.model.train()
    for batch in trainer.batches.epoch(0):
        trainer._train_step(batch)
    own = trainer.model.own_rows["user"]
    assert own.step == trained.model.own_rows["user"].step + 8
    assert not torch.equal(own.hashes, expected["own_rows.user.hashes"])
