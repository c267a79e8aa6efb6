"""The round loop where a reply that comes late counts in the next round: once, as a term like any other, or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium.coordinator import Coordinator
from consilium.data import SiteData
from consilium.engines.state import StateFolder
from consilium.exchange import Transport
from consilium.local.predict import pooled_features
from consilium.messages import Reply, decode_reply, encode, envelope_of
from consilium.protocols import Failure
from consilium.rounds import Progress
from consilium.tensors import equal
from tests import federation

SITES = federation.hospitals(14, 9, 20)
RATE = 0.05
LATE = {("b", 1)}


def settings(**tables: Any) -> Any:
    train = {"rounds": 3, "quorum": 0.5, **tables.pop("train", {})}
    return federation.configure(**{"strategy": {"name": "fedper"}, "train": train, **tables})


PIECES = federation.assemble(settings())


def run(folder: Path, config: Any | None = None, late: Any = LATE, **options: Any) -> federation.Outcome:
    options = {"wrap": lambda inner: federation.Belated(inner, late), "expect": lambda _: None, **options}
    return federation.run(folder, config or settings(), SITES, **options)


def lines(outcome: federation.Outcome) -> list[Mapping[str, Any]]:
    return [event for event in outcome.events if event["event"] == "round"]


# ------------------------------------------------------------------------------------------------ by hand
def softmax_regression(site: SiteData, pieces: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features with a column of ones, float64 [n, d + 1], and labels as rows of a unit matrix [n, classes]."""
    image, model = pieces.setting.preprocessing, pieces.model
    features = pooled_features(model, model.initial(3), site.train, image, "cpu").double().numpy()
    return np.c_[features, np.ones(len(features))], np.eye(len(federation.CLASSES))[site.train.labels]


def stepped(w: np.ndarray, data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """One step of gradient descent on the mean cross-entropy."""
    x, y = data
    scores = np.exp(x @ w)
    return w - RATE * x.T @ (scores / scores.sum(axis=1, keepdims=True) - y) / len(x)


def test_three_rounds_of_fedavg_with_a_late_reply_are_those_by_hand(tmp_path: Path) -> None:
    """b trains on w0, its reply misses round 1 and is a term of round 2 beside those that a and c trained on w1."""
    train = {**federation.SGD, "batch_size": 64, "rounds": 3, "quorum": 0.5, "learning_rate": RATE}
    config = settings(strategy={"name": "fedavg"}, tuner=[{"name": "linear"}], train=train)
    outcome = run(tmp_path, config)
    data = {name: softmax_regression(site, outcome.experiment) for name, site in SITES.items()}
    initial = outcome.experiment.model.initial(3)
    start = np.r_[initial["head.weight"].double().numpy().T, initial["head.bias"].double().numpy()[None]]

    def mean(**terms: np.ndarray) -> np.ndarray:
        return np.average(list(terms.values()), axis=0, weights=[len(data[site][0]) for site in terms])

    w1 = mean(a=stepped(start, data["a"]), c=stepped(start, data["c"]))
    w2 = mean(a=stepped(w1, data["a"]), b=stepped(start, data["b"]), c=stepped(w1, data["c"]))
    w3 = mean(**{site: stepped(w2, data[site]) for site in data})
    found = np.r_[outcome.shared["head.weight"].numpy().T, outcome.shared["head.bias"].numpy()[None]]
    np.testing.assert_allclose(found, w3, rtol=0, atol=1e-6)
    dropped = mean(a=stepped(w1, data["a"]), c=stepped(w1, data["c"]))
    assert np.abs(mean(**{site: stepped(dropped, data[site]) for site in data}) - w3).max() > 1e-3


# ------------------------------------------------------------------------------------------------ what follows from it
def test_the_site_goes_on_from_the_state_of_the_round_that_counted(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    asked = [envelope_of(data) for way, site, data in outcome.wire if (way, site) == ("down", "b")]
    assert [(each["kind"], each["round"], each["builds_on"]) for each in asked] == [
        ("round", 1, 0), ("round", 3, 1), ("finish", 3, 3),
    ]  # fmt: skip
    states = StateFolder(tmp_path / "sites" / "b", outcome.experiment.handshake.agreement)
    before, after = states.load(1).personal.tensors, states.load(3).personal.tensors
    assert before.keys() == after.keys() == {"head.weight", "head.bias"}
    dropped = run(tmp_path / "dropped", wrap=lambda inner: federation.Lossy(inner, LATE, before_work=False))
    other = StateFolder(tmp_path / "dropped" / "sites" / "b", dropped.experiment.handshake.agreement)
    assert not equal(other.load(3).personal.tensors, after)


def test_bytes_are_counted_where_they_arrived_and_old_validation_nowhere(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    first, second, third = lines(outcome)
    assert first["sites"]["b"]["status"] == "late"
    assert (second["sites"]["b"]["status"], second["sites"]["b"]["late_from"]) == ("ok", 1)
    assert "late_from" not in third["sites"]["b"]
    assert (first["bytes"]["up"].get("b", 0), second["bytes"]["down"]["b"]) == (0, 0)
    assert second["bytes"]["up"]["b"] == third["bytes"]["up"]["b"] > 0
    fresh = [second["sites"][site]["val"]["incoming"]["loss"] for site in "ac"]
    assert second["val_mean"]["loss"] == pytest.approx(sum(fresh) / 2)
    told = [event for event in outcome.events if event["event"] == "site" and event.get("late_from")]
    assert [(event["round"], event["site"], event["late_from"]) for event in told] == [(2, "b", 1)]
    assert outcome.progress.passes == {"a": 3 * 14, "b": 2 * 9, "c": 3 * 20}


def test_the_best_round_is_judged_without_late_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, seen = Coordinator._judge, []

    def noting(self: Coordinator, progress: Progress, replies: Sequence[Reply]) -> None:
        seen.append([(reply.site, reply.round) for reply in replies])
        judge(self, progress, replies)

    monkeypatch.setattr(Coordinator, "_judge", noting)
    run(tmp_path, settings(evaluation={"serve": "best", "select": "loss"}))
    assert seen[1] == [("a", 2), ("c", 2)]
    assert [len(each) for each in seen] == [2, 2, 3, 3]


class _Stop(Exception):
    pass


def test_after_a_crash_late_replies_are_dropped_and_it_is_said(tmp_path: Path) -> None:
    """Then the run is, to the bit, one in which that reply was lost."""

    def stop(told: Mapping[str, Any]) -> None:
        if told["event"] == "site" and told.get("late_from") == 1:
            raise _Stop

    with pytest.raises(_Stop):
        run(tmp_path / "stopped", display=stop)
    again = run(tmp_path / "stopped")
    (warning,) = (event["text"] for event in again.events if event["event"] == "warning")
    assert warning == "late replies to round 1 are dropped, as it was closed before: b"
    assert "late_from" not in lines(again)[0]["sites"]["b"]
    lossy = run(tmp_path / "lossy", wrap=lambda inner: federation.Lossy(inner, LATE, before_work=False))
    assert equal(again.shared, lossy.shared)
    assert all(equal(again.served(site), lossy.served(site)) for site in SITES)


# ------------------------------------------------------------------------------------------------ never twice
@dataclass
class Replaying:
    """A wire on which b's replies to rounds are those that `instead` says: (round) -> round that it answers."""

    inner: Transport
    instead: Mapping[int, int | None]
    ask: bool = True
    seen: dict[int, bytes | Failure] = field(default_factory=dict)

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        fields = envelope_of(requests["a"])
        number = fields["round"] if fields["kind"] == "round" else 0
        other = self.instead.get(number, number)
        for site in requests:
            if site == "b" and other not in (number, None) and not self.ask:
                yield site, self.seen[other]  # type: ignore[index]
                continue
            ((_, reply),) = self.inner.round({site: requests[site]})
            if site == "b" and number:
                self.seen[number] = reply
                reply = Failure(site, "late", "under way") if other is None else self.seen[other]
            yield site, reply


@pytest.mark.parametrize(
    ("instead", "ask", "statuses"),
    [
        ({1: None, 2: 1, 3: 1}, False, ["late", "ok", "stale"]),  # a second time
        ({2: 1}, True, ["ok", "stale", "ok"]),  # one that counted in its own round
        ({2: 1}, False, ["ok", "stale", "ok"]),
        ({1: None, 3: 2}, False, ["late", "ok", "stale"]),  # the same, of a site that was late before
        ({1: None, 2: None, 3: 1}, True, ["late", "late", "stale"]),  # of the round before the last
        ({1: None, 2: None, 3: 1}, False, ["late", "late", "stale"]),
    ],
)
def test_only_a_reply_to_the_round_before_that_did_not_count_counts(
    instead: Mapping[int, int | None], statuses: list[str], ask: bool, tmp_path: Path
) -> None:
    outcome = run(tmp_path, wrap=lambda inner: Replaying(inner, instead, ask))
    assert [line["sites"]["b"]["status"] for line in lines(outcome)] == statuses


def test_without_the_policy_an_old_reply_is_stale(tmp_path: Path) -> None:
    outcome = run(tmp_path, expect=None)
    row = lines(outcome)[1]["sites"]["b"]
    assert row == {"status": "stale", "message": "asked b for round 2, got an answer of b for round 1"}


def test_a_late_reply_that_says_it_is_a_fresh_one_is_refused(tmp_path: Path) -> None:
    """Its site was not asked, so nobody knows what it was trained from."""

    @dataclass
    class Relabelled(federation.Belated):
        def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
            late = bool(self.held)
            for site, reply in super().round(requests):
                if site == "b" and late:
                    assert isinstance(reply, bytes)
                    declared = PIECES.up(1)
                    reply = encode(replace(decode_reply(reply, declared), round=2), declared)
                yield site, reply

    outcome = run(tmp_path, wrap=lambda inner: Relabelled(inner, LATE))
    assert lines(outcome)[1]["sites"]["b"]["status"] == "stale"
    assert torch.isfinite(outcome.shared[next(iter(outcome.shared))]).all()


def test_no_site_can_say_of_itself_for_which_round_its_reply_counts(tmp_path: Path) -> None:
    @dataclass
    class Boasting(federation.Belated):
        def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
            for site, reply in super().round(requests):
                if site == "b" and isinstance(reply, bytes) and envelope_of(requests[site])["kind"] == "round":
                    declared = PIECES.up(1)
                    found = decode_reply(reply, declared)
                    reply = encode(replace(found, numbers={**found.numbers, "late_from": 1}), declared)
                yield site, reply

    outcome = run(tmp_path, wrap=lambda inner: Boasting(inner, ()))
    assert not any("late_from" in line["sites"]["b"] for line in lines(outcome))
