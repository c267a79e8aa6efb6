"""Common: the verb `consilium unseen`. In: words. Out: one call of `unseen`, and its curves, printed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from consilium.cli_data import Json, print_json

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run that held a site out.")]


class Trains(StrEnum):
    """What few images train."""

    personal = "personal"
    head = "head"
    all = "all"


def unseen(
    run: RunFolder,
    shots: Annotated[list[int] | None, typer.Option(help="k, images of each class; repeatable.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws of the k images.")] = None,
    trains: Annotated[Trains | None, typer.Option(help="What these images train.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser, for every k.")] = None,
    json: Json = False,
) -> None:
    """Sites that took no part: the model as it is, and after training on k of their own images per class."""
    from consilium import listing, progress
    from consilium.unseen.again import curves
    from consilium.unseen.again import unseen as measure

    given = {"shots": shots, "draws": draws, "trains": trains.value if trains else None, "steps": steps}
    changes = {key: value for key, value in given.items() if value is not None}
    with progress.quiet() if json else progress.live() as display:
        path = measure(run, changes, display)
    if json:
        return print_json(curves(path))
    import pandas as pd

    listing.show(listing.frame(pd.DataFrame(curves(path))))
    return print(path)
