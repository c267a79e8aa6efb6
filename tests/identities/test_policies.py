"""Degenerate options are the simpler method bit by bit, whatever the optimiser, its decay, its moments and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.tensors import equal
from tests import federation

SITES = federation.hospitals(14, 9, 20)
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"weight_decay": 0.5, "moments": "keep", "schedule": {"name": "cosine", "warmup": 0.2}},
    "sgd": {**federation.SGD, "weight_decay": 0.3, "momentum": 0.9, "moments": "keep", "accumulate": 2},
}
CLIP = {"clip_norm": 0.0}
SAME = {  # a method with options -> the method it then is, and what may not be clipped
    "fedprox": ({"mu": 0.0}, ("fedavg", {}), {}),
    "moon": ({"mu": 0.0}, ("fedavg", {}), {}),
    "ditto": ({"strength": 3.0}, ("fedavg", {}), {}),
    "apfl": ({"alpha": 0.0, "learn_alpha": False}, ("fedavg", {}), CLIP),
    "fedopt": ({"server": "avgm", "beta1": 0.0, "server_learning_rate": 1.0}, ("fedavg", {}), {}),
    "feddpa_t": ({}, ("fedit", {"weights": "uniform"}), {}),
    "feddpa_f": ({}, ("fedit", {"weights": "uniform"}), {}),
    "dual_lora": ({"personal_rank": 0}, ("fedit", {}), {}),
    "fedopal": ({"strength": 0.0}, ("dual_lora", {}), {}),
}


def _run(folder: Path, name: str, options: Mapping[str, Any], train: Mapping[str, Any]) -> federation.Outcome:
    settings = federation.configure(strategy={"name": name, **options}, train={"participation": 0.67, **train})
    return federation.run(folder, settings, SITES)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SAME)
def test_a_degenerate_method_is_the_simpler_one_under_every_policy(tmp_path: Path, name: str, policy: str) -> None:
    options, (other, others), more = SAME[name]
    train = {**POLICIES[policy], **more}
    found, plain = _run(tmp_path / "found", name, options, train), _run(tmp_path / "plain", other, others, train)
    assert equal({n: found.shared[n] for n in plain.shared}, plain.shared)
    if name in ("fedprox", "moon", "dual_lora", "fedopal"):
        assert all(equal(found.served(site), plain.served(site)) for site in SITES)


@pytest.mark.parametrize("policy", POLICIES)
def test_fedamp_without_a_pull_is_local_training_under_every_policy(tmp_path: Path, policy: str) -> None:
    """Of all sites in every round; one that is first drawn later begins with the mean that it is sent."""
    for participation, same in ((1.0, True), (0.67, False)):
        train = {**POLICIES[policy], "participation": participation}
        settings = federation.configure(strategy={"name": "local"}, train=train)
        secrets = dict.fromkeys(SITES, 3)
        local = federation.run(tmp_path / f"local {same}", settings, SITES, secrets=secrets)
        found = _run(tmp_path / f"fedamp {same}", "fedamp", {"pull": 0.0}, train)
        assert all(equal(found.served(site), local.served(site)) for site in SITES) == same


@pytest.mark.parametrize("policy", POLICIES)
def test_pfedmes_shared_model_feels_neither_decay_nor_momentum(tmp_path: Path, policy: str) -> None:
    """It has no gradient of its own, so an optimiser must leave it where `after_step` put it."""
    found = _run(tmp_path, "pfedme", {"outer_rate": 0.0}, POLICIES[policy])
    start = found.experiment.model.initial(3)
    assert all(torch.equal(value, start[name]) for name, value in found.shared.items())
    assert not equal(found.served("a"), start)
