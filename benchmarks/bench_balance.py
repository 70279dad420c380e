"""Load balance without an auxiliary loss: a sigmoid router with a correction bias against one with the Switch loss.

    python benchmarks/bench_balance.py [--steps 500] [--rate 0.01] [--figure docs/balance.png]

A small trainable layer: 64 experts, top-4, 8,192 tokens a step from clusters of very unequal size (Zipf), a task that
differs by cluster. Prints the load's coefficient of variation (mean of the last 50 steps; the multinomial floor is
√(experts / (tokens · k)) ≈ 0.044) and the task's loss, and draws their curves. The auxiliary loss is taken at the usual
weight and at weights that are meant to even the load as much as the bias does.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from recsys_moe.balance import auxiliary_loss
from recsys_moe.experts import MLPExperts
from recsys_moe.routing import TopKRouter

EXPERTS, K, TOKENS, WIDTH, CLUSTERS = 64, 4, 8192, 32, 256


class Task:
    """Tokens of Zipf-distributed clusters; the target is a linear map of the cluster's own plus noise."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.share = 1 / torch.arange(1, CLUSTERS + 1)
        self.centres = torch.randn(CLUSTERS, WIDTH, generator=self.generator)
        self.maps = torch.randn(CLUSTERS, WIDTH, WIDTH, generator=self.generator) / WIDTH**0.5

    def batch(self) -> tuple[Tensor, Tensor]:
        cluster = torch.multinomial(self.share, TOKENS, replacement=True, generator=self.generator)
        x = self.centres[cluster] + 0.5 * torch.randn(TOKENS, WIDTH, generator=self.generator)
        order = cluster.argsort()
        y = torch.empty_like(x)
        for c, rows in zip(*cluster[order].unique_consecutive(return_counts=True), strict=True):
            here, order = order[:rows], order[rows:]
            y[here] = x[here] @ self.maps[c]
        return x, y


def train(steps: int, rate: float, auxiliary: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """Load CV and task loss by step, with bias updates of `rate` and/or the auxiliary loss times `auxiliary`."""
    torch.manual_seed(seed)
    task = Task(seed)
    router = TopKRouter(WIDTH, EXPERTS, K, scoring="sigmoid", renormalize=True, correction_bias=True)
    experts = MLPExperts(EXPERTS, WIDTH, (32,), linear_out=WIDTH)
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters()], 3e-3, fused=True)
    cvs, losses = [], []
    for step in range(steps):
        x, y = task.batch()
        plan = router(x)
        loss = nn.functional.mse_loss(experts.combine(x, plan), y)
        (loss + auxiliary * auxiliary_loss(plan) if auxiliary else loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        load = plan.offsets.diff().float()
        # The rate falls to a twentieth, so that the load settles.
        router.update_bias(load, rate * (1 - 0.95 * step / steps))
        cvs.append((load.std(correction=0) / load.mean()).item())
        losses.append(loss.item())
    return cvs, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.01, help="the bias's update a step, falling to a twentieth")
    parser.add_argument("--auxiliary", type=float, nargs="+", default=[0.01, 1.0, 3.0], help="the auxiliary loss's weights")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    runs: dict[str, Callable[[], tuple[list[float], list[float]]]] = {
        "nothing": lambda: train(options.steps, 0.0, 0.0),
        "correction bias": lambda: train(options.steps, options.rate, 0.0),
    }
    for weight in options.auxiliary:
        runs[f"auxiliary loss · {weight:g}"] = partial(train, options.steps, 0.0, weight)
    curves = {name: run() for name, run in runs.items()}
    found = {
        name: {"load_cv": sum(cvs[-50:]) / 50, "task_loss": sum(losses[-50:]) / 50} for name, (cvs, losses) in curves.items()
    }
    for name, values in found.items():
        print(f"{name:22s} load CV {values['load_cv']:.3f}   task loss {values['task_loss']:.4f}")
    if options.figure:
        draw(curves, options.figure)
    print(json.dumps(found))


def draw(curves: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (cvs, losses) in curves.items():
        left.semilogy(cvs, label=name, linewidth=1)
        right.semilogy(losses, label=name, linewidth=1)
    left.axhline((EXPERTS / (TOKENS * K)) ** 0.5, color="grey", linestyle=":", label="multinomial floor")
    left.set(xlabel="step", ylabel="CV of the experts' load")
    right.set(xlabel="step", ylabel="task loss")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
