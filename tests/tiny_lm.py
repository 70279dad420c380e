"""A small random language model over the paged cache, and a tokenizer of bytes: what the engine's tests serve.

Two layers of attention and experts, token by token where it matters: obviously the same bits in any batch. The keywords break
that, for negative controls.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.kernels import Layer, expert_mlp, sparse_expert_mlp
from recsys_moe.llm.batch import BLOCK, KVCache, ModelConfig, TokenBatch
from recsys_moe.routing import ExpertChoiceRouter, TopKRouter

D, HEADS, EXPERTS = 32, 2, 4


class ByteTokenizer:
    """Bytes, and 256 for the end of a text."""

    eos_ids = (256,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        said = "".join(f"{m['role']}{m.get('name', '')}: {m['content']}\n" for m in messages)
        return self.encode(said + "assistant: ")


class TinyLM(nn.Module):
    """`plain_linear`: a product whose bits depend on the number of rows. `expert_choice`: experts choose their tokens."""

    def __init__(
        self,
        *,
        vocab: int = 257,
        window: int | None = None,
        max_positions: int = 400,
        plain_linear: bool = False,
        expert_choice: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(vocab, max_positions, window, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        self.plain_linear = plain_linear

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5)

        self.embedding, self.places = weight(vocab, D), weight(max_positions, D)
        self.qkv = nn.ParameterList(weight(3 * D, D) for _ in range(2))
        self.up = nn.ParameterList(weight(EXPERTS, 4 * D, D) for _ in range(2))
        self.down = nn.ParameterList(weight(EXPERTS, D, 2 * D) for _ in range(2))
        router: Any = ExpertChoiceRouter(D, EXPERTS, capacity_factor=1.0) if expert_choice else None
        self.routers = nn.ModuleList(router or TopKRouter(D, EXPERTS, 2, renormalize=True) for _ in range(2))
        for module in self.routers:
            for parameter in module.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
        self.head = weight(vocab, D)
        self.requires_grad_(False).eval()

    def cache_widths(self) -> list[int]:
        return [2 * D, 2 * D]

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) if self.plain_linear else expert_mlp(x, Layer(w.unsqueeze(0)), invariant=True).squeeze(1)

    @torch.no_grad()
    def forward(self, batch: TokenBatch, cache: KVCache) -> Tensor:
        x = F.embedding(batch.tokens, self.embedding) + 0.3 * self.places[batch.positions]
        sequence = torch.repeat_interleave(batch.starts.diff()).tolist()
        places = batch.positions.tolist()
        slots = batch.blocks[sequence, batch.positions // BLOCK].long() * BLOCK + batch.positions % BLOCK
        assert int(slots.min()) >= 0
        for i, layer in enumerate(cache.layers):
            q, k, v = self.linear(x, self.qkv[i]).chunk(3, 1)
            flat = layer.flatten(0, 1)
            flat[slots] = torch.cat([k, v], 1)
            seen = []
            for row, (r, place) in enumerate(zip(sequence, places, strict=True)):
                first = 0 if self.config.window is None else max(0, place - self.config.window + 1)
                at = torch.arange(first, place + 1)
                keys, values = (
                    flat[batch.blocks[r, at // BLOCK].long() * BLOCK + at % BLOCK].view(-1, 2, HEADS, D // HEADS).unbind(1)
                )
                weights = torch.softmax((keys * q[row].view(HEADS, -1)).sum(-1), 0)
                seen.append((weights.unsqueeze(-1) * values).sum(0).flatten())
            x = x + torch.stack(seen)
            plan = self.routers[i](x)
            experts = (Layer(self.up[i], activation="swiglu"), Layer(self.down[i]))
            x = x + sparse_expert_mlp(x, experts, plan.expert_ids, plan.weights, plan.order, plan.offsets, invariant=True)
        return 4 * self.linear(F.rms_norm(x[batch.outputs], (D,)), self.head)
