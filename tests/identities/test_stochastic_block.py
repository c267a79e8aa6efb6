"""Stochastic blocks in a federation: what leaves, who catches up on what and at which cost, what a mean is taken over.

A second book is kept of every run from its messages alone, in plain arithmetic, and compared with the coordinator's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.check import predicted_bytes
from consilium.exchange import Transport
from consilium.protocols import Failure
from consilium.tensors import equal
from tests import federation

SIZES = {"a": 9, "b": 14, "c": 12, "d": 7}
SITES = federation.hospitals(*SIZES.values())
BLOCKS = 6
HALF = {"rounds": 8, "participation": 0.5, "local_steps": 1, "quorum": 0.5}
LOST = {("b", 2), ("c", 3), ("d", 5), ("b", 7)}  # of the sites that are drawn in these rounds
KINDS: Mapping[str, dict[str, Any]] = {
    "uniform": {},
    "two": {"blocks_per_round": 2},
    "cycle": {"draw": "cycle", "blocks_per_round": 4, "targets": ["mlp", "norm1"]},
    "site": {"scope": "site"},
    "cycle at a site": {"draw": "cycle", "scope": "site"},
}
LOSSES = {**dict.fromkeys(KINDS, frozenset()), "uniform, lossy": LOST, "site, lossy": LOST}


@dataclass
class Logged:
    """The coordinator's end of the wire: requests as it sent them, and the replies that reached it."""

    inner: Transport
    messages: federation.Wire = field(default_factory=list)

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        self.messages += [("down", site, data) for site, data in sorted(requests.items())]
        for site, data in self.inner.round(requests):
            if isinstance(data, bytes):
                self.messages.append(("up", site, data))
            yield site, data


def _settings(kind: str, **train: Any) -> Any:
    tuner = [{"name": "stochastic_block", **KINDS[kind]}]
    return federation.configure(tuner=tuner, train={**HALF, **train}, evaluation={"every": 4})


def _run(folder: Path, kind: str, **train: Any) -> federation.Outcome:
    return federation.run(folder, _settings(kind, **train), SITES)


@dataclass
class Book:
    """A run beside what every site should have been sent and what the server should hold, told by the messages."""

    outcome: federation.Outcome
    shared: dict[str, Tensor] = field(init=False)
    sent: dict[tuple[int, str], set[str]] = field(default_factory=dict)  # (request, site) -> names
    lacking: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    bytes: dict[str, Counter[str]] = field(default_factory=lambda: {"up": Counter(), "down": Counter()})

    def __post_init__(self) -> None:
        self.shared = dict(self.outcome.experiment.initial(3))
        held = {site: federation.bits(self.outcome.experiment.common) for site in SITES}
        updates: dict[str, Mapping[str, Tensor]] = {}
        requests = 0
        for way, site, data in [*self.outcome.wire, ("down", "", b"")]:
            if way == "up":
                updates[site] = self.outcome.decode(way, data).tensors
                self.bytes[way][site] += self._size(updates[site])
                continue
            if updates:  # the round is over
                requests += 1
                for replied in updates:
                    held[replied] = federation.bits(self.shared)
                self.shared |= _means(updates)
                updates = {}
            if data:
                self.sent[requests, site] = set(self.outcome.decode(way, data).tensors)
                new = {name for name, raw in federation.bits(self.shared).items() if held[site].get(name) != raw}
                self.lacking[requests, site] = new
                self.bytes[way][site] += self._size({name: self.shared[name] for name in new})

    def _size(self, tensors: Mapping[str, Tensor]) -> int:
        head = 9 + math.ceil(len(self.outcome.experiment.model.specs) / 8)
        return head + sum(value.nbytes for value in tensors.values()) if tensors else 0


def _means(updates: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of every tensor over the sites that sent it, by their numbers of images, in float64."""
    found = {}
    for name in {name for tensors in updates.values() for name in tensors}:
        holders = [site for site in sorted(updates) if name in updates[site]]
        total = sum((updates[site][name].double() * SIZES[site] for site in holders), torch.zeros(()))
        found[name] = (total / float(sum(SIZES[site] for site in holders))).float()
    return found


def _blocks(outcome: federation.Outcome, names: Iterable[str]) -> set[int]:
    """The blocks of some tensors, the head left out."""
    found = {outcome.experiment.model.specs[name].tag.block for name in names}
    return {block for block in found if block is not None}


@pytest.fixture(scope="module", params=LOSSES)
def book(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Book:
    kind, logs = request.param.removesuffix(", lossy"), []

    def wrap(inner: Transport) -> Logged:
        logs.append(Logged(federation.Lossy(inner, set(LOSSES[request.param]))))
        return logs[-1]

    outcome = federation.run(tmp_path_factory.mktemp("run"), _settings(kind), SITES, wrap=wrap)
    outcome.wire = logs[0].messages
    return Book(outcome)


def test_a_site_gets_exactly_what_changed_since_it_last_heard(book: Book) -> None:
    assert book.sent == book.lacking
    assert len(book.sent) == 2 * 8 + 4
    sizes = {len(_blocks(book.outcome, names)) for names in book.sent.values()}
    assert len(sizes) > 2, "sites were behind by different numbers of blocks"


def test_a_block_is_the_mean_over_the_sites_that_trained_it_and_others_keep_their_bits(book: Book) -> None:
    assert equal(book.outcome.shared, book.shared)


def test_the_ledger_counts_every_byte_of_the_catch_up(book: Book) -> None:
    assert book.outcome.progress.ledger.payload == {way: dict(book.bytes[way]) for way in ("up", "down")}


def test_only_the_drawn_blocks_and_the_head_leave_a_site(book: Book) -> None:
    model, options = book.outcome.experiment.model, book.outcome.experiment.config.tuner[0].options()
    number, cycle = options.get("blocks_per_round", 1), options.get("draw") == "cycle"
    drawn: dict[int, set[int]] = {}
    for round, site, tensors in book.outcome.sent("up"):
        active = model.active(round, site, 3)
        assert tensors.keys() == {name for name, spec in model.specs.items() if active(spec.tag)}
        assert {"head.weight", "head.bias"} <= tensors.keys()
        own = _blocks(book.outcome, tensors)
        assert len(own) == number or (cycle and len(own) == BLOCKS % number)
        drawn.setdefault(round, set()).update(own)
    assert any(len(blocks) > number for blocks in drawn.values()) == (options.get("scope") == "site")


def test_check_predicts_the_bytes(book: Book) -> None:
    lost = any(event.get("status") == "lost" for event in book.outcome.events)
    measured, predicted = book.outcome.progress.ledger.summary(), predicted_bytes(book.outcome.experiment, list(SITES))
    assert ({way: measured[way] for way in ("up", "down")} == predicted) == (not lost)


@pytest.mark.parametrize("kind", ["cycle", "cycle at a site"])
def test_a_cycle_trains_every_block_once_at_every_site(tmp_path: Path, kind: str) -> None:
    length = -(-BLOCKS // KINDS[kind].get("blocks_per_round", 1))
    outcome = _run(tmp_path, kind, rounds=2 * length, participation=1)
    trained: dict[tuple[int, str], list[int]] = {}
    for number, site, tensors in outcome.sent("up"):
        trained.setdefault(((number - 1) // length, site), []).extend(sorted(_blocks(outcome, tensors)))
    assert len(trained) == 2 * len(SITES)
    assert all(sorted(blocks) == list(range(BLOCKS)) for blocks in trained.values())
    assert len({tuple(trained[0, site]) for site in SITES}) == (1 if kind == "cycle" else len(SITES))


def test_blocks_of_sites_are_averaged_over_those_that_trained_them(tmp_path: Path) -> None:
    """One round: some blocks over two sites, some over one, some over none, the head over all."""
    outcome = _run(tmp_path, "site", rounds=1, participation=1)
    updates = {site: tensors for _, site, tensors in outcome.sent("up")}
    holders = Counter(block for tensors in updates.values() for block in _blocks(outcome, tensors))
    assert set(holders.values()) == {1, 2}
    assert len(holders) < BLOCKS
    start, means = outcome.experiment.initial(3), _means(updates)
    for name, value in outcome.shared.items():
        assert torch.equal(value, means.get(name, start[name]))
        assert torch.equal(value, start[name]) == (name not in means)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["two", "cycle at a site"])
def test_a_resumed_run_repeats_the_draws(tmp_path: Path, kind: str) -> None:
    def stop(told: Mapping[str, Any]) -> None:
        if (told["event"], told["round"]) == ("site", 5):
            raise _Stop

    whole = _run(tmp_path / "whole", kind)
    with pytest.raises(_Stop):
        federation.run(tmp_path / "stopped", whole.experiment.config, SITES, display=stop)
    torch.manual_seed(99)  # nothing reads what is ambient
    resumed = federation.run(tmp_path / "stopped", whole.experiment.config, SITES)
    later = [(number, site, set(tensors)) for number, site, tensors in whole.sent("up") if number >= 5]
    assert [(number, site, set(tensors)) for number, site, tensors in resumed.sent("up")] == later
    assert equal(resumed.shared, whole.shared)
    assert resumed.progress.ledger.payload == whole.progress.ledger.payload


def test_all_blocks_in_every_round_are_attention_tuning(tmp_path: Path) -> None:
    tables = {
        "attention": {"name": "attention"},
        "all": {"name": "stochastic_block", "blocks_per_round": BLOCKS},
        "five": {"name": "stochastic_block", "blocks_per_round": BLOCKS - 1},
    }
    train = {**HALF, "rounds": 2, "learning_rate": None}
    settings = {name: federation.configure(tuner=[table], train=train) for name, table in tables.items()}
    runs = {name: federation.run(tmp_path / name, each, SITES).shared for name, each in settings.items()}
    assert equal(runs["attention"], runs["all"])
    assert not equal(runs["attention"], runs["five"])


def test_moments_of_blocks_start_anew_though_others_are_kept(tmp_path: Path) -> None:
    """With a frozen head no other moments are left, so that keeping them changes nothing; it does for attention."""
    same = {}
    for table in ({"name": "stochastic_block", "blocks_per_round": BLOCKS}, {"name": "attention"}):
        runs = []
        for moments in ("keep", "reset"):
            train = {"rounds": 2, "local_steps": 1, "moments": moments}
            settings = federation.configure(tuner=[table], head={"share": "frozen"}, train=train)
            runs.append(federation.run(tmp_path / str(table["name"]) / moments, settings, SITES).shared)
        same[table["name"]] = equal(*runs)
    assert same == {"stochastic_block": True, "attention": False}
