"""The peer's HoME in plain modules, as MLflow's own scoring server loads it from code: another peer of bench_serve.py.

Rows of 15 ids, numbers already, and 32 fractions: the module's own tables make them 512 inputs.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch

from recsys_moe.bench import load_peer

IDS, DIM, ROWS = 15, 32, 1000


class Modules(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Rows in, a column for each task out; eager, fp32, as it would be written."""

    def load_context(self, context: Any) -> None:
        torch.set_num_threads(1)
        self.tables = [torch.nn.Embedding(1_000_000 if i == 0 else ROWS, DIM) for i in range(IDS)]
        self.network = load_peer(Path(context.artifacts["peers"]), "experts_peers").HoME().eval()

    @torch.inference_mode()
    def predict(self, context: Any, model_input: Any, params: Any = None) -> pd.DataFrame:
        values = torch.from_numpy(model_input.to_numpy("float32"))
        found = [table(values[:, i].long()) for i, table in enumerate(self.tables)]
        scores = self.network(torch.cat([*found, values[:, IDS:]], 1)).sigmoid()
        return pd.DataFrame(scores.numpy())


mlflow.models.set_model(Modules())
