"""Going on with a trained model on new rows: what must fit, and how its weights are taken over.

A vocabulary only grows at its end (`recsys_moe.transforms.extend`), so the model's tables are the first rows of the new ones.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from recsys_moe.bundle import ADAGRAD_FILE, read_description
from recsys_moe.errors import UserError
from recsys_moe.ranker import Ranker
from recsys_moe.schema import Schema
from recsys_moe.tensorfiles import Rows, TensorFiles
from recsys_moe.transforms import UNKNOWN
from recsys_moe.typed import dump


class StartBundle:
    """A bundle that training starts from.

    Raises:
        UserError: it is no bundle, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.schema, self.statistics = read_description(folder)
        self.digest = hashlib.sha256(json.dumps(dump(self.statistics), sort_keys=True).encode()).hexdigest()

    @property
    def has_adagrad(self) -> bool:
        """Whether the bundle holds its tables' Adagrad sums: one without tables, or of an older version, does not."""
        return (self.folder / ADAGRAD_FILE).exists()

    def check_schema(self, schema: Schema) -> None:
        """Raises UserError: `schema` is not the bundle's; names the first difference."""
        _check_equal(
            dump(self.schema), dump(schema), "schema", "prepare the rows with the schema that the model was trained with"
        )

    def check_model(self, config: Any, precision: str) -> None:
        """Raises UserError: `config`, a family's configuration, or its precision is not the bundle's; names the difference."""
        _check_equal(dump(self.config.model), dump(config), "model", "give the model the same settings, or train anew")
        was = self.config.precision
        _check_equal(was, precision, "train.precision", f"set train.precision={was}, or train anew")

    def take_over(self, model: Ranker) -> None:
        """Give a fresh `model` of the same configuration the bundle's weights and, if it `has_adagrad`, its Adagrad sums.

        Rows that the bundle's tables lack keep what they were drawn with, and sums of 0.

        Raises:
            UserError: the bundle's files are damaged or do not fit.
        """
        _copy(self.folder / "model.safetensors", dict(model.state_dict()))
        if self.has_adagrad:
            _copy(self.folder / ADAGRAD_FILE, model.adagrad())

    @contextmanager
    def new_ids_unknown(self, model: Ranker) -> Iterator[None]:
        """Let new ids read the unknown one's embedding within the block: the bundle's own model knows no better."""
        tables = [(key, table) for key, table in model.state_dict().items() if is_table(key)]
        files = TensorFiles([self.folder / "model.safetensors"])
        grown = []
        for key, table in tables:
            place = Rows.of(key, len(table))
            unknown = torch.empty_like(table[:1])
            files.read_into(Rows(place.name, UNKNOWN, UNKNOWN + 1, files.shape(place.name)[0]).key, unknown)
            new = table[max(0, files.shape(place.name)[0] - place.low) :]
            grown.append((new, unknown, new.clone()))
        with torch.no_grad():
            for new, unknown, _ in grown:
                new[:] = unknown
            try:
                yield
            finally:
                for new, _, drawn in grown:
                    new[:] = drawn


def _copy(path: Path, targets: dict[str, Tensor]) -> None:
    """Fill the tensors of these names, tables from their first row on."""
    try:
        files = TensorFiles([path])
        with torch.no_grad():
            for key, target in targets.items():
                try:
                    files.read_into(key, target, grown=is_table(key))
                except RuntimeError as error:
                    raise UserError(f"{error} ({str(path)!r}); start from a model of the same settings") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error}); fetch or train the bundle again") from None


def is_table(name: str) -> bool:
    """Whether a tensor of that name in a ranker's state is an embedding table or its Adagrad sums."""
    return name.removeprefix("first_order.").startswith(("embeddings.", "pooled.", "attended."))


def _check_equal(before: Any, now: Any, where: str, remedy: str) -> None:
    if (difference := _first_difference(before, now, where)) is not None:
        path, was, is_now = difference
        raise UserError(f"{path} is {is_now}, but the model to start from has {was}; {remedy}")


_ABSENT = "nothing"


def _first_difference(before: Any, now: Any, path: str) -> tuple[str, str, str] | None:
    """Where two plain values differ first, and the two values there; lists of named things are compared by name."""
    if isinstance(before, list) and isinstance(now, list):
        names, now_names = _names(before), _names(now)
        if names != now_names:
            shared = zip(names, now_names, strict=False)
            first = next((n for n, (a, b) in enumerate(shared) if a != b), min(len(names), len(now_names)))
            return path, _some(names, first), _some(now_names, first)
        before, now = dict(zip(names, before, strict=True)), dict(zip(names, now, strict=True))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if found := _first_difference(before.get(key, _ABSENT), now.get(key, _ABSENT), f"{path}.{key}"):
                return found
        return None
    return None if before == now else (path, repr(before), repr(now))


def _some(names: list[str], first: int) -> str:
    """A list's names from about the first that differs on: of a hundred features, nobody reads more."""
    low, high = max(0, first - 3), first + 6
    shown = ["…"] * (low > 0) + [repr(name) for name in names[low:high]] + ["…"] * (high < len(names))
    return f"[{', '.join(shown)}]"


def _names(items: list[Any]) -> list[str]:
    return [item["name"] if isinstance(item, dict) and "name" in item else str(n) for n, item in enumerate(items)]
