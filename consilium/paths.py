"""Common: relative paths of a configuration. In: a table, its model, a folder. Out: the table with absolute paths.

What is a path is said by the models alone: every key that the configuration, or the member named in a table, declares
as a `Path`.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from consilium import registry


def absolute(table: Mapping[str, Any], model: type[BaseModel], base: Path) -> dict[str, Any]:
    """A copy of plain values in which relative paths lie in `base`; `~` is the user's home."""
    copy: dict[str, Any] = json.loads(json.dumps(table, default=str))
    _resolve(copy, model, base)
    return copy


def _resolve(value: Any, model: type[BaseModel], base: Path) -> None:
    for table in value if isinstance(value, list) else [value]:
        if not isinstance(table, dict):
            continue  # validation will say so
        for name, field in {**_member_fields(table, model), **model.model_fields}.items():
            kinds = _kinds(field.annotation)
            if Path in kinds and name in table:
                table[name] = _joined(table[name], base, kinds)
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    _resolve(table.get(name), kind, base)


def _joined(value: Any, base: Path, words: set[Any]) -> Any:
    """The absolute path, or each in a list; a word that the annotation allows beside paths stays."""
    if isinstance(value, list):
        return [_joined(one, base, words) for one in value]
    if not isinstance(value, str) or value in words:
        return value
    return str((base / Path(value).expanduser()).resolve())


def _kinds(annotation: Any) -> set[Any]:
    """All types and literal words in an annotation."""
    inner = [part for part in get_args(annotation) if isinstance(part, Hashable)]
    return set().union(*map(_kinds, inner)) if inner else {annotation}


def _member_fields(table: Mapping[str, Any], model: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """The options of the member that a table names; none where the table is of no member, or of an unknown one."""
    if not hasattr(model, "registered"):
        return {}
    kind, key = model.registered
    member = registry.members(kind).get(str(table.get(key, model.model_fields[key].default)))
    return member.options.model_fields if member else {}
