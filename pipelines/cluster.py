"""One Ray instance for a command: local, quiet, and gone when the command ends."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Workers start in the driver's folder and would find `kernels` and `pipelines` of a checkout on their path.
os.environ.setdefault("PYTHONSAFEPATH", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray


@contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray if this process has none yet, and stop it again only then.

    One logical CPU more than there are cores: the process that waits for the others must not starve them.
    """
    if ray.is_initialized():
        yield
        return
    ray.init(
        num_cpus=max(2, os.cpu_count() or 1) + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 2**20,
    )
    try:
        yield
    finally:
        ray.shutdown()
