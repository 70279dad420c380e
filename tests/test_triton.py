"""The GPU kernels without a GPU: interpreted over the one table of cases, and compiled ahead of time for three chips."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1"}
COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def python(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_table_of_cases_holds_for_interpreted_kernels() -> None:
    # Triton reads the variable as it is imported, so the cases need a process that starts with it.
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py", "-k", "triton", env=INTERPRETED)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


COMPILE = """
import torch
from recsys_moe.kernels import Layer, expert_mlp, gate_mix, route_topk, sort_by_expert, sparse_expert_mlp

def model(x, first, second, router):
    y = expert_mlp(x, Layer(first, activation="silu"), backend="triton")
    z = gate_mix((x @ router).unsqueeze(1), y, backend="triton").squeeze(1)
    ids, weights = route_topk(x @ router, 2, renormalize=True, backend="triton")
    order, offsets = sort_by_expert(ids, 3, backend="triton")
    layers = (Layer(first, activation="relu"), Layer(second))
    return z.sum() + sparse_expert_mlp(x, layers, ids, weights, order, offsets, backend="triton").square().sum()

torch.manual_seed(0)
leaves = [torch.randn(*shape, requires_grad=True) for shape in ((5, 8), (3, 6, 8), (3, 8, 6), (8, 3))]
eager = torch.autograd.grad(model(*leaves), leaves)
compiled = torch.autograd.grad(torch.compile(model, fullgraph=True, backend="aot_eager")(*leaves), leaves)
assert all(torch.equal(a, b) for a, b in zip(eager, compiled))

x, gate = torch.randn(4, 3, 8, requires_grad=True), torch.randn(4, 2, 8, requires_grad=True)
norm = [torch.rand(2, 6, requires_grad=i < 2) for i in range(4)]
order, offsets = torch.arange(8, dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
weight, bias = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, requires_grad=True)
from recsys_moe.kernels import triton_ops
checks = ("test_schema", "test_faketensor")
for training in (False, True):
    more = (0, 1, "swiglu", training, 1e-5, True, False)
    torch.library.opcheck(triton_ops.layer, (x, gate, weight, bias, *norm, None, None, [2, 0], *more[1:]), test_utils=checks)
    flat = (x[:, 0].detach(), None, weight, bias, *norm, order, offsets, [0], 2, *more[2:])
    torch.library.opcheck(triton_ops.layer, flat, test_utils=checks)
"""


def test_operators_trace_under_compile_with_the_same_gradients() -> None:
    done = python("-c", COMPILE, env=INTERPRETED)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_cpu_tensor_without_the_interpreter_is_refused() -> None:
    code = (
        "import torch; from recsys_moe.kernels import gate_mix; one = torch.ones(1, 1, 1); gate_mix(one, one, backend='triton')"
    )
    done = python("-c", code, env=COMPILED)
    assert "backend 'triton' can't run: its kernels run on a GPU and the tensors are on 'cpu'" in done.stderr.splitlines()[-1]


KERNELS = (
    "linear_kernel",
    "weight_grad_kernel",
    "gate_grad_kernel",
    "moments_kernel",
    "finish_kernel",
    "unit_sums_kernel",
    "preactivation_grad_kernel",
    "combine_kernel",
    "combine_grad_kernel",
    "gate_mix_kernel",
    "gate_mix_grad_kernel",
    "route_topk_kernel",
    "route_topk_grad_kernel",
    "count_kernel",
    "place_kernel",
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels can't be compiled")
def test_kernels_compile_for_every_chip_without_spills() -> None:
    """One configuration of each; `make kernels-aot` compiles them all."""
    from recsys_moe.kernels import aot

    launches = aot.launches()
    assert {launch.kernel.__name__ for launch in launches} == set(KERNELS)
    # Only the heaviest of a kernel: bf16 with all that it can be asked for has the longest signature.
    heaviest = {launch.kernel.__name__: launch for launch in sorted(launches, key=lambda each: len(aot.described(each)))}
    rows = [aot.compiled(launch, chip) for launch in heaviest.values() for chip in aot.CHIPS]
    assert all(row.fits for row in rows), aot.table([row for row in rows if not row.fits])
    assert all(row.registers > 0 for row in rows)
    assert len(aot.table(rows).splitlines()) == 1 + len(rows)


def test_fp32_products_ask_for_ieee_precision() -> None:
    """TF32 keeps 10 bits and would pass here, where the interpreter computes in full precision."""
    source = (ROOT / "kernels" / "triton_kernels.py").read_text()
    assert source.count("tl.dot(") == source.count('input_precision="ieee"') == 1


def test_gpu_check_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = python("benchmarks/gpu_check.py")
    assert done.returncode == 1
    assert "no GPU" in done.stderr
