"""Stage 10, report. In: a `Run`. Out: its tables, as rows of cells that a template prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilium.report.load import Entry, MetricTree, Run, SplitSize, Value, WireTensor
from consilium.report.text import UNDEFINED, bytes_text, count, duration, recipe, shape

NAMES = {
    "balanced_accuracy": "Balanced accuracy",
    "balanced_accuracy_declared": "Balanced accuracy over all declared classes",
    "macro_auroc": "Macro AUROC",
    "accuracy": "Accuracy",
    "expected_calibration_error": "Expected calibration error",
}


@dataclass(frozen=True)
class Cell:
    """`text` with a smaller `detail`, a `badge` (its first word is its style), and a `heat` of 0 to 1 behind it; on a
    page that sorts, `sort` is the number to sort by."""

    text: str
    detail: str = ""
    badge: str = ""
    heat: float | None = None
    sort: float | None = None


@dataclass(frozen=True)
class Table:
    """A row starts with its header; the last `num_summary` rows sum up the others; `num_text` columns are text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    num_summary: int = 0
    note: str = ""
    num_text: int = 1


# ------------------------------------------------------------------------------------------------ results
def models(run: Run, split: str = "test") -> dict[str, MetricTree]:
    """Every model that was measured on a split, by the name it has in the report; the served one first."""
    result = run.result
    trees = result.metrics.test if split == "test" else result.metrics.val
    found: dict[str, MetricTree] = {}
    if "personal" in trees and trees.get("global") == trees["personal"]:
        found["Served (the global model)"] = trees["personal"]
    else:
        found |= {
            name: trees[k] for k, name in (("personal", "Served at the site"), ("global", "Global")) if k in trees
        }
    if "before_aggregation" in trees:
        found["Before the last aggregation"] = trees["before_aggregation"]
    for key, name in (("local", "Local only"), ("pooled", "Pooled training")):
        reference = result.references.get(key)
        tree = _served(getattr(reference.metrics, split)) if reference else None
        if tree:
            found[name] = tree
    if split in result.majority:
        found["Majority class"] = result.majority[split]
    return found


def _served(trees: Mapping[str, Mapping[str, Entry]]) -> MetricTree | None:
    return trees.get("personal") or trees.get("global")


def served(run: Run) -> MetricTree:
    """The test metrics of the model the sites use; empty where nothing was tested."""
    return _served(run.result.metrics.test) or {}


def results(run: Run, metric: str) -> Table:
    """One metric on the test split: a row per site, mean, worst and pooled; a column per model."""
    trees = {name: tree[metric] for name, tree in models(run).items() if metric in tree}
    rows = [_site_row(run, site, metric, list(trees.values())) for site in run.result.sites]
    summary = [_summary_row(part, list(trees.values())) for part in run.result.parts]
    title, tested = f"{NAMES.get(metric, metric)} on the test split", run.result.metrics.test
    same = "personal" in tested and tested.get("before_aggregation") == tested["personal"]
    note = _SAME if same and metric == "balanced_accuracy" else ""
    return Table(title, ["site", "images", *trees], [*rows, *summary], len(summary), note=note)


_SAME = (
    "The model before the last aggregation has the numbers of the served one: where sites serve what they trained "
    "themselves, it is the same model."
)


def _site_row(run: Run, site: str, metric: str, entries: Sequence[Entry]) -> list[Cell]:
    values = [entry.per_site.get(site) for entry in entries]
    n = next((value.n for value in values if value is not None), run.result.sites[site].test.n)
    cells = [interval(value) for value in values]
    harmed = run.result.sites_harmed
    if cells and harmed is not None and harmed.metric == metric and site in (*harmed.sites, *harmed.negative):
        badge = "harmed" if site in harmed.sites else "below local"
        cells[0] = Cell(cells[0].text, cells[0].detail, badge)
    return [Cell(site), Cell(count(n)), *cells]


def _summary_row(part: str, entries: Sequence[Entry]) -> list[Cell]:
    values: list[Value] = [getattr(entry, part) for entry in entries]
    title = {"mean": "mean over sites", "worst": "worst site", "pooled": "all images pooled"}[part]
    cells = [interval(value, value.site or "") for value in values]
    return [Cell(title), Cell(count(values[0].n if values and part != "worst" else None)), *cells]


def held_out(run: Run) -> Table | None:
    """Sites that took no part in training, all their images, with the global model."""
    trees = (run.result.held_out.metrics if run.result.held_out else None) or {}
    shown = [metric for metric in NAMES if metric in trees.get("global", {})]
    if not shown:
        return None
    entries = [trees["global"][metric] for metric in shown]
    rows = [
        [
            Cell(site),
            Cell(count(entries[0].per_site[site].n)),
            *(interval(entry.per_site.get(site)) for entry in entries),
        ]
        for site in entries[0].per_site
    ]
    head = ["site", "images", *(NAMES[metric] for metric in shown)]
    return Table("Sites that took no part, global model", head, rows)


def per_class(run: Run) -> Table:
    """Sensitivity and specificity of every class, pooled; and its sensitivity at every site."""
    tree, sites = served(run), list(run.result.sites) if run.result.parts else []
    rows = []
    for name in run.result.classes:
        sensitivity, specificity = tree.get(f"sensitivity.{name}"), tree.get(f"specificity.{name}")
        per_site = [sensitivity.per_site.get(site) if sensitivity else None for site in sites]
        both = [interval(entry.pooled if entry else None) for entry in (sensitivity, specificity)]
        with_n = [interval(v, f"n = {v.n}" if v else "") for v in per_site]
        rows.append([Cell(name), Cell(count(sensitivity.pooled.n if sensitivity else None)), *both, *with_n])
    head = ["class", "images", "sensitivity", "specificity", *(f"sensitivity at {site}" for site in sites)]
    return Table("Per class on the test split, served model", head, rows)


def confusion(title: str, matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> Table:
    """Counts; the colour behind a count is its share of the row."""
    rows = []
    for name, counts in zip(classes, matrix, strict=True):
        total = max(int(counts.sum()), 1)
        rows.append([Cell(name), *(Cell(count(int(k)), heat=float(k) / total) for k in counts)])
    return Table(title, ["true ↓ answer →", *classes], rows)


# ------------------------------------------------------------------------------------------------ data and traffic
def sites(run: Run) -> Table:
    """Images, groups and classes of every split at every site."""
    rows = [
        _split_row(f"{site}, {split}", getattr(size, split), run.result.classes)
        for site, size in run.result.sites.items()
        for split in ("train", "val", "test")
    ]
    totals = [
        _split_row(
            f"all sites, {split}", _add([getattr(s, split) for s in run.result.sites.values()]), run.result.classes
        )
        for split in ("train", "val", "test")
    ]
    return Table("Images by site, split and class", ["site and split", "images", "groups", *run.result.classes],
                 [*rows, *(totals if run.result.parts else [])], 3 if run.result.parts else 0)  # fmt: skip


def _split_row(title: str, size: SplitSize, classes: Sequence[str]) -> list[Cell]:
    counts = [size.classes.get(name, 0) for name in classes]
    heats = [Cell(count(k), heat=k / max(size.n, 1)) for k in counts]
    return [Cell(title), Cell(count(size.n)), Cell(count(size.groups)), *heats]


def _add(sizes: Sequence[SplitSize]) -> SplitSize:
    names = {name for size in sizes for name in size.classes}
    known = [size.groups for size in sizes if size.groups is not None]
    return SplitSize(
        n=sum(size.n for size in sizes),
        groups=sum(known) if len(known) == len(sizes) else None,
        classes={name: sum(size.classes.get(name, 0) for size in sizes) for name in names},
    )


def leakage(run: Run) -> list[tuple[str, str]]:
    """What the stored split says of groups that could leak; empty where the folder has no split."""
    if run.split is None:
        return []
    assigned = run.split[run.split["split"].isin(["train", "val", "test"])]
    by_group = assigned.groupby("group").agg(sites=("site", "nunique"), splits=("split", "nunique"))
    divided = int((by_group["splits"] > 1).sum())
    return [
        ("groups", count(len(by_group))),
        ("groups in more than one split", f"{count(divided)}, a leak" if divided else "none"),
        ("groups at more than one site", count(int((by_group["sites"] > 1).sum()))),
        ("images without a split", count(len(run.split) - len(assigned))),
    ]


def traffic(run: Run) -> Table:
    """Bytes of the whole run by site."""
    up, down = run.result.bytes.up, run.result.bytes.down
    names = [site for site in run.result.sites if site in up.per_site or site in down.per_site]
    rows = [
        [Cell(s), Cell(bytes_text(up.per_site.get(s, 0))), Cell(bytes_text(down.per_site.get(s, 0)))] for s in names
    ]
    total = [Cell("all sites"), Cell(bytes_text(up.total)), Cell(bytes_text(down.total))]
    control = run.result.bytes.control
    envelope = [Cell("envelopes, beside it"), *(Cell(bytes_text(control.get(way, 0))) for way in ("up", "down"))]
    return Table("Bytes over the whole run", ["site", "left the site", "came in"], [*rows, total, envelope], 2)


def by_role(run: Run) -> Table:
    """What left a site, what came in and what stayed, summed by role."""
    parts = {"left": run.result.wire.up, "came in": run.result.wire.down, "stayed": run.result.kept_at_site}
    rows = []
    for part, tensors in parts.items():
        for role in sorted({tensor.role for tensor in tensors}):
            own = [tensor for tensor in tensors if tensor.role == role]
            known = [t.bytes for t in own if t.bytes is not None]
            size = bytes_text(sum(known)) if len(known) == len(own) else UNDEFINED
            rows.append([Cell(part), Cell(role), Cell(count(len(own))), Cell(size)])
        if not tensors:
            rows.append([Cell(part), Cell("none"), Cell("0"), Cell("0 B")])
    return Table("Tensors by role", ["", "role", "tensors", "bytes"], rows, num_text=2)


def numbers(run: Run) -> Table:
    """What else left a site: counts, losses and metrics."""
    rows = [[Cell(each.name), Cell(each.sent), Cell(each.what)] for each in run.result.numbers]
    return Table("Numbers that left each site beside the tensors", ["name", "sent", "what"], rows, num_text=3)


def tensors(title: str, listed: Sequence[WireTensor]) -> Table:
    """Every named tensor."""
    rows = [
        [Cell(t.name), Cell(t.role), Cell(shape(t.shape)),
         Cell(t.dtype), Cell(bytes_text(t.bytes) if t.bytes is not None else UNDEFINED)]
        for t in listed
    ]  # fmt: skip
    nothing = [[Cell("none"), *[Cell("")] * 4]]
    return Table(title, ["name", "role", "shape", "type", "bytes"], rows or nothing, num_text=4)


# ------------------------------------------------------------------------------------------------ several runs
def comparison(runs: Sequence[Run]) -> Table:
    """One row per run."""
    head = ["run", "mean over sites", "worst site", "pooled", "macro AUROC, mean", "sites harmed", "bytes", "trainable",
            "exchanged", "image passes", "time"]  # fmt: skip
    rows = [_run_row(number, run) for number, run in enumerate(runs, start=1)]
    note = "Balanced accuracy unless named otherwise; parameters trainable and exchanged; bytes up and down together."
    return Table("Served model on the test split", head, rows, note=note)


def _run_row(number: int, run: Run) -> list[Cell]:
    result, tree = run.result, served(run)
    balanced, auroc = tree.get("balanced_accuracy"), tree.get("macro_auroc")
    parts = [getattr(balanced, part) if balanced else None for part in ("mean", "worst", "pooled")]
    measured = [interval(value, value.site or "" if value else "") for value in [*parts, auroc.mean if auroc else None]]
    harmed = count(result.sites_harmed.count if result.sites_harmed else None)
    numbers = [harmed, bytes_text(result.bytes.up.total + result.bytes.down.total)]
    numbers += [count(result.parameters.get(key)) for key in ("trainable", "exchanged")]
    numbers += [count(result.image_passes.get("total")), duration(result.seconds)]
    told = f"{recipe(run.stored.config)}, seed {result.seed}\n{result.backbone.name}"
    return [Cell(f"{number}. {result.name}", told), *measured, *map(Cell, numbers)]


def interval(value: Value | None, detail: str = "") -> Cell:
    """A number in three digits with its interval below."""
    if value is None or value.value is None:
        return Cell(UNDEFINED, detail)
    known = value.low is not None and value.high is not None
    limits = f"{value.low:.3f} to {value.high:.3f}" if known else "no interval"
    return Cell(f"{value.value:.3f}", f"{limits}\n{detail}" if detail else limits)
