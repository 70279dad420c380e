"""The Open Inference Protocol, version 2, with its binary tensor extension: a model's features are tensors, its scores are too.

A feature is a tensor of N rows, `[N]` or `[N, 1]`; an embedding is `[N, dim]`; a feature of many values has each row's as the
text of a JSON list. Tensors know no null: a number is missing as NaN, a category as an empty text, lists and vectors as `[]`
and never. Each score is an FP32 tensor `[N]`.

https://github.com/kserve/open-inference-protocol, https://github.com/triton-inference-server/server (extension_binary_data).
"""

import json
import math
import re
import struct
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from recsys_moe.errors import UserError, nearest
from recsys_moe.schema import Cross, Embedding, Multi, Numeric, Sequence
from recsys_moe.schema import Feature as AnyFeature
from recsys_moe.serving.models import Model
from recsys_moe.serving.requests import parse_json, to_column

HEADER_LENGTH = "inference-header-content-length"

NUMBERS = {
    **{f"INT{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"UINT{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    **{f"FP{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    "BOOL": np.dtype("?"),
}


class Parameters(BaseModel):
    """Of a tensor or a request: how much of the binary part is its, or whether its scores are wanted there."""

    model_config = ConfigDict(extra="allow")
    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    binary_data: bool | None = None
    binary_data_output: bool = False


class InputTensor(BaseModel):
    """A feature's values: in `data`, flat or nested, or in the body's binary part."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=2)]
    datatype: str
    parameters: Parameters = Parameters()
    data: list[Any] | None = None


class OutputTensor(BaseModel):
    """A score that is wanted."""

    name: str
    parameters: Parameters = Parameters()


class InferRequest(BaseModel):
    """A tensor for each feature; without `outputs` all scores are wanted."""

    id: Annotated[str, Field(max_length=200)] | None = None
    parameters: Parameters = Parameters()
    inputs: Annotated[list[InputTensor], Field(min_length=1)]
    outputs: list[OutputTensor] | None = None


@dataclass
class Infer:
    """A request that was read: its columns, and how its answer is written."""

    request: InferRequest
    rows: int
    values: dict[str, npt.NDArray[Any] | list[Any]] = field(default_factory=dict)

    def table(self, model: Model) -> pa.Table:
        """The tensors as the model's feature columns.

        Raises:
            UserError: a feature without a tensor, or a value of the wrong kind.
        """
        columns = {}
        for feature in model.predictor.bundle.schema.features:
            if isinstance(feature, Cross):
                continue
            if feature.name not in self.values:
                close = nearest(feature.name, self.values)
                raise UserError(f"inputs has no tensor {feature.name!r}, which model {model.name!r} reads ({close}); add it")
            columns[feature.name] = _column(self.values[feature.name], feature)
        return pa.table(columns)

    def write(self, model: Model, scores_sn: npt.NDArray[np.float32]) -> tuple[bytes, int | None]:
        """The answer's body, and where its JSON ends if something follows.

        Raises:
            UserError: an output that the model has not.
        """
        names = list(model.predictor.score_names)
        wanted = self.request.outputs or [OutputTensor(name=name) for name in names]
        outputs, binary, written = [], b"", set[str]()
        for output in wanted:
            if output.name in written:
                raise UserError(f"outputs names {output.name!r} twice; send it once")
            written.add(output.name)
            if output.name not in names:
                raise UserError(
                    f"outputs names {output.name!r}, which model {model.name!r} lacks; {nearest(output.name, names)}"
                )
            scores = np.ascontiguousarray(scores_sn[names.index(output.name)], "<f4")
            told: dict[str, Any] = {"name": output.name, "shape": [self.rows], "datatype": "FP32"}
            as_binary = output.parameters.binary_data
            if self.request.parameters.binary_data_output if as_binary is None else as_binary:
                told["parameters"] = {"binary_data_size": scores.nbytes}
                binary += scores.tobytes()
            else:
                told["data"] = scores.tolist()
            outputs.append(told)
        answer = {"model_name": model.name, "model_version": model.version, "outputs": outputs}
        head = json.dumps(answer | ({} if self.request.id is None else {"id": self.request.id})).encode()
        return head + binary, len(head) if binary else None


def parse_infer(body: bytes, header_length: str | None) -> Infer:
    """The request in a body, of which `header_length` bytes are JSON (None: all).

    Raises:
        UserError: not a request, or tensors that are not as their shapes say; names the tensor.
    """
    if header_length is not None and not (re.fullmatch("[0-9]{1,18}", header_length) and int(header_length) <= len(body)):
        raise UserError(f"Inference-Header-Content-Length is {header_length[:40]!r}; send how many bytes of the body are JSON")
    end = len(body) if header_length is None else int(header_length)
    request, rest = parse_json(InferRequest, body[:end]), body[end:]
    found = Infer(request, request.inputs[0].shape[0])
    for tensor in request.inputs:
        size = tensor.parameters.binary_data_size
        if tensor.shape[0] != found.rows:
            raise UserError(
                f"tensor {tensor.name!r} has {tensor.shape[0]:,} rows and {request.inputs[0].name!r} {found.rows:,}; send as "
                "many for each"
            )
        if tensor.name in found.values:
            raise UserError(f"inputs has tensor {tensor.name!r} twice; send it once")
        if size is None:
            found.values[tensor.name] = _plain(tensor)
            continue
        if size > len(rest):
            raise UserError(f"tensor {tensor.name!r} has {size:,} bytes, of which {len(rest):,} are there; send all of them")
        found.values[tensor.name], rest = _binary(tensor, rest[:size]), rest[size:]
    if rest:
        raise UserError(f"{len(rest):,} bytes of the body belong to no tensor; set their binary_data_size")
    return found


def metadata(model: Model) -> dict[str, Any]:
    """What the model reads and what it answers."""
    bundle = model.predictor.bundle
    inputs = [
        {"name": f.name, "datatype": "FP64" if isinstance(f, Numeric) else "FP32", "shape": [-1]}
        if isinstance(f, Numeric)
        else {"name": f.name, "datatype": "FP32", "shape": [-1, f.dim]}
        if isinstance(f, Embedding)
        else {"name": f.name, "datatype": "BYTES", "shape": [-1]}
        for f in bundle.schema.features
        if not isinstance(f, Cross)
    ]
    outputs = [{"name": name, "datatype": "FP32", "shape": [-1]} for name in model.predictor.score_names]
    about = {"name": model.name, "versions": [model.version], "platform": f"recsys_moe {bundle.config.model.name}"}
    return about | {"inputs": inputs, "outputs": outputs}


def _column(values: npt.NDArray[Any] | list[Any], feature: AnyFeature) -> pa.Array:
    whose = f"row {{}} of tensor {feature.name!r}"
    if isinstance(feature, Embedding):
        rows = values if isinstance(values, list) else values.tolist()
        return to_column([row if isinstance(row, list) else [row] for row in rows], feature, whose)
    flat = _flat(values, feature.name)
    if isinstance(feature, Multi | Sequence):
        return to_column([_listed(text, feature.name) for text in flat], feature, whose)
    if isinstance(feature, Numeric):
        flat = [None if isinstance(value, float) and math.isnan(value) else value for value in flat]
    return to_column(flat, feature, whose)


def _flat(values: npt.NDArray[Any] | list[Any], name: str) -> list[Any]:
    rows = values if isinstance(values, list) else values.tolist()
    if rows and isinstance(rows[0], list):
        if any(len(row) != 1 for row in rows):
            raise UserError(f"tensor {name!r} has {len(rows[0])} values a row, but the feature has one; send [N] or [N, 1]")
        return [row[0] for row in rows]
    return rows


def _listed(text: Any, name: str) -> list[Any] | None:
    try:
        found = json.loads(text) if text else None
    except (TypeError, ValueError, RecursionError):
        found = text
    if found is not None and not isinstance(found, list):
        raise UserError(f"tensor {name!r} holds {str(text)[:40]!r}, which is not the text of a JSON list; send one, as '[]'")
    return found


def _plain(tensor: InputTensor) -> list[Any]:
    """The rows of a tensor's `data`, flat or nested."""
    rows, *rest = tensor.shape
    data = tensor.data
    if data is None:
        raise UserError(f"tensor {tensor.name!r} has neither data nor a binary_data_size; send one of them")
    if tensor.datatype not in (*NUMBERS, "BYTES"):
        raise _unknown(tensor)
    width = rest[0] if rest else 1
    if rest and len(data) == rows and all(isinstance(row, list) and len(row) == width for row in data):
        return data
    if len(data) != rows * width or any(isinstance(value, list | dict) for value in data):
        raise UserError(f"tensor {tensor.name!r} has {len(data):,} values where its shape {tensor.shape} says otherwise")
    return [data[i : i + width] for i in range(0, len(data), width)] if rest else data


def _binary(tensor: InputTensor, raw: bytes) -> npt.NDArray[Any] | list[Any]:
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        texts = _texts(tensor.name, raw)
        if len(texts) != count:
            raise UserError(f"tensor {tensor.name!r} has {len(texts):,} texts where its shape {tensor.shape} says {count:,}")
        width = tensor.shape[1] if len(tensor.shape) == 2 else 0
        return [texts[i : i + width] for i in range(0, count, width)] if width else texts
    if tensor.datatype not in NUMBERS:
        raise _unknown(tensor)
    kind = NUMBERS[tensor.datatype]
    if len(raw) != count * kind.itemsize:
        raise UserError(f"tensor {tensor.name!r} has {len(raw):,} bytes where its shape says {count * kind.itemsize:,}")
    return np.frombuffer(raw, kind).reshape(tensor.shape)


def _texts(name: str, raw: bytes) -> list[str]:
    """Texts, each behind its length in bytes."""
    found, place = [], 0
    try:
        while place < len(raw):
            (length,) = struct.unpack_from("<I", raw, place)
            end = place + 4 + length
            if end > len(raw):
                raise ValueError("cut short")
            found.append(raw[place + 4 : end].decode())
            place = end
    except (struct.error, ValueError) as error:
        raise UserError(
            f"tensor {name!r} is not BYTES ({str(error)[:80]}); send a length of 4 bytes before each UTF-8 text"
        ) from None
    return found


def _unknown(tensor: InputTensor) -> UserError:
    return UserError(f"tensor {tensor.name!r} is {tensor.datatype[:40]!r}; send one of BYTES, {', '.join(NUMBERS)}")
