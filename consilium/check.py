"""Composition: a run before it runs. In: a configuration. Out: what would be trained, sent and needed.

The bytes are those of the serialised tensors, computed from the declared shapes and the same draws of sites that the
run will make, so they equal what the run then measures. A tensor that training or a sum leaves as it was to the last
bit (the base under `residual`, where one site replied or a factor is frozen) is not sent again, and a site that prunes
its rank sends and gets less: then they are a bound.
Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from consilium import keeping, payload, ranks, references, results, run, stage_results, stages
from consilium.config import Config
from consilium.coordinator import drawn_sites, predicted_passes
from consilium.engines import stacked
from consilium.experiment import Experiment, assemble
from consilium.protocols import Spec
from consilium.sites import audit
from consilium.unseen import measure as unseen

Table = dict[str, Any]
Way = Literal["up", "down"]


@dataclass(frozen=True)
class Check:
    """What `consilium check` prints. Bytes are of serialised tensors; memory is an estimate in bytes."""

    name: str
    parameters: Mapping[str, int]
    site_parameters: Mapping[str, Table]  # of each, where sites have ranks of their own
    bytes_per_round: Mapping[str, Table]  # sent in round 1; received by a site that lacks everything: total, per_site
    bytes: Mapping[str, Table]  # of the whole run, as result.json will say
    image_passes: Mapping[str, int]
    stacked_sites: int  # that train as one batch
    memory_bytes: Mapping[str, int]
    wire: Mapping[str, list[Table]]
    kept_at_site: list[Table]
    numbers: list[Table]  # what leaves a site beside the tensors
    state_key: str | None  # which key encrypts what sites keep, if one does
    individual_updates: bool  # the strategy looks at each site's update; False: a secure sum of them would do
    sites: Mapping[str, Table]
    split_hash: str
    leakage: Mapping[str, Any]
    warnings: tuple[str, ...]
    stages: tuple[Table, ...] = ()  # a row each; what stands above is of the last, bytes and image passes of all

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def check(config: Config) -> Check:
    """Everything a run does before training, and nothing after; raises what `run` would raise."""
    prepared = run.prepare(config, lambda _: None)
    each = [one for one, _ in stages.steps(config, Path())]
    for one in each:
        references.check_serving(one, prepared)
    gathered = references.gathered(config, prepared)
    every = [stacked.resolved(assemble(one, prepared.classes), len(gathered)) for one in each]
    experiment, names = every[-1], sorted(gathered)
    unseen.check(experiment, prepared)
    wires = [(results.both_ways(one), one.codec) for one in every]
    images = {name: len(data.train) for name, data in gathered.items()}
    effort = [(predicted_bytes(one, names), _totalled(predicted_passes(one.config, images))) for one in every]
    passes = stage_results.by_site(worked for _, worked in effort)["per_site"]
    return Check(
        name=config.name,
        parameters=results.parameters(experiment),
        site_parameters=results.site_parameters(experiment, names),
        bytes_per_round=_first_round(experiment, names).table(),
        bytes={way: stage_results.by_site(sent[way] for sent, _ in effort) for way in ("up", "down")},
        image_passes=passes,
        stacked_sites=stacked.size(experiment.config),
        memory_bytes=memory(experiment),
        wire={
            way: stage_results.union([results.wire(both[at], codec) for both, codec in wires])
            for at, way in enumerate(("up", "down"))
        },
        kept_at_site=results.wire(keeping.kept(experiment, names)),
        numbers=stage_results.union([results.numbers(one) for one in every]),
        state_key=experiment.state_key_id,
        individual_updates=experiment.strategy.declares.needs_individual_updates,
        sites={name: results.site_table(data, prepared.classes) for name, data in prepared.sites.items()},
        split_hash=prepared.split_hash,
        leakage=audit.audit(prepared.split, prepared.hashes, prepared.corrupt).to_dict(),
        warnings=(*results.warnings(experiment, prepared), *results.never_drawn(passes)),
        stages=tuple(_stage(*row) for row in zip(every, effort, strict=True)) if config.stages else (),
    )


def _first_round(experiment: Experiment, names: list[str]) -> _Book:
    """What a site receives that lacks everything, and what it then sends."""
    book = _Book(experiment, names)
    for site in names:
        book.count("down", site, 1, experiment.down(1).keys() - book.made, set())
        book.have[site] |= dict.fromkeys(experiment.down(1), 0)
        book.reply(site, experiment.config.train.rounds if experiment.strategy.declares.once else 1)
    return book


def _totalled(per_site: Mapping[str, int]) -> Table:
    return {"total": sum(per_site.values()), "per_site": per_site}


def _stage(experiment: Experiment, effort: tuple[Mapping[str, Table], Table]) -> Table:
    """What one stage trains, exchanges and leaves as it is, in scalars; its bytes both ways; its work."""
    config, (sent, passes) = experiment.config, effort
    return {
        "name": config.stages[-1].name,
        "rounds": config.train.rounds,
        "tuner": " + ".join(table.name for table in config.tuner),
        "strategy": config.strategy.name,
        **results.parameters(experiment),
        "sent": sent["up"]["total"],
        "received": sent["down"]["total"],
        "image_passes": passes["total"],
    }


def predicted_bytes(experiment: Experiment, sites: Iterable[str]) -> dict[str, Table]:
    """Play the rounds with versions instead of tensors: who is drawn, what each lacks, what each sends."""
    config, names = experiment.config, sorted(sites)
    book, rounds = _Book(experiment, names), config.train.rounds
    for number in range(1, rounds + 1):
        drawn = drawn_sites(config.train.participation, names, config.draws, number)
        for site in drawn:
            book.request(site, number)
        for site in drawn:
            book.reply(site, number)
    last = {name for name, version in book.version.items() if version == rounds}
    choice = experiment.strategy.declares.choice
    for site in names:
        for _ in choice.candidates if choice else ():  # each goes out whole, and leaves nothing
            book.count("down", site, rounds, book.lacking(site, rounds), set())
        book.request(site, rounds, whole=choice is not None)
        if config.evaluation.serve == "best":  # the chosen round's tensors go out once more
            book.count("down", site, rounds, last, last & book.alike(site))
    return book.table()


def exchanged(experiment: Experiment, sites: Iterable[str], number: int) -> dict[Way, set[str]]:
    """Names of the tensors in the two messages of a site in this round, where every site is in every round and nothing
    is coded."""
    names = sorted(sites)
    book = _Book(experiment, names)
    for each in range(1, number + 1):
        for site in names:
            book.request(site, each)
        for site in names:
            book.reply(site, each)
    return book.latest


class _Book:
    """Versions in place of tensors: `version` and the one `before` it at the coordinator, and what each site has."""

    def __init__(self, experiment: Experiment, names: Sequence[str]) -> None:
        ranks.check_names(experiment.strategy.declares.parts, names)
        self.experiment, specs, down = experiment, experiment.model.specs, experiment.down(1)
        self.bases = {name for name, spec in down.items() if spec.tag.slot == "base"}
        self.made = {name for name, spec in down.items() if spec.tag.slot == "statistic"}  # not there before a reply
        self.rows: set[str] = set()  # sites that have replied: a row each where the first dimension is free
        self.outside = (self.bases - specs.keys()) | self.made  # the sites' own, or nothing, until they change
        self.factors = {name for name, spec in down.items() if spec.factor is not None}
        self.steps = _sent_alike(experiment, names)
        self.version, self.before = dict.fromkeys(down, 0), dict.fromkeys(down, -1)
        own = {*experiment.common, *self.outside}
        self.have: dict[str, dict[str, int]] = {site: dict.fromkeys(own, 0) for site in names}
        self.totals = {"up": dict.fromkeys(names, 0), "down": dict.fromkeys(names, 0)}
        self.latest: dict[Way, set[str]] = {"up": set(), "down": set()}

    def request(self, site: str, number: int, whole: bool = False) -> None:
        """The site gets what it lacks, as a step where it has what that starts from, unless `whole`."""
        have, news = self.have[site], self.lacking(site, number)
        steps = set() if whole else news & self.alike(site)
        self.count("down", site, number, news, {n for n in steps if have.get(n) == self.before[n]})
        have |= {name: self.version[name] for name in news}

    def lacking(self, site: str, number: int) -> set[str]:
        """What the coordinator has and the site has not."""
        have = self.have[site]
        return {name for name in self.experiment.down(number) if have.get(name) != self.version[name]}

    def alike(self, site: str) -> Set[str]:
        """Coded tensors of which the site is sent the coordinator's own, and not a part of them."""
        own, specs = self.experiment.at(self.experiment.like(site)), self.experiment.model.specs
        return {name for name in self.steps if own.get(name) == specs.get(name)}

    def reply(self, site: str, number: int) -> None:
        """The site sends what it trained, as a step from what it was sent, and that has a new version."""
        sent = self.experiment.sent(number, site)
        self.rows |= {site} if sent else set()
        coded = self.experiment.codec.coded(sent).keys() & self.have[site].keys()
        self.count("up", site, number, sent.keys(), coded)
        stays = self.bases | {name.rpartition("/")[2] for name in self.made}  # what is made of it comes down instead
        changed = self.outside | (sent.keys() & self.version.keys()) - stays if sent else set()
        if sent and self.experiment.strategy.declares.refactors(number):
            changed |= self.factors
        self.before |= {name: self.version[name] for name in changed if self.version[name] != number}
        self.version |= dict.fromkeys(changed, number)

    def count(self, way: Way, site: str, number: int, names: Set[str], coded: Set[str]) -> None:
        """The payload of a message that holds these tensors, some of them coded."""
        self.latest[way] = set(names)
        held, declared = (
            [*(names - coded), *self.experiment.codec.names(coded)],
            self.experiment.wire(way, number, site),
        )
        rows = len(self.rows) * sum(_row_bytes(declared[name]) for name in names & self.made)
        self.totals[way][site] += payload.num_bytes(declared, held) + rows

    def table(self) -> dict[str, Table]:
        """{direction: {total, per_site}} of all that was counted."""
        return {way: {"total": sum(rows.values()), "per_site": rows} for way, rows in self.totals.items()}


def _row_bytes(spec: Spec) -> int:
    """Of a free first dimension; 0 where there is none."""
    first, *rest = spec.shape
    return math.prod(size or 0 for size in rest) * spec.dtype.itemsize if first is None else 0


def _sent_alike(experiment: Experiment, names: Sequence[str]) -> Set[str]:
    """The coded tensors of which every site is sent the coordinator's own; a strategy's mixtures go out in full."""
    coded, strategy = experiment.codec.coded(experiment.down(1)).keys(), experiment.strategy
    if not coded:
        return frozenset()
    server = strategy.init_server(experiment.initial(experiment.config.draws), experiment.model.specs, names)
    sent = strategy.send(server, names[0])
    return {n for n in coded & sent.keys() & server.shared.keys() if torch.equal(sent[n], server.shared[n])}


def memory(experiment: Experiment) -> dict[str, int]:
    """An estimate: weights once per process, trained tensors with gradient and moments, activations of a batch."""
    backbone, config = experiment.backbone, experiment.config
    together = stacked.size(config)
    kept = _KEPT_PER_TOKEN * backbone.num_blocks
    if config.engine.gradient_checkpointing:  # every block's input, and one block in full while it is computed again
        kept = backbone.num_blocks + _KEPT_PER_TOKEN
    size = 4 if config.train.precision == "float32" else 2
    parts = {
        "weights": backbone.num_parameters * 4,
        "trained": results.parameters(experiment)["trainable"] * 4 * _COPIES * together,
        "activations": together
        * config.train.batch_size
        * stacked.tokens(backbone)
        * backbone.num_features
        * kept
        * size,
    }
    return {**parts, "total": sum(parts.values())}


_COPIES = 4  # value, gradient, two moments
_KEPT_PER_TOKEN = (
    20  # numbers per channel that a block keeps for its gradient: norms, qkv, attention, an MLP of 4 x width
)
