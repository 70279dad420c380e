"""ESMM, the entire space multi-task model (Ma et al., SIGIR 2018).

    p_click = σ(o_click),   p_conv = σ(o_conv) = P(conversion | click),   o_t = h_t(f_t(x)),   on the same embeddings
    L = mean over all rows of CE(click, p_click) + CE(click · conversion, p_click · p_conv)

A conversion is observed in clicked rows only, and so was P(conversion | click) trained, on rows that are not those it is asked
about. ESMM trains it through the product, on all rows: one without a click has no conversion, whatever the conversion might
have been. The conversion's score stays P(conversion | click) and is measured where it is observed; P(click and conversion) is
the product of two scores.

Here any number of tasks may be conversions of a click, each with a loss as above; tasks that are neither have networks of their
own beside them and their own losses. Written from memory of the paper.

Shapes: B rows, D inputs, T tasks, P conversions, H units of the last bottom layer.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from recsys_moe.errors import UserError
from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.models.family import Family, binary_place, check_binary, same_rows
from recsys_moe.routing import RoutingPlan
from recsys_moe.schema import Schema
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class ESMMConfig:
    """Which task is a conversion given which click, as `{buy: click}`; widths of each task's network and of its tower's hidden
    layers, and of each feature's embedding.

    Without `conversions` a task is one if its `mask` is the label of another, as `buy` with `mask: click == 1` beside `click`
    with `label: click == 1` (see `recsys_moe.models.settle`). `dropout` is of the embeddings and of the networks' units.
    """

    name: Literal["esmm"] = "esmm"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    conversions: dict[str, str] | None = None
    bottom_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (256, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class ESMM(Family):
    """x `[B, D]` → outputs `[B, Σ widths]`, of which each task's network and tower has its own; there are no gates.

    Raises:
        UserError: no conversions; one that the schema lacks or that has more than one output; a click that is itself a
            conversion.

    >>> config = ESMMConfig(conversions={"buy": "click"})
    >>> model = ESMM(config, in_dim=12, tasks={"click": 1, "buy": 1}, dtype=torch.float32).eval()
    >>> model(torch.zeros(5, 12))[0].shape
    torch.Size([5, 2])
    """

    def __init__(self, config: ESMMConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        if not config.conversions:
            raise UserError(
                "model=esmm needs to know which task is a conversion given which click; add "
                "'model.conversions={CONVERSION: CLICK}'"
            )
        pairs = [
            (binary_place(conversion, tasks, "model.conversions"), binary_place(click, tasks, "model.conversions"))
            for conversion, click in config.conversions.items()
        ]
        for click in config.conversions.values():
            if click in config.conversions:
                raise UserError(
                    f"model.conversions has {click!r} as a click and as a conversion; ESMM knows one step: drop one"
                )
        # Each conversion's task and output, and its click's.
        (self.conversion_t, self.conversion_o), (self.click_t, self.click_o) = (
            [list(places) for places in zip(*side, strict=True)] for side in zip(*pairs, strict=True)
        )
        self.plan_names = {}
        self.bottoms = MLPExperts(len(tasks), in_dim, config.bottom_dims, config.norm, config.dropout, dtype=dtype)
        self.towers = Towers(self.bottoms.out_dim, config.tower_dims, config.norm, tuple(tasks.values()))

    def forward(self, x_bd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        return self.towers(self.bottoms(x_bd).float()), {}

    def objective(self, outputs_bo: Tensor, losses_bt: Tensor, labels_bt: Tensor, weights_bt: Tensor) -> tuple[Tensor, Tensor]:
        """A conversion's loss is that of click and conversion, over the rows without a click, with the click's weight, and
        over those with one in which the conversion is observed, with its own."""
        click_bp, convert_bp = outputs_bo[:, self.click_o], outputs_bo[:, self.conversion_o]
        clicked_bp, converted_bp = labels_bt[:, self.click_t] > 0, labels_bt[:, self.conversion_t] > 0
        log_click, log_convert = F.logsigmoid(click_bp), F.logsigmoid(convert_bp)
        # 1 − p·q = (1 − p) + p·(1 − q)
        log_not = torch.logaddexp(F.logsigmoid(-click_bp), log_click + F.logsigmoid(-convert_bp))
        both_bp = -torch.where(clicked_bp & converted_bp, log_click + log_convert, log_not)
        click_weights, own_weights = weights_bt[:, self.click_t], weights_bt[:, self.conversion_t]
        both_weights = torch.where(clicked_bp, own_weights * (click_weights > 0), click_weights)
        losses, weights = list(losses_bt.unbind(1)), list(weights_bt.unbind(1))
        for p, t in enumerate(self.conversion_t):
            losses[t], weights[t] = both_bp[:, p], both_weights[:, p]
        return torch.stack(losses, 1), torch.stack(weights, 1)


def settle_conversions(config: ESMMConfig, schema: Schema) -> ESMMConfig:
    """`config` with the conversions that the schema's masks say.

    Raises:
        UserError: no mask says any; a conversion or click that is not binary; a conversion that is observed without the click.
    """
    if config.conversions is None:
        found = {
            task.name: click.name
            for task in schema.tasks
            for click in schema.tasks
            if task is not click and same_rows(task.mask, click.label)
        }
        if not found:
            raise UserError(
                "model=esmm: no task's mask is another task's label; say which task is a conversion given which click: "
                "'model.conversions={CONVERSION: CLICK}'"
            )
        config = replace(config, conversions=found)
    assert config.conversions is not None
    check_binary([*config.conversions, *config.conversions.values()], schema, "model.conversions")
    tasks = {task.name: task for task in schema.tasks}
    for conversion, click in config.conversions.items():
        if conversion in tasks and click in tasks and tasks[conversion].mask is None:
            raise UserError(
                f"model.conversions: task {conversion!r} has no mask, so it is observed without {click!r} too, but ESMM's "
                f"score is for rows with it; give the task mask: {tasks[click].label!r}, or use model=aitm"
            )
    return config
