"""A bundle as MLflow's own scoring server loads it, from code: the peer of bench_serve.py."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import torch

from recsys_moe.predictor import Predictor


class Bundled(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Rows in, a column for each score out."""

    def load_context(self, context: Any) -> None:
        torch.set_num_threads(1)
        self.predictor = Predictor(Path(context.artifacts["bundle"]))

    def predict(self, context: Any, model_input: Any, params: Any = None) -> pd.DataFrame:
        scores = self.predictor.score(pa.Table.from_pandas(model_input, preserve_index=False))
        return pd.DataFrame(dict(zip(self.predictor.score_names, scores, strict=True)))


mlflow.models.set_model(Bundled())
