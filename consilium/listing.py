"""Common: tables on the terminal. In: members, findings of a check, predictions, run folders. Out: rich tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from consilium import checkpoint, registry
from consilium.progress import estimate

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 20  # of a table in an outline
PARTS = {
    "label": "the class label alone",
    "backbone": "features of the backbone alone",
    "shared": "... with the shared part",
    "personal": "... with one site's personal part (mean of sites)",
    "shared_adds": "what the shared part adds to them",
    "personal_adds": "what one site's personal part adds (mean of sites)",
    "whole": "... with the model that a site uses (mean of sites)",
}


def show(renderable: RenderableType) -> None:
    """Print to standard output, as wide as the terminal; a file gets lines of 120 characters."""
    width = None if sys.stdout.isatty() else 120
    Console(markup=False, width=width).print(renderable)  # no markup: names come from data


def registered(kinds: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Plain values of every member: name, summary, source, facts, module and the defaults of its options."""
    return {kind: [_plain(member) for member in _members(kind)] for kind in kinds}


def members(kinds: Sequence[str]) -> RenderableType:
    """A table per kind."""
    return Group(*(_member_table(kind) for kind in kinds))


def outline(values: Mapping[str, Any], title: str) -> Tree:
    """Nested mappings and lists as a tree; mappings that share their keys become one table."""
    tree = Tree(Text(title))
    _grow(tree, values)
    return tree


def frame(table: pd.DataFrame) -> Table:
    """A data frame; numbers in three digits."""
    shown = Table(*map(str, table.columns))
    for row in table.itertuples(index=False):
        shown.add_row(*map(estimate, row))
    return shown


def merged(found: Mapping[str, Any], where: str) -> RenderableType:
    """What `consilium merge` did, and of every candidate what each site's validation images say."""
    terms = ", ".join(f"{term['site']} ({term['key'][:8]})" for term in found["terms"])
    facts = [f"{where}: {found['rule']} of {terms}", f"scale {found['scale']:.6g}"]
    facts += [f"products cut to rank {found['rank']}, off by {found['cut_off']:.3g}"] if found["rank"] else []
    facts += [f"cosine of {pair}: {value:.3f}" for pair, value in found["cosines"].items()]
    validation = found["validation"]
    if validation is None:
        return Group(*map(Text, facts))
    sites, select = validation["sites"], validation["select"]
    table = Table(f"scale, by {select}", *sites, "mean", title="validation images", title_justify="left")
    for name, mean in validation["means"].items():
        chosen = " <- chosen" if name == f"{found['scale']:.6g}" else ""
        table.add_row(name, *(estimate(rows[name][select]) for rows in sites.values()), f"{mean:.3f}{chosen}")
    return Group(*map(Text, facts), table)


def rows(table: Sequence[Mapping[str, object]]) -> Table:
    """Rows that share their keys, as they are, all of them."""
    return _grid(dict(enumerate(table)), len(table))


class Finding(Protocol):
    """What a look at something found."""

    @property
    def what(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def remedy(self) -> str: ...


def findings(found: Sequence[Finding]) -> Table:
    """A line for each, and where it is not good, what to do below it."""
    table = Table("what", "verdict", _whole("found"), box=None, pad_edge=False)
    for each in found:
        table.add_row(each.what, each.verdict, each.text + (f"\n-> {each.remedy}" if each.remedy else ""))
    return table


def _whole(title: str) -> Column:
    """A column in which no digest and no name ends in dots on a narrow terminal: people compare and copy them."""
    return Column(title, overflow="fold")


def comparison(runs: Sequence[Path]) -> Table:
    """Test metrics of runs side by side, with their references and the majority class; mean over the sites."""
    names = ("balanced_accuracy", "macro_auroc")
    columns = ("model", "trained", "sent and received", *(f"{name.replace('_', ' ')} [95 %]" for name in names))
    table = Table(*columns, caption="test images, mean over the sites")
    results = [_told(checkpoint.read_json(run / "result.json")) for run in runs]
    rows = [row for result in results for row in _compared(result, names)]
    majority = [
        ("majority class", "0", "", *_means({"personal": r["majority"].get("test", {})}, names))
        for r in results
        if "majority" in r  # else the images did not lie in one place
    ]
    for row in dict.fromkeys([*rows, *majority]):  # runs on the same data share their majority class
        table.add_row(*row)
    return table


def mechanism(found: Mapping[str, Any]) -> RenderableType:
    """How well a probe tells the site of an image, and, where they differ, what models are worth at other sites."""
    if not found["cross"]:
        return _probes(found)
    caption = "balanced accuracy on validation images [95 %]"
    names = list(found["sites"])
    table = Table("", *(f"images of {name}" for name in names), caption=caption)
    for model, values in found["cross"].items():
        table.add_row(f"model of {model}", *(estimate(values.get(name)) for name in names))
    return Group(_probes(found), table)


def _probes(found: Mapping[str, Any]) -> Table:
    images = sum(size["images"] for size in found["sites"].values())
    caption = (
        f"balanced accuracy over {len(found['sites'])} sites, {images} validation images; chance {found['chance']:.3f}"
    )
    table = Table("a probe of the site sees", "balanced accuracy [95 %]", "sites exchanged", caption=caption)
    for part, value in found["parts"].items():
        table.add_row(PARTS[part], estimate(value), estimate(value["control"]))
    for name, value in found["differences"].items():
        table.add_row(name, estimate(value), "")
    return table


def _told(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same; of a run across hospitals with means where a simulation has them."""
    if result.get("kind") != "deployment":
        return result
    means = {name: {"mean": {"value": entry["mean"]}} for name, entry in result["over_sites"]["test"].items()}
    return {**result, "metrics": {"test": {"personal": means}}}


def _compared(result: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    sent = sum(result["bytes"][way]["total"] for way in ("up", "down"))
    trained = f"{result['parameters']['trainable']:,}"
    yield result["name"], trained, decimal(sent), *_means(result["metrics"]["test"], names)
    for name, reference in result.get("references", {}).items():
        yield f"{result['name']}, {name} training", trained, "", *_means(reference["metrics"]["test"], names)


def _means(models: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    tree = models.get("personal", {})
    return (estimate(tree.get(name, {}).get("mean")) for name in names)


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
    table = Table("name", "what it does", "source", "facts", title=kind, title_justify="left", show_lines=True)
    for member in _members(kind):
        facts = "\n".join(f"{key}: {value}" for key, value in member.facts.items())
        own = member.build.__module__.startswith("consilium.")
        origin = [member.source] if own else [member.source, f"from {member.build.__module__}"]
        table.add_row(member.name, member.summary, "\n".join(filter(None, origin)), facts)
    return table


def _grow(tree: Tree, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            _grow_mapping(tree.add(Text(str(key))), value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            tree.add(Text(str(key))).add(_grid(dict(enumerate(value))))
        elif isinstance(value, (list, tuple)) and any(" " in item for item in value if isinstance(item, str)):
            branch = tree.add(Text(str(key)))
            for sentence in value:
                branch.add(Text(_short(sentence)))
        else:
            tree.add(Text(f"{key}: {_short(value)}"))


def _grow_mapping(branch: Tree, value: Mapping[str, Any]) -> None:
    rows = list(value.values())
    if len(rows) > 1 and all(isinstance(row, Mapping) and row.keys() == rows[0].keys() for row in rows):
        branch.add(_grid(value))
    else:
        _grow(branch, value)


def _grid(rows: Mapping[Any, Mapping[str, Any]], most: int = _ROWS) -> Table:
    columns = list(next(iter(rows.values())))
    table = Table("", *(_whole(str(column)) for column in columns), box=None, pad_edge=False)
    for name, row in islice(rows.items(), most):
        table.add_row("" if isinstance(name, int) else str(name), *(_short(row.get(column)) for column in columns))
    if len(rows) > most:
        table.caption = f"{len(rows) - most} more rows: --json shows all"
    return table


def _few(shown: Sequence[str], total: int) -> str:
    more = [f"{total - len(shown)} more: --json shows all"] if total > len(shown) else []
    return ", ".join([*shown, *more])


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return _few([f"{key} {_short(inner)}" for key, inner in islice(value.items(), _ROWS)], len(value))
    if isinstance(value, (list, tuple)):
        return _few([_short(inner) for inner in value[:_ROWS]], len(value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else estimate(value)
