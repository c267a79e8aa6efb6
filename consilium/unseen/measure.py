"""Composition: sites that took no part, with k images of their own. In: a federated run folder. Out: unseen.json.

Every pair of k and draw is a job, whose predictions are a file: what a killed process had done is kept. Nothing that
the run left is changed. The test split of a site is read once for every k, draw and model, after the last step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilium import checkpoint, metrics, references, rounds, surroundings
from consilium.config import Config
from consilium.config_unseen import UnseenConfig
from consilium.data import SiteData
from consilium.engines import pools
from consilium.engines.simulate import Federation as Answered
from consilium.engines.simulate import assembling, num_workers, secrets_of, threads
from consilium.engines.site import Site, stack
from consilium.errors import DataError, StateError, TrainingError
from consilium.exchange import Display
from consilium.experiment import Experiment, assemble
from consilium.protocols import ServerState
from consilium.sites.federation import Federation
from consilium.tensors import Tensors, non_finite, num_elements, select
from consilium.unseen import curves
from consilium.unseen.curves import K_SHOT, LOCAL, ZERO
from consilium.unseen.newcomer import SAID, Newcomer, class_counts, trained
from consilium.unseen.shots import few

RESULT, TABLE, GUESTS = "unseen.json", "unseen.parquet", "held_out"
NOTHING = "the strategy leaves nothing for a site that took no part"
ALONE = "nothing: the strategy leaves no model that a site could train on; the baseline stands alone"


@dataclass(frozen=True)
class Guest:
    """One unseen site, with what it has of the federation (if anything) and without."""

    data: SiteData
    folder: Path  # what the visit at the end of the run left
    joined: Newcomer
    alone: Newcomer
    way: str  # "": it cannot join
    way_alone: str

    def predicted(self, name: str, shots: int, draw: int, options: UnseenConfig) -> pd.DataFrame:
        """What it says of its validation and test images after training on k images."""
        newcomer, way = (self.joined, self.way) if name == K_SHOT else (self.alone, self.way_alone)
        images = few(self.data.train, shots, newcomer.experiment.config.seed, self.data.name, draw)
        model = newcomer.adapted(images, way, options)
        if broken := non_finite(model):
            what = f"{name} at {self.data.name!r} with {shots} images per class is not finite"
            raise TrainingError(what, received=", ".join(broken[:3]), remedy="lower train.learning_rate")
        site = Site(newcomer.experiment, replace(self.data, train=images), self.folder, 0)  # which has no more
        return site.predicted(site.with_features(model)).assign(model=name, shots=shots, draw=draw)


def visited(data: Answered, prepared: Federation) -> dict[str, Answered]:
    """The federation of those that took no part, which is asked for nothing but predictions; none without them."""
    if not prepared.held_out:
        return {}
    secrets = secrets_of(data.config.draws, prepared.held_out)
    return {GUESTS: Answered(data.config, data.classes, prepared.held_out, data.folder / GUESTS, secrets)}


def measure(out: Path, experiment: Experiment, prepared: Federation, show: Display) -> None:
    """Write unseen.json and unseen.parquet of a run whose rounds are done, unless the configuration wants none.

    Raises ConfigError where the strategy has nothing of what `unseen.trains` names, DataError for a site without
    training images, TrainingError for numbers that are not finite.
    """
    options = experiment.config.unseen
    if options is None:
        return
    server = _served(out, experiment)

    def gather(own: Experiment) -> list[Guest]:
        """A thread's own: modules cannot be used by two at once."""
        local = assemble(references.reference_config(own.config, "local", {}), prepared.classes)
        return [_guest(out, own, local, server, data, options) for data in prepared.held_out.values()]

    parts = out / GUESTS / f"shots-{_key(experiment, options)}"
    with threads(experiment.config.engine.threads):
        guests = gather(experiment)
    make = partial(_again, experiment.config, prepared.classes, gather)
    zero = [_zero_shot(guest) for guest in guests]
    tables = [*zero, *_work(guests, make, options, parts, show)]
    table = stack(tables)
    checkpoint.write_bytes(out / TABLE, table.to_parquet(index=False))
    evaluation, seed = experiment.config.evaluation, experiment.config.seed
    found = curves.rows(table, prepared.classes, evaluation.bootstrap, seed)
    about = _about(out, experiment, guests, options) | _said(zero[0], guests[0])
    checkpoint.write_json(out / RESULT, metrics.without_nan({**about, "rows": found}))
    shutil.rmtree(parts, ignore_errors=True)


def check(experiment: Experiment, prepared: Federation) -> None:
    """Raise, before any training, what `measure` would raise of configuration and data. One step on one image tells
    whether a strategy keeps anything personal."""
    options, config = experiment.config.unseen, experiment.config
    if options is None:
        return
    for data in prepared.held_out.values():
        _check_images(data)
    if options.trains in ("personal", "head"):
        strategy, data = experiment.strategy, next(iter(prepared.held_out.values()))
        initial = experiment.initial(config.seed)
        server = strategy.init_server(initial, experiment.model.specs, sorted(prepared.sites))
        newcomer = Newcomer(experiment, data.name, received(experiment, server, data.name), 0)
        if newcomer.start:
            newcomer.way(options.trains, few(data.train, 1, config.seed, data.name, 0))


def _check_images(data: SiteData) -> None:
    if not len(data.train):
        remedy = "give the site training rows, or leave [unseen] out"
        raise DataError("an unseen site has no training images to draw from", received=data.name, remedy=remedy)


def _served(out: Path, experiment: Experiment) -> ServerState:
    """What the coordinator would send to a site that joins now."""
    summary, choice = checkpoint.read_json(out / "summary.json"), experiment.strategy.declares.choice
    server = rounds.load(rounds.path_of(out, summary["served_round"]), experiment.handshake.agreement).server
    if choice is None:
        return server
    return choice.take(server, experiment.model.specs, summary["chosen"]["best"])  # which no round's checkpoint holds


def _guest(
    out: Path, experiment: Experiment, local: Experiment, server: ServerState, data: SiteData, options: UnseenConfig
) -> Guest:
    _check_images(data)
    secret = secrets_of(experiment.config.draws, {data.name: data})[data.name]
    joined = Newcomer(experiment, data.name, received(experiment, server, data.name), secret)
    alone = Newcomer(local, data.name, {}, secret)
    one = few(data.train, 1, experiment.config.seed, data.name, 0)
    way = joined.way(options.trains, one) if joined.start else ""
    return Guest(data, out / GUESTS / "sites" / data.name, joined, alone, way, alone.way(None, one))


def received(experiment: Experiment, server: ServerState, site: str) -> Tensors:
    """All that a site which took no part is sent, and what every site has before anything is sent."""
    down = experiment.down(max(server.round, 1), site)
    sent = {**experiment.common_at(site), **experiment.send(server, site)}
    return select(sent, sent.keys() & down.keys())


# ------------------------------------------------------------------------------------------------ jobs
Job = tuple[int, str, int, int]  # number of the guest, model, k, draw


def _again(config: Config, classes: Sequence[str], gather: Callable[[Experiment], list[Guest]]) -> list[Guest]:
    with assembling:
        return gather(assemble(config, classes))


def _work(
    guests: Sequence[Guest], make: Callable[[], list[Guest]], options: UnseenConfig, parts: Path, show: Display
) -> list[pd.DataFrame]:
    """Predictions of all jobs in their order, those that are there already as they are. Workers are threads, whatever
    the pool; where these cannot be (see `pools.kind_of`), one job follows another."""
    jobs: list[Job] = [
        (at, name, shots, draw)
        for at, guest in enumerate(guests)
        for name in ((K_SHOT, LOCAL) if guest.way else (LOCAL,))
        for shots in options.shots
        for draw in range(options.draws)
    ]
    config = guests[0].alone.experiment.config
    workers = num_workers(config.engine.workers, len(jobs)) if pools.kind_of([config]) == "threads" else 1
    own = threading.local()
    own.guests = guests

    def table(job: Job) -> pd.DataFrame:
        at, name, shots, draw = job
        path = parts / guests[at].data.name / f"{name.replace(' ', '-')}-{shots}-{draw}.parquet"
        if not path.is_file():
            if not hasattr(own, "guests"):
                own.guests = make()
            with threads(config.engine.threads):
                found = own.guests[at].predicted(name, shots, draw, options)
            checkpoint.write_bytes(path, found.to_parquet(index=False))
        return checkpoint.read_table(path)

    with ThreadPoolExecutor(workers) as pool:
        tables = []
        try:
            for found in map(table, jobs) if workers == 1 else pool.map(table, jobs):
                tables.append(found)
                show({"event": "prepare", "what": "trained on few images", "done": len(tables), "total": len(jobs)})
        except BaseException:  # what is there stays, and what has not begun never does
            pool.shutdown(cancel_futures=True)
            raise
    return tables


def _zero_shot(guest: Guest) -> pd.DataFrame:
    """Of what a newcomer would use as it is, as the visit left it: its own start of a model, or what answers for all
    sites together (an ensemble); none where its head is untrained."""
    table = checkpoint.read_table(guest.folder / "predictions.parquet")
    rows = table[table["model"] == ("personal" if guest.way else "global")].assign(model=ZERO, shots=0, draw=0)
    return rows.head(0) if guest.way and guest.joined.untrained else rows


def _not_measured(zero: pd.DataFrame, guest: Guest) -> str:
    """Why there is no zero-shot model."""
    return "" if len(zero) else "the head of a newcomer is untrained" if guest.way else NOTHING


def _key(experiment: Experiment, options: UnseenConfig) -> str:
    """Of all that the files of jobs depend on beside the run."""
    code, versions = surroundings.code_digest(), surroundings.versions()
    text = json.dumps([options.model_dump(mode="json"), experiment.handshake.agreement, code, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ unseen.json
def _about(out: Path, experiment: Experiment, guests: Sequence[Guest], options: UnseenConfig) -> dict[str, Any]:
    """Everything but the numbers."""
    stored, first = checkpoint.read_json(out / "config.json"), guests[0]
    classes = experiment.task.classes
    return {
        "schema_version": 1,
        **{key: stored[key] for key in ("config_hash", "data_digest", "split_hash")},
        "code": surroundings.code_digest(),
        "options": options.model_dump(mode="json"),
        "earlier": _earlier(out / RESULT, options),
        "trains": {"way": first.way, "what": SAID.get(first.way, ALONE), **_trained(first)},
        "sites": {guest.data.name: _taken(guest.data, classes, experiment.config.seed, options) for guest in guests},
        "notes": [text for guest in guests for text in _fewer(guest.data, classes, options.shots)],
    }


def _said(zero: pd.DataFrame, guest: Guest) -> dict[str, Any]:
    reason = _not_measured(zero, guest)
    return {"zero_shot": {"measured": not reason, "reason": reason}}


def _earlier(path: Path, options: UnseenConfig) -> list[Any]:
    """Other options with which these test images were read before."""
    before, own = previous(path), options.model_dump(mode="json")
    read = [*before.get("earlier", []), before["options"]] if before else []
    return [each for each in read if each != own]


def previous(path: Path) -> dict[str, Any]:
    """The unseen.json that is there, empty where there is none; StateError where it is damaged."""
    found = checkpoint.read_json(path) if path.is_file() else {}
    if found and not (isinstance(found, dict) and {"options", "code", "rows"} <= found.keys()):
        raise StateError("this file lacks what was measured", where=str(path), remedy="delete it and measure again")
    return dict(found)


def _trained(guest: Guest) -> dict[str, int]:
    """How many tensors, and numbers in them, k images change."""
    if not guest.way:
        return {"tensors": 0, "parameters": 0}
    images = few(guest.data.train, 1, guest.joined.experiment.config.seed, guest.data.name, 0)
    model = guest.joined.adapted(images, guest.way, UnseenConfig(steps=1))
    names = trained(guest.joined.start, model)
    return {"tensors": len(names), "parameters": num_elements(select(model, names))}


def _taken(data: SiteData, classes: Sequence[str], seed: int, options: UnseenConfig) -> Mapping[str, Any]:
    def named(counts: Sequence[int]) -> dict[str, int]:
        return dict(zip(classes, counts, strict=True))

    images = {shots: few(data.train, shots, seed, data.name, 0) for shots in options.shots}
    return {
        "train": named(class_counts(data.train, len(classes))),
        "taken": {str(shots): named(class_counts(some, len(classes))) for shots, some in images.items()},
    }


def _fewer(data: SiteData, classes: Sequence[str], shots: Sequence[int]) -> list[str]:
    counts = np.bincount(data.train.labels, minlength=len(classes))
    found = []
    for k in shots:
        lacking = [f"{name} {counts[at]}" for at, name in enumerate(classes) if counts[at] < k]
        if lacking:
            found.append(f"{data.name}: fewer than {k} training images of {', '.join(lacking)}: all were taken")
    return found
