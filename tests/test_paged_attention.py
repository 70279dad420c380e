"""Attention over a paged cache: naive mathematics, what is written there, and the same bits whatever else is in the call and
however it was cut."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_moe.kernels import paged_attention, rotary

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, widths of keys and values; with `latent` the value is the front of the key."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    latent: bool = False

    @property
    def options(self) -> dict[str, Any]:
        at = 0 if self.latent else self.kv_heads * self.dim
        return {"kv_heads": self.kv_heads, "value_at": at, "value_dim": self.value_dim, "scale": self.dim**-0.5}

    @property
    def width(self) -> int:
        return self.dim if self.latent else self.kv_heads * (self.dim + self.value_dim)


HEADS = {
    "grouped": Heads(4, 2, 32, 32),
    "odd": Heads(6, 3, 20, 12),
    "one head each": Heads(3, 3, 64, 64),
    "latent": Heads(16, 1, 96, 64, latent=True),
    "many to one": Heads(40, 1, 40, 24, latent=True),
}


def tensor(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Pages:
    """Sequences' keys and values, scattered over the blocks of a cache; what nobody wrote is NaN."""

    def __init__(self, heads: Heads, lengths: list[int], dtype: torch.dtype, block: int = 16, seed: int = 0) -> None:
        self.heads, self.lengths, self.block = heads, lengths, block
        self.rows = [tensor(n, heads.width, seed=seed + i, dtype=dtype) for i, n in enumerate(lengths)]
        self.queries = [tensor(n, heads.heads, heads.dim, seed=seed + 100 + i, dtype=dtype) for i, n in enumerate(lengths)]
        need = [-(-n // block) for n in lengths]
        order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(seed)).int()
        self.cache = torch.full((len(order), block, heads.width), torch.nan, dtype=dtype)
        self.blocks = torch.full((len(lengths), max(need)), -1, dtype=torch.int32)
        at = 0
        for r, count in enumerate(need):
            self.blocks[r, :count] = order[at : at + count]
            at += count
            places = torch.arange(lengths[r])
            self.cache[self.blocks[r, places // block].long(), places % block] = self.rows[r]

    def run(self, parts: list[tuple[int, int, int]], backend: str = "cpu", window: int | None = None) -> list[Tensor]:
        """The queries from a to b of sequence r, for each (r, a, b), in one call; nothing is rotated."""
        q, kv = (torch.cat([whole[r][a:b] for r, a, b in parts]) for whole in (self.queries, self.rows))
        starts = torch.tensor([0, *(b - a for _, a, b in parts)]).cumsum(0).int()
        lengths = torch.tensor([b for _, _, b in parts], dtype=torch.int32)
        blocks = self.blocks[[r for r, _, _ in parts]]
        options = {**self.heads.options, "window": window, "backend": backend}
        y = paged_attention(q, kv, torch.empty(len(q), 0), self.cache, starts, lengths, blocks, **options)
        return list(y.split([b - a for _, a, b in parts]))

    def naive(self, r: int, window: int | None = None) -> Tensor:
        """torch's own attention with an explicit mask."""
        h, n, rows = self.heads, self.lengths[r], self.rows[r].float()
        at = h.options["value_at"]
        keys = rows[:, : h.kv_heads * h.dim].view(n, h.kv_heads, h.dim)
        values = rows[:, at : at + h.kv_heads * h.value_dim].view(n, h.kv_heads, h.value_dim)
        place = torch.arange(n)
        mask = place[None] <= place[:, None]
        if window is not None:
            mask &= place[None] > place[:, None] - window
        q, k, v = (t.transpose(0, 1) for t in (self.queries[r].float(), keys, values))
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)
        return y[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 7, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_softmax_attention(backend: str, heads: Heads, dtype: torch.dtype, window: int | None) -> None:
    lengths = [1, 5, 16, 33] if backend == "reference" else [1, 5, 16, 33, 128, 300]
    pages = Pages(heads, lengths, dtype)
    whole = pages.run([(r, 0, n) for r, n in enumerate(lengths)], backend, window)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for r in range(len(lengths)):
        torch.testing.assert_close(whole[r].float(), pages.naive(r, window), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_new_tokens_are_rotated_and_written_first(backend: str, heads: Heads, dtype: torch.dtype, interleaved: bool) -> None:
    whole, pages = (Pages(heads, [21, 5], dtype) for _ in range(2))
    turned = heads.dim // 4 * 2  # a part of a head
    angles = tensor(8, turned // 2, seed=7, dtype=torch.float32)
    turn = torch.cat([angles.cos(), angles.sin()], 1)
    new = [(0, 15, 21), (1, 3, 5)]
    keys = heads.kv_heads * heads.dim
    for (r, a, b), piece in zip(new, turn.split([6, 2]), strict=True):
        rows, queries = whole.rows[r][a:b], whole.queries[r][a:b]
        rows[:, :keys] = rotary(
            rows[:, :keys].view(b - a, -1, heads.dim), piece, interleaved=interleaved, backend=backend
        ).flatten(1)
        queries[:] = rotary(queries, piece, interleaved=interleaved, backend=backend)
        pages.cache[pages.blocks[r, torch.arange(a, b) // 16].long(), torch.arange(a, b) % 16] = torch.nan
    # Side by side, as one product leaves them.
    fused = torch.cat([torch.cat([pages.queries[r][a:b].flatten(1), pages.rows[r][a:b]], 1) for r, a, b in new])
    q, kv = fused.split([heads.heads * heads.dim, heads.width], 1)
    starts, lengths = (torch.tensor(values, dtype=torch.int32) for values in ([0, 6, 8], [21, 5]))
    y = paged_attention(
        q.unflatten(1, (heads.heads, -1)),
        kv,
        turn,
        pages.cache,
        starts,
        lengths,
        pages.blocks,
        **heads.options,
        interleaved=interleaved,
        backend=backend,
    )
    assert torch.equal(y, torch.cat(whole.run(new, backend)))
    torch.testing.assert_close(pages.cache, whole.cache, equal_nan=True, atol=0, rtol=0)  # and nothing else


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_a_tokens_bits_depend_on_its_own_sequence_alone(heads: Heads, dtype: torch.dtype, window: int | None) -> None:
    pages = Pages(heads, [300, 41, 130, 7], dtype)
    (whole,) = pages.run([(0, 0, 300)], window=window)
    alone = torch.cat([pages.run([(0, i, i + 1)], window=window)[0] for i in range(300)])
    assert torch.equal(whole, alone)  # token by token
    chunks, cut = [], [0, 1, 18, 50, 51, 129, 260, 300]
    for a, b in itertools.pairwise(cut):
        beside = pages.run([(1, 40, 41), (2, 3, 130), (0, a, b), (3, 0, 7)], window=window)
        chunks.append(beside[2])
    assert torch.equal(whole, torch.cat(chunks))  # in pieces, among others
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, pages.run([(0, 0, 300)], window=window)[0])
    finally:
        torch.set_num_threads(before)


def test_blocks_that_left_the_window_are_not_read() -> None:
    pages = Pages(HEADS["grouped"], [100], torch.float32)
    (before,) = pages.run([(0, 90, 100)], window=20)
    pages.cache[pages.blocks[0, :4].long()] = torch.nan
    pages.blocks[0, :4] = -1  # places 0 … 63; the first query sees from 71 on
    assert torch.equal(pages.run([(0, 90, 100)], window=20)[0], before)
    with pytest.raises(ValueError, match="needs block -1"):
        pages.run([(0, 80, 100)], window=20)


def test_any_size_of_block_gives_the_same_bits() -> None:
    for dtype in DTYPES:
        runs = [Pages(HEADS["latent"], [77], dtype, block=block).run([(0, 0, 77)])[0] for block in (1, 8, 16, 64)]
        assert all(torch.equal(runs[0], other) for other in runs[1:])


def test_a_softmax_over_the_padded_batch_fails_the_same_test() -> None:
    # The negative control: scaled_dot_product_attention over keys padded to the longest sequence of the batch.
    pages = Pages(HEADS["grouped"], [300], torch.float32)
    rows = F.pad(pages.rows[0], (0, 0, 0, 400))
    different = False
    for i in range(0, 300, 7):
        results = []
        for n in (i + 1, 300, 700):
            keys, values = rows[:n].view(n, 2, 2, 32).permute(1, 2, 0, 3)
            mask = (torch.arange(n) <= i)[None]
            q = pages.queries[0][i].view(1, 4, 1, 32)
            results.append(F.scaled_dot_product_attention(q, keys[None], values[None], attn_mask=mask, enable_gqa=True))
        different |= not all(torch.equal(results[0], other) for other in results[1:])
    assert different


def test_what_does_not_fit_is_refused() -> None:
    pages = Pages(HEADS["grouped"], [20], torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        Pages(Heads(4, 3, 32, 32), [20], torch.float32).run([(0, 0, 20)])
    with pytest.raises(ValueError, match="window is 0"):
        pages.run([(0, 0, 20)], window=0)
    pages.blocks = pages.blocks[:, :1]
    with pytest.raises(ValueError, match="1 blocks of 16"):
        pages.run([(0, 0, 20)])
    pages.rows[0] = pages.rows[0][:, 1:]
    with pytest.raises(ValueError, match="N rows of the cache's width"):
        pages.run([(0, 0, 20)])
    pages.queries[0] = pages.queries[0].bfloat16()
    with pytest.raises(ValueError, match="one dtype"):
        pages.run([(0, 0, 20)])
