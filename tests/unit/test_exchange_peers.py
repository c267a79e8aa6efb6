"""A site whose update is broken, in the round loop: refused by name, as if it had not replied to the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import exchange, rounds
from consilium.deployment.board import Board
from consilium.errors import TrainingError
from consilium.messages import Reply, decode_reply, encode
from consilium.peers import FEWEST, lengths_of
from consilium.tensors import equal
from tests import federation, variants
from tests.unit.test_dishonest_sites import Dishonest
from tests.unit.test_exchange import NUMBERS, PIECES, START, Fake, _exchange

SITES = federation.hospitals(14, 9, 20, 12)
REASON = "too long beside those of its peers"
TRAIN = {"quorum": 0.5, "rounds": 3}


def run(folder: Path, wrap: Any = None, sites: Any = SITES, **tables: Any) -> federation.Outcome:
    """`wrap`: of the experiment's pieces, how a transport is wrapped."""
    settings = federation.configure(**{**tables, "train": {**TRAIN, **tables.get("train", {})}})
    pieces = federation.assemble(settings)
    return federation.run(folder, settings, sites, wrap=lambda inner: wrap(inner, pieces) if wrap else inner)


def broken(site: str, times: float = 1e4, number: int = 2) -> Callable[..., Any]:
    return lambda inner, pieces: Dishonest(inner, pieces, times, site, number)


def silent(site: str, number: int = 2) -> Callable[..., Any]:
    """The site works, and its reply is lost."""
    return lambda inner, _: federation.Lossy(inner, {(site, number)}, before_work=False)


def lines(outcome: federation.Outcome) -> list[Any]:
    return [event for event in outcome.events if event["event"] == "round"]


def assert_as_if_it_had_not_replied(outcome: federation.Outcome, without: federation.Outcome) -> None:
    assert equal(outcome.shared, without.shared)
    assert all(equal(outcome.served(site), without.served(site)) for site in SITES)
    for key in ("builds_on", "receipts", "passes"):
        assert getattr(outcome.progress, key) == getattr(without.progress, key), key


# ------------------------------------------------------------------------------------------------ refused by name
@pytest.mark.parametrize("site", SITES)
def test_it_is_refused_by_name_and_the_others_keep_their_bits(tmp_path: Path, site: str) -> None:
    """The first site in order is no other than the last one."""
    outcome = run(tmp_path / "broken", broken(site))
    told = lines(outcome)
    assert [each["sites"][site]["status"] for each in told] == ["ok", "refused", "ok"]
    assert f"the update of {site} is {REASON}" in told[1]["sites"][site]["message"]
    assert all(each["sites"][other]["status"] == "ok" for each in told for other in SITES if other != site)
    assert_as_if_it_had_not_replied(outcome, run(tmp_path / "silent", silent(site)))


def test_a_plain_mean_without_the_bound_is_ruined(tmp_path: Path) -> None:
    outcome = run(tmp_path, broken("b"), train={"refuse_longer": 0, "rounds": 2})
    assert max(float(value.abs().max()) for value in outcome.shared.values()) > 100
    assert all(each["status"] == "ok" for each in lines(outcome)[1]["sites"].values())


def test_the_bound_changes_no_bit_of_an_honest_run(tmp_path: Path) -> None:
    bound, free = run(tmp_path / "bound"), run(tmp_path / "free", train={"refuse_longer": 0})
    assert equal(bound.shared, free.shared)
    assert [each["sites"] for each in lines(bound)] != []
    assert all(each["status"] == "ok" for line in lines(bound) for each in line["sites"].values())


@pytest.mark.parametrize("site", ["a", "b"])
def test_of_two_sites_the_longer_is_refused(tmp_path: Path, site: str) -> None:
    two = federation.hospitals(14, 9)
    outcome = run(tmp_path, broken(site), two)
    assert lines(outcome)[1]["sites"][site]["status"] == "refused"
    assert max(float(value.abs().max()) for value in outcome.shared.values()) < 5


def test_one_site_has_no_peer(tmp_path: Path) -> None:
    outcome = run(tmp_path, broken("a"), federation.hospitals(14), train={"rounds": 2})
    assert lines(outcome)[1]["sites"]["a"]["status"] == "ok"


def test_it_counts_against_the_quorum(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"too few sites replied to 'round' of round 2: 3 of 4(.|\n)*b.*{REASON}"):
        run(tmp_path, broken("b"), train={"quorum": 1.0})
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert '"refused"' not in line, "round 2 is not closed"
    assert rounds.numbers(tmp_path) == [1]


@pytest.mark.parametrize("options", [{"aggregate": "median"}, {"clip_updates": 1.0}], ids=str)
def test_also_where_single_updates_are_looked_at(tmp_path: Path, options: dict[str, Any]) -> None:
    strategy = {"name": "fedavg", **options}
    outcome = run(tmp_path / "broken", broken("a"), strategy=strategy)
    assert lines(outcome)[1]["sites"]["a"]["status"] == "refused"
    assert_as_if_it_had_not_replied(outcome, run(tmp_path / "silent", silent("a"), strategy=strategy))


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
def test_what_honest_sites_send_as_coded_steps_passes(tmp_path: Path, codec: str) -> None:
    outcome = run(tmp_path, wire={"codec": codec})
    assert all(each["status"] == "ok" for line in lines(outcome) for each in line["sites"].values())


UNMEASURED = {"fedpft"}  # statistics of features are no steps from anything


@pytest.mark.parametrize("name", sorted(set(variants.FEDERATED) - {"local"}))
def test_which_strategies_are_measured(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All whose sites send what they were sent, trained: one of them that is broken is refused by name."""
    found: list[object] = []
    monkeypatch.setattr(exchange, "lengths_of", lambda *each: found.append(lengths_of(*each)) or found[-1])
    settings = variants.settings(name, train={"rounds": 1, "local_epochs": 0.5, "quorum": 0.5})
    pieces = federation.assemble(settings)
    wrap = broken("b", 1e6, 1)
    outcome = federation.run(tmp_path, settings, SITES, wrap=lambda inner: wrap(inner, pieces))
    assert (None in found) == (name in UNMEASURED), found
    told = {site: each["status"] for site, each in lines(outcome)[0]["sites"].items()}
    assert told == {**dict.fromkeys(SITES, "ok"), "b": "refused"}
    assert (REASON in lines(outcome)[0]["sites"]["b"]["message"]) == (name not in UNMEASURED)


# ------------------------------------------------------------------------------------------------ what is told
def test_what_was_told_as_ok_when_it_came_is_told_again(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", broken("b"))
    board = Board(tmp_path)
    seen = []
    for event in outcome.events:
        board.show({"kind": "", **event})
        if event["event"] == "site" and (event["kind"], event["round"], event["site"]) == ("round", 2, "b"):
            seen.append((event["status"], board.table["sites"]["b"]["status"], event["done"], event["total"]))
    assert [each[:2] for each in seen] == [("ok", "done"), ("refused", "refused")]
    assert all(done <= total == 4 for *_, done, total in seen)


def test_a_late_reply_is_measured_like_any_other(tmp_path: Path) -> None:
    """It is refused in the round in which it would have counted; the site is then asked anew."""
    settings = federation.configure(train=TRAIN)
    pieces = federation.assemble(settings)

    def late(inner: Any) -> Any:
        return federation.Belated(Dishonest(inner, pieces, 1e4, "b", 1), {("b", 1)})

    outcome = federation.run(tmp_path / "late", settings, SITES, wrap=late, expect=lambda _: None)
    assert [line["sites"]["b"]["status"] for line in lines(outcome)] == ["late", "refused", "ok"]
    assert REASON in lines(outcome)[1]["sites"]["b"]["message"]

    def away(inner: Any) -> Any:
        return federation.Lossy(federation.Lossy(inner, {("b", 1)}, before_work=False), {("b", 2)})

    without = federation.run(tmp_path / "away", settings, SITES, wrap=away)
    assert_as_if_it_had_not_replied(outcome, without)


def test_a_first_reply_that_is_refused_says_nothing_of_its_images(tmp_path: Path) -> None:
    """As with any other refusal: the site may say another number later on."""
    outcome = run(tmp_path, broken("b", number=1), train={"rounds": 1})
    assert "b" not in rounds.newest(tmp_path, outcome.experiment.handshake.agreement, print).num_examples  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ many sites
@dataclass
class Mixed(Fake):
    """Sites that move alike, but for those that move very far."""

    far: frozenset[str] = frozenset()

    def _reply(self, site: str, number: int, kind: str) -> bytes:  # noqa: ARG002
        by = torch.tensor(1e4 if site in self.far else 1.0)
        tensors = {name: START[name] + by for name in PIECES.up(number)}
        return encode(Reply(site, number, 5, tensors, NUMBERS), PIECES.up(number))


ORDERS: list[Callable[[Sequence[str]], Any]] = [
    lambda names: names,
    reversed,
    lambda names: [*names[5:], *names[:5]],
    lambda names: sorted(names, key=lambda name: name[::-1]),
]


@pytest.mark.parametrize("far", ["s00000", "s00002", "s00000 s00017", "s00019"])
def test_whoever_comes_first_the_same_ones_are_refused(far: str) -> None:
    found = []
    for turn in ORDERS:
        asked = _exchange(Mixed(20, failing=frozenset({"s00001"}), turn=turn, far=frozenset(far.split())))
        names = [reply.site for reply in asked]
        assert names == [*asked.replied] == sorted(names)
        found.append((names, [(each.site, each.code) for each in asked.failures]))
    assert found == [found[0]] * len(ORDERS)
    assert found[0][1] == sorted([("s00001", "lost"), *((site, "refused") for site in far.split())])


def test_three_updates_are_held_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    living: list[weakref.ref[Tensor]] = []

    def noted(*arguments: Any) -> Reply:
        reply = decode_reply(*arguments)
        living.append(weakref.ref(reply.tensors["head.weight"]))
        return reply

    monkeypatch.setattr(exchange, "decode_reply", noted)
    asked = _exchange(Mixed(40, far=frozenset({"s00001", "s00030"})))
    held = [sum(ref() is not None for ref in living) for _ in asked]
    assert max(held) <= FEWEST + 1
    assert max(held[FEWEST:]) == 1
    del asked
    assert not any(ref() is not None for ref in living)
