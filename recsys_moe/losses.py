"""The multi-task loss."""

from torch import Tensor


def task_losses(losses_bt: Tensor, weights_bt: Tensor, task_weights_t: Tensor, totals_t: Tensor | None = None) -> Tensor:
    """ω_t · L_t `[T]` with L_t = Σ_b w_bt·l_bt / Σ_b w_bt, the mean loss over each task's own rows (PLE, eq. 7).

    A task without rows in the batch has 0. All fp32 `[B, T]`, `task_weights_t` `[T]`; l_bt as the family's objective has it.
    `totals_t` is Σ_b w_bt over the whole batch where this is a piece of it: the pieces' losses then add up to the batch's.
    """
    totals_t = weights_bt.sum(0) if totals_t is None else totals_t
    return (losses_bt * weights_bt).sum(0) / totals_t.clamp_min(1e-12) * task_weights_t
