"""Compile every GPU kernel and configuration with no GPU present: `python -m recsys_moe.kernels.aot`.

The operations run on small and large cases with their launches noted down instead of run, so what is compiled is what would
be launched: precision, tiles, and what Triton specialises on (an argument that is 1, one that 16 divides, one that is None).
The table shows registers a thread, spilled bytes, and shared memory of a block against the chip's limit. Spills, or more
than fits, end it with 1.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recsys_moe.kernels import gpu, triton_ops
from recsys_moe.kernels.triton_ops import Launch
from recsys_moe.kernels.types import Activation, BatchNorm, Layer, Scoring


@dataclass(frozen=True)
class Chip:
    """What is compiled for, and the shared memory that one block may use there."""

    name: str
    target: GPUTarget
    shared: int


CHIPS = (
    Chip("cuda:80 (A100)", GPUTarget("cuda", 80, 32), 163 * 1024),
    Chip("cuda:90 (H100)", GPUTarget("cuda", 90, 32), 227 * 1024),
    Chip("hip:gfx942 (MI300)", GPUTarget("hip", "gfx942", 64), 64 * 1024),
)


@dataclass(frozen=True)
class Compiled:
    """One row of the table."""

    kernel: str
    configuration: str
    chip: Chip
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= self.chip.shared


# ------------------------------------------------------------------------------------------------------------- cases


def cases() -> Iterator[Callable[[], Any]]:
    """Calls that together launch every kernel in every configuration; those with a size of 1 are compiled differently."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from dense_cases(dtype)
        yield from sparse_cases(dtype)
        for tasks, experts, units, masked in ((2, 8, 64, False), (7, 12, 256, True), (3, 200, 33, False)):
            yield partial(mix, dtype, 4096, tasks, experts, units, masked)
        yield partial(mix, dtype, 4096, 7, 12, 256, True, residual=True)
        yield partial(mix, dtype, 1, 1, 1, 1, True, residual=True)
    for scoring in get_args(Scoring):
        for rows, experts, k in ((4096, 8, 2), (4096, 256, 8), (1, 1, 1)):
            yield partial(route, scoring, rows, experts, k)


def dense_cases(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Few and many units, the norms, the activations, gates; and widths that 16 does not divide."""
    yield partial(dense, dtype, 512, 256, "relu")
    yield partial(dense, dtype, 512, 256, "gelu", gated=True)
    yield partial(dense, dtype, 512, 256, "silu", norm="training", gated=True)
    yield partial(dense, dtype, 512, 256, "silu", norm="inference", gated=True)
    yield partial(dense, dtype, 512, 512, "swiglu", norm="training")
    yield partial(dense, dtype, 512, 512, "swiglu", norm="inference", gated=True)
    yield partial(dense, dtype, 64, 32, "relu")
    yield partial(dense, dtype, 64, 32, "double_sigmoid", norm="inference", gated=True)
    yield partial(dense, dtype, 37, 19, "silu", norm="training", gated=True)
    yield partial(dense, dtype, 499, 251, "silu", norm="training", gated=True)
    yield partial(dense, dtype, 1, 2, "swiglu", norm="training", gated=True, rows=1, experts=2)
    yield partial(dense, dtype, 1, 1, "relu", rows=1, experts=1)


def sparse_cases(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Experts of a language model and of a recommender, with few rows each and with many."""
    for rows in (4, 4096):
        yield partial(sparse, dtype, rows, 64, 8, 256, 128, "swiglu")
        yield partial(sparse, dtype, rows, 64, 8, 256, 128, "swiglu", norm="inference")
        yield partial(sparse, dtype, rows, 8, 2, 128, 64, "relu", unit_norm=True)
        yield partial(sparse, dtype, rows, 8, 2, 499, 251, "silu", norm="training")
    yield partial(sparse, dtype, 1, 1, 1, 1, 1, "silu", norm="training", unit_norm=True)


def layer(dtype: torch.dtype, experts: int, width: int, units: int, activation: Activation, norm: str = "none") -> Layer:
    state = None
    if norm != "none":
        scale, shift, mean, var = (torch.ones(experts, units) for _ in range(4))
        state = BatchNorm(scale.requires_grad_(), shift.requires_grad_(), mean, var, norm == "training")
    weight = torch.empty(experts, units, width, dtype=dtype, requires_grad=True)
    return Layer(weight, torch.empty(experts, units, requires_grad=True), state, activation)


def dense(
    dtype: torch.dtype,
    width: int,
    units: int,
    activation: Activation,
    norm: str = "none",
    gated: bool = False,
    rows: int = 4096,
    experts: int = 8,
) -> None:
    x = torch.empty(rows, width, requires_grad=True)
    gate = torch.empty(rows, 2, width, requires_grad=True) if gated else None
    source = (0, 0) if gated else (0,)
    given = layer(dtype, experts, width, units, activation, norm)
    gpu.expert_mlp(x, given, gate, source, False).sum().backward()
    with torch.no_grad():
        gpu.expert_mlp(x, given, gate, source, False)


def sparse(
    dtype: torch.dtype,
    rows: int,
    experts: int,
    k: int,
    width: int,
    units: int,
    activation: Activation,
    norm: str = "none",
    unit_norm: bool = False,
) -> None:
    up = 2 * units if activation == "swiglu" else units
    layers = (layer(dtype, experts, width, up, activation, norm), layer(dtype, experts, units, width, "none"))
    x = torch.empty(rows, width, dtype=dtype, requires_grad=True)
    ids, weights = torch.zeros(rows, k, dtype=torch.int32), torch.zeros(rows, k, requires_grad=True)
    gpu.sort_by_expert(ids, experts)
    order, offsets = torch.arange(rows * k, dtype=torch.int32), torch.zeros(experts + 1, dtype=torch.int32)

    def run() -> Tensor:
        return gpu.sparse_expert_mlp(x, layers, ids, weights, order, offsets, unit_norm, False)

    run().sum().backward()
    with torch.no_grad():
        run()


def mix(dtype: torch.dtype, rows: int, tasks: int, experts: int, units: int, masked: bool, residual: bool = False) -> None:
    logits = torch.zeros(rows, tasks, experts, requires_grad=True)
    outputs = torch.zeros(rows, experts, units, dtype=dtype, requires_grad=True)
    mask = torch.ones(tasks, experts, dtype=torch.bool) if masked else None
    beside = torch.zeros(rows, tasks, experts, requires_grad=True) if residual else None
    gpu.gate_mix(logits, outputs, mask, beside).sum().backward()


def route(scoring: Scoring, rows: int, experts: int, k: int) -> None:
    bias, allowed = torch.zeros(experts), torch.ones(rows, experts, dtype=torch.bool)
    for more in ((None, None), (bias, allowed)):
        logits = torch.zeros(rows, experts, requires_grad=True)
        _, weights = gpu.route_topk(logits, k, scoring, more[0] is None, *more)
        weights.sum().backward()


# ------------------------------------------------------------------------------------------------------- compilation


def launches() -> list[Launch]:
    """Every launch of the cases that is compiled differently."""
    found: dict[str, Launch] = {}
    with triton_ops.recording() as recorded:
        for case in cases():
            case()
    for each in recorded:
        found.setdefault(str((each.kernel.__name__, *specialised(each), each.warps, each.stages)), each)
    return list(found.values())


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constants and hints that Triton would derive from a launch's arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.args, strict=False)) | launch.constants
    for place, name in enumerate(names):
        value = given[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            hints[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                hints[place,] = [["tt.divisibility", 16]]
    return signature, constants, hints


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.uint8: "u8"}


def compiled(launch: Launch, chip: Chip) -> Compiled:
    signature, constants, hints = specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    options = triton_ops.options(chip.target.backend, launch.warps, launch.stages)
    result = triton.compile(source, target=chip.target, options=options)
    registers, spilled = (_amd if chip.target.backend == "hip" else _nvidia)(result)
    return Compiled(launch.kernel.__name__, described(launch), chip, registers, spilled, result.metadata.shared)


def _nvidia(result: Any) -> tuple[int, int]:
    """Registers and bytes of local memory, from the resource usage of the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(_find(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd(result: Any) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory, from the assembly's metadata."""
    text = result.asm["amdgcn"]
    registers = int(_find(r"\.vgpr_count:\s+(\d+)", text))
    scratch, spills = (int(_find(rf"\.{name}:\s+(\d+)", text)) for name in ("private_segment_fixed_size", "vgpr_spill_count"))
    return registers, max(scratch, 4 * spills)


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}: another version of Triton?\n{text[:2000]}")
    return found[1]


def described(launch: Launch) -> str:
    """What distinguishes a configuration, in a few words."""
    signature, constants, _ = specialised(launch)
    parts = sorted({kind[1:] for name, kind in signature.items() if kind in ("*fp32", "*bf16") and _DATA.match(name)})
    parts += [str(value).lower() for name, value in constants.items() if name in ("ACTIVATION", "SCORING")]
    parts += [word for name, word in _WORDS.items() if signature.get(name, "constexpr") != "constexpr"]
    parts.append("×".join(str(value) for name, value in launch.constants.items() if name.startswith("BLOCK")))
    return " ".join([*parts, f"w{launch.warps}", f"s{launch.stages}"])


_DATA = re.compile(r"(x|weight|z|dz|dy|outputs|experts|logits)_ptr")
_WORDS = {
    "offsets_ptr": "sparse",
    "gate_ptr": "gated",
    "mean_ptr": "norm",
    "mask_ptr": "masked",
    "residual_ptr": "residual",
    "lengths_ptr": "unit",
}


def table(rows: list[Compiled]) -> str:
    """One line for each configuration and chip: the worst of those that differ in what 16 divides."""
    worst: dict[tuple[str, str, str], Compiled] = {}
    for r in sorted(rows, key=lambda r: (r.spilled, r.shared, r.registers)):
        worst[r.kernel, r.configuration, r.chip.name] = r
    lines = [f"{'kernel':27}{'configuration':66}{'target':21}{'registers':>9}{'spilled':>9}{'shared':>9} of limit"]
    for _, r in sorted(worst.items()):
        verdict = "" if r.fits else "  ✗"
        share = f"{r.shared / r.chip.shared:.0%}"
        lines.append(
            f"{r.kernel:27}{r.configuration:66}{r.chip.name:21}{r.registers:9}{r.spilled:9}{r.shared:9}{share:>9}{verdict}"
        )
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """Compile the kernels with these names; all if there are none."""
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, and interpreted kernels can't be compiled: unset it", file=sys.stderr)
        return 2
    every = [launch for launch in launches() if not names or launch.kernel.__name__ in names]
    jobs = [(launch, chip) for launch in every for chip in CHIPS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda job: compiled(*job), jobs))
    print(table(rows))
    bad = [r for r in rows if not r.fits]
    print(f"\n{len(every)} configurations of {len({r.kernel for r in rows})} kernels × {len(CHIPS)} chips: ", end="")
    print(f"{len(bad)} spill or don't fit" if bad else "no spills, all fit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
