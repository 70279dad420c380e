"""Everything to run on the day a GPU is there: are the kernels right, how close to the chip's limits are they, do models train?

    make gpu-check      needs an NVIDIA or AMD GPU; the last part also the census data (RECSYS_MOE_DATA)

1. The table of cases of `tests/test_kernels.py` on the GPU, outputs and all gradients against float64.
2. Each kernel's share of what the chip can do, which is measured in the same run: bytes against a large copy, operations
   against a large product. Bytes and operations are what the mathematics must move and compute, so a share counts waste.
3. Census MMoE, trained through the command line on the GPU with the GPU kernels and on the CPU: the losses must agree.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys_moe.kernels import BatchNorm, Layer, expert_mlp, gate_mix, route_topk, sort_by_expert, sparse_expert_mlp

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("RECSYS_MOE_DATA", ROOT.parent / "shared" / "data")) / "census_income"
LOSS_LIMIT = 0.02  # relative; both train in fp32, with sums in another order


class Work(NamedTuple):
    """A call, and the least it must move and compute."""

    name: str
    call: Callable[[], Any]
    bytes: float
    operations: float
    dtype: torch.dtype


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no GPU that this PyTorch can use: nothing was checked", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    parts = {"correctness": correct, "shares of the chip": shares, "training": trains}
    failed = [name for name, part in parts.items() if not part()]
    print(f"failed: {', '.join(failed)}" if failed else "all is well")
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------- correctness


def correct() -> bool:
    print("\n## Kernels against float64", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_kernels.py", "-k", "triton"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


# ------------------------------------------------------------------------------------------------ shares of the chip


def shares() -> bool:
    """Print the table. Nothing can fail but the kernels themselves: what a share should be is for people to say."""
    copy, products = peaks()
    print(f"\n## Shares of the chip\ncopy {copy / 1e12:.2f} TB/s", end="")
    for dtype, rate in products.items():
        print(f", product {_short(dtype)} {rate / 1e12:.0f} TFLOP/s", end="")
    print(f"\n{'call':58}{'ms':>9}{'TB/s':>8}{'TFLOP/s':>9}{'of copy':>9}{'of product':>12}{'of the nearer':>15}")
    for work in [*dense_work(), *sparse_work(), *mix_work(), *route_work()]:
        seconds = median_seconds(work.call)
        rates = (work.bytes / seconds, work.operations / seconds)
        of = (rates[0] / copy, rates[1] / products[work.dtype])
        figures = f"{seconds * 1e3:9.3f}{rates[0] / 1e12:8.2f}{rates[1] / 1e12:9.1f}{of[0]:9.0%}{of[1]:12.0%}{max(of):15.0%}"
        print(f"{work.name:58}{figures}", flush=True)
    return True


def peaks() -> tuple[float, dict[torch.dtype, float]]:
    """Bytes a second of a copy of 2 GiB (read and written), and operations a second of a square product of 8,192."""
    source = torch.empty(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source))
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        products[dtype] = 2 * 8192**3 / median_seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    return copy, products


def median_seconds(call: Callable[[], Any], rounds: int = 30) -> float:
    """Of one call on the GPU, after three to warm up; the caches are emptied in between by writing 256 MiB."""
    flush = torch.empty(2**26, device="cuda")
    times = []
    for number in range(rounds + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def dense_work() -> list[Work]:
    """MMoE's layer and HoME's, forward and with the backward pass."""
    found = []
    rows, experts, width, units = 16384, 8, 512, 256
    for dtype in (torch.float32, torch.bfloat16):
        x = parameter(rows, width, dtype=dtype)
        weight, bias = parameter(experts, units, width, dtype=dtype), parameter(experts, units)
        scale, shift = parameter(experts, units), parameter(experts, units)
        moments = torch.zeros(experts, units, device="cuda"), torch.ones(experts, units, device="cuda")
        gate = parameter(rows, 2, width, dtype=dtype)
        product = 2.0 * rows * experts * width * units
        touched = nbytes(x, weight) + rows * experts * units * dtype.itemsize
        plain, home = Layer(weight, bias, None, "relu"), Layer(weight, None, BatchNorm(scale, shift, *moments, True), "silu")
        shape = f"{_short(dtype)} B {rows}, E {experts}, {width} → {units}"

        def mmoe(x: Tensor = x, layer: Layer = plain) -> Tensor:
            return expert_mlp(x, layer, backend="triton")

        def gated(x: Tensor = x, layer: Layer = home, gate: Tensor = gate) -> Tensor:
            return expert_mlp(x, layer, gate_bgd=gate, source=(0, 0), backend="triton")

        found += [
            Work(f"expert_mlp relu {shape}", no_grad(mmoe), touched, product, dtype),
            Work(f"  with backward {shape}", with_backward(mmoe, x, weight, bias), 4 * touched, 3 * product, dtype),
            Work(f"expert_mlp norm, gated {shape}", no_grad(gated), 3 * touched + nbytes(gate), product, dtype),
            Work(
                f"  with backward {shape}",
                with_backward(gated, x, gate, weight, scale, shift),
                8 * touched + 4 * nbytes(gate),
                3 * product,
                dtype,
            ),
        ]
    return found


def sparse_work() -> list[Work]:
    """A layer of Mixtral's kind, with one token, a few, and many."""
    found = []
    experts, k, width, units = 64, 8, 2048, 1024
    for dtype in (torch.float32, torch.bfloat16):
        up, down = parameter(experts, 2 * units, width, dtype=dtype), parameter(experts, width, units, dtype=dtype)
        layers = (Layer(up, activation="swiglu"), Layer(down))
        for rows in (1, 16, 512, 8192):
            x = parameter(rows, width, dtype=dtype)
            ids, weights = route_topk(torch.randn(rows, experts, device="cuda"), k, backend="triton")
            order, offsets = sort_by_expert(ids, experts, backend="triton")
            used = len(ids.unique()) / experts
            product = 2.0 * rows * k * 3 * width * units
            touched = used * nbytes(up, down) + 2 * nbytes(x) + rows * k * (2 * units + 2 * width) * dtype.itemsize
            shape = f"{_short(dtype)} {rows} tokens, E {experts}, k {k}, {width} → {units}"
            for invariant in (False, True):

                def run(given: Any = (x, layers, ids, weights, order, offsets), invariant: bool = invariant) -> Tensor:
                    return sparse_expert_mlp(*given, invariant=invariant, backend="triton")

                name = "sparse_expert_mlp invariant" if invariant else "sparse_expert_mlp"
                found.append(Work(f"{name} {shape}", no_grad(run), touched, product, dtype))
            if rows == 8192:
                found.append(Work(f"  with backward {shape}", with_backward(run, x, up, down), 4 * touched, 3 * product, dtype))
    return found


def mix_work() -> list[Work]:
    found = []
    rows, tasks, experts, units = 65536, 3, 8, 128
    for dtype in (torch.float32, torch.bfloat16):
        logits, outputs = parameter(rows, tasks, experts), parameter(rows, experts, units, dtype=dtype)
        touched, product = nbytes(logits, outputs) + rows * tasks * units * 4, 2.0 * rows * tasks * experts * units

        def run(logits: Tensor = logits, outputs: Tensor = outputs) -> Tensor:
            return gate_mix(logits, outputs, backend="triton")

        shape = f"{_short(dtype)} B {rows}, T {tasks}, E {experts}, H {units}"
        found.append(Work(f"gate_mix {shape}", no_grad(run), touched, product, dtype))
        both = touched + 2 * nbytes(logits, outputs) + rows * tasks * units * 4
        found.append(Work(f"  with backward {shape}", with_backward(run, logits, outputs), both, 3 * product, dtype))
    return found


def route_work() -> list[Work]:
    found = []
    for rows, experts, k in ((65536, 8, 2), (65536, 256, 8)):
        logits = torch.randn(rows, experts, device="cuda")
        ids, _ = route_topk(logits, k, renormalize=True, backend="triton")
        shape = f"R {rows}, E {experts}, k {k}"

        def choose(logits: Tensor = logits, k: int = k) -> Any:
            # As compiled code calls it: the check for finite logits waits for the GPU.
            return torch.ops.recsys_moe.triton_route_topk(logits, k, "softmax", True, None, None)

        def sort(ids: Tensor = ids, experts: int = experts) -> Any:
            return sort_by_expert(ids, experts, backend="triton")

        found.append(Work(f"route_topk {shape}", choose, nbytes(logits) + rows * k * 8, 0.0, torch.float32))
        found.append(Work(f"sort_by_expert {shape}", sort, 3.0 * nbytes(ids), 0.0, torch.float32))
    return found


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").mul_(shape[-1] ** -0.5).to(dtype).requires_grad_()


def nbytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.itemsize for t in tensors))


def no_grad(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(call)


def with_backward(call: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], Any]:
    grad = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), leaves, grad)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


# ---------------------------------------------------------------------------------------------------------- training


def trains() -> bool:
    print("\n## Census MMoE on the GPU and on the CPU", flush=True)
    if not DATA.is_dir():
        print(f"no census data at {DATA}: set RECSYS_MOE_DATA to the folder that holds census_income", file=sys.stderr)
        return False
    losses = {device: loss(device) for device in ("cuda", "cpu")}
    if losses["cuda"] is None or losses["cpu"] is None:
        return False
    apart = abs(losses["cuda"] - losses["cpu"]) / losses["cpu"]
    print(f"test loss on cuda {losses['cuda']:.5f}, on cpu {losses['cpu']:.5f}: {apart:.2%} apart, limit {LOSS_LIMIT:.0%}")
    return apart < LOSS_LIMIT


def loss(device: str) -> float | None:
    """The mean of the tasks' log losses on the test part after one epoch; None, and why, if it could not be had."""
    command = [sys.executable, "-m", "recsys_moe", "train", "data=census_full", f"data.source={DATA}", "model=mmoe"]
    command += ["train.seed=0", "train.epochs=1", f"train.device={device}", "--json"]
    # On a GPU `auto` is the triton backend or an error: there is nothing that it falls back to.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    summary = json.loads(done.stdout.splitlines()[-1])
    return statistics.mean(task["logloss"] for task in summary["test"].values())


if __name__ == "__main__":
    sys.exit(main())
