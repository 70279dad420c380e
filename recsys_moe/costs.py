"""What a model costs: parameters and floating-point operations a sample; and models made equally large.

Only the dense part counts: embedding tables are looked up, not multiplied. An operation is a multiplication or an addition of a
matrix product; norms and activations are left out, as is usual.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys_moe.embeddings import JaggedTensor
from recsys_moe.errors import UserError
from recsys_moe.kernels.backends import implementation
from recsys_moe.ranker import Ranker
from recsys_moe.transforms import Transform

Budget = Literal["none", "params", "flops"]
TOLERANCE = 0.03
_ROWS = 8


@dataclass(frozen=True)
class Cost:
    """Parameters of the dense part, and operations a sample in scoring."""

    params: int
    flops: int


def cost_of(config: Any, transform: Transform, widths: Mapping[str, int]) -> Cost:
    """What a model of this configuration costs on prepared data whose towers are `widths` wide. Its tables are left small."""
    lists = [replace(feature, cardinality=_ROWS) for feature in transform.lists]
    cardinalities, dense = [_ROWS] * len(transform.cardinalities), len(transform.dense_names)
    names, own = transform.sparse_names, transform.own_rows
    model = Ranker(config, names, cardinalities, dense, widths, lists=lists, own_rows=own).eval()
    ids = torch.zeros(_ROWS, len(names) + len(own), dtype=torch.int32)
    none = JaggedTensor(torch.zeros(0, dtype=torch.int32), offsets=torch.zeros(_ROWS + 1, dtype=torch.int32))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        model(ids, torch.zeros(_ROWS, dense), [none] * len(lists))
    return Cost(sum(p.numel() for p in model.dense_parameters()), counter.get_total_flops() // _ROWS)


def _formulas() -> dict[Any, Any]:
    """Operations of the project's own kernels, as PyTorch's counter wants them: by shapes. None where the reference runs."""
    implementation("auto", torch.device("cpu"))  # registers them
    ops = torch.ops.recsys_moe
    if not hasattr(ops, "dense_forward"):
        return {}

    def dense(x: Any, gate: Any, weight: Any, *rest: Any, out_val: Any = None, **named: Any) -> int:
        return 2 * int(x[0]) * int(torch.Size(weight).numel())

    def product(x: Any, weight: Any, *rest: Any, out_val: Any = None, **named: Any) -> int:
        return 2 * int(x[0]) * int(torch.Size(weight).numel())

    def gated(x: Any, logits: Any, *weights: Any, out_val: Any = None, **named: Any) -> int:
        products = sum(int(torch.Size(w).numel()) for w in weights[:3])  # down, up, the experts'
        return 2 * int(x[0]) * products + 2 * int(torch.Size(logits).numel()) * int(x[2])

    def sparse(*inputs: Any, **named: Any) -> int:
        weights, gate_weights = inputs[1], inputs[10]
        return 2 * int(torch.Size(gate_weights).numel()) * sum(int(w[1] * w[2]) for w in weights)

    def mix(logits: Any, experts: Any, *rest: Any, out_val: Any = None, **named: Any) -> int:
        return 2 * int(torch.Size(logits).numel()) * int(experts[2])

    products = {ops.linear: product, ops.route: product}
    return {ops.dense_forward: dense, ops.gated_forward: gated, ops.sparse_forward: sparse, ops.gate_mix: mix, **products}


def scaled(config: Any, factor: float) -> Any:
    """The configuration with its experts' widths (all `…_dims` but the towers') times `factor`, rounded."""
    names = [f.name for f in fields(config) if f.name.endswith("_dims") and f.name != "tower_dims"]
    return replace(config, **{n: tuple(max(1, round(w * factor)) for w in getattr(config, n)) for n in names})


def to_budget(configs: Mapping[str, Any], budget: Budget, reference: str, cost: Callable[[Any], Cost]) -> dict[str, Any]:
    """The configurations with their experts made so wide that each costs what `reference` does, within 3 %.

    Raises:
        UserError: a model that no width brings there; names it.
    """
    if budget == "none":
        return dict(configs)
    aim: int = getattr(cost(configs[reference]), budget)

    def fitted(label: str, config: Any) -> Any:
        low, high = 1 / 64, 64.0
        best, best_gap = config, abs(getattr(cost(config), budget) / aim - 1)
        for _ in range(24):
            factor = (low * high) ** 0.5
            found = scaled(config, factor)
            ratio = getattr(cost(found), budget) / aim
            if abs(ratio - 1) < best_gap:
                best, best_gap = found, abs(ratio - 1)
            low, high = (factor, high) if ratio < 1 else (low, factor)
        if best_gap > TOLERANCE:
            raise UserError(
                f"model {label!r} can't be made to cost the {aim:,} {budget} of {reference!r} by the widths of its experts "
                f"(nearest {getattr(cost(best), budget):,}); change its other settings, the baseline or the budget"
            )
        return best

    return {label: config if label == reference else fitted(label, config) for label, config in configs.items()}
