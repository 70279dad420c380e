"""One Ray instance for a command: local, quiet, and gone when the command ends."""

from collections.abc import Iterator
from contextlib import chdir, contextmanager

import ray

from recsys_moe.process import local_ray_options, neutral_directory


@contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray if this process has none yet, and stop it again only then."""
    if ray.is_initialized():
        yield
        return
    with neutral_directory() as folder:
        with chdir(folder):
            ray.init(**local_ray_options(object_store_mb=200))
        try:
            yield
        finally:
            ray.shutdown()
