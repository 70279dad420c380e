"""The binary form of a ranking request and its answer: an Arrow IPC stream instead of JSON, for many candidates.

Request: a table of candidates with column `id` and a column for each feature of an item; the rest of the request is JSON in
the schema's metadata under `rank`. Answer: a table in ranking order with `id`, `position`, `fused` and `score.NAME`, the rest
as JSON under `rank`. Ids are int64 or uint64 where one of them holds all, else text.

A few bytes of a stream may stand for gigabytes where buffers are compressed, dictionaries or views repeat a value, or a type
nests deeply. Such streams are refused: what is taken is never larger in memory than as it was sent.
"""

import struct
from typing import Any

import pyarrow as pa
from pydantic_core import to_json

from recsys_moe.errors import UserError
from recsys_moe.serving.requests import Items, RankHead, parse_json

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
METADATA = b"rank"


def parse_rank(body: bytes) -> tuple[RankHead, Items]:
    """The request in an Arrow IPC stream.

    Raises:
        UserError: no such stream, one of what is refused, or not a request; names the column or field.
    """
    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(body) as reader:
            _check_types(reader.schema)
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"the body is no whole Arrow IPC stream ({reason}); send what pyarrow.ipc.new_stream writes") from None
    head = parse_json(RankHead, (table.schema.metadata or {}).get(METADATA, b"{}"))
    if "id" not in table.column_names or table["id"].null_count or not table.num_rows:
        raise UserError("the Arrow table has no column 'id' with an id in each of its rows; add it")
    if len(set(table.column_names)) < table.num_columns:
        raise UserError("the Arrow table has two columns of one name; send each once")
    if not (pa.types.is_integer(table["id"].type) or _is_text(table["id"].type)):
        raise UserError(f"the Arrow table's column 'id' is {table['id'].type}; send whole numbers or text")
    features = {name: table[name] for name in table.column_names if name != "id"}
    return head, Items(table["id"].to_pylist(), features)


def answer(result: dict[str, Any]) -> bytes:
    """An answer to a ranking request as an Arrow IPC stream."""
    columns = {
        "id": _ids(result["ranking"]),
        "position": pa.array(result["positions"], pa.int32()),
        "fused": pa.array(result["fused"], pa.float64()),
        **{f"score.{name}": pa.array(scores, pa.float32()) for name, scores in result["scores"].items()},
    }
    rest = {key: value for key, value in result.items() if key not in ("ranking", "positions", "fused", "scores")}
    table = pa.table(columns).replace_schema_metadata({METADATA: to_json(rest)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _ids(ids: list[Any]) -> pa.Array:
    for kind in (pa.int64(), pa.uint64()):
        try:
            return pa.array(ids, kind)
        except (pa.ArrowException, OverflowError):
            continue
    return pa.array(map(str, ids), pa.string())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _check_types(schema: pa.Schema) -> None:
    for field in schema:
        kind = field.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if not (plain or _is_text(kind)):
            raise UserError(
                f"the Arrow table's column {field.name!r} is {field.type}; send numbers, text, booleans or lists of them"
            )


def _refuse_compressed(body: bytes) -> None:
    """Look into the stream's messages (Message.fbs of the Arrow format) for a record batch with a `compression`."""
    reader = pa.ipc.MessageReader.open_stream(body)
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        if message.type == "record batch" and _has_compression(message.metadata.to_pybytes()):
            raise UserError("the Arrow stream has compressed buffers; write it without, and pack the body with gzip or zstd")


_HEADER, _COMPRESSION = 2, 3
"""The places of `Message.header` and `RecordBatch.compression` among the fields of their flatbuffer tables."""


def _has_compression(message: bytes) -> bool:
    (root,) = struct.unpack_from("<I", message)
    header = _field(message, root, _HEADER)
    if header is None:
        return False
    (offset,) = struct.unpack_from("<I", message, header)
    return _field(message, header + offset, _COMPRESSION) is not None


def _field(message: bytes, table: int, number: int) -> int | None:
    """Where a table's field is; None if it is not set."""
    (back,) = struct.unpack_from("<i", message, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", message, vtable)
    place = 4 + 2 * number
    if place >= size:
        return None
    (offset,) = struct.unpack_from("<H", message, vtable + place)
    return table + offset if offset else None
