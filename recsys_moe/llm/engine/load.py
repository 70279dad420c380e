"""How many tokens each expert was given, as sums over many requests.

Which experts a token chose tells its text (2602.04105), so no single request's choices leave the process: what is counted shows
only once it is of at least `RELEASE` tokens.
"""

from functools import partial

from torch import Tensor, nn

from recsys_moe.routing import PlanWatcher, SparsePlan

RELEASE = 8192


class ExpertLoad:
    """Counts the choices of every router in a model, from now on. Routers make sparse plans.

    `counts` has, by the router's name, int64 `[E]`: tokens for each expert.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        self._recent: dict[str, Tensor] = {}  # sums of offsets, whose differences are the experts' tokens
        self._tokens = 0
        for name, module in model.named_modules():
            if hasattr(module, "batch_invariant"):
                module.register_forward_hook(PlanWatcher(partial(self._count, name)))

    def ran(self, tokens: int) -> None:
        """A step of so many tokens is over."""
        self._tokens += tokens
        if self._tokens >= RELEASE:
            self.counts = {name: self.counts.get(name, 0) + recent.diff().long() for name, recent in self._recent.items()}
            self._recent, self._tokens = {}, 0

    def _count(self, name: str, plan: SparsePlan) -> None:
        if name in self._recent:
            self._recent[name] += plan.offsets
        else:
            self._recent[name] = plan.offsets.clone()
