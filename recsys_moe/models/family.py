"""What a ranker and a trainer ask of a family's network, and what they do where it has nothing of its own to say."""

from collections.abc import Mapping

from torch import Tensor, nn

from recsys_moe.experts import Towers
from recsys_moe.routing import PlanNames


class Family(nn.Module):
    """A network from the inputs of B rows to its towers' outputs `[B, Σ widths]` and the plans of its gates by name.

    The towers are `towers`, and what the plans' gates and experts are called is `plan_names`. The input is fp32 `[B, D]`, or
    `[B, S, D]` for a family of S > 1 embedding sets: each set has tables of its own, and the dense inputs are in all of them.
    """

    towers: Towers
    plan_names: dict[str, PlanNames]

    @staticmethod
    def embedding_sets(tasks: Mapping[str, int]) -> tuple[str, ...]:
        """The names of its embedding sets, of which "" is one for all tasks. Most families have that alone."""
        return ("",)

    def objective(self, outputs_bo: Tensor, losses_bt: Tensor, labels_bt: Tensor, weights_bt: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of each row and task and their weights, `[B, T]`, that training takes the mean of.

        `losses_bt` are those of the tasks' heads, `weights_bt` of the rows, 0 where a task is not observed. Most families are
        trained on these as they are.
        """
        return losses_bt, weights_bt
