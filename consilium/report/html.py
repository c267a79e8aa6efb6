"""Stage 10, report. In: run folders. Out: one self-contained HTML page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from consilium import checkpoint
from consilium.errors import ConfigError
from consilium.report import apart, marks, mechanism, unseen
from consilium.report.load import Run, load_run
from consilium.report.sections import Figure, Section, Tile, compared, sections, summary, tiles
from consilium.report.tables import Table

TEMPLATES = Path(__file__).parent / "templates"


def render(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and return its path; left out, it is report.html in the run folder or, of several, here.

    Raises StateError that names the file of a run folder which cannot be read, or a page which cannot be written.
    """
    if not runs:
        raise ConfigError("a report needs a run folder", where="runs")
    loaded = [load_run(Path(folder)) for folder in runs]
    target = out or (loaded[0].folder / "report.html" if len(loaded) == 1 else Path("report.html"))
    checkpoint.write_bytes(target, page(loaded).encode())
    return target


def environment() -> Environment:
    """Templates of the house, for this page and a study's."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["key"] = marks.key
    made.tests["table"] = lambda block: isinstance(block, Table)
    made.tests["figure"] = lambda block: isinstance(block, Figure)
    return made


def _sections(run: Run) -> list[Section]:
    """Sites that took no part come behind the results of those that did, how two adapters relate behind all results."""
    if run.result.kind != "simulation":
        return apart.sections(run)
    first, *rest, traffic, data, again = sections(run)
    return [first, *unseen.sections(run.folder), *rest, *mechanism.sections(run), traffic, data, again]


def _summary(run: Run) -> str:
    return apart.lead(run) if run.result.kind == "site" else summary(run)


def _tiles(run: Run) -> list[Tile]:
    return apart.tiles(run) if run.result.kind == "site" else tiles(run)


def page(runs: Sequence[Run]) -> str:
    """The page as text."""
    views = [
        {"run": run, "summary": _summary(run), "tiles": _tiles(run), "sections": _sections(run), "index": number}
        for number, run in enumerate(runs, start=1)
    ]
    side_by_side = compared(runs) if len(runs) > 1 else None
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment().get_template("page.html.j2").render(views=views, compared=side_by_side, style=style)
