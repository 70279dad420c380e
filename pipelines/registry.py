"""Registered models for whoever serves them: which version each alias names now, and its bundle on this disk.

    CACHE/shop@4/            a bundle, whole or not there
    CACHE/versions.json      {"shop@champion": ["4", "3"]}: what each name has stood for, the newest first

What is served is told in a file of its own, which is replaced as a whole (see `recsys_moe.serving.models`). MLflow is asked
again and again; while it does not answer, everything stays as it was, and a service that starts takes what is on the disk.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from recsys_moe.bundle import ADAGRAD_FILE
from recsys_moe.errors import UserError
from recsys_moe.pipelines.tracking import TrackingLost, answering, open_client, resolve_model
from recsys_moe.shards import write_json

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEPT = 3
"""Versions of a name that stay on the disk: the one that is served, and those to fall back on should it be refused."""


class Shelf:
    """The models of some names, `models:/NAME@alias`, `models:/NAME/VERSION`, `runs:/RUN_ID` or a folder, kept up to date.

    Args:
        served: the file that tells what is served.
        warn: told, once, why a name is not up to date.
    """

    def __init__(self, names: Sequence[str], uri: str, runs_dir: Path, served: Path, warn: Callable[[str], None]) -> None:
        self._names, self._uri, self._runs_dir, self._warn = dict.fromkeys(names), uri, runs_dir, warn
        self.served = served
        self._cache = runs_dir.absolute() / "served" / hashlib.sha256(uri.encode()).hexdigest()[:12]
        self._client: MlflowClient | None = None
        self._told: dict[str, str] = {}

    def open(self) -> dict[str, Any]:
        """Find every name and tell what is served; returns that.

        Raises:
            UserError: a name that nothing has, or MLflow does not answer and the disk has no version of one.
        """
        found = {name.removeprefix("models:/"): self._at_first(name) for name in self._names}
        write_json(self.served, found)
        return found

    def refresh(self) -> None:
        """Ask MLflow again, and tell what is served if that has changed; what can't be found out stays as it was."""
        found = json.loads(self.served.read_text())
        before = dict(found)
        for name in self._names:
            if not _is_alias(name):
                continue
            try:
                found[name.removeprefix("models:/")] = self._now(name)
                self._told.pop(name, None)
            except UserError as error:
                self._tell(name, str(error))
        if found != before:
            write_json(self.served, found)

    def _at_first(self, name: str) -> list[dict[str, str]]:
        if _is_alias(name) or _is_version(name):
            try:
                return self._now(name)
            except TrackingLost as lost:
                kept = [choice for choice in self._choices(name) if Path(choice["folder"]).is_dir()]
                if not kept:
                    raise
                self._tell(name, f"{lost}; version {kept[0]['version']} of {name} is served, as it was found last")
                return kept
        return [{"version": "local", "folder": str(resolve_model(name, self._runs_dir, self._uri).absolute())}]

    def _now(self, name: str) -> list[dict[str, str]]:
        """The version that a name stands for, on this disk by then, and those that it has stood for."""
        version, source = self._look_up(name)
        folder = self._folder(name, version)
        if not folder.is_dir():
            self._fetch(source, folder)
        self._remember(name, version)
        return self._choices(name)

    def _look_up(self, name: str) -> tuple[str, str]:
        """The version that a name stands for, and where its bundle is."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

        client = self._client = self._client or open_client(self._uri)
        model, version, alias = _parts(name)
        with answering(self._uri):
            try:
                if alias:
                    version = str(client.get_model_version_by_alias(model, alias).version)
                return version, client.get_model_version_download_uri(model, version)
            except MlflowException as error:
                if error.error_code not in map(ErrorCode.Name, (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE)):
                    raise
                reason = " ".join(str(error).split())[:200]
        raise UserError(f"model {name!r} is not to be had from {self._uri!r} ({reason}); check the name or set tracking.uri")

    def _fetch(self, source: str, folder: Path) -> None:
        """Copy a bundle to the disk; nobody sees a part of it."""
        from mlflow.artifacts import download_artifacts

        temporary = self._cache / f".{folder.name}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        try:
            with answering(self._uri):
                download_artifacts(artifact_uri=source, dst_path=str(temporary), tracking_uri=self._uri, registry_uri=self._uri)
            # The artifact's folder comes along or not, as the store has it.
            inner = next((found.parent for found in sorted(temporary.rglob("config.json"))), None)
            if inner is None:
                raise UserError(f"{source!r} holds no bundle (it has no config.json); register the folder that training made")
            (inner / ADAGRAD_FILE).unlink(missing_ok=True)  # for training only, and as long as the tables
            if not folder.is_dir():
                inner.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _remember(self, name: str, version: str) -> None:
        known = self._versions()
        versions = [version, *(v for v in known.get(name, []) if v != version)][:KEPT]
        if known.get(name) == versions:
            return
        known[name] = versions
        write_json(self._cache / "versions.json", known)
        wanted = {self._folder(each, v).name for each, of in known.items() for v in of}
        for folder in self._cache.iterdir():
            if folder.is_dir() and not folder.name.startswith(".") and folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)

    def _versions(self) -> dict[str, list[str]]:
        try:
            found: dict[str, list[str]] = json.loads((self._cache / "versions.json").read_text())
        except (OSError, ValueError):  # none yet
            return {}
        return found

    def _choices(self, name: str) -> list[dict[str, str]]:
        return [{"version": v, "folder": str(self._folder(name, v))} for v in self._versions().get(name, [])]

    def _folder(self, name: str, version: str) -> Path:
        return self._cache / f"{quote(_parts(name)[0], safe='')}@{quote(version, safe='')}"

    def _tell(self, name: str, message: str) -> None:
        if self._told.get(name) != message:
            self._told[name] = message
            self._warn(message)


def _is_alias(name: str) -> bool:
    return name.startswith("models:/") and "@" in name


def _is_version(name: str) -> bool:
    return name.startswith("models:/") and "/" in name.removeprefix("models:/")


def _parts(name: str) -> tuple[str, str, str]:
    """A registered model's name, and the version or the alias."""
    model, _, version = name.removeprefix("models:/").partition("/")
    model, _, alias = model.partition("@")
    return model, version, alias
