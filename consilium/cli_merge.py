"""Common: the verbs `consilium keys` and `consilium merge`. In: words. Out: one call per verb, and what it made."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from consilium.cli_data import Json, print_json


class Rule(StrEnum):
    """How vectors become one."""

    mean = "mean"
    sum = "sum"
    ties = "ties"
    dare = "dare"


class Weigh(StrEnum):
    """How much a site counts."""

    uniform = "uniform"
    examples = "examples"


Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Backbone's weights, where the adapters were trained on a file of them."),
]


Adapters = Annotated[
    list[Path], typer.Argument(metavar="ADAPTER...", help="Signed adapters, or one merged folder with --subtract.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option(metavar="[SITE=]FILE", help="Public key that may sign, for SITE alone if named; repeatable."),
]
Validate = Annotated[
    list[Path] | None,
    typer.Option(metavar="CONFIG|JSON", help="Whose validation images choose; or merge.json of a site; repeatable."),
]
Subtract = Annotated[
    list[Path] | None, typer.Option(metavar="ADAPTER", help="Take this site out of the merged folder; repeatable.")
]


def keys(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Private key to write; FILE.pub is public.")],
) -> None:
    """Make a key pair to sign adapters with. Give the .pub to whoever merges, and keep the other to yourself."""
    from consilium.signing import new_key

    public, key = new_key(path)
    print(f"{path}: private, for --sign\n{public}: public, for --trust; fingerprint {key[:16]}")


def merge(
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    trust: Trust = None,
    rule: Annotated[Rule | None, typer.Option(help="mean if left out; ties and dare look at single entries.")] = None,
    scale: Annotated[str, typer.Option(metavar="auto|NUMBER", help="Lambda; auto: chosen by --validate.")] = "auto",
    validate: Validate = None,
    select: Annotated[str, typer.Option(help="Validation metric that chooses.")] = "balanced_accuracy",
    scales: Annotated[str, typer.Option(metavar="A,B,...", help="Candidates for auto.")] = "",
    weigh: Annotated[Weigh | None, typer.Option(help="uniform if left out; examples: by training images.")] = None,
    density: Annotated[float, typer.Option(help="Share of entries that ties and dare keep.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut products to this rank; left out: exact.")] = None,
    subtract: Subtract = None,
    sign: Annotated[Path | None, typer.Option(metavar="KEY", help="Sign the merged model.")] = None,
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Merge signed adapters of several sites into one model, or take a site out again; no site needs to be there."""
    from rich.console import Console

    from consilium import progress
    from consilium.merging import merge as work

    options = work.Options(
        rule=(rule or Rule.mean).value,
        scale=None if scale == "auto" else _number(scale, "--scale"),
        weigh=(weigh or Weigh.uniform).value,
        density=density,
        seed=seed,
        rank=rank,
        validate=tuple(validate or ()),
        select=select,
        scales=tuple(_number(each, "--scales") for each in scales.split(",") if each.strip()),
        weights=weights,
        sign=sign,
    )
    with progress.live(Console(stderr=True, markup=False)) as show:
        if subtract:
            work.subtract(_merged(adapters, rule, weigh), subtract, trust or (), out, options, show)
        else:
            work.merge(adapters, trust or (), out, options, show)
    _tell(out, json)


def _tell(out: Path, json: bool) -> None:
    from consilium import checkpoint, listing
    from consilium.merging.merge import REPORT

    found: dict[str, Any] = checkpoint.read_json(out / REPORT)
    if json:
        return print_json(found)
    return listing.show(listing.merged(found, str(out)))


def _number(text: str, where: str) -> float:
    from consilium.errors import ConfigError

    try:
        return float(text)
    except ValueError as error:
        raise ConfigError("this is no number", where=where, allowed="numbers", received=text) from error


def _merged(adapters: list[Path], rule: Rule | None, weigh: Weigh | None) -> Path:
    """The folder to take sites out of; ConfigError for words that have no effect then."""
    from consilium.errors import ConfigError

    if rule is not None:
        raise ConfigError("the merged folder's own rule holds", where="--rule")
    if weigh is not None:
        raise ConfigError("the merged folder's own weights hold", where="--weigh")
    if len(adapters) != 1:
        raise ConfigError("--subtract takes one merged folder", where="ADAPTER")
    return adapters[0]
