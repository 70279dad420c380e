"""Loss balancing: each method against its mathematics on small quadratics, and through the trainer."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from recsys_moe.balancing import (
    DWA,
    LEAST,
    Annealed,
    CAGrad,
    GradNorm,
    JacobianDescent,
    Static,
    Uncertainty,
    balancer_of,
    gramian,
)
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.shards import PreparedData
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.typed import dump, parse

TASKS = ("a", "b", "c")
METHODS: dict[str, Any] = {
    "annealed": Annealed("annealed", {"buy": 0.5}),
    "uncertainty": Uncertainty("uncertainty", lr=0.1),
    "dwa": DWA("dwa"),
    "gradnorm": GradNorm("gradnorm", lr=0.1),
    "cagrad": CAGrad("cagrad"),
    **{name: JacobianDescent(name) for name in ("upgrad", "mgda", "pcgrad", "dualproj", "imtl_g", "aligned_mtl")},  # type: ignore
}


class Quadratics:
    """L_t(x) = scale_t·‖x − b_t‖²/2 over two rows of four numbers; some of the gradients conflict."""

    def __init__(self, seed: int = 0, scales: tuple[float, ...] = (1.0, 3.0, 0.5)) -> None:
        random = torch.Generator().manual_seed(seed)
        self.x = torch.randn(2, 4, generator=random).requires_grad_()
        self.b, self.scales = torch.randn(3, 2, 4, generator=random), scales

    def losses(self) -> Tensor:
        return torch.stack([s * (self.x - b).square().sum() / 2 for s, b in zip(self.scales, self.b, strict=True)])

    @property
    def jacobian(self) -> Any:
        rows = [s * (self.x.detach() - b).flatten() for s, b in zip(self.scales, self.b, strict=True)]
        return torch.stack(rows).double().numpy()


def alpha(config: Any, q: Quadratics, rows: Tensor | None = None, scale: float = 1.0, step: int = 0) -> Tensor:
    balancer = balancer_of(config, TASKS)
    assert balancer is not None
    return balancer(scale * q.losses(), torch.ones(3).bool() if rows is None else rows, q.x, 0, step)


def test_the_gramian_is_that_of_the_gradients() -> None:
    q = Quadratics()
    np.testing.assert_allclose(gramian(q.losses(), q.x), q.jacobian @ q.jacobian.T, rtol=1e-5)


# -- each method's direction Σ α_t·g_t from the gradients themselves


def projected(gradient: Any, jacobian: Any) -> Any:
    """The nearest direction that raises no loss."""
    constraint = {"type": "ineq", "fun": lambda z: jacobian @ z, "jac": lambda z: jacobian}
    result = minimize(lambda z: ((z - gradient) ** 2).sum(), gradient, constraints=constraint, options={"ftol": 1e-14})
    return result.x


def naive_pcgrad(jacobian: Any) -> Any:
    torch.manual_seed(int(np.random.SeedSequence((0, 0)).generate_state(1)[0]))
    direction = 0
    for i, gradient in enumerate(jacobian):
        for j in torch.randperm(3).tolist():
            if j != i and gradient @ jacobian[j] < 0:
                gradient = gradient - (gradient @ jacobian[j]) / (jacobian[j] @ jacobian[j]) * jacobian[j]
        direction = direction + gradient
    return direction


def naive_mgda(jacobian: Any) -> Any:
    """The shortest convex combination."""
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    result = minimize(lambda w: ((w @ jacobian) ** 2).sum(), np.ones(3) / 3, bounds=[(0, 1)] * 3, constraints=simplex)
    return result.x @ jacobian


def naive_cagrad(jacobian: Any) -> Any:
    """The direction near the mean whose least gain is largest."""
    mean = jacobian.mean(0)
    radius = 0.4 * np.linalg.norm(mean)
    near = {"type": "ineq", "fun": lambda z: radius**2 - ((z[1:] - mean) ** 2).sum()}
    least = {"type": "ineq", "fun": lambda z: jacobian @ z[1:] - z[0]}
    start = np.concatenate([[(jacobian @ mean).min()], mean])
    result = minimize(lambda z: -z[0], start, constraints=[near, least], options={"ftol": 1e-12, "maxiter": 500})
    return result.x[1:]


def naive_imtl_g(jacobian: Any) -> Any:
    """The combination, of weights that sum to 1, that is as long in the direction of each gradient."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    differences = units[0] - units[1:]
    system = np.concatenate([differences @ jacobian.T, np.ones((1, 3))])
    return np.linalg.solve(system, [0, 0, 1]) @ jacobian


def naive_aligned_mtl(jacobian: Any) -> Any:
    """The mean of the rows of the nearest multiple of an orthonormal matrix."""
    u, singular, v = np.linalg.svd(jacobian, full_matrices=False)
    return (singular.min() * u @ v).mean(0)


NAIVE: dict[str, Callable[[Any], Any]] = {
    "upgrad": lambda jacobian: np.mean([projected(gradient, jacobian) for gradient in jacobian], 0),
    "dualproj": lambda jacobian: projected(jacobian.mean(0), jacobian),
    "pcgrad": naive_pcgrad,
    "mgda": naive_mgda,
    "cagrad": naive_cagrad,
    "imtl_g": naive_imtl_g,
    "aligned_mtl": naive_aligned_mtl,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAIVE)
def test_jacobian_descent_is_its_mathematics(name: str, seed: int) -> None:
    q = Quadratics(seed, scales=(1.0, 3.0, 0.5) if seed else (1.0, 1.0, 8.0))
    got = alpha(METHODS[name], q).double().numpy() @ q.jacobian
    expected = NAIVE[name](q.jacobian)
    assert np.linalg.norm(got - expected) < (0.05 if name == "mgda" else 2e-3) * np.linalg.norm(expected)


@pytest.mark.parametrize("name", NAIVE)
def test_gradients_as_small_as_a_means_are_no_zeros(name: str) -> None:
    q = Quadratics()
    torch.testing.assert_close(alpha(METHODS[name], q, scale=1e-5), alpha(METHODS[name], q), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAIVE)
def test_a_task_without_rows_holds_nobody_back(name: str) -> None:
    q, two = Quadratics(), Quadratics()
    q.scales = (1.0, 0.0, 0.5)
    two.scales, two.b = (1.0, 0.5), two.b[[0, 2]]
    balancer = balancer_of(METHODS[name], ("a", "c"))
    assert balancer is not None
    rows = torch.tensor([True, False, True])
    expected = balancer(two.losses(), torch.ones(2).bool(), two.x, 0, 0)
    torch.testing.assert_close(alpha(METHODS[name], q, rows)[rows], expected)


def test_random_orders_are_the_steps_own_and_leave_the_rest_alone() -> None:
    q = Quadratics(1, scales=(1.0, 1.0, 1.0))
    q.b[1], q.b[2] = 2 * q.x.detach() - q.b[0] + 0.5, q.b[2] + 1  # conflicts on all sides
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = [alpha(METHODS["pcgrad"], q, step=step).tolist() for step in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert [alpha(METHODS["pcgrad"], q, step=step).tolist() for step in range(20)] == first
    assert len({tuple(a) for a in first}) > 1


# -- learned and scheduled weights


def test_uncertainty_is_torchjds_with_adam() -> None:
    from torchjd.scalarization import UW

    q, theirs = Quadratics(), UW(3)
    balancer, adam = balancer_of(METHODS["uncertainty"], TASKS), torch.optim.Adam(theirs.parameters(), lr=0.1)
    assert balancer is not None
    for step in range(30):
        losses = q.losses()
        got = balancer(losses, torch.ones(3).bool(), q.x, 0, step)
        adam.zero_grad()
        values = losses.detach().requires_grad_()
        theirs(values).backward()
        adam.step()
        torch.testing.assert_close(got, values.grad)
    # In the end each task weighs as much as the others.
    for step in range(2000):
        got = balancer(q.losses(), torch.ones(3).bool(), q.x, 0, step)
    torch.testing.assert_close(got * q.losses(), torch.full((3,), 0.5), rtol=1e-2, atol=0)


def test_dwa_weighs_by_the_last_two_epochs() -> None:
    balancer, epochs = balancer_of(DWA("dwa", temperature=0.5), TASKS), 5
    assert balancer is not None
    random, means, x = np.random.default_rng(0), [], torch.zeros(1)
    for epoch in range(epochs):
        seen = []
        for step in range(4):
            losses, rows = random.random(3), np.array([True, step != 1, epoch != 2])
            got = balancer(torch.tensor(losses * rows), torch.tensor(rows), x, epoch, step)
            ratios = np.ones(3) if epoch < 2 else means[-1] / means[-2]
            powers = np.exp(ratios / 0.5)
            np.testing.assert_allclose(got, 3 * powers / powers.sum(), rtol=1e-5)
            seen.append(np.where(rows, losses, np.nan))
        # The last task has no row in one epoch, and keeps its mean.
        means.append(np.array([*np.nanmean(np.array(seen)[:, :2], 0), means[1][2] if epoch == 2 else np.mean(seen, 0)[2]]))


def test_gradnorm_is_its_loss_with_adam() -> None:
    q, balancer = Quadratics(), balancer_of(METHODS["gradnorm"], TASKS)
    assert balancer is not None
    w = torch.ones(3, requires_grad=True)
    adam, first = torch.optim.Adam([w], lr=0.1), q.losses().detach()
    for step in range(40):
        losses = q.losses()
        got = balancer(losses, torch.ones(3).bool(), q.x, 0, step)
        torch.testing.assert_close(got, w.detach(), rtol=1e-4, atol=1e-5)
        norms = torch.tensor(np.linalg.norm(q.jacobian, axis=1)).float()
        pace = losses.detach() / first
        target = ((w * norms).mean() * (pace / pace.mean()) ** 1.5).detach()
        adam.zero_grad()
        ((w * norms - target).abs().sum() / (w * norms).mean().detach()).backward()
        adam.step()
        with torch.no_grad():
            w.clamp_(min=LEAST).div_(w.mean())
            q.x -= 0.02 * torch.tensor(got.numpy() @ q.jacobian).float().view(2, 4)
    assert got.min() < 0.9
    # Without a pace to keep, the gradients become equally long.
    balancer = balancer_of(GradNorm("gradnorm", alpha=0.0, lr=0.01), TASKS)
    assert balancer is not None
    for step in range(600):
        got = balancer(q.losses(), torch.ones(3).bool(), q.x, 0, step)
    lengths = got * torch.tensor(np.linalg.norm(q.jacobian, axis=1)).float()
    assert lengths.max() < 1.1 * lengths.min()


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm"])
def test_learned_weights_wait_for_a_task_that_has_no_rows(name: str) -> None:
    q, balancer = Quadratics(), balancer_of(METHODS[name], TASKS)
    assert balancer is not None
    q.scales = (1.0, 0.0, 0.5)
    for step in range(5):
        got = balancer(q.losses(), torch.tensor([True, False, True]), q.x, 0, step)
    assert got.isfinite().all()
    assert balancer.state()["value"][1] / balancer.state()["value"].mean() == pytest.approx(
        0 if name == "uncertainty" else 1, abs=0.25
    )


def test_gamma_of_an_unknown_task() -> None:
    with pytest.raises(UserError, match=r"train.balancing.gamma names the task 'like', which the schema does not have"):
        balancer_of(Annealed("annealed", {"like": 0.5}), TASKS)


# -- through the trainer

MMOE = MMoEConfig(embedding_dim=4, num_experts=3, expert_dims=(8,), tower_dims=(4,), dropout=0.1)
BOTTOM = SharedBottomConfig(embedding_dim=4, bottom_dims=(16, 8), tower_dims=(4,), dropout=0.1)
# 9 steps an epoch; states after steps 5, 10, …
CONFIG = TrainConfig(epochs=3, batch_size=128, patience=0, checkpoint_steps=5)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_learns_and_goes_on_to_the_same_bits(name: str, prepared_clicks: PreparedData, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    config = replace(CONFIG, balancing=METHODS[name])
    events: list[dict[str, Any]] = []
    whole = Trainer(prepared_clicks, MMOE, config, events.append)
    result = whole.fit()
    assert result.best_quality > 0.6
    told = [e for e in events if e["kind"] == "epoch"]
    assert told[-1]["train.loss"] < 0.95 * told[0]["train.loss"]
    alphas = [(e["train.balancing.click"], e["train.balancing.buy"]) for e in told]
    if name == "annealed":
        assert alphas == [(1.0, 0.5**epoch) for epoch in range(3)]
    assert len(set(alphas)) > 1 or name == "dualproj"  # these two tasks' gradients do not conflict in the mean
    if isinstance(METHODS[name], JacobianDescent | CAGrad) and name != "pcgrad":
        return  # they have neither a state nor random numbers

    first = Trainer(prepared_clicks, MMOE, config, checkpoints=Checkpoints(tmp_path / "state"))
    step = first._train_step

    def stopping(batch: Any) -> float:
        loss = step(batch)
        if first.step == 24:
            raise Stop
        return loss

    first._train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        first.fit()
    second = Trainer(prepared_clicks, MMOE, config, checkpoints=Checkpoints(tmp_path / "state"))
    assert second.step == 20
    second.fit()
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], weight), key


def test_a_state_of_other_balancing_is_refused(prepared_clicks: PreparedData, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    Trainer(prepared_clicks, MMOE, config, checkpoints=Checkpoints(tmp_path)).fit()
    with pytest.raises(UserError, match=r"is not of train.balancing.name=gradnorm; go on with what it was trained with"):
        Trainer(prepared_clicks, MMOE, replace(config, balancing=METHODS["gradnorm"]), checkpoints=Checkpoints(tmp_path))


def test_alpha_weighs_what_the_schemas_weights_would(
    tmp_path: Any, write_prepared: Any, clicks: Any, clicks_schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # α as a constant is a loss weight: the same steps, to the bit, of tables and network.
    parts = {"train": [clicks(300, 1)], "validation": [clicks(100, 3)]}
    plain = dump(clicks_schema)
    plain["tasks"][1]["loss_weight"] = 0.25
    weighed = write_prepared(tmp_path / "weighed", parse(type(clicks_schema), plain, "schema"), parts)
    data = write_prepared(tmp_path / "plain", clicks_schema, parts)
    config = TrainConfig(epochs=2, batch_size=128)
    expected = Trainer(weighed, MMOE, config)
    expected.fit()
    trainer = Trainer(data, MMOE, config)

    class Constant:
        def __call__(self, losses_t: Tensor, rows_t: Tensor, x: Tensor, epoch: int, step: int) -> Tensor:
            assert x.shape == (min(128, 300 - step % 3 * 128), 4 * 2 + 2)
            return torch.tensor([1.0, 0.25])

        def state(self) -> dict[str, Tensor]:
            return {}

    trainer.balancer = Constant()
    trainer.fit()
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name


def test_per_task_gradients_leave_the_tables_alone(prepared_clicks: PreparedData) -> None:
    trainer = Trainer(prepared_clicks, MMOE, replace(CONFIG, balancing=METHODS["upgrad"]))
    trainer.model.train()
    before = copy.deepcopy(dict(trainer.model.state_dict()))
    batch = next(trainer.batches.epoch(0))
    trainer.model.set_embedding_lr(0.1)
    x = trainer.model.represent(batch.ids_bf, batch.dense_bd, batch.lists)
    losses = trainer.heads.losses(trainer.model.network(x)[0], batch.labels_bt).mean(0)
    found = gramian(losses, x)
    assert (found.diagonal() > 0).all()
    for name, tensor in trainer.model.state_dict().items():
        if name.startswith("embeddings."):
            assert torch.equal(tensor, before[name]), name
    # What the network keeps for its backward pass serves as often as there are tasks, and once more.
    torch.testing.assert_close(gramian(losses, x), found, rtol=0, atol=0)


def test_numbers_alone_can_be_balanced(tmp_path: Any, write_prepared: Any, clicks: Any, clicks_schema: Any) -> None:
    plain = dump(clicks_schema)
    plain["features"] = [{"name": "price", "kind": "numeric"}]
    schema = parse(type(clicks_schema), plain, "schema")
    data = write_prepared(tmp_path / "p", schema, {"train": [clicks(300, 1)], "validation": [clicks(100, 3)]})
    trainer = Trainer(data, MMOE, TrainConfig(epochs=1, batch_size=128, balancing=METHODS["upgrad"]))
    trainer.fit()
    assert trainer.alpha_t is not None
    assert trainer.alpha_t.isfinite().all()


@pytest.mark.parametrize("name", ["upgrad", "cagrad", "mgda", "aligned_mtl", "gradnorm"])
def test_a_loss_that_is_not_finite_stops_with_advice(name: str, prepared_clicks: PreparedData) -> None:
    config = TrainConfig(epochs=4, batch_size=128, lr=1e30, schedule="constant", balancing=METHODS[name])
    with pytest.raises(UserError, match=r"the loss became (inf|nan) at step \d+; lower train.lr or train.embedding_lr"):
        Trainer(prepared_clicks, BOTTOM, config).fit()


def test_static_needs_nothing(prepared_clicks: PreparedData) -> None:
    trainer = Trainer(prepared_clicks, MMOE, CONFIG)
    assert trainer.config.balancing == Static()
    assert trainer.balancer is None
