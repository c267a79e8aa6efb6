"""Stage 10, report. In: a `Run` across hospitals, or one hospital's own part of it. Out: the parts of its page.

The coordinator's page holds what hospitals sent; a hospital's page, which stays there, its own images too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from consilium import metrics
from consilium.report import marks, tables
from consilium.report import sections as shared
from consilium.report.load import Event, JournalFacts, Run, SiteEvent
from consilium.report.sections import Block, Figure, Section, Tile, pairs
from consilium.report.tables import Cell, Table
from consilium.report.text import UNDEFINED, bytes_text, count, duration, recipe, whole

if TYPE_CHECKING:
    import pandas as pd

COUNTED_LATE = "reply to the round before"
STATES = ("ok", COUNTED_LATE, "late", "lost", "absent", "refused")  # how a site did; all others are failures


def sections(run: Run) -> list[Section]:
    """Of the page of a run across hospitals, or of a hospital's own."""
    if run.result.kind == "site":
        return _of_hospital(run)
    results = shared.results(run)
    means = (
        " A mean over sites has no interval: it would need every image's answer, and these stay where they are. "
        "All values were computed at the hospitals, on their own images."
    )
    return [
        Section(results.title, results.blocks, results.more, results.note + means),
        *([_rounds(run), shared.learning(run)] if run.events else []),
        shared.traffic(run),
        Section("Data", [_sizes(run)], note="As the hospitals said; classes and patients they did not tell."),
        _again(run),
    ]


# ------------------------------------------------------------------------------------------------ rounds
def _rounds(run: Run) -> Section:
    away = shared.missed(run)
    rows = []
    for site in shared.roster(run):
        seen = [event.sites[site] for event in run.events if site in event.sites]
        worked = sum(each.seconds or 0.0 for each in seen)
        replied = sum(each.status == "ok" for each in seen)
        rows.append([Cell(site), Cell(f"{replied} of {len(run.events)}"), Cell(duration(worked)), Cell(away[site])])
    head = ["hospital", "rounds with its update", "its own work", "rounds without"]
    who = Table("Who took part", head, [[*row[:3], Cell(row[3].text or "none")] for row in rows])
    seconds = [event.seconds for event in run.events if event.seconds is not None]
    mean = duration(sum(seconds) / len(seconds)) if seconds else UNDEFINED
    note = (
        f"A round took {mean} on average, from asking to its checkpoint. Late: no reply until the deadline and its "
        "grace; a reply that came after was not used, unless it is shown as one to the round before, which the "
        "agreement lets count in the next one. Lost: its node or its service went away and was not back in time. "
        "Absent: it was not connected. Refused: the hospital declined, or its reply was not accepted. Bytes are those "
        "of replies that counted, and of requests that were made. A reply that came too late, or was not accepted, "
        "left its hospital all the same, and one that was absent received nothing: what truly left is in its journal."
    )
    return Section("Rounds", [_attendance(run), who], [("Every round", [_each(run.events)])], note)


def _attendance(run: Run) -> Figure:
    """A mark per hospital and round, by how it did."""
    seen = {_state(each) for event in run.events for each in event.sites.values()}
    used = [state for state in [*STATES, *sorted(seen - {*STATES, "not_drawn"})] if state in seen]
    away = {site: rounds for site, rounds in shared.missed(run).items() if rounds}
    told = "; ".join(f"{site} without {rounds}" for site, rounds in away.items()) or "everybody in every round"
    title = f"Who replied in which round: {told}"
    words = [_WORDS.get(state, state) for state in used]
    return shared.wide_and_narrow(
        "How each hospital did in each round", lambda width: _marks(run, used, title, width), words
    )


def _state(event: SiteEvent) -> str:
    return event.status if event.late_from is None else COUNTED_LATE


def _marks(run: Run, used: Sequence[str], title: str, width: float) -> Markup:
    numbers, roomy = [event.round for event in run.events], width > 500
    left, step = (160.0, 22.0) if roomy else (14.0, 38.0)
    sites = shared.roster(run)
    bottom = 8 + step * len(sites)
    x = marks.Axis(numbers[0] - 0.5, numbers[-1] + 0.5, left, width - 14)
    every = max(1, round(len(numbers) * 28 / (width - left)))
    parts = [marks.axis_x(x, bottom, [float(n) for n in numbers if (n - numbers[0]) % every == 0], whole)]
    for row, site in enumerate(sites):
        y = 8 + step * (row + 1) - 11
        name = (left - 12, y + 4, site, "end") if roomy else (4, y - 9, site, "start")
        parts.append(marks.name_text(*name))
        for event in run.events:
            status = _state(event.sites[site]) if site in event.sites else "not_drawn"
            parts += [marks.marker(used.index(status), x(event.round), y, 4.5)] if status in used else []
    parts.append(marks.word((left + width) / 2, bottom + 34, "round", "middle"))
    return marks.svg(width, bottom + 40, title, parts)


_WORDS = {"ok": "replied"}


def _each(events: Sequence[Event]) -> Table:
    rows = []
    for event in events:
        asked = {site: each for site, each in event.sites.items() if each.status != "not_drawn"}
        away = {site: each for site, each in asked.items() if each.status != "ok"}
        reasons = "\n".join(f"{site}: {each.message}" for site, each in away.items() if each.message)
        names = ", ".join(f"{site} {each.status}" for site, each in away.items()) or "nobody"
        up, down = (bytes_text(sum(event.bytes.get(way, {}).values())) for way in ("up", "down"))
        late = "".join(f", {site} for round {each.late_from}" for site, each in asked.items() if each.late_from)
        replied = f"{len(asked) - len(away)} of {len(asked)}{late}"
        rows.append([
            Cell(str(event.round)), Cell(replied), Cell(duration(event.seconds)), Cell(up), Cell(down),
            Cell(names, reasons),
        ])  # fmt: skip
    return Table("Rounds", ["round", "replied", "time", "left hospitals", "came in", "missing"], rows)


# ------------------------------------------------------------------------------------------------ data, digests
def _sizes(run: Run) -> Table:
    rows = [
        [Cell(site), *(Cell(count(part.n)) for part in (size.train, size.val, size.test))]
        for site, size in run.result.sites.items()
    ]
    return Table("Images", ["hospital", "training", "validation", "test"], rows)


_COMMANDS = {
    "deployment": "consilium coordinator submit FOLDER; the agreement is federation.toml in it",
    "site": "consilium site join FOLDER; the agreement is federation.toml in it, this hospital's own part site.toml",
}


def _again(run: Run) -> Section:
    result = run.result
    facts = [
        ("agreement digest", result.agreement_hash),
        ("run", result.run or UNDEFINED),
        ("backbone", result.backbone.name),
        ("backbone digest", result.backbone.digest),
        ("seed", str(result.seed)),
        ("versions", pairs({"consilium": result.consilium_version, **result.versions})),
        ("command", _COMMANDS[result.kind]),
    ]
    text = run.stored.config.model_dump_json(indent=2)
    return Section("To run it again", [facts], [("Resolved agreement", [text])])


# ------------------------------------------------------------------------------------------------ at a hospital
def lead(run: Run) -> str:
    """What this page is, in one sentence."""
    result, (site,) = run.result, run.result.sites
    return (
        f"{site}: its own model and images in a federation. {recipe(run.stored.config)} on {result.backbone.name}, "
        f"{count(result.sites[site].train.n)} training images of {len(result.classes)} classes. This page was made "
        "here and has left nowhere."
    )


def tiles(run: Run) -> list[Tile]:
    """The headline: the model that this hospital uses on its own test images, and what left."""
    result, tree = run.result, tables.served(run)
    journal = _journal(run)
    refused = sum(bool(visit.refused) for visit in journal.visits)
    rounds = {visit.round for visit in journal.visits if visit.kind == "round" and not visit.refused}
    return [
        shared.measured("Balanced accuracy", tree.get("balanced_accuracy"), "pooled"),
        shared.measured("Macro AUROC", tree.get("macro_auroc"), "pooled"),
        Tile("Rounds with its update", f"{len(rounds)} of {result.rounds}", f"{refused} requests refused or failed"),
        Tile("Left this hospital", bytes_text(result.bytes.up.total), f"{len(journal.visits)} replies"),
        Tile("Came in", bytes_text(result.bytes.down.total)),
        Tile("Trainable parameters", count(result.parameters.get("trainable")),
             f"exchanged {count(result.parameters.get('exchanged'))}"),
    ]  # fmt: skip


def _journal(run: Run) -> JournalFacts:
    return run.result.journal or JournalFacts()


def _of_hospital(run: Run) -> list[Section]:
    results = shared.results(run)
    found = [Section(results.title, results.blocks, results.more, results.note), _left(run)]
    if run.predictions is not None:
        found.insert(1, _mistakes(run, run.predictions))
    return [*found, Section("Data", [tables.sites(run)]), _digests(run)]


def _mistakes(run: Run, predictions: pd.DataFrame) -> Section:
    rows = predictions[(predictions["split"] == "test") & (predictions["model"] == "personal")]
    classes = run.result.classes
    matrix = tables.confusion("Confusion on the test split", metrics.confusion_matrix(rows, classes), classes)
    diagram = shared.reliability("this hospital", rows, classes)
    caption = "Reliability: accuracy over confidence in 15 equal bins, with the share of images in each below"
    blocks: list[Block] = [matrix, tables.per_class(run), Figure(caption, [("", Markup(diagram))])]
    note = "The model that this hospital uses, on its own test images. Rows of the confusion matrix are the true class."
    return Section("Mistakes and calibration", blocks, note=note)


def _left(run: Run) -> Section:
    journal = _journal(run)
    rows = [
        [Cell(visit.time[:19].replace("T", " ")), Cell(f"{visit.kind} {visit.round}"), Cell(bytes_text(visit.came_in)),
         Cell(bytes_text(visit.left)), Cell(count(visit.tensors)), Cell(count(visit.numbers)),
         Cell(count(len(visit.blanked))), Cell(visit.refused or "answered")]
        for visit in journal.visits
    ]  # fmt: skip
    head = ["time (UTC)", "asked", "came in", "left", "tensors", "numbers", "blanked", "outcome"]
    asked = Table("Every request of this run, and what left in answer", head, rows)
    facts = [("lines of the journal", count(journal.lines)), ("hash of the last one", journal.hash)]
    more: list[tuple[str, Sequence[Block]]]
    more = [("Every tensor", [tables.tensors("Left this hospital", run.result.wire.up),
                              tables.tensors("Stayed here", run.result.kept_at_site)])]  # fmt: skip
    blanked = sorted({name for visit in journal.visits for name in visit.blanked})
    more += [("What this hospital's rules blanked", ["\n".join(blanked)])] if blanked else []
    note = (
        "From the journal of this hospital, which was verified line by line for this page; bytes are those of whole "
        "messages. Keep a copy of the last hash at another place: it shows later whether a line was changed."
    )
    blocks: list[Block] = [asked, facts, tables.numbers(run)]
    return Section("What left this hospital", blocks, more, note)


def _digests(run: Run) -> Section:
    again = _again(run)
    return Section("Digests", again.blocks, again.more)
