"""Common: tables on the terminal. In: members, findings of a check, predictions, run folders. Out: rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.tree import Tree

from consilium import registry
from consilium.progress import estimate

if TYPE_CHECKING:
    import pandas as pd


def show(renderable: RenderableType) -> None:
    """Print to standard output, as wide as the terminal; a file gets lines of 120 characters."""
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(renderable)


def registered(kinds: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Plain values of every member: name, summary, source, facts, module and the defaults of its options."""
    return {kind: [_plain(member) for member in _members(kind)] for kind in kinds}


def members(kinds: Sequence[str]) -> RenderableType:
    """A table per kind."""
    return Group(*(_member_table(kind) for kind in kinds))


def outline(values: Mapping[str, Any], title: str) -> Tree:
    """Nested mappings and lists as a tree; mappings that share their keys become one table."""
    tree = Tree(title, highlight=False)
    _grow(tree, values)
    return tree


def frame(table: pd.DataFrame) -> Table:
    """A data frame; numbers in three digits."""
    shown = Table(*map(str, table.columns))
    for row in table.itertuples(index=False):
        shown.add_row(*map(estimate, row))
    return shown


def _members(kind: str) -> list[registry.Member]:
    return list(registry.members(cast(registry.Kind, kind)).values())


def _plain(member: registry.Member) -> dict[str, Any]:
    fields = member.options.model_fields.items()
    return {
        "name": member.name,
        "summary": member.summary,
        "source": member.source,
        "facts": dict(member.facts),
        "module": member.build.__module__,
        "options": {
            key: "required" if field.is_required() else field.get_default(call_default_factory=True)
            for key, field in fields
        },
    }


def _member_table(kind: str) -> Table:
    table = Table("name", "what it does", "source", "facts", title=kind, title_justify="left", expand=True)
    for member in _members(kind):
        facts = ", ".join(f"{key}: {value}" for key, value in member.facts.items())
        table.add_row(member.name, member.summary, member.source or member.build.__module__, facts)
    return table


def _grow(tree: Tree, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            _grow_mapping(tree.add(str(key)), value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            tree.add(str(key)).add(_grid(dict(enumerate(value))))
        else:
            tree.add(f"{key}: {_short(value)}")


def _grow_mapping(branch: Tree, value: Mapping[str, Any]) -> None:
    rows = list(value.values())
    if len(rows) > 1 and all(isinstance(row, Mapping) and row.keys() == rows[0].keys() for row in rows):
        branch.add(_grid(value))
    else:
        _grow(branch, value)


def _grid(rows: Mapping[Any, Mapping[str, Any]]) -> Table:
    columns = list(next(iter(rows.values())))
    table = Table("", *map(str, columns), box=None, pad_edge=False)
    for name, row in rows.items():
        table.add_row("" if isinstance(name, int) else str(name), *(_short(row.get(column)) for column in columns))
    return table


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else estimate(value)
