"""Stage 10, report. In: a `Run`. Out: the parts of its page: headline, and sections of tables, figures and facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from consilium import metrics
from consilium.report import figures, stages, tables
from consilium.report.load import Entry, Harmed, Run, Value
from consilium.report.marks import Point, padded
from consilium.report.tables import NAMES, Cell, Table
from consilium.report.text import UNDEFINED, bytes_text, count, duration, recipe

if TYPE_CHECKING:
    import pandas as pd

Facts = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """Panels (title, drawing) that share a legend; or one drawing, and another for narrow screens."""

    caption: str
    panels: Sequence[tuple[str, Markup]]
    legend: Sequence[str] = ()
    narrow: Markup | None = None


Block = Figure | Table | Facts | str


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: figures, tables, facts (name, value) and plain text; `more` is folded away."""

    title: str
    blocks: Sequence[Block]
    more: Sequence[tuple[str, Sequence[Block]]] = ()
    note: str = ""


def summary(run: Run) -> str:
    """What was trained on what, in one sentence."""
    result = run.result
    images = sum(size.train.n for size in result.sites.values())
    served = f"; served is round {result.served_round}" if result.served_round not in (None, result.rounds) else ""
    return (
        f"{recipe(run.stored.config)} on {result.backbone.name} over {len(result.sites)} sites "
        f"with {count(images)} training images of {len(result.classes)} classes; {result.rounds} rounds{served}; "
        f"seed {result.seed}."
    )


def tiles(run: Run) -> list[Tile]:
    """The headline: the served model on the test split, harm, bytes, parameters, time."""
    result, tree = run.result, tables.served(run)
    balanced, auroc = tree.get("balanced_accuracy"), tree.get("macro_auroc")
    found = [measured(f"Balanced accuracy, {_SHORT[part]}", balanced, part) for part in result.parts]
    found.append(measured("Macro AUROC, mean", auroc, "mean"))
    if result.sites_harmed is not None:
        found.append(_harm(result.sites_harmed, len(result.sites)))
    up, down = (bytes_text(way.total) for way in (result.bytes.up, result.bytes.down))
    found.append(
        Tile("Exchanged", bytes_text(result.bytes.up.total + result.bytes.down.total), f"{up} up, {down} down")
    )
    sizes = {key: count(result.parameters.get(key)) for key in ("exchanged", "trainable", "backbone")}
    detail = f"exchanged {sizes['exchanged']}, backbone {sizes['backbone']}"
    which = ", last stage" if len(result.stages) > 1 else ""
    found.append(Tile(f"Trainable parameters{which}", sizes["trainable"], detail))
    passes = f"{count(result.image_passes.get('total'))} image passes"
    return [*found, Tile("Time", duration(result.seconds), passes)]


def _harm(harmed: Harmed, num_sites: int) -> Tile:
    known = UNDEFINED if harmed.count is None else f"{harmed.count} of {num_sites}"
    details = [f"{len(harmed.negative)} below local-only by the number alone"]
    details += [f"{len(harmed.undetermined)} without an interval, unknown"] if harmed.undetermined else []
    return Tile("Sites harmed", known, "\n".join(details))


_LONG = {"mean": "mean over sites", "worst": "worst site", "pooled": "all images pooled"}
_SHORT = {"mean": "mean", "worst": "worst site", "pooled": "pooled"}


def measured(label: str, entry: Entry | None, part: str) -> Tile:
    """A metric as a headline."""
    value: Value | None = getattr(entry, part) if entry else None
    cell = tables.interval(value, (value.site or "") if value else "")
    return Tile(label, cell.text, cell.detail)


def sections(run: Run) -> list[Section]:
    """The page of one run, from results to what is needed to run it again."""
    return [
        results(run),
        *([Section("Stages", [stages.table(run)])] if run.result.stages else []),
        *([learning(run)] if run.events else []),
        *([_mistakes(run)] if run.predictions is not None else []),
        traffic(run),
        Section("Data", [tables.sites(run), tables.leakage(run)]),
        _reproduce(run),
    ]


def results(run: Run) -> Section:
    """The models on the test split."""
    shown: list[Block] = [tables.results(run, "balanced_accuracy"), _forest(run), tables.results(run, "macro_auroc")]
    unseen = tables.held_out(run)
    shown += [unseen] if unseen else []
    rest = ("accuracy", "balanced_accuracy_declared", "expected_calibration_error")
    note = (
        "Below each number its 95\u00a0% interval, from a bootstrap over whole groups at each site. A dash is a number "
        "that the test images cannot show; an interval without width is one that resampling could not vary, as with "
        "very few images, and no sign of certainty."
    )
    if run.result.sites_harmed is not None:
        note += " Harmed: the paired difference to local-only training is below zero with its whole interval."
        unknown = ", ".join(run.result.sites_harmed.undetermined)
        note += f" It is unknown, for want of an interval, at {unknown}." if unknown else ""
    if run.result.held_out is not None and unseen is None:
        note += f" Sites that took no part were not measured: {run.result.held_out.reason}."
    return Section("Results", shown, [("Other metrics", [tables.results(run, metric) for metric in rest])], note)


def _forest(run: Run) -> Figure:
    trees = {
        name: tree["balanced_accuracy"] for name, tree in tables.models(run).items() if "balanced_accuracy" in tree
    }
    rows = {site: [_point(entry.per_site.get(site)) for entry in trees.values()] for site in run.result.sites}
    rows |= {_LONG[part]: [_point(getattr(entry, part)) for entry in trees.values()] for part in run.result.parts}
    title = "Balanced accuracy on the test split by site and model"
    return wide_and_narrow(
        "Balanced accuracy on the test split, with 95\u00a0% intervals",
        lambda width: figures.forest(title, rows, "balanced accuracy", width),
        list(trees),
    )


def wide_and_narrow(caption: str, draw: Callable[[float], Markup], legend: Sequence[str]) -> Figure:
    """A drawing for wide and one for narrow screens."""
    return Figure(caption, [("", draw(720))], legend, draw(360))


def _point(value: Value | None) -> Point:
    return Point(value.value, value.low, value.high) if value else Point(None)


# ------------------------------------------------------------------------------------------------ learning
def learning(run: Run) -> Section:
    """Validation and loss over rounds."""
    metric = str(run.stored.config.evaluation.get("select", "balanced_accuracy"))
    name = NAMES.get(metric, metric)
    curves = {site: _validation(run, site, metric) for site in run.result.sites}
    losses = {site: {"Training loss": _losses(run, site)} for site in run.result.sites}
    legend = [CAME_IN, TRAINED]
    main = Figure(f"{name} on each site's validation split", _panels(run, curves, name), legend)
    blocks: list[Block] = [main, *_changes(run, curves, name)]
    blocks += [_absences(run)] if run.result.kind == "simulation" and any(missed(run).values()) else []
    folded = Figure("Mean training loss of each round", _panels(run, losses, "training loss"))
    return Section("Learning curves", blocks, [("Training loss", [folded])])


def missed(run: Run) -> dict[str, str]:
    """Per site the rounds for which it was drawn and gave no update, and why."""
    return {
        site: ", ".join(
            f"{event.round} ({event.sites[site].status})"
            for event in run.events
            if site in event.sites and event.sites[site].status not in ("ok", "not_drawn")
        )
        for site in roster(run)
    }


def roster(run: Run) -> list[str]:
    """All who were asked, also those that never answered, of whom nothing else is known."""
    return sorted({*run.result.sites, *(site for event in run.events for site in event.sites)})


def _absences(run: Run) -> Table:
    rows = [[Cell(site), Cell(rounds)] for site, rounds in missed(run).items() if rounds]
    return Table("Rounds without an update", ["site", "rounds"], rows, num_text=2)


Curve = list[tuple[int, float | None]]
CAME_IN, TRAINED = "after aggregation, as it came in", "before aggregation, after local training"


def _validation(run: Run, site: str, metric: str) -> dict[str, Curve]:
    """What came in is the model of the round before; the last one is measured when it is served."""
    seen = [(event.round, event.sites[site]) for event in run.events if site in event.sites]
    rounds = [(each.late_from or number, each.val) for number, each in seen]
    incoming = [(number - 1, val.get("incoming", {}).get(metric)) for number, val in rounds if val]
    outgoing = [(number, val.get("outgoing", {}).get(metric)) for number, val in rounds if val]
    last = (run.result.metrics.val.get("personal") or {}).get(metric)
    if last is not None and site in last.per_site and run.result.served_round == run.result.rounds:
        incoming.append((run.result.rounds, last.per_site[site].value))
    return {CAME_IN: incoming, TRAINED: outgoing}


def _changes(run: Run, curves: Mapping[str, Mapping[str, Curve]], name: str) -> list[Block]:
    """After minus before aggregation: the model that came in one round later, and the one that a site had trained."""
    changes: dict[str, Curve] = {}
    for site, series in curves.items():
        after, before = dict(series[CAME_IN]), dict(series[TRAINED])
        pairs = [(at, after.get(at), v) for at, v in sorted(before.items())]
        changes[site] = [(at, a - v) for at, a, v in pairs if a is not None and v is not None]
    if not any(changes.values()):
        return []
    span = padded([0.0, *(v for curve in changes.values() for _, v in curve if v is not None)])
    title = f"{name} after minus before aggregation: {told(changes)}"
    begins = stages.marks(run)
    drawing = figures.learning_curves(title, changes, run.events[-1].round, span, 0.0, begins)
    return [Figure(f"What aggregation changed: {name}, after minus before", [("", drawing)], list(changes))]


def _losses(run: Run, site: str) -> Curve:
    seen = [(event.round, event.sites[site]) for event in run.events if site in event.sites]
    return [(each.late_from or number, each.loss) for number, each in seen]


def _panels(run: Run, curves: Mapping[str, Mapping[str, Curve]], name: str) -> list[tuple[str, Markup]]:
    values = [v for series in curves.values() for curve in series.values() for _, v in curve if v is not None]
    span, last, begins = padded(values), run.events[-1].round, stages.marks(run)
    return [
        (site, figures.learning_curves(f"{name} at {site}: {told(series)}", series, last, span, begins=begins))
        for site, series in curves.items()
    ]


def told(series: Mapping[str, Curve]) -> str:
    """A curve in words, for those who do not see it."""
    told = []
    for name, curve in series.items():
        known = [(at, v) for at, v in curve if v is not None]
        if known:
            (first, start), (last, end) = known[0], known[-1]
            told.append(f"{name} {start:.3f} in round {first}, {end:.3f} in round {last}")
    return "; ".join(told) or "nothing recorded"


# ------------------------------------------------------------------------------------------------ mistakes
def _mistakes(run: Run) -> Section:
    assert run.predictions is not None
    table = run.predictions[run.predictions["split"] == "test"]
    table = table[table["model"] == ("personal" if (table["model"] == "personal").any() else "global")]
    by_site = {site: table[table["site"].astype(str) == site] for site in run.result.sites}
    classes = run.result.classes
    matrices = [
        tables.confusion(f"Confusion at {site}", metrics.confusion_matrix(rows, classes), classes)
        for site, rows in by_site.items()
    ]
    diagrams = [(site, reliability(site, rows, classes)) for site, rows in by_site.items()]
    caption = "Reliability: accuracy over confidence in 15 equal bins, with the share of images in each below"
    pooled = Figure(caption, [("all sites", reliability("all sites", table, classes))])
    whole = tables.confusion("Confusion over all sites", metrics.confusion_matrix(table, classes), classes)
    more: list[tuple[str, Sequence[Block]]] = [
        ("Confusion by site", matrices),
        ("Reliability by site", [Figure(caption, diagrams)]),
    ]
    note = "The served model on the test split. Rows of a confusion matrix are the true class."
    return Section("Mistakes and calibration", [whole, tables.per_class(run), pooled], more, note)


def reliability(title: str, rows: pd.DataFrame, classes: Sequence[str]) -> Markup:
    """Accuracy over confidence."""
    bins = {name: values.tolist() for name, values in metrics.reliability(rows, classes).items()}
    return figures.reliability(f"Reliability at {title}", bins["confidence"], bins["accuracy"], bins["n"])


# ------------------------------------------------------------------------------------------------ traffic
def traffic(run: Run) -> Section:
    """Bytes, tensors and numbers that left."""
    blocks: list[Block] = [tables.traffic(run), tables.by_role(run)]
    blocks += [tables.numbers(run)] if run.result.numbers else []
    if run.events:
        series = {way: [sum(e.bytes.get(way, {}).values()) for e in run.events] for way in ("up", "down")}
        rounds = [e.round for e in run.events]
        title = f"Bytes per round: {_total(series)}"
        drawing = wide_and_narrow(
            "Payload of all sites in each round",
            lambda w: figures.bars(title, rounds, series, w, stages.marks(run)),
            list(series),
        )
        blocks.insert(1, drawing)
    wire = run.result.wire
    more: list[tuple[str, Sequence[Block]]] = [
        ("Every tensor", [tables.tensors("Left the sites", wire.up), tables.tensors("Came in", wire.down),
                          tables.tensors("Stayed at the sites", run.result.kept_at_site)])
    ]  # fmt: skip
    note = (
        "Payload is the tensors behind a head of a few bytes; envelopes are the numbers and hashes around them. "
        "A coded tensor is listed in its short form; to a site that missed a round it goes in full. "
        "The bars leave out the last message to each site, which comes after the last round. "
    )
    note += _APART if run.result.kind == "deployment" else _TOGETHER
    return Section("What left each site", blocks, more, note)


_APART = "Nothing about a single image left a hospital: no answer, no probability, no name."
_TOGETHER = (
    "predictions.parquet (ids, groups and probabilities, image by image) is gathered in the run folder because "
    "this is a simulation; in a deployment it stays at the sites."
)


def _total(series: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{way} {bytes_text(sum(values))} in all rounds" for way, values in series.items())


# ------------------------------------------------------------------------------------------------ reproducibility
def _reproduce(run: Run) -> Section:
    result = run.result
    backbone = result.backbone
    facts = [
        ("backbone", f"{backbone.name}, licence {backbone.licence}"),
        ("backbone digest", backbone.digest),
        ("preprocessing", pairs(backbone.preprocessing)),
        ("configuration hash", result.config_hash),
        ("agreement hash", result.agreement_hash),
        ("split hash", result.split_hash),
        ("data digest", result.data_digest),
        ("seed", str(result.seed)),
        ("versions", pairs({"consilium": result.consilium_version, **result.versions})),
        ("hardware", pairs(result.hardware)),
        ("peak memory", bytes_text(result.peak_memory_bytes) if result.peak_memory_bytes else UNDEFINED),
        ("command", run.stored.command),
    ]
    text = run.stored.config.model_dump_json(indent=2)
    return Section("To run it again", [facts], [("Resolved configuration", [text])])


def pairs(values: Mapping[str, object]) -> str:
    """Names and values on one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items()) or UNDEFINED


# ------------------------------------------------------------------------------------------------ several runs
def compared(runs: Sequence[Run]) -> Section:
    """Table, forest plot and accuracy against bytes."""
    entries = [
        (f"{n}. {run.result.name}", tables.served(run).get("balanced_accuracy")) for n, run in enumerate(runs, 1)
    ]
    rows = {name: [_point(getattr(entry, part) if entry else None) for part in _LONG] for name, entry in entries}
    sent = [run.result.bytes.up.total + run.result.bytes.down.total for run in runs]
    points = [(name, at, rows[name][0]) for (name, _), at in zip(entries, sent, strict=True)]
    axes = ("bytes exchanged in the run", "mean over sites")
    forest = wide_and_narrow(
        "Balanced accuracy on the test split, with 95\u00a0% intervals",
        lambda width: figures.forest("Balanced accuracy by run", rows, "balanced accuracy", width),
        list(_LONG.values()),
    )
    against = wide_and_narrow(
        "Balanced accuracy, mean over sites, against bytes",
        lambda width: figures.scatter("Balanced accuracy against bytes", points, *axes, width),
        [name for name, _ in entries],
    )
    return Section("Comparison", [tables.comparison(runs), forest, against])
