"""What every registered strategy must keep to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from consilium import members, registry
from consilium.check import exchanged, predicted_bytes, predicted_passes
from consilium.engines.simulate import secrets_of
from consilium.engines.state import SiteState, StateFolder
from consilium.errors import TrainingError
from consilium.protocols import Personal, Strategy, Update
from consilium.tensors import Tensors, digest_all, equal, select
from consilium.tuners import base
from tests import federation, variants

STRATEGIES = variants.FEDERATED
SITES = federation.hospitals(14, 9, 20, 11)
HALF = {"rounds": 4, "participation": 0.5}


@pytest.fixture(params=STRATEGIES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def _build(name: str) -> Strategy:
    strategy: Strategy = registry.build("strategies", name, {})
    return strategy


def _settings(name: str, **train: object):
    return variants.settings(name, train={**HALF, **train})


def _trains_at_the_end(strategy: Strategy) -> bool:
    return strategy.declares.finish_epochs > 0


def _one(model: Tensors) -> Tensors:
    """The first of several models that are used as one."""
    return next(members.each(model))


def _folder(outcome: federation.Outcome, site: str) -> StateFolder:
    return StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, federation.Outcome]:
    folder = tmp_path_factory.mktemp("strategies")
    return {name: federation.run(folder / name, _settings(name), SITES) for name in STRATEGIES}


@pytest.fixture
def outcome(outcomes: dict[str, federation.Outcome], name: str) -> federation.Outcome:
    return outcomes[name]


def test_its_source_and_what_leaves_the_site_are_named(name: str) -> None:
    member = registry.get("strategies", name)
    assert member.facts.keys() >= {"leaves the site", "stays"}
    assert member.source or name == "local"


def test_it_declares_what_it_sends(outcome: federation.Outcome) -> None:
    pieces = outcome.experiment
    for way, declared in (("up", pieces.up), ("down", pieces.down), ("finish", pieces.down)):
        for number, _, tensors in outcome.sent(way):
            assert tensors.keys() <= declared(number).keys()
    travelled = {n for _, _, t in outcome.sent("up") for n in t}
    assert travelled == {n for number in range(1, 5) for n in pieces.up(number)}


def test_every_exchanged_tensor_changes_at_every_site_in_every_round(outcome: federation.Outcome) -> None:
    known: dict[str, Tensors] = dict.fromkeys(SITES, outcome.experiment.common)
    for way, site, data in outcome.wire:
        message = outcome.decode(way, data)
        if way == "down":
            known[site] = {**known[site], **message.tensors}
        else:
            before = select(known[site], message.tensors.keys() & known[site].keys())
            assert not [n for n, value in before.items() if torch.equal(value, message.tensors[n])]


def test_nothing_moves_that_is_not_declared_trained(tmp_path: Path, name: str) -> None:
    pieces = federation.assemble(_settings(name))
    frozen = digest_all(base.parameters(pieces.backbone.module))
    outcome = federation.run(tmp_path, _settings(name, rounds=1, participation=1), SITES)
    assert digest_all(base.parameters(outcome.experiment.backbone.module)) == frozen
    served, active, secret = _one(outcome.served("a")), pieces.active(1, "a"), secrets_of(3, SITES)["a"]
    start = {
        **pieces.model.initial(secret),
        **select(pieces.model.initial(3), pieces.down(1).keys() & pieces.model.specs.keys()),
    }
    bases = {n for n, spec in pieces.down(1).items() if spec.tag.slot == "base"} - pieces.model.specs.keys()
    assert served.keys() == pieces.model.specs.keys() | bases
    assert not [n for n in bases if torch.equal(served[n], pieces.backbone.module.get_parameter(n))]
    anew = {n for n, spec in pieces.down(1).items() if spec.tag.slot == "base"} - bases
    moved = {n for n, value in start.items() if not torch.equal(served[n], value)}
    own = pieces.model.active(1, "a", 3) if _trains_at_the_end(pieces.strategy) else active
    factors = {n for n, spec in pieces.down(1).items() if spec.factor is not None}
    made = factors if pieces.strategy.declares.refactors(1) else set()
    assert moved == made | {n for n, spec in pieces.model.specs.items() if own(spec.tag)} - anew


def test_combine_is_pure_and_any_subset_of_sites_will_do(outcome: federation.Outcome) -> None:
    pieces, strategy, specs = outcome.experiment, outcome.experiment.strategy, outcome.experiment.model.specs
    start = strategy.init_server(pieces.initial(3), specs, tuple(SITES))
    updates = [Update(site, tensors, 5) for n, site, tensors in outcome.sent("up") if n == 1]
    before = digest_all({**start.shared, **start.memory})
    first, second = strategy.combine(start, updates, specs), strategy.combine(start, copy.deepcopy(updates), specs)
    assert digest_all({**start.shared, **start.memory}) == before
    assert equal(first.shared, second.shared)
    assert equal(first.memory, second.memory)
    alone = strategy.combine(start, updates[:1], specs)
    assert start.shared.keys() <= alone.shared.keys() <= first.shared.keys()
    assert equal(strategy.combine(start, [], specs).shared, start.shared)


def test_the_model_to_use_is_whole(outcome: federation.Outcome) -> None:
    pieces = outcome.experiment
    for site in SITES:
        state = _folder(outcome, site).load(outcome.progress.builds_on[site])
        newest = pieces.send(outcome.progress.server, site)
        models = pieces.strategy.deploy({**state.received, **newest}, state.personal)
        assert equal(models["personal"], outcome.served(site)) != _trains_at_the_end(pieces.strategy)
        images = torch.zeros(1, 3, federation.SIZE, federation.SIZE)
        whole = [one for model in models.values() for one in members.each(model)]
        assert all(torch.isfinite(pieces.model.forward(model, images)).all() for model in whole)
    assert "personal" in pieces.strategy.deploy(outcome.shared, Personal())


def test_two_runs_are_one_bit_by_bit_and_the_order_of_replies_is_irrelevant(
    tmp_path: Path, outcome: federation.Outcome, name: str
) -> None:
    again = federation.run(tmp_path, _settings(name), SITES, wrap=federation.Backwards)
    assert equal(again.shared, outcome.shared)
    assert all(equal(again.served(site), outcome.served(site)) for site in SITES)
    assert again.progress.ledger.payload == outcome.progress.ledger.payload


class _Stop(Exception):
    pass


@pytest.mark.parametrize("event", ["site", "round"])
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, outcome: federation.Outcome, name: str, event: str
) -> None:
    def stop(told: dict[str, object]) -> None:
        if (told["event"], told["round"]) == (event, 3):
            raise _Stop

    with pytest.raises(_Stop):
        federation.run(tmp_path, _settings(name), SITES, display=stop)
    resumed = federation.run(tmp_path, _settings(name), SITES)
    assert equal(resumed.shared, outcome.shared)
    assert all(equal(resumed.served(site), outcome.served(site)) for site in SITES)
    assert resumed.progress.ledger.payload == outcome.progress.ledger.payload


def test_a_site_whose_reply_was_lost_catches_up(tmp_path: Path, name: str) -> None:
    """The site's own work may be done, yet the coordinator goes on from the state it knows of."""
    drawn = [site for _, site in sorted(_draws(name)) if site]
    lost = {(drawn[0], 1), (drawn[2], 2)}
    for before_work in (True, False):
        wrap = lambda inner, b=before_work: federation.Lossy(inner, lost, b)  # noqa: E731
        outcome = federation.run(tmp_path / str(before_work), _settings(name, quorum=0.5), SITES, wrap=wrap)
        statuses = [e["sites"][site]["status"] for e in outcome.events if e["event"] == "round" for site in SITES]
        assert statuses.count("lost") == 2
        for site in SITES if not _trains_at_the_end(_build(name)) else ():
            served, builds_on = outcome.served(site), outcome.progress.builds_on.get(site)
            kept = _folder(outcome, site).load(builds_on).personal.tensors if builds_on else {}
            own = {n.partition("/")[2] for n in kept}  # what it makes a model of its own of
            sent = outcome.experiment.send(outcome.progress.server, site)
            newest = {n for n in outcome.shared if n in served and n not in own}
            assert all(torch.equal(served[n], sent[n]) for n in newest)


def _draws(name: str) -> Iterator[tuple[int, str]]:
    from consilium.coordinator import drawn_sites

    for number in range(1, 5):
        yield from ((number, site) for site in drawn_sites(0.5, sorted(SITES), _settings(name).seed, number))


def test_below_the_quorum_the_run_stops_with_names_and_reasons(tmp_path: Path, name: str) -> None:
    first = sorted(_draws(name))[0][1]
    with pytest.raises(TrainingError, match=rf"1 of 2(.|\n)*{first}: lost, the wire broke"):
        federation.run(tmp_path, _settings(name), SITES, wrap=lambda inner: federation.Lossy(inner, {(first, 1)}))


# ------------------------------------------------------------------------------------------------ what check predicts
@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ({"participation": 1.0}, {"serve": "last"}),
        ({"participation": 0.5, "rounds": 5, "local_epochs": 1.1}, {"serve": "last"}),
        ({"participation": 1.0, "local_steps": 4}, {"serve": "best"}),
    ],
    ids=["all", "half", "best"],
)
def test_predicted_bytes_and_passes_are_the_measured_ones(
    tmp_path: Path, name: str, train: dict[str, object], evaluation: dict[str, object]
) -> None:
    settings = variants.settings(name, train=train, evaluation=evaluation)
    outcome = federation.run(tmp_path, settings, SITES)
    measured = outcome.progress.ledger.summary()
    predicted = predicted_bytes(outcome.experiment, SITES)
    for way in ("up", "down"):
        bound = {
            site: max(found, measured[way]["per_site"][site]) for site, found in predicted[way]["per_site"].items()
        }
        assert predicted[way]["per_site"] == (bound if _build(name).declares.prunes else measured[way]["per_site"])
    passes = predicted_passes(settings, {site: len(data.train) for site, data in SITES.items()})
    measured = outcome.progress.passes
    assert {site: count for site, count in passes.items() if count} == {site: n for site, n in measured.items() if n}
    if train["participation"] == 1 and evaluation["serve"] == "last":  # what docs/strategies.md counts
        for way, told in exchanged(outcome.experiment, SITES, 3).items():
            sent = [set(tensors) for number, _, tensors in outcome.sent(way) if number == 3]
            assert sent == ([told] * len(SITES) if told else [])


# ------------------------------------------------------------------------------------------------ personal state
def test_personal_tensors_start_apart_from_a_secret_and_live_on(tmp_path: Path, name: str) -> None:
    seen: dict[tuple[str, int], SiteState] = {}
    settings = _settings(name, participation=1)
    pieces = federation.assemble(settings)

    def look(way: str, site: str, _: bytes) -> None:
        if way == "up":
            folder = StateFolder(tmp_path / "sites" / site, pieces.handshake.agreement)
            newest = max((int(p.stem.split("-")[1]) for p in folder.folder.glob("state-*")), default=0)
            seen[site, newest] = folder.load(newest)

    secrets = dict(zip(SITES, (11, 12, 13, 14), strict=True))
    federation.run(tmp_path, settings, SITES, secrets=secrets, watch=look)
    kept = pieces.model.specs.keys() - pieces.down(1).keys()
    starts = {site: pieces.model.initial(secret) for site, secret in secrets.items()}
    servers = pieces.model.initial(settings.seed)
    held = kept & next(iter(seen.values())).personal.tensors.keys()
    assert held == kept or name == "fedalt", "the adapter of the others is formed when it is needed"
    for variable in held:
        drawn = pieces.model.specs[variable].tag.role not in ("lora_b", "norm", "router") and not variable.endswith(
            "bias"
        )
        values = [start[variable] for start in (*starts.values(), servers)]
        assert not drawn or all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
        for (site, number), state in seen.items():
            before = seen[site, number - 1].personal.tensors if number > 1 else starts[site]
            now = state.personal.tensors[variable]
            assert torch.equal(now, before[variable]) != pieces.active(number, site)(pieces.model.specs[variable].tag)
            assert (now - before[variable]).abs().max() < 0.2, "it goes on from where it was"
    assert len(seen) == 16
