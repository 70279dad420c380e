"""The kernels under torch.compile(fullgraph=True) and torch.export: one graph, the same numbers, the same gradients."""

import pytest
import torch
from torch import Tensor, nn

from recsys_moe.kernels import (
    BatchNorm,
    FeatureGate,
    Layer,
    expert_mlp,
    gate_mix,
    route_topk,
    sort_by_expert,
    sparse_expert_mlp,
)

E, D, H = 8, 16, 12


class Sparse(nn.Module):
    """A top-2 SwiGLU layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w1, self.w2 = nn.Parameter(torch.randn(E, 2 * H, D)), nn.Parameter(torch.randn(E, D, H))

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = route_topk(self.router(x), 2, renormalize=True)
        layers = (Layer(self.w1, activation="swiglu"), Layer(self.w2))
        return sparse_expert_mlp(x, layers, ids, weights, *sort_by_expert(ids, E), invariant=not self.training)


class Dense(nn.Module):
    """Normalised experts behind feature gates, under two gates."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(D, 2 * E)
        self.weigh = nn.Linear(D, 2 * 2)
        self.down, self.up = nn.Parameter(torch.randn(4, D // 2, D)), nn.Parameter(torch.randn(4, D, D // 2))
        self.weight, self.bias = nn.Parameter(torch.randn(E, H, D)), nn.Parameter(torch.randn(E, H))
        self.scale, self.shift = nn.Parameter(torch.ones(E, H)), nn.Parameter(torch.zeros(E, H))
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(E, H))
        self.register_buffer("var", torch.ones(E, H))

    def forward(self, x: Tensor) -> Tensor:
        norm = BatchNorm(self.scale, self.shift, self.mean, self.var, self.training)
        gate = FeatureGate(self.weigh(x).view(-1, 2, 2), self.down, self.up)
        layer = Layer(self.weight, self.bias, norm, "silu")
        y = expert_mlp(x, layer, feature_gate=gate, source=(0, 0), invariant=not self.training)
        return gate_mix(self.gates(x).view(-1, 2, E), y)


@pytest.mark.parametrize("kind", [Sparse, Dense])
def test_training_is_one_graph_with_the_same_gradients(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    eager = kind()
    torch.manual_seed(0)
    compiled = kind()
    x = torch.randn(20, D)
    y = eager(x)
    y.square().sum().backward()
    got = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, y)
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)
    for p, q in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(q, p)


@pytest.mark.parametrize("kind", [Sparse, Dense])
def test_inference_exports_for_any_number_of_rows(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    rows = torch.export.Dim("rows", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(20, D),), dynamic_shapes=({0: rows},)).module()
        for n in (2, 20, 33):
            x = torch.randn(n, D)
            torch.testing.assert_close(exported(x), model(x))


def test_operators_are_registered_soundly() -> None:
    # PyTorch's own check of schema, fake shapes and gradients.
    g = torch.randn
    ids, _ = route_topk(g(6, E), 2)
    order, offsets = sort_by_expert(ids, E)
    ops = torch.ops.recsys_moe
    moments = (g(E, H, requires_grad=True), g(E, H, requires_grad=True), g(E, H), g(E, H).square())
    gated = (g(5, 1, D), g(5, 2, 2), g(4, 3, D), g(4, D, 3), g(E, H, D))
    for op, inputs in (
        (ops.gate_mix, (g(5, 2, E, requires_grad=True), g(5, E, H, requires_grad=True), None, None)),
        (ops.gate_mix, (g(5, 2, E, requires_grad=True), g(5, E, H, requires_grad=True), None, g(5, 2, E, requires_grad=True))),
        (ops.expert_linear, (g(5, 1, D, requires_grad=True), None, g(E, H, D, requires_grad=True), [0], None, 0)),
        (ops.expert_linear, (g(5, 1, D, requires_grad=True), None, g(E, H, D, requires_grad=True), [0], g(E, H), 5)),
        (ops.gated_norm_act, (*(t.requires_grad_() for t in gated), [0, 0], None, *moments, True, 1e-5, 2)),
        (ops.gather_rows, (g(6, D, requires_grad=True), order, offsets)),
        (ops.grouped_linear, (g(12, D, requires_grad=True), g(E, H, D, requires_grad=True), offsets)),
        (ops.combine, (g(12, H, requires_grad=True), g(6, 2, requires_grad=True), order, offsets)),
    ):
        torch.library.opcheck(op, inputs)
    # Its dynamic check adds up all outputs, and the ids are whole numbers.
    static = ("test_schema", "test_autograd_registration", "test_faketensor")
    half = [t.detach().bfloat16().requires_grad_() for t in gated]  # of rank 3: an odd one's h is wider
    torch.library.opcheck(
        ops.gated_norm_act, (half[0], gated[1], *half[2:], [0, 0], None, *moments, True, 1e-5, 2), test_utils=static
    )
    torch.library.opcheck(ops.route_topk, (g(6, E, requires_grad=True), 2, 0, True, None, None), test_utils=static)
