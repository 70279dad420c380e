"""What a step of a language model is given: new tokens of several sequences, and the paged cache of their keys and values.

Shapes: N new tokens of R sequences, one sequence after the other; K of them need logits; M blocks at most a sequence.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 16
"""Tokens a block of the cache."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """N new tokens of R sequences.

    Fields:
        tokens: int64 `[N]`.
        positions: int64 `[N]`, the place of each in its own sequence, from 0.
        starts: int32 `[R + 1]`; sequence r has the tokens from starts[r] to starts[r + 1] − 1.
        lengths: int32 `[R]`, tokens of each sequence in the cache after this step.
        blocks: int32 `[R, M]`; place p of sequence r lies in block blocks[r, p // BLOCK] at p % BLOCK. −1: none, or freed.
        outputs: int64 `[K]`, which of the N tokens logits are wanted of.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class ModelConfig:
    """What whoever runs a model must know of it.

    `window` is how many tokens back (itself included) a token can see, in every layer; None: all of them.
    """

    vocab_size: int
    max_positions: int
    window: int | None
    dtype: torch.dtype


class LanguageModel(Protocol):
    """A decoder: logits of new tokens, given those before them in the cache."""

    @property
    def config(self) -> ModelConfig: ...

    def cache_widths(self) -> list[int]: ...

    def forward(self, batch: TokenBatch, cache: "KVCache") -> Tensor: ...


@dataclass(frozen=True, eq=False)
class KVCache:
    """For each layer a tensor `[num_blocks, BLOCK, width]`: what the layer keeps of a token, `width` values.

    `bound` is the models' own: what each has bound to these tensors.
    """

    layers: list[Tensor]
    bound: dict[Any, Any] = field(default_factory=dict)

    @staticmethod
    def allocate(model: LanguageModel, num_blocks: int) -> "KVCache":
        """Room for `num_blocks` · BLOCK tokens, in the model's precision."""
        return KVCache([torch.zeros(num_blocks, BLOCK, width, dtype=model.config.dtype) for width in model.cache_widths()])

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.shape[-1] * layer.element_size() for layer in self.layers)
