"""Composition: what a run leaves behind. In: a finished federation. Out: predictions, adapters, result, report."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilium import __version__, checkpoint, keeping, members, metrics, registry, stage_results, stages, surroundings
from consilium.aggregation import ROBUST, cut_off
from consilium.coordinator import drawn_sites
from consilium.data import Examples, SiteData
from consilium.engines.site import stack
from consilium.experiment import Experiment
from consilium.filters.codec import Codec
from consilium.protocols import Specs
from consilium.rounds import Progress
from consilium.sealing import Seal, sealed
from consilium.sites.federation import Federation
from consilium.tensors import Tensors

SPLITS = ("val", "test")


def collect(folder: Path, experiment: Experiment, progress: Progress) -> None:
    """Gather what the sites of a simulation left on their disks: predictions and adapters; then close the run."""
    tables = [checkpoint.read_table(path) for path in sorted((folder / "sites").glob("*/predictions.parquet"))]
    checkpoint.write_bytes(folder / "predictions.parquet", stack(tables).to_parquet(index=False))
    for served in sorted((folder / "sites").glob("*/served.safetensors")):
        site = served.parent.name
        seal = sealed("model", experiment.state_key, experiment.handshake.agreement, site)
        tensors, _ = checkpoint.load(served, seal)
        _save_adapter(folder / "adapters" / f"{site}.safetensors", tensors, experiment, site, seal)
    close(folder, experiment, progress)


def close(folder: Path, experiment: Experiment, progress: Progress) -> None:
    """What a coordinator knows without any site's disk: the global adapter. summary.json comes last."""
    models = experiment.strategy.deploy(progress.server.shared, stages.frozen(folder, experiment))
    if "global" in models and members.names(models["global"]) >= experiment.model.specs.keys():
        _save_adapter(folder / "adapters" / "global.safetensors", models["global"], experiment, "global")
    checkpoint.write_json(folder / "summary.json", summary(progress))


def summary(progress: Progress) -> dict[str, Any]:
    """What a coordinator counted, and which round is served."""
    passes = {site: progress.passes.get(site, 0) for site in sorted(progress.server.sites)}
    worked = {site: progress.site_seconds.get(site, 0.0) for site in sorted(progress.server.sites)}
    return {
        "bytes": progress.ledger.summary(),
        "image_passes": {"total": sum(passes.values()), "per_site": passes},
        "seconds": progress.seconds,  # on the clock, also while references or other programs run beside
        "site_seconds": {"total": sum(worked.values()), "per_site": worked},
        "served_round": progress.server.round,
        **({"chosen": progress.chosen} if progress.chosen else {}),
    }


def _save_adapter(path: Path, tensors: Tensors, experiment: Experiment, name: str, seal: Seal | None = None) -> None:
    meta = {
        "model": name,
        "backbone": experiment.backbone.name,
        "backbone_digest": experiment.backbone.digest,
        "preprocessing": vars(experiment.backbone.preprocessing),
        "classes": list(experiment.task.classes),
        "agreement_hash": experiment.handshake.agreement,
        "tuner": [table.model_dump(mode="json") for table in experiment.config.tuner],
    }
    checkpoint.save(path, tensors, meta, seal)


def write(out: Path, places: Sequence[stages.Place], federation: Federation, plans: Sequence[str]) -> None:
    """Compute every number of result.json from the files of the run folder and write it. `places`: of every stage."""
    experiment = places[-1].experiment
    table = checkpoint.read_table(out / "predictions.parquet")
    counted, names = checkpoint.read_json(out / "summary.json"), sorted(federation.sites)
    result: dict[str, Any] = {
        **head(experiment, names, checkpoint.read_json(out / "config.json")),
        **counted,
        "hardware": surroundings.hardware(experiment.setting.device, experiment.config.engine),
        "peak_memory_bytes": surroundings.peak_memory(),
        "sites": {name: site_table(data, federation.classes) for name, data in federation.sites.items()},
        "warnings": [*warnings(experiment, federation), *never_drawn(counted["image_passes"]["per_site"])],
        "metrics": trees(table, experiment, names),
    }
    result |= _compared(out, experiment, federation, table, [name for name in plans if name in ("local", "pooled")])
    if federation.held_out:
        result["held_out"] = _held_out(out, experiment, federation)
    if experiment.config.stages:
        result |= stage_results.summed(result, [_stage(place, names) for place in places])
    checkpoint.write_json(out / "result.json", metrics.without_nan(result))


def head(
    experiment: Experiment, names: Sequence[str], stored: Mapping[str, Any], remote: bool = False
) -> dict[str, Any]:
    """What every result says of its run, wherever it took place. `stored`: the run folder's config.json, whose versions
    and digests are those that the run began with; `remote`: as for `numbers`."""
    up, down = both_ways(experiment)
    began = {"agreement_hash": experiment.handshake.agreement, "versions": surroundings.versions()}
    return {
        "schema_version": 1,
        "name": experiment.config.name,
        "consilium_version": __version__,
        "seed": experiment.config.seed,
        **began,
        **{key: stored[key] for key in ("config_hash", "split_hash", "data_digest", *began) if key in stored},
        "backbone": {
            "name": experiment.backbone.name,
            "digest": experiment.backbone.digest,
            "licence": experiment.backbone.licence,
            "preprocessing": vars(experiment.backbone.preprocessing),
        },
        "classes": list(experiment.task.classes),
        "parameters": parameters(experiment),
        "site_parameters": site_parameters(experiment, names),
        "rounds": experiment.config.train.rounds,
        "wire": {"up": wire(up, experiment.codec), "down": wire(down, experiment.codec)},
        "kept_at_site": wire(keeping.kept(experiment, names)),
        "numbers": numbers(experiment, remote),
    }


def _stage(place: stages.Place, names: Sequence[str]) -> dict[str, Any]:
    """What result.json says of one stage."""
    folder, experiment = place.folder, place.experiment
    up, down = both_ways(experiment)
    told = {name: checkpoint.read_json(path / "summary.json") for name, path in _with_references(folder).items()}
    table = checkpoint.read_table(folder / "predictions.parquet")
    return {
        "name": experiment.config.stages[-1].name,
        "rounds": experiment.config.train.rounds,
        "parameters": parameters(experiment),
        **told["run"],
        "references": {name: summary for name, summary in told.items() if name != "run"},
        "wire": {"up": wire(up, experiment.codec), "down": wire(down, experiment.codec)},
        "numbers": numbers(experiment),
        "frozen": wire(experiment.frozen),
        "metrics": {"val": trees(table, experiment, names)["val"]},
    }


def _with_references(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in sorted((folder / "references").glob("*")) if (path / "summary.json").is_file()}
    return {"run": folder, **found}


def trees(table: pd.DataFrame, experiment: Experiment, names: Sequence[str]) -> dict[str, Any]:
    """{split: {model: metric tree}} of a table of predictions."""
    return {
        split: {
            str(model): _tree(rows, experiment, names)
            for model, rows in table[table["split"] == split].groupby("model")
        }
        for split in SPLITS
    }


def _tree(rows: pd.DataFrame, experiment: Experiment, names: Sequence[str]) -> Any:
    config = experiment.config
    return experiment.task.metrics(rows, bootstrap=config.evaluation.bootstrap, seed=config.seed, sites=names)


def _compared(
    out: Path, experiment: Experiment, federation: Federation, table: pd.DataFrame, references: Sequence[str]
) -> dict[str, Any]:
    """Majority class, references, and which sites the federation harmed."""
    config, names, classes = experiment.config, sorted(federation.sites), federation.classes
    used = _test_rows(table)
    counts = {
        name: np.bincount(data.train.labels, minlength=len(classes)).tolist() for name, data in federation.sites.items()
    }
    bootstrap, seed = config.evaluation.bootstrap, config.seed
    found: dict[str, Any] = {"references": {}, "majority": {}}
    if len(used):
        found["majority"] = {"test": metrics.majority_baseline(counts, used, classes, bootstrap=bootstrap, seed=seed)}
    for name in references:
        folder = out / "references" / name
        predictions = checkpoint.read_table(folder / "predictions.parquet")
        summary = checkpoint.read_json(folder / "summary.json")
        found["references"][name] = {"metrics": trees(predictions, experiment, names), **summary}
        if name == "local" and len(used):
            found["sites_harmed"] = metrics.sites_harmed(
                used, _test_rows(predictions), classes, bootstrap=bootstrap, seed=seed
            )
    return found


def _test_rows(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["split"] == "test") & (table["model"] == "personal")]


def _held_out(out: Path, experiment: Experiment, federation: Federation) -> dict[str, Any]:
    """Sites that took no part: their validation and test images, with the shared model. Their training images may show
    patients who also occur at a site that took part."""
    tables = [
        checkpoint.read_table(path) for path in sorted((out / "held_out" / "sites").glob("*/predictions.parquet"))
    ]
    table = stack(tables)
    if not len(table):
        return {"metrics": None, "reason": "they have no validation or test images"}
    rows = table[table["model"] == "global"]
    if not len(rows):
        return {"metrics": None, "reason": "the strategy leaves no global model for a site that took no part"}
    return {"metrics": {"global": _tree(rows, experiment, sorted(federation.held_out))}}


def report(out: Path) -> Path:
    """Render report.html; StateError where it cannot be written."""
    target = out / "report.html"
    try:
        importlib.import_module("consilium.report.html").render([out], target)
    except OSError as error:
        raise checkpoint.not_written(target, error) from error
    return target


def outcome(out: Path) -> dict[str, Any]:
    """The closing event: where things lie and the headline of the test split."""
    result = checkpoint.read_json(out / "result.json")
    tree = result["metrics"]["test"].get("personal", {}).get("balanced_accuracy", {})
    headline = {f"balanced_accuracy_{part}": tree[part] for part in ("mean", "worst", "pooled") if part in tree}
    return {"result": str(out / "result.json"), "report": str(out / "report.html"), "headline": headline}


def parameters(experiment: Experiment) -> dict[str, int]:
    """Scalars of the backbone, and of what a site trains and sends in a round (the first: tuners may choose anew; the
    last, of a strategy that sends in no other)."""
    found = {"backbone": experiment.backbone.num_parameters, **_of_site(experiment, "")}
    return {**found, "frozen": _count(experiment.frozen)} if experiment.config.stages else found  # of stages before


def site_parameters(experiment: Experiment, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """What each site trains and sends in a round, where sites have ranks of their own."""
    ranked = any(part.ranks for part in experiment.strategy.declares.parts)
    return {site: _of_site(experiment, site) for site in names} if ranked else {}


def _of_site(experiment: Experiment, site: str) -> dict[str, int]:
    active, sends = (
        experiment.active(1, site),
        experiment.config.train.rounds if experiment.strategy.declares.once else 1,
    )
    trained = {name: spec for name, spec in experiment.at(site).items() if active(spec.tag)}
    return {"trainable": _count(trained) + experiment.model.inert, "exchanged": _count(experiment.sent(sends, site))}


def _count(specs: Specs) -> int:
    return sum(int(np.prod([size or 0 for size in spec.shape])) for spec in specs.values())


def wire(specs: Specs, codec: Codec | None = None) -> list[dict[str, Any]]:
    """One row per tensor: name, role, shape, type, bytes; of a coded tensor the type and the bytes that it has then."""
    coded = codec.coded(specs) if codec is not None else {}
    return [
        {
            "name": name,
            "role": spec.tag.role,
            "shape": list(spec.shape),
            "dtype": codec.width if codec and name in coded else str(spec.dtype).split(".")[-1],
            "bytes": codec.num_bytes(spec) if codec and name in coded else _count({name: spec}) * spec.dtype.itemsize,
        }
        for name, spec in sorted(specs.items())
    ]


def both_ways(experiment: Experiment) -> tuple[Specs, Specs]:
    """Everything that may leave a site, and that may reach one, in any round."""
    rounds = range(1, experiment.config.train.rounds + 1)
    up, down = ({n: s for number in rounds for n, s in way(number).items()} for way in (experiment.up, experiment.down))
    return up, down


def numbers(experiment: Experiment, remote: bool = False) -> list[dict[str, str]]:
    """One row per number that leaves a site beside the tensors: name, when it is sent, what it says. `remote`: sites
    whose folders the coordinator cannot read, so that they send their metrics."""
    every, best = experiment.config.evaluation.every, experiment.config.evaluation.serve == "best"
    task, rounds = experiment.task, "every round"
    worked = f"{rounds}, and at the end"
    quick = task.validation(np.full((1, len(task.classes)), 1 / len(task.classes)), np.zeros(1, dtype=np.int64))
    validated = rounds if every == 1 else f"round 1 and every {every} rounds"
    about = f"on the site's validation images: {', '.join(sorted(quick))}"
    rows = [
        ("num_examples", "every reply", "number of training images"),
        ("loss", rounds, "mean training loss"),
        ("num_steps", rounds, "optimiser steps"),
        ("image_passes", worked, "images trained on"),
        ("seconds", worked, "time that the site took"),
        ("val.incoming", f"{validated}{', and at the end' if best else ''}", f"the model as it came in, {about}"),
        ("val.outgoing", validated, f"the model as it was trained, {about}"),
        ("models", "at the end", f"names of the models that were tested{'' if remote else '; no result of a test'}"),
        ("failure", "where a request fails", "a code and a message; of a text that may name data, its digest"),
    ]
    if task.class_counts == "federation":
        rows.insert(1, ("class_counts", "once, before round 1", "number of training images of each class"))
    if remote:
        what = "every metric of the task on the site's validation and on its test images, with interval and n"
        rows.append(("metrics", "at the end", what))
    own = experiment.strategy.declares.numbers
    rows += [(f"learned.{name}", rounds, what) for name, what in sorted(own.items())]
    return [dict(zip(("name", "sent", "what"), row, strict=True)) for row in rows]


def warnings(experiment: Experiment, federation: Federation) -> list[str]:
    """Sentences about the data, and about the method."""
    return [*federation.warnings, *about_method(experiment, list(federation.sites))]


def about_method(experiment: Experiment, sites: Sequence[str]) -> list[str]:
    """Sentences about a federation in which nothing is shared, or all images are, and keys without effect."""
    found, strategy, declares = list[str](), experiment.config.strategy.name, experiment.strategy.declares
    if declares.pools_images:
        found.append(f"{strategy!r} trains on the images of all sites in one place, which only a simulation can do")
    if not any(declares.passes(number) for number in range(1, experiment.config.train.rounds + 1)):
        found.append(f"{strategy!r} trains nothing at the sites: of all keys of train, participation alone counts")
    if strategy != "local" and not both_ways(experiment)[0]:
        found.append(f"nothing is shared: with this tuner and head, {strategy!r} is every site training alone")
    found += _not_robust(experiment, sites)
    prefixes = experiment.setting.prefixes()
    if prefixes is not None and prefixes.refused:
        found.append(
            f"engine.prefix_cache has no effect: {experiment.backbone.name} cannot be split between its blocks"
        )
    codec = experiment.config.wire.codec
    if codec != "float32" and not any(experiment.codec.coded(way) for way in both_ways(experiment)):
        found.append(f"wire.codec = {codec!r} changes nothing: no trained float32 parameter travels")
    return found


def _not_robust(experiment: Experiment, sites: Sequence[str]) -> list[str]:
    table, train = experiment.config.strategy, experiment.config.train
    options = registry.parse_options(registry.get("strategies", table.name), table.options())
    kind, trim = getattr(options, "aggregate", table.name), getattr(options, "trim", None) or 0.0
    count = len(drawn_sites(train.participation, sites, 0, 1)) if kind in ROBUST else 0
    idle = count and not cut_off(kind, trim, count)
    return [f"{kind} of the {count} sites of a round leaves none out: it is their uniform mean"] if idle else []


def never_drawn(passes: Mapping[str, int]) -> list[str]:
    """Sites that were drawn in no round; what is personal there is as it started. None where no site ever trains."""
    idle = sorted(site for site, count in passes.items() if not count and any(passes.values()))
    first = ", ".join(idle[:5]) + (" ..." if len(idle) > 5 else "")
    many = "1 site" if len(idle) == 1 else f"{len(idle)} sites"
    return [f"{many} took part in no round, so nothing that was trained there counts: {first}"] if idle else []


def site_table(data: SiteData, classes: Sequence[str]) -> dict[str, Any]:
    """Images, groups and images per class of each split."""
    return {split: _split_table(getattr(data, split), classes) for split in ("train", "val", "test")}


def _split_table(examples: Examples, classes: Sequence[str]) -> dict[str, Any]:
    counts = np.bincount(examples.labels, minlength=len(classes))
    return {
        "n": len(examples),
        "groups": len(set(examples.groups.tolist())),
        "classes": {name: int(counts[at]) for at, name in enumerate(classes)},
    }
