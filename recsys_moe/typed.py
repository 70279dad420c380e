"""Frozen, validated dataclasses: the shape of every configuration, schema and manifest.

`@typed` makes a frozen pydantic dataclass that refuses unknown keys and values of the wrong type, however it is built.
`parse` builds one from plain data (what YAML and JSON give) and turns the first complaint into one sentence.
"""

import dataclasses
import json
import math
import types
import typing
from functools import partial
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from recsys_moe.errors import UserError, nearest

T = TypeVar("T")

if typing.TYPE_CHECKING:

    @typing.dataclass_transform(frozen_default=True)
    def typed(cls: type[T]) -> type[T]: ...

else:
    typed = partial(pydantic_dataclass, frozen=True, config=ConfigDict(extra="forbid", strict=True))


def parse(kind: Any, data: Any, where: str) -> Any:
    """Build `kind` (a typed dataclass or a union of them) from plain data; `where` names the source in errors.

    It goes through JSON: there strict mode still takes an array for a tuple.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type, named by its dotted path.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(_sentence(kind, error, where)) from None


def dump(value: Any) -> Any:
    """The plain data (dicts, lists, numbers, strings) that `parse` builds `value` from."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def plain(value: Any) -> Any:
    """The same value with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _sentence(kind: Any, error: ValidationError, where: str) -> str:
    # An unknown key explains a missing one better than the other way round.
    first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    # A discriminated union puts its tag into the path: not a key that anybody wrote.
    owner, path = _owner(kind, first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        name = str(first["loc"][-1])
        return f"{where}: unknown key {'.'.join(path)!r}; {nearest(name, _field_names(owner))}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: {'.'.join(path)!r} is missing; add it"
    if first["type"] == "union_tag_not_found":
        field = ".".join([*path, first["ctx"]["discriminator"].strip("'()")])
        return f"{where}: {field!r} is missing; add it"
    if first["type"] == "union_tag_invalid":
        tag, valid = first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "").split(", ")
        field = ".".join([*path, first["ctx"]["discriminator"].strip("'()")])
        return f"{where}: {field!r} is {tag!r}; {nearest(tag, valid)}"
    if first["type"] == "value_error":  # raised by the dataclass itself, which says it all
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: {'.'.join(path) or 'value'!r} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"


def _owner(kind: Any, loc: tuple[int | str, ...]) -> tuple[Any, list[str]]:
    """The dataclass whose key ends `loc`, and the path as a person would write it (without union tags)."""
    path: list[str] = []
    owner = kind
    for position, part in enumerate(loc):
        members = _members(owner)
        if len(members) > 1 and isinstance(part, str):
            tagged = [m for m in members if part in _tags(m)]
            if tagged:
                owner = tagged[0]
                continue
        if isinstance(part, str) and not members:  # a plain union's member: not a key that anybody wrote
            continue
        path.append(str(part))
        if position == len(loc) - 1:
            break
        if isinstance(part, int):
            arguments = typing.get_args(_unannotated(owner))
            owner = arguments[0] if arguments else owner
        else:
            hints = typing.get_type_hints(members[0], include_extras=True) if members else {}
            owner = hints.get(part, owner)
    return owner, path


def _unannotated(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _members(kind: Any) -> list[Any]:
    kind = _unannotated(kind)
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return [option for option in map(_unannotated, options) if dataclasses.is_dataclass(option)]


def _tags(kind: Any) -> tuple[str, ...]:
    hints = typing.get_type_hints(kind)
    return tuple(tag for hint in hints.values() for tag in typing.get_args(hint) if isinstance(tag, str))


def _field_names(kind: Any) -> list[str]:
    return [field.name for member in _members(kind) for field in dataclasses.fields(member)]
