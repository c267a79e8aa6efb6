"""What must hold for every tuner in a federation: what moves, what travels, and what many sites have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consilium.check import predicted_bytes
from consilium.data import SiteData
from consilium.tensors import Tensors, digest_all, equal
from consilium.tuners import base
from tests import federation, variants

ALL = [*variants.TUNERS, *variants.HYBRIDS]
SITES = federation.hospitals(14, 9)
PRESETS = {**federation.TABLE["train"], "learning_rate": None, "local_epochs": 2}


def _settings(variant: str, **train: object):
    settings = federation.configure(train={**PRESETS, **train})
    return settings.model_copy(update={"tuner": federation.configure(tuner=variants.table(variant)).tuner})


@pytest.mark.parametrize("variant", ALL)
def test_every_exchanged_tensor_moves_at_every_site_in_every_round_and_nothing_else_does(
    tmp_path: Path, variant: str
) -> None:
    settings = _settings(variant)
    frozen = digest_all(base.parameters(federation.assemble(settings).backbone.module))
    outcome = federation.run(tmp_path, settings, SITES)
    pieces, known = outcome.experiment, {site: dict(outcome.experiment.common) for site in SITES}
    rounds = set()
    for way, site, data in outcome.wire:
        message = outcome.decode(way, data)
        if way == "down":
            known[site] |= message.tensors
        elif message.tensors:
            rounds.add((message.round, site))
            assert message.tensors.keys() == pieces.sent(message.round, site).keys()
            assert not [name for name, value in message.tensors.items() if torch.equal(value, known[site][name])]
    assert rounds == {(number, site) for number in (1, 2, 3) for site in SITES}
    assert digest_all(base.parameters(pieces.backbone.module)) == frozen
    start = pieces.initial(settings.seed)
    trained = {name for number, site in rounds for name in pieces.sent(number, site)}
    assert all(torch.equal(value, start[name]) for name, value in outcome.shared.items() if name not in trained)
    ledger = outcome.progress.ledger.payload
    assert {way: sum(ledger[way].values()) for way in ledger} == {
        way: table["total"] for way, table in predicted_bytes(pieces, sorted(SITES)).items()
    }


def _alike(count: int) -> dict[str, SiteData]:
    return {name: replace(SITES["a"], name=name) for name in "abc"[:count]}


@pytest.mark.parametrize("variant", [name for name in ALL if name != "stochastic_block site"])
def test_identical_sites_are_one_site(tmp_path: Path, variant: str) -> None:
    """Whole batches in float32: only the order of sums within a batch differs between sites."""
    train = {**federation.SGD, "batch_size": 32, "local_epochs": 2, "rounds": 2, "learning_rate": 0.02}
    one = federation.run(tmp_path / "one", _settings(variant, **train), _alike(1))
    three = federation.run(tmp_path / "three", _settings(variant, **train), _alike(3))
    start = one.experiment.initial(one.experiment.config.seed)
    moved = [name for name, value in one.shared.items() if not torch.equal(value, start[name])]
    assert moved
    for name, value in one.shared.items():
        torch.testing.assert_close(three.shared[name], value, rtol=2e-3, atol=2e-5)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("variant", ["stochastic_block", "stochastic_block site", "lora frozen a", "lora + prompts"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, variant: str) -> None:
    settings = _settings(variant, participation=0.5, rounds=4, moments="keep")
    whole = federation.run(tmp_path / "whole", settings, SITES)

    def die(way: str, site: str, data: bytes) -> None:  # noqa: ARG001
        calls.append(way)
        if len(calls) == 5:
            raise _Killed

    calls: list[str] = []
    with pytest.raises(_Killed):
        federation.run(tmp_path / "killed", settings, SITES, watch=die)
    resumed = federation.run(tmp_path / "killed", settings, SITES)
    assert equal(resumed.shared, whole.shared)
    assert all(equal(resumed.served(site), whole.served(site)) for site in SITES)


@pytest.mark.parametrize("first", [name for name in variants.HYBRIDS if "prompts" in name])
def test_the_order_of_a_hybrid_changes_nothing(tmp_path: Path, first: str) -> None:
    table = variants.table(first)
    outcomes: list[Tensors] = []
    for at, order in enumerate((table, table[::-1])):
        settings = _settings(first).model_copy(update={"tuner": federation.configure(tuner=order).tuner})
        outcomes.append(federation.run(tmp_path / str(at), settings, SITES).shared)
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-4, atol=1e-6)
