"""Composition: the round loop. In: an experiment and a transport to its sites. Out: the served model, round by round.

    draw sites -> send what each lacks -> combine the replies as they come -> checkpoint

A site gets every tensor whose content differs from what its state holds, so that a site that missed rounds, or whose
reply was lost, catches up by the same rule; before its first round it holds what starts alike whatever the seed.
A round's checkpoint, written after its line in events.jsonl, closes it;
`--resume` drops the lines of rounds that were not closed and repeats them from there.

Where `expect` is given, a reply that comes while the next round is open stands for the site's reply to that one, with
the same weight: its tensors enter the sum of that round, and the site goes on from the state that it reached with them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from consilium import metrics, registry, rounds, seeds, stages
from consilium.config import Config
from consilium.errors import TrainingError
from consilium.exchange import Display, Exchange, Partners, Transport, Updates
from consilium.experiment import Experiment
from consilium.ledger import Ledger
from consilium.local.train import plan
from consilium.messages import Reply, RequestKind
from consilium.protocols import Failure, ServerState
from consilium.rounds import Progress, Versions

LOWER_IS_BETTER = metrics.LOWER_IS_BETTER | {"loss"}


@dataclass
class Coordinator:
    """Runs one federation to its end."""

    experiment: Experiment
    transport: Transport
    folder: Path
    display: Display
    explain: Callable[[Failure], str] = lambda failure: failure.message  # a simulation can read what stayed at a site
    remote: bool = False  # sites whose disks cannot be read: they send their metrics, and may be away at the end
    ends: bool = True  # no stage follows, so sites read their test split
    expect: Callable[[Collection[str]], None] | None = None  # told whose reply to the last round may yet count
    owed: dict[str, Versions] = field(default_factory=dict)  # of these: what they were sent in it; in no checkpoint

    def run(self) -> Progress:
        """All rounds, from the newest checkpoint if there is one; then the finish. Raises TrainingError, StateError."""
        progress = self._latest() or self._start()
        for number in range(progress.server.round + 1, self.experiment.config.train.rounds + 1):
            progress = self._close_round(progress, number)
        return self._finish(progress)

    # -------------------------------------------------------------------------------------------- rounds
    def _start(self) -> Progress:
        specs, sites = self.experiment.model.specs, self.transport.sites()
        left = stages.start(self.folder, self.experiment)
        initial = {**self.experiment.initial(self.experiment.config.draws), **left}
        progress = Progress(self.experiment.strategy.init_server(initial, specs, sites))
        if self.experiment.task.class_counts == "federation":
            replies = self._ask(progress, "describe", 0, sites)
            columns = zip(*(reply.numbers["class_counts"] for reply in replies), strict=True)
            progress.class_counts = [sum(column) for column in columns]
        return progress

    def _close_round(self, progress: Progress, number: int) -> Progress:
        started = perf_counter()
        before = Ledger.from_dict(progress.ledger.to_dict())
        exchange = self._exchange(progress, "round", number, self._drawn(number), self._context(progress, number))
        if self.expect is not None:
            exchange.owed = self.owed
            self.expect(self.owed.keys())
        server = self._broadcast(progress, self._combined(progress.server, exchange))
        replies = [*exchange.replied.values()]
        self._judge(progress, [reply for reply in replies if reply.round == number])
        progress.take_receipts({reply.site: exchange.known(reply) for reply in replies})
        for reply in replies:  # only these sites have a new state, which holds what the request brought
            progress.builds_on[reply.site] = reply.round
            self._add_work(progress, reply)
        self.owed = exchange.overdue
        seconds = perf_counter() - started
        progress = replace(progress, server=replace(server, round=number), seconds=progress.seconds + seconds)
        event = self._event(progress, before, exchange, seconds)
        rounds.add_line(self.folder, event)
        self._save(progress)
        self.display({"event": "round", **event})
        return progress

    def _drawn(self, number: int) -> tuple[str, ...]:
        config = self.experiment.config
        return drawn_sites(config.train.participation, self.transport.sites(), config.draws, number)

    def _context(self, progress: Progress, number: int) -> dict[str, Any]:
        return {
            **self._counts(progress),
            "validate": number % self.experiment.config.evaluation.every == 0 or number == 1,
            "keep": sorted(set(progress.best.get("builds_on", {}).values())),
        }

    def _combined(self, server: ServerState, exchange: Exchange) -> ServerState:
        """The next state from updates that are read as they come, and kept only where the strategy looks at each."""
        strategy, specs = self.experiment.strategy, self.experiment.model.specs
        if strategy.declares.needs_individual_updates:
            return strategy.combine(server, list(exchange.updates()), specs)
        updates = exchange.updates()
        found = strategy.combine(server, Updates(updates), specs)
        for _ in updates:  # a strategy may leave them unread; the sites have worked all the same
            pass
        return found

    def _broadcast(self, progress: Progress, server: ServerState) -> ServerState:
        """The state to go on from: its tensors are what sites hold once they are up to date, whatever a codec lost."""
        codec, down = self.experiment.codec, self.experiment.down(progress.server.round + 1)
        shared, progress.broadcast = codec.broadcast(progress.server.shared, server.shared, progress.broadcast, down)
        return replace(server, shared=shared)

    def _judge(self, progress: Progress, replies: Sequence[Reply]) -> None:
        """What came in is the round before, validated: remember the best round by the unweighted mean of sites."""
        evaluation, judged = self.experiment.config.evaluation, progress.server.round
        rows = [row for reply in replies if (row := reply.numbers["val"]["incoming"])]
        if evaluation.serve == "last" or judged < 1 or not rows:
            return
        mean = _means(rows).get(evaluation.select)
        if mean is None:
            remedy = "choose another evaluation.select, or serve = 'last'"
            raise TrainingError(f"no site's validation images define {evaluation.select}", remedy=remedy)
        sign = -1 if evaluation.select in LOWER_IS_BETTER else 1
        if not progress.best or sign * mean > sign * progress.best["value"]:
            progress.best = {"round": judged, "value": mean, "builds_on": dict(progress.builds_on)}

    def _finish(self, progress: Progress) -> Progress:
        """Serve the last round, or the best validated one; sites read their test split once, when no stage follows."""
        if self.experiment.config.evaluation.serve == "best":
            sites = self.transport.sites()
            self._judge(progress, self._ask(progress, "evaluate", progress.server.round, sites))
            spent = {key: getattr(progress, key) for key in ("ledger", "passes", "site_seconds", "seconds")}
            progress = replace(self._load(progress.best["round"]), **spent)
        progress = self._choose(progress)
        last = self.experiment.strategy.declares.finish_epochs > 0  # a last local phase
        context = {"train": True, **self._counts(progress)} if last else {}
        context |= {"metrics": True} if self.remote else {}
        context |= {} if self.ends else {"test": False}
        replies = self._ask(progress, "finish", progress.server.round, self.transport.sites(), context)
        for reply in replies if last else ():
            self._add_work(progress, reply)
        return replace(progress, tested={reply.site: reply.numbers.get("metrics") for reply in replies})

    def _choose(self, progress: Progress) -> Progress:
        """The state that the strategy's candidates are best in, by the unweighted mean of sites' validation."""
        choice, specs = self.experiment.strategy.declares.choice, self.experiment.model.specs
        if choice is None:
            return progress
        found: dict[str, float] = {}
        for name in choice.candidates:
            asked = replace(progress, server=choice.take(progress.server, specs, name))
            replies = self._ask(asked, "evaluate", progress.server.round, self.transport.sites())
            value = _means([reply.numbers["val"]["incoming"] for reply in replies]).get(choice.select)
            if value is None:
                remedy = "give sites validation images, choose another select, or fix what is to be chosen"
                raise TrainingError(f"no site's validation images define {choice.select}", remedy=remedy)
            found[name] = value
        sign = -1 if choice.select in LOWER_IS_BETTER else 1
        best = max(choice.candidates, key=lambda name: sign * found[name])
        server = choice.take(progress.server, specs, best)
        return replace(progress, server=server, chosen={"best": best, "select": choice.select, "candidates": found})

    def _counts(self, progress: Progress) -> dict[str, Any]:
        return {"class_counts": progress.class_counts} if self.experiment.task.class_counts == "federation" else {}

    def _add_work(self, progress: Progress, reply: Reply) -> None:
        progress.passes[reply.site] = progress.passes.get(reply.site, 0) + reply.numbers["image_passes"]
        progress.site_seconds[reply.site] = progress.site_seconds.get(reply.site, 0.0) + reply.numbers["seconds"]

    def visit(self, progress: Progress) -> None:
        """Let sites that took no part read their images once with the shared model; their bytes are not the run's."""
        guests = replace(progress, receipts={}, builds_on={}, num_examples={}, ledger=Ledger())
        self._ask(guests, "finish", progress.server.round, self.transport.sites())

    # -------------------------------------------------------------------------------------------- sites and disk
    @cached_property
    def _partners(self) -> Partners:
        return Partners(self.experiment, self.transport, self.folder, self.display, self.explain, self.remote)

    def _exchange(
        self, progress: Progress, kind: RequestKind, number: int, sites: Sequence[str], context: Mapping[str, Any]
    ) -> Exchange:
        return Exchange(self._partners, progress, kind, number, sites, context)

    def _ask(
        self,
        progress: Progress,
        kind: RequestKind,
        number: int,
        sites: Sequence[str],
        context: Mapping[str, Any] | None = None,
    ) -> list[Reply]:
        """The replies, all of them, to a question whose answers hold no tensors. TrainingError below the quorum."""
        return list(self._exchange(progress, kind, number, sites, context or {}))

    def _save(self, progress: Progress) -> None:
        rounds.save(self.folder, progress, self.experiment.handshake.agreement)

    def _load(self, number: int) -> Progress:
        return rounds.load(rounds.path_of(self.folder, number), self.experiment.handshake.agreement)

    def _latest(self) -> Progress | None:
        """The newest whole checkpoint; lines of events.jsonl about later rounds are dropped."""

        def warn(path: Path) -> None:
            self.display({"event": "warning", "text": f"{path} is damaged: its round is repeated"})

        progress = rounds.newest(self.folder, self.experiment.handshake.agreement, warn)
        last = rounds.drop_lines(self.folder, progress.server.round if progress else 0)
        late = sorted(site for site, each in last.get("sites", {}).items() if each["status"] == "late")
        if late and self.expect is not None:
            text = f"late replies to round {last['round']} are dropped, as it was closed before: {', '.join(late)}"
            self.display({"event": "warning", "text": text})
        return progress

    def _event(self, progress: Progress, before: Ledger, exchange: Exchange, seconds: float) -> dict[str, object]:
        replies = exchange.replied.values()
        sites: dict[str, Any] = {site: {"status": "not_drawn"} for site in self.transport.sites()}
        sites |= {failure.site: exchange.status(failure) for failure in exchange.failures}
        sites |= {reply.site: exchange.status(reply) for reply in replies}
        exchanged = {
            direction: {site: total - before.payload[direction].get(site, 0) for site, total in totals.items()}
            for direction, totals in progress.ledger.payload.items()
        }
        rows = [reply.numbers["val"]["incoming"] for reply in replies if reply.round == progress.server.round]
        return {
            "round": progress.server.round,
            "seconds": seconds,
            "bytes": exchanged,
            "sites": sites,
            "val_mean": _means([row for row in rows if row]),  # of the model that this round started from
        }


def drawn_sites(participation: float, sites: Sequence[str], seed: int, number: int) -> tuple[str, ...]:
    """The sites of a round: a share of them, at least one, drawn from (seed, round)."""
    count = max(1, round(participation * len(sites)))
    if count >= len(sites):
        return tuple(sorted(sites))
    chosen = seeds.numpy_generator(seed, round=number, purpose="participation").permutation(len(sites))[:count]
    return tuple(sorted(sorted(sites)[at] for at in chosen))


def predicted_passes(config: Config, images: Mapping[str, int]) -> dict[str, int]:
    """Images that each site will train on: by their number, the rounds it is drawn in, what the strategy does in these
    and at the end."""
    train, names = config.train, sorted(images)
    rounds = range(1, train.rounds + 1)
    declares = registry.build("strategies", config.strategy.name, config.strategy.options()).declares
    passes: Counter[tuple[str, float | None]] = Counter()
    for number in rounds:
        for site in drawn_sites(train.participation, names, config.draws, number):
            passes.update((site, epochs) for epochs in declares.passes(number))
    passes.update((site, declares.finish_epochs) for site in names if declares.finish_epochs)
    found = dict.fromkeys(names, 0)
    for (site, epochs), times in passes.items():
        steps = plan(images[site], train, epochs, torch.Generator())
        found[site] += times * sum(len(rows) for step in steps for rows in step)
    return found


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    names = sorted({name for row in rows for name in row})
    known = {name: [value for row in rows if (value := row.get(name)) is not None] for name in names}
    return {name: math.fsum(values) / len(values) if values else None for name, values in known.items()}
