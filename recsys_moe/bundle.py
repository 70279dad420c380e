"""The bundle: the one thing that crosses from training to serving.

    config.json         model family and widths, precision, what it was trained on
    schema.json         features and tasks
    statistics.json     vocabularies and moments of the feature transforms and of the tasks' labels
    model.safetensors   the weights
    metrics.json        how it did on the validation part, which chose the epoch, and on the test part
    selftest.arrow      some raw rows with their scores, for whoever serves it (optional; see recsys_moe.selftest)
    adagrad.safetensors the sums of squares of the tables' optimizer, for whoever goes on training; scoring does without

No pickle: loading a bundle runs no code from it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from recsys_moe.distributed import rank
from recsys_moe.errors import UserError
from recsys_moe.heads import Heads
from recsys_moe.models import ModelConfig
from recsys_moe.ranker import Ranker
from recsys_moe.schema import Schema
from recsys_moe.shards import write_json
from recsys_moe.sources import DataConfig
from recsys_moe.tensorfiles import Chunked, save_tensors
from recsys_moe.transforms import Statistics, Transform
from recsys_moe.typed import dump, parse, typed

FORMAT = 2
ADAGRAD_FILE = "adagrad.safetensors"
SELFTEST_FILE = "selftest.arrow"
FILES = ("config.json", "schema.json", "statistics.json", "model.safetensors", "metrics.json")


@typed
class BundleConfig:
    """What rebuilds the model, and where it comes from. `start` digests the statistics that its own extend, if any."""

    format: int
    model: ModelConfig
    precision: Literal["fp32", "bf16"]
    data: DataConfig
    data_digest: str
    start: str | None = None


def read_description(folder: Path) -> tuple[BundleConfig, Schema, Statistics]:
    """What a bundle's folder says of itself, without its weights.

    Raises:
        UserError: it is no bundle, of another format, or damaged.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} is not a bundle: it has no {name}; name the folder that training printed")
    config: BundleConfig = parse(BundleConfig, _read(folder / "config.json"), str(folder / "config.json"))
    if config.format != FORMAT:
        raise UserError(f"{str(folder)!r} has bundle format {config.format}, not {FORMAT}; train it again")
    schema = parse(Schema, _read(folder / "schema.json"), str(folder / "schema.json"))
    return config, schema, parse(Statistics, _read(folder / "statistics.json"), str(folder / "statistics.json"))


class Bundle:
    """A loaded bundle: configuration, transforms, heads, metrics and the model in evaluation mode.

    Raises:
        UserError: a file that is missing, cut short or does not fit the others; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, schema, statistics = read_description(folder)
        self.metrics: dict[str, Any] = _read(folder / "metrics.json")
        try:
            self.transform = Transform(schema, statistics)
        except UserError as error:
            raise UserError(f"{str(folder)!r} does not fit together: {error}") from None
        t = self.transform
        self.heads = Heads(schema, statistics)
        self.model = Ranker(
            self.config.model,
            t.sparse_names,
            t.cardinalities,
            len(t.dense_names),
            self.heads.widths,
            self.config.precision,
            t.lists,
            own_rows=t.own_rows,
        )
        path = folder / "model.safetensors"
        try:
            self.model.load_state_dict(safetensors.torch.load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{str(path)!r} is damaged ({error}); fetch or train the bundle again") from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{str(path)!r} does not fit config.json ({reason}); fetch the whole bundle again") from None
        self.model.eval()

    @property
    def schema(self) -> Schema:
        return self.transform.schema


def weights_digest(folder: Path) -> str:
    """A bundle's family and a digest of its weights, as `home:0a1b2c3d4e5f`."""
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return f"{read_description(folder)[0].model.name}:{digest}"


def save_bundle(
    folder: Path,
    weights: Mapping[str, Tensor | Chunked],
    config: BundleConfig,
    transform: Transform,
    metrics: dict[str, Any],
    adagrad: Mapping[str, Tensor | Chunked] | None = None,
) -> None:
    """Write a bundle, a model's `state_dict` in it, under a temporary name, then move it into place.

    All workers call it together: the first writes, the others send it what they have of the tables.
    """
    adagrad = adagrad or {}
    if rank():
        save_tensors(None, weights)
        save_tensors(None, adagrad)
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / "config.json", dump(config))
    write_json(temporary / "schema.json", dump(transform.schema))
    write_json(temporary / "statistics.json", dump(transform.statistics))
    write_json(temporary / "metrics.json", metrics)
    save_tensors(temporary / "model.safetensors", weights)
    if adagrad:
        save_tensors(temporary / ADAGRAD_FILE, adagrad)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not whole ({error}); fetch or train the bundle again") from None
