"""The embedding tables: lookups and Adagrad beside a loop and fbgemm, and what an id that training never met stands for."""

import pytest
import torch
from torch import Tensor

from recsys_moe import embeddings
from recsys_moe.embeddings import (
    FusedEmbeddings,
    JaggedTensor,
    KeyedJaggedTensor,
    Pooling,
    drawn_rows,
    one_id_each,
    table_configs,
)
from recsys_moe.kernels import Backend, embedding_bags
from recsys_moe.transforms import MISSING, UNKNOWN


def test_missing_and_unknown_stand_for_nothing_until_training_meets_them() -> None:
    # Where the training part has no such row, scoring one must not add noise.
    tables = FusedEmbeddings(["a", "b"], [5, 2], 4)
    for weight in tables.state_dict().values():
        assert not weight[[MISSING, UNKNOWN]].any()
        assert weight[2:].all()
    ids_bf = torch.tensor([[MISSING, UNKNOWN], [UNKNOWN, MISSING]], dtype=torch.int32)
    assert not tables(one_id_each(["a", "b"], ids_bf)).values().any()


def test_rows_drawn_chunk_by_chunk_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CHUNK_BYTES", 7 * 4 * 4)  # seven rows
    torch.manual_seed(1)
    tables = FusedEmbeddings(["a", "b"], [33, 6], 4).state_dict()
    torch.manual_seed(1)
    for config, table in zip(table_configs(["a", "b"], [33, 6], 4, "sum"), tables.values(), strict=True):
        chunks = list(drawn_rows(config))
        assert [low for low, _ in chunks] == list(range(0, len(table), 7))
        assert torch.equal(torch.cat([drawn_rd for _, drawn_rd in chunks]), table)


@pytest.mark.parametrize("name", ["type", "keys", "training", "a.b", "a b", "é"])
def test_a_feature_may_have_any_name(name: str) -> None:
    tables = FusedEmbeddings([name, "other"], [5, 5], 4)
    ids_bf = torch.tensor([[2, 3]], dtype=torch.int32)
    assert tables(one_id_each([name, "other"], ids_bf)).values().shape == (1, 8)


# Features, rows of each table, width, rows of the batch, longest bag: one id each; tables of a few rows and large ones; bags
# of any length; a table with so many ids that it is cut; odd widths; nothing at all.
BAGS = [
    (5, 40, 4, 64, None),
    (3, 10**5, 16, 70, None),
    (2, 7, 3, 50, 5),
    (1, 5000, 8, 500, 6),
    (2, 10**5, 5, 60, 9),
    (4, 20, 32, 1, 3),
    (2, 9, 4, 0, 2),
]


@pytest.mark.parametrize(("features", "rows", "width", "batch", "longest"), BAGS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bags_and_adagrad_are_what_a_loop_in_float64_finds(
    features: int, rows: int, width: int, batch: int, longest: int | None, mean: bool, backend: Backend
) -> None:
    generator = torch.Generator().manual_seed(features * rows + batch)
    lengths = torch.ones(features * batch, dtype=torch.int32)
    if longest is not None:
        lengths = torch.randint(0, longest + 1, (features * batch,), generator=generator, dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    # Few distinct ids, so that most come several times; the last row of each table among them.
    pool = torch.cat([torch.randint(0, rows, (30,), generator=generator), torch.tensor([rows - 1])])
    ids = pool[torch.randint(0, len(pool), (int(offsets[-1]),), generator=generator)].int()
    starts = torch.arange(features) * rows * width
    weights = torch.randn(features * rows * width, generator=generator).requires_grad_()
    squares = torch.rand(features * rows, generator=generator)
    grad = torch.randn(batch, features * width, generator=generator)
    rate, eps = 0.1, 1e-8

    table = weights.detach().double().view(features, rows, width).clone()
    state = squares.double().view(features, rows).clone()
    expected = torch.zeros(batch, features, width, dtype=torch.float64)
    sums: dict[tuple[int, int], Tensor] = {}
    for f in range(features):
        for b in range(batch):
            bag = ids[offsets[f * batch + b] : offsets[f * batch + b + 1]].tolist()
            share = 1 / len(bag) if mean and bag else 1.0
            for i in bag:
                expected[b, f] += table[f, i] * share
                piece = grad[b, f * width : (f + 1) * width].double() * share
                sums[f, i] = sums.get((f, i), torch.zeros(width, dtype=torch.float64)) + piece
    for (f, i), g in sums.items():
        state[f, i] += g.square().mean()
        table[f, i] -= rate * g / (state[f, i].sqrt() + eps)

    y = embedding_bags(weights, squares, starts, ids, offsets, width=width, mean=mean, rate=rate, eps=eps, backend=backend)
    torch.testing.assert_close(y.detach(), expected.flatten(1).float())
    y.backward(grad)
    # Some hundred gradients of one id are added up in fp32.
    torch.testing.assert_close(weights.detach(), table.flatten().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares, state.flatten().float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_tables_learn_as_fbgemm_would_have_them(pooling: Pooling) -> None:
    names, rows = ["a", "b"], [50, 3000]

    def tables() -> FusedEmbeddings:
        torch.manual_seed(1)
        made = FusedEmbeddings(names, rows, 8, pooling)
        made.set_lr(0.05)
        return made

    ours, theirs = tables(), tables()
    for step in range(3):
        torch.manual_seed(step)
        lists = {n: JaggedTensor.from_dense([torch.randint(0, r, (k,)) for k in (2, 0, 5, 1)]) for n, r in zip(names, rows)}  # noqa: B905
        features = KeyedJaggedTensor.from_jt_dict(lists)
        grad = torch.randn(4, 16)
        y, expected = ours(features).values(), theirs._lookup(features.values(), features.offsets(), None)
        torch.testing.assert_close(y, expected)
        y.backward(grad)
        expected.backward(grad)
        for ours_now, theirs_now in ((ours.state_dict(), theirs.state_dict()), (ours.adagrad(), theirs.adagrad())):
            for name, value in theirs_now.items():
                torch.testing.assert_close(ours_now[name], value, msg=name)


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    ids = torch.randint(0, 40, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    grad = torch.randn(5000, 4, generator=torch.Generator().manual_seed(1))
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        weights = torch.ones(160, requires_grad=True)
        state, starts, offsets = torch.zeros(40), torch.tensor([0]), torch.arange(5001)
        embedding_bags(weights, state, starts, ids, offsets, width=4, rate=0.1, backend="cpu").backward(grad)
        found.append(weights.detach())
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


def test_what_does_not_go_together_is_refused() -> None:
    zeros, ids, offsets = torch.zeros(8), torch.zeros(2, dtype=torch.int32), torch.arange(3)
    with pytest.raises(ValueError, match="do not go together"):
        embedding_bags(zeros.double(), zeros[:2], torch.tensor([0]), ids, offsets, width=4)
    with pytest.raises(ValueError, match="do not go together"):
        embedding_bags(zeros, zeros, torch.tensor([0]), ids, offsets, width=4)
    with pytest.raises(ValueError, match="do not go together"):
        embedding_bags(zeros, zeros[:2], torch.tensor([0, 1, 2]), ids, offsets, width=4)
