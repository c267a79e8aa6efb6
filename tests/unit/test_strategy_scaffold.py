"""SCAFFOLD against its paper's algorithm 1 in NumPy; what it is equal to; what fails when weights disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.check import predicted_passes
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError, TrainingError
from consilium.local.train import Trainer
from consilium.protocols import Strategy
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import Tensors, equal
from tests import federation, quadratics
from tests.quadratics import Federation

DRAWS = (("a", "b"), ("c", "d"), ("a", "d"), ("b", "c"), ("a", "c"), ("b", "d"))
SITES = quadratics.problems(30, 50, 20, 7)
START = np.linspace(-1, 1, quadratics.SIZE)
CLOSE = {"rtol": 0, "atol": 1e-10}
RATE, STEPS = 0.05, 3


def _scaffold(**options: Any) -> Strategy:
    member: Strategy = registry.build("strategies", "scaffold", options)
    return member


def _by_the_paper(draws: tuple[tuple[str, ...], ...], weights: dict[str, float], option: int) -> list[np.ndarray]:
    """Algorithm 1 with the means of line 16 and 17 weighted; weights of all sites add up to one."""
    x, c, own = START.copy(), np.zeros_like(START), {site: np.zeros_like(START) for site in SITES}
    found = []
    for drawn in draws:
        models, controls = {}, {}
        for site in drawn:
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (SITES[site].gradient(y) - own[site] + c)
            models[site] = y
            controls[site] = SITES[site].gradient(x) if option == 1 else own[site] - c + (x - y) / (STEPS * RATE)
        c = c + sum(weights[site] * (controls[site] - own[site]) for site in drawn)
        x = sum(weights[site] * models[site] for site in drawn) / sum(weights[site] for site in drawn)
        own |= controls
        found.append(x)
    return found


@pytest.mark.parametrize(("control", "option"), [("gradient", 1), ("way", 2)])
@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_it_is_the_papers_algorithm(weights: str, control: str, option: int) -> None:
    """Half of the sites in a round; by images after a round of all, in which the server learns how many each has."""
    images = {site: problem.images if weights == "examples" else 1 for site, problem in SITES.items()}
    share = {site: count / sum(images.values()) for site, count in images.items()}
    draws = ((*SITES,), *DRAWS)
    here = Federation(_scaffold(weights=weights, control=control), SITES, START, STEPS, RATE)
    for drawn, x in zip(draws, _by_the_paper(draws, share, option), strict=True):
        here.round(*drawn)
        np.testing.assert_allclose(here.shared, x, **CLOSE)


def test_until_a_site_has_sent_something_it_counts_like_the_mean_of_the_others() -> None:
    here = Federation(_scaffold(), SITES, START, STEPS, RATE)
    here.round("a", "b")
    own = {
        site: quadratics.whole({n: here.kept[site].tensors[f"control/{n}"] for n in ("body", "head")}) for site in "ab"
    }
    expected = (30 * own["a"] + 50 * own["b"]) / (40 * len(SITES))
    found = quadratics.whole({n: here.server.shared[f"control/{n}"] for n in ("body", "head")})
    np.testing.assert_allclose(found, expected, **CLOSE)


# ------------------------------------------------------------------------------------------------ I13
@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_one_step_of_all_is_fedavg_in_every_round(weights: str) -> None:
    scaffold, fedavg = (
        Federation(strategy, SITES, START, 1, RATE) for strategy in (_scaffold(weights=weights), FedAvg(weights))
    )
    for _ in range(4):
        scaffold.round()
        fedavg.round()
        np.testing.assert_allclose(scaffold.shared, fedavg.shared, **CLOSE)


def test_it_is_not_where_models_are_weighted_and_controls_are_not() -> None:
    """The published defect: what a mean over images of the models needs is that of the controls too."""
    x, controls = START, {site: problem.gradient(START) for site, problem in SITES.items()}
    uniform = np.mean(list(controls.values()), axis=0)
    images = np.array([problem.images for problem in SITES.values()])
    steps = [x - RATE * (p.gradient(x) - controls[s] + uniform) for s, p in SITES.items()]
    plain = [x - RATE * p.gradient(x) for p in SITES.values()]
    assert np.abs(np.average(steps, 0, images) - np.average(plain, 0, images)).max() > 1e-3


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_its_first_round_is_fedavg_bit_by_bit_and_its_third_is_not(tmp_path: Path, weights: str) -> None:
    for rounds, same in ((1, True), (3, False)):
        train = {**federation.SGD, "rounds": rounds, "participation": 0.67}
        outcomes = [
            federation.run(
                tmp_path / f"{rounds} {type(s).__name__}", federation.configure(train=train), HOSPITALS, strategy=s
            )
            for s in (FedAvg(weights), _scaffold(weights=weights))
        ]
        plain, scaffold = (outcome.shared for outcome in outcomes)
        assert all(torch.equal(scaffold[name], value) for name, value in plain.items()) == same


# ------------------------------------------------------------------------------------------------ I14
@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_the_optimum_is_a_fixed_point_and_fedavg_leaves_it(weights: str) -> None:
    images = {site: float(p.images if weights == "examples" else 1) for site, p in SITES.items()}
    best = quadratics.optimum(SITES, images)
    scaffold = Federation(_scaffold(weights=weights, control="gradient"), SITES, best, 20, RATE)
    scaffold.rate = 0.0  # a round that only finds the controls
    scaffold.round()
    scaffold.rate = RATE
    fedavg = Federation(FedAvg(weights), SITES, best, 20, RATE)
    for _ in range(3):
        scaffold.round()
        fedavg.round()
    np.testing.assert_allclose(scaffold.shared, best, **CLOSE)
    assert np.abs(fedavg.shared - best).max() > 0.01


def test_it_goes_to_the_optimum_where_fedavg_stops_beside_it() -> None:
    best = quadratics.optimum(SITES, {site: float(p.images) for site, p in SITES.items()})
    scaffold, fedavg = (Federation(s, SITES, START, 10, 0.1) for s in (_scaffold(), FedAvg()))
    for _ in range(300):
        scaffold.round()
        fedavg.round()
    assert np.abs(scaffold.shared - best).max() < 1e-4 < 0.01 < np.abs(fedavg.shared - best).max()


# ------------------------------------------------------------------------------------------------ in a run
HOSPITALS = federation.hospitals(14, 9, 20)


def _personal(outcome: federation.Outcome, site: str) -> Tensors:
    states = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
    return states.load(outcome.progress.builds_on[site]).personal.tensors


@pytest.mark.parametrize("options", [{}, {"weights": "uniform"}, {"control": "gradient"}], ids=str)
def test_the_servers_control_is_the_mean_of_the_sites(tmp_path: Path, options: dict[str, str]) -> None:
    train = {"rounds": 4, "participation": 0.67} | (federation.SGD if "control" not in options else {})
    settings = federation.configure(strategy={"name": "scaffold", **options}, train=train)
    outcome = federation.run(tmp_path, settings, HOSPITALS)
    counts = {s: 1 if options.get("weights") == "uniform" else len(data.train) for s, data in HOSPITALS.items()}
    for name, spec in outcome.experiment.up(1).items():
        if spec.tag.slot == "control":
            terms = sum(counts[site] * _personal(outcome, site)[name].double() for site in HOSPITALS)
            mean = terms / sum(counts.values())
            torch.testing.assert_close(outcome.shared[name].double(), mean, rtol=1e-4, atol=1e-6)
    assert outcome.shared["control/head.weight"].abs().max() > 1e-3
    images = {site: len(data.train) for site, data in HOSPITALS.items()}
    assert outcome.progress.passes == predicted_passes(settings, images)
    assert "control/head.weight" not in outcome.served("a")


def test_gradients_of_sites_that_train_as_one_batch_are_their_own(tmp_path: Path) -> None:
    table, train = {"name": "scaffold", "control": "gradient"}, {"rounds": 2}
    alone, together = (
        federation.run(
            tmp_path / str(number),
            federation.configure(strategy=table, train=train, engine={"stacked_sites": number, "device": "cpu"}),
            HOSPITALS,
        ).shared
        for number in (1, 3)
    )
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)


def test_as_many_numbers_again_travel(tmp_path: Path) -> None:
    outcome = federation.run(
        tmp_path, federation.configure(strategy={"name": "scaffold"}, train=federation.SGD), HOSPITALS
    )
    specs = outcome.experiment.model.specs
    for _, _, tensors in outcome.sent("up"):
        assert tensors.keys() == specs.keys() | {f"control/{name}" for name in specs}


def test_what_is_personal_has_no_control(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "scaffold"}, train=federation.SGD, head={"share": "personal"})
    outcome = federation.run(tmp_path, settings, HOSPITALS)
    assert not [name for _, _, tensors in outcome.sent("up", "down") for name in tensors if "head" in name]
    assert "head.weight" in outcome.served("a")


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_a_site_without_images_sends_no_control(tmp_path: Path, weights: str) -> None:
    for control in ("way", "gradient"):
        table = {"name": "scaffold", "weights": weights, "control": control}
        settings = federation.configure(strategy=table, train={**federation.SGD, "rounds": 2})
        outcome = federation.run(tmp_path / control, settings, federation.hospitals(14, 0))
        assert not [name for _, site, tensors in outcome.sent("up") for name in tensors if site == "b" and "/" in name]
        assert all(torch.isfinite(value).all() for value in outcome.shared.values())


def test_the_way_of_another_optimiser_is_no_gradient() -> None:
    changes = ({"momentum": 0.9}, {"clip_norm": 1.0}, {"weight_decay": 0.01})
    for train in ({}, *({**federation.SGD, **change} for change in changes)):
        with pytest.raises(ConfigError, match="plain SGD"):
            federation.assemble(federation.configure(train=train, strategy={"name": "scaffold"}))
        federation.assemble(federation.configure(train=train, strategy={"name": "scaffold", "control": "gradient"}))


def test_a_gradient_pass_is_the_gradient_of_all_images_and_finds_what_is_not_finite() -> None:
    pieces = federation.assemble(federation.configure())
    trainer = Trainer(pieces.setting, HOSPITALS["a"].train, 2, "a", [5, 5, 4])
    start = pieces.model.initial(3)
    found = trainer.gradient(start)
    assert found.keys() == start.keys()
    every = trainer.fit(start, learning_rate=1.0, epochs=1, objective=None)
    assert every.num_steps > 1
    settings = federation.configure(train={**federation.SGD, "batch_size": 64, "rounds": 1})
    setting = federation.assemble(settings).setting
    whole = Trainer(setting, HOSPITALS["a"].train, 2, "a", [5, 5, 4])
    step = whole.fit(start, learning_rate=1.0)
    for name, value in found.items():
        torch.testing.assert_close(start[name] - step.variables[name], value, rtol=1e-3, atol=1e-6)
    assert equal(found, trainer.gradient(start))
    with pytest.raises(TrainingError, match="not finite"):
        trainer.gradient({**start, "head.weight": start["head.weight"] * torch.inf})


def test_the_loss_that_is_logged_is_the_tasks() -> None:
    """The linear term has a gradient and no value."""
    here = Federation(_scaffold(), SITES, START, STEPS, RATE)
    for _ in range(3):
        here.round()
    training = quadratics.Quadratic(SITES["a"], "a", 4, STEPS, RATE, lambda *_: True)
    learned = here.strategy.learn(here.strategy.send(here.server, "a"), here.kept["a"], training)
    model = {name: learned.update[name] for name in ("body", "head")}
    assert learned.loss == pytest.approx(float(training.loss(model, quadratics.BATCH)))
