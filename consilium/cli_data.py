"""Common: the verbs `consilium data ...` and the options several verbs share. In: words. Out: one call per verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at data before training: inspect, split, audit.")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Lines = Annotated[bool, typer.Option("--json", help="One JSON object per event and line.")]


def print_json(value: object) -> None:
    """Print as JSON; a number that is no number becomes null."""
    import json

    print(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value


def _show(value: dict[str, object], title: str, json: bool) -> None:
    if json:
        return print_json(value)
    from consilium import listing

    return listing.show(listing.outline(value, title=title))


@app.command()
def inspect(config: ConfigFile, settings: Settings = None, json: Json = False) -> None:
    """Sites, classes and image sizes of the configured data."""
    from consilium.config import load
    from consilium.sites.audit import inspect as look

    _show(look(load(config, settings or ())), f"data of {config}", json)


@app.command()
def audit(config: ConfigFile, settings: Settings = None, json: Json = False) -> None:
    """Groups and exact duplicates across splits and sites, class tables, unreadable images."""
    from consilium import progress
    from consilium.config import load
    from consilium.sites.audit import audit_config

    with progress.counting("images read") as tell:
        found = audit_config(load(config, settings or ()), tell)
    _show(found.to_dict(), f"audit of {config}", json)


@app.command()
def split(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="Parquet file; use it by sites.split.file.")],
    settings: Settings = None,
) -> None:
    """Write the split of every image to a file that another run can import."""
    from consilium.config import load
    from consilium.sites.audit import write_split

    print(f"{out}: split {write_split(load(config, settings or ()), out)}")
