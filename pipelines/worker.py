"""What Ray Train runs in the training worker: the plain trainer, its events written to a file, checkpoints reported."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint

from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.errors import UserError
from recsys_moe.models import ModelConfig
from recsys_moe.process import keep_freed_memory, peak_memory, use_all_cores
from recsys_moe.shards import PreparedData
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig, Trainer, evaluate, undefined_quality_warnings
from recsys_moe.typed import parse, plain


def train_worker(config: dict[str, Any]) -> None:
    """Train; a user's mistake ends the event log instead of a traceback."""
    with Path(config["events"]).open("a", buffering=1) as log:

        def tell(event: dict[str, Any]) -> None:
            log.write(json.dumps(plain(event)) + "\n")

        try:
            with peak_memory() as peak:
                summary = _train(config, tell)
            summary["train"]["peak_anon_mb"] = round(peak.mb, 1)
            tell(summary)
        except UserError as error:
            tell({"kind": "error", "message": str(error)})


def _train(config: dict[str, Any], tell: Any) -> dict[str, Any]:
    use_all_cores()
    keep_freed_memory()
    # The driver has verified the checksums when it opened or wrote the data.
    data = PreparedData(Path(config["prepared"]), verify=False)
    model_config = parse(ModelConfig, config["model"], "model")
    train_config: TrainConfig = parse(TrainConfig, config["train"], "train")
    source = parse(DataConfig, config["data"], "data")
    described = BundleConfig(FORMAT, model_config, train_config.precision, source, data.manifest.digest)

    def on_event(event: dict[str, Any]) -> None:
        tell(event)
        if event["kind"] != "epoch":
            return
        metrics = {"mean_quality": event["validation.mean_quality"], "epoch": event["epoch"]}
        if not event["best"]:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            save_bundle(bundle, trainer.model, described, data.transform, {"validation": plain(event["validation"])})
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(bundle))

    trainer = Trainer(data, model_config, train_config, on_event)
    tell({"kind": "start", "total_steps": trainer.total_steps})
    result = trainer.fit()
    test = evaluate(trainer.model, data, "test")
    for message in undefined_quality_warnings(test, "test"):
        tell({"kind": "warning", "message": message})
    return {
        "kind": "done",
        "validation": {task: asdict(m) for task, m in result.validation.items()},
        "test": {task: asdict(m) for task, m in test.items()},
        "train": {
            "samples_per_s": round(result.samples_per_s, 1),
            "rows": result.rows,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "steps": trainer.step,
            "seconds": round(result.seconds, 3),
        },
    }
