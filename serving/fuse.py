"""One number from the scores of several tasks.

With scores p_t, weights w_t and powers a_t of the tasks t that the formula names, in float64:

    sum      f = Σ_t w_t · p_t^{a_t}
    product  f = Π_t w_t · p_t^{a_t}        (weights scale it; the order is the powers')

A score below 1e-12 counts as 1e-12 where its power is negative, so that f is finite.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from recsys_moe.errors import UserError, nearest
from recsys_moe.serving.config import FormulaConfig

Floats = npt.NDArray[np.float64]

_LEAST = 1e-12


class Formula:
    """A formula for the scores that a model has.

    >>> formula = Formula(FormulaConfig("product", {"click": 1.0, "buy": 2.0}, {"buy": 0.5}), ("click", "buy", "like"))
    >>> formula(np.array([[0.5], [0.25], [0.9]], np.float32)).tolist()
    [0.5]

    Raises:
        UserError: it names a score that the model has not.
    """

    def __init__(self, config: FormulaConfig, score_names: Sequence[str]) -> None:
        for name in (*config.weights, *config.powers):
            if name not in score_names:
                raise UserError(f"the formula names {name!r}, which the model does not score; {nearest(name, score_names)}")
        self.names = tuple(name for name in score_names if name in config.weights or not config.weights)
        self._rows = [score_names.index(name) for name in self.names]
        self._weights = [config.weights.get(name, 1.0) for name in self.names]
        self._powers = [config.powers.get(name, 1.0) for name in self.names]
        self._product = config.form == "product"

    def __call__(self, scores_sn: npt.NDArray[np.float32]) -> Floats:
        """The fused score of each row `[N]`.

        Raises:
            UserError: a score below zero under a power that is no whole number, or a sum beyond float64.
        """
        with np.errstate(all="ignore"):
            terms = [w * _power(scores_sn[row], a) for row, w, a in zip(self._rows, self._weights, self._powers, strict=True)]
            fused: Floats = np.multiply.reduce(terms) if self._product else np.add.reduce(terms)
        if not np.isfinite(fused).all():
            worst = next((n for n, term in zip(self.names, terms, strict=True) if not np.isfinite(term).all()), self.names[0])
            raise UserError(f"the formula gives no finite number for {worst!r}; choose another power or weight for it")
        return fused


def _power(p: npt.NDArray[np.float32], a: float) -> Floats:
    x = p.astype(np.float64)
    if a == 1:
        return x
    result: Floats = np.where(np.abs(x) < _LEAST, _LEAST, x) ** a if a < 0 else x**a
    return result
