"""The GPU kernels as PyTorch operators: what is launched over which tensors, the shapes for tracing, and the gradients.

An operator is opaque to `torch.compile` and `torch.export`, which see its shapes (`register_fake`) and its backward, an
operator too. Tensors that an operator does not have, or need not give, are empty.

Shapes: dense tables `[B, E, ·]`, sparse ones `[R·K, ·]` sorted by expert (see `triton_kernels.py`), whose places from
offsets[E] on, slots without an expert, are never read and hold whatever they held.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from recsys_moe.kernels import triton_kernels as k

# ---------------------------------------------------------------------------------------------------------- launches


class Launch(NamedTuple):
    """One launch of a kernel: all that decides how it is compiled."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, kernels are noted down instead of launched: the ahead-of-time check compiles what really would be launched."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` over a grid of programs on the device of its tensors."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, constants, warps, stages))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants, **options("hip" if torch.version.hip else "cuda", warps, stages))


def options(backend: str, warps: int, stages: int) -> dict[str, Any]:
    """How a kernel is compiled. An AMD chip has 64 KB to hold the steps of a loop in flight, an NVIDIA chip 163 KB and more."""
    return {"num_warps": warps, "num_stages": min(stages, 2) if backend == "hip" else stages, "enable_fp_fusion": True}


class Tile(NamedTuple):
    """How a product is cut: rows × units of the result, and how much of the width at a time."""

    rows: int
    units: int
    width: int
    warps: int
    stages: int


# By what a product reads: `few` rows (a handful of tokens an expert), `narrow` experts of up to 32 units, `loaded` with a
# gate or a second half of SwiGLU, `ragged` widths that can't be read 16 bytes at a time, else `wide`. Only `few` depends on
# the number of rows, and is not used where a row's bits must not depend on its company. Larger tiles spill, or don't fit
# into an AMD chip's 64 KB: `make kernels-aot`.
FORWARD = {
    (torch.bfloat16, "wide"): Tile(128, 128, 64, 8, 3),
    (torch.bfloat16, "narrow"): Tile(64, 32, 64, 4, 3),
    (torch.bfloat16, "loaded"): Tile(128, 64, 32, 8, 3),
    (torch.bfloat16, "ragged"): Tile(64, 64, 32, 8, 3),
    (torch.bfloat16, "few"): Tile(16, 64, 128, 4, 4),
    (torch.float32, "wide"): Tile(64, 64, 32, 8, 2),
    (torch.float32, "narrow"): Tile(64, 32, 16, 4, 3),
    (torch.float32, "loaded"): Tile(32, 32, 32, 4, 3),
    (torch.float32, "ragged"): Tile(64, 32, 16, 8, 3),
    (torch.float32, "few"): Tile(16, 32, 64, 4, 3),
}
WEIGHT_GRAD = {
    torch.bfloat16: Tile(64, 64, 64, 8, 2),
    torch.float32: Tile(16, 64, 64, 8, 2),
}
NARROW, FEW_ROWS = 32, 16
PROGRAMS = 512  # enough for every chip's cores; sums over rows are cut into parts until there are as many


def _tile(weight: Tensor, units: int, loaded: bool, rows_each: int | None) -> Tile:
    """The tile of a product; `rows_each` None: whatever the number of rows."""
    kind = "loaded" if loaded else "wide"
    if weight.shape[1] % 16 or weight.shape[2] % 16:
        kind = "ragged"
    elif rows_each is not None and rows_each <= FEW_ROWS:
        kind = "few"
    elif units <= NARROW:
        kind = "narrow"
    return FORWARD[weight.dtype, kind]


def _flat(units: int, elements: int = 2048) -> dict[str, int]:
    """Blocks of an elementwise kernel: about `elements` in all, as many units as are worth reading together."""
    block = min(max(16, next_power_of_2(units)), 128)
    return {"BLOCK_ROWS": elements // block, "BLOCK_UNITS": block}


class Table(NamedTuple):
    """Whose rows: `rows` of each of the experts, or, with offsets, `rows` of all of them together."""

    rows: int
    experts: int
    offsets: Tensor | None

    def tiles(self, block: int) -> int:
        """How many tiles of rows there are, at most: each expert of a sparse table may have one that is not full."""
        if self.offsets is None:
            return self.experts * cdiv(self.rows, block)
        return cdiv(self.rows, block) + min(self.experts, self.rows)

    def parts(self, block: int, programs: int) -> int:
        """Into how many parts a sum over an expert's rows is cut, if `programs` would run without."""
        return max(1, min(cdiv(self.rows, 2 * block), PROGRAMS // programs))

    def counts(self, device: torch.device) -> Tensor:
        """Rows of each expert, `[E, 1]` or one for all."""
        return torch.full((1, 1), self.rows, device=device) if self.offsets is None else self.offsets.diff().unsqueeze(1)

    @property
    def block_e(self) -> int:
        return next_power_of_2(self.experts)


# ------------------------------------------------------------------------------------------------------------- layer


@torch.library.custom_op("recsys_moe::triton_layer", mutates_args=())
def layer(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    source: Sequence[int],
    slots: int,
    activation: str,
    training: bool,
    eps: float,
    keep: bool,
    fixed_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer of all experts, dense or sparse.

    Dense (no offsets): x `[B, S, D]`, gate `[B, G, D]`, group g reads input `source[g]`. Sparse: x `[R·K, D]` sorted by
    expert, or, with `order`, the `[B, D]` that it is gathered from, K·T = `slots` times each.

    Returns:
        y, a table in the weight's dtype; z, what came before the norm, if `keep` and the gradient needs it; the moments
        that were used, `[E, units]`, of a norm in training.
    """
    x, gate, weight = x.contiguous(), _packed(gate), weight.contiguous()
    table, shape = _table(x, weight, order, offsets), _shape(x, weight, order, offsets)
    z_units = weight.shape[1]
    units = z_units // 2 if activation == "swiglu" else z_units
    y = weight.new_empty(*shape, units)
    none = [weight.new_empty(0) for _ in range(3)]
    batch_norm = training and scale is not None
    z = weight.new_empty(*shape, z_units) if batch_norm or (keep and _needs_z(scale, activation)) else none[0]
    where = _Where(order, source, slots)
    rows_each = None if offsets is None or fixed_tiles else cdiv(table.rows, table.experts)
    if not batch_norm:
        norm = (running_mean, running_var, scale, shift)
        _linear(table, where, x, gate, weight, bias, norm, y, z if z.numel() else None, activation, eps, rows_each)
        return y, z, none[1], none[2]
    assert running_mean is not None  # they come together
    assert running_var is not None
    _linear(table, where, x, gate, weight, bias, (None,) * 4, z, None, "none", eps, rows_each)
    mean, var = _moments(table, z, running_mean, running_var)
    blocks = _flat(units)
    grid = (table.tiles(blocks["BLOCK_ROWS"]) * cdiv(units, blocks["BLOCK_UNITS"]),)
    launch(
        k.finish_kernel,
        grid,
        (z, mean, var, scale, shift, y, offsets, table.rows, table.experts, units, eps),
        ACTIVATION=activation,
        BLOCK_E=table.block_e,
        **blocks,
    )
    return y, z if keep else none[0], mean, var


@layer.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _, weight, _, scale, _, _, _, order, offsets, _, _, activation, training, _, keep, _ = inputs
    shape, z_units = _shape(x, weight, order, offsets), weight.shape[1]
    y = weight.new_empty(*shape, z_units // 2 if activation == "swiglu" else z_units)
    z = weight.new_empty(*shape, z_units) if keep and _needs_z(scale, activation) else weight.new_empty(0)
    moments = (scale.new_empty(scale.shape) if training and scale is not None else weight.new_empty(0) for _ in range(2))
    return y, z, *moments


def _needs_z(scale: Tensor | None, activation: str) -> bool:
    """Whether the gradient needs what came before the norm; ReLU's slope shows in its output."""
    return scale is not None or activation not in ("none", "relu")


def _keep_for_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, weight, bias, scale, _, running_mean, running_var, order, offsets, *options = inputs
    y, z, mean, var = output
    ctx.source, ctx.slots, ctx.activation, ctx.training, ctx.eps, _, _ = options
    if scale is None or not ctx.training:
        mean, var = running_mean, running_var
    ctx.save_for_backward(x, gate, weight, bias, scale, inputs[5], mean, var, order, offsets, z if z.numel() else y)
    ctx.set_materialize_grads(False)


def _layer_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 17
    x, gate, weight, bias, scale, shift, mean, var, order, offsets, z = ctx.saved_tensors
    wants = [*ctx.needs_input_grad[:4], any(ctx.needs_input_grad[4:6])]
    dx, dgate, dweight, dbias, dscale, dshift = layer_backward(
        *(dy, x, gate, weight, bias, scale, shift, mean, var, order, offsets, z),
        *(ctx.source, ctx.slots, ctx.activation, ctx.training, ctx.eps, wants),
    )
    wants.append(wants[-1])
    grads = zip((dx, dgate, dweight, dbias, dscale, dshift), wants, strict=True)
    return (*(grad if wanted else None for grad, wanted in grads), *[None] * 11)


layer.register_autograd(_layer_backward, setup_context=_keep_for_layer)


@torch.library.custom_op("recsys_moe::triton_layer_backward", mutates_args=())
def layer_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    z: Tensor,
    source: Sequence[int],
    slots: int,
    activation: str,
    training: bool,
    eps: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, weight, bias, and the norm's scale and shift, those of `wants` (the last two together)."""
    x, gate, weight, dy = x.contiguous(), _packed(gate), weight.contiguous(), dy.contiguous()
    table = _table(x, weight, order, offsets)
    want_x, want_gate, want_weight, want_bias, want_norm = wants
    grads = [weight.new_empty(0) for _ in range(6)]

    mean_d = mean_dz = None
    if scale is not None or want_bias:
        sums = _unit_sums(table, dy, z, mean, var, scale, shift, activation, eps, weight.shape[1])
        dbias = sums[0]
        if scale is not None and var is not None:
            dbias = scale * torch.rsqrt(var + eps) * dbias
            count = table.counts(dy.device) if training else torch.zeros_like(scale)
            several = count > 1  # else the moments were constants
            mean_d, mean_dz = torch.where(several, sums / count, 0.0)
            dbias = torch.where(several, 0.0, dbias)  # the batch's mean takes a bias off again
        if want_bias and bias is not None:
            grads[3] = dbias.to(bias.dtype)
        if want_norm:
            grads[4:] = [sums[1].clone(), sums[0].clone()]

    dz = dy
    if activation != "none" or scale is not None:
        dz = torch.empty((*dy.shape[:-1], weight.shape[1]), dtype=dy.dtype, device=dy.device)
        blocks = _flat(weight.shape[1])
        grid = (table.tiles(blocks["BLOCK_ROWS"]) * cdiv(weight.shape[1], blocks["BLOCK_UNITS"]),)
        launch(
            k.preactivation_grad_kernel,
            grid,
            (dy, z, mean, var, scale, shift, mean_d, mean_dz, dz, offsets, table.rows, table.experts, weight.shape[1], eps),
            ACTIVATION=activation,
            BLOCK_E=table.block_e,
            **blocks,
        )
    if want_x or want_gate:
        grads[0], grads[1] = _input_grads(table, _Where(order, source, slots), dz, x, gate, weight, want_x, want_gate)
    if want_weight:
        grads[2] = _weight_grad(table, _Where(order, source, slots), dz, x, gate, weight)
    return tuple(grads)  # type: ignore[return-value]


@layer_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, x, gate, weight, bias, scale, shift, *_, wants = inputs
    return tuple(
        t.new_empty(t.shape) if wanted else weight.new_empty(0)
        for t, wanted in zip((x, gate, weight, bias, scale, shift), (*wants, wants[-1]), strict=True)
    )


class _Where(NamedTuple):
    """Which rows of x the rows of the table are computed from."""

    order: Tensor | None
    source: Sequence[int]
    slots: int


def _packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _shape(x: Tensor, weight: Tensor, order: Tensor | None, offsets: Tensor | None) -> tuple[int, ...]:
    """The table's shape, without its units."""
    if offsets is None:
        return (x.shape[0], weight.shape[0])
    return (x.shape[0] if order is None else order.shape[0],)


def _table(x: Tensor, weight: Tensor, order: Tensor | None, offsets: Tensor | None) -> Table:
    return Table(_shape(x, weight, order, offsets)[0], weight.shape[0], offsets)


def _source(source: Sequence[int], device: torch.device) -> Tensor:
    key = (tuple(source), device)
    if key not in _sources:
        _sources[key] = torch.tensor(source, dtype=torch.int32, device=device)
    return _sources[key]


# A copy to the device waits for it; the few that a model has are made once.
_sources: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _linear(
    table: Table,
    where: _Where,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, ...],
    y: Tensor,
    z: Tensor | None,
    activation: str,
    eps: float,
    rows_each: int | None,
) -> None:
    _, units, width = weight.shape
    units = units // 2 if activation == "swiglu" else units
    tile = _tile(weight, units, gate is not None or activation == "swiglu", rows_each)
    dense = table.offsets is None
    sources = _source(where.source, x.device) if dense and where.source else None
    inputs, groups = x.shape[1] if dense else 1, len(where.source)
    sizes = (table.rows, table.experts, inputs, groups, where.slots, width, units, weight.stride(1), weight.stride(2))
    launch(
        k.linear_kernel,
        (table.tiles(tile.rows) * cdiv(units, tile.units),),
        (x, gate, weight, bias, *norm, y, z, sources, where.order, table.offsets, *sizes, eps),
        warps=tile.warps,
        stages=tile.stages,
        ACTIVATION=activation,
        BLOCK_E=table.block_e,
        BLOCK_ROWS=tile.rows,
        BLOCK_UNITS=tile.units,
        BLOCK_WIDTH=tile.width,
    )


def _moments(table: Table, z: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each unit of each expert over its rows; the running ones where it has fewer than two."""
    units = z.shape[-1]
    blocks = _flat(units)
    programs = table.experts * cdiv(units, blocks["BLOCK_UNITS"])
    parts = table.parts(blocks["BLOCK_ROWS"], programs)
    means, squares = running_mean.new_empty(2, parts, table.experts, units)
    counts = running_mean.new_empty(parts, table.experts)
    launch(
        k.moments_kernel,
        (programs, parts),
        (z, counts, means, squares, table.offsets, table.rows, table.experts, units, parts),
        **blocks,
    )
    counts = counts.unsqueeze(2)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp_min(1)
    var = (squares + counts * (means - mean).square()).sum(0) / count.clamp_min(1)
    return torch.where(count > 1, mean, running_mean), torch.where(count > 1, var, running_var)


def _unit_sums(
    table: Table,
    dy: Tensor,
    z: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float,
    units: int,
) -> Tensor:
    """Σ d and Σ d·ẑ over each expert's rows, `[2, E, units]`."""
    blocks = _flat(units)
    programs = table.experts * cdiv(units, blocks["BLOCK_UNITS"])
    parts = table.parts(blocks["BLOCK_ROWS"], programs)
    sums = torch.empty(parts, 2, table.experts, units, device=dy.device)
    launch(
        k.unit_sums_kernel,
        (programs, parts),
        (dy, z, mean, var, scale, shift, sums, table.offsets, table.rows, table.experts, units, parts, eps),
        ACTIVATION=activation,
        **blocks,
    )
    return sums.sum(0)


def _input_grads(
    table: Table,
    where: _Where,
    dz: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    want_x: bool,
    want_gate: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate: the forward kernel with the weights transposed, then sums over groups or slots."""
    none, width = weight.new_empty(0), x.shape[-1]
    if table.offsets is not None:
        dx = x.new_empty(table.rows, width)
        _plain_linear(table, dz, weight.transpose(1, 2), dx)
        if where.order is not None:
            dx = _combine(dx, None, None, where.order, table.offsets, x.shape[0], where.slots, x.dtype)
        return dx, none
    # The experts of a group read the same input: their units are one long width.
    rows, inputs, groups = x.shape[0], x.shape[1], len(where.source)
    dtype = x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype)
    dgated = torch.empty(rows, groups, width, dtype=dtype, device=x.device)
    stacked = weight.view(groups, -1, width).transpose(1, 2)
    _plain_linear(Table(rows, groups, None), dz.view(rows, groups, stacked.shape[2]), stacked, dgated)
    if gate is None and tuple(where.source) == tuple(range(inputs)):
        return dgated, none
    dx = torch.empty_like(x) if want_x else none
    dgate = torch.empty_like(gate) if gate is not None and want_gate else none
    blocks = _flat(width)
    sources = _source(where.source, x.device)
    launch(
        k.gate_grad_kernel,
        (cdiv(rows, blocks["BLOCK_ROWS"]) * cdiv(width, blocks["BLOCK_UNITS"]),),
        (dgated, x, gate, sources, dx if want_x else None, dgate if dgate.numel() else None, rows, inputs, groups, width),
        BLOCK_ROWS=blocks["BLOCK_ROWS"],
        BLOCK_WIDTH=blocks["BLOCK_UNITS"],
    )
    return dx, dgate


def _plain_linear(table: Table, x: Tensor, weight: Tensor, y: Tensor) -> None:
    """y = W_e·x, where the rows of x are those of the table."""
    _linear(table, _Where(None, (), 1), x, None, weight, None, (None,) * 4, y, None, "none", 0.0, None)


def _weight_grad(table: Table, where: _Where, dz: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor) -> Tensor:
    experts, units, width = weight.shape
    tile = WEIGHT_GRAD[weight.dtype]
    programs = experts * cdiv(units, tile.units) * cdiv(width, tile.width)
    parts = table.parts(tile.rows, programs)
    dense = table.offsets is None
    sums = torch.empty(parts, *weight.shape, dtype=weight.dtype if parts == 1 else torch.float32, device=x.device)
    sources = _source(where.source, x.device) if dense else None
    inputs, groups = x.shape[1] if dense else 1, len(where.source)
    sizes = (table.rows, experts, inputs, groups, where.slots, width, units, parts)
    launch(
        k.weight_grad_kernel,
        (programs, parts),
        (dz, x, gate, sums, sources, where.order, table.offsets, *sizes),
        warps=tile.warps,
        stages=tile.stages,
        BLOCK_ROWS=tile.rows,
        BLOCK_UNITS=tile.units,
        BLOCK_WIDTH=tile.width,
    )
    return sums[0] if parts == 1 else sums.sum(0).to(weight.dtype)


# ----------------------------------------------------------------------------------------------------------- combine


@torch.library.custom_op("recsys_moe::triton_combine", mutates_args=())
def combine(
    outputs: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, unit_norm: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y[r] = Σ_k weights[r, k]·o[r, k] of a sparse table of outputs, and, for `unit_norm`, the outputs' lengths `[R·K]`."""
    outputs, weights = outputs.contiguous(), weights.contiguous()
    lengths = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32) if unit_norm else None
    y = _combine(outputs, weights, lengths, order, offsets, weights.shape[0], weights.shape[1], dtype)
    return y, weights.new_empty(0) if lengths is None else lengths


@combine.register_fake
def _(
    outputs: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, unit_norm: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y = torch.empty(weights.shape[0], outputs.shape[1], dtype=dtype, device=outputs.device)
    return y, weights.new_empty(outputs.shape[0] if unit_norm else 0)


def _combine(
    outputs: Tensor,
    weights: Tensor | None,
    lengths: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    rows: int,
    slots: int,
    dtype: torch.dtype,
) -> Tensor:
    units = outputs.shape[1]
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    y = torch.empty(rows, units, dtype=dtype, device=outputs.device)
    blocks = _flat(units)
    launch(
        k.combine_kernel,
        (cdiv(rows, blocks["BLOCK_ROWS"]) * cdiv(units, blocks["BLOCK_UNITS"]),),
        (outputs, weights, lengths, inverse, offsets, y, rows, slots, offsets.shape[0] - 1, units),
        **blocks,
    )
    return y


@torch.library.custom_op("recsys_moe::triton_combine_backward", mutates_args=())
def combine_backward(
    dy: Tensor, outputs: Tensor, weights: Tensor, lengths: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    dy, outputs, weights = dy.contiguous(), outputs.contiguous(), weights.contiguous()
    total, units = outputs.shape
    doutputs, dweights = torch.empty_like(outputs), torch.empty_like(weights)
    blocks = _flat(units)
    given = (dy, outputs, weights, lengths if lengths.numel() else None, order, offsets)
    launch(
        k.combine_grad_kernel,
        (cdiv(total, blocks["BLOCK_ROWS"]),),
        (*given, doutputs, dweights, total, weights.shape[1], offsets.shape[0] - 1, units),
        **blocks,
    )
    return doutputs, dweights


@combine_backward.register_fake
def _(dy: Tensor, outputs: Tensor, weights: Tensor, lengths: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return outputs.new_empty(outputs.shape), weights.new_empty(weights.shape)


def _keep_for_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outputs, weights, order, offsets, _, _ = inputs
    ctx.save_for_backward(outputs, weights, output[1], order, offsets)
    ctx.set_materialize_grads(False)


def _combine_backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 6
    outputs, weights, lengths, order, offsets = ctx.saved_tensors
    return (*combine_backward(dy, outputs, weights, lengths, order, offsets), None, None, None, None)


combine.register_autograd(_combine_backward, setup_context=_keep_for_combine)


# ---------------------------------------------------------------------------------------------------------- gate_mix


def _mix_blocks(tasks: int, experts: int, units: int) -> dict[str, int]:
    """Blocks of rows × tasks × units of about 2,048 elements."""
    block_t, block_units = next_power_of_2(tasks), min(max(16, next_power_of_2(units)), 256)
    rows = max(1, 2048 // (block_t * max(block_units, next_power_of_2(experts))))
    return {"BLOCK_ROWS": rows, "BLOCK_T": block_t, "BLOCK_E": next_power_of_2(experts), "BLOCK_UNITS": block_units}


@torch.library.custom_op("recsys_moe::triton_gate_mix", mutates_args=())
def gate_mix(logits: Tensor, experts: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
    """z[b, t] = Σ_e (softmax_e(logits[b, t]) + residual[b, t, e])·experts[b, e], fp32; mask uint8 `[T, E]`."""
    logits, experts, residual = logits.contiguous(), experts.contiguous(), _packed(residual)
    rows, tasks, count = logits.shape
    units = experts.shape[2]
    z = logits.new_empty(rows, tasks, units)
    blocks = _mix_blocks(tasks, count, units)
    grid = (cdiv(rows, blocks["BLOCK_ROWS"]) * cdiv(units, blocks["BLOCK_UNITS"]),)
    launch(k.gate_mix_kernel, grid, (logits, mask, residual, experts, z, rows, tasks, count, units), **blocks)
    return z


@gate_mix.register_fake
def _(logits: Tensor, experts: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
    return logits.new_empty(*logits.shape[:2], experts.shape[2])


@torch.library.custom_op("recsys_moe::triton_gate_mix_backward", mutates_args=())
def gate_mix_backward(
    dz: Tensor, logits: Tensor, experts: Tensor, mask: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, experts and residual (empty where there is none)."""
    dz, logits, experts, residual = dz.contiguous(), logits.contiguous(), experts.contiguous(), _packed(residual)
    rows, tasks, count = logits.shape
    units = experts.shape[2]
    dlogits, dexperts = torch.empty_like(logits), torch.empty_like(experts)
    dresidual = logits.new_empty(0 if residual is None else logits.shape)
    blocks = _mix_blocks(tasks, count, units)
    grid = (cdiv(rows, blocks["BLOCK_ROWS"]),)
    written = None if residual is None else dresidual
    args = (dz, logits, mask, residual, experts, dlogits, dexperts, written, rows, tasks, count, units)
    launch(k.gate_mix_grad_kernel, grid, args, **blocks)
    return dlogits, dexperts, dresidual


@gate_mix_backward.register_fake
def _(
    dz: Tensor, logits: Tensor, experts: Tensor, mask: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dresidual = logits.new_empty(0 if residual is None else logits.shape)
    return logits.new_empty(logits.shape), experts.new_empty(experts.shape), dresidual


def _mix_gradient(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
    logits, experts, mask, residual = ctx.saved_tensors
    dlogits, dexperts, dresidual = gate_mix_backward(dz, logits, experts, mask, residual)
    return dlogits, dexperts, None, None if residual is None else dresidual


gate_mix.register_autograd(
    _mix_gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# ----------------------------------------------------------------------------------------------------------- routing


def _route_blocks(experts: int, chosen: int) -> dict[str, int]:
    block_e = next_power_of_2(experts)
    return {"BLOCK_ROWS": min(max(1, 2048 // block_e), 64), "BLOCK_E": block_e, "BLOCK_K": next_power_of_2(chosen)}


@torch.library.custom_op("recsys_moe::triton_route_topk", mutates_args=())
def route_topk(
    logits: Tensor, count: int, scoring: str, renormalize: bool, bias: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ids int32 and weights of the `count` best experts of each row; allowed uint8 `[B, E]`."""
    logits, bias, allowed = logits.contiguous(), _packed(bias), _packed(allowed)
    rows, experts = logits.shape
    ids, weights = logits.new_empty(rows, count, dtype=torch.int32), logits.new_empty(rows, count)
    blocks = _route_blocks(experts, count)
    launch(
        k.route_topk_kernel,
        (cdiv(rows, blocks["BLOCK_ROWS"]),),
        (logits, bias, allowed, ids, weights, rows, experts, count),
        SCORING=scoring,
        RENORMALIZE=renormalize,
        **blocks,
    )
    return ids, weights


@route_topk.register_fake
def _(
    logits: Tensor, count: int, scoring: str, renormalize: bool, bias: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], count, dtype=torch.int32), logits.new_empty(logits.shape[0], count)


@torch.library.custom_op("recsys_moe::triton_route_topk_backward", mutates_args=())
def route_topk_backward(
    dweights: Tensor, logits: Tensor, ids: Tensor, weights: Tensor, scoring: str, renormalize: bool
) -> Tensor:
    dweights, logits = dweights.contiguous(), logits.contiguous()
    (rows, experts), count = logits.shape, ids.shape[1]
    dlogits = torch.empty_like(logits)
    blocks = _route_blocks(experts, count)
    launch(
        k.route_topk_grad_kernel,
        (cdiv(rows, blocks["BLOCK_ROWS"]),),
        (dweights, logits, ids, weights, dlogits, rows, experts, count),
        SCORING=scoring,
        RENORMALIZE=renormalize,
        **blocks,
    )
    return dlogits


@route_topk_backward.register_fake
def _(dweights: Tensor, logits: Tensor, ids: Tensor, weights: Tensor, scoring: str, renormalize: bool) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_for_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.scoring, ctx.renormalize = inputs[2:4]
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _route_backward(ctx: Any, _: Any, dweights: Tensor | None) -> tuple[Any, ...]:
    if dweights is None:
        return (None,) * 6
    return route_topk_backward(dweights, *ctx.saved_tensors, ctx.scoring, ctx.renormalize), None, None, None, None, None


route_topk.register_autograd(_route_backward, setup_context=_keep_for_route)


@torch.library.custom_op("recsys_moe::triton_sort_by_expert", mutates_args=())
def sort_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """order and offsets of the ids int32 `[R, K]`: a counting sort, stable, in two kernels and a running sum."""
    ids = ids.contiguous()
    total, block_e = ids.numel(), next_power_of_2(experts + 1)
    block = min(max(16, 4096 // block_e), 128)
    chunks = max(1, cdiv(total, block))
    order, offsets = ids.new_empty(total), ids.new_empty(experts + 1)
    counts = ids.new_empty(experts + 1, chunks)
    blocks = {"BLOCK_SLOTS": block, "BLOCK_E": block_e}
    launch(k.count_kernel, (chunks,), (ids, counts, total, chunks, experts), **blocks)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    launch(k.place_kernel, (chunks,), (ids, ends, counts, order, offsets, total, chunks, experts), **blocks)
    return order, offsets


@sort_by_expert.register_fake
def _(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.numel()), ids.new_empty(experts + 1)
