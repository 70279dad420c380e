"""The examples in the docstrings of the library and the kernels run and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules_with_examples() -> list[str]:
    names = []
    for folder, package in (("recsys_moe", "recsys_moe"), ("kernels", "recsys_moe.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_examples_to_run() -> None:
    # Else a moved folder would leave nothing to test, and nobody would see it.
    assert {"recsys_moe.expressions", "recsys_moe.models.mmoe", "recsys_moe.kernels"} <= set(modules_with_examples())
