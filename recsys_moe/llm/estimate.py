"""What a model takes, from its `config.json` alone: parameters in all and for a token, operations, memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recsys_moe.experts import MLPExperts
from recsys_moe.llm.checkpoints import FAMILIES, parse_config
from recsys_moe.llm.layers import Decoder
from recsys_moe.routing import ExpertChoiceRouter, GShardRouter, HashRouter, RandomRouter, SwitchRouter, TopPRouter

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Estimate:
    """Fields:
    parameters: all of them.
    active: those that one token uses, k of E experts and all else.
    flops: floating-point operations (a multiply-add is 2) of one token, with `context` tokens before it.
    weight_bytes: by precision.
    kv_bytes_per_token, kv_bytes: the cache of a token, and of `context` of them, by precision.
    """

    family: str
    parameters: int
    active: int
    context: int
    flops: int
    weight_bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    kv_bytes: dict[str, int]


def estimate(values: dict[str, Any], where: Path, context: int | None = None) -> Estimate:
    """What the model of a `config.json` takes; no weights are made.

    `context` is by default as long as the model allows.

    Raises:
        UserError: an unknown family, or a configuration that can't be built.
    """
    config = parse_config(values, where)
    _, make = FAMILIES[values["model_type"]]
    with torch.device("meta"):
        model = make(config, torch.bfloat16)
    window = model.config.window
    context = model.config.max_positions if context is None else context
    parameters = sum(parameter.numel() for parameter in model.parameters())
    active = parameters - sum(_idle(module) for module in model.modules())
    looked_up = 0 if config.tie_word_embeddings else model.embedding.numel()
    seen = context if window is None else min(context, window)
    kv = sum(model.cache_widths())
    return Estimate(
        values["model_type"],
        parameters,
        active,
        context,
        2 * (active - looked_up) + 2 * seen * _attended(model),
        {name: parameters * size for name, size in BYTES.items()},
        {name: kv * size for name, size in BYTES.items()},
        {name: kv * size * seen for name, size in BYTES.items()},
    )


def _idle(module: torch.nn.Module) -> int:
    """Parameters of a layer's experts that a token does not choose."""
    router, experts = getattr(module, "router", None), getattr(module, "experts", None)
    if not isinstance(experts, MLPExperts) or router is None:
        return 0
    each = sum(weight[0].numel() for weight in experts.weights)
    total = router.num_experts if isinstance(router, HashRouter | RandomRouter) else router.linear.num_experts
    return int(each * (total - _used(router, total)))


def _used(router: torch.nn.Module, total: int) -> float:
    """Experts that a token uses, on average where they differ in number; of top-p, which has no bound, all."""
    match router:
        case SwitchRouter() | HashRouter():
            return 1
        case GShardRouter():
            return 2
        case ExpertChoiceRouter():
            return min(router.capacity_factor, total)
        case TopPRouter():
            return total
        case _:
            return int(router.k)  # type: ignore[arg-type]


def _attended(model: Decoder) -> int:
    """Multiply-adds with the keys and values of one token in the context: what its heads read of it, in all layers."""
    return sum(block.attention.products_per_key for block in model.blocks)  # type: ignore[misc, union-attr]
