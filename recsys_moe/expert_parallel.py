"""Expert parallelism: each worker holds a share of the experts, and rows travel to the workers that hold theirs (GShard,
2006.16668).

What is sent where is read off the same `SparsePlan` that one worker runs: its slots are sorted by expert, and a worker's
experts follow each other, so each worker's slots are one run of the order.

Workers form a mesh `[replicas, experts]`: those of one row hold all experts together, those of one column the same ones. Every
worker has rows of its own (data parallelism over all of them).

Shapes: B rows here, R = B·T routed rows of K slots, E experts in all, W workers that share them out, N slots received.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from recsys_moe import distributed
from recsys_moe.experts import MLPExperts
from recsys_moe.routing import SparsePlan, sparse_plan
from recsys_moe.tensorfiles import Rows


def expert_mesh(sharing: int) -> DeviceMesh:
    """The mesh of all workers in which each row of `sharing` workers holds all experts; every worker calls it.

    Raises:
        ValueError: the workers don't fall into such rows.
    """
    world = distributed.world_size()
    if sharing < 1 or world % sharing:
        raise ValueError(f"{world} workers don't fall into groups of {sharing} that share the experts; choose a divisor")
    return init_device_mesh("cpu", (world // sharing, sharing), mesh_dim_names=("replicas", "experts"))


class ExpertParallel(nn.Module):
    """The experts of a sparse layer, dealt to the workers of a mesh's row; `combine` is that of `MLPExperts`.

    Parameters are this worker's experts, `piece(E, w, W)` of them. All workers of a row must call `combine`, and run its
    backward pass, as often as each other, be it with no rows at all. A slot's output travels in the dtype of the rows.

    Args:
        experts: all of them, alike on all workers; of their parameters this worker's remain.

    Raises:
        ValueError: fewer experts than workers, or experts with batch norm: its moments are of rows that are elsewhere.
    """

    def __init__(self, experts: MLPExperts, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group, self.replicas = mesh.get_group("experts"), mesh.get_group("replicas")
        count, workers = experts.weights[0].shape[0], dist.get_world_size(self.group)
        if count < workers:
            raise ValueError(f"{count} experts can't be dealt to {workers} workers; share them among fewer")
        if experts.norms is not None:
            raise ValueError("experts with norm='batch' can't be dealt to workers: use norm='none'")
        self._pieces = [distributed.piece(count, worker, workers) for worker in range(workers)]
        self.mine = mine = self._pieces[dist.get_rank(self.group)]
        for stack in (experts.weights, experts.biases):
            for index, whole in enumerate(stack or ()):
                stack[index] = nn.Parameter(whole.detach()[mine].clone(), whole.requires_grad)  # type: ignore[index]
        self.experts, self.held = experts, mine.stop - mine.start

    def whole(self) -> MLPExperts:
        """All experts again, on every worker; those of the mesh's row call it together."""
        experts, count = self.experts, self._pieces[-1].stop
        for stack in (experts.weights, experts.biases):
            for index, mine in enumerate(stack or ()):
                everyones = distributed.gather_pieces(mine.detach(), count, self.group)
                stack[index] = nn.Parameter(everyones, mine.requires_grad)  # type: ignore[index]
        return experts

    def combine(self, x_bd: Tensor, plan: SparsePlan) -> Tensor:
        """The weighted sum of the experts that the plan names, wherever they are: `[B, D]` → `[R, H]`, as `x_bd` in dtype."""
        (rows, k), workers = plan.expert_ids.shape, len(self._pieces)
        # Rows for each expert: what this worker sends, and what each worker sends here.
        sent_e = plan.offsets.diff()
        received_we = sent_e.new_empty(workers, self.held)
        counts = [p.stop - p.start for p in self._pieces]
        dist.all_to_all_single(received_we.view(-1), sent_e, [self.held] * workers, counts, group=self.group)
        sizes = [int(sent_e[p].sum()) for p in self._pieces], received_we.sum(1).tolist()

        order = plan.order[: plan.offsets[-1]].long()  # behind them lie the slots without an expert
        per_row = rows // len(x_bd) * k if len(x_bd) else 1
        arrived_nd: Tensor = _Exchange.apply(x_bd[order // per_row], *sizes, self.group)
        # What came is sorted by worker, then by expert.
        expert_n = torch.arange(self.held, dtype=torch.int32).repeat(workers).repeat_interleave(received_we.flatten())
        plan_here = sparse_plan(expert_n.unsqueeze(1), torch.ones(len(expert_n), 1), self.held, unit_norm=plan.unit_norm)
        made_nh: Tensor = self.experts.combine(arrived_nd, plan_here).to(x_bd.dtype)
        returned: Tensor = _Exchange.apply(made_nh, *sizes[::-1], self.group)

        slots = returned.new_zeros(rows * k, returned.shape[1], dtype=torch.float32).index_copy(0, order, returned.float())
        return (slots.view(rows, k, returned.shape[1]) * plan.weights.unsqueeze(2)).sum(1).to(x_bd.dtype)


def deal_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Deal the experts of each sparse layer (a module with `router` and `experts`) to the workers of the mesh's rows."""
    for module in list(model.modules()):
        if isinstance(experts := getattr(module, "experts", None), MLPExperts) and hasattr(module, "router"):
            module.experts = ExpertParallel(experts, mesh)


def collect_experts(model: nn.Module) -> None:
    """Undo `deal_experts`: every worker has all experts again, as they are now."""
    for module in list(model.modules()):
        if isinstance(dealt := getattr(module, "experts", None), ExpertParallel):
            module.experts = dealt.whole()


def held(model: nn.Module) -> dict[Rows, nn.Parameter]:
    """Every parameter, with the name that it has where nothing is dealt and the rows (experts) of it that this worker holds.

    >>> [rows.key for rows in held(nn.Linear(2, 3))]
    ['weight', 'bias']
    """
    dealt = {f"{name}.experts.": module for name, module in model.named_modules() if isinstance(module, ExpertParallel)}
    found = {}
    for name, parameter in model.named_parameters():
        rows = Rows(name, 0, len(parameter), len(parameter))
        for prefix, module in dealt.items():
            if name.startswith(prefix):
                plain = prefix.removesuffix("experts.") + name.removeprefix(prefix)
                rows = Rows(plain, module.mine.start, module.mine.stop, module._pieces[-1].stop)
        found[rows] = parameter
    return found


def gradient_norm(model: nn.Module) -> Tensor:
    """The length of the whole gradient, once `sum_gradients` has run: of dealt experts, wherever they are."""
    dealt = [module for module in model.modules() if isinstance(module, ExpertParallel)]
    own = {parameter for module in dealt for parameter in module.parameters()}
    gradients = [p.grad for p in model.parameters() if p.grad is not None and p not in own]
    square = nn.utils.get_total_norm(gradients).square()
    if dealt:
        elsewhere = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square()
        dist.all_reduce(elsewhere, group=dealt[0].group)
        square += elsewhere
    return square.sqrt()


def sum_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Replace the gradients by their sums over the workers' rows; returns the loss, summed likewise.

    Losses are the workers' shares of the whole batch's: divided by *its* number of tokens. (With each worker's own mean as
    its loss, divide by the number of workers: shared parameters then have the average.) The gradient of an expert has the
    rows of its mesh row already, they travelled to it, and is summed over its replicas only.
    """
    dealt = [module for module in model.modules() if isinstance(module, ExpertParallel)]
    own = {parameter for module in dealt for parameter in module.parameters()}
    for module in dealt:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad, group=module.replicas)
    return distributed.sum_gradients([p for p in model.parameters() if p.requires_grad and p not in own], loss)


class _Exchange(torch.autograd.Function):
    """Rows to the workers of a group, `sent[w]` to worker w; `received[w]` come from it. The gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.way = sent, received, group
        return exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.way
        return exchange(gradients[0], received, sent, group), None, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """`[Σ sent, D]` → `[Σ received, D]`: all-to-all of rows."""
    taken = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(taken, rows.contiguous(), received, sent, group=group)
    return taken
