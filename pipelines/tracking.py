"""MLflow: runs, logged models, the registry. Everything through one client; nothing global is changed.

The run is opened and closed here, in the driver. A guard process marks it failed should the driver be killed.
"""

import fcntl
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A server that does not answer is reported in seconds, not after minutes of retries.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from recsys_moe.errors import UserError
from recsys_moe.shards import Manifest
from recsys_moe.sources import PARTS
from recsys_moe.typed import typed

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

VERSIONS_OF = ("recsys-moe", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "ray", "mlflow", "numpy", "pyarrow")


@typed
class TrackingConfig:
    """Where runs go. `uri`: an MLflow server, a SQLite file, or None for SQLite and artifacts below the runs folder.

    A trained bundle becomes a version of the registered model `register` (None: the data set's name), and `alias` moves
    to it. Without an alias (null) it is a logged model that nothing registers.
    """

    uri: str | None = None
    experiment: str = "recsys_moe"
    register: str | None = None
    alias: str | None = "candidate"

    def resolve(self, runs_dir: Path) -> str:
        """The tracking URI; a local one at an absolute path, since the guard and later commands may stand elsewhere.

        Raises:
            UserError: a database in memory, which would be gone with the process.
        """
        if self.uri is None:
            return f"sqlite:///{runs_dir.absolute() / 'mlflow.db'}"
        if self.uri.startswith("sqlite:"):
            scheme, _, path = self.uri.partition(":///")
            path, mark, options = path.partition("?")
            if not path or path.startswith((":memory:", "file:")):
                raise UserError(f"tracking.uri {self.uri!r} names no file; write sqlite:///runs/mlflow.db, or a server's URL")
            return f"{scheme}:///{Path(path).expanduser().absolute()}{mark}{options}"
        path = self.uri.removeprefix("file://").removeprefix("file:")
        if self.uri.startswith("file:") or path.startswith(("/", ".", "~")):
            return Path(path).expanduser().absolute().as_uri()
        return self.uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a resolved SQLite URI; None for any other store."""
    return Path(uri.partition(":///")[2].partition("?")[0]) if uri.startswith("sqlite:") else None


class TrackingLost(UserError):
    """MLflow can't be used: its server does not answer, or its files can't be read or written."""


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn whatever MLflow's client raises into one sentence."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        if _is_local(error):
            sentence = f"a file for MLflow at {uri!r} can't be read or written ({reason}); mend the cause or set tracking.uri"
        elif uri.startswith(("sqlite:", "file:")):
            sentence = f"MLflow's store {uri!r} can't be used ({reason}); mend the cause or set tracking.uri"
        else:
            sentence = (
                f"MLflow at {uri!r} does not answer as it should ({reason}); start the server, mend the cause or set "
                "tracking.uri"
            )
        raise TrackingLost(sentence) from None


def _is_local(error: Exception) -> bool:
    """Whether a file of this machine is to blame. A lost server is an OSError too, but not one of a file's."""
    network = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
    return isinstance(error, OSError) and error.errno is not None and not network


@contextmanager
def _alone_with(database: Path) -> Iterator[None]:
    """Let one process at a time in: two that make MLflow's tables at once fail on each other's."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_client(uri: str) -> "MlflowClient":
    """A client of the tracking server at `uri`, which has answered once (SQLite: has its tables).

    Raises:
        TrackingLost: it does not answer, or its file can't be made.
    """
    import logging

    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # whose errors are tracebacks: what fails is told in a sentence
        logging.getLogger(name).setLevel(logging.CRITICAL)
    database = sqlite_file(uri)
    with answering(uri), _alone_with(database) if database else nullcontext():
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


class Run:
    """An open MLflow run. Every method raises TrackingLost when MLflow can't be used.

    `lost`: it could not be used once, so that metrics are missing. `ends_as` and `ended` (seconds; None: now) are for its end.
    """

    def __init__(self, client: "MlflowClient", run_id: str, experiment_id: str) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id
        self.uri = client.tracking_uri
        self.lost = False
        self.ends_as: str = "FINISHED"
        self.ended: float | None = None

    def log(self, metrics: dict[str, float | None], step: int, time_s: float) -> None:
        """Metrics at a step, as of a time; values that are not finite are left out."""
        try:
            with answering(self.uri):
                self.client.log_batch(self.run_id, metrics=_metrics(metrics, step, time_s))
        except TrackingLost:
            self.lost = True
            raise

    def leave(
        self, files: Sequence[Path], tables: Mapping[str, tuple[list[str], list[list[str]]]], metrics: dict[str, float | None]
    ) -> None:
        """Files and tables (header and rows, by file name) as artifacts, and metrics at step 0 under names made fit."""
        with answering(self.uri):
            for file in files:
                self.client.log_artifact(self.run_id, str(file))
            for name, (header, rows) in tables.items():
                columns = {title or "verdict": [row[i] for row in rows] for i, title in enumerate(header)}
                self.client.log_table(self.run_id, columns, name)
            fit = {re.sub(r"[^\w./ -]", "-", name): value for name, value in metrics.items()}
            self.client.log_batch(self.run_id, metrics=_metrics(fit, 0, time.time()))

    def log_files(self, folder: Path, name: str) -> None:
        """A folder's files as the artifact folder `name`."""
        with answering(self.uri):
            self.client.log_artifacts(self.run_id, str(folder), name)

    def log_bundle(self, folder: Path, config: TrackingConfig, name: str, summary: dict[str, Any]) -> str:
        """Store the bundle as a LoggedModel with its test metrics (a language model's are of the validation part), register it,
        move the alias.

        Returns `models:/NAME/VERSION`, of a model that nothing registers `models:/MODEL_ID`.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        step = summary["train"]["steps"]
        part = "test" if "test" in summary else "validation"
        metrics = flatten({part: summary[part]})
        registered = config.register or name
        with answering(self.uri):
            model = self.client.create_logged_model(
                self.experiment_id, name=name, source_run_id=self.run_id, model_type="recsys_moe bundle"
            )
            self.client.log_model_artifacts(model.model_id, str(folder))
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self.client.log_outputs(self.run_id, models=[LoggedModelOutput(model.model_id, step)])
            self.client.log_batch(self.run_id, metrics=_metrics(metrics, step, time.time(), model.model_id, self.run_id))
            if config.alias is None:
                return f"models:/{model.model_id}"
            try:
                self.client.create_registered_model(registered)
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                    raise
            version = self.client.create_model_version(
                registered, source=model.artifact_location, run_id=self.run_id, model_id=model.model_id
            )
            self.client.set_registered_model_alias(registered, config.alias, version.version)
        return f"models:/{registered}/{version.version}"


def _metrics(
    values: dict[str, float | None], step: int, time_s: float, model_id: str | None = None, run_id: str | None = None
) -> list[Any]:
    from mlflow.entities import Metric

    finite = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
    return [Metric(k, v, int(time_s * 1000), step, model_id=model_id, run_id=run_id) for k, v in finite.items()]


@contextmanager
def open_run(
    client: "MlflowClient",
    config: TrackingConfig,
    name: str,
    settings: dict[str, Any],
    dataset: dict[str, str],
    run_id: str | None = None,
    started: float | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """Create a run with parameters, data set, revision, environment and `tags`, or open `run_id` again; end it as `Run.ends_as`
    says, FAILED or KILLED.

    Raises:
        TrackingLost: MLflow can't be used, at the start or when the run is to be closed.
    """
    all_tags = _source_tags() | dict(tags or {})
    new = run_id is None
    with answering(client.tracking_uri):
        if run_id is None:
            experiment_id = _experiment_id(client, config.experiment)
            start = None if started is None else int(started * 1000)
            run_id = str(client.create_run(experiment_id, start, all_tags, run_name=name).info.run_id)
        else:
            experiment_id = client.get_run(run_id).info.experiment_id
            client.update_run(run_id, status="RUNNING")
    run = Run(client, run_id, experiment_id)
    guard = _start_guard(client.tracking_uri, run.run_id)
    try:
        if new:
            with answering(client.tracking_uri):
                _describe_run(run, settings, dataset)
        yield run
    except BaseException as error:
        with suppress(TrackingLost):  # the error on its way matters more
            _close(run, guard, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    else:
        _close(run, guard, run.ends_as)


def _close(run: Run, guard: subprocess.Popen[bytes], status: str) -> None:
    """End the run and let the guard go, which acts when its pipe closes without a word."""
    try:
        with answering(run.uri):
            run.client.set_terminated(run.run_id, status, None if run.ended is None else int(run.ended * 1000))
    except TrackingLost as lost:
        raise TrackingLost(f"{lost}; run {run.run_id} is left open there, though it is {status}") from None
    finally:
        guard.communicate(b"done\n")


def _experiment_id(client: "MlflowClient", name: str) -> str:
    """The experiment of that name, made now if need be, by us or by another run in the same moment."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Beside the database: MLflow's own choice would be whatever folder this process stands in.
        database = sqlite_file(client.tracking_uri)
        artifacts = (database.parent / "artifacts").as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id)


def _describe_run(run: Run, settings: dict[str, Any], dataset: dict[str, str]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    run.client.log_batch(run.run_id, params=[Param(k, str(v)[:6000]) for k, v in flatten(settings).items()])
    context = [InputTag("mlflow.data.context", "training")]
    run.client.log_inputs(run.run_id, datasets=[DatasetInput(Dataset(**dataset), context)])
    run.client.log_dict(run.run_id, settings, "config.json")
    run.client.log_dict(run.run_id, environment(), "environment.json")


def describe_data(manifest: Manifest) -> dict[str, str]:
    """The fields of an MLflow data set: a name, a digest (36 characters at most), where it is, how many rows of what."""
    counts = {f"{c.part}.{c.task}": [c.observed, c.positive] for c in manifest.counts}
    return {
        "name": manifest.name,
        "digest": manifest.digest[:36],
        "source_type": "local",
        "source": json.dumps({"uri": manifest.source}),
        "profile": json.dumps({"rows": {part: manifest.rows(part) for part in PARTS}, "observed_positive": counts}),
    }


def _start_guard(uri: str, run_id: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "recsys_moe.pipelines.guard", uri, run_id]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 1}} → {"train.seed": 1}."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def environment() -> dict[str, str]:
    """Python, platform and the versions of the packages that decide the numbers."""
    versions = {d: metadata.version(d) for d in VERSIONS_OF if _installed(d)}
    return {"python": platform.python_version(), "platform": platform.platform(), **versions}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _source_tags() -> dict[str, str]:
    tags = {"mlflow.source.name": "recsys-moe train", "mlflow.source.type": "LOCAL"}
    # The revision of the code that runs, not of whatever repository the user stands in.
    folder = Path(__file__).resolve().parent
    with suppress(OSError):  # a machine without git: the run has no revision then
        revision = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if revision.returncode == 0:
            tags["mlflow.source.git.commit"] = revision.stdout.strip()
    return tags


def resolve_model(name: str, runs_dir: Path, uri: str) -> Path:
    """The local folder of a bundle: a path, `models:/NAME@alias`, `models:/NAME/VERSION` or `runs:/RUN_ID`.

    Raises:
        UserError: nothing of that name.
    """
    if not name.startswith(("models:/", "runs:/")):
        if not Path(name).is_dir():
            raise UserError(f"model {name!r} is neither a folder nor models:/NAME@alias; name a bundle that training made")
        return Path(name)
    from mlflow.artifacts import download_artifacts

    client = open_client(uri)
    with _to_be_had(name, uri):
        if name.startswith("runs:/"):
            run = client.get_run(name.removeprefix("runs:/").split("/")[0])
            outputs = run.outputs.model_outputs if run.outputs else []
            if not outputs:
                raise UserError(f"run {name!r} has logged no model; name a run that finished")
            source = client.get_logged_model(outputs[-1].model_id).artifact_location
        else:
            model, _, version = name.removeprefix("models:/").partition("/")
            if "@" in model:
                model, _, alias = model.partition("@")
                found = client.get_model_version_by_alias(model, alias)
            elif version:
                found = client.get_model_version(model, version)
            elif model.startswith("m-"):  # a logged model's id
                source = client.get_logged_model(model).artifact_location
                return Path(download_artifacts(artifact_uri=source, tracking_uri=uri, registry_uri=uri))
            else:
                raise UserError(f"model {name!r} names no version; write models:/{model}@candidate or models:/{model}/1")
            source = client.get_model_version_download_uri(model, found.version)
        return Path(download_artifacts(artifact_uri=source, tracking_uri=uri, registry_uri=uri))


@contextmanager
def _to_be_had(name: str, uri: str) -> Iterator[None]:
    """Turn what MLflow's client raises where a model of that name is looked for into one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {name!r} is not to be had from {uri!r} ({reason}); check the name or set tracking.uri"
        ) from None


def pinned(name: str, uri: str) -> str:
    """`models:/NAME@alias` as the version that it names now; a folder as its whole path; anything else as it is.

    Raises:
        UserError: no such alias.
    """
    if not name.startswith(("models:/", "runs:/")):
        return str(Path(name).absolute())
    model, _, alias = name.removeprefix("models:/").partition("@")
    if not alias:
        return name
    client = open_client(uri)
    with _to_be_had(name, uri):
        return f"models:/{model}/{client.get_model_version_by_alias(model, alias).version}"


def promote(name: str, alias: str, uri: str) -> str:
    """Move `alias` to the version that `models:/…` names; returns `models:/NAME/VERSION`.

    Raises:
        UserError: no such version.
    """
    if not name.startswith("models:/"):
        raise UserError(f"{name!r} is not a registered version; write models:/NAME@alias or models:/NAME/VERSION")
    client = open_client(uri)
    model, _, version = name.removeprefix("models:/").partition("/")
    with _to_be_had(name, uri):
        if "@" in model:
            model, _, old = model.partition("@")
            version = client.get_model_version_by_alias(model, old).version
        client.set_registered_model_alias(model, alias, version)
    return f"models:/{model}/{version}"
