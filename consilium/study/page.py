"""Composition: the page of a study. In: its folder. Out: report.html, statistics.json, tables and figures as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from consilium import checkpoint, metrics
from consilium.report import html
from consilium.report.sections import Block, Section, Tile
from consilium.report.tables import NAMES, Cell, Table
from consilium.report.text import UNDEFINED
from consilium.study import comparison, export, figures, groups, samples, selection, tables, unseen
from consilium.study.comparison import Findings, Ranking
from consilium.study.groups import COSTS, Group
from consilium.study.loading import Study, load, searched, with_references
from consilium.study.samples import Sample
from consilium.study.statistics import smallest_sign_flip

SHOWN_FACTS = ("axes", "excluded", "compare", "select", "seeds", "consilium_version", "code", "versions", "hardware")


@dataclass(frozen=True)
class Compared:
    """Groups of runs with what was found in each."""

    groups: Sequence[Group]
    found: Sequence[Findings]
    ranking: Ranking | None
    problems: Sequence[str]


def write(folder: Path) -> Path:
    """Write report.html, statistics.json, tables/ and figures/ into the study's folder; return the page's path.

    An unfinished study is shown as far as it is. Raises StateError for study.json or tables that cannot be read.
    """
    study = load(folder)
    unit = NAMES.get(study.compare.metric, study.compare.metric)
    if searched(study.about):
        numbers, parts = selection.numbers(study), [selection.section(study, unit)]
        said = selection.warnings(study)
    else:
        whole = with_references(study)
        compared = compare(whole, samples.samples(whole))
        numbers, parts = _numbers(compared), _sections(whole, compared, unit)
        said = [*compared.problems, *_left_out(compared), *_thin(compared)]
    said = [*study.notes, *_unfinished(study), *said, *map(str, study.about.get("warnings") or [])]
    head = {"name": study.name, "compare": study.compare.model_dump(mode="json"), "notes": said}
    checkpoint.write_json(folder / "statistics.json", metrics.without_nan({**head, **numbers}))
    export.write(folder, parts, [*study.notes, *_unfinished(study)])
    checkpoint.write_bytes(folder / "report.html", _page(study, unit, said, [*parts, *_runs(study)]).encode())
    return folder / "report.html"


def compare(study: Study, drawn: Mapping[str, Sample]) -> Compared:
    """All comparisons of a study that selects nothing."""
    made, compared = groups.groups(study, drawn), study.compare
    found = [comparison.findings(group, compared.metric, compared.baseline) for group in made]
    ranked = comparison.ranking(made, compared.metric) if made else None
    return Compared(made, found, ranked, samples.problems(drawn))


def _numbers(compared: Compared) -> dict[str, Any]:
    return {
        "groups": {group.name: {"seeds": list(group.seeds), **asdict(found)}
                   for group, found in zip(compared.groups, compared.found, strict=True)},
        "ranking": asdict(compared.ranking) if compared.ranking else None,
    }  # fmt: skip


def _page(study: Study, unit: str, said: Sequence[str], parts: Sequence[Section]) -> str:
    style = Markup((html.TEMPLATES / "style.css").read_text(encoding="utf-8"))
    script = Markup((html.TEMPLATES / "sort.js").read_text(encoding="utf-8"))
    template = html.environment().get_template("study.html.j2")
    return template.render(study=study, lead=_lead(study, unit), notes=said, tiles=_tiles(study), sections=parts,
                           style=style, script=script)  # fmt: skip


def _lead(study: Study, unit: str) -> str:
    compared = study.compare
    level = tables.LEVEL_NAMES[compared.level]
    within = f" within {', '.join(compared.within)}" if compared.within else ""
    seeds = ", ".join(str(seed) for seed in sorted(study.runs["seed"].unique()))
    return (
        f"Compares {compared.method}{within}: {unit.lower()}, {level}, of the {compared.model.replace('_', ' ')} model "
        f"on the {compared.split} split; seeds {seeds}."
    )


def _tiles(study: Study) -> list[Tile]:
    done, failed = len(study.finished), len(study.failed)
    detail = f"{failed} failed or refused, {study.num_missing} not finished yet"
    seeds = study.runs["seed"].nunique()
    within = ", ".join(study.compare.within or ()) or "one group"
    return [
        Tile("Runs", f"{done} of {len(study.runs)}", detail),
        Tile("Methods", str(len(study.methods)), str(study.compare.method)),
        Tile("Compared within", str(len(study.groups)), within),
        Tile("Seeds", str(seeds), "one seed says nothing about chance in training" if seeds == 1 else ""),
    ]


# ------------------------------------------------------------------------------------------------ what to say first
def _unfinished(study: Study) -> list[str]:
    said = []
    if study.num_missing:
        said.append(
            f"Unfinished: {study.num_missing} of {len(study.runs)} runs are missing; all numbers may still move."
        )
    if len(study.failed):
        said.append(
            f"{len(study.failed)} of {len(study.runs)} runs failed or were refused; they are listed under Runs."
        )
    return said


def _left_out(compared: Compared) -> list[str]:
    """Methods without a place on a logarithmic axis of bytes."""
    said: dict[str, list[str]] = {}
    for group, found in zip(compared.groups, compared.found, strict=True):
        slope = next(s for s in found.slopes if s.cost == "bytes" and s.subset == "all methods")
        for name in slope.left_out:
            said.setdefault(name, []).append(group.name)
    return [f"{name} has no bytes or no value and is in no figure or slope over bytes ({', '.join(where)})."
            for name, where in said.items()]  # fmt: skip


def _thin(compared: Compared) -> list[str]:
    counts = [count for group in compared.groups for count in group.num_seeds if count]
    if counts and min(counts) == 1:
        return ["Some means rest on a single seed: their intervals cover patients only, not chance in training."]
    return []


# ------------------------------------------------------------------------------------------------ sections
def _sections(study: Study, compared: Compared, unit: str) -> list[Section]:
    if not compared.groups:
        return []
    parts = [_results(study, compared, unit), _against(study, compared, unit), _fronts(study, compared, unit)]
    harmed = _harmed(study, compared)
    parts += [_by_site(compared, unit), *([harmed] if harmed.blocks else []), _tests(study, compared)]
    return [*parts, *unseen.sections(study, unit)]


def _results(study: Study, compared: Compared, unit: str) -> Section:
    each = [tables.main(group, found, unit) for group, found in _both(compared)]
    note = (
        "Mean over seeds. The 95\u00a0% interval is the mean \u00b1 Student's t times the standard deviation of "
        "replicates that resample patients (whole groups within each site, the same for all runs on the same images) "
        "and seeds together; degrees of freedom after Satterthwaite, so that few seeds make it wide. Sites, methods "
        "and the division of the data are fixed. Bytes are those measured in the run." + _majority(compared)
    )
    shown = [tables.overview(study, compared.groups, compared.found, unit)]
    return Section("Results", shown, [("Each group in full", each)], note)


def _majority(compared: Compared) -> str:
    known = [(group.name, float(group.facts["majority"].mean())) for group in compared.groups]
    said = ", ".join(f"{value:.3f} ({name})" for name, value in known if math.isfinite(value))
    return f" Always answering each site's most frequent class would score {said}." if said else ""


def _both(compared: Compared) -> list[tuple[Group, Findings]]:
    return list(zip(compared.groups, compared.found, strict=True))


def _against(study: Study, compared: Compared, unit: str) -> Section:
    drawn = {cost: figures.against(*_pair(compared), study.methods, cost, unit) for cost in ("bytes", "trainable")}
    forests = figures.slope_forest(*_pair(compared), "bytes")
    each = [tables.slopes(group, found) for group, found in _both(compared)]
    shown: list[Block] = [drawn["bytes"], forests, tables.slope_overview(*_pair(compared))]
    note = (
        f"The axis is {COSTS['bytes']}: what crossed the wire in the whole run, divided by sites and rounds, so that "
        "groups with different numbers of sites compare; for a fixed number of sites and rounds the slope over the "
        "total is the same. Small marks are runs, large ones means over seeds; the dotted line is the least-squares "
        "line through the means, each method counting once. The interval of a slope covers other patients of these "
        "sites and other seeds; the methods are fixed. The full tables also have an interval that resamples methods, "
        f"as if they were drawn from many, where there are at least {comparison.MIN_METHODS}."
    )
    return Section("Accuracy against what is exchanged", shown,
                   [("Over trainable parameters", [drawn["trainable"]]), ("Slopes in full, each way apart", each)],
                   note)  # fmt: skip


def _pair(compared: Compared) -> tuple[Sequence[Group], Sequence[Findings]]:
    return compared.groups, compared.found


def _fronts(study: Study, compared: Compared, unit: str) -> Section:
    note = (
        "On the front: no other method has as few bytes and as good a mean. The share is that of replicates (patients "
        "and seeds together) in which the method is on it; the cheapest method always is. A method that exchanges "
        "nothing takes part, but has no place on the axis."
    )
    shown: list[Block] = [figures.fronts(*_pair(compared), study.methods, unit)]
    return Section("Pareto front", [*shown, tables.fronts(study, *_pair(compared))], note=note)


def _by_site(compared: Compared, unit: str) -> Section:
    blocks: list[Block] = [figures.by_site(group, found, unit) for group, found in _both(compared)]
    folded = [tables.sites(group, found, unit) for group, found in _both(compared)]
    return Section("Every site", blocks, [("As tables", folded)], "Mean over seeds with the interval of above.")


def _harmed(study: Study, compared: Compared) -> Section:
    name = str(study.compare.baseline)
    with_it = [(group, found) for group, found in _both(compared) if found.harms]
    shown: list[Block] = [tables.harms(group, found, name) for group, found in with_it]
    each = [tables.site_differences(group, found, name) for group, found in with_it]
    note = (
        f"A site is below where a method's mean over seeds is less good there than that of {name}; the interval of "
        "their number is the middle 95\u00a0% of replicates (patients and seeds together). Holm's correction is over "
        "all methods and sites of the group."
    )
    return Section(f"Sites worse off than with {name}", shown, [("At each site", each)], note)


def _tests(study: Study, compared: Compared) -> Section:
    baseline = study.compare.baseline
    first = [
        tables.pairs(group, [pair for pair in found.pairs if pair.second == baseline], f"Differences to {baseline}")
        for group, found in _both(compared)
        if baseline in group.methods
    ]
    every = [tables.pairs(group, found.pairs, "All pairs") for group, found in _both(compared)]
    others = [
        tables.pairs(group, found, f"All pairs, {tables.LEVEL_NAMES[level]}")
        for group, findings in _both(compared)
        for level, found in findings.other_pairs.items()
    ]
    ranked = compared.ranking
    shown: list[Block] = []
    if ranked and ranked.ranks:
        shown = [tables.ranking(ranked), figures.rank_forest(ranked)]
    more = [("All pairs", every), ("At the other levels", others)]
    return Section("Ranks and paired tests", [*shown, *first], more, _about_tests(compared))


def _about_tests(compared: Compared) -> str:
    return " ".join([_about_ranks(compared.ranking), _about_pairs(compared)]).strip()


def _about_ranks(ranked: Ranking | None) -> str:
    if ranked is None or not ranked.ranks:
        return "No ranks: no block has a value of two methods or more."
    said = f"Ranks are over {', '.join(ranked.blocks[:3])}{' ...' if len(ranked.blocks) > 3 else ''}."
    said += f" Left out as incomplete: {', '.join(ranked.left_out)}." if ranked.left_out else ""
    if ranked.p is None or ranked.smallest_p is None:
        return said + " A Friedman test needs two blocks at least."
    said += (
        f" Friedman's test, by permutation within {ranked.tested_blocks} blocks (means over seeds, which share their "
        f"patients): statistic {ranked.statistic:.2f}, p = {ranked.p:.4f}."
    )
    if ranked.smallest_p > 0.05:
        said += (
            f" With so few blocks and methods p cannot fall below {ranked.smallest_p:.3f}: it cannot be significant."
        )
    return said + " Groups whose test images overlap are no independent evidence about patients."


def _about_pairs(compared: Compared) -> str:
    seeds = max(count for group in compared.groups for count in group.num_seeds)
    least = smallest_sign_flip(seeds)
    why = f"With {seeds} seeds a Wilcoxon test over seeds could not go below p = {least:.3g}" + (
        ", so it could never be significant" if least > 0.05 else ""
    )
    return (
        "Pairs are compared on the same test images: each replicate draws the same patients and the same seeds for "
        "both, and p is that of Student's t of the difference over its standard deviation, corrected after Holm over "
        "all pairs of the group. As few seeds hardly show how much seeds vary, their variance is taken to be at least "
        f"the mean over all pairs. {why}; this test sees the patients too."
    )


def _runs(study: Study) -> list[Section]:
    rows = [
        [Cell(str(r.run)), Cell(str(r.method)), Cell(str(r.group)), Cell(str(r.seed)), Cell(str(r.status))]
        for r in study.runs.itertuples()
    ]
    every = Table("Every run of the plan", ["run", "method", "group", "seed", "status"], rows, num_text=5)
    blocks: list[Block] = [tables.failed(study)] if len(study.failed) else [[("failed or refused", "none")]]
    facts = [(key.replace("_", " "), _text(study.about[key])) for key in SHOWN_FACTS if study.about.get(key)]
    more: list[tuple[str, Sequence[Block]]] = []
    if study.about.get("study"):
        more.append(("The study file, resolved", [json.dumps(study.about["study"], indent=2)]))
    note = "study.json also holds what each run was of: hashes of its configuration, data and code."
    return [Section("Runs", blocks, [("Every run", [every])]), Section("To run it again", [facts], more, note)]


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_text(inner)}" for key, inner in value.items()) or UNDEFINED
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_text(inner) for inner in value) or UNDEFINED
    return UNDEFINED if value is None else str(value)
