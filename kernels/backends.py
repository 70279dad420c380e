"""Which implementation runs, and why."""

import importlib
import logging
import sys
from functools import cache
from typing import Any, Literal

import torch

Backend = Literal["auto", "reference", "cpu", "triton"]

log = logging.getLogger("recsys_moe.kernels")


def implementation(backend: Backend, device: torch.device) -> Any:
    """The module that implements the operations for a backend, able to run on `device`.

    Raises:
        ValueError: no such backend, or one that can't run here; it says why.
    """
    return sys.modules[_module_of(backend, device.type)]


@torch.compiler.assume_constant_result
def _module_of(backend: str, device: str) -> str:
    return _resolve(backend, device)


@cache  # not on the function above: torch.compile looks through a cache, and into what imports and builds
def _resolve(backend: str, device: str) -> str:
    if backend == "auto":
        backend = _choose(device)
    if backend not in _MODULES:
        raise ValueError(f"backend {backend!r} is unknown; valid: auto, {', '.join(_MODULES)}")
    if reason := _why_not(backend, device):
        raise ValueError(f"backend {backend!r} can't run: {reason}; use backend='reference' or mend the cause")
    return importlib.import_module(_MODULES[backend]).__name__


def _choose(device: str) -> str:
    if device == "cuda":
        chosen, why = "triton", "the tensors are on a GPU"
    elif device == "cpu":
        reason = _why_not("cpu", device)
        chosen, why = ("reference", reason) if reason else ("cpu", "the tensors are on the CPU")
    else:
        chosen, why = "reference", f"no other backend knows the device {device!r}"
    # Falling back costs several times the speed: that is told aloud.
    log.log(logging.WARNING if chosen == "reference" else logging.INFO, "expert kernels run on the backend %r: %s", chosen, why)
    return chosen


_MODULES = {
    "reference": "recsys_moe.kernels.reference",
    "cpu": "recsys_moe.kernels.cpu",
    "triton": "recsys_moe.kernels.gpu",
}


def _why_not(backend: str, device: str) -> str | None:
    """Why a backend can't run on a device; None if it can."""
    if backend == "reference":
        return None
    try:
        module = importlib.import_module(_MODULES[backend])
    except ImportError as error:
        return str(error)
    reason: str | None = module.why_not(device)
    return reason
