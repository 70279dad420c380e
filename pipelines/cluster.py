"""One Ray instance for a command: local, quiet, and gone when the command ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.job_config import JobConfig

from recsys_moe.process import interrupts_deferred, local_ray_options


@contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray if this process has none yet, and stop it again only then."""
    if ray.is_initialized():
        yield
        return
    # Ray puts the directory that it is started in on its workers' path, whatever PYTHONSAFEPATH says; in a checkout, a
    # worker would then find `kernels` and `pipelines` under their bare names, and `transformers` fails to import there.
    # All that this mark does is to leave it out. To step aside into another directory instead would move every thread of
    # this process, and MLflow, which opens meanwhile, resolves relative paths.
    job = JobConfig(_client_job=True)
    try:
        with interrupts_deferred():
            ray.init(**local_ray_options(object_store_mb=200), job_config=job)
        yield
    finally:
        ray.shutdown()
