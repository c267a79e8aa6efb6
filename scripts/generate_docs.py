"""Write docs/configuration.md from the configuration's own models and the registry, and docs/strategies.md
(strategy_table.py): python -m scripts.generate_docs

A key's description is the comment behind it in consilium/config.py, or its field's description.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from consilium import registry
from consilium.config import Config, SelectionConfig, StageConfig
from consilium.deployment.files import Deployment
from consilium.deployment.gate import GateConfig
from scripts import strategy_table

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
OPENING = """# Configuration

Written by `make docs` from the code; do not edit. A configuration is a TOML file. An unknown key is an error, and
`--set table.key=value` overrides any key. Relative paths are relative to the file. Keys of a source, task, tuner or
strategy stand in its table, beside its name; `consilium list` shows what is installed.
"""
TABLES = {"tuners": "[[tuner]]", "strategies": "[strategy]", "tasks": "[task]", "sources": "[sites]"}


def render() -> str:
    """The whole page."""
    return "\n".join([OPENING, *_section("", Config), *_stages(), *_hospitals(), *_members()])


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    inner = {name: found for name, field in model.model_fields.items() if (found := _model_of(field))}
    plain = {name: field for name, field in model.model_fields.items() if name not in inner}
    if path:
        yield f"## `[{path}]`\n\n{_first_line(model)}\n"
    yield from _table(model, plain)
    for name, found in inner.items():
        if found is not StageConfig:
            yield from _section(f"{path}.{name}" if path else name, found)


def _stages() -> Iterator[str]:
    inner = [name for name, field in StageConfig.model_fields.items() if _model_of(field)]
    yield f"## `[[stages]]`\n\n{_first_line(StageConfig)}\n"
    yield from _table(StageConfig, {n: field for n, field in StageConfig.model_fields.items() if n not in inner})
    tables = ", ".join(f"`{name}`" for name in inner)
    keys = ", ".join(f"`{name}`" for name in SelectionConfig.model_fields)
    yield f"And these tables, with their keys as above: {tables}; of `evaluation` only {keys}.\n"


def _hospitals() -> Iterator[str]:
    """Tables that a federation across hospitals has beside these."""
    where = "`[deployment]` stands in federation.toml, `[gate]` in each site.toml: [how to](deployment.md)."
    yield f"## Across hospitals\n\n{where}\n"
    yield from _section("deployment", Deployment)
    yield from (line.replace("`[gate.tensors]`", "`[[gate.tensors]]`") for line in _section("gate", GateConfig))


def _members() -> Iterator[str]:
    for kind in registry.KINDS:
        yield f"## {kind.capitalize()}: keys in `{TABLES[kind]}`\n"
        every = registry.members(kind).values()  # what else is installed here is not documented here
        own = [member for member in every if member.build.__module__.startswith("consilium.")]
        yield from _overview(own)
        for member in own:
            refused = member.facts.get("merge_refused")
            words = f"{member.summary}. Not to be merged: {refused}" if refused else member.summary
            yield f"### `{member.name}`\n\n{words[:1].upper()}{words[1:]}.\n"
            yield from _table(member.options, member.options.model_fields)


def _overview(members: Sequence[registry.Member]) -> Iterator[str]:
    """One row per member: what it does, its facts in columns, its source."""
    facts = [key for key in dict.fromkeys(key for member in members for key in member.facts) if key != "merge_refused"]
    heads = ["name", "what it does", *facts, "source"]
    yield f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}"
    for member in members:
        cells = [f"`{member.name}`", member.summary, *(member.facts.get(key, "") for key in facts), member.source]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _table(model: type[BaseModel], fields: dict[str, FieldInfo]) -> Iterator[str]:
    if not fields:
        return
    comments = _comments(model)
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    for name, field in fields.items():
        cells = [f"`{name}`", _type(model, name), _default(field), field.description or comments.get(name, "")]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    candidates = (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _comments(model: type[BaseModel]) -> dict[str, str]:
    own = [base for base in reversed(model.__mro__) if issubclass(base, BaseModel) and base is not BaseModel]
    source = "\n".join(inspect.getsource(base) for base in own)
    found = re.findall(r"^    (\w+): .*?  # (.+)$", source, flags=re.MULTILINE)
    return {name: comment.replace("None:", "left out:") for name, comment in found}


def _type(model: type[BaseModel], name: str) -> str:
    return _words(model.model_json_schema()["properties"][name])


def _words(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return "table"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "anyOf" in schema:
        return " or ".join(_words(part) for part in schema["anyOf"] if part.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_words(schema.get('items') or schema.get('prefixItems', [{}])[0])}"
    if schema.get("type") == "object" or schema.get("format") == "path":
        return str(schema.get("format", "table"))
    return {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(
        str(schema.get("type")), str(schema.get("type", "any"))
    ) + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    names = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f", {sign} {schema[key]:g}" for key, sign in names.items() if key in schema)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "none"
    return f"`{json.dumps(value, default=_plain)}`"


def _plain(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def _first_line(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").split("\n")[0]


if __name__ == "__main__":
    for target, page in ((TARGET, render), (strategy_table.TARGET, strategy_table.render)):
        target.write_text(page(), encoding="utf-8")
        print(target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target)
