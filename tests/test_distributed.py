"""Two workers train as one would: real processes over gloo, each of which runs this file as a script."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_moe import sharding
from recsys_moe.balancing import GradNorm, JacobianDescent, Static
from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.distributed import synced_expert_mlp, synced_sparse_expert_mlp
from recsys_moe.front import FrontConfig
from recsys_moe.health import Health
from recsys_moe.kernels import BatchNorm, Layer, expert_mlp, sparse_expert_mlp
from recsys_moe.models.adatt import AdaTTConfig
from recsys_moe.models.aitm import AITMConfig
from recsys_moe.models.esmm import ESMMConfig
from recsys_moe.models.home import HoMEConfig
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.ple import PLEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.models.single_task import SingleTaskConfig
from recsys_moe.models.stem import STEMConfig
from recsys_moe.predictor import Predictor
from recsys_moe.process import anonymous_mb, peak_memory
from recsys_moe.routing import sparse_plan
from recsys_moe.schema import Schema
from recsys_moe.shards import PreparedData
from recsys_moe.sources import DataConfig
from recsys_moe.tensorfiles import TensorFiles, save_tensors
from recsys_moe.trainer import TrainConfig, Trainer, evaluate
from recsys_moe.typed import dump, parse
from recsys_moe.warm_start import StartBundle

MMOE = MMoEConfig(embedding_dim=4, num_experts=3, expert_dims=(8, 4), tower_dims=(4,), dropout=0.0)
MODELS: dict[str, Any] = {
    "softmax": MMOE,
    "topk": replace(MMOE, gate="topk", top_k=2),
    "ple": PLEConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(4,), dropout=0.0),
    "esmm": ESMMConfig(embedding_dim=4, conversions={"buy": "click"}, bottom_dims=(8,), norm="none", dropout=0.0),
    "aitm": AITMConfig(embedding_dim=4, chain=("click", "buy"), bottom_dims=(8,), tower_dims=(4,), dropout=0.0),
    "stem": STEMConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(4,), dropout=0.0),
    "front": replace(
        MMOE,
        norm="none",
        front=FrontConfig(cross_layers=1, attention={"seen": "colour"}, attention_dims=(4,), first_order=True),
    ),
    **dict.fromkeys(("pcgrad", "gradnorm"), replace(MMOE, norm="none")),
    "home": HoMEConfig(embedding_dim=4, categories={"click": "a", "buy": "b"}, expert_dims=(8,), tower_dims=(4,), dropout=0.0),
    "adatt": AdaTTConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(4,), dropout=0.0),
    "single_task": SingleTaskConfig(embedding_dim=4, bottom_dims=(8,), norm="none", dropout=0.0),
}
SPLIT = ("softmax", "front")  # again, with every table split by rows
BALANCING: dict[str, Any] = {
    "pcgrad": JacobianDescent("pcgrad"),
    "gradnorm": GradNorm("gradnorm"),
}
# Lists of every pooling, vectors, and a task of each kind; one of the table batches has one table, which one worker holds.
KINDS_SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "user", "kind": "hashed", "buckets": 30},
        {"name": "tags", "kind": "multi"},
        {"name": "genres", "kind": "multi", "separator": "|", "pooling": "sum", "buckets": 9},
        {"name": "watched", "kind": "sequence", "max_length": 3, "pooling": "last"},
        {"name": "seen", "kind": "sequence", "max_length": 3},
        {"name": "picture", "kind": "embedding", "dim": 2},
    ],
    "tasks": [
        {"name": "click", "label": "click"},
        {"name": "minutes", "kind": "regression", "label": "minutes", "loss": "huber", "mask": "click == 1"},
        {"name": "ending", "kind": "multiclass", "label": "ending", "classes": ["done", "left", "skipped"]},
        {"name": "stars", "kind": "ordinal", "label": "stars", "levels": [1, 2, 3], "weight": "weight"},
    ],
}
# Every model with every kind of task, masks and weights among them: long. A second binary task makes ESMM's and AITM's pair.
MATRIX_SCHEMA = KINDS_SCHEMA | {
    "tasks": [*KINDS_SCHEMA["tasks"], {"name": "share", "label": "stars == 2", "mask": "click == 1"}]
}
MATRIX: dict[str, Any] = {
    "shared_bottom": SharedBottomConfig(embedding_dim=4, bottom_dims=(8,), tower_dims=(4,), dropout=0.0),
    "omoe": replace(MMOE, name="omoe"),
    "cgc": PLEConfig(name="cgc", levels=1, embedding_dim=4, expert_dims=(8,), tower_dims=(4,), dropout=0.0),
    **{name: MODELS[name] for name in ("softmax", "topk", "ple", "stem", "adatt", "single_task")},
    "esmm": replace(MODELS["esmm"], conversions={"share": "click"}),
    "aitm": replace(MODELS["aitm"], chain=("click", "share")),
    "home": replace(
        MODELS["home"], categories={"click": "a", "minutes": "b", "ending": "b", "stars": "c", "share": "a"}, norm="none"
    ),
}
PRECISIONS: tuple[Any, ...] = ("fp32", "bf16")


def draw_kinds(rows: int, seed: int) -> pa.Table:
    r = np.random.default_rng(seed)
    tags = [r.choice(["a", "b", "c"], r.integers(0, 4), replace=False).tolist() for _ in range(rows)]
    watched = [r.integers(0, 5, r.integers(0, 5)).tolist() for _ in range(rows)]
    last = np.array([row[-1] if row else 2 for row in watched])
    picture = r.normal(size=(rows, 2)).astype(np.float32)
    columns = {"user": r.integers(0, 40, rows), "tags": tags, "genres": ["|".join(t) for t in tags], "watched": watched}
    labels = {
        "click": [int("a" in t or n % 5 == 0) for n, t in enumerate(tags)],
        "minutes": picture[:, 0] + r.normal(size=rows),
        "ending": np.array(["done", "left", "skipped"])[last % 3],
        "stars": [1 + min(2, len(t)) for t in tags],
        "weight": r.choice([0.0, 1.0, 2.0], rows),
    }
    return pa.table(columns | {"seen": watched, "picture": pa.array(list(picture), pa.list_(pa.float32()))} | labels)


# 1033 rows: the last of an epoch's 26 batches has 33 rows, cut into 16 and 17.
CONFIG = TrainConfig(epochs=8, batch_size=40, patience=0, checkpoint_steps=100)


def layer_inputs(rows: int) -> tuple[Tensor, Layer]:
    random = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    norm = BatchNorm(draw(3, 5), draw(3, 5), draw(3, 5), draw(3, 5).exp(), training=True)
    return 3 + draw(rows, 4), Layer(draw(3, 5, 4), draw(3, 5), norm, "silu")


def slots(rows: int) -> Tensor:
    """Two slots a row over three experts: the last expert sees one row at most, and some slots are empty."""
    ids = torch.arange(2 * rows, dtype=torch.int32).view(rows, 2) % 2
    ids[1::3, 1] = -1
    ids[:1, 0] = 2
    return ids


def outcomes(x: Tensor, layer: Layer, y: Tensor) -> dict[str, Tensor]:
    """An output, the gradients of a loss that weighs its elements differently, and the moments as they are now."""
    assert layer.norm is not None
    assert layer.bias is not None
    weights = torch.linspace(-1, 2, y.shape[1:].numel()).view(y.shape[1:])
    inputs = {"x": x, "weight": layer.weight, "bias": layer.bias, "scale": layer.norm.scale, "shift": layer.norm.shift}
    gradients = torch.autograd.grad(((y - 1).square() * weights).sum(), list(inputs.values()))
    moments = {"mean": layer.norm.running_mean, "var": layer.norm.running_var}
    return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True)), **moments}


def require_grad(x: Tensor, layer: Layer) -> None:
    assert layer.norm is not None
    for tensor in (x, layer.weight, layer.bias, layer.norm.scale, layer.norm.shift):
        assert tensor is not None
        tensor.requires_grad_()


def dense_layer(rows: int, low: int = 0, high: int | None = None) -> dict[str, Tensor]:
    x, layer = layer_inputs(rows)
    x = x[low:high].clone()
    require_grad(x, layer)
    run = expert_mlp if high is None else synced_expert_mlp
    return outcomes(x, layer, run(x, layer))


def sparse_layer(rows: int, low: int = 0, high: int | None = None) -> dict[str, Tensor]:
    x, layer = layer_inputs(rows)
    x, ids = x[low:high].clone(), slots(rows)[low:high]
    require_grad(x, layer)
    plan = sparse_plan(ids, torch.where(ids >= 0, 0.75, 0.0), 3)
    if high is None:
        y = sparse_expert_mlp(x, (layer,), plan.expert_ids, plan.weights, plan.order, plan.offsets)
    else:
        y = synced_sparse_expert_mlp(x, (layer,), plan)
    return outcomes(x, layer, y)


LAYERS = {"dense": dense_layer, "sparse": sparse_layer}
# Rows, and where they are cut for the two workers.
CUTS = [(30, 15), (31, 7), (5, 0), (2, 1)]


def config(name: str) -> TrainConfig:
    if name == "softmax":
        return CONFIG
    return replace(CONFIG, epochs=1, batch_size=43, balancing=BALANCING.get(name, Static()))  # a last batch of one row


def data(name: str, folder: Path) -> PreparedData:
    return PreparedData(folder / ("listed" if name == "front" else "prepared"))


def last_look(events: list[dict[str, Any]]) -> dict[str, float]:
    """The experts' health at the end, as the worker that has looked tells it; nothing from the others."""
    looks = [event for event in events if event["kind"] == "health"]
    return Health.from_json(looks[-1]["health"]).metrics() if looks else {}


def losses(trainer: Trainer) -> list[float]:
    """Train, and say the loss of each step."""
    found: list[float] = []
    step = trainer._train_step

    def watched(batch: Any) -> float:
        found.append(step(batch))
        return found[-1]

    trainer._train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    return found


def keep(trainer: Trainer, stem: Path) -> None:
    """Write the whole model's weights and Adagrad sums, to which all workers contribute."""
    for ending, tensors in (("", trainer.whole_weights()), (".adagrad", trainer.whole_adagrad())):
        save_tensors(None if dist.get_rank() else stem.with_name(f"{stem.name}{ending}.safetensors"), tensors)


# ---- what each of the two workers runs ---------------------------------------------------------------------------------


def join(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)


def save_large(rank: int, port: int, folder: Path) -> None:
    """Two tables of 256 MB whole, and one split: the memory before and while they are written."""
    join(rank, port)
    tables = nn.ModuleDict({"embeddings": sharding.ShardedEmbeddings(["a", "b"], [4_000_000, 4_000_000], 16)})
    tables["pooled"] = sharding.ShardedEmbeddings(["c"], [4_000_000], 16)
    whole = sharding.whole_tables(tables, tables.state_dict())
    before = anonymous_mb()
    with peak_memory(0.01) as peak:
        save_tensors(None if rank else folder / "large.safetensors", whole)
    (folder / f"memory-{rank}.json").write_text(json.dumps([before, peak.mb]))
    dist.destroy_process_group()


def worker(rank: int, port: int, folder: Path) -> None:
    join(rank, port)
    for kind, run in LAYERS.items():
        for rows, cut in CUTS:
            found = run(rows, *((0, cut) if rank == 0 else (cut, rows)))
            safetensors.torch.save_file(found, folder / f"{kind}-{rows}-{rank}.safetensors")
    told: dict[str, Any] = {}
    share_out, split_all = sharding._share_out, lambda shapes: dict.fromkeys(shapes)
    for name, split in [*((name, False) for name in MODELS), *((name, True) for name in SPLIT)]:
        sharding._share_out = split_all if split else share_out
        stem, events = f"split {name}" if split else name, list[dict[str, Any]]()
        trainer = Trainer(data(name, folder), MODELS[name], config(name), events.append, Checkpoints(folder / stem))
        told[stem] = losses(trainer)
        told[f"{stem} health"] = last_look(events)
        told[f"{stem} tables"] = sorted(trainer.model.adagrad())
        keep(trainer, folder / stem)
    sharding._share_out = share_out
    for split in (False, True):
        sharding.SPLIT_BYTES = 0 if split else 2**26
        stem = "split kinds" if split else "kinds"
        kinds = Trainer(PreparedData(folder / "kinds"), MMOE, config("kinds"))
        told |= {stem: losses(kinds), f"{stem} tables": sorted(kinds.model.adagrad())}
        told[f"{stem} validation"] = {t: asdict(m) for t, m in evaluate(kinds.model, kinds.data, "validation").items()}
        keep(kinds, folder / stem)
    sharding._share_out = split_all  # from here on: what one worker has left is shared out by rows
    started = Trainer(PreparedData(folder / "prepared"), MMOE, CONFIG, start=StartBundle(folder / "bundle"))
    keep(started, folder / "started")
    start, before = StartBundle(folder / "bundle"), list[dict[str, Any]]()
    grown = Trainer(PreparedData(folder / "grown"), MMOE, CONFIG, before.append, start=start)
    grown._measure(start)
    told["before"] = before[0]["before"]
    keep(grown, folder / "grown")
    resumed = Trainer(PreparedData(folder / "prepared"), MMOE, CONFIG, checkpoints=Checkpoints(folder / "one"))
    told |= {"resumed": losses(resumed)}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def matrix(rank: int, port: int, folder: Path) -> None:
    """The losses of every model in every precision."""
    join(rank, port)
    prepared = PreparedData(folder / "matrix")
    told = {f"{name} {p}": losses(Trainer(prepared, MATRIX[name], matrix_config(p))) for name in MATRIX for p in PRECISIONS}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def matrix_config(precision: Any) -> TrainConfig:
    return replace(CONFIG, epochs=1, batch_size=43, precision=precision)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, write_prepared: Any, clicks_schema: Any, clicks: Any) -> PreparedData:
    parts = {"train": [clicks(700, 1), clicks(333, 2)], "validation": [clicks(401, 3)], "test": [clicks(300, 4)]}
    folder = tmp_path_factory.mktemp("two")
    plain = dump(clicks_schema)
    plain["features"].append({"name": "seen", "kind": "sequence", "max_length": 4})
    listed = {part: [with_sequences(table) for table in tables] for part, tables in parts.items()}
    write_prepared(folder / "listed", parse(Schema, plain, "schema"), listed)
    data: PreparedData = write_prepared(folder / "prepared", clicks_schema, parts)
    return data


def with_sequences(rows: pa.Table) -> pa.Table:
    """With a sequence of up to four colours a row; the first half of the rows has none."""
    random = np.random.default_rng(rows.num_rows)
    lengths = random.integers(0, 5, rows.num_rows) * (np.arange(rows.num_rows) >= rows.num_rows // 2)
    return rows.append_column("seen", pa.array([random.choice(["red", "green"], n).tolist() for n in lengths]))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing by a second thread, and waits for it where others use the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(prepared: PreparedData) -> dict[str, tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]:
    """One worker's losses, best weights and Adagrad sums for each model; its state of step 200 lies in the folder `one`, and
    what it ended with in `bundle`."""
    found = {}
    for name, model in MODELS.items():
        kept = Checkpoints(prepared.folder.parent / "one") if name == "softmax" else None
        trainer = Trainer(data(name, prepared.folder.parent), model, config(name), checkpoints=kept)
        found[name] = losses(trainer), dict(trainer.model.state_dict()), trainer.model.adagrad()
        if name == "softmax":
            described = BundleConfig(FORMAT, model, "fp32", DataConfig(name="clicks", source="nowhere", schema="-"), "0" * 64)
            folder = prepared.folder.parent / "bundle"
            save_bundle(folder, trainer.whole_weights(), described, prepared.transform, {}, trainer.whole_adagrad())
    return found


@pytest.fixture(scope="module")
def grown(prepared: PreparedData, one: Any, write_prepared: Any, clicks_schema: Any, clicks: Any) -> pa.Table:
    """Another day's validation rows, a third of them of a new colour; they lie prepared in the folder `grown`."""
    rows = clicks(400, 5)
    rows = rows.set_column(0, "colour", pa.array([None if n % 3 else "violet" for n in range(400)]))
    start = prepared.transform.statistics
    write_prepared(prepared.folder.parent / "grown", clicks_schema, {"train": [rows], "validation": [rows]}, start)
    return rows


@pytest.fixture(scope="module")
def kinds(prepared: PreparedData, write_prepared: Any) -> Trainer:
    """One worker's trainer of all kinds of features and tasks, whose data lies in the folder `kinds`."""
    parts = {"train": [draw_kinds(700, 1), draw_kinds(333, 2)], "validation": [draw_kinds(301, 3)]}
    data = write_prepared(prepared.folder.parent / "kinds", parse(Schema, KINDS_SCHEMA, "schema"), parts)
    return Trainer(data, MMOE, config("kinds"))


@pytest.fixture(scope="module")
def two(prepared: PreparedData, one: Any, grown: pa.Table, kinds: Trainer) -> Path:
    """The folder in which two workers have left what they found."""
    run_both("worker", prepared.folder.parent)
    return prepared.folder.parent


def run_both(what: str, folder: Path) -> None:
    """Run a function of this file in two processes that find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [subprocess.Popen([sys.executable, __file__, what, str(rank), str(port), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]


def told(folder: Path, key: str) -> list[Any]:
    """What each of the two workers said."""
    return [json.loads((folder / f"told-{rank}.json").read_text())[key] for rank in range(2)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("rows", "cut"), CUTS)
def test_a_layer_is_the_same_over_two_workers(kind: str, rows: int, cut: int, two: Path) -> None:
    pieces = [safetensors.torch.load_file(two / f"{kind}-{rows}-{rank}.safetensors") for rank in range(2)]
    for name, whole in LAYERS[kind](rows).items():
        if name in ("mean", "var"):  # both workers have moved alike
            assert torch.equal(pieces[0][name], pieces[1][name]), name
            found = pieces[0][name]
        elif name in ("x", "y"):  # each has its own rows
            found = torch.cat([piece[name] for piece in pieces])
        else:
            found = pieces[0][name] + pieces[1][name]
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def close(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stem", [*MODELS, *(f"split {name}" for name in SPLIT)])
def test_two_workers_take_the_steps_of_one(stem: str, two: Path, one: Any) -> None:
    first, second = told(two, stem)
    assert first == second  # the loss is the whole batch's, on both
    name = stem.removeprefix("split ")
    expected, weights, adagrad = one[name]
    assert len(first) == len(expected) == (208 if name == "softmax" else 25)
    # A bias before a norm changes nothing, so that its gradient is rounding alone, which Adam turns into steps. The norm's
    # running mean takes them up, and a batch of one row is normalised by that.
    most = 200 if name == "softmax" else 24
    close(first[:most], expected[:most])
    check_tables_and_weights(two, stem, weights, adagrad)


def check_tables_and_weights(two: Path, name: str, weights: dict[str, Tensor], adagrad: dict[str, Tensor]) -> None:
    found = safetensors.torch.load_file(two / f"{name}.safetensors")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        tolerance = 0.1 if "biases" in key or "running_mean" in key else 1e-3
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")
    sums = safetensors.torch.load_file(two / f"{name}.adagrad.safetensors")
    assert sums.keys() == adagrad.keys()
    for key, value in adagrad.items():
        torch.testing.assert_close(sums[key], value, rtol=0.02, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_two_workers_take_the_steps_of_one_with_lists_and_every_kind_of_task(two: Path, kinds: Trainer) -> None:
    expected = losses(kinds)
    assert expected[23] < 0.9 * expected[0]
    measured = {task: asdict(m) for task, m in evaluate(kinds.model, kinds.data, "validation").items()}
    for stem in ("kinds", "split kinds"):
        first, second = told(two, stem)
        assert first == second
        assert len(first) == len(expected) == 25
        close(first[:24], expected[:24])
        check_tables_and_weights(two, stem, dict(kinds.model.state_dict()), kinds.model.adagrad())
        for found in told(two, f"{stem} validation"):
            for task, values in measured.items():
                assert found[task] == pytest.approx(values, rel=1e-2, abs=1e-2, nan_ok=True), task


@pytest.mark.long
def test_two_workers_take_the_steps_of_one_with_every_model_kind_of_task_and_precision(
    tmp_path: Path, write_prepared: Any
) -> None:
    parts = {"train": [draw_kinds(700, 1), draw_kinds(333, 2)], "validation": [draw_kinds(301, 3)]}
    prepared = write_prepared(tmp_path / "matrix", parse(Schema, MATRIX_SCHEMA, "schema"), parts)
    run_both("matrix", tmp_path)
    for name, model in MATRIX.items():
        for precision in PRECISIONS:
            first, second = told(tmp_path, f"{name} {precision}")
            assert first == second
            expected = losses(Trainer(prepared, model, matrix_config(precision)))
            # bf16 rounds each worker's part of a gradient before they are added, and small steps lead elsewhere.
            within = {"rtol": 0, "atol": 1e-4} if precision == "fp32" else {"rtol": 0.02, "atol": 0}
            pair = torch.tensor(first[:24]), torch.tensor(expected[:24])
            torch.testing.assert_close(*pair, **within, msg=lambda m, n=name, p=precision: f"{n} {p}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_two_workers_see_the_experts_as_one_does(name: str, two: Path) -> None:
    first, second = told(two, f"{name} health")
    assert second == {}
    events: list[dict[str, Any]] = []
    trainer = Trainer(data(name, two), MODELS[name], config(name), events.append)
    trainer.model.load_state_dict(safetensors.torch.load_file(two / f"{name}.safetensors"))
    trainer.health.look(trainer.model, 1, 1, 1.0, final=True)
    # On all rows of the probe, of which each worker has looked up half in the tables.
    assert first == pytest.approx(last_look(events), rel=1e-3, abs=1e-5)


def test_two_workers_start_from_what_one_has_left(two: Path, one: Any) -> None:
    for file, expected in (("started", one["softmax"][1]), ("started.adagrad", one["softmax"][2])):
        found = safetensors.torch.load_file(two / f"{file}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_workers_let_tables_grow_and_measure_the_start_as_it_scores(two: Path, one: Any, grown: pa.Table) -> None:
    expected = {task: asdict(m) for task, m in Predictor(two / "bundle").evaluate([grown]).items()}
    for found in told(two, "before"):
        assert {task: found[task]["auc"] for task in found} == pytest.approx({t: m["auc"] for t, m in expected.items()})
        assert {task: found[task]["logloss"] for task in found} == pytest.approx({t: m["logloss"] for t, m in expected.items()})
    weights = safetensors.torch.load_file(two / "grown.safetensors")
    name = "embeddings.embedding_bags.colour.weight"
    old = one["softmax"][1][name]
    assert torch.equal(weights[name][: len(old)], old)
    assert len(weights[name]) == len(old) + 1
    assert weights[name][-1].any()


def test_every_table_lies_with_one_worker_unless_it_is_split(two: Path, one: Any) -> None:
    names = sorted(one["softmax"][2])
    first, second = told(two, "softmax tables")
    assert first
    assert second
    assert sorted(first + second) == names
    sizes = {name: len(sums) for name, sums in one["softmax"][2].items()}
    first, second = told(two, "split softmax tables")
    assert first == [f"{name}[0:{(sizes[name] + 1) // 2}/{sizes[name]}]" for name in names]
    assert second == [f"{name}[{(sizes[name] + 1) // 2}:{sizes[name]}/{sizes[name]}]" for name in names]
    split = {key.split(".")[-2] for key in told(two, "split kinds tables")[0] if "[" in key}
    assert split == {"user", "genres", "seen"}  # of one, two and two tables in a batch, each the larger one


def test_a_table_is_split_where_it_is_more_than_a_workers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    assert sharding._share_out({"b": (900, 16), "a": (1000, 16), "giant": (50_000_000, 16)}) == {"giant": None, "a": 0, "b": 1}
    assert sharding._share_out({"a": (50_000_000, 16), "b": (50_000_000, 16)}) == {"a": 0, "b": 1}
    assert sharding._share_out({"small": (1000, 16)}) == {"small": 0}


@pytest.mark.parametrize("stem", ["softmax", "split softmax"])
def test_a_state_goes_on_with_any_number_of_workers(stem: str, two: Path, one: Any, prepared: PreparedData) -> None:
    expected = one["softmax"][0][200:]
    for found in told(two, "resumed"):  # with split tables
        close(found, expected)
    state = Checkpoints(two / stem)  # what two workers wrote
    close(losses(Trainer(prepared, MMOE, CONFIG, checkpoints=state)), expected)


@pytest.mark.long
def test_no_worker_holds_more_than_its_share_and_a_chunk(tmp_path: Path) -> None:
    run_both("save_large", tmp_path)
    files = TensorFiles([tmp_path / "large.safetensors"])
    assert [files.shape(name) for name in files] == [[4_000_000, 16]] * 3
    for rank in range(2):
        before, peak = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        assert before > 366  # MiB: one table and half of another
        assert peak < before + 100  # a chunk has 64; the tables of the other worker 366


if __name__ == "__main__":
    {"worker": worker, "save_large": save_large, "matrix": matrix}[sys.argv[1]](
        int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    )
