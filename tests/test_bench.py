"""What the kernels' benchmark times is the same function as the peer's, output and gradients."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recsys_moe.bench import CASES, DenseLoop, Outputs, SparseLayer, alternate, bench, home_of, load_peer
from recsys_moe.errors import UserError

PEERS = Path(os.environ.get("RECSYS_MOE_PEERS", Path(__file__).resolve().parents[2] / "shared" / "bench"))
needs_peers = pytest.mark.skipif(not PEERS.exists(), reason="RECSYS_MOE_PEERS names no folder with the peers' scripts")


@needs_peers
@pytest.mark.parametrize(("name", "ours"), [("Loop", DenseLoop), ("HoME", lambda peer, dtype: Outputs(home_of(peer, dtype)))])
def test_dense_cases_equal_the_peers(name: str, ours: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    peer = load_peer(PEERS, "experts_peers")
    sizes: dict[str, Any] = {"inputs": 24, "hidden": 20, "outputs": 12} if name == "Loop" else {"inputs": 24, "units": 16}
    theirs = getattr(peer, name)(**sizes)
    model = ours(theirs, torch.float32)
    x, theirs_x = (torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    for train in (True, False):
        model.train(train)
        theirs.train(train)
        got, expected = model(x), theirs(theirs_x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        direction = torch.randn_like(got)
        got.backward(direction)
        expected.backward(direction)
        torch.testing.assert_close(x.grad, theirs_x.grad, rtol=1e-3, atol=1e-5)


@needs_peers
@torch.no_grad()
def test_the_sparse_layer_equals_the_peers() -> None:
    torch.manual_seed(0)
    peer = load_peer(PEERS, "hf_moe_layer")
    for shape in peer.SHAPES.values():
        small = {**shape, "hidden": 32, "ffn": 16}
        layer = peer.build(small, torch.float32, "eager")
        x = torch.randn(1, 70, 32)
        torch.testing.assert_close(SparseLayer(layer, small)(x), layer(x), rtol=1e-4, atol=1e-6)


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    ms = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert ms["a"] >= 0


def test_bad_cases_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"case 'lop' is unknown; valid: {', '.join(CASES)}"):
        next(bench(("lop",)))
    with pytest.raises(UserError, match="holds no peers' scripts"):
        next(bench(("loop",), tmp_path))
