"""The AMX tiles on a processor without them: their definition in plain C++ in the instructions' place, and real assembling."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recsys_moe.kernels import cpu

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("avx512f" not in cpu._processor(), reason="the tiles come with AVX-512, which this processor lacks"),
]
TESTS = Path(__file__).parent
EMULATED = {**os.environ, "CXX": "g++ -DRECSYS_MOE_EMULATE_AMX"}


def test_emulated_tiles_pass_the_kernels_own_tests() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "recsys_moe.kernels.cpu"], env=EMULATED, capture_output=True, text=True, check=True
    )
    assert "bf16 products by AMX" in told.stdout
    files = [str(TESTS / f"test_{name}.py") for name in ("kernels", "invariance", "compile", "paged_attention")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not reference", *files], env=EMULATED, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_the_real_instructions_assemble(tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    made = tmp_path / "cpu.o"
    subprocess.run(
        ["g++", "-c", "-O2", "-march=sapphirerapids", "-std=c++20", "-fPIC", "-w", "-isystem", include,
         "-isystem", include / "torch/csrc/api/include", cpu.SOURCE, "-o", made],
        check=True,
    )  # fmt: skip
    listing = subprocess.run(["objdump", "-d", made], check=True, capture_output=True, text=True).stdout
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in listing
