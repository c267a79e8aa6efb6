"""Awkward members run through serialised messages with half of the sites in a round, and do what their papers say."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium import registry
from consilium.check import predicted_bytes
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.local.predict import pooled_features
from consilium.protocols import Strategy, Tuner
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import Tensors, equal
from tests import federation
from tests.contracts import odd_members as odd

HALF = {"rounds": 5, "participation": 0.5, "batch_size": 6, "learning_rate": 0.01}
HALF_SGD = {**HALF, **federation.SGD}
SIZES = (9, 14, 12, 7)
LOST = {("b", 2), ("c", 3), ("d", 5), ("b", 7)}  # of the sites that are drawn in these rounds


def _run(
    folder: Path,
    strategy: Strategy | None = None,
    tuners: list[Tuner] | None = None,
    train: dict[str, Any] = HALF,
    wrap: federation.Wrap = lambda transport: transport,
    **tables: Any,
) -> federation.Outcome:
    settings = federation.configure(train=train, **tables)
    return federation.run(folder, settings, federation.hospitals(*SIZES), strategy=strategy, tuners=tuners, wrap=wrap)


def _personal(outcome: federation.Outcome, site: str) -> Tensors:
    """What a site keeps after its last round."""
    states = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
    return states.load(outcome.progress.builds_on[site]).personal.tensors


@pytest.mark.parametrize("name", [n for n, m in vars(odd).items() if getattr(m, "__module__", "") == odd.__name__])
def test_a_member_takes_sixty_lines_at_most(name: str) -> None:
    assert len(inspect.getsource(getattr(odd, name)).splitlines()) <= 60


# ------------------------------------------------------------------------------------------------ stochastic block
@pytest.mark.parametrize("per_site", [False, True])
@pytest.mark.parametrize("losses", [set(), LOST], ids=["whole", "lossy"])
def test_stochastic_block_moves_one_block_and_sends_exactly_what_is_lacking(
    tmp_path: Path, per_site: bool, losses: set[tuple[str, int]]
) -> None:
    train = {**HALF, "rounds": 8, "quorum": 0.5}
    wrap = lambda inner: federation.Lossy(inner, losses)  # noqa: E731
    outcome = _run(tmp_path, tuners=[odd.StochasticBlock(per_site)], train=train, wrap=wrap)
    replied = {(number, site) for number, site, _ in outcome.sent("up")}
    assert len(replied) == 16 - len(losses)
    specs, holds = outcome.experiment.model.specs, dict.fromkeys("abcd", 0)
    changed = dict.fromkeys(specs, 0)
    blocks: dict[int, set[int]] = {}
    for way, site, data in outcome.wire:
        message = outcome.decode(way, data)
        number, tensors = message.round, message.tensors
        if way == "up" and tensors:
            moved = {specs[name].tag.block for name in tensors}
            assert len(moved) == 2
            assert None in moved, "the head is trained in every round"
            blocks.setdefault(number, set()).update(moved - {None})
            changed |= dict.fromkeys(tensors, number)
        elif way == "down":
            lacking = {name for name, version in changed.items() if version >= holds[site]}
            if not holds[site]:  # of what nobody has changed yet, its own backbone has the weights
                lacking -= {name for name in outcome.experiment.common if not changed[name]}
            assert tensors.keys() == lacking
            holds[site] = number if (number, site) in replied else holds[site]
    assert any(len(chosen) > 1 for chosen in blocks.values()) == per_site
    if not per_site:
        six = [next(iter(blocks[number])) for number in range(1, 7)]
        assert len(set(six)) == 6, "no block comes again before all had their turn"


@pytest.mark.parametrize("per_site", [False, True])
def test_bytes_of_a_tuner_that_changes_its_mind_are_predicted(tmp_path: Path, per_site: bool) -> None:
    outcome = _run(tmp_path, tuners=[odd.StochasticBlock(per_site)])
    measured = outcome.progress.ledger.summary()
    predicted = predicted_bytes(outcome.experiment, "abcd")
    assert {way: predicted[way] for way in ("up", "down")} == {way: measured[way] for way in ("up", "down")}


def test_a_block_is_averaged_over_the_sites_that_trained_it(tmp_path: Path) -> None:
    outcome = _run(
        tmp_path, tuners=[odd.StochasticBlock(per_site=True)], train={**HALF, "rounds": 1, "participation": 1}
    )
    updates = {site: tensors for _, site, tensors in outcome.sent("up")}
    sizes = dict(zip("abcd", SIZES, strict=True))
    initial = outcome.experiment.model.initial(3)
    names = set().union(*updates.values())
    assert {len([t for t in updates.values() if name in t]) for name in names} - {len(SIZES)}, "blocks differ"
    for name, start in initial.items():
        holders = {site: tensors[name].double() for site, tensors in updates.items() if name in tensors}
        total = sum(sizes[site] for site in holders)
        mean = sum(sizes[site] * value for site, value in holders.items()) / total if holders else start.double()
        torch.testing.assert_close(outcome.shared[name].double(), mean, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ SCAFFOLD
def test_scaffold_starts_as_fedavg_and_then_leaves_it(tmp_path: Path) -> None:
    for rounds, same in ((1, True), (3, False)):
        train = {**HALF_SGD, "rounds": rounds}
        plain = _run(tmp_path / f"plain{rounds}", FedAvg("uniform"), train=train)
        scaffold = _run(tmp_path / f"scaffold{rounds}", odd.Scaffold(), train=train)
        assert all(torch.equal(scaffold.shared[name], value) for name, value in plain.shared.items()) == same


def test_scaffold_server_control_is_the_mean_of_the_sites_controls(tmp_path: Path) -> None:
    outcome = _run(tmp_path, odd.Scaffold(), train=HALF_SGD)
    sites = [_personal(outcome, site) for site in "abcd"]
    assert len(outcome.sent("up")) == 10
    for name in outcome.experiment.model.specs:
        mean = torch.stack([site[name] for site in sites]).mean(0)
        torch.testing.assert_close(outcome.shared[f"c/{name}"], mean, rtol=1e-4, atol=1e-5)
    assert outcome.shared["c/head.weight"].abs().max() > 1e-3


def test_scaffold_refuses_what_is_no_plain_sgd() -> None:
    federation.assemble(federation.configure(train=federation.SGD), odd.Scaffold())
    changes = ({"momentum": 0.9}, {"clip_norm": 1.0}, {"weight_decay": 0.01})
    for train in ({}, *({**federation.SGD, **change} for change in changes)):
        with pytest.raises(ConfigError, match="plain SGD"):
            federation.assemble(federation.configure(train=train), odd.Scaffold())


# ------------------------------------------------------------------------------------------------ FLoRA
def _flora(folder: Path, losses: set[tuple[str, int]] = frozenset()) -> federation.Outcome:
    lossy = lambda inner: federation.Lossy(inner, losses, before_work=False)  # noqa: E731
    tuner = registry.build("tuners", "lora", {"rank": 2, "alpha": 5, "blocks": [0, 3]})
    return _run(folder, odd.Flora(), [tuner], train={**HALF, "quorum": 0.5}, wrap=lossy)


def test_flora_stack_is_the_dense_weighted_average(tmp_path: Path) -> None:
    outcome = _flora(tmp_path)
    sizes = dict(zip("abcd", SIZES, strict=True))
    modules = [name.removesuffix(".a") for name in outcome.experiment.model.specs if name.endswith(".a")]
    base = dict(outcome.experiment.backbone.module.named_parameters())
    for module in modules:
        folded = base[module.split(".lora.")[0] + ".weight"].double()
        for number in range(1, 6):
            updates = {site: tensors for n, site, tensors in outcome.sent("up") if n == number}
            total = sum(sizes[site] for site in updates)
            dense = sum(
                sizes[site] / total * 2.5 * t[f"{module}.b"].double() @ t[f"{module}.a"].double()
                for site, t in updates.items()
            )
            a, b = (outcome.shared[f"stack-{number:03d}/{module}.{factor}"].double() for factor in "ab")
            assert a.shape[0] == b.shape[1] == 2 * len(updates)
            torch.testing.assert_close(b @ a, dense, rtol=1e-5, atol=1e-7)
            folded = folded + dense
        served = outcome.served("a")[module.split(".lora.")[0] + ".weight"]
        torch.testing.assert_close(served.double(), folded, rtol=1e-5, atol=1e-6)


def test_flora_catches_up_every_missed_stack_and_all_bases_are_alike(tmp_path: Path) -> None:
    outcome = _flora(tmp_path, LOST)
    sent = {(number, site) for number, site, _ in outcome.sent("up")}
    replied = {(number, site) for number, site in sent if (site, number) not in LOST}
    assert len(sent) == 10
    assert len(replied) == 7
    holds = dict.fromkeys("abcd", 0)
    for number, site, tensors in [*outcome.sent("down"), *((6, s, t) for _, s, t in outcome.sent("finish"))]:
        stacks = {name.split("/")[0] for name in tensors if "/" in name}
        assert stacks == {f"stack-{n:03d}" for n in range(max(holds[site], 1), number)}
        holds[site] = number if (number, site) in replied else holds[site]
    assert all(equal(outcome.served("a"), outcome.served(site)) for site in "bcd")
    module = next(name for name in outcome.served("a") if name.endswith("qkv.weight"))
    assert not torch.equal(outcome.served("a")[module], outcome.experiment.backbone.module.get_parameter(module))


# ---------------------------------------------------------------------------------------------- dual adapter, one shot
def test_routed_dual_adapter_keeps_its_own_part_and_the_router(tmp_path: Path) -> None:
    outcome = _run(tmp_path, odd.routed_dual_adapter())
    travelled = {name for way in ("up", "down") for _, _, t in outcome.sent(way) for name in t}
    specs = outcome.experiment.model.specs
    stays = {name for name, spec in specs.items() if spec.tag.part == "own"}
    assert {specs[name].tag.role for name in stays} == {"lora_a", "lora_b", "router"}
    assert travelled == specs.keys() - stays
    for site in "abcd":
        kept, start = _personal(outcome, site), outcome.experiment.model.initial(3)
        assert kept.keys() == stays
        assert not any(torch.equal(value, start[name]) for name, value in kept.items())
        federation.assert_absent(kept, outcome.wire)
    assert outcome.served("a").keys() == specs.keys()


def test_one_shot_mixture_is_the_discriminant_of_the_pooled_data(tmp_path: Path) -> None:
    member = odd.OneShotMixture()
    outcome = _run(tmp_path, member, train=HALF, tuner=[{"name": "linear"}])
    sent = [site for _, site, _ in outcome.sent("up")]
    assert sorted(sent) == ["a", "b", "c", "d"], "each site sends its sums once"
    pieces, sites = outcome.experiment, federation.hospitals(*SIZES)
    everyone = federation.pooled(sites).train
    x = pooled_features(pieces.model, {}, everyone, pieces.backbone.preprocessing, "cpu").double()
    y = torch.from_numpy(everyone.labels)
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    spread = x - means[y]
    covariance = spread.T @ spread / len(x) + member.ridge * torch.eye(x.shape[1], dtype=torch.float64)
    torch.testing.assert_close(
        outcome.shared["head.weight"].double(), means @ torch.linalg.inv(covariance), rtol=1e-3, atol=1e-4
    )
    predictions = x @ outcome.shared["head.weight"].double().T + outcome.shared["head.bias"].double()
    assert (predictions.argmax(1) == y).double().mean() > 0.9


@pytest.mark.parametrize("strategy", [odd.Scaffold(), odd.Flora(), odd.routed_dual_adapter()], ids=type)
def test_the_order_of_replies_changes_no_bit(tmp_path: Path, strategy: Strategy) -> None:
    train = {**HALF_SGD, "rounds": 3}
    forth = _run(tmp_path / "forth", strategy, train=train)
    back = _run(tmp_path / "back", strategy, train=train, wrap=federation.Backwards)
    assert equal(forth.shared, back.shared)
    assert equal(forth.progress.server.memory, back.progress.server.memory)
    assert all(equal(forth.served(site), back.served(site)) for site in "abcd")
