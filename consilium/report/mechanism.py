"""Stage 10, report. In: a `Run`, and mechanism.json where there is one. Out: how shared and personal part relate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from markupsafe import Markup
from pydantic import Field

from consilium.report import figures, stages
from consilium.report.load import Plain, Run, Value, parse, text_of
from consilium.report.marks import Point, padded
from consilium.report.sections import Block, Curve, Figure, Section, told
from consilium.report.tables import Cell, Table, interval
from consilium.report.text import count

READ = {"overlap_received": "as the shared part came in", "overlap_right": "after training"}
WRITTEN = {"overlap_left": "after training"}
PARTS = {
    "label": "class label alone",
    "backbone": "backbone",
    "shared": "with the shared part",
    "personal": "with a personal part",
    "shared_adds": "what shared adds",
    "personal_adds": "what personal adds",
    "whole": "with a whole model",
}


class Probe(Value):
    """How well the site is told; `control` where sites were exchanged at random between patients."""

    control: float | None = None


class Size(Plain):
    """What a site was asked about."""

    images: int = 0
    groups: int = 0


class Mechanism(Plain):
    """mechanism.json."""

    schema_version: Literal[1]
    sites: Mapping[str, Size] = Field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    chance: float | None = None
    parts: Mapping[str, Probe] = Field(default_factory=dict)
    differences: Mapping[str, Value] = Field(default_factory=dict)
    cross: Mapping[str, Mapping[str, Value]] = Field(default_factory=dict)  # model of a site -> images of a site


def sections(run: Run) -> list[Section]:
    """One section, or none where neither rounds nor a probe say anything."""
    path = run.folder / "mechanism.json"
    found = parse(Mechanism, path, text_of(path)) if path.is_file() else None
    blocks = [*_rounds(run), *(_probes(found) if found is not None else [])]
    notes = [_ROUNDS] if _logged(run) else []
    notes += [_note(found)] if found is not None else []
    return [Section("Shared and personal", blocks, note=" ".join(notes))] if blocks else []


# ------------------------------------------------------------------------------------------------ rounds
_ROUNDS = (
    "Overlap is the mean squared cosine of the principal angles of the two adapters on a layer, as a multiple of what "
    "random subspaces of these ranks have: 1, the dotted line, is chance. Shares are of the norms of both updates."
)


def _logged(run: Run) -> bool:
    return any(event.learned for line in run.events for event in line.sites.values())


def _rounds(run: Run) -> list[Block]:
    if not _logged(run):
        return []
    shares = {site: _shares(_curve(run, site, "share_personal")) for site in run.result.sites}
    caption = "Overlap of what shared and personal part {} by round; 1 is as at random"
    drawn = [_overlaps(run, caption.format(what), keys) for what, keys in (("read", READ), ("write", WRITTEN))]
    panels = _panels(run, shares, "share", (0.0, 1.0))
    return [*drawn, Figure("Share of the norm of the update by round", panels, list(_SHARES))]


def _overlaps(run: Run, caption: str, keys: Mapping[str, str]) -> Figure:
    curves = {site: {text: _curve(run, site, key) for key, text in keys.items()} for site in run.result.sites}
    return Figure(caption, _panels(run, curves, "overlap", (0.0, 1.0), 1.0), list(keys.values()))


_SHARES = ("shared", "personal")


def _curve(run: Run, site: str, name: str) -> Curve:
    lines = [(line.round, line.sites[site].learned) for line in run.events if site in line.sites]
    return [(number, learned[name]) for number, learned in lines if name in learned]


def _shares(personal: Curve) -> dict[str, Curve]:
    return dict(zip(_SHARES, ([(at, None if v is None else 1 - v) for at, v in personal], personal), strict=True))


def _panels(
    run: Run,
    curves: Mapping[str, Mapping[str, Curve]],
    name: str,
    least: tuple[float, float],
    level: float | None = None,
) -> list[tuple[str, Markup]]:
    values = [v for series in curves.values() for curve in series.values() for _, v in curve if v is not None]
    span, last, begins = padded([*least, *values]), run.events[-1].round, stages.marks(run)
    return [
        (site, figures.learning_curves(f"{name} at {site}: {told(series)}", series, last, span, level, begins))
        for site, series in curves.items()
    ]


# ------------------------------------------------------------------------------------------------ probes
def _probes(found: Mechanism) -> list[Block]:
    rows = {PARTS.get(part, part): [Point(p.value, p.low, p.high), Point(p.control)] for part, p in found.parts.items()}
    chance = "" if found.chance is None else f", chance {found.chance:.3f}"
    axis = f"balanced accuracy{chance}"
    drawn = [figures.forest(f"Which site: {_words(found)}", rows, axis, width) for width in (720.0, 360.0)]
    caption = "Which site an image comes from, told by a linear probe, with 95\u00a0% intervals"
    figure = Figure(caption, [("", drawn[0])], ["probe", "sites exchanged at random"], drawn[1])
    return [figure, *([_differences(found)] if found.differences else []), *([_cross(found)] if found.cross else [])]


def _cross(found: Mechanism) -> Table:
    def cell(value: Value | None) -> Cell:
        shown = interval(value)
        return Cell(shown.text, shown.detail, heat=value.value if value is not None else None)

    names = list(found.sites)
    rows = [[Cell(f"model of {model}"), *(cell(values.get(n)) for n in names)] for model, values in found.cross.items()]
    title = "Balanced accuracy of each site's model on the validation images of every site"
    return Table(title, ["", *(f"images of {name}" for name in names)], rows)


def _words(found: Mechanism) -> str:
    return "; ".join(f"{PARTS.get(part, part)} {p.value:.3f}" for part, p in found.parts.items() if p.value is not None)


def _differences(found: Mechanism) -> Table:
    def name(pair: str) -> str:
        return " minus ".join(PARTS.get(part, part) for part in pair.split(" - "))

    cells = {pair: interval(value) for pair, value in found.differences.items()}
    rows: Sequence[Sequence[Cell]] = [[Cell(name(pair)), cell] for pair, cell in cells.items()]
    return Table("Paired differences in telling the site", ["difference", "balanced accuracy"], rows)


def _note(found: Mechanism) -> str:
    images, groups = (sum(getattr(size, key) for size in found.sites.values()) for key in ("images", "groups"))
    left_out = f" Left out, for want of patients: {', '.join(found.left_out)}." if found.left_out else ""
    return (
        f"The probe saw validation images only, {count(images)} of {count(groups)} patients, and never a patient both "
        "in fitting and in asking. Every adapter was applied to the images of all sites; of personal parts and whole "
        f"models the mean over sites is shown.{left_out} This needs the images of several sites in one place, which "
        "only a simulation has."
    )
