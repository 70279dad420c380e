"""What Ray Train runs in each training worker: a plain trainer; the first worker writes events and the model."""

import errno
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recsys_moe.bundle import FORMAT, BundleConfig, read_description, save_bundle
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.distributed import rank, world_size
from recsys_moe.errors import UserError
from recsys_moe.models import ModelConfig
from recsys_moe.process import keep_freed_memory, peak_memory, use_all_cores
from recsys_moe.selftest import write_selftest
from recsys_moe.shards import PreparedData
from recsys_moe.sources import DataConfig, read_part
from recsys_moe.trainer import TrainConfig, Trainer, evaluate, undefined_quality_warnings
from recsys_moe.typed import parse, plain
from recsys_moe.warm_start import StartBundle

Tell = Callable[[dict[str, Any]], None]


Train = Callable[[dict[str, Any], Tell], dict[str, Any]]
"""Trains as it is told; returns the last event: what was reached, or why nothing was."""


def train_worker(config: dict[str, Any], train: Train) -> None:
    """What each of Ray Train's workers does."""
    use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    keep_freed_memory()
    run_training(config, train)


def run_training(config: dict[str, Any], train: Train) -> None:
    """Train; a user's mistake, which all workers meet alike, ends the event log instead of a traceback."""
    with EventLog(Path(config["events"] if rank() == 0 else os.devnull)) as log:
        with peak_memory() as peak:
            last = train(config, log.tell)
        if last["kind"] == "done":
            last["train"]["peak_anon_mb"] = round(peak.mb, 1)
        log.tell(last)


class EventLog:
    """`events.jsonl`, a line an event. While the disk is full events wait, in their order, until there is room.

    Raises:
        OSError: at the end of the block, if there is still none.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()
        self._waiting = b"" if _ends_a_line(path, self._end) else b"\n"  # a worker before was killed within a line

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._file:
            if kind is None and self._waiting:
                self._write()

    def tell(self, event: dict[str, Any]) -> None:
        self._waiting += (json.dumps(plain(event | {"time": time.time()})) + "\n").encode()
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        written = self._file.write(self._waiting)
        if written < len(self._waiting):
            self._file.truncate(self._end)  # half a line is no event
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end, self._waiting = self._end + written, b""


def _ends_a_line(path: Path, size: int) -> bool:
    if not size:
        return True
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read() == b"\n"


def train_ranker(config: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Train a recommendation model and leave its bundle, with rows of the validation part for its self-test."""
    last = _train_ranker(config, tell)
    if rank() == 0 and last["bundle"] is not None:
        # The self-test loads what was saved. Tables may fill half the memory there is: those of training go first.
        gc.collect()
        bundle = Path(config["bundle"])
        described, schema, _ = read_description(bundle)
        try:
            write_selftest(bundle, read_part(described.data, schema, "validation"))
        except (UserError, OSError) as error:  # the log rows went away while it trained
            tell({"kind": "warning", "message": f"the bundle has no self-test: {error}"})
    return last


def _train_ranker(config: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The last event; when it is told nothing of the trainer is left."""
    # The driver has verified the checksums when it opened or wrote the data.
    data = PreparedData(Path(config["prepared"]), verify=False)
    model_config = parse(ModelConfig, config["model"], "model")
    train_config: TrainConfig = parse(TrainConfig, config["train"], "train")
    source = parse(DataConfig, config["data"], "data")
    described = BundleConfig(FORMAT, model_config, train_config.precision, source, data.manifest.digest, data.manifest.start)
    bundle = Path(config["bundle"])
    trainer: Trainer | None = None
    try:
        start = StartBundle(Path(config["start"])) if config["start"] else None
        trainer = Trainer(data, model_config, train_config, tell, Checkpoints(Path(config["state"])), start)
        tell({"kind": "start", "step": trainer.step, "total_steps": trainer.total_steps, "workers": world_size()})
        result = trainer.fit()
    except UserError as error:
        best = trainer.progress.best if trainer else None
        if trainer and best:
            trainer.restore_best()
            _save(bundle, trainer, described, {"validation": {t: asdict(m) for t, m in best.validation.items()}})
        return {"kind": "error", "message": str(error), "bundle": str(bundle) if best else None}
    validation = {task: asdict(m) for task, m in result.validation.items()}
    _save(bundle, trainer, described, {"validation": validation})
    test = evaluate(trainer.model, data, "test")
    for message in undefined_quality_warnings(test, "test"):
        tell({"kind": "warning", "message": message})
    return {
        "kind": "done",
        "bundle": str(bundle),
        "validation": validation,
        "test": {task: asdict(m) for task, m in test.items()},
        "train": {
            "samples_per_s": round(result.samples_per_s, 1),
            "rows": result.rows,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "steps": trainer.step,
            "seconds": round(result.seconds, 3),
            "health_seconds": round(trainer.health.seconds, 3),
        },
    }


def _save(bundle: Path, trainer: Trainer, described: BundleConfig, metrics: dict[str, Any]) -> None:
    """Write the bundle together."""
    weights, adagrad = trainer.whole_weights(), trainer.whole_adagrad()
    transform = trainer.data.transform
    save_bundle(bundle, weights, described, transform, plain(metrics), adagrad)


def train_lm(config: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Train a language model and leave its Hugging Face folder."""
    from recsys_moe.llm.convert import copy_beside
    from recsys_moe.llm.trainer import LmTrainConfig, LmTrainer

    settings: LmTrainConfig = parse(LmTrainConfig, config["train"], "train")
    tokens, bundle, start = Path(config["tokens"]), Path(config["bundle"]), config["start"]
    try:
        trainer = LmTrainer(
            tokens, config["model"], settings, tell, Checkpoints(Path(config["state"])), Path(start) if start else None
        )
        tell({"kind": "start", "step": trainer.step, "total_steps": settings.steps, "workers": world_size()})
        found = trainer.fit()
    except UserError as error:
        return {"kind": "error", "message": str(error), "bundle": None}
    trainer.save(bundle, config["model"])
    if rank() == 0:
        copy_beside(tokens, bundle)
    seconds = trainer.seconds
    trained = {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(trainer.tokens / seconds, 1) if seconds else None,
    }
    return {"kind": "done", "validation": asdict(found), "train": trained}
