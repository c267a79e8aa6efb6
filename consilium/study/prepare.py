"""Composition: a study before it runs. In: a plan. Out: its jobs, each with the hash, the needs and the cost of a run.

Every distinct data set is read and decoded here, once, so that the runs beside one another find it done; every pairing
of tuner, head and strategy is tried without training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from consilium import check, references, registry, results, run, stages, surroundings
from consilium.config import Config, config_hash
from consilium.coordinator import predicted_passes
from consilium.engines import stacked
from consilium.engines.simulate import num_workers
from consilium.errors import ConfigError, ConsiliumError, DataError
from consilium.experiment import Experiment, assemble, load_backbone, pick_device
from consilium.sites.federation import Federation
from consilium.study import chosen
from consilium.study.axes import Settings, named
from consilium.study.plan import Cell, Plan, essence
from consilium.unseen import measure as unseen

Display = Callable[[Mapping[str, Any]], None]
PROCESS_BYTES = 900_000_000  # of Python and its libraries, as measured, with some room
SAFETY = 1.5  # on the estimate of what a run adds to that
ROUNDING = 0.02  # by which budgets of images may differ: a short phase is so many whole images at each site


@dataclass(frozen=True)
class Facts:
    """What was found out about a cell without running it; the same for all its seeds."""

    parameters: Mapping[str, int]
    bytes: Mapping[str, int]  # predicted, of seed 0: which sites are drawn depends on it
    image_passes: int
    memory_bytes: int
    cores: int
    device: str
    identity: Mapping[str, Any]  # what two runs must share to give the same bits, beside the configuration's hash
    hashed: Callable[[Config], str]
    stacked_sites: int  # what "auto" comes to, as the run will say; references, which only need telling apart, keep it
    images: Mapping[str, int]  # site -> number of training images
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One run of a study. `refused` says why it cannot be; then it has no needs."""

    run: str
    settings: Settings
    seed: int
    config: Config | None
    refused: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)
    references: frozenset[str] = frozenset()  # hashes of the references that it would train
    cores: int = 1
    memory_bytes: int = 0
    device: str = "cpu"
    facts: Facts | None = None

    @property
    def words(self) -> str:
        """The run in one line for people."""
        return f"{named(self.settings)}, seed = {self.seed}"

    def folder(self, out: Path) -> Path:
        """Its run folder in that of the study."""
        return out / "runs" / self.run


def prepare(plan: Plan, show: Display) -> list[Job]:
    """All runs, seed by seed, in the order of the plan. DataError, BackboneError or ConfigError where none can run."""
    found = dict(_examined(plan.cells, show))
    facts = {at: fact for at, fact in found.items() if isinstance(fact, Facts)}
    if not facts:
        raise next(error for error in found.values() if isinstance(error, ConsiliumError))
    _check_metric(plan, facts)
    _check_budget(plan, facts)
    return [_job(cell, seed, found.get(at)) for seed in plan.study.seeds for at, cell in enumerate(plan.cells)]


def _examined(cells: Sequence[Cell], show: Display) -> Iterator[tuple[int, Facts | ConsiliumError]]:
    """(number of the cell, what is known of it, or why it cannot run); cells that share data and model together."""
    valid = [(at, cell.config) for at, cell in enumerate(cells) if cell.config is not None]
    data: dict[str, Federation | ConsiliumError] = {}
    for done, (at, config) in enumerate(sorted(valid, key=lambda pair: pair[1].backbone.model_dump_json()), start=1):
        key = _data_key(config)
        if key not in data:
            data[key] = _data(config, show)
        held = data[key]
        yield at, held if isinstance(held, ConsiliumError) else _facts(config, held)
        show({"event": "prepare", "what": "configurations checked", "done": done, "total": len(valid)})


def _data_key(config: Config) -> str:
    """Configurations with the same key have the same images, prepared alike."""
    plain = config.to_dict()
    image = asdict(load_backbone(config.backbone).preprocessing)
    return json.dumps([plain["sites"], plain["task"]["classes"], image, plain["engine"]["cache"]], sort_keys=True)


def _data(config: Config, show: Display) -> Federation | ConsiliumError:
    try:
        return run.prepare(config, show)
    except (DataError, ConfigError) as error:
        return error


def _facts(config: Config, data: Federation) -> Facts | ConsiliumError:
    try:
        references.check_serving(config, data)
        device = pick_device(config.engine.device, config.train.precision)
        experiment = assemble(_on_cpu(config), data.classes)
        there = replace(experiment, setting=replace(experiment.setting, device=device))
        gathered = references.gathered(config, data)
        stacked_sites = stacked.size(stacked.resolved(there, len(gathered)).config)
        unseen.check(experiment, data)
    except (ConfigError, DataError) as error:
        return error
    images = {name: len(site.train) for name, site in data.sites.items()}
    every, names = [each for each, _ in stages.steps(config, Path())], sorted(gathered)
    sent = [check.predicted_bytes(assemble(_on_cpu(each), data.classes), names) for each in every]
    trained = {name: len(site.train) for name, site in gathered.items()}
    return Facts(
        parameters=results.parameters(experiment),
        bytes={way: sum(each[way]["total"] for each in sent) for way in ("up", "down")},
        image_passes=sum(sum(predicted_passes(each, trained).values()) for each in every),
        memory_bytes=round(SAFETY * check.memory(experiment)["total"]) + PROCESS_BYTES,
        cores=config.engine.threads * num_workers(config.engine.workers, len(data.sites)),
        device=device,
        identity=_identity(data, device),
        hashed=_hasher(experiment),
        stacked_sites=stacked_sites,
        images=images,
        warnings=(*results.warnings(experiment, data),),
    )


def _on_cpu(config: Config) -> Config:
    """Nothing is trained here, so the memory of a GPU is left alone."""
    if config.train.precision == "float16":
        return config
    return config.model_copy(update={"engine": config.engine.model_copy(update={"device": "cpu"})})


def _hasher(experiment: Experiment) -> Callable[[Config], str]:
    digest, preprocessing = experiment.backbone.digest, experiment.backbone.preprocessing
    return lambda config: config_hash(config, digest, preprocessing)


def _identity(data: Federation, device: str) -> dict[str, Any]:
    """As config.json of the run will say."""
    return {
        "data_digest": data.data_digest,
        "split_hash": data.split_hash,
        "code": surroundings.code_digest(),
        "device": device,
        "versions": surroundings.versions(),
    }


def _job(cell: Cell, seed: int, found: Facts | ConsiliumError | None) -> Job:
    config = cell.config.model_copy(update={"seed": seed}) if cell.config is not None else None
    if config is None or not isinstance(found, Facts):
        name = essence(config) if config is not None else json.dumps([dict(cell.settings), seed])
        return Job(_short(name), cell.settings, seed, config, cell.refused or str(found))
    engine = config.engine.model_copy(update={"stacked_sites": found.stacked_sites})
    identity = {"config_hash": found.hashed(config.model_copy(update={"engine": engine})), **found.identity}
    alone = [references.reference_config(config, name, found.images) for name in config.evaluation.references]
    return Job(
        run=_short(json.dumps(identity, sort_keys=True)),
        settings=cell.settings,
        seed=seed,
        config=config,
        identity=identity,
        references=frozenset(map(found.hashed, alone)),
        cores=found.cores,
        memory_bytes=found.memory_bytes,
        device=found.device,
        facts=found,
    )


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_metric(plan: Plan, facts: Mapping[int, Facts]) -> None:
    """A metric that no run would have is noticed before the first one; a class's own metric is not looked up."""
    config = next(cell.config for at, cell in enumerate(plan.cells) if at in facts and cell.config is not None)
    known = _metrics(config)
    if "." not in plan.compare.metric and plan.compare.metric not in known:
        raise ConfigError(
            "no metric of this name",
            where="compare.metric",
            allowed=", ".join(sorted(known)),
            received=plan.compare.metric,
        )


def _metrics(config: Config) -> set[str]:
    """Names of the metrics of this task, without those of single classes."""
    task = registry.build("tasks", config.task.name, config.task.options()).with_classes(("a", "b"))
    return set(task.validation(np.full((1, 2), 0.5), np.zeros(1, dtype=np.int64))) - {"loss"}


def _check_budget(plan: Plan, facts: Mapping[int, Facts]) -> None:
    """A tuning study gives each method as many tries and as many images, up to the rounding of short phases."""
    if plan.study.select is None:
        return
    cells = {at: plan.cells[at].settings for at in sorted(facts)}
    chosen.check_budget(list(cells.values()), plan.compare, plan.study.select)
    passes: dict[str, int] = {}
    for at, cell in cells.items():
        method = str(cell[str(plan.compare.method)])
        passes[method] = passes.get(method, 0) + facts[at].image_passes
    if max(passes.values()) > (1 + ROUNDING) * min(passes.values()):
        received = ", ".join(f"{name}: {count:,} images" for name, count in passes.items())
        remedy = "train every method for the same rounds and epochs"
        raise ConfigError("methods are tuned with unequal budgets", where="select", received=received, remedy=remedy)
