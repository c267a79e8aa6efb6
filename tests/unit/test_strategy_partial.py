"""FedBN and LG-FedAvg: what stays and what travels."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.errors import ConfigError
from consilium.strategies.fedavg import FedAvg
from consilium.strategies.partial import above, below
from consilium.tensors import equal
from tests import federation

HOSPITALS = federation.hospitals(14, 9, 20)
FULL = [{"name": "full"}]


def _sent(strategy: dict[str, Any], **tables: Any) -> set[str]:
    return set(federation.assemble(federation.configure(strategy=strategy, **tables)).up(1))


@pytest.mark.parametrize("tuner", [[{"name": "lora", "rank": 4}, {"name": "norm"}], FULL], ids=["lora + norm", "full"])
def test_norms_of_two_sites_differ_under_fedbn_and_never_travel(tmp_path: Path, tuner: list[dict[str, Any]]) -> None:
    """I19: LayerNorms are norms, whatever their names."""
    settings = federation.configure(strategy={"name": "fedbn"}, tuner=tuner)
    outcome = federation.run(tmp_path, settings, HOSPITALS)
    specs = outcome.experiment.model.specs
    norms = {name for name, spec in specs.items() if spec.tag.role == "norm"}
    assert {name.split(".")[-2] for name in norms} == {"norm1", "norm2", "norm"}
    assert len(norms) == 2 * (2 * 6 + 1)
    travelled = {name for _, _, tensors in outcome.sent("up", "down", "finish") for name in tensors}
    assert travelled == specs.keys() - norms
    for one, other in combinations(HOSPITALS, 2):
        assert not any(torch.equal(outcome.served(one)[name], outcome.served(other)[name]) for name in norms)
        assert all(torch.equal(outcome.served(one)[n], outcome.served(other)[n]) for n in specs.keys() - norms)


@pytest.mark.parametrize("tuner", ["lora", "bitfit", "linear"])
def test_fedbn_without_a_norm_is_refused(tuner: str) -> None:
    with pytest.raises(ConfigError, match="missing: \\['norm'\\]"):
        federation.assemble(federation.configure(strategy={"name": "fedbn"}, tuner=[{"name": tuner}]))


@pytest.mark.parametrize("block", [None, 0, 3, 5])
def test_lg_and_fedper_divide_the_same_tensors(block: int | None) -> None:
    personal = {} if block is None else {"personal_from_block": block}
    shared = {} if block is None else {"shared_from_block": block}
    everything = set(federation.assemble(federation.configure(tuner=FULL)).model.specs)
    lower = _sent({"name": "fedper", **personal}, tuner=FULL)
    upper = _sent({"name": "lg", **shared}, tuner=FULL)
    assert lower | upper == everything
    assert not lower & upper


def test_lg_keeps_what_lies_below_and_averages_the_head(tmp_path: Path) -> None:
    outcome = federation.run(tmp_path, federation.configure(strategy={"name": "lg"}), HOSPITALS)
    assert outcome.shared.keys() == {"head.weight", "head.bias"}
    lower = outcome.experiment.model.specs.keys() - outcome.shared.keys()
    assert not any(torch.equal(outcome.served("a")[name], outcome.served("b")[name]) for name in lower)


def test_with_everything_on_one_side_both_are_fedavg_or_local(tmp_path: Path) -> None:
    """I11."""
    names = ("fedavg", "local")
    fedavg, local = (
        federation.run(tmp_path / name, federation.configure(strategy={"name": name}), HOSPITALS) for name in names
    )
    all_above = FedAvg(shares=lambda tag: above(0)(tag) or below(0)(tag))
    none = FedAvg(shares=lambda tag: above(0)(tag) and below(0)(tag))
    settings = federation.configure()
    assert equal(federation.run(tmp_path / "1", settings, HOSPITALS, strategy=all_above).shared, fedavg.shared)
    alone = federation.run(tmp_path / "2", settings, HOSPITALS, strategy=none)
    assert all(equal(alone.served(site), local.served(site)) for site in HOSPITALS)


@pytest.mark.parametrize(
    ("strategy", "tuner"),
    [
        ({"name": "fedper", "personal_from_block": 3}, {"name": "lora", "blocks": [0, 2]}),
        ({"name": "fedrep", "personal_from_block": 1}, {"name": "prompts", "length": 2}),
        ({"name": "lg", "shared_from_block": 3}, {"name": "lora", "blocks": [0]}),
        ({"name": "fedala", "mix_from_block": 1}, {"name": "linear"}),
    ],
    ids=lambda table: table["name"],
)
def test_a_block_from_which_nothing_is_trained_is_refused(strategy: dict[str, Any], tuner: dict[str, Any]) -> None:
    """A selector that selects nothing: the model would silently be divided otherwise than was meant."""
    with pytest.raises(ConfigError, match="nothing that is trained lies from this block on"):
        _sent(strategy, tuner=[tuner])
    (key,) = strategy.keys() - {"name"}
    assert _sent({**strategy, key: 0}, tuner=[tuner]) is not None


def test_a_block_that_is_not_there_and_a_head_that_is_frozen_are_refused() -> None:
    with pytest.raises(ConfigError, match="no such block"):
        _sent({"name": "lg", "shared_from_block": 6})
    with pytest.raises(ConfigError, match="role that nothing has"):
        _sent({"name": "lg"}, head={"share": "frozen"})
