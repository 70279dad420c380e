"""How many tokens each expert was given, as sums over many requests.

Which experts a token chose tells its text (2602.04105), so no single request's choices leave the process: what is counted shows
only once it is of at least `RELEASE` tokens.
"""

import weakref
from functools import partial

from torch import Tensor, nn

from recsys_moe.routing import PlanWatcher, SparsePlan

RELEASE = 8192


class ExpertLoad:
    """Counts the choices of every router in a model, from now on until nobody holds this. Routers make sparse plans.

    `counts` has, by the router's name, int64 `[E]`: tokens for each expert.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        self._recent: dict[str, Tensor] = {}  # sums of offsets, whose differences are the experts' tokens
        self._tokens = 0
        for name, module in model.named_modules():
            if hasattr(module, "batch_invariant"):
                # The hook knows the sums alone: a model that outlives its engines must not go on calling all their hooks.
                hook = module.register_forward_hook(PlanWatcher(partial(_count, self._recent, name)))
                weakref.finalize(self, hook.remove)

    def ran(self, tokens: int) -> None:
        """A step of so many tokens is over."""
        self._tokens += tokens
        if self._tokens >= RELEASE:
            self.counts = {name: self.counts.get(name, 0) + recent.diff().long() for name, recent in self._recent.items()}
            self._recent.clear()
            self._tokens = 0


def _count(sums: dict[str, Tensor], name: str, plan: SparsePlan) -> None:
    if name in sums:
        sums[name] += plan.offsets
    else:
        sums[name] = plan.offsets.clone()
