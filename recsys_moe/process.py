"""What processes set and watch: how Ray starts on this machine, threads, the allocator, memory."""

import ctypes
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from recsys_moe.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def local_ray_options(object_store_mb: int) -> dict[str, Any]:
    """Options of `ray.init` for a quiet instance on this machine.

    One logical CPU more than there are cores for us: the process that waits for the others must not starve them. Workers run at
    the priority of any other process (Ray's default is nice 15): they do the work that this instance is for.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    return {
        # Not the cluster that RAY_ADDRESS names or that happens to run here: this instance goes with its command.
        "address": "local",
        "num_cpus": max(2, len(os.sched_getaffinity(0))) + 1,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "object_store_memory": object_store_mb * 2**20,
    }


@contextmanager
def ray_in_time() -> Iterator[None]:
    """Around `ray.init`.

    Raises:
        UserError: this machine is too busy for Ray's processes to come up in the time that Ray gives them.
    """
    try:
        yield
    except Exception as error:  # Ray raises no type of its own here
        if "timed out during startup" not in str(error):
            raise
        raise UserError("Ray did not come up on this machine in time, it is too busy or short of memory; try again") from None


@contextmanager
def neutral_directory() -> Iterator[Path]:
    """An empty directory to stand in while `ray.init` runs; it must exist as long as Ray, whose workers live in it.

    Ray puts the directory that it is started in on its workers' path, whatever PYTHONSAFEPATH says; in a checkout, a worker
    would then find `kernels` and `pipelines` under their bare names, and `transformers` fails to import there.
    """
    with tempfile.TemporaryDirectory(prefix="recsys-moe-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def interrupt_once() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, and ignore it for ten seconds then: impatience must not cut the tidying up off.

    A process that was started with interrupts ignored is left alone.
    """
    last = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let a Ctrl-C within the block take effect at its end.

    For what forks: Python drops an exception that rises in its hooks around a fork, and leaves a lock taken there.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread is ever interrupted
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(signal.SIGINT, None)


def use_all_cores(processes: int = 1) -> None:
    """Let torch use every core, or its share of them: Ray limits its workers to the CPUs that they reserve, one by default."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next batch instead of handing it back to the kernel.

    Every step frees and allocates the same megabytes, and faulting them in anew takes 10 to 30 % of a step: 305 → 209 ms for
    HoME with 6 tasks, 29.8 → 22.7 for a small MMoE. Large blocks must not be mapped one by one either (glibc's threshold for
    that can't be raised above 32 MiB). A libc without mallopt is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def anonymous_mb() -> float:
    """This process's anonymous resident memory in MiB (memory-mapped shards do not count)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon line")


class Peak:
    """The largest `anonymous_mb` seen."""

    def __init__(self) -> None:
        self.mb = anonymous_mb()


@contextmanager
def peak_memory(interval_s: float = 0.1) -> Iterator[Peak]:
    """Sample this process's anonymous memory in the background."""
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            peak.mb = max(peak.mb, anonymous_mb())

    thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
