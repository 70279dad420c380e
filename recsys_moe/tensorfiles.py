"""Tensors in safetensors files, read and written a piece of their rows at a time: a table may be larger than a worker's memory.

A tensor of which a file holds some rows only is called `name[low:high/rows]` there: rows low … high − 1 of `rows`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors
import torch
from torch import Tensor

CHUNK_BYTES = 2**26
"""What is read or sent at a time, at most, as long as a row is not larger."""

Tensors = Mapping[str, Tensor]


class Rows(NamedTuple):
    """Which rows of the whole tensor `name`, of `total` rows, a tensor holds.

    >>> Rows("table", 2, 5, 9).key, Rows("table", 0, 9, 9).key
    ('table[2:5/9]', 'table')
    """

    name: str
    low: int
    high: int
    total: int

    @property
    def key(self) -> str:
        """What these rows are called in a file or a state."""
        return self.name if (self.low, self.high) == (0, self.total) else f"{self.name}[{self.low}:{self.high}/{self.total}]"

    @staticmethod
    def of(key: str, count: int) -> "Rows":
        """The rows of a tensor that is called `key` and has `count` of them.

        >>> Rows.of("table[2:5/9]", 3), Rows.of("table", 9)
        (Rows(name='table', low=2, high=5, total=9), Rows(name='table', low=0, high=9, total=9))
        """
        found = _SOME_ROWS.fullmatch(key)
        return Rows(found[1], int(found[2]), int(found[3]), int(found[4])) if found else Rows(key, 0, count, count)


_SOME_ROWS = re.compile(r"(.*)\[(\d+):(\d+)/(\d+)\]")


class Chunked(Protocol):
    """A tensor that is never whole in memory: its rows come chunk by chunk."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def chunks(self) -> Iterator[Tensor]: ...


class TensorFiles(Mapping[str, Tensor]):
    """Tensors in several safetensors files, each read when it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths: dict[str, Path] = {}
        self._keys: dict[str, list[str]] = {}
        for path in paths:
            with safetensors.safe_open(path, "pt") as file:
                self._paths |= dict.fromkeys(file.keys(), path)
        for key in self._paths:
            self._keys.setdefault(Rows.of(key, 0).name, []).append(key)

    def __getitem__(self, key: str) -> Tensor:
        with safetensors.safe_open(self._paths[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def read_into(self, key: str, target: Tensor, grown: bool = False) -> None:
        """Fill a tensor, or the rows of one that `key` says, from whichever files have its rows.

        With `grown` the target may have more rows than the files: those stay.

        Raises:
            RuntimeError: there is no such tensor, it has another shape, or rows are missing.
        """
        wanted = Rows.of(key, len(target) if target.dim() else 0)
        if wanted.name not in self._keys:
            raise RuntimeError(f"{wanted.name!r} is not on disk")
        if not target.dim():
            target.copy_(self[key])
            return
        step, filled = max(1, CHUNK_BYTES // max(1, target[:1].nbytes)), 0
        for source in self._keys[wanted.name]:
            shape = self.shape(source)
            has = Rows.of(source, shape[0] if shape else 0)
            fits = has.total <= wanted.total if grown else has.total == wanted.total
            if shape[1:] != list(target.shape[1:]) or not fits:
                whole, expected = [has.total, *shape[1:]], [wanted.total, *target.shape[1:]]
                raise RuntimeError(f"{wanted.name!r} is {whole} on disk, not {expected}")
            first, last = max(has.low, wanted.low), min(has.high, wanted.high)
            for low in range(first, last, step):
                high = min(low + step, last)
                # Opened anew for each piece: what a mapping has touched stays in this process's memory until it is closed.
                with safetensors.safe_open(self._paths[source], "pt") as file:
                    piece = file.get_slice(source)[low - has.low : high - has.low]
                    target[low - wanted.low : high - wanted.low] = piece
                filled += high - low
        if filled < min(wanted.high, has.total) - wanted.low:
            raise RuntimeError(f"{wanted.name!r} is not whole on disk")

    def shape(self, key: str) -> list[int]:
        """The shape of a tensor as it is called in its file."""
        with safetensors.safe_open(self._paths[key], "pt") as file:
            shape: list[int] = file.get_slice(key).get_shape()
        return shape


# In the order in which safetensors lays them out: the widest first.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(path: Path | None, tensors: Mapping[str, Tensor | Chunked]) -> None:
    """Write a safetensors file, byte for byte safetensors' own, while no more than a chunk of what is not here is in memory.

    Without a path this worker only goes through the chunks, in the same order: it sends what another writes.

    Raises:
        OSError: the file can't be written.
    """
    kinds = list(_DTYPES)
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    if path is None:
        for name in order:
            for _ in _chunks(tensors[name]):
                pass
        return
    described, end = {}, 0
    for name in order:
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        described[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for chunk in _chunks(tensors[name]):
                file.write(chunk.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _chunks(tensor: Tensor | Chunked) -> Iterator[Tensor]:
    return iter([tensor]) if isinstance(tensor, Tensor) else tensor.chunks()
