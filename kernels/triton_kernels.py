"""The GPU kernels, in Triton; `gpu.py` launches them.

Two layouts, one code. The rows that the experts compute lie in a table: dense ones `[B, E, ·]`, where expert e has every
E-th row from row e on, or sparse ones `[R·K, ·]`, sorted by expert, where it has rows offsets[e] … offsets[e + 1] − 1.
A pointer that is None chooses at compile time what a kernel does: no offsets is dense, no gate is not gated, and so on.

Sums run in a fixed order and there are no atomics: the same input gives the same bits. Products of fp32 ask for IEEE
precision (TF32 keeps 10 bits of the mantissa). What a sparse grid needs at most is launched, and a program finds its tile
from the offsets on the device: the host never waits to learn how many rows an expert got.

Names: e expert, i a row of the expert, row its row in the table, unit a column of the weight's output, `units` of them.
"""

# mypy: disable-error-code=no-untyped-def
# A kernel's parameters have no Python types.

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

# ------------------------------------------------------------------------------------------------- where things lie


@triton.jit
def _rows(offsets_ptr, e, rows, experts):
    """First row of an expert in the table, the step from one of its rows to the next, and how many there are."""
    if offsets_ptr is None:
        return e, experts, rows
    else:
        first = tl.load(offsets_ptr + e)
        return first, 1, tl.load(offsets_ptr + e + 1) - first


@triton.jit
def _tile(index, offsets_ptr, rows, experts, BLOCK_E: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Expert and first row of the tile with this index: the experts in order, each cut into tiles of BLOCK_ROWS.

    An expert that is not there (e ≥ experts) means that there are fewer tiles.
    """
    if offsets_ptr is None:
        tiles = tl.cdiv(rows, BLOCK_ROWS)
        return index // tiles, index % tiles * BLOCK_ROWS
    else:
        every = tl.arange(0, BLOCK_E)
        here = tl.load(offsets_ptr + every, mask=every < experts, other=0)
        after = tl.load(offsets_ptr + every + 1, mask=every < experts, other=0)
        tiles = (after - here + BLOCK_ROWS - 1) // BLOCK_ROWS
        e = tl.sum((tl.cumsum(tiles, 0) <= index).to(tl.int32), 0)
        before = tl.sum(tl.where(every < e, tiles, 0), 0)
        return e, (index - before) * BLOCK_ROWS


@triton.jit
def _input_rows(i, row, known, e, source_ptr, order_ptr, experts, inputs, groups, slots):
    """Rows of x, and of the gate, that an expert's rows are computed from."""
    if order_ptr is not None:  # gathered: a slot belongs to row slot / (K·T) of x
        slot = tl.load(order_ptr + row, mask=known, other=0)
        return (slot // slots).to(tl.int64), row
    elif source_ptr is not None:  # x [B, S, ·], gate [B, G, ·]
        g = e // (experts // groups)
        source = tl.load(source_ptr + g)
        return i.to(tl.int64) * inputs + source, i.to(tl.int64) * groups + g
    else:
        return row, row


@triton.jit
def _load_input(x_ptr, gate_ptr, x_row, gate_row, known_row, column, width):
    """A tile of x ⊙ gate."""
    known = known_row[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + x_row[:, None] * width + column[None, :], mask=known, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + gate_row[:, None] * width + column[None, :], mask=known, other=0.0)
        x = x.to(tl.float32) * gate.to(tl.float32)
    return x


@triton.jit
def _to(x, pointer):
    """x in the precision that a pointer points to, rounded to nearest."""
    if INTERPRETED and x.dtype == tl.float32 and pointer.dtype.element_ty == tl.bfloat16:  # it would cut the bits off
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def _dot(a, b, total):
    """total + a·b in fp32."""
    if INTERPRETED:  # it takes bf16 for integers; raised to fp32, the products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


# --------------------------------------------------------------------------------------------- norms and activations


@triton.jit
def _norm(z, e, unit, units, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps):
    """ẑ = (z − mean)/√(var + eps), and scale·ẑ + shift."""
    place = e.to(tl.int64) * units + unit
    known = unit < units
    mean = tl.load(mean_ptr + place, mask=known, other=0.0)
    var = tl.load(var_ptr + place, mask=known, other=1.0)
    scale = tl.load(scale_ptr + place, mask=known, other=0.0)
    shift = tl.load(shift_ptr + place, mask=known, other=0.0)
    standard = (z - mean[None, :]) * tl.rsqrt(var + eps)[None, :]
    return standard, standard * scale[None, :] + shift[None, :]


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0)
    elif ACTIVATION == "silu":
        return z * _sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "double_sigmoid":
        return 2.0 * _sigmoid(z)
    else:
        return z


@triton.jit
def _derivative(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return (z > 0.0).to(tl.float32)
    elif ACTIVATION == "silu":
        s = _sigmoid(z)
        return s + z * s * (1.0 - s)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "double_sigmoid":
        s = _sigmoid(z)
        return 2.0 * s * (1.0 - s)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


# ------------------------------------------------------------------------------------------------ products of layers


@triton.jit
def linear_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    z_ptr,
    source_ptr,
    order_ptr,
    offsets_ptr,
    rows,
    experts,
    inputs,
    groups,
    slots,
    width,
    units,
    stride_unit,
    stride_width,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """y = act(norm(W_e·(x ⊙ gate) + bias_e)); a program computes a tile `[rows of one expert, units]`.

    `z`, if given, gets what came before the norm. The backward pass runs this kernel with the weight's strides swapped.
    """
    tiles = tl.cdiv(units, BLOCK_UNITS)
    pid = tl.program_id(0)
    e, first = _tile(pid // tiles, offsets_ptr, rows, experts, BLOCK_E, BLOCK_ROWS)
    if e >= experts:
        return
    start, step, count = _rows(offsets_ptr, e, rows, experts)
    i = first + tl.arange(0, BLOCK_ROWS)
    known_row = i < count
    row = start + i.to(tl.int64) * step
    x_row, gate_row = _input_rows(i, row, known_row, e, source_ptr, order_ptr, experts, inputs, groups, slots)
    unit = pid % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    known_unit = unit < units
    # SwiGLU's units are pairs: one tile of the gate rows of the weight, one of the rows they gate.
    weight_units = units * 2 if ACTIVATION == "swiglu" else units
    weight_ptr += e.to(tl.int64) * weight_units * width

    z = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    gated = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for k in range(0, width, BLOCK_WIDTH):
        column = k + tl.arange(0, BLOCK_WIDTH)
        x = _to(_load_input(x_ptr, gate_ptr, x_row, gate_row, known_row, column, width), weight_ptr)
        place = column[:, None] * stride_width + unit[None, :] * stride_unit
        known = (column < width)[:, None] & known_unit[None, :]
        z = _dot(x, tl.load(weight_ptr + place, mask=known, other=0.0), z)
        if ACTIVATION == "swiglu":
            w = tl.load(weight_ptr + units * stride_unit + place, mask=known, other=0.0)
            gated = _dot(x, w, gated)

    known = known_row[:, None] & known_unit[None, :]
    if bias_ptr is not None:
        place = e.to(tl.int64) * weight_units + unit
        z += tl.load(bias_ptr + place, mask=known_unit, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "swiglu":
            gated += tl.load(bias_ptr + place + units, mask=known_unit, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        place = row[:, None] * weight_units + unit[None, :]
        tl.store(z_ptr + place, _to(z, z_ptr), mask=known)
        if ACTIVATION == "swiglu":
            tl.store(z_ptr + place + units, _to(gated, z_ptr), mask=known)
    if mean_ptr is not None:
        _, z = _norm(z, e, unit, weight_units, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps)
        if ACTIVATION == "swiglu":
            _, gated = _norm(gated, e, unit + units, weight_units, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps)
    y = z * _sigmoid(z) * gated if ACTIVATION == "swiglu" else _activate(z, ACTIVATION)
    tl.store(y_ptr + row[:, None] * units + unit[None, :], _to(y, y_ptr), mask=known)


@triton.jit
def weight_grad_kernel(
    dz_ptr,
    x_ptr,
    gate_ptr,
    dweight_ptr,
    source_ptr,
    order_ptr,
    offsets_ptr,
    rows,
    experts,
    inputs,
    groups,
    slots,
    width,
    units,
    parts,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """dW_e = Σ_i dz_i ⊗ (x ⊙ gate)_i; a program sums a tile `[units, width]` over every `parts`-th block of the rows."""
    unit_tiles, width_tiles = tl.cdiv(units, BLOCK_UNITS), tl.cdiv(width, BLOCK_WIDTH)
    pid, part = tl.program_id(0), tl.program_id(1)
    e = pid // (unit_tiles * width_tiles)
    unit = pid // width_tiles % unit_tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    column = pid % width_tiles * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    start, step, count = _rows(offsets_ptr, e, rows, experts)
    total = tl.zeros((BLOCK_UNITS, BLOCK_WIDTH), tl.float32)
    for first in range(part * BLOCK_ROWS, count, parts * BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        known_row = i < count
        row = start + i.to(tl.int64) * step
        x_row, gate_row = _input_rows(i, row, known_row, e, source_ptr, order_ptr, experts, inputs, groups, slots)
        x = _to(_load_input(x_ptr, gate_ptr, x_row, gate_row, known_row, column, width), dz_ptr)
        dz = tl.load(
            dz_ptr + row[:, None] * units + unit[None, :], mask=known_row[:, None] & (unit < units)[None, :], other=0.0
        )
        total = _dot(tl.trans(dz), x, total)
    place = (part.to(tl.int64) * experts + e) * units * width + unit[:, None].to(tl.int64) * width + column[None, :]
    known = (unit < units)[:, None] & (column < width)[None, :]
    tl.store(dweight_ptr + place, _to(total, dweight_ptr), mask=known)


@triton.jit
def gate_grad_kernel(
    dgated_ptr,
    x_ptr,
    gate_ptr,
    source_ptr,
    dx_ptr,
    dgate_ptr,
    rows,
    inputs,
    groups,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """From the gradient d of the gated inputs `[B, G, ·]`: dgate_g = d_g ⊙ x_source(g), dx_s = Σ_source(g)=s d_g ⊙ gate_g."""
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    pid = tl.program_id(0)
    b = (pid // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = pid % tiles * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    known = (b < rows)[:, None] & (column < width)[None, :]
    for s in range(inputs):
        place = (b * inputs + s)[:, None] * width + column[None, :]
        dx = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        x = dx
        if dgate_ptr is not None:
            x = tl.load(x_ptr + place, mask=known, other=0.0).to(tl.float32)
        for g in range(groups):
            if tl.load(source_ptr + g) == s:
                group = (b * groups + g)[:, None] * width + column[None, :]
                dgated = tl.load(dgated_ptr + group, mask=known, other=0.0).to(tl.float32)
                if dgate_ptr is not None:
                    tl.store(dgate_ptr + group, _to(dgated * x, dgate_ptr), mask=known)
                if gate_ptr is not None:
                    dgated *= tl.load(gate_ptr + group, mask=known, other=0.0).to(tl.float32)
                dx += dgated
        if dx_ptr is not None:
            tl.store(dx_ptr + place, _to(dx, dx_ptr), mask=known)


# ------------------------------------------------------------------------------------- what stands between products


@triton.jit
def moments_kernel(
    z_ptr,
    count_ptr,
    mean_ptr,
    squares_ptr,
    offsets_ptr,
    rows,
    experts,
    units,
    parts,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Per part of an expert's rows: how many, each unit's mean, Σ(z − mean)² (Chan, Golub, LeVeque 1983: no cancellation)."""
    tiles = tl.cdiv(units, BLOCK_UNITS)
    pid, part = tl.program_id(0), tl.program_id(1)
    e = pid // tiles
    unit = pid % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    start, step, count = _rows(offsets_ptr, e, rows, experts)
    mean = tl.zeros((BLOCK_UNITS,), tl.float32)
    squares = tl.zeros((BLOCK_UNITS,), tl.float32)
    seen = 0.0
    for first in range(part * BLOCK_ROWS, count, parts * BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        known = (i < count)[:, None] & (unit < units)[None, :]
        row = start + i.to(tl.int64) * step
        z = tl.load(z_ptr + row[:, None] * units + unit[None, :], mask=known, other=0.0).to(tl.float32)
        more = tl.minimum(count - first, BLOCK_ROWS).to(tl.float32)
        block_mean = tl.sum(z, 0) / more
        away = tl.where(known, z - block_mean[None, :], 0.0)
        delta = block_mean - mean
        squares += tl.sum(away * away, 0) + delta * delta * (seen * more / (seen + more))
        mean += delta * (more / (seen + more))
        seen += more
    place = (part * experts + e).to(tl.int64) * units + unit
    tl.store(mean_ptr + place, mean, mask=unit < units)
    tl.store(squares_ptr + place, squares, mask=unit < units)
    if pid % tiles == 0:
        tl.store(count_ptr + part * experts + e, seen)


@triton.jit
def finish_kernel(
    z_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    offsets_ptr,
    rows,
    experts,
    units,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """y = act(norm(z)), where the moments had to be known first."""
    tiles = tl.cdiv(units, BLOCK_UNITS)
    pid = tl.program_id(0)
    e, first = _tile(pid // tiles, offsets_ptr, rows, experts, BLOCK_E, BLOCK_ROWS)
    if e >= experts:
        return
    start, step, count = _rows(offsets_ptr, e, rows, experts)
    i = first + tl.arange(0, BLOCK_ROWS)
    row = start + i.to(tl.int64) * step
    unit = pid % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    known = (i < count)[:, None] & (unit < units)[None, :]
    z_units = units * 2 if ACTIVATION == "swiglu" else units
    place = row[:, None] * z_units + unit[None, :]
    z = tl.load(z_ptr + place, mask=known, other=0.0).to(tl.float32)
    _, z = _norm(z, e, unit, z_units, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps)
    if ACTIVATION == "swiglu":
        gated = tl.load(z_ptr + place + units, mask=known, other=0.0).to(tl.float32)
        _, gated = _norm(gated, e, unit + units, z_units, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps)
        y = z * _sigmoid(z) * gated
    else:
        y = _activate(z, ACTIVATION)
    tl.store(y_ptr + row[:, None] * units + unit[None, :], _to(y, y_ptr), mask=known)


@triton.jit
def _activation_grad(
    dy_ptr, z_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, row, known_row, e, unit, units, eps, ACTIVATION: tl.constexpr
):
    """Gradient of what the activation got, and ẑ (0 without a norm), for a tile of units of z."""
    known = known_row[:, None] & (unit < units)[None, :]
    standard = tl.zeros(known.shape, tl.float32)
    z = standard
    if z_ptr is not None:
        z = tl.load(z_ptr + row[:, None] * units + unit[None, :], mask=known, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        standard, z = _norm(z, e, unit, units, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps)
    if ACTIVATION == "swiglu":  # y = silu(u)·v: a unit needs its partner, dy has half the columns
        half = units // 2
        first = unit < half
        other = tl.where(first, unit + half, unit - half)
        partner = tl.load(z_ptr + row[:, None] * units + other[None, :], mask=known, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            _, partner = _norm(partner, e, other, units, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps)
        column = tl.where(first, unit, other)
        dy = tl.load(dy_ptr + row[:, None] * half + column[None, :], mask=known, other=0.0).to(tl.float32)
        slope = tl.where(first[None, :], partner * _derivative(z, "silu"), partner * _sigmoid(partner))
    else:
        dy = tl.load(dy_ptr + row[:, None] * units + unit[None, :], mask=known, other=0.0).to(tl.float32)
        slope = _derivative(z, ACTIVATION)
    return tl.where(known, dy * slope, 0.0), standard


@triton.jit
def unit_sums_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    sums_ptr,
    offsets_ptr,
    rows,
    experts,
    units,
    parts,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Per part of an expert's rows, `[parts, 2, E, units]`: Σ d and Σ d·ẑ, d the gradient of what the activation got."""
    tiles = tl.cdiv(units, BLOCK_UNITS)
    pid, part = tl.program_id(0), tl.program_id(1)
    e = pid // tiles
    unit = pid % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    start, step, count = _rows(offsets_ptr, e, rows, experts)
    plain = tl.zeros((BLOCK_UNITS,), tl.float32)
    weighted = tl.zeros((BLOCK_UNITS,), tl.float32)
    for first in range(part * BLOCK_ROWS, count, parts * BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        row = start + i.to(tl.int64) * step
        d, standard = _activation_grad(
            dy_ptr, z_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, row, i < count, e, unit, units, eps, ACTIVATION
        )
        plain += tl.sum(d, 0)
        weighted += tl.sum(d * standard, 0)
    place = (part * 2 * experts + e).to(tl.int64) * units + unit
    tl.store(sums_ptr + place, plain, mask=unit < units)
    tl.store(sums_ptr + place + experts * units, weighted, mask=unit < units)


@triton.jit
def preactivation_grad_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    mean_d_ptr,
    mean_dz_ptr,
    dz_ptr,
    offsets_ptr,
    rows,
    experts,
    units,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """dz = scale/√(var + eps)·(d − mean(d) − ẑ·mean(d·ẑ)), d the gradient of what the activation got; dz = d without a norm.

    The two means are 0 where the moments were constants.
    """
    tiles = tl.cdiv(units, BLOCK_UNITS)
    pid = tl.program_id(0)
    e, first = _tile(pid // tiles, offsets_ptr, rows, experts, BLOCK_E, BLOCK_ROWS)
    if e >= experts:
        return
    start, step, count = _rows(offsets_ptr, e, rows, experts)
    i = first + tl.arange(0, BLOCK_ROWS)
    row = start + i.to(tl.int64) * step
    unit = pid % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    known_unit = unit < units
    d, standard = _activation_grad(
        dy_ptr, z_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, row, i < count, e, unit, units, eps, ACTIVATION
    )
    if mean_ptr is not None:
        place = e.to(tl.int64) * units + unit
        mean_d = tl.load(mean_d_ptr + place, mask=known_unit, other=0.0)
        mean_dz = tl.load(mean_dz_ptr + place, mask=known_unit, other=0.0)
        var = tl.load(var_ptr + place, mask=known_unit, other=1.0)
        scale = tl.load(scale_ptr + place, mask=known_unit, other=0.0)
        d = (scale * tl.rsqrt(var + eps))[None, :] * (d - mean_d[None, :] - standard * mean_dz[None, :])
    known = (i < count)[:, None] & known_unit[None, :]
    tl.store(dz_ptr + row[:, None] * units + unit[None, :], _to(d, dz_ptr), mask=known)


# ---------------------------------------------------------------------------------------------------------- combine


@triton.jit
def combine_kernel(
    outputs_ptr,
    weights_ptr,
    lengths_ptr,
    inverse_ptr,
    offsets_ptr,
    y_ptr,
    rows,
    slots,
    experts,
    units,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """y[r] = Σ_k weights[r, k]·outputs[inverse[r, k]], in the order of k, over the slots that have an expert.

    Outputs are divided by their lengths if given; without weights all count 1.
    """
    tiles = tl.cdiv(units, BLOCK_UNITS)
    pid = tl.program_id(0)
    r = (pid // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    unit = pid % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    used = tl.load(offsets_ptr + experts)
    y = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for k in range(slots):
        place = tl.load(inverse_ptr + r * slots + k, mask=r < rows, other=used).to(tl.int64)
        known = place < used
        outputs = tl.load(
            outputs_ptr + place[:, None] * units + unit[None, :], mask=known[:, None] & (unit < units)[None, :], other=0.0
        ).to(tl.float32)
        if lengths_ptr is not None:
            outputs /= tl.maximum(tl.load(lengths_ptr + place, mask=known, other=1.0), 1e-12)[:, None]
        if weights_ptr is not None:
            outputs *= tl.load(weights_ptr + r * slots + k, mask=known, other=0.0)[:, None]
        y += outputs
    known = (r < rows)[:, None] & (unit < units)[None, :]
    tl.store(y_ptr + r[:, None] * units + unit[None, :], _to(y, y_ptr), mask=known)


@triton.jit
def combine_grad_kernel(
    dy_ptr,
    outputs_ptr,
    weights_ptr,
    lengths_ptr,
    order_ptr,
    offsets_ptr,
    doutputs_ptr,
    dweights_ptr,
    total,
    slots,
    experts,
    units,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """For each place in the order: dweight = dy·o and do = weight·dy; for o of unit length, do = weight/‖o‖·(dy − ô·(dy·ô))."""
    place = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    slot = tl.load(order_ptr + place, mask=place < total, other=0)
    known = place < tl.load(offsets_ptr + experts)
    weight = tl.load(weights_ptr + slot, mask=known, other=0.0)
    r = (slot // slots).to(tl.int64)
    along = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, units, BLOCK_UNITS):
        unit = first + tl.arange(0, BLOCK_UNITS)
        here = known[:, None] & (unit < units)[None, :]
        dy = tl.load(dy_ptr + r[:, None] * units + unit[None, :], mask=here, other=0.0).to(tl.float32)
        outputs = tl.load(outputs_ptr + place[:, None] * units + unit[None, :], mask=here, other=0.0).to(tl.float32)
        along += tl.sum(dy * outputs, 1)
    shrink = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if lengths_ptr is not None:
        shrink = 1.0 / tl.maximum(tl.load(lengths_ptr + place, mask=known, other=1.0), 1e-12)
    tl.store(dweights_ptr + slot, along * shrink, mask=place < total)
    for first in range(0, units, BLOCK_UNITS):
        unit = first + tl.arange(0, BLOCK_UNITS)
        here = known[:, None] & (unit < units)[None, :]
        d = tl.load(dy_ptr + r[:, None] * units + unit[None, :], mask=here, other=0.0).to(tl.float32)
        if lengths_ptr is not None:
            outputs = tl.load(outputs_ptr + place[:, None] * units + unit[None, :], mask=here, other=0.0).to(tl.float32)
            d -= outputs * (along * shrink * shrink)[:, None]
        d *= (weight * shrink)[:, None]
        tl.store(doutputs_ptr + place[:, None] * units + unit[None, :], _to(d, doutputs_ptr), mask=here)


# --------------------------------------------------------------------------------------------------------- gate_mix


@triton.jit
def _gate_logits(logits_ptr, mask_ptr, b, t, e, rows, tasks, experts):
    """Logits of rows × tasks × experts, −∞ for those that are not allowed or not there."""
    known = (b < rows)[:, None, None] & (t < tasks)[None, :, None] & (e < experts)[None, None, :]
    place = (b[:, None, None] * tasks + t[None, :, None]) * experts + e[None, None, :]
    logits = tl.load(logits_ptr + place, mask=known, other=float("-inf"))
    if mask_ptr is not None:
        here = (t < tasks)[:, None] & (e < experts)[None, :]
        allowed = tl.load(mask_ptr + t[:, None] * experts + e[None, :], mask=here, other=0)
        logits = tl.where((allowed != 0)[None, :, :], logits, float("-inf"))
    return logits, place, known


@triton.jit
def _gates(logits_ptr, mask_ptr, b, t, rows, tasks, experts, BLOCK_E: tl.constexpr):
    """The softmax over the experts of rows × tasks, and where it lies in `[B, T, E]`."""
    e = tl.arange(0, BLOCK_E)
    logits, place, known = _gate_logits(logits_ptr, mask_ptr, b, t, e, rows, tasks, experts)
    # Rows and tasks beyond the end are all −∞; a largest of 0 keeps them from becoming NaN.
    largest = tl.max(logits, 2)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    powers = tl.exp(logits - largest[:, :, None])
    total = tl.sum(powers, 2)
    return powers / tl.where(total == 0.0, 1.0, total)[:, :, None], place, known


@triton.jit
def _plus_residual(gates, residual_ptr, mask_ptr, place, known, t, tasks, experts, BLOCK_E: tl.constexpr):
    """The weights of rows × tasks × experts: the softmax, and beside it what a residual gate gives the experts in sight."""
    if residual_ptr is not None:
        if mask_ptr is not None:
            e = tl.arange(0, BLOCK_E)
            here = (t < tasks)[:, None] & (e < experts)[None, :]
            known &= (tl.load(mask_ptr + t[:, None] * experts + e[None, :], mask=here, other=0) != 0)[None, :, :]
        gates += tl.load(residual_ptr + place, mask=known, other=0.0)
    return gates


@triton.jit
def _column(table, e, BLOCK_E: tl.constexpr):
    """Column e of a tile whose last axis is the experts: a sum of one number and zeros, so exact."""
    return tl.sum(tl.where((tl.arange(0, BLOCK_E) == e)[None, None, :], table, 0.0), 2)


@triton.jit
def gate_mix_kernel(
    logits_ptr,
    mask_ptr,
    residual_ptr,
    experts_ptr,
    z_ptr,
    rows,
    tasks,
    experts,
    units,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """z[b, t] = Σ_e (softmax_e(logits[b, t]) + residual[b, t, e])·experts[b, e]: each output is read once, for all tasks."""
    tiles = tl.cdiv(units, BLOCK_UNITS)
    pid = tl.program_id(0)
    b = (pid // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    unit = pid % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    gates, place, known = _gates(logits_ptr, mask_ptr, b, t, rows, tasks, experts, BLOCK_E)
    gates = _plus_residual(gates, residual_ptr, mask_ptr, place, known, t, tasks, experts, BLOCK_E)
    here = (b < rows)[:, None] & (unit < units)[None, :]
    z = tl.zeros((BLOCK_ROWS, BLOCK_T, BLOCK_UNITS), tl.float32)
    for e in range(experts):
        y = tl.load(experts_ptr + (b * experts + e)[:, None] * units + unit[None, :], mask=here, other=0.0).to(tl.float32)
        z += _column(gates, e, BLOCK_E)[:, :, None] * y[:, None, :]
    to = (b[:, None, None] * tasks + t[None, :, None]) * units + unit[None, None, :]
    tl.store(z_ptr + to, z, mask=here[:, None, :] & (t < tasks)[None, :, None])


@triton.jit
def gate_mix_grad_kernel(
    dz_ptr,
    logits_ptr,
    mask_ptr,
    residual_ptr,
    experts_ptr,
    dlogits_ptr,
    dexperts_ptr,
    dresidual_ptr,
    rows,
    tasks,
    experts,
    units,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """dexperts[b, e] = Σ_t (g + residual)[b, t, e]·dz[b, t]; dg[b, t, e] = dz[b, t]·experts[b, e] = dresidual[b, t, e];
    dlogits = g·(dg − Σ_e g·dg)."""
    b = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    every = tl.arange(0, BLOCK_E)
    gates, place, known = _gates(logits_ptr, mask_ptr, b, t, rows, tasks, experts, BLOCK_E)
    weights = _plus_residual(gates, residual_ptr, mask_ptr, place, known, t, tasks, experts, BLOCK_E)
    dgates = tl.zeros((BLOCK_ROWS, BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, units, BLOCK_UNITS):
        unit = first + tl.arange(0, BLOCK_UNITS)
        here = (b < rows)[:, None] & (unit < units)[None, :]
        dz = tl.load(
            dz_ptr + (b[:, None, None] * tasks + t[None, :, None]) * units + unit[None, None, :],
            mask=here[:, None, :] & (t < tasks)[None, :, None],
            other=0.0,
        ).to(tl.float32)
        for e in range(experts):
            row = (b * experts + e)[:, None] * units + unit[None, :]
            y = tl.load(experts_ptr + row, mask=here, other=0.0).to(tl.float32)
            dgates += tl.where((every == e)[None, None, :], tl.sum(dz * y[:, None, :], 2)[:, :, None], 0.0)
            dy = tl.sum(_column(weights, e, BLOCK_E)[:, :, None] * dz, 1)
            tl.store(dexperts_ptr + row, _to(dy, dexperts_ptr), mask=here)
    dlogits = gates * (dgates - tl.sum(gates * dgates, 2)[:, :, None])
    tl.store(dlogits_ptr + place, dlogits, mask=known)
    if residual_ptr is not None:
        if mask_ptr is not None:
            here = (t < tasks)[:, None] & (every < experts)[None, :]
            allowed = tl.load(mask_ptr + t[:, None] * experts + every[None, :], mask=here, other=0) != 0
            dgates = tl.where(allowed[None, :, :], dgates, 0.0)
        tl.store(dresidual_ptr + place, dgates, mask=known)


# ---------------------------------------------------------------------------------------------------------- routing


@triton.jit
def _scores(logits_ptr, b, e, rows, experts, SCORING: tl.constexpr):
    """A tile `[rows, experts]` of scores."""
    known = (b < rows)[:, None] & (e < experts)[None, :]
    place = b[:, None].to(tl.int64) * experts + e[None, :]
    if SCORING == "softmax":
        # Columns beyond the end count nothing; rows beyond it hold finite nonsense.
        logits = tl.load(logits_ptr + place, mask=known, other=-1e30)
        powers = tl.exp(logits - tl.max(logits, 1)[:, None])
        return powers / tl.sum(powers, 1)[:, None], place, known
    else:
        logits = tl.load(logits_ptr + place, mask=known, other=0.0)
        return _sigmoid(logits) if SCORING == "sigmoid" else logits, place, known


@triton.jit
def route_topk_kernel(
    logits_ptr,
    bias_ptr,
    allowed_ptr,
    ids_ptr,
    weights_ptr,
    rows,
    experts,
    k,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The k best of `score + bias` among the allowed, ties to the lowest index, and their weights."""
    b = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_K)
    scores, place, known = _scores(logits_ptr, b, e, rows, experts, SCORING)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + e, mask=e < experts, other=0.0)[None, :]
    if allowed_ptr is not None:
        allowed = tl.load(allowed_ptr + place, mask=known, other=0)
        choice = tl.where(allowed != 0, choice, float("-inf"))
    left = (e < experts)[None, :] & (b >= 0)[:, None]
    ids = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.int32)
    weights = tl.full((BLOCK_ROWS, BLOCK_K), float("-inf") if SCORING == "softmax_after" else 0.0, tl.float32)
    for n in range(k):
        best = tl.max(tl.where(left, choice, float("-inf")), 1)
        found = tl.min(tl.where(left & (choice == best[:, None]), e[None, :], BLOCK_E), 1)
        chosen = e[None, :] == found[:, None]
        left = left & (e[None, :] != found[:, None])
        ids = tl.where((j == n)[None, :], found[:, None], ids)
        score = tl.sum(tl.where(chosen, scores, 0.0), 1)
        weights = tl.where((j == n)[None, :], score[:, None], weights)
    if SCORING == "softmax_after":
        powers = tl.exp(weights - tl.max(weights, 1)[:, None])
        weights = powers / tl.sum(powers, 1)[:, None]
    elif RENORMALIZE:
        weights /= tl.sum(weights, 1)[:, None] + 1e-20
    place = b[:, None].to(tl.int64) * k + j[None, :]
    known = (b < rows)[:, None] & (j < k)[None, :]
    # Logits that are not finite find nothing; the id must still be one that can be looked up.
    tl.store(ids_ptr + place, tl.minimum(ids, experts - 1), mask=known)
    tl.store(weights_ptr + place, weights, mask=known)


@triton.jit
def route_topk_grad_kernel(
    dweights_ptr,
    logits_ptr,
    ids_ptr,
    weights_ptr,
    dlogits_ptr,
    rows,
    experts,
    k,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dlogits from the weights' gradient; the choice has none."""
    b = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_K)
    scores, place, known = _scores(logits_ptr, b, e, rows, experts, SCORING)
    slot = b[:, None].to(tl.int64) * k + j[None, :]
    here = (b < rows)[:, None] & (j < k)[None, :]
    weights = tl.load(weights_ptr + slot, mask=here, other=0.0)
    dweights = tl.load(dweights_ptr + slot, mask=here, other=0.0)
    # w = s/Σs gives ds = (dw − Σ dw·w)/Σs, and a softmax over the chosen dl = w·(dw − Σ dw·w).
    mean = tl.sum(dweights * weights, 1)
    chosen = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.int1)
    ds = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    for n in range(k):
        mine = (b < rows, b * k + n)
        found = tl.load(ids_ptr + mine[1], mask=mine[0], other=-1)
        dw = tl.load(dweights_ptr + mine[1], mask=mine[0], other=0.0)
        if SCORING == "softmax_after":
            dw = tl.load(weights_ptr + mine[1], mask=mine[0], other=0.0) * (dw - mean)
        elif RENORMALIZE:
            dw -= mean
        is_it = e[None, :] == found[:, None]
        chosen = chosen | is_it
        ds = tl.where(is_it, dw[:, None], ds)
    if SCORING == "softmax_after":
        dlogits = ds
    else:
        if RENORMALIZE:
            ds /= (tl.sum(tl.where(chosen, scores, 0.0), 1) + 1e-20)[:, None]
        inner = tl.sum(scores * ds, 1)[:, None] if SCORING == "softmax" else scores * ds
        dlogits = scores * (ds - inner)
    tl.store(dlogits_ptr + place, dlogits, mask=known)


@triton.jit
def _buckets(ids_ptr, chunk, total, experts, BLOCK_SLOTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Which bucket each slot of a chunk falls into, as a table of 0 and 1; bucket E is for slots without an expert."""
    slot = chunk * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    ids = tl.load(ids_ptr + slot, mask=slot < total, other=BLOCK_E)
    ids = tl.where(ids < 0, experts, ids)
    bucket = tl.arange(0, BLOCK_E)
    return slot, bucket, (ids[:, None] == bucket[None, :]).to(tl.int32)


@triton.jit
def count_kernel(ids_ptr, counts_ptr, total, chunks, experts, BLOCK_SLOTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts[bucket, chunk]: how many slots of a chunk fall into a bucket."""
    chunk = tl.program_id(0)
    _, bucket, falls = _buckets(ids_ptr, chunk, total, experts, BLOCK_SLOTS, BLOCK_E)
    tl.store(counts_ptr + bucket * chunks + chunk, tl.sum(falls, 0), mask=bucket <= experts)


@triton.jit
def place_kernel(
    ids_ptr,
    ends_ptr,
    counts_ptr,
    order_ptr,
    offsets_ptr,
    total,
    chunks,
    experts,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """order and offsets: a slot's place is where its bucket's share of the chunk starts, plus its bucket's slots before it."""
    chunk = tl.program_id(0)
    slot, bucket, falls = _buckets(ids_ptr, chunk, total, experts, BLOCK_SLOTS, BLOCK_E)
    here = bucket <= experts
    place = bucket * chunks + chunk
    starts = tl.load(ends_ptr + place, mask=here, other=0) - tl.load(counts_ptr + place, mask=here, other=0)
    position = tl.sum(falls * (tl.cumsum(falls, 0) - 1 + starts[None, :]), 1)
    tl.store(order_ptr + position, slot, mask=slot < total)
    if chunk == 0:
        tl.store(offsets_ptr + bucket, starts, mask=here)
