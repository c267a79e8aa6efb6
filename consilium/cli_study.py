"""Common: the verb `consilium study`. In: words. Out: one call of `conduct`, and how the runs ended, printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium.cli_data import Json, Settings, print_json

if TYPE_CHECKING:
    from consilium.study.collect import Collection
    from consilium.study.conduct import Options

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="TOML file with base, seeds, axes or grid, compare.")]


def study(
    file: StudyFile,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study; left out: studies/<name of the study>.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs beside one another; left out: as cores and memory allow.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster that sees the same files; or: local.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every run and say what it costs; train none.")
    ] = False,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="Take finished runs of another version of the software as they are.")
    ] = False,
    json: Json = False,
) -> None:
    """Carry out a grid of runs, beside one another, or go on with it; compare them in tables, figures and a page."""
    from consilium.study.conduct import Options, conduct

    options = Options(out, workers, ray, keep_old, quiet=json)
    if dry_run:
        _foretell(file, settings or [], options, json)
    else:
        _finish(conduct(file, settings or [], options), json)


def is_study(folders: Sequence[Path]) -> bool:
    """Whether one of the folders is that of a study."""
    return any((folder / "study.json").is_file() for folder in folders)


def report(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the tables, figures and the page of a study again; ConfigError where anything else is asked for too."""
    from consilium.errors import ConfigError
    from consilium.study.page import write

    if len(folders) > 1 or out is not None:
        remedy = "give the folder of one study and nothing else"
        raise ConfigError("a study's report lies in its folder", where="consilium report", remedy=remedy)
    return write(folders[0])


def _finish(made: Collection, json: bool) -> None:
    from consilium.study import ending

    print_json(ending.summary(made)) if json else print(ending.text(made))
    if made.count("failed"):
        raise typer.Exit(1)


def _foretell(file: Path, settings: list[str], options: Options, json: bool) -> None:
    from consilium.study import ending

    found = ending.foretell(file, settings, options)
    if json:
        return print_json(found)
    from consilium import listing

    return listing.show(listing.outline(found, title=str(file)))
