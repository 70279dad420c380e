"""Ray Serve for one application, from a free port to no process left behind."""

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager

import ray
from ray import serve

from recsys_moe.errors import UserError
from recsys_moe.process import local_ray_options, neutral_directory, ray_in_time


@contextmanager
def running(application: serve.Application, name: str, host: str, port: int) -> Iterator[threading.Event]:
    """Serve an application in a local Ray of its own; the event is set by SIGINT and SIGTERM.

    Args:
        port: where Serve's proxy listens.

    Raises:
        UserError: this machine is too busy for Ray to come up.
    """
    with neutral_directory() as neutral:
        with chdir(neutral), ray_in_time():
            ray.init(**local_ray_options(object_store_mb=100))
        try:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(http_options=serve.HTTPOptions(host=host, port=port))
            serve.run(application, name=name, logging_config={"log_level": "WARNING"})
            # After Ray, which sets a handler of its own that prints a stack.
            stopping = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: stopping.set())
            yield stopping
        finally:
            serve.shutdown()
            ray.shutdown()


def free_port(host: str, wanted: int) -> int:
    """The port, which nobody listens on; for 0 one of the system's choice.

    Raises:
        UserError: somebody does, or the host is not one of this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise UserError(
                f"serve.host:port {host}:{wanted} can't be listened on ({error.strerror}); choose another port"
            ) from None
        port: int = probe.getsockname()[1]
        return port
