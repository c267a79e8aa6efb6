"""Composition: one question to several sites. In: a coordinator's progress. Out: the replies, checked, one by one.

A request is encoded when the transport takes it and a reply is handed on as soon as all sites before it have replied,
so that neither pile up: what is kept of a site is its numbers. Sites that lack the same tensors share one payload.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from consilium import messages, metrics, payload
from consilium.errors import ConfigError, TrainingError, WireError
from consilium.experiment import Experiment
from consilium.messages import (
    CODES,
    Reply,
    Request,
    RequestKind,
    check_learned,
    check_numbers,
    decode_reply,
    encode,
    plain,
)
from consilium.peers import Peers, Queue, Step, check_length, check_size, lengths_of
from consilium.protocols import Failure, Specs, Update
from consilium.rounds import Progress, Versions
from consilium.tensors import Tensors, digest

Display = Callable[[Mapping[str, object]], None]
LATE_FROM = "late_from"  # ours: no number of a site's own is called so
LARGEST_ENVELOPE = 1024**2  # bytes of a reply beside its tensors: numbers, and those of a test split at the end


class Transport(Protocol):
    """The seam: in process, or across hospitals."""

    def sites(self) -> tuple[str, ...]: ...

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """One answer per request, best sorted by site. A request is encoded whenever it is looked up."""


class Patient(Transport, Protocol):
    """A transport that remembers what it asked, so that a reply that comes late may stand for the next one."""

    def expect(self, sites: Collection[str]) -> None:
        """Of these sites, in the question that is put next."""


@dataclass(frozen=True)
class Partners:
    """Who talks with whom: the same for all questions of a run. `explain`: a simulation can read what stayed."""

    experiment: Experiment
    transport: Transport
    folder: Path
    display: Display
    explain: Callable[[Failure], str]
    remote: bool = False  # hospitals: the quorum decides over whatever one of them sends or fails to send

    @property
    def by_quorum(self) -> tuple[RequestKind, ...]:
        """Questions that some sites may leave unanswered."""
        return ("round", "finish") if self.remote else ("round",)

    @cached_property
    def _common(self) -> dict[str | None, Versions]:
        return {None: {name: digest(tensor) for name, tensor in self.experiment.common.items()}}

    def common(self, site: str) -> Versions:
        """What a site has before anything is sent."""
        like = self.experiment.like(site)
        if like not in self._common:
            self._common[like] = {name: digest(tensor) for name, tensor in self.experiment.common_at(site).items()}
        return self._common[like]


@dataclass
class Exchange:
    """One request to each of `sites`. `Progress` counts bytes and learns how many images a site has; nothing else of
    it changes."""

    partners: Partners
    progress: Progress
    kind: RequestKind
    number: int
    sites: Sequence[str]
    context: Mapping[str, Any] = field(default_factory=dict)
    replied: dict[str, Reply] = field(default_factory=dict)  # without their tensors, sorted by site
    failures: list[Failure] = field(default_factory=list)
    versions: dict[str, Versions] = field(default_factory=dict)  # site -> all it should know, equal ones once
    owed: Mapping[str, Versions] = field(default_factory=dict)  # the same of the round before, of who may answer it now

    def __iter__(self) -> Iterator[Reply]:
        """Replies sorted by site. TrainingError at the end where a site sent numbers that are not finite or the quorum
        was not reached."""
        self.asked, news = sorted(self.sites), _News(self)  # not kept here: it holds the payloads, and this exchange
        waiting, early = list(reversed(self.asked)), dict[str, Reply | Failure]()
        peers = Peers(self.partners.experiment.config.train.refuse_longer)
        self._queue, self._steps = Queue[Reply | Failure](peers), dict[str, Step]()
        answers = self.partners.transport.round(_Requests(self.asked, news.request))
        for self._done, (site, data) in enumerate(answers, start=1):
            early[site] = data if isinstance(data, Failure) else self._read(site, data)
            self._tell(early[site])
            while waiting and waiting[-1] in early:
                yield from self._in_turn(early.pop(waiting.pop()))
        for site in filter(early.__contains__, reversed(waiting)):
            yield from self._in_turn(early.pop(site))
        yield from self._noted(self._queue.rest())
        self._enough()

    def updates(self) -> Iterator[Update]:
        """What the sites learnt; a site without training images has nothing to say."""
        return (Update(reply.site, reply.tensors, reply.num_examples) for reply in self if reply.num_examples > 0)

    def status(self, answer: Reply | Failure) -> dict[str, Any]:
        """How a site did, as a line of events.jsonl says it; `late_from`: the round before, which it answered late."""
        if isinstance(answer, Failure):
            return {"status": answer.code, "message": answer.message}
        numbers = {name: value for name, value in metrics.without_nan(answer.numbers).items() if name != LATE_FROM}
        return {**numbers, "status": "ok", **({} if answer.round == self.number else {LATE_FROM: answer.round})}

    def _answers(self, site: str) -> set[int]:
        """Rounds that a reply may be for: the one before as long as it is owed, and this one, if it was asked for."""
        before = {self.number - 1} if site in self.owed else set()
        return before | ({self.number} if site in self.versions or not before else set())

    def known(self, reply: Reply) -> Versions:
        """Digests of all that a site's state holds after the request that it answered."""
        return self.versions[reply.site] if reply.round == self.number else self.owed[reply.site]

    @property
    def overdue(self) -> dict[str, Versions]:
        """Of the sites that were asked and had not replied at the end: what they should know once they have."""
        late = [failure.site for failure in self.failures if failure.code == "late"]
        return {site: self.versions[site] for site in late if site in self.versions}

    def _in_turn(self, answer: Reply | Failure) -> Iterator[Reply]:
        step = self._steps.pop(answer.site, None)
        return self._noted(self._queue.put(answer, step if isinstance(answer, Reply) else None))

    def _noted(self, judged: Iterable[tuple[Reply | Failure, str | None]]) -> Iterator[Reply]:
        """Of answers in their turn, the replies. What its peers show to be broken was told as "ok" when it came, so it
        is told again."""
        for answer, why in judged:
            if why is not None:
                answer = Failure(answer.site, "refused", plain(why))
                self._tell(answer)
            if isinstance(answer, Failure):
                self.failures.append(answer)
            else:
                self.progress.num_examples.setdefault(answer.site, answer.num_examples)
                self.replied[answer.site] = replace(answer, tensors={})
                yield answer

    def _tell(self, answer: Reply | Failure) -> None:
        event = {"event": "site", "kind": self.kind, "round": self.number, "site": answer.site}
        self.partners.display({**self.status(answer), **event, "done": self._done, "total": len(self.asked)})

    # -------------------------------------------------------------------------------------------- replies
    def _read(self, site: str, data: bytes) -> Reply | Failure:
        """A reply that can be used, or why it cannot."""
        try:
            self._within_limit(site, data)
            opened = messages.open_message(data)
            self.progress.ledger.add("up", site, opened.size)
            reply = decode_reply(opened, self.allowed("up", site))
        except TrainingError as error:
            return Failure(site, "non_finite", plain(str(error)))
        except WireError as error:
            return Failure(site, "refused", plain(str(error)))
        except Exception as error:  # bytes of a stranger end no run, in whatever way they are odd
            if not self.partners.remote:
                raise
            return Failure(site, "refused", f"its reply cannot be read: {type(error).__name__}")
        if reply.failure is not None:
            code = reply.failure.code if reply.failure.code in CODES else "error"
            failure = Failure(site, code, plain(reply.failure.message))
            return replace(failure, message=self.partners.explain(failure))
        if reply.site != site or reply.round not in self._answers(site):
            message = f"asked {site} for round {self.number}, got an answer of {reply.site} for round {reply.round}"
            return Failure(site, "stale", plain(message))
        return self._counted(reply)

    @cached_property
    def _wire(self) -> dict[tuple[str, str | None], Specs]:
        return {}

    def allowed(self, way: Literal["up", "down"], site: str) -> Specs:
        """What may go to a site or come back, coded or not; formed once for all sites of the tuner's rank."""
        experiment, like = self.partners.experiment, self.partners.experiment.like(site)
        if (way, like) not in self._wire:
            self._wire[way, like] = experiment.wire(way, self.number, like)
        return self._wire[way, like]

    def _within_limit(self, site: str, data: bytes) -> None:
        """WireError for more bytes than the declared tensors and an envelope can have, before they are looked at."""
        allowed = self.allowed("up", site)
        if any(None in spec.shape for spec in allowed.values()):
            return  # how many of these a site has, it alone knows
        limit = payload.num_bytes(allowed, allowed) + LARGEST_ENVELOPE
        if len(data) > limit:
            received = f"{len(data)} bytes"
            raise WireError(f"the reply of {site} is too large", allowed=f"{limit} bytes", received=received)

    def _whole(self, reply: Reply) -> Tensors:
        """The tensors of a reply; coded ones are steps from what the site was sent."""
        experiment = self.partners.experiment
        declared = experiment.up(self.number, experiment.like(reply.site))
        if reply.tensors.keys() <= declared.keys():
            return reply.tensors
        return experiment.codec.read(reply.tensors, experiment.send(self.progress.server, reply.site), declared)

    def _complete(self, reply: Reply) -> None:
        """WireError where a site that has images leaves out what it was to send, which a sum would count on. What a
        strategy adds for a tensor that rests in this round is not owed, nor anything by one that sends no parameter."""
        if self.kind != "round" or not reply.num_examples:
            return
        experiment = self.partners.experiment
        active, known = experiment.active(self.number, reply.site), experiment.model.specs
        owed = {
            name
            for name, spec in experiment.sent(self.number, reply.site).items()
            if active(spec.tag) or name.partition("/")[2] not in known
        }
        missing = sorted(owed - reply.tensors.keys())
        if missing and (reply.tensors or experiment.strategy.declares.once or not known.keys().isdisjoint(missing)):
            what, received = f"{reply.site} leaves tensors out", f"without {', '.join(missing[:4])}"
            raise WireError(what, allowed=f"{len(missing)} more", received=received)

    def _bounded(self, reply: Reply) -> None:
        """WireError where an update is longer than the strategy lets it be, or larger than any model's numbers are: a
        site that is broken, or not honest; else the honest ones would be blamed a round later. What it is beside its
        peers is seen in its turn."""
        check_size(reply.site, reply.tensors)
        experiment = self.partners.experiment
        peers, largest = experiment.config.train.refuse_longer, experiment.strategy.declares.largest_update
        if not reply.tensors or not reply.num_examples or (not peers and largest is None):
            return
        lengths = lengths_of(reply.tensors, experiment.send(self.progress.server, reply.site))
        if lengths is not None:
            check_length(reply.site, lengths[0], largest)
            self._steps[reply.site] = Step(reply.site, lengths[0], reply.num_examples, lengths[1])

    def _counted(self, reply: Reply) -> Reply | Failure:
        """A reply whose numbers can be reckoned with: weights of the mean do not change from round to round."""
        task = self.partners.experiment.task
        try:
            check_numbers(self.kind, reply.numbers, len(task.classes) if task.class_counts == "federation" else 0)
            check_learned(reply.numbers, self.partners.experiment.strategy.declares.numbers)
            reply = replace(reply, tensors=self._whole(reply))
            self._complete(reply)
            self._bounded(reply)
            if reply.tensors and (check := self.partners.experiment.strategy.declares.checks) is not None:
                check(Update(reply.site, reply.tensors, reply.num_examples))
        except TrainingError as error:
            return Failure(reply.site, "non_finite", plain(str(error)))
        except WireError as error:
            return Failure(reply.site, "refused", plain(str(error)))
        known = self.progress.num_examples.get(reply.site, reply.num_examples)
        if known != reply.num_examples:
            message = f"it has {reply.num_examples} training images now and had {known} before"
            return Failure(reply.site, "refused", message)
        return reply

    def _enough(self) -> None:
        reasons = "; ".join(f"{each.site}: {each.code}, {' '.join(each.message.split())}" for each in self.failures)
        broken = [failure.site for failure in self.failures if failure.code == "non_finite"]
        if broken and not self.partners.remote:
            remedy = (
                "lower train.learning_rate or mend the site's data, in a new --out; the rounds before are kept, "
                "but --resume with the same configuration and data fails here again"
            )
            raise TrainingError(
                f"non-finite numbers from site {', '.join(broken)} in round {self.number}",
                where=str(self.partners.folder),
                received=reasons,
                remedy=remedy,
            )
        asked, remote = len(self.asked), self.partners.remote
        share = self.partners.experiment.config.train.quorum * asked
        needed = (
            math.ceil(share - 1e-9) if self.kind in self.partners.by_quorum else asked
        )  # 0.28 * 25 is 7 and a rounding error
        if len(self.replied) < max(needed, 1):
            raise TrainingError(
                f"too few sites replied to '{self.kind}' of round {self.number}: {len(self.replied)} of {asked}",
                where=str(self.partners.folder),
                allowed=f"at least {needed}",
                received=reasons,
                remedy="mend the sites, then "
                + ("consilium coordinator resume" if remote else "run again with --resume"),
            )


# ------------------------------------------------------------------------------------------------ requests
class _Requests(Mapping[str, bytes]):
    """Requests that exist while somebody holds them."""

    def __init__(self, sites: Sequence[str], encoded: Callable[[str], bytes]) -> None:
        self._sites, self._encoded = dict.fromkeys(sites), encoded

    def __getitem__(self, site: str) -> bytes:
        if site not in self._sites:
            raise KeyError(site)
        return self._encoded(site)

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class _News:
    """What each site lacks. The server's own tensors are hashed once, and packed once for all that lack the same."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.server = exchange, exchange.progress.server
        own = (self.server.shared, self.server.memory, exchange.progress.broadcast.news)
        self.own = {id(tensor): tensor for tensors in own for tensor in tensors.values()}
        self.digests: dict[int, str] = {}
        self.equal: dict[tuple[tuple[str, str], ...], Versions] = {}
        self.packed: dict[tuple[object, ...], bytes] = {}  # by what may travel, and what does
        self.counted: set[str] = set()

    def request(self, site: str) -> bytes:
        """The encoded request to a site; the ledger counts it once."""
        exchange, progress = self.exchange, self.exchange.progress
        news, versions = ({}, {}) if exchange.kind == "describe" else self.of(site)
        handshake, builds_on = exchange.partners.experiment.handshake, progress.builds_on.get(site, 0)
        request = Request(exchange.kind, site, exchange.number, builds_on, handshake, news, exchange.context)
        data = encode(request, exchange.allowed("down", site), self._payload(request))
        if site not in self.counted:
            self.counted.add(site)
            exchange.versions[site] = versions
            progress.ledger.add("down", site, messages.Size.of(data))
        return data

    def of(self, site: str) -> tuple[Tensors, Versions]:
        """What the strategy has for the site and the site's state does not hold, coded where the site holds what a step
        starts from; the digests of all it has."""
        common, receipts = self.exchange.partners.common(site), self.exchange.progress.receipts.get(site, {})
        sent = self.exchange.partners.experiment.send(self.server, site)
        found = {name: self._digest(tensor) for name, tensor in sent.items()}
        versions = self.equal.setdefault(tuple(sorted(found.items())), found)
        held = {name: receipts.get(name) or common.get(name, "") for name in sent}
        news = {name: tensor for name, tensor in sent.items() if held[name] != versions[name]}
        codec, broadcast = self.exchange.partners.experiment.codec, self.exchange.progress.broadcast
        return codec.request(news, held, versions, broadcast), versions

    def _digest(self, tensor: Tensor) -> str:
        if id(tensor) not in self.own:
            return digest(tensor)
        if id(tensor) not in self.digests:
            self.digests[id(tensor)] = digest(tensor)
        return self.digests[id(tensor)]

    def _payload(self, request: Request) -> bytes:
        allowed = self.exchange.allowed("down", request.site)
        key = (id(allowed), *((name, id(tensor)) for name, tensor in request.tensors.items()))
        if key in self.packed:
            return self.packed[key]
        packed = messages.pack(request, allowed)
        if all(id(tensor) in self.own for tensor in request.tensors.values()):
            if len(self.packed) == _PACKED:
                self.packed.pop(next(iter(self.packed)))
            self.packed[key] = packed
        return packed


_PACKED = 2  # payloads that are kept: those in step with the run, and those that come in for the first time


class Updates:
    """Updates that can be read once: where only a sum is needed, none of them is kept."""

    def __init__(self, updates: Iterator[Update]) -> None:
        self._updates: Iterator[Update] | None = updates

    def __iter__(self) -> Iterator[Update]:
        """The updates, sorted by site; ConfigError when asked for again."""
        if self._updates is None:
            remedy = "read them once, or declare needs_individual_updates"
            raise ConfigError("a strategy reads the updates of a round a second time", where="combine", remedy=remedy)
        updates, self._updates = self._updates, None
        return updates
