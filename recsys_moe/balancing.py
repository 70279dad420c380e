"""How the tasks' losses are weighed against each other while a model is trained: Σ_t α_t·ω_t·L_t.

ω_t is the schema's `loss_weight`, L_t the mean loss over the task's own rows, and α_t, a constant to the gradient, is

    static         1
    annealed       γ_t^epoch (PLE's schedule, Tang et al., RecSys 2020; epochs count from 0)
    uncertainty    exp(−s_t)/2, with s_t learned by Adam to lower Σ_t (exp(−s_t)·ω_t·L_t + s_t)/2 (Kendall et al., CVPR 2018)
    dwa            T·softmax_t(r_t / temperature), r_t the ratio of the mean losses of the last two epochs, 1 in the first two
                   (Liu et al., CVPR 2019)
    gradnorm       learned by Adam, so that all α_t·‖g_t‖ keep pace with their mean times (a task's relative loss)^alpha; their
                   mean is 1 (Chen et al., ICML 2018). Relative: to the task's first loss, divided by the tasks' mean
    upgrad, cagrad, mgda, pcgrad, dualproj, imtl_g, aligned_mtl
                   what torchjd makes of the Gramian ⟨g_t, g_u⟩: Jacobian descent (2406.16232 and the papers that it cites)

g_t = ∂(ω_t·L_t)/∂x, the gradient with respect to the shared representation x that the family's network reads: what comes out of
embeddings and crosses, of all rows of the batch. So no gradient over the tables is ever made for a single task, and Σ α_t·g_t,
which is what the methods compute, is what tables and crosses then learn from; the network below learns with the same α_t.
Methods that need g_t cost a backward pass through the network for each task; static costs nothing.

Of several workers each has some rows of x, and losses and Gramians are summed over them: all come to the same α_t, which one
worker with the whole batch would have come to. A task without rows in a batch has no part in it.

Shapes: B rows, T tasks.
"""

from dataclasses import field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from recsys_moe.distributed import total
from recsys_moe.errors import UserError, nearest
from recsys_moe.typed import typed

Positive = Annotated[float, Field(gt=0)]
LEAST = 0.01
"""The least that GradNorm makes of a task's α."""


@typed
class Static:
    """The schema's weights as they are."""

    name: Literal["static"] = "static"


@typed
class Annealed:
    """γ of each task, as `{like: 0.9}`; 1 where it names none."""

    name: Literal["annealed"]
    gamma: dict[str, Positive] = field(default_factory=dict)


@typed
class Uncertainty:
    """`lr` is that of the log-variances."""

    name: Literal["uncertainty"]
    lr: Positive = 0.01


@typed
class DWA:
    """A high temperature makes the tasks equal."""

    name: Literal["dwa"]
    temperature: Positive = 2.0


@typed
class GradNorm:
    """`alpha` 0 makes all gradients equally large; `lr` is that of the weights."""

    name: Literal["gradnorm"]
    alpha: Annotated[float, Field(ge=0)] = 1.5
    lr: Positive = 0.025


@typed
class CAGrad:
    """`c` is how far from the mean gradient it may go, as a share of its length: 0 is the mean."""

    name: Literal["cagrad"]
    c: Annotated[float, Field(ge=0)] = 0.4


@typed
class JacobianDescent:
    """torchjd's methods that have nothing to set."""

    name: Literal["upgrad", "mgda", "pcgrad", "dualproj", "imtl_g", "aligned_mtl"]


BalancingConfig = Annotated[
    Static | Annealed | Uncertainty | DWA | GradNorm | CAGrad | JacobianDescent, Field(discriminator="name")
]


class Balancer(Protocol):
    """A method and its state."""

    def __call__(self, losses_t: Tensor, rows_t: Tensor, x: Tensor, epoch: int, step: int) -> Tensor:
        """α, fp32 `[T]`, of this step.

        Args:
            losses_t: ω_t·L_t, or this worker's summand of it, that `x` leads to.
            rows_t: bool, which tasks have rows in the batch, anywhere.
            x: the shared representation of this worker's rows.
        """

    def state(self) -> dict[str, Tensor]:
        """What a run that goes on from here has to have, all of it filled in place by `load`."""


def balancer_of(config: Any, tasks: tuple[str, ...], seed: int = 0, device: torch.device | None = None) -> Balancer | None:
    """The balancer of these tasks; None: static.

    Raises:
        UserError: γ of a task that the schema does not have.

    >>> balancer = balancer_of(Annealed("annealed", {"like": 0.5}), ("click", "like"))
    >>> balancer(torch.ones(2), torch.ones(2).bool(), torch.zeros(0), epoch=2, step=0)
    tensor([1.0000, 0.2500])
    """
    match config:
        case Static():
            return None
        case Annealed():
            for task in config.gamma:
                if task not in tasks:
                    raise UserError(
                        f"train.balancing.gamma names the task {task!r}, which the schema does not have; {nearest(task, tasks)}"
                    )
            return Annealing(torch.tensor([config.gamma.get(task, 1.0) for task in tasks], device=device))
        case Uncertainty():
            return LearnedUncertainty(config, len(tasks), device)
        case DWA():
            return DynamicAverage(config, len(tasks), device)
        case GradNorm():
            return LearnedNorms(config, len(tasks), device)
        case _:
            return GramianWeights(weighting(config), seed)


class Annealing:
    def __init__(self, gamma_t: Tensor) -> None:
        self.gamma_t = gamma_t

    def __call__(self, losses_t: Tensor, rows_t: Tensor, x: Tensor, epoch: int, step: int) -> Tensor:
        return self.gamma_t**epoch

    def state(self) -> dict[str, Tensor]:
        return {}


class Learned:
    """A number a task that Adam moves."""

    def __init__(self, start: float, lr: float, tasks: int, device: torch.device | None) -> None:
        self.value_t = torch.full((tasks,), start, device=device)
        self.optimizer = torch.optim.Adam([self.value_t], lr)
        self.value_t.grad = torch.zeros_like(self.value_t)
        self.moments = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(self.value_t),
            "exp_avg_sq": torch.zeros_like(self.value_t),
        }
        self.optimizer.state[self.value_t] = self.moments

    def move(self, gradient_t: Tensor) -> None:
        self.value_t.grad = gradient_t
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value_t, **self.moments}


class LearnedUncertainty:
    def __init__(self, config: Uncertainty, tasks: int, device: torch.device | None) -> None:
        self.log_variance = Learned(0.0, config.lr, tasks, device)

    def __call__(self, losses_t: Tensor, rows_t: Tensor, x: Tensor, epoch: int, step: int) -> Tensor:
        alpha_t = torch.exp(-self.log_variance.value_t) / 2
        self.log_variance.move(torch.where(rows_t, 0.5 - alpha_t * total(losses_t.detach()), 0.0))
        return alpha_t

    def state(self) -> dict[str, Tensor]:
        return self.log_variance.state()


class DynamicAverage:
    """Means of the last two epochs, and sums of this one, as `[2, T]` and `[2, T]` (losses, batches)."""

    def __init__(self, config: DWA, tasks: int, device: torch.device | None) -> None:
        self.temperature = config.temperature
        self.means_2t, self.sums_2t = torch.full((2, tasks), torch.nan, device=device), torch.zeros(2, tasks, device=device)
        self.epoch = torch.zeros((), dtype=torch.int64)

    def __call__(self, losses_t: Tensor, rows_t: Tensor, x: Tensor, epoch: int, step: int) -> Tensor:
        if epoch > self.epoch:
            # A task without a row in the whole epoch keeps its mean.
            mean_t = torch.where(self.sums_2t[1] > 0, self.sums_2t[0] / self.sums_2t[1], self.means_2t[1])
            self.means_2t.copy_(torch.stack([self.means_2t[1], mean_t]))
            self.sums_2t.zero_()
            self.epoch.fill_(epoch)
        self.sums_2t += torch.stack([total(losses_t.detach()) * rows_t, rows_t.float()])
        ratio_t = torch.nan_to_num(self.means_2t[1] / self.means_2t[0].clamp_min(1e-12), nan=1.0)
        return len(ratio_t) * torch.softmax(ratio_t / self.temperature, 0)

    def state(self) -> dict[str, Tensor]:
        return {"means": self.means_2t, "sums": self.sums_2t, "epoch": self.epoch}


class LearnedNorms:
    def __init__(self, config: GradNorm, tasks: int, device: torch.device | None) -> None:
        self.exponent, self.alpha = config.alpha, Learned(1.0, config.lr, tasks, device)
        self.first_t = torch.full((tasks,), torch.nan, device=device)

    def __call__(self, losses_t: Tensor, rows_t: Tensor, x: Tensor, epoch: int, step: int) -> Tensor:
        whole_t, norms_t = total(losses_t.detach()), gramian(losses_t, x).diagonal().sqrt().float()
        self.first_t.copy_(torch.where(self.first_t.isnan() & rows_t, whole_t, self.first_t))
        there = rows_t & (norms_t > 0)
        alpha_t = self.alpha.value_t.clone()
        if there.sum() > 1:
            pace_t = torch.where(there, whole_t / self.first_t.clamp_min(1e-12), 0.0)
            pace_t = pace_t * there.sum() / pace_t.sum().clamp_min(1e-12)
            mean = (alpha_t * norms_t)[there].mean()
            behind_t = alpha_t * norms_t - mean * pace_t**self.exponent
            self.alpha.move(torch.where(there, behind_t.sign() * norms_t / mean, 0.0))
            moved_t = self.alpha.value_t.clamp_min(LEAST)
            self.alpha.value_t.copy_(moved_t / moved_t.mean())
        return alpha_t

    def state(self) -> dict[str, Tensor]:
        return {"first": self.first_t, **self.alpha.state()}


class GramianWeights:
    """torchjd's `weighting`, whose random numbers, if it draws any, are the step's own: the same on all workers, and in a run
    that goes on from a checkpoint."""

    def __init__(self, weighting: Any, seed: int) -> None:
        self.weighting, self.seed = weighting, seed

    def __call__(self, losses_t: Tensor, rows_t: Tensor, x: Tensor, epoch: int, step: int) -> Tensor:
        gramian_tt = gramian(losses_t, x).cpu()
        # What is not finite is no method's business: the trainer stops at the loss.
        there = (gramian_tt.diagonal() > 0) & gramian_tt.diagonal().isfinite()
        alpha_t = torch.ones_like(losses_t)
        if there.sum() > 1:
            gramian_tt = gramian_tt[there][:, there]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence((self.seed, step)).generate_state(1)[0]))
                # The methods know no scale, but some take gradients as small as a mean's for zero.
                found_t = self.weighting(gramian_tt / gramian_tt.diagonal().mean())
            alpha_t[there.to(alpha_t.device)] = found_t.to(alpha_t)
        return alpha_t

    def state(self) -> dict[str, Tensor]:
        return {}


def gramian(losses_t: Tensor, x: Tensor) -> Tensor:
    """⟨g_t, g_u⟩ over all workers' rows, fp64 `[T, T]`, of the losses' gradients with respect to `x`.

    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> gramian(torch.stack([x.sum(), x.square().sum()]), x).tolist()
    [[2.0, 6.0], [6.0, 20.0]]
    """
    gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0].flatten() for loss in losses_t]
    jacobian = torch.stack(gradients).double()
    return total(jacobian @ jacobian.t())


def weighting(config: CAGrad | JacobianDescent) -> Any:
    """torchjd's way from a Gramian to α."""
    from torchjd import aggregation

    match config.name:
        case "cagrad":
            return aggregation.CAGradWeighting(c=config.c)
        case "upgrad":
            return aggregation.UPGradWeighting(projector=_projector())
        case "dualproj":
            return aggregation.DualProjWeighting(projector=_projector())
        case "mgda":
            return aggregation.MGDAWeighting()
        case "pcgrad":
            return aggregation.PCGradWeighting()
        case "imtl_g":
            return aggregation.IMTLGWeighting()
        case "aligned_mtl":
            return aggregation.AlignedMTLWeighting()


def _projector() -> Any:
    """Projection onto the dual cone of the gradients by scipy's non-negative least squares; torchjd's own asks for a solver
    under the GPL."""
    from scipy.optimize import nnls
    from torchjd.linalg import DualConeProjector

    class Projector(DualConeProjector):
        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            # min vᵀGv over v ≥ u: with v = u + w and G = RᵀR, min ‖R·w + R·u‖ over w ≥ 0.
            values, vectors = np.linalg.eigh(G.double().numpy())
            root = np.sqrt(values.clip(0))[:, None] * vectors.T
            rows = U.double().numpy().reshape(-1, U.shape[-1])
            return torch.from_numpy(np.stack([u + nnls(root, -root @ u)[0] for u in rows])).to(U).view(U.shape)

    return Projector()
