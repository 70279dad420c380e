"""The models that a replica serves: loaded, tested, swapped.

Which ones, says a file that whoever watches the registry replaces as a whole:

    {"shop@champion": [{"version": "4", "folder": "/…/shop/4"}, {"version": "3", "folder": "/…/shop/3"}]}

The newest version comes first; one that does not load or fails its self-test is refused, and the one that is served stays (a
replica that has only just started takes the next one). The first name is that of requests which name none. A request takes
one `Model` and uses nothing else: a swap in its midst does not touch it.
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from recsys_moe.bundle import weights_digest
from recsys_moe.errors import UserError, nearest
from recsys_moe.predictor import Predictor
from recsys_moe.schema import Feature
from recsys_moe.selftest import check
from recsys_moe.serving.requests import to_column
from recsys_moe.transforms import Encoded
from recsys_moe.typed import parse, typed

log = logging.getLogger(__name__)

WARM_ROWS = (1, 200)
KEPT, KEPT_LENGTH = 20_000, 200
"""Single values whose encoding is kept, and how many characters one may have: what clients send must not fill memory."""


@typed
class Choice:
    """A version of a model and the folder of its bundle."""

    version: str
    folder: str


@dataclass(frozen=True, eq=False)  # one that is loaded again is another one
class Model:
    """A loaded bundle under the name that requests have for it; `digest` is its family and a digest of its weights."""

    name: str
    version: str
    digest: str
    predictor: Predictor

    def encode_one(self, name: str, value: Any, whose: str) -> Encoded:
        """What a single value of a feature becomes; `whose` it is, says a mistake. The latest short ones are kept.

        Raises:
            UserError: a value of the wrong kind.
        """
        if isinstance(value, int) or (isinstance(value, str) and len(value) <= KEPT_LENGTH):
            return self.kept(name, value, whose)
        if isinstance(value, float) and math.isfinite(value) and self._features[name].kind == "numeric":
            return self.predictor.bundle.transform.encode_number(name, value)
        return self._encode(name, value, whose)

    @cached_property
    def kept(self) -> Callable[[str, Any, str], Encoded]:
        """The same of texts and whole numbers, which it keeps."""
        return lru_cache(KEPT, typed=True)(self._encode)

    @cached_property
    def _features(self) -> dict[str, Feature]:
        return {feature.name: feature for feature in self.predictor.bundle.schema.features}

    @cached_property
    def _encode(self) -> Callable[[str, Any, str], Encoded]:
        transform, features = self.predictor.bundle.transform, self._features  # not self: a model that refers to itself stays

        def encode(name: str, value: Any, whose: str) -> Encoded:
            return transform.encode(name, pa.chunked_array([to_column([value], features[name], whose)]))

        return encode

    @property
    def described(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "digest": self.digest}


def load(name: str, choice: Choice) -> Model:
    """Load a bundle, test it and warm it up.

    Raises:
        UserError: it does not load, or fails its self-test.
    """
    folder = Path(choice.folder)
    predictor = Predictor(folder)
    digest = weights_digest(folder)
    check(predictor)
    columns = predictor.bundle.schema.feature_columns
    for rows in WARM_ROWS:
        predictor.score(pa.table({column: pa.nulls(rows) for column in columns}))
    return Model(name, choice.version, digest, predictor)


class Models:
    """All of them, by name.

    Args:
        served: the file that says which, or the folder of the one bundle.
        fits: raises UserError for a model that can't be used for a reason of the service's.

    Raises:
        UserError: of a name, no version is fit to be served; or the file can't be read.
    """

    def __init__(self, served: Path, fits: Callable[[Model], object]) -> None:
        self._served, self._fits = served, fits
        self._text = ""
        self._models: Mapping[str, Model] = {}
        self.refused: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self.refresh()
        for name, reasons in self.refused.items():
            if name not in self._models:
                raise UserError(next(iter(reasons.values())))

    def find(self, name: str | None) -> Model:
        """The model of that name now; the first one, if there is none.

        Raises:
            UserError: no such model.
        """
        models = self._models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise UserError(f"model {name!r} is not served here; {nearest(name, models)}")
        return models[name]

    def all(self) -> list[Model]:
        return list(self._models.values())

    def refresh(self) -> None:
        """Look at the file and load what it names anew; what can't be used is refused, and told once."""
        with self._lock:
            text = "" if self._served.is_dir() else self._served.read_text()
            if text == self._text and self._models:
                return
            choices = self._choices()
            current, refused = dict(self._models), dict[str, dict[str, str]]()
            for name, versions in choices.items():
                found, refused[name] = self._first_fit(name, versions)
                if found:
                    current[name] = found
            # In the file's order; in one assignment, so that no request sees half of it.
            self._models = {name: current[name] for name in choices if name in current}
            self.refused = {name: reasons for name, reasons in refused.items() if reasons}
            self._text = text

    def _choices(self) -> dict[str, tuple[Choice, ...]]:
        if self._served.is_dir():
            return {self._served.name: (Choice("local", str(self._served)),)}
        found: dict[str, tuple[Choice, ...]] = parse(
            dict[str, tuple[Choice, ...]], json.loads(self._served.read_text()), str(self._served)
        )
        return found

    def _first_fit(self, name: str, versions: tuple[Choice, ...]) -> tuple[Model | None, dict[str, str]]:
        """The newest version that can be served, and why those before it can't."""
        served, reasons = self._models.get(name), dict[str, str]()
        for choice in versions:
            if served and choice.version == served.version:
                return served, reasons
            try:
                model = load(name, choice)
                self._fits(model)
            except Exception as error:  # of a library's own as well: it must not hold up the other names
                told = isinstance(error, UserError)
                reason = str(error) if told else f"{choice.folder!r} can't be served ({type(error).__name__}: {error})"
                reasons[choice.version] = reason
                log.error("version %s of %s is refused: %s", choice.version, name, reason, exc_info=not told)
                if served:
                    return served, reasons
                continue
            log.info("version %s of %s is served", choice.version, name)
            return model, reasons
        return None, reasons
