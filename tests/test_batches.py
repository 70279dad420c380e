"""Shuffled batches: every row once per epoch, in an order that the seed and the epoch alone decide."""

from typing import Any

import numpy as np
import pytest
import torch

from recsys_moe import batches
from recsys_moe.batches import Batch, ShuffledBatches, ordered_rows
from recsys_moe.shards import PreparedData


@pytest.fixture
def numbered(tmp_path: Any, write_prepared: Any, clicks: Any, clicks_schema: Any) -> PreparedData:
    """Prepared data whose price is a row's number: 1033 training rows in three shards."""
    tables, start = [], 0
    for rows in (500, 1, 532):
        table = clicks(rows, rows)
        number = np.arange(start, start + rows, dtype=float)
        tables.append(table.set_column(table.column_names.index("price"), "price", [number]))
        start += rows
    prepared: PreparedData = write_prepared(tmp_path / "numbered", clicks_schema, {"train": tables})
    return prepared


def row_numbers(data: PreparedData, batch: Batch) -> list[int]:
    fitted = data.transform.statistics.numeric[0]
    return [round(x) for x in (batch.dense_bd[:, 0].double() * fitted.std + fitted.mean).tolist()]


def order(data: PreparedData, batch_size: int = 64, seed: int = 0, epoch: int = 0) -> list[int]:
    return [row for b in ShuffledBatches(data, "train", batch_size, seed).epoch(epoch) for row in row_numbers(data, b)]


# Small blocks and pools make the seams of big data: many pools, a rest carried between them, a last block that is short.
SIZES = [(32_768, 8 * 32_768), (10, 40), (7, 7), (100, 90), (1, 5)]


@pytest.fixture(params=SIZES, ids=lambda s: f"block {s[0]} pool {s[1]}")
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(batches, "POOL_ROWS", request.param[1])


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("batch_size", [1, 64, 1033, 5000])
def test_every_row_exactly_once(numbered: PreparedData, batch_size: int) -> None:
    assert sorted(order(numbered, batch_size)) == list(range(1033))


@pytest.mark.usefixtures("sizes")
def test_every_batch_but_the_last_is_full(numbered: PreparedData) -> None:
    assert [len(b) for b in ShuffledBatches(numbered, "train", 64, 0).epoch(0)] == [64] * 16 + [9]


@pytest.mark.usefixtures("sizes")
def test_the_order_depends_on_seed_and_epoch_alone(numbered: PreparedData) -> None:
    torch.manual_seed(1)
    first = order(numbered, seed=3, epoch=2)
    torch.manual_seed(2)
    np.random.seed(2)  # nothing global matters
    assert order(numbered, seed=3, epoch=2) == first
    assert order(numbered, seed=3, epoch=3) != first
    assert order(numbered, seed=4, epoch=2) != first
    # (seed, epoch) is a pair, not a sum.
    assert order(numbered, seed=2, epoch=3) != first


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("skip", [1, 5, 9, 16, 17])
def test_an_epoch_goes_on_from_any_batch(numbered: PreparedData, skip: int) -> None:
    shuffled = ShuffledBatches(numbered, "train", 64, 0)
    whole = [row_numbers(numbered, batch) for batch in shuffled.epoch(2)]
    assert [row_numbers(numbered, batch) for batch in shuffled.epoch(2, skip)] == whole[skip:]


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_the_batches_of_one(numbered: PreparedData, world: int) -> None:
    everyones = [ShuffledBatches(numbered, "train", 64, 0, rank, world).epoch(1, 3) for rank in range(world)]
    for whole, *pieces in zip(ShuffledBatches(numbered, "train", 64, 0).epoch(1, 3), *everyones, strict=True):
        assert row_numbers(numbered, Batch.concatenate(pieces)) == row_numbers(numbered, whole)
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_a_batch_knows_its_rows(numbered: PreparedData) -> None:
    for batch in ShuffledBatches(numbered, "train", 64, 0).epoch(0):
        assert batch.numbers_b.tolist() == row_numbers(numbered, batch)


def test_a_pool_is_shuffled_whole(numbered: PreparedData) -> None:
    # Rows of a batch come from everywhere: the mean row number of a batch of 64 is near the middle.
    means = [np.mean(row_numbers(numbered, b)) for b in ShuffledBatches(numbered, "train", 64, 0).epoch(0)][:16]
    standard_error = 1033 / np.sqrt(12 * 64)
    assert np.abs(np.array(means) - 516).max() < 5 * standard_error


@pytest.mark.usefixtures("sizes")
def test_a_rows_columns_stay_together(numbered: PreparedData) -> None:
    expected = Batch.concatenate([Batch.of(rows) for rows in ordered_rows(numbered, "train")])
    for batch in ShuffledBatches(numbered, "train", 100, 0).epoch(0):
        index = torch.tensor(row_numbers(numbered, batch))
        for name in ("ids_bf", "dense_bd", "labels_bt", "weights_bt"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)[index]), name


@pytest.mark.parametrize("block", [3, 64, 500, 10_000])
def test_ordered_rows_are_in_the_files_order(numbered: PreparedData, block: int) -> None:
    rows = list(ordered_rows(numbered, "train", block))
    assert max(map(len, rows)) <= block
    assert [n for r in rows for n in row_numbers(numbered, Batch.of(r))] == list(range(1033))


def test_a_batch_is_row_major_fp32_and_int32(numbered: PreparedData) -> None:
    batch = next(ShuffledBatches(numbered, "train", 8, 0).epoch(0))
    assert batch.ids_bf.dtype == torch.int32
    assert {t.dtype for t in (batch.dense_bd, batch.labels_bt, batch.weights_bt)} == {torch.float32}
    assert all(t.is_contiguous() for t in (batch.ids_bf, batch.dense_bd, batch.labels_bt, batch.weights_bt))
