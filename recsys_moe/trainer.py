"""The plain trainer: no Ray, no MLflow. What happens is told to a callback; the best weights are kept.

It runs in one process, or in several of a torch process group, which then train as one; it can stop at any time and go on
from its last checkpoint.
"""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, TypeAdapter, model_validator
from torch import Tensor, nn

from recsys_moe.balancing import BalancingConfig, Static, balancer_of
from recsys_moe.batches import Batch, ShuffledBatches, ordered_rows
from recsys_moe.bundle import ADAGRAD_FILE
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.distributed import gather_pieces, piece, rank, sum_gradients, total, world_size
from recsys_moe.errors import UserError
from recsys_moe.heads import Heads, mean_quality
from recsys_moe.health import HealthConfig, Monitor
from recsys_moe.losses import task_losses
from recsys_moe.metrics import TaskMetrics, quality, quality_name
from recsys_moe.ranker import CPU, Ranker
from recsys_moe.routing import finite_routers
from recsys_moe.shards import PreparedData
from recsys_moe.tensorfiles import Chunked, TensorFiles, Tensors
from recsys_moe.typed import typed
from recsys_moe.warm_start import StartBundle, is_table

Event = dict[str, Any]
Workers = Annotated[int, Field(ge=1)]


@typed
class TrainConfig:
    """How a model is trained.

    Adam (AdamW with `weight_decay`, biases and norms spared) for the dense part and row-wise Adagrad for the tables, those of
    the embeddings at `embedding_lr` and those of `model.front.first_order` at `first_order_lr`, all on the same `schedule`: a
    `one_cycle` (Smith 2018) over all epochs, or `constant`. `clip_norm` bounds the dense gradient's norm (0: off; the tables'
    update happens inside the backward pass, where no norm over all parameters is known yet).
    `balancing` is how the tasks' losses are weighed against each other (`recsys_moe.balancing`); the loss that is told is that
    of the schema's weights all the same.
    Training stops when the mean validation quality (of a binary task its AUC; see `recsys_moe.heads`) has not risen for
    `patience` epochs (0: never) and keeps the best epoch.
    `precision` is the experts' (`bf16`: their matrix products; gates, norms, towers and losses stay fp32). `device=cuda` trains
    on a GPU with the Triton kernels, one worker so far; bundles score on the CPU all the same.

    `workers` share each batch of `batch_size`: a number, or two bounds between which Ray finds room. A resumable state is
    written every `checkpoint_steps` steps and every `checkpoint_seconds` (0: not so); a worker that is lost costs what was
    trained since, and `max_failures` such losses are borne.

    `health` says how the experts are looked at meanwhile (see `recsys_moe.health`); nothing that is trained depends on it.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    epochs: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=1)] = 1024
    lr: Annotated[float, Field(gt=0)] = 3e-3
    embedding_lr: Annotated[float, Field(gt=0)] = 0.05
    first_order_lr: Annotated[float, Field(gt=0)] = 0.2
    weight_decay: Annotated[float, Field(ge=0)] = 1.0
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    clip_norm: Annotated[float, Field(ge=0)] = 10.0
    balancing: BalancingConfig = Static()
    patience: Annotated[int, Field(ge=0)] = 3
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    workers: Workers | tuple[Workers, Workers] = 1
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 300.0
    max_failures: Annotated[int, Field(ge=0)] = 3
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def check_workers(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"train.workers is {list(self.workers)}: write the smaller bound first")
        return self


@dataclass
class TrainResult:
    """What a training run did; `samples_per_s` counts reading, shuffling and the optimizer, neither evaluation nor health."""

    epochs: int
    rows: int
    seconds: float
    samples_per_s: float
    best_epoch: int
    best_quality: float
    validation: dict[str, TaskMetrics] = field(default_factory=dict)


@dataclass
class Progress:
    """Where training stands: after `batch` batches of `epoch` (from 0 on). `loss` and `rows` are the epoch's so far, and
    `fingerprint` says which rows they were."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    rows: int = 0
    fingerprint: int = 0
    seconds: float = 0.0
    best: TrainResult | None = None


class Trainer:
    """Trains a `Ranker` on prepared data, together with the other workers of this process group, if there is one.

    Args:
        model_config: a family's configuration (see `recsys_moe.models`).
        on_event: called with progress (`{"kind": "step", …}` about twice a second), after each epoch
            (`{"kind": "epoch", …}` with the validation metrics of each task and whether it is the best so far), and at some
            steps with the experts' health (`{"kind": "health", …}`, last of the weights that are kept).
        checkpoints: where resumable states are kept; training goes on from the newest. It ends with the very bits of a
            training that was never interrupted, given as many workers.
        start: a bundle whose weights training starts from. They are kept if no epoch is better than they are.

    Raises:
        UserError: a loss that is not finite, a validation part in which no task has a quality, a state of other data, or a
            start that does not fit.
    """

    def __init__(
        self,
        data: PreparedData,
        model_config: Any,
        config: TrainConfig,
        on_event: Callable[[Event], None] = lambda event: None,
        checkpoints: Checkpoints | None = None,
        start: StartBundle | None = None,
    ) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("train.device is 'cuda', but PyTorch finds no GPU on the training worker; use train.device=cpu")
        if config.device == "cuda" and world_size() > 1:
            raise UserError(f"train.device is 'cuda' with {world_size()} workers; a GPU is used by train.workers=1 only")
        check_own_rows(data.transform.own_rows, world_size())
        torch.manual_seed(config.seed)
        self.data, self.config, self.on_event, self.checkpoints = data, config, on_event, checkpoints
        self.device = torch.device(config.device)
        self.model = build_ranker(data, model_config, config.precision, self.device)
        self.dense = self.model.dense_parameters()
        # Decay is for what multiplies the inputs: a bias holds its task's rate, and a norm's scale belongs at 1, not at 0.
        spared = [p for name, p in self.model.named_dense_parameters() if "bias" in name or "norms." in name]
        multiplying = [p for p in self.dense if all(p is not other for other in spared)]
        groups: list[dict[str, Any]] = [{"params": multiplying}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True)
        self.heads = Heads(data.schema, data.transform.statistics)
        self.task_weights_t = torch.tensor([t.loss_weight for t in data.schema.tasks], device=self.device)
        self.balancer = balancer_of(config.balancing, data.schema.task_names, config.seed, self.device)
        self.alpha_t: Tensor | None = None  # the balancer's weights of the last step
        self.health = Monitor(data, self.heads, config.health, config.epochs, on_event)
        self.batches = ShuffledBatches(data, "train", config.batch_size, config.seed, rank(), world_size())
        self.rows = data.manifest.rows("train")
        self.total_steps = config.epochs * math.ceil(self.rows / config.batch_size)
        self.progress = Progress()
        self.best_weights: Tensors = {}
        self._start = start
        if start is not None:
            start.check_model(model_config, config.precision)
            start.take_over(self.model)
        if checkpoints is not None:
            self._resume(checkpoints)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def fit(self) -> TrainResult:
        """Train, stop early, and leave the best epoch's weights in `self.model`."""
        p = self.progress
        if self.config.precision == "bf16" and self.config.device == "cpu" and not has_bf16():
            message = "this CPU has no bf16 instructions: train.precision=bf16 will be slower here than fp32"
            self.on_event({"kind": "warning", "message": message})
        if p.best is None and self._start is not None:
            self._measure(self._start)
        while p.epoch < self.config.epochs:
            loss = self._train_epoch()
            validation = evaluate(self.model, self.data, "validation")
            if p.epoch == 0:
                for message in undefined_quality_warnings(validation, "validation"):
                    self.on_event({"kind": "warning", "message": message})
            mean = mean_quality(validation)
            p.epoch, p.batch, p.loss, p.rows, p.fingerprint = p.epoch + 1, 0, 0.0, 0, 0
            rate = p.epoch * self.rows / p.seconds
            if math.isnan(mean):
                raise UserError(
                    "no task has both classes, or labels that differ, in the validation part; make data.split.validation larger"
                )
            improved = p.best is None or mean > p.best.best_quality
            if improved:
                p.best = TrainResult(p.epoch, self.rows, p.seconds, rate, p.epoch, mean, validation)
                if p.epoch < self.config.epochs:  # else they stay where they are
                    self.best_weights = self._keep_best()
            assert p.best is not None
            p.best.epochs, p.best.seconds, p.best.samples_per_s = p.epoch, p.seconds, rate
            self.on_event(
                {
                    "kind": "epoch",
                    "epoch": p.epoch,
                    "step": p.step,
                    "total_steps": self.total_steps,
                    "train.loss": loss,
                    "train.samples_per_s": rate,
                    **self._told_alpha(),
                    "validation.mean_quality": mean,
                    "validation": {task: asdict(m) for task, m in validation.items()},
                    "best": improved,
                }
            )
            if self.config.patience and p.epoch - p.best.best_epoch >= self.config.patience:
                break
        assert p.best is not None
        if p.best.best_epoch != p.epoch:
            self.restore_best()
        if p.best.best_epoch == 0:
            message = (
                "no epoch was better on the validation part than the model that training started from: its weights are kept"
            )
            self.on_event({"kind": "warning", "message": message})
        self.health.look(self.model, p.step, self.total_steps, p.seconds, final=True)
        return p.best

    def _measure(self, start: StartBundle) -> None:
        """What the model that training starts from does on the validation part is what every epoch has to beat."""
        if not start.has_adagrad and self.model.adagrad():
            message = (
                f"{str(start.folder)!r} has no {ADAGRAD_FILE}: the embeddings' Adagrad sums start anew, and the first step of "
                "each row is a whole train.embedding_lr"
            )
            self.on_event({"kind": "warning", "message": message})
        with start.new_ids_unknown(self.model):
            validation = evaluate(self.model, self.data, "validation")
            self.best_weights = self._keep_best()
        mean = mean_quality(validation)
        self.progress.best = TrainResult(0, self.rows, 0.0, 0.0, 0, -math.inf if math.isnan(mean) else mean, validation)
        measured = {task: asdict(m) for task, m in validation.items()}
        self.on_event({"kind": "before", "step": 0, "before.mean_quality": mean, "before": measured})

    def _told_alpha(self) -> dict[str, float]:
        if self.alpha_t is None:
            return {}
        return {f"train.balancing.{t}": a for t, a in zip(self.data.schema.task_names, self.alpha_t.tolist(), strict=True)}

    def restore_best(self) -> None:
        """Give the model the weights of the best epoch that was not the last."""
        _copy_tensors(self.best_weights, self.model.state_dict())

    def whole_weights(self) -> dict[str, Tensor | Chunked]:
        """The model's `state_dict` with all tables, for `save_tensors`, which all workers have to call."""
        return self._whole(dict(self.model.state_dict()))

    def whole_adagrad(self) -> dict[str, Tensor | Chunked]:
        """The Adagrad sums of all tables, likewise."""
        return self._whole(self.model.adagrad(), per_row=True)

    def _whole(self, tensors: dict[str, Tensor], per_row: bool = False) -> dict[str, Tensor | Chunked]:
        if world_size() == 1:
            return {**tensors}
        from recsys_moe.sharding import whole_tables

        dense = {name: tensor for name, tensor in tensors.items() if not is_table(name)}
        return {**dense, **whole_tables(self.model, tensors, per_row)}

    def _train_epoch(self) -> float:
        self.model.train()
        p = self.progress
        told = start = time.perf_counter()
        before = p.seconds
        for batch in self.batches.epoch(p.epoch, p.batch):
            with finite_routers(lambda told: f"at step {p.step}, {told}, or lower train.lr or train.embedding_lr"):
                loss = self._train_step(batch)
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {p.step}; lower train.lr or train.embedding_lr")
            size = min(self.config.batch_size, self.rows - p.rows)
            p.loss, p.rows, p.batch = p.loss + loss * size, p.rows + size, p.batch + 1
            p.fingerprint = (p.fingerprint + fingerprint(batch.numbers_b)) % 2**63
            now = time.perf_counter()
            p.seconds = before + now - start
            if now - told > 0.5:
                told = now
                self.on_event(
                    {
                        "kind": "step",
                        "step": p.step,
                        "total_steps": self.total_steps,
                        "train.loss": p.loss / p.rows,
                        "train.samples_per_s": (p.epoch * self.rows + p.rows) / p.seconds,
                    }
                )
            start += self.health.look(self.model, p.step, self.total_steps, p.seconds)
            if self.checkpoints is not None and self.checkpoints.due(p.step, self.config):
                self._save()
        self._check_rows()
        return p.loss / p.rows

    def _train_step(self, batch: Batch) -> float:
        self._set_rates()
        if world_size() > 1:
            # Dropout by the step: however many workers there are, and whichever was lost, a state needs no more than that.
            torch.manual_seed(int(np.random.SeedSequence((self.config.seed, self.step, rank())).generate_state(1)[0]))
        batch = batch.to(self.device)
        x = self.model.represent(batch.ids_bf, batch.dense_bd, batch.lists)
        if self.balancer is not None and not x.requires_grad:  # numbers alone
            x = x.detach().requires_grad_()
        outputs, _ = self.model.network(x)
        if (first_bo := self.model.first_order_outputs(batch.ids_bf, batch.dense_bd, batch.lists)) is not None:
            outputs = outputs + first_bo
        losses_bt = self.heads.losses(outputs, batch.labels_bt)
        losses_bt, weights_bt = self.model.network.objective(outputs, losses_bt, batch.labels_bt, batch.weights_bt)
        totals_t = total(weights_bt.sum(0))
        losses_t = task_losses(losses_bt, weights_bt, self.task_weights_t, totals_t)
        loss = balanced = losses_t.sum()
        if self.balancer is not None:
            self.alpha_t = self.balancer(losses_t, totals_t > 0, x, self.progress.epoch, self.step)
            balanced = (self.alpha_t * losses_t).sum()
        self.optimizer.zero_grad(set_to_none=True)
        balanced.backward()
        loss = sum_gradients(self.dense, loss)
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.dense, self.config.clip_norm)
        self.optimizer.step()
        self.progress.step += 1
        return loss.item()

    def _set_rates(self) -> None:
        factor = schedule(self.config.schedule, self.step / self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        self.model.set_embedding_lr(self.config.embedding_lr * factor)
        self.model.set_first_order_lr(self.config.first_order_lr * factor)

    def _check_rows(self) -> None:
        """Every row of the epoch was trained once, by whichever workers, before and after whatever was lost."""
        trained = self._trained_rows()
        every = sum(fingerprint(torch.arange(low, min(low + 2**20, self.rows))) for low in range(0, self.rows, 2**20))
        if (self.progress.rows, trained) != (self.rows, every % 2**63):
            raise RuntimeError(f"epoch {self.progress.epoch + 1} did not train each of its {self.rows:,} rows once")

    def _trained_rows(self) -> int:
        return int(total(torch.tensor([self.progress.fingerprint]))) % 2**63

    # ---- states ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a state; a disk that is full is told, and training goes on with the state before."""
        assert self.checkpoints is not None
        p = replace(self.progress, fingerprint=self._trained_rows())
        told = TypeAdapter(Progress).dump_python(p)
        told |= {"data": self.data.manifest.digest, "workers": world_size()}
        best = p.best.best_epoch if p.best else None
        in_memory = {} if isinstance(self.best_weights, TensorFiles) else self._owned(self.best_weights)
        try:
            self.checkpoints.save(p.step, told, self._tensors(), best, in_memory)
        except OSError as error:
            message = f"the checkpoint of step {p.step} could not be written ({error}); the one before is kept"
            self.on_event({"kind": "warning", "message": message})
        else:
            rows = {"rows": p.rows, "fingerprint": p.fingerprint}
            self.on_event({"kind": "checkpoint", "step": p.step, "epoch": p.epoch, **rows})

    def _keep_best(self) -> Tensors:
        """The weights as they are now: on disk, or in memory if there are no states or no room for them."""
        weights = self.model.state_dict()
        if self.checkpoints is not None:
            try:
                return self.checkpoints.keep_best(self.progress.epoch, weights)
            except OSError as error:
                message = f"the weights of epoch {self.progress.epoch} could not be written ({error}); they are kept in memory"
                self.on_event({"kind": "warning", "message": message})
        return copy.deepcopy(weights)

    def _tensors(self) -> dict[str, Tensor]:
        """What has to be restored, as far as this worker has to write it."""
        tensors = {f"model.{name}": value for name, value in self._owned(dict(self.model.state_dict())).items()}
        tensors |= {f"adagrad.{name}": value for name, value in self.model.adagrad().items()}
        if rank() == 0:
            for name, parameter in self.model.named_dense_parameters():
                tensors |= {f"adamw.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
            tensors |= self._balancing()
            tensors["random"] = torch.get_rng_state()
        return tensors

    def _balancing(self) -> dict[str, Tensor]:
        """The balancer's state, the same on every worker."""
        return {} if self.balancer is None else {f"balancing.{name}": t for name, t in self.balancer.state().items()}

    def _owned(self, weights: Tensors) -> dict[str, Tensor]:
        """Tables, which one worker alone has, and from worker 0 the dense part, which all have."""
        return {name: value for name, value in weights.items() if rank() == 0 or is_table(name)}

    def _resume(self, checkpoints: Checkpoints) -> None:
        state = checkpoints.load()
        if state is None:
            return
        told = dict(state.told)
        if told.pop("data") != self.data.manifest.digest:
            raise UserError(
                f"the checkpoint in {str(checkpoints.folder)!r} was trained on other data than {str(self.data.folder)!r}; "
                "restore the data, or train anew"
            )
        workers = told.pop("workers")
        self.progress = TypeAdapter(Progress).validate_python(told)
        if rank():
            self.progress.fingerprint = 0  # worker 0 remembers for all
        _copy_tensors(state.tensors, {f"model.{name}": weight for name, weight in self.model.state_dict().items()})
        _copy_tensors(state.tensors, {f"adagrad.{name}": sums for name, sums in self.model.adagrad().items()})
        for name, parameter in self.model.named_dense_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adamw.{name}.{key}" in state.tensors]
            self.optimizer.state[parameter] = {key: state.tensors[f"adamw.{name}.{key}"] for key in keys}
        if any(name not in state.tensors for name in self._balancing()):
            raise UserError(
                f"the checkpoint in {str(checkpoints.folder)!r} is not of train.balancing.name={self.config.balancing.name}; "
                "go on with what it was trained with, or train anew"
            )
        _copy_tensors(state.tensors, self._balancing())
        torch.set_rng_state(state.tensors["random"])
        self.best_weights = state.best
        p = self.progress
        self.on_event({"kind": "resume", "step": p.step, "epoch": p.epoch, "rows": p.rows, "workers_before": workers})


def check_own_rows(features: list[str], workers: int | tuple[int, int]) -> None:
    """Refuse features whose ids get rows as training meets them where several workers would train, or may.

    Raises:
        UserError: names the first such feature and the remedies.
    """
    most = workers if isinstance(workers, int) else workers[1]
    if features and most > 1:
        count = str(most) if isinstance(workers, int) else f"up to {most}"
        raise UserError(
            f"feature {features[0]!r} has collisions: none, but there are {count} workers, which would not give ids the "
            "same rows; use train.workers=1 or collisions: shared"
        )


def _copy_tensors(source: Tensors, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from those of the same names."""
    for name, target in targets.items():
        if isinstance(source, TensorFiles):
            source.read_into(name, target)
        else:
            target.copy_(source[name])


def fingerprint(numbers: Tensor) -> int:
    """A number that says which rows a set holds, and how often each: the sum of a hash of every row, modulo 2⁶³.

    Sets add up: f(A) + f(B) = f(A + B), in any order. The hash is splitmix64's (Steele et al. 2014).

    >>> fingerprint(torch.tensor([1, 2])) == (fingerprint(torch.tensor([2])) + fingerprint(torch.tensor([1]))) % 2**63
    True
    """
    x = numbers.numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64)) % 2**63


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


def build_ranker(data: PreparedData, model_config: Any, precision: str, device: torch.device = CPU) -> Ranker:
    """A freshly initialised model for prepared data, which starts where each task's training labels are."""
    t = data.transform
    heads = Heads(t.schema, t.statistics)
    return Ranker(
        model_config,
        t.sparse_names,
        t.cardinalities,
        len(t.dense_names),
        heads.widths,
        precision,
        t.lists,
        heads.start(),
        sharded=world_size() > 1,
        device=device,
        own_rows=t.own_rows,
    )


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 by instructions of its own (x86: AVX-512 or AMX; Arm: BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass
class ScoredPart:
    """What a model makes of a part: scores fp32 `[S, N]`, labels and weights `[T, N]`, groups `[N]` where there are any."""

    scores: Any
    labels: Any
    weights: Any
    groups: Any


def score_part(model: Ranker, data: PreparedData, part: str) -> ScoredPart:
    """Scores of a part's rows in their order, in nameless files: AUC needs all at once, and memory must not grow with them.

    Raises:
        UserError: outputs that are not finite.
    """
    model.eval()
    heads = Heads(data.schema, data.transform.statistics)
    n, tasks, low = data.manifest.rows(part), len(data.schema.tasks), 0
    scores, labels, weights = (_in_a_file((width, n), np.float32) for width in (len(heads.score_names), tasks, tasks))
    groups = None if data.schema.group is None else _in_a_file((n,), np.int64)
    with torch.no_grad():  # not inference_mode, which skips the CPU lookup of tables that workers share out, an autograd kernel
        for rows in ordered_rows(data, part):
            batch = Batch.of(rows)
            if world_size() > 1:
                batch = batch.take(torch.arange(len(rows))[piece(len(rows), rank(), world_size())])
            batch = batch.to(model.device)
            with finite_routers(lambda told: f"on the {part} part, {told}, or lower train.lr or train.embedding_lr"):
                outputs = gather_pieces(model(batch.ids_bf, batch.dense_bd, batch.lists)[0], len(rows))
            if not outputs.isfinite().all():  # the last step's loss was still finite, what it made of the weights is not
                raise UserError(f"the model's outputs on the {part} part are not finite; lower train.lr or train.embedding_lr")
            high = low + len(rows)
            scores[:, low:high] = heads.scores(outputs.cpu())
            labels[:, low:high], weights[:, low:high] = rows.labels, rows.weights
            if groups is not None:
                groups[low:high] = rows.groups
            low = high
    return ScoredPart(scores, labels, weights, groups)


def evaluate(model: Ranker, data: PreparedData, part: str) -> dict[str, TaskMetrics]:
    """Metrics of each task on a part of prepared data, over the rows in which the task is observed."""
    s = score_part(model, data, part)
    return Heads(data.schema, data.transform.statistics).metrics([(s.scores, s.labels, s.weights, s.groups)])


def _in_a_file(shape: tuple[int, ...], dtype: Any) -> Any:
    if 0 in shape:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # it lives as long as it is mapped
        return np.memmap(file, dtype, "w+", shape=shape)


def undefined_quality_warnings(metrics: dict[str, TaskMetrics], part: str) -> list[str]:
    """A sentence for each task whose quality is not defined on the part."""
    return [
        f"task {task!r} has one class only in its {m.rows:,} {part} rows: its {quality_name(m)} is NaN and counts in no mean"
        for task, m in metrics.items()
        if math.isnan(quality(m))
    ]
