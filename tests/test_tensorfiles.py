"""Tensors in files: what safetensors would have written, and any rows back from whichever files have them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recsys_moe import tensorfiles
from recsys_moe.tensorfiles import Rows, TensorFiles, save_tensors


@dataclass
class InChunks:
    whole: Tensor
    step: int

    @property
    def shape(self) -> torch.Size:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def chunks(self) -> Iterator[Tensor]:
        return iter(self.whole.split(self.step))


def test_a_file_is_byte_for_byte_safetensors_own(tmp_path: Path) -> None:
    whole = {
        "table": torch.randn(7, 3),
        "a.hashes": torch.arange(6).view(2, 3),
        "größe": torch.tensor(3.0),
        "counts": torch.arange(3, dtype=torch.int32),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(2, dtype=torch.float64),
        "turned": torch.randn(3, 2).t().contiguous(),
        "none": torch.empty(0, 4),
    }
    safetensors.torch.save_file(whole, tmp_path / "expected")
    for name, step in (("table", 2), ("a.hashes", 1)):
        save_tensors(tmp_path / "found", whole | {name: InChunks(whole[name], step)})
        assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    save_tensors(tmp_path / "found", whole | {"turned": whole["turned"].t().contiguous().t()})
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


@given(st.lists(st.integers(0, 20), max_size=3), st.integers(0, 19), st.integers(1, 20))
def test_any_rows_come_back_from_whichever_files_have_them(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], low: int, count: int
) -> None:
    folder, whole = tmp_path_factory.mktemp("rows"), torch.randn(20, 2)
    edges = [0, *sorted(set(cuts) - {0, 20}), 20]
    for number, (a, b) in enumerate(pairwise(edges)):
        safetensors.torch.save_file({Rows("t", a, b, 20).key: whole[a:b].clone()}, folder / f"{number}")
    files = TensorFiles(sorted(folder.iterdir()))
    high = min(20, low + count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorfiles, "CHUNK_BYTES", 24)  # three rows at a time
        target = torch.empty(high - low, 2)
        files.read_into(Rows("t", low, high, 20).key, target)
    assert torch.equal(target, whole[low:high])


def test_a_table_that_has_grown_keeps_the_rows_that_the_files_lack(tmp_path: Path) -> None:
    whole = torch.randn(5, 2)
    safetensors.torch.save_file({"t": whole}, tmp_path / "t")
    files = TensorFiles([tmp_path / "t"])
    for low, high in ((0, 9), (3, 7), (6, 9)):
        target = torch.full((high - low, 2), 7.0)
        files.read_into(Rows("t", low, high, 9).key, target, grown=True)
        assert torch.equal(target, torch.cat([whole, torch.full((4, 2), 7.0)])[low:high])


@pytest.mark.parametrize(
    ("stored", "asked", "complaint"),
    [
        ("t", "u", "'u' is not on disk"),
        ("t", "t[0:4/9]", r"'t' is \[4, 2\] on disk, not \[9, 2\]"),
        ("t[0:4/9]", "t[2:6/9]", "'t' is not whole on disk"),
        ("t[0:4/9]", "t", r"'t' is \[9, 2\] on disk, not \[4, 2\]"),
    ],
)
def test_rows_that_are_not_there_are_not_made_up(stored: str, asked: str, complaint: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({stored: torch.zeros(4, 2)}, tmp_path / "t")
    with pytest.raises(RuntimeError, match=complaint):
        TensorFiles([tmp_path / "t"]).read_into(asked, torch.empty(4, 2))
