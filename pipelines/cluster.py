"""One Ray instance for a command: local, quiet and gone when the command ends; or a cluster that is there already."""

import logging
import os
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

from recsys_moe.errors import UserError
from recsys_moe.process import interrupts_deferred, local_ray_options, ray_in_time
from recsys_moe.typed import typed


@typed
class RayConfig:
    """Which Ray a command uses.

    `address`: None starts one on this machine for the command; `auto`, `HOST:PORT` or `ray://HOST:PORT` joins a cluster. Its
    nodes need this package: installed there, or sent as the wheel that `wheel` names (`pip wheel --no-deps .` makes it). They
    need the data and the runs folder too, under the same absolute paths.
    """

    address: str | None = None
    wheel: str | None = None


@contextmanager
def ray_cluster(config: RayConfig, workers: int = 1) -> Iterator[None]:
    """Join the cluster that `config` names, or start Ray here with room for `workers`.

    Raises:
        UserError: no cluster answers there, or its nodes have not this package.
    """
    if config.address is None:
        with local_ray(workers):
            yield
        return
    _check_reachable(config.address)
    with tempfile.TemporaryDirectory() as folder:
        # An empty working directory: without one, Ray puts the directories of this process on the workers' path.
        empty = Path(folder) / "empty"
        empty.mkdir()
        environment: dict[str, Any] = {"env_vars": {"PYTHONSAFEPATH": "1"}, "working_dir": str(empty)}
        if config.wheel is not None:
            environment["py_modules"] = [str(_unpack(config.wheel, Path(folder)))]
        try:
            with interrupts_deferred():
                ray.init(config.address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"ray.address {config.address!r} can't be joined ({reason}); look whether it runs this version of Ray, and "
                "whether it wants a token (RAY_AUTH_MODE)"
            ) from None
    try:
        _check_package(config)
        yield
    finally:
        ray.shutdown()


def check_device(device: str) -> None:
    """Ray would wait for ever for a GPU that no node has.

    Raises:
        UserError: `device` is "cuda" and the cluster that this process has joined has no GPU.
    """
    if device == "cuda" and not ray.cluster_resources().get("GPU"):
        raise UserError("train.device is 'cuda', but no machine of the cluster has a GPU; use train.device=cpu")


def _unpack(wheel: str, folder: Path) -> Path:
    """The package from a wheel, as a folder for Ray to send: a wheel itself it would install with all that it depends on."""
    path = Path(wheel).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"ray.wheel {wheel!r} is no wheel ({error}); make one with `pip wheel --no-deps .`") from None
    if not (folder / "recsys_moe").is_dir():
        raise UserError(f"ray.wheel {wheel!r} has no recsys_moe in it; make it with `pip wheel --no-deps .`")
    return folder / "recsys_moe"


def _check_reachable(address: str) -> None:
    """Knock before Ray does, which waits for a minute and then ends the process with messages of its own."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`, or a name that Ray knows
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"ray.address {address!r} does not answer ({error}); start the cluster or leave the key out") from None


def _check_package(config: RayConfig) -> None:
    """Let a node import this package before minutes are spent on data: the same version, found elsewhere than here."""
    import recsys_moe

    def version() -> str:
        import recsys_moe

        return recsys_moe.__version__

    try:
        found = ray.get(ray.remote(version).options(num_cpus=0).remote(), timeout=300)
    except (ray.exceptions.RayError, ImportError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(
            f"a node of {config.address!r} can't import recsys_moe ({reason}); install it there or name its wheel in ray.wheel"
        ) from None
    if found != recsys_moe.__version__:
        raise UserError(
            f"the nodes of {config.address!r} have recsys_moe {found}, not {recsys_moe.__version__}; install this one there or "
            "name its wheel in ray.wheel"
        )


@contextmanager
def local_ray(workers: int = 1) -> Iterator[None]:
    """Start Ray with room for `workers` if this process has none yet, and stop it again only then."""
    if ray.is_initialized():
        yield
        return
    # Workers of one machine talk over loopback, not over whatever interface its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Ray puts the directory that it is started in on its workers' path, whatever PYTHONSAFEPATH says; in a checkout, a
    # worker would then find `kernels` and `pipelines` under their bare names, and `transformers` fails to import there.
    # All that this mark does is to leave it out. To step aside into another directory instead would move every thread of
    # this process, and MLflow, which opens meanwhile, resolves relative paths.
    job = JobConfig(_client_job=True)
    options = local_ray_options(object_store_mb=200)
    options["num_cpus"] = max(options["num_cpus"], workers + 1)
    try:
        with interrupts_deferred(), ray_in_time():
            ray.init(**options, job_config=job)
        yield
    finally:
        ray.shutdown()
