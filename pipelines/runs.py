"""The folder of a training run: all that is needed to go on with it, and to tell MLflow of it later.

run.json        the settings, where MLflow is, and what it has been told
events.jsonl    what happened, a line each
start/          the bundle that training starts from, if it does
state/          the checkpoint to go on from (recsys_moe.checkpoint), gone once the run has ended well
bundle/         the trained model: a bundle, or a language model's Hugging Face folder
health/         pictures, a table and warnings of its experts (recsys_moe.health)
"""

import fcntl
import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

from recsys_moe.errors import UserError, nearest
from recsys_moe.shards import write_json
from recsys_moe.typed import dump, parse, typed

FORMAT = 1
Event = dict[str, Any]
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Kind = Literal["ranker", "lm"]
"""What is trained: a recommendation model or a language model."""


@typed
class RunRecord:
    """`run.json`. `run_id`, `version` and further `tags` are MLflow's; `synced`: it has been told everything."""

    format: int
    name: str
    job: dict[str, Any]
    uri: str
    created: float
    dataset: dict[str, str] | None = None
    status: Status = "RUNNING"
    ended: float | None = None
    run_id: str | None = None
    version: str | None = None
    synced: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    kind: Kind = "ranker"


class RunBusy(UserError):
    """Another process is at work on the run."""


class RunFolder:
    """A run on disk. `update` changes its record for good."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events_file, self.start = path / "events.jsonl", path / "start"
        self.state, self.bundle, self.health = path / "state", path / "bundle", path / "health"
        file = path / "run.json"
        try:
            self.record: RunRecord = parse(RunRecord, json.loads(file.read_text()), str(file))
        except OSError:
            raise UserError(f"{str(path)!r} is not a run: it has no run.json; name a folder that training made") from None
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{str(file)!r} is not whole ({error}); train anew") from None
        if self.record.format != FORMAT:
            raise UserError(f"{str(file)!r} has format {self.record.format}, not {FORMAT}; train anew")

    @classmethod
    def create(
        cls,
        runs_dir: Path,
        name: str,
        job: dict[str, Any],
        uri: str,
        tags: dict[str, str] | None = None,
        kind: Kind = "ranker",
    ) -> "RunFolder":
        """A folder of its own for a run that begins now.

        Raises:
            OSError: it can't be written.
        """
        readable = re.sub(r"[^\w.+=-]+", "-", name)
        path = runs_dir / "train" / f"{time.strftime('%Y%m%d-%H%M%S')}-{readable}-{uuid.uuid4().hex[:6]}"
        path.mkdir(parents=True)
        write_json(path / "run.json", dump(RunRecord(FORMAT, name, job, uri, time.time(), tags=tags or {}, kind=kind)))
        return cls(path)

    def update(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        write_json(self.path / "run.json", dump(self.record))

    def events(self) -> list[Event]:
        """What happened so far. A line that a killed worker left half written is no event."""
        if not self.events_file.exists():
            return []
        found = []
        for line in self.events_file.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time drive the run.

        Raises:
            RunBusy: another one does.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunBusy(f"run {self.path.name!r} is being trained by another process; wait for it or stop it") from None
            yield


def all_runs(runs_dir: Path) -> list[RunFolder]:
    """Every run below the runs folder, the oldest first."""
    return [RunFolder(file.parent) for file in sorted((runs_dir / "train").glob("*/run.json"))]


def find_run(name: str, runs_dir: Path) -> RunFolder:
    """The run of that folder, folder name or MLflow run id.

    Raises:
        UserError: there is none.
    """
    if (Path(name) / "run.json").is_file():
        return RunFolder(Path(name).absolute())
    runs = all_runs(runs_dir)
    for run in runs:
        if name in (run.path.name, run.record.run_id):
            return run
    raise UserError(
        f"run {name!r} is neither a folder with a run.json nor a run in {str(runs_dir / 'train')!r}; "
        f"{nearest(name, [run.path.name for run in runs])}"
    )
