"""Ids without a bound in a table with one: each has a row of its own, and what is seen rarely makes room.

An id, as its 64-bit hash, belongs to one of the table's sets of at most `WAYS` rows, as a memory line does in a processor's
cache: finding it compares one set, whatever the table's size, and no row is ever two ids'. A new id takes a row that is
free, else that of the id whose

    sightings / (steps since the last + 1)

is lowest (torchrec's DistanceLFU policy with exponent 1); the ids of the step itself stay.
"""

import torch
from torch import Tensor, nn

from recsys_moe.transforms import MISSING, UNKNOWN

WAYS = 64
"""Rows of a set: at 80 % of a table's rows one set in 28 has more ids than rows, at 70 % one in 370."""

_FIRST = 2  # rows 0 and 1 are those of missing and unknown ids
_MOST = torch.iinfo(torch.int32).max


class OwnRows(nn.Module):
    """Which ids have which of the rows 2 … `rows` + 1. All of it is in `state_dict`: 16 bytes a row.

    An id is an int64 hash; 0 is a missing one.

    >>> own = OwnRows(8)
    >>> own.admit(torch.tensor([70, 71, 70])).tolist(), own(torch.tensor([71, 0, 72])).tolist()
    ([], [3, 0, 1])
    """

    hashes: Tensor
    counts: Tensor
    seen: Tensor
    step: Tensor

    def __init__(self, rows: int, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 (immutable)
        super().__init__()
        self.sets = -(-rows // WAYS)
        self.ways = rows // self.sets
        shape = (self.sets, self.ways)
        self.register_buffer("hashes", torch.zeros(shape, dtype=torch.int64, device=device))  # 0: free
        self.register_buffer("counts", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("seen", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int32, device=device))

    def forward(self, hashes_b: Tensor) -> Tensor:
        """Ids → rows, int64 `[B]` → int32 `[B]`; one that has none → 1. Changes nothing."""
        sets_b = hashes_b.remainder(self.sets)
        found_bw = self.hashes[sets_b] == hashes_b.unsqueeze(1)
        rows_b = _FIRST + sets_b * self.ways + found_bw.to(torch.uint8).argmax(1)
        rows_b = torch.where(found_bw.any(1), rows_b, UNKNOWN)
        return torch.where(hashes_b == 0, MISSING, rows_b).to(torch.int32)

    @torch.no_grad()
    def admit(self, hashes_b: Tensor) -> Tensor:
        """Count the ids of a step and give new ones rows; the rows, int64, that were taken from another id for it.

        Of more new ids than a set has room for, the most frequent of the step get it; the others stay unknown.
        """
        self.step += 1
        ids_u, times_u = hashes_b[hashes_b != 0].unique(return_counts=True)
        places_u = self(ids_u).long() - _FIRST
        known_u = places_u >= 0
        counts, known = self.counts.view(-1), places_u[known_u]
        counts[known] = (counts[known] + times_u[known_u]).clamp(max=_MOST).to(torch.int32)
        self.seen.view(-1)[known] = self.step

        new_n, times_n = ids_u[~known_u], times_u[~known_u]
        order = times_n.argsort(descending=True, stable=True)
        order = order[new_n[order].remainder(self.sets).argsort(stable=True)]
        new_n, times_n = new_n[order], times_n[order]
        sets_n = new_n.remainder(self.sets)
        turn_n = torch.arange(len(sets_n), device=sets_n.device) - torch.searchsorted(sets_n, sets_n)
        seen_nw = self.seen[sets_n]
        used_nw = self.hashes[sets_n] != 0
        worth_nw = self.counts[sets_n] / (self.step - seen_nw + 1)
        worth_nw.masked_fill_(used_nw & (seen_nw == self.step), torch.inf)
        worth_nw, ways_nw = worth_nw.sort(dim=1, stable=True)
        turn_n1 = turn_n.clamp(max=self.ways - 1).unsqueeze(1)
        fits_n = (turn_n < self.ways) & worth_nw.gather(1, turn_n1).squeeze(1).isfinite()
        places = (sets_n * self.ways + ways_nw.gather(1, turn_n1).squeeze(1))[fits_n]
        evicted = places[counts[places] > 0]
        self.hashes.view(-1)[places] = new_n[fits_n]
        counts[places] = times_n[fits_n].clamp(max=_MOST).to(torch.int32)
        self.seen.view(-1)[places] = self.step
        return evicted + _FIRST
