"""Composition: the round loop. In: an experiment and a transport to its sites. Out: the served model, round by round.

    draw sites -> send what each lacks -> collect replies -> combine -> checkpoint

A site gets every tensor whose content differs from what its state holds, so that a site that missed rounds, or whose
reply was lost, catches up by the same rule; before its first round it holds what starts alike whatever the seed.
A round's checkpoint, written after its line in events.jsonl, closes it;
`--resume` drops the lines of rounds that were not closed and repeats them from there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from consilium import checkpoint, metrics, seeds
from consilium.config import Config
from consilium.errors import StateError, TrainingError, WireError
from consilium.experiment import Experiment
from consilium.ledger import Ledger
from consilium.local.train import plan
from consilium.messages import Reply, Request, RequestKind, check_learned, check_numbers, decode_reply, encode, size
from consilium.protocols import Failure, ServerState, Specs, Update
from consilium.tensors import Tensors, digest

LOWER_IS_BETTER = metrics.LOWER_IS_BETTER | {"loss"}
Display = Callable[[Mapping[str, object]], None]


class Transport(Protocol):
    """The seam: in process, or across hospitals."""

    def sites(self) -> tuple[str, ...]: ...

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]: ...


@dataclass
class Progress:
    """All the coordinator knows after a closed round; what a checkpoint holds."""

    server: ServerState
    receipts: dict[str, dict[str, str]] = field(default_factory=dict)  # site -> name -> digest of what its state holds
    builds_on: dict[str, int] = field(default_factory=dict)  # site -> round of its last state
    ledger: Ledger = field(default_factory=Ledger)
    class_counts: list[int] = field(default_factory=list)
    num_examples: dict[str, int] = field(default_factory=dict)  # site -> training images, as it first said
    passes: dict[str, int] = field(default_factory=dict)  # site -> images it has trained on
    site_seconds: dict[str, float] = field(default_factory=dict)  # site -> time it worked in rounds, as it said
    best: dict[str, Any] = field(default_factory=dict)  # round, value and builds_on of the best validated round
    seconds: float = 0.0


@dataclass(frozen=True)
class Answers:
    """What came back on one request to several sites. `versions`: site -> name -> digest of all a site should know."""

    replies: Sequence[Reply]  # sorted by site
    failures: Sequence[Failure]
    versions: Mapping[str, Mapping[str, str]]


@dataclass
class Coordinator:
    """Runs one federation to its end."""

    experiment: Experiment
    transport: Transport
    folder: Path
    display: Display
    explain: Callable[[Failure], str] = lambda failure: failure.message  # a simulation can read what stayed at a site

    def run(self) -> Progress:
        """All rounds, from the newest checkpoint if there is one; then the finish. Raises TrainingError, StateError."""
        progress = self._latest() or self._start()
        for number in range(progress.server.round + 1, self.experiment.config.train.rounds + 1):
            progress = self._close_round(progress, number)
        return self._finish(progress)

    # -------------------------------------------------------------------------------------------- rounds
    def _start(self) -> Progress:
        specs, sites = self.experiment.model.specs, self.transport.sites()
        initial = self.experiment.initial(self.experiment.config.seed)
        progress = Progress(self.experiment.strategy.init_server(initial, specs, sites))
        if self.experiment.task.class_counts == "federation":
            replies = self._ask(progress, "describe", 0, sites, {}).replies
            columns = zip(*(reply.numbers["class_counts"] for reply in replies), strict=True)
            progress.class_counts = [sum(column) for column in columns]
        return progress

    def _close_round(self, progress: Progress, number: int) -> Progress:
        started = perf_counter()
        before = Ledger.from_dict(progress.ledger.to_dict())
        drawn = drawn_sites(
            self.experiment.config.train.participation, self.transport.sites(), self.experiment.config.seed, number
        )
        counts = {"class_counts": progress.class_counts} if self.experiment.task.class_counts == "federation" else {}
        context = {
            **counts,
            "validate": number % self.experiment.config.evaluation.every == 0 or number == 1,
            "keep": sorted(set(progress.best.get("builds_on", {}).values())),
        }
        answers = self._ask(progress, "round", number, drawn, context)
        updates = [Update(reply.site, reply.tensors, reply.num_examples) for reply in answers.replies]
        counted, specs = [u for u in updates if u.num_examples > 0], self.experiment.model.specs
        server = self.experiment.strategy.combine(progress.server, counted, specs)
        self._judge(progress, answers.replies)
        for reply in answers.replies:  # only these sites have a new state, which holds what the request brought
            progress.builds_on[reply.site] = number
            progress.receipts.setdefault(reply.site, {}).update(answers.versions[reply.site])
            progress.passes[reply.site] = progress.passes.get(reply.site, 0) + reply.numbers["image_passes"]
            progress.site_seconds[reply.site] = progress.site_seconds.get(reply.site, 0.0) + reply.numbers["seconds"]
        seconds = perf_counter() - started
        progress = replace(progress, server=replace(server, round=number), seconds=progress.seconds + seconds)
        event = self._event(progress, before, answers, seconds)
        _write_lines(self.folder, [*_lines(self.folder, number - 1), json.dumps(event, allow_nan=False)])
        self._save(progress)
        self.display({"event": "round", **event})
        return progress

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
        """Serve the last round, or the best validated one; every site reads its test split once."""
        if self.experiment.config.evaluation.serve == "best":
            sites = self.transport.sites()
            self._judge(progress, self._ask(progress, "evaluate", progress.server.round, sites, {}).replies)
            spent = {key: getattr(progress, key) for key in ("ledger", "passes", "site_seconds", "seconds")}
            progress = replace(self._load(self._path(progress.best["round"])), **spent)
        self._ask(progress, "finish", progress.server.round, self.transport.sites(), {})
        return progress

    def visit(self, progress: Progress) -> None:
        """Let sites that took no part read their images once with the shared model; their bytes are not the run's."""
        guests = replace(progress, receipts={}, builds_on={}, num_examples={}, ledger=Ledger())
        self._ask(guests, "finish", progress.server.round, self.transport.sites(), {})

    # -------------------------------------------------------------------------------------------- messages
    def _ask(
        self, progress: Progress, kind: RequestKind, number: int, sites: Sequence[str], context: Mapping[str, Any]
    ) -> Answers:
        """Send a request to each site and collect the replies, sorted by site. TrainingError below the quorum."""
        down, up = self.experiment.down(number), self.experiment.up(number)
        requests: dict[str, bytes] = {}
        versions: dict[str, Mapping[str, str]] = {}
        for site in sorted(sites):
            news, versions[site] = ({}, {}) if kind == "describe" else self._news(progress, site)
            request = Request(
                kind, site, number, progress.builds_on.get(site, 0), self.experiment.handshake, news, context
            )
            requests[site] = encode(request, down)
            progress.ledger.add("down", site, size(requests[site]))
        answers: dict[str, Reply | Failure] = {}
        for site, data in self.transport.round(requests):
            answers[site] = data if isinstance(data, Failure) else self._read(progress, kind, site, number, data, up)
            self.display(_site_event(kind, number, site, answers[site]))
        replies = [answer for _, answer in sorted(answers.items()) if isinstance(answer, Reply)]
        failures = [answer for _, answer in sorted(answers.items()) if isinstance(answer, Failure)]
        self._enough(replies, failures, len(requests), kind, number)
        return Answers(replies, failures, versions)

    @cached_property
    def _common(self) -> dict[str, str]:
        return {name: digest(tensor) for name, tensor in self.experiment.common.items()}

    def _news(self, progress: Progress, site: str) -> tuple[Tensors, Mapping[str, str]]:
        """What the strategy has for the site and the site's state does not hold; the digests of all it has."""
        held = {**self._common, **progress.receipts.get(site, {})}
        sent = self.experiment.strategy.send(progress.server, site)
        versions = {name: digest(tensor) for name, tensor in sent.items()}
        return {name: sent[name] for name, version in versions.items() if held.get(name) != version}, versions

    def _read(
        self, progress: Progress, kind: RequestKind, site: str, number: int, data: bytes, up: Specs
    ) -> Reply | Failure:
        """A reply that can be used, or why it cannot."""
        try:
            progress.ledger.add("up", site, size(data))
            reply = decode_reply(data, up)
        except TrainingError as error:
            return Failure(site, "non_finite", str(error))
        except WireError as error:
            return Failure(site, "refused", str(error))
        if reply.failure is not None:
            failure = replace(reply.failure, site=site)
            return replace(failure, message=self.explain(failure))
        if (reply.site, reply.round) != (site, number):
            message = f"asked {site} for round {number}, got an answer of {reply.site} for round {reply.round}"
            return Failure(site, "stale", message)
        return self._counted(progress, kind, reply)

    def _counted(self, progress: Progress, kind: RequestKind, reply: Reply) -> Reply | Failure:
        """A reply whose numbers can be reckoned with: weights of the mean do not change from round to round."""
        wanted = len(self.experiment.task.classes) if self.experiment.task.class_counts == "federation" else 0
        try:
            check_numbers(kind, reply.numbers, wanted)
            check_learned(reply.numbers, self.experiment.strategy.declares.numbers)
        except WireError as error:
            return Failure(reply.site, "refused", str(error))
        known = progress.num_examples.setdefault(reply.site, reply.num_examples)
        if known != reply.num_examples:
            message = f"it has {reply.num_examples} training images now and had {known} before"
            return Failure(reply.site, "refused", message)
        return reply

    def _enough(
        self, replies: Sequence[Reply], failures: Sequence[Failure], asked: int, kind: str, number: int
    ) -> None:
        reasons = "; ".join(
            f"{failure.site}: {failure.code}, {' '.join(failure.message.split())}" for failure in failures
        )
        broken = [failure.site for failure in failures if failure.code == "non_finite"]
        if broken:
            remedy = (
                "lower train.learning_rate or mend the site's data, in a new --out; the rounds before are kept, "
                "but --resume with the same configuration and data fails here again"
            )
            raise TrainingError(
                f"non-finite numbers from site {', '.join(broken)} in round {number}",
                where=str(self.folder),
                received=reasons,
                remedy=remedy,
            )
        share = self.experiment.config.train.quorum * asked
        needed = math.ceil(share - 1e-9) if kind == "round" else asked  # 0.28 * 25 is 7 and a rounding error
        if len(replies) < max(needed, 1):
            raise TrainingError(
                f"too few sites replied to '{kind}' of round {number}: {len(replies)} of {asked}",
                where=str(self.folder),
                allowed=f"at least {needed}",
                received=reasons,
                remedy="mend the sites and run again with --resume",
            )

    # -------------------------------------------------------------------------------------------- disk
    def _path(self, number: int) -> Path:
        return self.folder / "checkpoints" / f"round-{number:05d}.safetensors"

    def _save(self, progress: Progress) -> None:
        server, number = progress.server, progress.server.round
        tensors = {f"shared/{name}": value for name, value in server.shared.items()}
        tensors |= {f"memory/{name}": value for name, value in server.memory.items()}
        meta = {"round": number, "sites": server.sites, "agreement": self.experiment.handshake.agreement}
        known = {key: getattr(progress, key) for key in _PLAIN}
        checkpoint.save(self._path(number), tensors, {**meta, **known, "ledger": progress.ledger.to_dict()})
        for path in self._path(number).parent.glob("round-*.safetensors"):
            if _number(path) not in (number - 1, number, progress.best.get("round")):
                path.unlink()

    def _load(self, path: Path) -> Progress:
        tensors, meta = checkpoint.load(path)
        if meta["agreement"] != self.experiment.handshake.agreement:
            raise StateError("this checkpoint belongs to another configuration", where=str(path))
        parts = {
            part: {
                name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")
            }
            for part in ("shared", "memory")
        }
        server = ServerState(meta["round"], tuple(meta["sites"]), parts["shared"], parts["memory"])
        return Progress(server, ledger=Ledger.from_dict(meta["ledger"]), **{key: meta[key] for key in _PLAIN})

    def _latest(self) -> Progress | None:
        """The newest whole checkpoint; lines of events.jsonl about later rounds are dropped."""
        paths = sorted((self.folder / "checkpoints").glob("round-*.safetensors"), key=_number, reverse=True)
        progress = self._newest(paths)
        _write_lines(self.folder, _lines(self.folder, progress.server.round if progress else 0))
        return progress

    def _newest(self, paths: Sequence[Path]) -> Progress | None:
        """The first that can be read: sites keep what the round after it builds on, so it is repeated bit by bit."""
        errors = []
        for path in paths:
            try:
                return self._load(path)
            except StateError as error:
                errors.append(error)
                self.display({"event": "warning", "text": f"{path} is damaged: its round is repeated"})
        if errors:
            raise errors[0]
        return None

    def _event(self, progress: Progress, before: Ledger, answers: Answers, seconds: float) -> dict[str, object]:
        sites: dict[str, Any] = {site: {"status": "not_drawn"} for site in self.transport.sites()}
        sites |= {failure.site: _status(failure) for failure in answers.failures}
        sites |= {reply.site: _status(reply) for reply in answers.replies}
        exchanged = {
            direction: {site: total - before.payload[direction].get(site, 0) for site, total in totals.items()}
            for direction, totals in progress.ledger.payload.items()
        }
        rows = [reply.numbers["val"]["incoming"] for reply in answers.replies]
        return {
            "round": progress.server.round,
            "seconds": seconds,
            "bytes": exchanged,
            "sites": sites,
            "val_mean": _means([row for row in rows if row]),  # of the model that this round started from
        }


_PLAIN = ("receipts", "builds_on", "class_counts", "num_examples", "passes", "site_seconds", "best", "seconds")


def drawn_sites(participation: float, sites: Sequence[str], seed: int, number: int) -> tuple[str, ...]:
    """The sites of a round: a share of them, at least one, drawn from (seed, round)."""
    count = max(1, round(participation * len(sites)))
    if count >= len(sites):
        return tuple(sorted(sites))
    chosen = seeds.numpy_generator(seed, round=number, purpose="participation").permutation(len(sites))[:count]
    return tuple(sorted(sorted(sites)[at] for at in chosen))


def predicted_passes(config: Config, images: Mapping[str, int]) -> dict[str, int]:
    """Images that each site will train on, by its number of training images and the rounds it is drawn in."""
    train, names = config.train, sorted(images)
    rounds = range(1, train.rounds + 1)
    drawn = Counter(site for number in rounds for site in drawn_sites(train.participation, names, config.seed, number))
    steps = {name: plan(images[name], train, None, torch.Generator()) for name in names}
    return {name: drawn[name] * sum(len(rows) for step in steps[name] for rows in step) for name in names}


def _site_event(kind: str, number: int, site: str, answer: Reply | Failure) -> dict[str, object]:
    return {"event": "site", "kind": kind, "round": number, "site": site, **_status(answer)}


def _status(answer: Reply | Failure) -> dict[str, Any]:
    if isinstance(answer, Failure):
        return {"status": answer.code, "message": answer.message}
    return {"status": "ok", **metrics.without_nan(answer.numbers)}


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    names = sorted({name for row in rows for name in row})
    known = {name: [value for row in rows if (value := row.get(name)) is not None] for name in names}
    return {name: math.fsum(values) / len(values) if values else None for name, values in known.items()}


def _lines(folder: Path, last: int) -> list[str]:
    """The lines of events.jsonl up to a round; StateError where one is no such line."""
    path = folder / "events.jsonl"
    try:
        lines = [line for line in path.read_text().splitlines() if line] if path.is_file() else []
        return [line for line in lines if json.loads(line)["round"] <= last]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError("this file cannot be read", where=str(path), received=str(error)) from error


def _write_lines(folder: Path, lines: Sequence[str]) -> None:
    checkpoint.write_bytes(folder / "events.jsonl", "".join(f"{line}\n" for line in lines).encode())


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])
