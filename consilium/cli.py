"""Common: the command line. In: words. Out: one call of a public function per verb, and what it returned, printed.

Nothing heavy is imported before a verb runs. Exit codes: 0 done; 1 a run or a run folder that failed; 2 words, a
configuration, data or weights that cannot be used; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from consilium import cli_data, cli_deploy, cli_merge, cli_study, cli_unseen
from consilium.cli_data import ConfigFile, Json, Lines, Settings, print_json
from consilium.errors import BackboneError, ConfigError, ConsiliumError, DataError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated fine-tuning of vision transformers: hospitals train together, images stay where they are.",
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_deploy.deploy, name="deploy")
app.add_typer(cli_deploy.site, name="site")
app.add_typer(cli_deploy.coordinator, name="coordinator")
app.command("study")(cli_study.study)
app.command("unseen")(cli_unseen.unseen)
app.command("merge")(cli_merge.merge)
app.command("keys")(cli_merge.keys)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Model = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or an exported or merged one.")]


class Format(StrEnum):
    """What other tools read."""

    peft = "peft"
    timm = "timm"
    safetensors = "safetensors"


class Kind(StrEnum):
    """Kinds of members a registry lists."""

    tuners = "tuners"
    strategies = "strategies"
    tasks = "tasks"
    sources = "sources"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves by SystemExit."""
    words, debug = _debug(list(sys.argv[1:] if arguments is None else arguments))
    try:
        app(words, prog_name="consilium")
    except ConsiliumError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ConfigError, DataError, BackboneError)) else 1)
    except OSError as error:  # of a file or a port: who typed the verb can mend it
        if debug:
            raise
        print(f"error: {_of_system(error)}", file=sys.stderr)
        sys.exit(1)


def _of_system(error: OSError) -> ConsiliumError:
    remedy = "is it the right user, folder or port, and is there room? --debug shows at which line of the code"
    return ConsiliumError(error.strerror or str(error), where=error.filename, remedy=remedy)


def _debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without --debug, which may stand before or after the verb, and whether it was there."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


def _version(wanted: bool) -> None:
    if wanted:
        from consilium import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    del version, debug  # read by `_version` and `_debug`


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file; left out: the embedded quick start.")
    ] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; left out: runs/<name of the run>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where this folder's run stopped.")] = False,
    json: Lines = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the outcome only.")] = False,
) -> None:
    """Simulate a federation: train, evaluate, write the run folder and its report."""
    from consilium import progress
    from consilium.config import load
    from consilium.run import run as simulate

    loaded = load(config, settings or ())
    show = progress.json_lines() if json else progress.quiet() if quiet else progress.live()
    with show as display:
        simulate(loaded, out or Path("runs") / loaded.name, resume=resume, display=display)


@app.command()
def check(config: ConfigFile, settings: Settings = None, json: Json = False) -> None:
    """Validate without training: parameters, bytes per round, memory, splits, leakage."""
    from consilium.check import check as examine
    from consilium.config import load

    found = examine(load(config, settings or ())).to_dict()
    if json:
        return print_json(found)
    from consilium import listing

    return listing.show(listing.outline(found, title=str(config)))


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="One run folder, several to compare, or the folder of a study."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; left out: report.html in the run folder or, of several, here.")
    ] = None,
) -> None:
    """Render one self-contained HTML page of one run, of several side by side, or of a study."""
    if cli_study.is_study(runs):
        return print(cli_study.report(runs, out))
    from consilium import listing
    from consilium.report.html import render

    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    page = render(runs, target)
    listing.show(listing.comparison(runs))
    return print(page)


@app.command()
def predict(
    run: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.")],
    site: Annotated[str | None, typer.Option(help="Use the model of this site; left out: the global model.")] = None,
    weights: cli_merge.Weights = None,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values instead of a table.")] = False,
) -> None:
    """Probabilities of each class for new images."""
    from consilium.predict import predict as probabilities

    table = probabilities(run, images, site, weights)
    if json:
        return print_json(table.to_dict(orient="records"))
    if csv:
        return print(table.to_csv(index=False), end="")
    from consilium import listing

    return listing.show(listing.frame(table))


@app.command()
def export(
    run: Model,
    format: Annotated[
        Format,
        typer.Option(help="peft: the adapter; timm: the merged model; safetensors: what was trained, of any tuner."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    site: Annotated[str | None, typer.Option(help="Export the model of this site; left out: the global model.")] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign with this private key, for `consilium merge`.")
    ] = None,
    counts: Annotated[
        bool, typer.Option("--counts", help="Tell numbers of training images in what is signed.")
    ] = False,
    weights: cli_merge.Weights = None,
) -> None:
    """Write the trained adapter or the merged model for other tools; never encrypted."""
    from consilium import run_folder
    from consilium.export import export as write

    print(write(run, format.value, out, site, sign=sign, counts=counts, weights=weights))
    if site and run_folder.is_encrypted(run):
        print(f"what was exported of {site} is not encrypted: keep it as you keep the key", file=sys.stderr)


@app.command()
def mechanism(run: RunFolder, json: Json = False) -> None:
    """What each adapter of a finished simulation tells of the site: mechanism.json, and figures in its report."""
    from consilium import listing
    from consilium.mechanism import examine

    found = examine(run)
    if json:
        return print_json(found)
    listing.show(listing.mechanism(found))
    return print(run / "report.html")


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="Left out: everything.")] = None, json: Json = False
) -> None:
    """Show which tuners, strategies, tasks and sources are registered, third-party ones included."""
    from consilium import listing

    kinds = [kind.value] if kind else [each.value for each in Kind]
    if json:
        return print_json(listing.registered(kinds))
    return listing.show(listing.members(kinds))
