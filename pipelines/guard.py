"""Marks an MLflow run failed when the process that opened it dies without closing it.

Started beside every run as `python -m recsys_moe.pipelines.guard URI RUN_ID`: it waits on its standard input. The word
`done` means that the run was closed; an end of file without it means that the driver is gone, killed with SIGKILL perhaps.
"""

import signal
import sys


def main(uri: str, run_id: str) -> None:
    # Ctrl-C reaches the whole terminal group; the driver closes its own run then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stdin.readline().strip() == "done":
        return
    from mlflow.entities import RunStatus
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if client.get_run(run_id).info.status == RunStatus.to_string(RunStatus.RUNNING):
        client.set_terminated(run_id, "FAILED")


if __name__ == "__main__":
    main(*sys.argv[1:])
