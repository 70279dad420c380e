"""The plain trainer: no Ray, no MLflow. What happens is told to a callback; the best weights are kept."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_moe.batches import Batch, ShuffledBatches, ordered_rows
from recsys_moe.errors import UserError
from recsys_moe.heads import Heads, mean_quality
from recsys_moe.losses import multi_task_loss
from recsys_moe.metrics import TaskMetrics, quality, quality_name
from recsys_moe.ranker import Ranker
from recsys_moe.shards import PreparedData
from recsys_moe.typed import typed

Event = dict[str, Any]


@typed
class TrainConfig:
    """How a model is trained.

    Adam (AdamW with `weight_decay`, biases and norms spared) for the dense part and Adagrad for the embeddings, both on the
    same `schedule`: a `one_cycle` (Smith 2018) over all epochs, or `constant`. `clip_norm` bounds the dense gradient's norm
    (0: off; the fused embedding optimizer applies its update inside the backward pass, where no norm over all parameters is
    known yet).
    Training stops when the mean validation quality (of a binary task its AUC; see `recsys_moe.heads`) has not risen for
    `patience` epochs (0: never) and keeps the best epoch.
    `precision` is the experts' (`bf16`: their matrix products; gates, norms, towers and losses stay fp32).
    """

    seed: Annotated[int, Field(ge=0)] = 0
    epochs: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=1)] = 1024
    lr: Annotated[float, Field(gt=0)] = 3e-3
    embedding_lr: Annotated[float, Field(gt=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 1.0
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    clip_norm: Annotated[float, Field(ge=0)] = 10.0
    patience: Annotated[int, Field(ge=0)] = 3
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass
class TrainResult:
    """What a training run did; `samples_per_s` counts reading, shuffling and the optimizer, not evaluation."""

    epochs: int
    rows: int
    seconds: float
    samples_per_s: float
    best_epoch: int
    best_quality: float
    validation: dict[str, TaskMetrics] = field(default_factory=dict)


class Trainer:
    """Trains a `Ranker` on prepared data.

    Args:
        model_config: a family's configuration (see `recsys_moe.models`).
        on_event: called with progress (`{"kind": "step", …}` about twice a second) and after each epoch
            (`{"kind": "epoch", …}` with the validation metrics of each task and whether it is the best so far).

    Raises:
        UserError: a loss that is not finite, or a validation part in which no task has a quality.
    """

    def __init__(
        self,
        data: PreparedData,
        model_config: Any,
        config: TrainConfig,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.data, self.config, self.on_event = data, config, on_event
        self.model = build_ranker(data, model_config, config.precision)
        self.dense = self.model.dense_parameters()
        # Decay is for what multiplies the inputs: a bias holds its task's rate, and a norm's scale belongs at 1, not at 0.
        spared = [p for name, p in self.model.network.named_parameters() if "bias" in name or "norms." in name]
        multiplying = [p for p in self.dense if all(p is not other for other in spared)]
        groups: list[dict[str, Any]] = [{"params": multiplying}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True)
        self.heads = Heads(data.schema, data.transform.statistics)
        self.task_weights_t = torch.tensor([t.loss_weight for t in data.schema.tasks])
        self.batches = ShuffledBatches(data, "train", config.batch_size, config.seed)
        self.rows = data.manifest.rows("train")
        self.total_steps = config.epochs * math.ceil(self.rows / config.batch_size)
        self.step = 0

    def fit(self) -> TrainResult:
        """Train, stop early, and leave the best epoch's weights in `self.model`."""
        best: TrainResult | None = None
        best_weights: dict[str, Tensor] = {}
        if self.config.precision == "bf16" and not has_bf16():
            message = "this CPU has no bf16 instructions: train.precision=bf16 will be slower here than fp32"
            self.on_event({"kind": "warning", "message": message})
        seconds = 0.0
        for epoch in range(self.config.epochs):
            start = time.perf_counter()
            loss = self._train_epoch(epoch, seconds)
            seconds += time.perf_counter() - start
            validation = evaluate(self.model, self.data, "validation")
            if epoch == 0:
                for message in undefined_quality_warnings(validation, "validation"):
                    self.on_event({"kind": "warning", "message": message})
            mean = mean_quality(validation)
            rate = (epoch + 1) * self.rows / seconds
            if math.isnan(mean):
                raise UserError(
                    "no task has both classes, or labels that differ, in the validation part; make data.split.validation larger"
                )
            improved = best is None or mean > best.best_quality
            if improved:
                best = TrainResult(epoch + 1, self.rows, seconds, rate, epoch + 1, mean, validation)
                best_weights = copy.deepcopy(self.model.state_dict())
            assert best is not None
            best.epochs, best.seconds, best.samples_per_s = epoch + 1, seconds, rate
            self.on_event(
                {
                    "kind": "epoch",
                    "epoch": epoch + 1,
                    "step": self.step,
                    "total_steps": self.total_steps,
                    "train.loss": loss,
                    "train.samples_per_s": rate,
                    "validation.mean_quality": mean,
                    "validation": {task: asdict(m) for task, m in validation.items()},
                    "best": improved,
                }
            )
            if self.config.patience and epoch + 1 - best.best_epoch >= self.config.patience:
                break
        assert best is not None
        self.model.load_state_dict(best_weights)
        return best

    def _train_epoch(self, epoch: int, seconds_before: float) -> float:
        self.model.train()
        total, rows, told, start = 0.0, 0, time.perf_counter(), time.perf_counter()
        for batch in self.batches.epoch(epoch):
            loss = self._train_step(batch)
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {self.step}; lower train.lr or train.embedding_lr")
            total += loss * len(batch)
            rows += len(batch)
            now = time.perf_counter()
            if now - told > 0.5:
                told = now
                rate = (epoch * self.rows + rows) / (seconds_before + now - start)
                self.on_event(
                    {
                        "kind": "step",
                        "step": self.step,
                        "total_steps": self.total_steps,
                        "train.loss": total / rows,
                        "train.samples_per_s": rate,
                    }
                )
        return total / rows

    def _train_step(self, batch: Batch) -> float:
        self._set_rates()
        outputs, _ = self.model(batch.ids_bf, batch.dense_bd, batch.lists)
        losses = self.heads.losses(outputs, batch.labels_bt)
        loss = multi_task_loss(losses, batch.weights_bt, self.task_weights_t)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.dense, self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _set_rates(self) -> None:
        factor = schedule(self.config.schedule, self.step / self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        self.model.set_embedding_lr(self.config.embedding_lr * factor)


def schedule(kind: str, progress: float) -> float:
    """The factor on the learning rates at `progress` (0 … 1) through training.

    `one_cycle`: a cosine from 0.04 up to 1 over the first 30 %, then a cosine down to 0.

    >>> schedule("one_cycle", 0.3), schedule("constant", 0.3)
    (1.0, 1.0)
    """
    if kind == "constant":
        return 1.0
    warm = 0.3
    if progress < warm:
        return 1 - 0.96 * (1 + math.cos(math.pi * progress / warm)) / 2
    return (1 + math.cos(math.pi * (progress - warm) / (1 - warm))) / 2


def build_ranker(data: PreparedData, model_config: Any, precision: str) -> Ranker:
    """A freshly initialised model for prepared data, which starts where each task's training labels are."""
    t = data.transform
    heads = Heads(t.schema, t.statistics)
    return Ranker(
        model_config,
        t.sparse_names,
        t.cardinalities,
        len(t.dense_names),
        heads.outputs,
        precision,
        t.lists,
        heads.start(),
    )


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 by instructions of its own (x86: AVX-512 or AMX; Arm: BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def evaluate(model: Ranker, data: PreparedData, part: str) -> dict[str, TaskMetrics]:
    """Metrics of each task on a part of prepared data, over the rows in which the task is observed."""
    model.eval()
    heads = Heads(data.schema, data.transform.statistics)
    collected = []
    with torch.no_grad():  # fbgemm's CPU lookup is an autograd kernel: inference_mode would skip it
        for rows in ordered_rows(data, part):
            batch = Batch.of(rows)
            scores = heads.scores(model(batch.ids_bf, batch.dense_bd, batch.lists)[0])
            collected.append((scores, rows.labels, rows.weights, rows.groups))
    return heads.metrics(collected)


def undefined_quality_warnings(metrics: dict[str, TaskMetrics], part: str) -> list[str]:
    """A sentence for each task whose quality is not defined on the part."""
    return [
        f"task {task!r} has one class only in its {m.rows:,} {part} rows: its {quality_name(m)} is NaN and counts in no mean"
        for task, m in metrics.items()
        if math.isnan(quality(m))
    ]
