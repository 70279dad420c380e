"""The plain trainer of language models: no Ray, no MLflow. What happens is told to a callback.

It runs in one process, or in several of a torch process group, which then train as one; it can stop at any time and go on
from its last checkpoint, with the very bits of a training that was never interrupted. Every random number of a step (which
windows of the text, dropout, routers' noise) follows from the seed, the step and the worker, so that a state needs none.

Shapes: B sequences of T tokens, R = B·T routed rows, E experts.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys_moe.balance import (
    apply_capacity,
    auxiliary_loss,
    entropy_loss,
    expert_load,
    importance_loss,
    load_loss,
    plan_statistics,
    sum_over_layers,
    z_loss,
)
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.distributed import gather_pieces, piece, rank, total, world_size
from recsys_moe.errors import UserError
from recsys_moe.expert_parallel import collect_experts, deal_experts, expert_mesh, gradient_norm, held, sum_gradients
from recsys_moe.experts import MLPExperts
from recsys_moe.kernels import sort_by_expert
from recsys_moe.llm import checkpoints as folders
from recsys_moe.llm.layers import Decoder, RMSNorm
from recsys_moe.llm.text import Windows, open_text
from recsys_moe.routing import HashRouter, SparsePlan, TopKRouter
from recsys_moe.tensorfiles import Rows
from recsys_moe.typed import typed

Event = dict[str, Any]
Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(ge=0)]


@typed
class BalanceConfig:
    """What evens out the experts' load, added to the loss of every layer's plan over the whole batch (`recsys_moe.balance`).

    `auxiliary` (Switch), `z` (ST-MoE), `importance` and `load` (Shazeer), `entropy` (top-p): factors of the losses, 0: without.
    `bias_rate` moves the routers' correction bias after each step instead (2408.15664).
    """

    auxiliary: Factor = 0.0
    z: Factor = 0.0
    importance: Factor = 0.0
    load: Factor = 0.0
    entropy: Factor = 0.0
    bias_rate: Factor = 0.0


LOSSES = {"auxiliary": auxiliary_loss, "z": z_loss, "importance": importance_loss, "load": load_loss, "entropy": entropy_loss}


@typed
class LmTrainConfig:
    """How a language model is trained.

    Each of `steps` steps takes `batch_size` sequences of `context` tokens, over all workers together. AdamW (β 0.9 and 0.95;
    norms and biases are spared its `weight_decay`) at a rate that rises over `warmup` steps to `lr` and falls by a cosine to
    `lr`·`final`; `clip_norm` bounds the gradient's norm (0: off). `precision` is that of the products; weights are kept and
    updated in fp32, and written in `precision`. Training is on the CPU so far.

    `capacity_factor` bounds what an expert takes in training (None: all that comes). `expert_dropout` drops hidden units of
    the experts (Switch, 2101.03961, for fine-tuning). `freeze` keeps the `experts` as they are, or all the `others`.

    `expert_parallel` of the `workers` share the experts of each sparse layer out, and rows travel to where theirs are; the
    other parameters everybody has.

    The validation part is measured every `evaluate_steps` steps and at the end, the experts' use logged with it. A resumable
    state is written every `checkpoint_steps` steps and every `checkpoint_seconds` (0: not so); `max_failures` lost workers
    are borne.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    steps: Positive = 1000
    batch_size: Positive = 32
    context: Positive = 256
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 100
    final: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Factor = 0.1
    clip_norm: Factor = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu"] = "cpu"
    balance: BalanceConfig = BalanceConfig()
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    capacity_policy: Literal["position", "weight", "random"] = "position"
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    freeze: Literal["nothing", "experts", "others"] = "nothing"
    evaluate_steps: Positive = 200
    workers: Positive = 1
    expert_parallel: Positive = 1
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    checkpoint_seconds: Factor = 300.0
    max_failures: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="after")
    def check_workers(self) -> Self:
        if self.workers > self.batch_size:
            raise ValueError(
                f"train.workers is {self.workers}, but train.batch_size {self.batch_size}: some would have no sequence"
            )
        if self.workers % self.expert_parallel:
            raise ValueError(
                f"train.expert_parallel is {self.expert_parallel}, which does not divide train.workers "
                f"{self.workers}; choose a divisor"
            )
        return self

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood in nats a token over the validation part's windows, and e to its power."""

    loss: float
    perplexity: float
    tokens: int


def trainable(values: dict[str, Any], dtype: torch.dtype, seed: int, start: Path | None = None) -> Decoder:
    """A model with fp32 weights that have gradients: fresh ones (N(0, 0.02), norms 1, biases 0), or those of a checkpoint.

    Args:
        values: its `config.json`.
        dtype: of the products.

    Raises:
        UserError: a configuration that can't be built, a checkpoint that can't be read.
    """
    model = folders.build(values, dtype, Path("model") if start is None else start / "config.json", torch.float32)
    if start is None:
        _initialise(model, seed)
    else:
        folders.fill(model, folders.shards(start))
    return model.requires_grad_(True).train()


def _initialise(model: Decoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.zero_()
        else:
            parameter.normal_(std=0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.zero_()


def sparse_parts(model: Decoder) -> dict[int, nn.Module]:
    """The feed-forward parts that have a router, by the number of their layer."""
    return {i: block.ffn for i, block in enumerate(model.blocks) if hasattr(block.ffn, "router")}  # type: ignore[misc]


@contextmanager
def plans_of(model: Decoder, change: Callable[[SparsePlan], SparsePlan] = lambda plan: plan) -> Iterator[dict[int, SparsePlan]]:
    """The plans that the routers make within the block, each layer's last one; `change` may put another in its place."""
    found: dict[int, SparsePlan] = {}

    def watch(layer: int) -> Callable[..., SparsePlan]:
        def keep(router: nn.Module, inputs: tuple[Any, ...], plan: SparsePlan) -> SparsePlan:
            found[layer] = change(plan)
            return found[layer]

        return keep

    hooks = [part.router.register_forward_hook(watch(i)) for i, part in sparse_parts(model).items()]  # type: ignore[union-attr]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def whole_plan(plan: SparsePlan, sequences: int, length: int) -> SparsePlan:
    """The plan of all workers' rows, of which this worker's have gradients: what it makes of a loss of the whole batch is its
    part of the gradient. The batch is `sequences` of `length` rows each, shared out whole."""
    if world_size() == 1:
        return plan
    mine = piece(sequences, rank(), world_size())

    def gathered(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        rows = tensor.reshape(mine.stop - mine.start, length, -1)
        everyones = gather_pieces(rows.detach(), sequences)
        return torch.cat([everyones[: mine.start], rows, everyones[mine.stop :]]).flatten(0, 1)

    names = ("expert_ids", "chosen_ids", "weights", "logits", "chance")
    parts: dict[str, Any] = {name: gathered(getattr(plan, name)) for name in names}
    order, offsets = sort_by_expert(parts["expert_ids"], plan.num_experts)
    return replace(plan, **parts, order=order, offsets=offsets)


def rate_factor(step: int, config: LmTrainConfig) -> float:
    """The factor on the learning rate: linear warm-up, then a cosine down to `final`.

    >>> config = LmTrainConfig(steps=110, warmup=10, final=0.1)
    >>> [round(rate_factor(step, config), 2) for step in (0, 4, 9, 60, 109)]
    [0.1, 0.5, 1.0, 0.55, 0.1]
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2


class LmTrainer:
    """Trains a decoder on a text's tokens, together with the other workers of this process group, if there is one.

    Args:
        tokens: a folder that `prepare_text` made.
        values: the model's `config.json`.
        on_event: called with progress (`{"kind": "step", …}` about twice a second), at evaluations (`{"kind": "evaluation",
            …}`), and beside them with how experts are used (`{"kind": "experts", …}`).
        checkpoints: where resumable states are kept; training goes on from the newest.
        start: a Hugging Face folder whose weights training starts from.

    Raises:
        UserError: settings that don't fit the model, a part without a whole window, a loss that is not finite, a state of a
            training on another text.
    """

    def __init__(
        self,
        tokens: Path,
        values: dict[str, Any],
        config: LmTrainConfig,
        on_event: Callable[[Event], None] = lambda event: None,
        checkpoints: Checkpoints | None = None,
        start: Path | None = None,
    ) -> None:
        self.config, self.on_event, self.checkpoints = config, on_event, checkpoints
        self.text = open_text(tokens)
        self.windows, self.validation = (Windows(tokens, part, config.context) for part in ("train", "validation"))
        self.model = trainable(values, config.dtype, config.seed, start)
        check_settings(self.model, config)
        _set_frozen(self.model, config)
        for module in self.model.modules():
            if isinstance(module, MLPExperts) and config.expert_dropout:
                module.dropout = config.expert_dropout
        if config.expert_parallel > 1:
            deal_experts(self.model, expert_mesh(config.expert_parallel))
        self.trained = {rows: p for rows, p in held(self.model).items() if p.requires_grad}
        spared = [p for rows, p in self.trained.items() if "norm" in rows.name or "bias" in rows.name]
        decayed = [p for rows, p in self.trained.items() if not ("norm" in rows.name or "bias" in rows.name)]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, config.lr, (0.9, 0.95), weight_decay=config.weight_decay, fused=True)
        self.step, self.seconds = 0, 0.0
        if checkpoints is not None:
            self._resume(checkpoints)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.batch_size * self.config.context

    def fit(self) -> Evaluation:
        """Train to the last step; what the validation part then says."""
        told = start = time.perf_counter()
        before = self.seconds
        evaluation = None if self.step else self._evaluate()
        start += time.perf_counter() - told
        while self.step < self.config.steps:
            figures, plans = self._train_step()
            now = time.perf_counter()
            self.seconds = before + now - start
            if now - told > 0.5 or self.step == self.config.steps:
                told = now
                rate = {"train.tokens_per_s": self.tokens / self.seconds}
                self.on_event({"kind": "step", "step": self.step, "total_steps": self.config.steps, **figures, **rate})
            if self.step % self.config.evaluate_steps == 0 or self.step == self.config.steps:
                self._tell_experts(plans)
                evaluation = self._evaluate()
            going_on = self.step < self.config.steps
            if going_on and self.checkpoints is not None and self.checkpoints.due(self.step, self.config):
                self._save()
            start += time.perf_counter() - now
        return evaluation or self._evaluate()

    def _train_step(self) -> tuple[dict[str, float], dict[int, SparsePlan]]:
        config = self.config
        torch.manual_seed(int(np.random.SeedSequence((config.seed, self.step, rank())).generate_state(1)[0]))
        factor = rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        rows = config.batch_size * config.context
        mine = piece(config.batch_size, rank(), world_size())
        windows = torch.from_numpy(self.windows.random((config.seed, self.step), config.batch_size)[mine])
        with plans_of(self.model, self._capped) as plans:
            logits = self.model.score(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum") / rows
        whole = {layer: whole_plan(plan, config.batch_size, config.context) for layer, plan in plans.items()}
        balance = {name: sum_over_layers(LOSSES[name], [*whole.values()]) for name in self._balanced} if whole else {}
        weighted = [getattr(config.balance, name) * value for name, value in balance.items()]
        self.optimizer.zero_grad(set_to_none=True)
        (loss + sum(weighted)).backward()
        loss = sum_gradients(self.model, loss)
        norm = gradient_norm(self.model)
        nn.utils.clip_grads_with_norm_(self.trained.values(), config.clip_norm or math.inf, norm)
        if not math.isfinite(loss + norm):
            raise UserError(
                f"the loss became {loss.item()} (gradient norm {norm.item()}) at step {self.step}; lower train.lr, or let "
                "train.warmup be longer"
            )
        self.optimizer.step()
        if config.balance.bias_rate:
            for layer, part in sparse_parts(self.model).items():
                part.router.update_bias(expert_load(whole[layer]), config.balance.bias_rate)  # type: ignore[operator, union-attr]
        self.step += 1
        figures = {"train.loss": loss.item(), "train.gradient_norm": norm.item(), "train.lr": config.lr * factor}
        return figures | {f"train.{name}_loss": value.item() for name, value in balance.items()}, whole

    @property
    def _balanced(self) -> list[str]:
        return [name for name in LOSSES if getattr(self.config.balance, name)]

    def _capped(self, plan: SparsePlan) -> SparsePlan:
        factor = self.config.capacity_factor
        return plan if factor is None else apply_capacity(plan, factor, self.config.capacity_policy)

    def _tell_experts(self, plans: dict[int, SparsePlan]) -> None:
        """How the last step's batch used the experts, layer by layer."""
        if not plans:
            return
        layers: dict[str, dict[str, Any]] = {}
        for layer, plan in plans.items():
            found = plan_statistics(plan)
            layers[f"layer {layer}"] = {
                "load": [round(x, 6) for x in found.load.tolist()],
                "importance": [round(x, 6) for x in found.importance.tolist()],
                "entropy": found.entropy,
                "dropped_share": found.dropped_share,
                "dead": list(found.dead_experts),
            }
        self.on_event({"kind": "experts", "step": self.step, "layers": layers})
        if self.step == self.config.steps:
            for name, figures in layers.items():
                if dead := figures["dead"]:
                    experts = [str(expert) for expert in dead]
                    where = {"anomaly": "dead", "plan": name, "experts": experts}
                    message = (
                        f"{name}: experts {', '.join(experts)} took none of the last batch's tokens; raise "
                        "train.balance.auxiliary, or use train.balance.bias_rate with a router that has a correction bias"
                    )
                    self.on_event({"kind": "warning", "message": message, **where})

    def _evaluate(self) -> Evaluation:
        found = evaluate(self.model, self.validation, self.config.batch_size)
        self.on_event(
            {
                "kind": "evaluation",
                "step": self.step,
                "total_steps": self.config.steps,
                "validation.loss": found.loss,
                "validation.perplexity": found.perplexity,
            }
        )
        return found

    # ---- states ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a state; a disk that is full is told, and training goes on with the state before."""
        assert self.checkpoints is not None

        def writes(rows: Rows) -> bool:
            """Whether this worker is the first that has them."""
            return rank() == 0 or (rows.high - rows.low < rows.total and rank() < self.config.expert_parallel)

        tensors = {rows.key: tensor for rows, tensor in self._state().items() if writes(rows)}
        try:
            told = {"text": self.text.digest, "step": self.step, "seconds": self.seconds}
            self.checkpoints.save(self.step, told, tensors, None, {})
        except OSError as error:
            message = f"the checkpoint of step {self.step} could not be written ({error}); the one before is kept"
            self.on_event({"kind": "warning", "message": message})
        else:
            self.on_event({"kind": "checkpoint", "step": self.step})

    def _resume(self, checkpoints: Checkpoints) -> None:
        state = checkpoints.load()
        if state is None:
            return
        if state.told.get("text") != self.text.digest:
            raise UserError(
                f"the checkpoint in {str(checkpoints.folder)!r} was trained on another text than {self.text.source!r} is now; "
                "restore the text, or train anew"
            )
        self.step, self.seconds = state.told["step"], state.told["seconds"]
        for parameter in self.trained.values():
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        for rows, tensor in self._state().items():
            state.tensors.read_into(rows.key, tensor)
        self.on_event({"kind": "resume", "step": self.step})

    def _state(self) -> dict[Rows, Tensor]:
        """What has to be restored: parameters (tied ones once), the routers' biases, AdamW's state; experts as held here."""
        found = {rows._replace(name=f"model.{rows.name}"): p.detach() for rows, p in held(self.model).items()}
        for name, buffer in self.model.named_buffers():
            if name.endswith("correction_bias"):
                found[Rows(f"model.{name}", 0, len(buffer), len(buffer))] = buffer
        for rows, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                found[rows._replace(name=f"adamw.{rows.name}.{key}")] = state[key]
            found[Rows(f"adamw.{rows.name}.step", 0, 0, 0)] = state["step"]
        return found

    def save(self, folder: Path, values: dict[str, Any]) -> None:
        """Write the model as a Hugging Face folder, its weights in the precision of the products; all workers call it."""
        collect_experts(self.model)
        if rank():
            return
        written = folders.build(values, self.config.dtype, folder / "config.json")
        folders.copy(self.model, written)
        folders.save(written, values, folder)


def check_settings(model: Decoder, config: LmTrainConfig) -> None:
    """Refuse what the model has no part for.

    Raises:
        UserError: frozen experts, a capacity, a bias rate or a loss for a model without the like; a longer context than it has
            positions; experts dealt to more workers than there are experts.
    """
    routers: list[Any] = [part.router for part in sparse_parts(model).values()]
    if config.context > model.config.max_positions:
        raise UserError(
            f"train.context is {config.context}, but the model has {model.config.max_positions} positions; use at most as many"
        )
    wanted = {
        f"train.freeze is {config.freeze!r}": config.freeze != "nothing",
        f"train.expert_dropout is {config.expert_dropout}": config.expert_dropout > 0,
        f"train.capacity_factor is {config.capacity_factor}": config.capacity_factor is not None,
        f"train.expert_parallel is {config.expert_parallel}": config.expert_parallel > 1,
    }
    for setting, asked in wanted.items():
        if asked and not routers:
            raise UserError(f"{setting}, but the model has no layer with experts; leave it out, or train a mixture")
    for part in sparse_parts(model).values():
        count = part.experts.weights[0].shape[0]  # type: ignore[union-attr, index]
        if config.expert_parallel > count:
            raise UserError(
                f"train.expert_parallel is {config.expert_parallel}, but a layer has {count} experts; use at most as many"
            )
    if config.balance.bias_rate and not all(isinstance(r, TopKRouter) and r.correction_bias is not None for r in routers):
        raise UserError(
            f"train.balance.bias_rate is {config.balance.bias_rate}, but the model's routers have no correction bias; use "
            "model=deepseek_v3, or model=routed model.router.correction_bias=true"
        )
    for name in (field.name for field in fields(config.balance) if field.name in LOSSES):
        for router in routers if getattr(config.balance, name) else []:
            x = (
                torch.zeros(1, dtype=torch.int64)
                if isinstance(router, HashRouter)
                else torch.zeros(1, model.embedding.shape[1])
            )
            try:
                LOSSES[name](router(x))
            except ValueError as error:
                raise UserError(f"train.balance.{name} can't be used with the model's router: {error}") from None


def _set_frozen(model: Decoder, config: LmTrainConfig) -> None:
    if config.freeze == "nothing":
        return
    experts = {id(p) for part in sparse_parts(model).values() for p in part.experts.parameters()}  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.requires_grad_((id(parameter) in experts) == (config.freeze == "others"))


@torch.no_grad()
def evaluate(model: Decoder, windows: Windows, batch_size: int) -> Evaluation:
    """Score every window as serving would: in evaluation mode, nothing dropped. Workers share them out."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    mine = piece(len(windows), rank(), world_size())
    # Experts may be dealt out, so everybody calls the model equally often: who has no window left takes the first, for nothing.
    for first in range(mine.start, mine.start + math.ceil(len(windows) / world_size()), batch_size):
        counts = first < mine.stop
        part = torch.from_numpy(windows.ordered(*(first, min(first + batch_size, mine.stop)) if counts else (0, 1)))
        logits = model.score(part[:, :-1])
        if counts:
            sums[0] += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").double()
            sums[1] += part[:, 1:].numel()
    model.train(was_training)
    loss, tokens = total(sums).tolist()
    return Evaluation(loss / tokens, math.exp(min(loss / tokens, 700.0)), int(tokens))
