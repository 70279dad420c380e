"""RMS norm and rotary embedding: PyTorch's own, and a row's bits whatever rows are beside it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_moe.kernels import rms_norm, rotary

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 64, 700])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm(backend: str, width: int, dtype: torch.dtype) -> None:
    x, weight = tensor(33, width).to(dtype), tensor(width, seed=1).to(dtype)
    y = rms_norm(x, weight, 1e-3, backend=backend)
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, 1e-3, backend=backend)[0], y[i]) for i in range(33))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 20, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotary(backend: str, dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    angles = tensor(9, dim // 2)
    turn = torch.cat([angles.cos(), angles.sin()], 1)
    # Heads that lie among others, as a fused product leaves them.
    x = tensor(9, 5, dim + 4, seed=1).to(dtype)[:, 1:4, 2 : dim + 2]
    y = rotary(x, turn, interleaved=interleaved, backend=backend)
    pairs = x.double().unflatten(2, (-1, 2)) if interleaved else x.double().unflatten(2, (2, -1)).transpose(2, 3)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    expected = torch.cat([turned.real, turned.imag], 2)
    torch.testing.assert_close(y.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)
    assert all(
        torch.equal(rotary(x[i : i + 1], turn[i : i + 1], interleaved=interleaved, backend=backend)[0], y[i]) for i in range(9)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_heads_front_is_left_as_it_is(backend: str) -> None:
    x, turn = tensor(9, 3, 10), tensor(9, 4, seed=1)
    y = rotary(x, turn, backend=backend)
    assert torch.equal(y[..., :6], x[..., :6])
    torch.testing.assert_close(y[..., 6:], rotary(x[..., 6:], turn, backend=backend), atol=0, rtol=0)


RUNS = {
    "rms_norm": lambda x, backend: rms_norm(x[:, 0], torch.ones(8), 1e-6, backend=backend),
    "rotary": lambda x, backend: rotary(x, tensor(4, 6), backend=backend),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_gradients_are_the_references(run: Callable[..., Tensor]) -> None:
    grads = []
    for backend in BACKENDS:
        x = tensor(4, 3, 8, seed=2).requires_grad_()
        (run(x, backend) * tensor(8, seed=3)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        rotary(tensor(4, 3, 8), tensor(4, 10))
