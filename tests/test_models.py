"""The networks against textbook modules, one per expert, with copied weights; the embeddings against nn.Embedding."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.embeddings import JaggedTensor, concatenate_rows, take_rows
from recsys_moe.experts import MLPExperts, StackedBatchNorm, Towers
from recsys_moe.kernels import Layer, expert_mlp
from recsys_moe.models.mmoe import MMoE, MMoEConfig
from recsys_moe.models.shared_bottom import SharedBottom, SharedBottomConfig
from recsys_moe.models.single_task import SingleTaskConfig
from recsys_moe.ranker import Ranker
from recsys_moe.transforms import ListInput

IN_DIM, TASKS = 6, 3
WIDTHS = {f"task {t}": 1 for t in range(TASKS)}
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same_with_gradients(got: Tensor, naive: Tensor, leaves: list[Tensor]) -> None:
    direction = torch.randn_like(naive)
    torch.testing.assert_close(got, naive, **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, direction), torch.autograd.grad(naive, leaves, direction), **CLOSE
    )


# -- batch normalisation


def normalised(norm: StackedBatchNorm, x_beh: Tensor) -> Tensor:
    """The norm alone: experts whose weights are the identity."""
    units = x_beh.shape[2]
    return expert_mlp(x_beh, Layer(torch.eye(units).expand(x_beh.shape[1], -1, -1), norm=norm.state(norm.training)))


def test_stacked_batch_norm_is_batch_norm_1d_for_each_expert() -> None:
    stacked, singles = StackedBatchNorm(3, 4), [nn.BatchNorm1d(4) for _ in range(3)]
    for _ in range(3):
        x = (torch.randn(10, 3, 4) * torch.arange(1, 5) + 2).requires_grad_()
        naive = torch.stack([norm(x[:, e]) for e, norm in enumerate(singles)], 1)
        same_with_gradients(normalised(stacked, x), naive, [x])
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(stacked, name), torch.stack([getattr(norm, name) for norm in singles]))
    stacked.eval()
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(normalised(stacked, x), torch.stack([norm.eval()(x[:, e]) for e, norm in enumerate(singles)], 1))


def test_a_training_batch_of_one_row_uses_the_running_statistics_and_leaves_them() -> None:
    norm = StackedBatchNorm(2, 3)
    normalised(norm, torch.randn(50, 2, 3) * 4 + 1)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(1, 2, 3)
    in_training = normalised(norm, x)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    assert torch.equal(in_training, normalised(norm.eval(), x))


# -- model families against a module per expert


def mlp(widths: list[int], norm: str, linear_out: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(a, b))
        if not (linear_out and i == len(widths) - 2):
            layers += [nn.BatchNorm1d(b), nn.ReLU()] if norm == "batch" else [nn.ReLU()]
    return nn.Sequential(*layers)


class NaiveMMoE(nn.Module):
    def __init__(self, config: MMoEConfig) -> None:
        super().__init__()
        experts, towers = [IN_DIM, *config.expert_dims], [config.expert_dims[-1], *config.tower_dims, 1]
        self.experts = nn.ModuleList(mlp(experts, config.norm, False) for _ in range(config.num_experts))
        self.gates = nn.ModuleList(nn.Linear(IN_DIM, config.num_experts) for _ in range(TASKS))
        self.towers = nn.ModuleList(mlp(towers, config.norm, True) for _ in range(TASKS))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [expert(x) for expert in self.experts]
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            weights = torch.softmax(gate(x), 1)
            mixed = torch.zeros_like(outputs[0])
            for e, output in enumerate(outputs):
                mixed = mixed + weights[:, e : e + 1] * output
            logits.append(tower(mixed))
        return torch.cat(logits, 1)


class NaiveSharedBottom(nn.Module):
    def __init__(self, config: SharedBottomConfig) -> None:
        super().__init__()
        towers = [config.bottom_dims[-1], *config.tower_dims, 1]
        self.bottom = nn.ModuleList([mlp([IN_DIM, *config.bottom_dims], config.norm, False)])
        self.towers = nn.ModuleList(mlp(towers, config.norm, True) for _ in range(TASKS))

    def forward(self, x: Tensor) -> Tensor:
        shared = self.bottom[0](x)
        return torch.cat([tower(shared) for tower in self.towers], 1)


Pair = tuple[Tensor, int | slice, Tensor]


def expert_pairs(stacked: MLPExperts, singles: Any) -> Iterator[Pair]:
    """Each tensor of the stack, where in it an expert's part lies, and the single module's tensor."""
    for e, single in enumerate(singles):
        for i, linear in enumerate(m for m in single if isinstance(m, nn.Linear)):
            yield stacked.weights[i], e, linear.weight
            yield stacked.biases[i], e, linear.bias
        for i, norm in enumerate(m for m in single if isinstance(m, nn.BatchNorm1d)):
            assert stacked.norms is not None
            for name in ("weight", "bias", "running_mean", "running_var"):
                yield getattr(stacked.norms[i], name), e, getattr(norm, name)


def pairs(model: Any, naive: Any) -> Iterator[Pair]:
    yield from expert_pairs(model.towers.hidden, [tower[:-1] for tower in naive.towers])
    yield from expert_pairs(model.towers.last[0], [tower[-1:] for tower in naive.towers])
    if isinstance(model, MMoE):
        yield from expert_pairs(model.experts, naive.experts)
        for t, gate in enumerate(naive.gates):
            rows = slice(t * gate.out_features, (t + 1) * gate.out_features)
            yield model.router.linear.weight, rows, gate.weight
            yield model.router.linear.bias, rows, gate.bias
    else:
        yield from expert_pairs(model.bottom, naive.bottom)


def build(family: str, norm: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model and its naive twin, with the same weights."""
    model: Any
    naive: Any
    if family == "mmoe":
        mmoe = MMoEConfig(num_experts=4, expert_dims=(7, 5), tower_dims=(4,), norm=norm, dropout=0.0)
        model, naive = MMoE(mmoe, IN_DIM, WIDTHS, dtype), NaiveMMoE(mmoe)
    else:
        bottom = SharedBottomConfig(bottom_dims=(9, 5), tower_dims=(4,), norm=norm, dropout=0.0)
        model, naive = SharedBottom(bottom, IN_DIM, WIDTHS, dtype), NaiveSharedBottom(bottom)
    with torch.no_grad():
        for stacked, where, single in pairs(model, naive):
            single.copy_(stacked[where])
    return model, naive


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("family", ["mmoe", "shared_bottom"])
def test_a_family_equals_its_naive_twin(family: str, norm: str) -> None:
    model, naive = build(family, norm)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in naive.parameters())
    # Two batches in training, which move the running statistics, then inference, with gradients everywhere.
    for train in (True, True, False):
        model.train(train)
        naive.train(train)
        x = torch.randn(11, IN_DIM)
        direction = torch.randn(11, TASKS)
        for network in (model, naive):
            network.zero_grad()
        got, expected = model(x)[0], naive(x)
        torch.testing.assert_close(got, expected, **CLOSE)
        got.backward(direction)
        expected.backward(direction)
        for stacked, where, single in pairs(model, naive):
            torch.testing.assert_close(stacked[where], single, **CLOSE)
            if single.requires_grad:
                assert stacked.grad is not None
                torch.testing.assert_close(stacked.grad[where], single.grad, rtol=1e-3, atol=1e-5)


def test_the_plan_of_mmoe_is_its_gates() -> None:
    model, naive = build("mmoe", "none")
    x = torch.randn(5, IN_DIM)
    plan = model(x)[1]["experts"]
    expected = torch.stack([torch.softmax(gate(x), 1) for gate in naive.gates], 1)
    torch.testing.assert_close(plan.weights, expected)
    torch.testing.assert_close(plan.weights.sum(2), torch.ones(5, TASKS))
    assert build("shared_bottom", "none")[0](x)[1] == {}


@pytest.mark.parametrize("family", ["mmoe", "shared_bottom"])
@pytest.mark.parametrize("train", [True, False])
def test_a_batch_of_one_row(family: str, train: bool) -> None:
    model, _ = build(family, "batch")
    model.train(train)
    logits, _ = model(torch.randn(1, IN_DIM))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mmoe", "shared_bottom"])
def test_at_inference_a_row_has_the_same_bits_in_every_batch(family: str, dtype: torch.dtype) -> None:
    model, _ = build(family, "batch", dtype)
    model.eval()
    x = torch.randn(90, IN_DIM)
    with torch.no_grad():
        assert torch.equal(torch.cat([model(row[None])[0] for row in x]), model(x)[0])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sparse_gates_equal_softmax_gates_over_their_best_experts(top_k: int) -> None:
    soft, naive = build("mmoe", "none")
    config = MMoEConfig(num_experts=4, expert_dims=(7, 5), tower_dims=(4,), norm="none", dropout=0, gate="topk", top_k=top_k)
    sparse = MMoE(config, IN_DIM, WIDTHS, torch.float32)
    sparse.load_state_dict(soft.state_dict())
    x = torch.randn(30, IN_DIM)
    outputs = torch.stack([expert(x) for expert in naive.experts], 1)
    expected = []
    for gate, tower in zip(naive.gates, naive.towers, strict=True):
        weights = torch.softmax(gate(x), 1)
        least = weights.topk(top_k).values[:, -1:]
        kept = torch.where(weights >= least, weights, 0)
        expected.append(tower((kept / kept.sum(1, keepdim=True)).unsqueeze(1).bmm(outputs).squeeze(1)))
    got, plans = sparse(x)
    torch.testing.assert_close(got, torch.cat(expected, 1), **CLOSE)
    assert plans["experts"].expert_ids.shape == (30 * TASKS, top_k)
    direction = torch.randn_like(got)
    got.backward(direction)
    torch.cat(expected, 1).backward(direction)
    for stacked, where, single in pairs(sparse, naive):
        torch.testing.assert_close(stacked.grad[where], single.grad, rtol=1e-3, atol=1e-5)  # type: ignore[index]


def test_experts_and_units_differ_after_initialisation() -> None:
    # Experts that start alike get the same gradients and stay alike.
    experts = MLPExperts(4, IN_DIM, (8, 5))
    for weight in experts.weights:
        units = weight.flatten(0, 1)
        assert len(torch.unique(units, dim=0)) == len(units)


def test_initialisation_is_nn_linears() -> None:
    experts, single = MLPExperts(8, 64, (400,)), nn.Linear(64, 400)
    for mine, reference in ((experts.weights[0], single.weight), (experts.biases[0], single.bias)):
        assert mine.abs().max() <= 1 / 8
        assert mine.std().item() == pytest.approx(reference.std().item(), rel=0.1)
        assert mine.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("family", ["mmoe", "shared_bottom"])
def test_bf16_experts_are_close_to_fp32_ones(family: str) -> None:
    fp32, _ = build(family, "batch")
    bf16, _ = build(family, "batch", torch.bfloat16)
    bf16.load_state_dict(fp32.state_dict())
    assert {p.dtype for p in bf16.parameters()} == {torch.float32}
    x = torch.randn(64, IN_DIM)
    (low, low_plans), (high, high_plans) = bf16(x), fp32(x)
    assert low.dtype == torch.float32
    assert not torch.equal(low, high)
    assert (low - high).norm() < 0.02 * high.norm()
    for name, plan in high_plans.items():  # the gates stay fp32
        assert torch.equal(low_plans[name].weights, plan.weights)
    low.sum().backward()
    high.sum().backward()
    # A unit near its kink may switch, so single entries differ; the direction of the whole gradient must not.
    one, other = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (bf16, fp32))
    assert F.cosine_similarity(one, other, dim=0) > 0.98


def test_dropout_drops_and_rescales_in_training_only() -> None:
    experts = MLPExperts(2, 3, (2000,), dropout=0.25)
    x = torch.randn(4, 3)
    whole = experts.eval()(x)
    dropped = experts.train()(x)
    kept = (dropped != 0)[whole > 0]
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped[dropped != 0], (whole / 0.75)[dropped != 0])


# -- embeddings


class Capture(nn.Module):
    """In place of the network: its input is the output."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x, {}


CARDINALITIES = [5, 3, 40]


def ranker(num_dense: int = 2, cardinalities: list[int] = CARDINALITIES, dropout: float = 0.0) -> Ranker:
    names = ["user", "price.bucket", "item"][: len(cardinalities)]
    return Ranker(MMoEConfig(embedding_dim=4, num_experts=2, dropout=dropout), names, cardinalities, num_dense, WIDTHS)


def tables(model: Ranker) -> list[nn.Embedding]:
    """The same tables as plain embeddings."""
    state = model.state_dict()
    weights = [state[f"embeddings.embedding_bags.{n.replace('.', '__')}.weight"] for n in model.sparse_names]
    return [nn.Embedding.from_pretrained(weight.clone(), freeze=False) for weight in weights]


def draw_ids(rows: int) -> Tensor:
    # Few different ids among many rows: most are met more than once.
    return torch.stack([torch.randint(0, c, (rows,)) for c in CARDINALITIES], 1).int()


def test_the_network_sees_each_rows_embeddings_then_its_numbers() -> None:
    model = ranker()
    model.network = Capture()
    ids, dense = draw_ids(13), torch.randn(13, 2)
    expected = torch.cat([table(ids[:, f].long()) for f, table in enumerate(tables(model))] + [dense], 1)
    assert torch.equal(model(ids, dense)[0], expected)


def test_dropout_drops_and_rescales_embeddings_but_no_numbers_and_in_training_only() -> None:
    model = ranker(dropout=0.25)
    model.network = Capture()
    ids, dense = draw_ids(2000).clamp_min(2), torch.randn(2000, 2)  # rows 0 and 1 of a table start at zero
    whole = torch.cat([table(ids[:, f].long()) for f, table in enumerate(tables(model))], 1)
    in_training = model(ids, dense)[0]
    kept = in_training[:, :-2] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(in_training[:, :-2], whole / 0.75 * kept)
    assert torch.equal(in_training[:, -2:], dense)
    assert torch.equal(model.eval()(ids, dense)[0], torch.cat([whole, dense], 1))


def test_what_is_dropped_is_not_updated() -> None:
    model = ranker(num_dense=0, dropout=0.5)
    model.network = Capture()
    before = torch.cat([table.weight.detach() for table in tables(model)])
    out = model(torch.tensor([[2, 2, 2]], dtype=torch.int32), torch.empty(1, 0))[0]
    out.sum().backward()
    after = torch.cat([table.weight.detach() for table in tables(model)])
    assert torch.equal((after != before).sum(), (out != 0).sum())


def test_a_ranker_of_numbers_only_and_one_of_categories_only() -> None:
    numbers, categories = ranker(cardinalities=[]), ranker(num_dense=0)
    assert numbers(torch.empty(4, 0, dtype=torch.int32), torch.randn(4, 2))[0].shape == (4, TASKS)
    assert categories(draw_ids(4), torch.empty(4, 0))[0].shape == (4, TASKS)
    numbers.set_embedding_lr(0.1)


class RowWiseAdagrad:
    """The naive optimizer: one sum of squares a row, of which each gradient adds its mean."""

    def __init__(self, weights: list[Any]) -> None:
        self.weights, self.rate = weights, 0.0
        self.sums = [torch.zeros(len(weight)) for weight in weights]

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for weight, sums in zip(self.weights, self.sums, strict=True):
            for row, g in enumerate(weight.grad):
                sums[row] += g.square().mean()
                weight[row] -= self.rate * g / (sums[row].sqrt() + 1e-8)


def test_the_backward_pass_is_adagrad_on_the_tables() -> None:
    model = ranker()
    model.network = Capture()
    naive = tables(model)
    before = [table.weight.detach().clone() for table in naive]
    adagrad = RowWiseAdagrad([table.weight for table in naive])
    seen: list[set[int]] = [set() for _ in CARDINALITIES]
    for rate in (0.05, 0.05, 0.02):  # the last step at another rate: what a schedule does
        model.set_embedding_lr(rate)
        adagrad.rate = rate
        ids, target = draw_ids(20), torch.randn(20, 12)
        for f, met in enumerate(seen):
            met |= set(ids[:, f].tolist())
        ((model(ids, torch.empty(20, 0))[0] - target) ** 2).sum().backward()
        adagrad.zero_grad()
        x = torch.cat([table(ids[:, f].long()) for f, table in enumerate(naive)], 1)
        ((x - target) ** 2).sum().backward()
        adagrad.step()
        for mine, reference in zip(tables(model), naive, strict=True):
            torch.testing.assert_close(mine.weight, reference.weight, rtol=1e-4, atol=1e-6)
    for table, start, met in zip(tables(model), before, seen, strict=True):
        unseen = [i for i in range(len(start)) if i not in met]
        assert torch.equal(table.weight[unseen], start[unseen])


def test_inference_changes_no_table() -> None:
    model = ranker().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(draw_ids(10), torch.randn(10, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- features of many ids

POOLINGS: tuple[Any, ...] = ("mean", "sum", "last", "mean")


def jagged(rows: int, cardinality: int, longest: int) -> JaggedTensor:
    lengths = torch.randint(0, longest + 1, (rows,), dtype=torch.int32)
    return JaggedTensor(torch.randint(0, cardinality, (int(lengths.sum()),), dtype=torch.int32), lengths=lengths)


def pooled_ranker(num_sparse: int = 2, num_dense: int = 2) -> Ranker:
    lists = [ListInput(f"l.{n}", 6 + n, pooling, 5) for n, pooling in enumerate(POOLINGS)]
    names = ["user", "price.bucket"][:num_sparse]
    config = MMoEConfig(embedding_dim=4, num_experts=2, dropout=0.0)
    return Ranker(config, names, CARDINALITIES[:num_sparse], num_dense, WIDTHS, lists=lists)


def list_tables(model: Ranker) -> list[nn.Embedding]:
    """The tables of the lists as plain embeddings, in the order of the features."""
    state = model.state_dict()
    found = []
    for n, pooling in enumerate(POOLINGS):
        weight = state[f"pooled.{'mean' if pooling == 'mean' else 'sum'}.embedding_bags.l__{n}.weight"]
        found.append(nn.Embedding.from_pretrained(weight.clone(), freeze=False))
    return found


def pool(table: nn.Embedding, rows: JaggedTensor, pooling: str) -> Tensor:
    out = []
    for ids in rows.to_dense():
        vectors = table(ids.long())
        if not len(ids):
            out.append(torch.zeros(4))
        else:
            out.append({"mean": vectors.mean(0), "sum": vectors.sum(0), "last": vectors[-1]}[pooling])
    return torch.stack(out)


def naive_lists(tables: list[nn.Embedding], lists: list[JaggedTensor]) -> list[Tensor]:
    """Pooled one by one, in the order of the network's input: what is summed, then what is averaged."""
    pooled = [pool(*parts) for parts in zip(tables, lists, POOLINGS, strict=True)]
    return [pooled[n] for n in sorted(range(len(POOLINGS)), key=lambda n: POOLINGS[n] == "mean")]


def test_lists_are_pooled_by_mean_sum_or_their_last() -> None:
    model = pooled_ranker()
    model.network = Capture()
    ids, dense = draw_ids(30)[:, :2], torch.randn(30, 2)
    lists = [jagged(30, f.cardinality, 5) for f in model.lists]
    singles = [table(ids[:, f].long()) for f, table in enumerate(tables(model))]
    expected = torch.cat([*singles, *naive_lists(list_tables(model), lists), dense], 1)
    torch.testing.assert_close(model(ids, dense, lists)[0], expected)


def test_a_ranker_of_lists_only() -> None:
    model = pooled_ranker(0, 0)
    lists = [jagged(7, f.cardinality, 5) for f in model.lists]
    assert model(torch.empty(7, 0, dtype=torch.int32), torch.empty(7, 0), lists)[0].shape == (7, TASKS)


def test_the_backward_pass_is_adagrad_on_the_pooled_tables() -> None:
    model = pooled_ranker(0, 0)
    model.network = Capture()
    naive = list_tables(model)
    adagrad = RowWiseAdagrad([table.weight for table in naive])
    empty = torch.empty(20, 0)
    for rate in (0.05, 0.02):
        model.set_embedding_lr(rate)
        adagrad.rate = rate
        lists, target = [jagged(20, f.cardinality, 4) for f in model.lists], torch.randn(20, 16)
        ((model(empty.int(), empty, lists)[0] - target) ** 2).sum().backward()
        adagrad.zero_grad()
        ((torch.cat(naive_lists(naive, lists), 1) - target) ** 2).sum().backward()
        adagrad.step()
        for mine, reference in zip(list_tables(model), naive, strict=True):
            torch.testing.assert_close(mine.weight, reference.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index", [[], [3], [2, 2, 0], [4, 3, 2, 1, 0]])
def test_rows_of_ids_are_taken_and_joined(index: list[int]) -> None:
    torch.manual_seed(3)
    rows = jagged(5, 9, 4)
    taken = take_rows(rows, torch.tensor(index, dtype=torch.int64))
    assert [r.tolist() for r in taken.to_dense()] == [rows.to_dense()[i].tolist() for i in index]
    assert taken.offsets().tolist() == [0, *taken.lengths().cumsum(0).tolist()]
    joined = concatenate_rows([rows, taken, rows])
    assert [r.tolist() for r in joined.to_dense()] == [r.tolist() for part in (rows, taken, rows) for r in part.to_dense()]


# -- embedding sets


def test_each_embedding_set_has_tables_of_its_own_and_their_gradients() -> None:
    config = SingleTaskConfig(embedding_dim=4, bottom_dims=(8,), tower_dims=(), norm="none", dropout=0.0)
    lists = [ListInput(f"l.{n}", 6 + n, pooling, 5) for n, pooling in enumerate(POOLINGS)]
    model = Ranker(config, ["user", "price.bucket"], CARDINALITIES[:2], 2, WIDTHS, lists=lists)
    assert model.sets == tuple(WIDTHS)
    ids, dense = draw_ids(30)[:, :2], torch.randn(30, 2)
    rows = [jagged(30, f.cardinality, 5) for f in lists]
    state = model.state_dict()
    x = model.represent(ids, dense, rows)
    assert x.shape == (30, TASKS, 4 * 6 + 2)
    for s, task in enumerate(WIDTHS):
        one = [
            nn.Embedding.from_pretrained(state[f"embeddings.embedding_bags.{n} of {task}.weight"])
            for n in ("user", "price__bucket")
        ]
        kinds = ["mean" if pooling == "mean" else "sum" for pooling in POOLINGS]
        many = [
            nn.Embedding.from_pretrained(state[f"pooled.{kind}.embedding_bags.l__{n} of {task}.weight"])
            for n, kind in enumerate(kinds)
        ]
        singles = [table(ids[:, f].long()) for f, table in enumerate(one)]
        torch.testing.assert_close(x[:, s], torch.cat([*singles, *naive_lists(many, rows), dense], 1))
    # A task's loss moves what is its own, and nothing else.
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.network(x)[0][:, 1].sum().backward()
    for name, tensor in model.state_dict().items():
        if name.startswith(("embeddings.", "pooled.")):
            assert torch.equal(tensor, before[name]) != (" of task 1." in name), name
    assert [bool(p.grad[t].any()) for p in model.network.bottoms.weights for t in range(TASKS)] == [False, True, False]  # type: ignore


def test_a_batch_of_no_rows_in_several_sets() -> None:
    model = Ranker(SingleTaskConfig(embedding_dim=4), ["user"], [5], 1, WIDTHS).eval()
    assert model(torch.empty(0, 1, dtype=torch.int32), torch.empty(0, 1))[0].shape == (0, TASKS)


# -- towers


@pytest.mark.parametrize("dims", [(4,), ()], ids=["hidden", "flat"])
@pytest.mark.parametrize("shared", [False, True], ids=["own inputs", "one input"])
@pytest.mark.parametrize("widths", [[1, 1, 1], [1, 3, 1, 2, 3], [5], [2, 2]], ids=str)
def test_towers_of_any_widths_stand_in_the_tasks_order(dims: tuple[int, ...], shared: bool, widths: list[int]) -> None:
    torch.manual_seed(0)
    towers = Towers(6, dims, "none", widths)
    towers.start_at([[10.0 * t + n for n in range(width)] for t, width in enumerate(widths)])
    x = torch.randn(7, 6) if shared else torch.randn(7, len(widths), 6)
    got, at = towers(x), 0
    for t, width in enumerate(widths):
        h = x if shared else x[:, t]
        if dims:
            assert towers.hidden is not None
            h = torch.relu(h @ towers.hidden.weights[0][t].t() + towers.hidden.biases[0][t])
        same = [n for n, w in enumerate(widths) if w == width]
        stack: Any = towers.last[list(dict.fromkeys(widths)).index(width)]
        weight, bias = stack.weights[0][same.index(t)], stack.biases[0][same.index(t)]
        assert bias.tolist() == [10.0 * t + n for n in range(width)]
        torch.testing.assert_close(got[:, at : at + width], h @ weight.t() + bias, rtol=1e-4, atol=1e-5)
        at += width
    assert got.shape == (7, at)
