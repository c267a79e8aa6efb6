"""Composition: a whole run. In: a configuration. Out: a run folder with adapters, metrics, bytes and a report.

    config -> sites -> backbone -> tuner -> local training -> message -> combine -> deploy + evaluate -> report

The references (every site alone; all data in one place) are runs of the same kind in sub-folders, with the same number
of image passes; a finished reference of a neighbouring run folder that only differs in its strategy is used again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from consilium import checkpoint, results
from consilium.config import Config, EvaluationConfig, StrategyConfig, config_hash
from consilium.coordinator import Coordinator, Display, Progress
from consilium.engines.simulate import Federation, Recorder, Simulation, num_workers, secrets_of
from consilium.errors import ConfigError, StateError
from consilium.experiment import Experiment, assemble, load_backbone
from consilium.protocols import SiteData
from consilium.sites import federation as sites

MAIN = "run"


@dataclass(frozen=True)
class Plan:
    """One of the runs of a folder: the run itself, or a reference."""

    config: Config
    data: Federation
    experiment: Experiment


def run(
    config: Config, out: Path, *, resume: bool = False, display: Display | None = None, record: Recorder | None = None
) -> Path:
    """Simulate a federation into the folder `out` and return it.

    Raises ConfigError, DataError or BackboneError before training, TrainingError during it and StateError where `out`
    does not fit; earlier results stay intact and `resume` continues after the last closed round, bit by bit.
    """
    show = display or (lambda _: None)
    with checkpoint.locked(out):
        prepared = prepare(config, show)
        plans = make_plans(config, prepared, out)
        digest = plans[MAIN].experiment.backbone.digest
        for plan in plans.values():
            _open(plan, prepared, digest, resume)
        if not (out / "result.json").is_file():
            _train(plans, prepared, show, record)
            results.write(out, plans[MAIN].experiment, prepared, list(plans))
        results.report(out)
        show({"event": "finish", **results.outcome(out)})
    return out


def prepare(config: Config, show: Display) -> sites.Federation:
    """Read, split and decode the data as the backbone wants its images."""
    preprocessing = load_backbone(config.backbone).preprocessing

    def tell(done: int, total: int) -> None:
        show({"event": "prepare", "what": "images decoded", "done": done, "total": total})

    return sites.prepare(config.sites, config.task.classes, preprocessing, config.engine.cache, tell)


def make_plans(config: Config, prepared: sites.Federation, out: Path) -> dict[str, Plan]:
    """The run and the references it asks for, by name."""
    check_serving(config, prepared)
    plans = {MAIN: _plan(config, prepared, dict(prepared.sites), out)}
    for name in config.evaluation.references:
        data = {"pooled": sites.pool(prepared)} if name == "pooled" else dict(prepared.sites)
        alone = reference_config(config, name, len(prepared.sites))
        plans[name] = _plan(alone, prepared, data, out / "references" / name)
    return plans


def reference_config(config: Config, name: str, num_sites: int) -> Config:
    """The same training without a federation: strategy local, every site in every round, the same image passes."""
    steps = config.train.local_steps
    pooled_steps = steps * num_sites if steps is not None and name == "pooled" else steps
    train = config.train.model_copy(update={"participation": 1.0, "quorum": 1.0, "local_steps": pooled_steps})
    evaluation = EvaluationConfig.model_validate({**config.evaluation.model_dump(), "references": ()})
    changes = {"name": f"{name} reference", "strategy": StrategyConfig(name="local"), "train": train}
    return config.model_copy(update={**changes, "evaluation": evaluation})


def check_serving(config: Config, prepared: sites.Federation) -> None:
    """ConfigError where serve = "best" could not be decided."""
    if config.evaluation.serve == "best" and config.train.participation < 1:
        remedy = "use serve = 'last', or participation = 1"
        raise ConfigError(
            "serve = 'best' needs every site's validation in every round", remedy=remedy, where="evaluation.serve"
        )
    if config.evaluation.serve == "best" and not any(len(data.val) for data in prepared.sites.values()):
        raise ConfigError("serve = 'best' needs validation images", where="evaluation.serve")


def _plan(config: Config, prepared: sites.Federation, data: dict[str, SiteData], folder: Path) -> Plan:
    federation = Federation(config, prepared.classes, data, folder, secrets_of(config.seed, data))
    return Plan(config, federation, assemble(config, prepared.classes))


def _open(plan: Plan, prepared: sites.Federation, backbone: str, resume: bool) -> None:
    """Make the folder, or make sure that it belongs to this very configuration and these very data."""
    folder, path = plan.data.folder, plan.data.folder / "config.json"
    known = {
        "config_hash": config_hash(plan.config, backbone),
        "data_digest": prepared.data_digest,
        "split_hash": prepared.split_hash,
        "code": results.code_digest(),
    }
    if path.is_file():
        stored = checkpoint.read_json(path)
        different = [key for key, value in known.items() if stored.get(key) != value]
        if different:
            raise StateError(
                "this run folder belongs to another configuration, other data or another version",
                where=str(folder),
                received=f"different: {', '.join(different)}",
                remedy="choose another --out",
            )
        if not resume:
            raise StateError(
                "this run folder already holds a run",
                where=str(folder),
                remedy="add --resume to continue it, or choose another --out",
            )
        return
    if any(child.name != ".lock" and child.name != "references" for child in folder.glob("*")):
        raise StateError("the folder is not empty and holds no run", where=str(folder), remedy="choose another --out")
    checkpoint.write_bytes(folder / "split.parquet", prepared.split.to_parquet(index=False))
    checkpoint.write_json(
        path,
        {
            **known,
            "agreement_hash": plan.experiment.handshake.agreement,
            "classes": prepared.classes,
            "versions": results.versions(),
            "config": plan.config.to_dict(),
        },
    )


def _train(
    plans: Mapping[str, Plan], prepared: sites.Federation, show: Display, record: Recorder | None
) -> dict[str, Progress]:
    engine = plans[MAIN].config.engine
    todo = {name: plan for name, plan in plans.items() if not _reused(plan, name, show)}
    federations = {name: plan.data for name, plan in todo.items()}
    if prepared.held_out:
        secrets = secrets_of(plans[MAIN].config.seed, prepared.held_out)
        folder = plans[MAIN].data.folder / "held_out"
        federations["held_out"] = replace(plans[MAIN].data, sites=prepared.held_out, secrets=secrets, folder=folder)
    with Simulation(federations, num_workers(engine.workers, len(prepared.sites)), record) as simulation:

        def one(name: str) -> Progress:
            return _federate(simulation, todo[name], name, bool(prepared.held_out), show)

        if simulation.workers == 1:
            return {name: one(name) for name in todo}
        with ThreadPoolExecutor(len(todo)) as threads:  # they only wait for the worker processes
            return dict(zip(todo, threads.map(one, todo), strict=True))


def _federate(simulation: Simulation, plan: Plan, name: str, visit: bool, show: Display) -> Progress:
    here = show if name == MAIN else _as_reference(name, show)
    folder, transport = plan.data.folder, simulation.transport(name)
    here(
        {
            "event": "start",
            "name": plan.config.name,
            "sites": transport.sites(),
            "rounds": plan.config.train.rounds,
            "out": str(folder),
        }
    )
    coordinator = Coordinator(plan.experiment, transport, folder, here)
    progress = coordinator.run()
    if visit and name == MAIN:
        replace(coordinator, transport=simulation.transport("held_out")).visit(progress)
    results.collect(folder, plan.experiment, progress)
    return progress


def _as_reference(name: str, show: Display) -> Callable[[Mapping[str, object]], None]:
    def tell(event: Mapping[str, object]) -> None:
        if event["event"] in ("start", "round"):
            show({**event, "event": "reference", "name": name, "kind": event["event"]})

    return tell


def _reused(plan: Plan, name: str, show: Display) -> bool:
    """Copy a finished reference of the same configuration, data and code from a neighbouring run folder."""
    folder = plan.data.folder
    if name == MAIN or (folder / "summary.json").is_file():
        return name != MAIN
    mine = checkpoint.read_json(folder / "config.json")
    for other in sorted(folder.parents[2].glob(f"*/references/{name}/summary.json")):
        theirs = checkpoint.read_json(other.parent / "config.json")
        if all(theirs.get(key) == mine[key] for key in ("config_hash", "data_digest", "split_hash", "code")):
            shutil.copytree(other.parent, folder, dirs_exist_ok=True)
            show({"event": "reference", "name": name, "kind": "reused", "from": str(other.parent)})
            return True
    return False
