"""AITM, adaptive information transfer along a chain of conversions (Xi et al., KDD 2021).

    of each task t:    q_t = f_t(x)                                     ŷ_t = h_t(z_t)
    in the chain:      z_1 = q_1,   z_t = AIT(q_t, u_t),   u_t = g_t(z_{t−1})
    AIT(q, u)     =    Σ_i a_i·V·i over i ∈ {q, u},   a = softmax_i(⟨Q·i, K·i⟩ / √H)
    L             =    Σ_t L_t + strength · Σ_t mean max(p_t − p_{t−1}, 0)

A later event of the chain happens only where the one before did (impression → click → purchase): the transfer hands on what
was learnt where there are more positives, and the calibrator holds p_t below p_{t−1}. So all labels of the chain are of all
rows (purchase: clicked and purchased), none given the event before it. Tasks outside of the chain have networks of their own
beside it. g is a layer with norm and ReLU. Written from memory of the paper; the calibrator's mean is over the rows in which t
is observed.

Shapes: B rows, D inputs, T tasks, H units of the last bottom layer.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_moe.errors import UserError
from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.models.family import Family, binary_place, check_binary, same_rows
from recsys_moe.routing import PlanNames, RoutingPlan, SoftPlan, sigmoid
from recsys_moe.schema import Schema
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class AITMConfig:
    """The chain of binary tasks, earliest event first, as `[click, buy]`, and the calibrator's `strength` (0: none); widths of
    each task's network and of its tower's hidden layers, and of each feature's embedding.

    `dropout` is of the embeddings and of the networks' units.
    """

    name: Literal["aitm"] = "aitm"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    chain: tuple[str, ...] | None = None
    strength: Annotated[float, Field(ge=0)] = 0.6
    bottom_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (256, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class AITM(Family):
    """x `[B, D]` → outputs `[B, Σ widths]` and the plan of the transfers, "transfer": what each task of the chain but the first
    takes of its own and of what the one before hands on. `dtype` is the precision of the tasks' networks; transfers and towers
    are fp32.

    Raises:
        UserError: no chain of at least two tasks; one that the schema lacks, that has more than one output, or named twice.

    >>> config = AITMConfig(chain=("click", "buy"))
    >>> model = AITM(config, in_dim=12, tasks={"click": 1, "buy": 1, "ending": 3}, dtype=torch.float32).eval()
    >>> outputs, plans = model(torch.zeros(5, 12))
    >>> outputs.shape, plans["transfer"].weights.shape
    (torch.Size([5, 5]), torch.Size([5, 1, 2]))
    """

    def __init__(self, config: AITMConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        chain = config.chain or ()
        if len(chain) < 2:
            raise UserError(
                "model=aitm needs the tasks whose events follow on one another, at least two, the earliest first; add "
                "'model.chain=[FIRST, SECOND]'"
            )
        if len(set(chain)) < len(chain):
            raise UserError(f"model.chain is {list(chain)}, with a task named twice; name each once")
        self.chain_t, self.chain_o = map(list, zip(*(binary_place(t, tasks, "model.chain") for t in chain), strict=True))
        self.strength = config.strength
        self.plan_names = {"transfer": PlanNames(chain[1:], ("own", "handed on"))}
        self.bottoms = MLPExperts(len(tasks), in_dim, config.bottom_dims, config.norm, config.dropout, dtype=dtype)
        self.transfers = nn.ModuleList(Transfer(self.bottoms.out_dim, config.norm) for _ in chain[1:])
        self.towers = Towers(self.bottoms.out_dim, config.tower_dims, config.norm, tuple(tasks.values()))

    def forward(self, x_bd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        z_t = list(self.bottoms(x_bd).float().unbind(1))
        logits = []
        for transfer, before, t in zip(self.transfers, self.chain_t, self.chain_t[1:], strict=False):
            z_t[t], logits_b2 = transfer(z_t[before], z_t[t])
            logits.append(logits_b2)
        return self.towers(torch.stack(z_t, 1)), {"transfer": SoftPlan(torch.stack(logits, 1))}

    def objective(self, outputs_bo: Tensor, losses_bt: Tensor, labels_bt: Tensor, weights_bt: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of the later tasks of the chain with the calibrator's term."""
        if not self.strength:
            return losses_bt, weights_bt
        p_bc = sigmoid(outputs_bo[:, self.chain_o])
        above_bc = (p_bc[:, 1:] - p_bc[:, :-1]).clamp_min(0)
        place = torch.tensor(self.chain_t[1:], device=losses_bt.device)
        return losses_bt.index_add(1, place, above_bc, alpha=self.strength), weights_bt


class Transfer(nn.Module):
    """One step of the chain: z_{t−1} and q_t `[B, H]` → z_t `[B, H]` and the logits of its two parts, q_t and u_t, `[B, 2]`."""

    def __init__(self, units: int, norm: Norm) -> None:
        super().__init__()
        self.hand_on = MLPExperts(1, units, (units,), norm)
        self.attention = MLPExperts(3, units, (), linear_out=units, bias=False)  # Q, K and V

    def forward(self, before_bh: Tensor, own_bh: Tensor) -> tuple[Tensor, Tensor]:
        parts_b2h = torch.stack([own_bh, self.hand_on(before_bh).squeeze(1)], 1)
        q, k, v = self.attention(parts_b2h.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(2)
        logits_b2 = (q * k).sum(2) / math.sqrt(q.shape[2])
        return SoftPlan(logits_b2.unsqueeze(1)).mix(v).squeeze(1), logits_b2


def check_chain(config: AITMConfig, schema: Schema) -> None:
    """Raises UserError: the chain has a task that is not binary, or one that is observed only where the one before happened."""
    chain, tasks = config.chain or (), {task.name: task for task in schema.tasks}
    check_binary(chain, schema, "model.chain")
    for before, name in itertools.pairwise(chain):
        if name in tasks and before in tasks and same_rows(tasks[name].mask, tasks[before].label):
            raise UserError(
                f"model.chain: task {name!r} has the mask {tasks[name].mask!r}, the label of {before!r}, but AITM is for "
                "labels of all rows; write its label as both events, without the mask, or use model=esmm"
            )
