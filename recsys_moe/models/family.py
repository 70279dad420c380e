"""What a ranker and a trainer ask of a family's network, and what they do where it has nothing of its own to say."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from recsys_moe.errors import UserError, nearest
from recsys_moe.experts import Towers
from recsys_moe.routing import PlanNames
from recsys_moe.schema import BinaryTask, Schema


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


def binary_place(name: str, tasks: Mapping[str, int], key: str) -> tuple[int, int]:
    """The place of a task that `key` names among the tasks, and that of its one output among all outputs.

    Raises:
        UserError: there is no such task, or it has not one output, as a binary one does.

    >>> binary_place("buy", {"click": 1, "ending": 3, "buy": 1}, "model.chain")
    (2, 4)
    """
    if name not in tasks:
        raise UserError(f"{key} names the task {name!r}, which the schema does not have; {nearest(name, tasks)}")
    if tasks[name] != 1:
        raise UserError(f"{key} names the task {name!r}, which has {tasks[name]} outputs; name binary tasks only")
    place = list(tasks).index(name)
    return place, sum(list(tasks.values())[:place])


def check_binary(names: Iterable[str], schema: Schema, key: str) -> None:
    """Raises UserError: a task of the schema that `key` names is not binary. Names that it lacks are not looked at."""
    tasks = {task.name: task for task in schema.tasks}
    for name in names:
        if name in tasks and not isinstance(tasks[name], BinaryTask):
            raise UserError(f"{key} names the task {name!r}, which is of kind {tasks[name].kind}; name binary tasks only")


def same_rows(mask: str | None, label: str) -> bool:
    """Whether a mask selects the rows in which a label is true, going by their texts.

    >>> same_rows("click  == 1", "click == 1"), same_rows(None, "click == 1")
    (True, False)
    """
    return mask is not None and mask.split() == label.split()
