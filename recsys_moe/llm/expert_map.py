"""Which tokens and which positions each expert takes.

Shapes: L layers with experts, E experts, V tokens of the vocabulary, T positions.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from recsys_moe.llm.layers import Decoder
from recsys_moe.llm.text import Windows
from recsys_moe.llm.trainer import plans_of

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """How often each expert was chosen.

    Fields:
        layers: the numbers of the layers.
        by_token: int64 `[L, E, V]`, for each token of the text.
        by_position: int64 `[L, E, T]`, for each place in a window.
    """

    layers: tuple[int, ...]
    by_token: Counts
    by_position: Counts


@torch.no_grad()
def expert_map(model: Decoder, windows: Windows, batch_size: int = 32) -> ExpertMap:
    """Count over every window, in evaluation mode, as serving routes. The model needs a layer with experts."""
    was_training = model.training
    model.eval()
    found: dict[int, tuple[Counts, Counts]] = {}
    for first in range(0, len(windows), batch_size):
        tokens = torch.from_numpy(windows.ordered(first, min(first + batch_size, len(windows)))[:, :-1])
        with plans_of(model) as plans:
            model.score(tokens)
        positions = np.tile(np.arange(tokens.shape[1]), len(tokens))
        for layer, plan in plans.items():
            if layer not in found:
                shapes = ((plan.num_experts, size) for size in (model.config.vocab_size, tokens.shape[1]))
                by_token, by_position = (np.zeros(shape, np.int64) for shape in shapes)
                found[layer] = by_token, by_position
            rows, slots = np.nonzero(plan.expert_ids.numpy() >= 0)
            experts = plan.expert_ids.numpy()[rows, slots]
            np.add.at(found[layer][0], (experts, tokens.numpy().ravel()[rows]), 1)
            np.add.at(found[layer][1], (experts, positions[rows]), 1)
    model.train(was_training)
    by_token, by_position = (np.stack([counts[i] for counts in found.values()]) for i in (0, 1))
    return ExpertMap(tuple(found), by_token, by_position)
