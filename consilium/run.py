"""Composition: a whole run. In: a configuration. Out: a run folder with adapters, metrics, bytes and a report.

    config -> sites -> backbone -> tuner -> local training -> message -> combine -> deploy + evaluate -> report

The references (every site alone; all data in one place) are runs of the same kind in sub-folders, with the same number
of image passes; a finished reference of a neighbouring run folder that only differs in its strategy is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from consilium import references, results, run_folder, stages, surroundings
from consilium.config import Config, config_hash
from consilium.coordinator import Coordinator
from consilium.data import SiteData
from consilium.engines import stacked
from consilium.engines.simulate import Federation, Recorder, Simulation, num_workers, secrets_of
from consilium.engines.state import check_room
from consilium.exchange import Display
from consilium.experiment import Experiment, assemble, load_backbone
from consilium.progress import one_at_a_time
from consilium.sealing import read_key
from consilium.sites import federation as sites
from consilium.unseen import measure as unseen

MAIN = "run"


@dataclass(frozen=True)
class Plan:
    """One of the runs of a folder: the run itself, or a reference."""

    data: Federation
    experiment: Experiment

    @property
    def place(self) -> stages.Place:
        """Where its stage, or the whole of it, lies."""
        return stages.Place(self.data.folder, self.experiment)


def run(
    config: Config, out: Path, *, resume: bool = False, display: Display | None = None, record: Recorder | None = None
) -> Path:
    """Simulate a federation into the folder `out` and return it.

    Raises ConfigError, DataError or BackboneError before training, TrainingError during it and StateError where `out`
    does not fit; earlier results stay intact and `resume` continues after the last closed round, bit by bit.
    """
    show, out = one_at_a_time(display), out.resolve()  # references look for neighbours of the folder
    if resume and not (out / "config.json").is_file():
        show({"event": "warning", "text": f"there is no run to resume in {out}: starting one"})
    with run_folder.claimed(out, resume):
        prepared = prepare(config, show)
        steps = [make_plans(each, prepared, folder) for each, folder in stages.steps(config, out)]
        for plan in (plan for plans in reversed(steps) for plan in plans.values()):
            _open(plan, prepared)
        if not (out / "result.json").is_file():
            for number, plans in enumerate(steps):  # one, unless the configuration has [[stages]]
                _hand_over(steps[number - 1] if number else {}, plans, prepared)
                _train(plans, prepared, show, record, ends=plans is steps[-1])
            unseen.measure(out, steps[-1][MAIN].experiment, prepared, show)
            results.write(out, [plans[MAIN].place for plans in steps], prepared, list(steps[-1]))
        results.report(out)
        show({"event": "finish", **results.outcome(out)})
    return out


def prepare(config: Config, show: Display) -> sites.Federation:
    """Read, split and decode the data as the backbone wants its images."""
    read_key(config.engine.state_key_file, config.engine.state_key_variable)  # refused before images are read
    preprocessing = load_backbone(config.backbone).preprocessing

    def tell(done: int, total: int) -> None:
        if done * 100 // total > (done - 1) * 100 // total:  # whole per cents are news enough
            show({"event": "prepare", "what": "images decoded", "done": done, "total": total})

    prepared = sites.prepare(config.sites, config.task.classes, preprocessing, config.engine.cache, tell)
    for text in prepared.warnings:
        show({"event": "warning", "text": text})
    return prepared


def make_plans(config: Config, prepared: sites.Federation, out: Path) -> dict[str, Plan]:
    """The run and the references it asks for, by name."""
    references.check_serving(config, prepared)
    plans = {MAIN: _plan(config, prepared, references.gathered(config, prepared), out)}
    unseen.check(plans[MAIN].experiment, prepared)
    for name in config.evaluation.references:
        alone, data = references.reference(config, name, prepared)
        plans[name] = _plan(alone, prepared, data, out / "references" / name)
    return plans


def _plan(config: Config, prepared: sites.Federation, data: dict[str, SiteData], folder: Path) -> Plan:
    experiment = stacked.resolved(assemble(config, prepared.classes), len(data))
    federation = Federation(experiment.config, prepared.classes, data, folder, secrets_of(config.draws, data))
    return Plan(federation, experiment)


def _identity(plan: Plan, prepared: sites.Federation) -> dict[str, object]:
    """What two runs must share to give the same bits."""
    backbone = plan.experiment.backbone
    return {
        "config_hash": config_hash(plan.data.config, backbone.digest, backbone.preprocessing),
        "data_digest": prepared.data_digest,
        "split_hash": prepared.split_hash,
        "code": surroundings.code_digest(),
        "device": plan.experiment.setting.device,
        "versions": surroundings.versions(),
        "state_key": plan.experiment.state_key_id,
    }


def _open(plan: Plan, prepared: sites.Federation) -> None:
    agreed = plan.experiment.handshake.agreement
    facts = {"agreement_hash": agreed, "classes": prepared.classes, "config": plan.data.config.to_dict()}
    check_room(plan.experiment, plan.data.folder, plan.data.sites)
    run_folder.open_run(plan.data.folder, _identity(plan, prepared), facts, prepared.split.to_parquet(index=False))


def _hand_over(before: Mapping[str, Plan], after: Mapping[str, Plan], prepared: sites.Federation) -> None:
    for name, plan in before.items():
        stages.hand_over(plan.place, after[name].place, prepared.held_out if name == MAIN else ())


def _train(
    plans: Mapping[str, Plan], prepared: sites.Federation, show: Display, record: Recorder | None, *, ends: bool
) -> None:
    engine = plans[MAIN].data.config.engine
    todo = {name: plan for name, plan in plans.items() if not _is_there(plan, name, prepared, show)}
    federations = {name: plan.data for name, plan in todo.items()}
    visit = bool(prepared.held_out) and ends
    federations |= unseen.visited(plans[MAIN].data, prepared) if visit else {}
    with Simulation(federations, num_workers(engine.workers, len(prepared.sites)), record) as simulation:

        def one(name: str) -> None:
            _federate(simulation, todo[name], name, visit, ends, show)

        if simulation.workers == 1:
            for name in todo:
                one(name)
            return
        with ThreadPoolExecutor(max(len(todo), 1)) as threads:  # they only wait for the worker processes
            try:
                running = {threads.submit(one, name) for name in todo}
                while running:  # without a pause, an interrupt that another thread catches would never be heard here
                    done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            except BaseException:  # an error or an interrupt ends them all; each can be resumed
                simulation.stop()
                raise


def _federate(simulation: Simulation, plan: Plan, name: str, visit: bool, ends: bool, show: Display) -> None:
    here = show if name == MAIN else _as_reference(name, show)
    folder, transport = plan.data.folder, simulation.transport(name)
    facts = {"name": plan.data.config.title, "sites": transport.sites(), "rounds": plan.data.config.train.rounds}
    here({"event": "start", **facts, "out": str(folder)})
    coordinator = Coordinator(plan.experiment, transport, folder, here, simulation.explain(name), ends=ends)
    progress = coordinator.run()
    if visit and name == MAIN:
        guests, explain = simulation.transport(unseen.GUESTS), simulation.explain(unseen.GUESTS)
        replace(coordinator, transport=guests, explain=explain).visit(progress)
    stages.close(folder, plan.experiment, progress.server, ends)
    results.collect(folder, plan.experiment, progress)


def _as_reference(name: str, show: Display) -> Callable[[Mapping[str, object]], None]:
    def tell(event: Mapping[str, object]) -> None:
        if event["event"] in ("start", "round"):
            show({**event, "event": "reference", "name": name, "kind": event["event"]})
        elif event["event"] == "warning":
            show(event)

    return tell


def _is_there(plan: Plan, name: str, prepared: sites.Federation, show: Display) -> bool:
    """Whether a plan is finished here already, or a reference in a neighbouring run folder, from where it is copied."""
    if name == MAIN or run_folder.is_done(plan.data.folder):
        return run_folder.is_done(plan.data.folder)
    if (origin := run_folder.take_over(plan.data.folder, _identity(plan, prepared))) is not None:
        show({"event": "reference", "name": name, "kind": "reused", "from": str(origin)})
    return origin is not None
