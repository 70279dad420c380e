"""The multi-task loss against a loop over tasks and rows."""

import math

import pytest
import torch
from torch import Tensor

from recsys_moe.heads import BinaryHead
from recsys_moe.losses import task_losses


def loss_of(logits: Tensor, labels: Tensor, weights: Tensor, task_weights: Tensor) -> Tensor:
    """The loss of binary tasks."""
    return task_losses(BinaryHead().losses(logits.unsqueeze(2), labels), weights, task_weights).sum()


def naive(logits: Tensor, labels: Tensor, weights: Tensor, task_weights: Tensor) -> float:
    total = 0.0
    for t in range(logits.shape[1]):
        loss, weight = 0.0, 0.0
        for z, y, w in zip(logits[:, t].tolist(), labels[:, t].tolist(), weights[:, t].tolist(), strict=True):
            p = 1 / (1 + math.exp(-z))
            loss -= w * (y * math.log(p) + (1 - y) * math.log(1 - p))
            weight += w
        total += task_weights[t].item() * (loss / weight if weight else 0)
    return total


def draw(rows: int = 20, tasks: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = (torch.rand(rows, tasks) < 0.4).float()
    weights = torch.rand(rows, tasks) * 3 * (torch.rand(rows, tasks) < 0.7)
    return torch.randn(rows, tasks) * 2, labels, weights, torch.tensor([1.0, 0.5, 2.0])


def test_equals_the_loop() -> None:
    arguments = draw()
    assert loss_of(*arguments).item() == pytest.approx(naive(*arguments), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_weights_does_not_matter(scale: float) -> None:
    # Also where a task's weights in a batch sum to less than 1.
    logits, labels, weights, task_weights = draw()
    before = loss_of(logits, labels, weights, task_weights)
    assert loss_of(logits, labels, scale * weights, task_weights).item() == pytest.approx(before.item(), rel=1e-5)


def test_a_task_is_averaged_over_its_own_rows() -> None:
    # Twice the rows of the same kind change nothing: a rare task is not drowned by a frequent one.
    logits, labels, weights, task_weights = draw()
    twice = loss_of(*(torch.cat([x, x]) for x in (logits, labels, weights)), task_weights)
    assert twice.item() == pytest.approx(loss_of(logits, labels, weights, task_weights).item(), rel=1e-5)


def test_a_task_without_rows_adds_nothing_and_sends_no_gradient() -> None:
    logits, labels, weights, task_weights = draw()
    weights[:, 1] = 0
    logits.requires_grad_()
    loss = loss_of(logits, labels, weights, task_weights)
    assert loss.item() == pytest.approx(naive(logits, labels, weights, task_weights), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[:, 1].eq(0).all()
    assert logits.grad[:, 0].ne(0).any()


def test_no_rows_at_all_give_zero() -> None:
    logits, labels, weights, task_weights = draw()
    logits.requires_grad_()
    loss = loss_of(logits, labels, torch.zeros_like(weights), task_weights)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_a_row_that_a_task_does_not_observe_has_no_influence() -> None:
    logits, labels, weights, task_weights = draw()
    weights[3] = 0
    before = loss_of(logits, labels, weights, task_weights)
    logits[3], labels[3] = 50.0, 0.0
    assert torch.equal(loss_of(logits, labels, weights, task_weights), before)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4], [-1e4]])
    loss = loss_of(logits, torch.tensor([[0.0], [1.0]]), torch.ones(2, 1), torch.ones(1))
    assert loss.item() == pytest.approx(1e4)


def test_the_gradient_is_weighted_error() -> None:
    # ∂L/∂z = ω_t·w/Σw·(p − y)
    logits, labels, weights, task_weights = draw()
    logits.requires_grad_()
    loss_of(logits, labels, weights, task_weights).backward()
    expected = task_weights * weights / weights.sum(0) * (torch.sigmoid(logits) - labels)
    torch.testing.assert_close(logits.grad, expected.detach())
