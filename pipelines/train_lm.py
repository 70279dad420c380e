"""`recsys-moe llm train`: text to tokens, a language model behind Ray Train, tracked in MLflow, a Hugging Face folder left."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from recsys_moe.errors import UserError, nearest
from recsys_moe.llm import checkpoints
from recsys_moe.llm.text import TextConfig, TextManifest, Windows, prepare_text
from recsys_moe.llm.trainer import LmTrainConfig, check_settings, sparse_parts
from recsys_moe.pipelines.cluster import RayConfig
from recsys_moe.pipelines.drive import Prepared, Work, begin, drive, unfinished, unless_empty
from recsys_moe.pipelines.prepare import Progress
from recsys_moe.pipelines.runs import Event
from recsys_moe.pipelines.tracking import TrackingConfig
from recsys_moe.pipelines.worker import train_lm
from recsys_moe.typed import dump, parse, typed


@typed
class LmJob:
    """All that `recsys-moe llm train` is told.

    `model` is a `config.json` without what the text says (vocabulary, end of a text); with `start`, a Hugging Face folder to
    go on from, the model is that folder's and `model` is empty.
    """

    data: TextConfig
    train: LmTrainConfig
    model: dict[str, Any]
    start: str | None = None
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    runs_dir: str = "runs"


def train(
    job: LmJob,
    on_event: Callable[[Event], None] = lambda event: None,
    on_prepare: Progress = lambda phase, done, total: None,
    name: str | None = None,
    tags: dict[str, str] | None = None,
    here: bool = False,
) -> dict[str, Any]:
    """Run a job; returns its summary (the JSON of `recsys-moe llm train --json`). See `pipelines.train.train`.

    Raises:
        UserError: a mistake in what was given; training failed, or MLflow is lost.
    """
    job = settle(job)
    folder = begin("lm", job, name or f"{job.data.name}-{job.model['model_type']}-seed{job.train.seed}", tags)
    with unless_empty(folder):
        return drive(folder, lambda folder: _start(job, on_prepare), on_event, here)


def resume(
    name: str,
    runs_dir: Path,
    changes: dict[str, dict[str, Any]],
    on_event: Callable[[Event], None] = lambda event: None,
    on_prepare: Progress = lambda phase, done, total: None,
    here: bool = False,
) -> dict[str, Any]:
    """Go on with a run from its last checkpoint, as `pipelines.train.resume` does.

    Raises:
        UserError: no such run, or one that has finished or is still going on; and as `train` does.
    """
    folder, settings = unfinished(name, runs_dir, "lm", changes)
    job: LmJob = parse(LmJob, settings, str(folder.path / "run.json"))
    return drive(folder, lambda folder: _start(job, on_prepare), on_event, here)


def settle(job: LmJob) -> LmJob:
    """The job with absolute places, and with its model's configuration if that is a checkpoint's.

    Raises:
        UserError: a model that can't be built or that the settings are not for; told before any text is read.
    """
    job = replace(
        job, runs_dir=str(Path(job.runs_dir).absolute()), data=replace(job.data, source=str(Path(job.data.source).absolute()))
    )
    if job.start is not None:
        start = Path(job.start).absolute()
        job = replace(job, start=str(start), model=checkpoints.read_config(start))
    values = job.model if job.start else _with_text(job.model, 257, None)
    where = Path(job.start) / "config.json" if job.start else Path("model")
    if job.start is None:
        _check_keys(values)
    model = checkpoints.build(values, job.train.dtype, where)
    for part in sparse_parts(model).values():
        for tensor in part.router.state_dict().values():  # type: ignore[union-attr]
            tensor.zero_()
    check_settings(model, job.train)
    return job


def _check_keys(values: dict[str, Any]) -> None:
    """A `config.json` may say anything; who writes `model.…` means something.

    Raises:
        UserError: a key that the family's configuration has not.
    """
    kind, _ = checkpoints.FAMILIES[checkpoints.family(values, Path("model"))]
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in (*known, "model_type", "bos_token_id", "eos_token_id"):
            raise UserError(f"model: unknown key {key!r}; {nearest(key, known)}")


def _with_text(model: dict[str, Any], vocab_size: int, eos_id: int | None) -> dict[str, Any]:
    return {**model, "vocab_size": vocab_size, "bos_token_id": eos_id, "eos_token_id": eos_id}


def _start(job: LmJob, on_prepare: Progress) -> Work:
    """What is to be done; the text needs no Ray, and a mistake in it is told before Ray starts."""
    start = Path(job.start) if job.start else None
    tokens, text = prepare_text(job.data, Path(job.runs_dir) / "text", start, on_prepare)
    for part in ("train", "validation"):
        Windows(tokens, part, job.train.context)
    values = job.model if job.start else _written(_with_text(job.model, text.vocab_size, text.eos_id))
    told = {"tokens": str(tokens), "model": values, "train": dump(job.train), "start": job.start}
    return Work(job, job.model["model_type"], lambda: Prepared(_describe(text), told), train_lm)


def _written(values: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a new model, with every default written out: transformers' own are others."""
    config = dump(checkpoints.parse_config(values, Path("model")))
    rope = {k: v for k, v in config["rope_parameters"].items() if v is not None}
    values = {"num_key_value_heads": config["num_attention_heads"], **values}
    return values | {k: v for k, v in config.items() if v is not None} | {"rope_parameters": rope}


def _describe(text: TextManifest) -> dict[str, str]:
    """The fields of an MLflow data set."""
    return {
        "name": text.name,
        "digest": text.digest,
        "source_type": "local",
        "source": json.dumps({"uri": text.source}),
        "profile": json.dumps({"tokens": text.tokens, "bytes": text.bytes}),
    }
