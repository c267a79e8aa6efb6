"""The catalogue of invariants on a small ViT in float64, to 1e-10, and what must fail beside: docs/invariants.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from consilium import registry
from consilium.aggregation import Aggregation
from consilium.config import HeadConfig
from consilium.data import Batch
from consilium.products import Product, products
from consilium.protocols import Spec, Specs, Strategy, Update
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import Tensors
from consilium.tuners import base, compose
from tests import small, toy
from tests.toy import RATE, SITES, SIZES

CLOSE = {"rtol": 0, "atol": 1e-10}
SHARES = {site: size / sum(SIZES.values()) for site, size in SIZES.items()}
RANK = 2
LORA = {"name": "lora", "rank": RANK, "alpha": 3, "targets": ["qkv", "proj", "fc1"]}


def _images(site: str) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 16, 16] and labels of a site, some classes rare."""
    at = SITES.index(site)
    return toy.draw(40 + at, SIZES[site], 3, 16, 16), torch.arange(SIZES[site]) * (at + 1) % 3


@dataclass(frozen=True)
class Vit(toy.Toy):
    """`LocalTraining` of a small ViT in float64, with plain gradient descent on all images at once."""

    model: Any = None

    def data(self) -> tuple[Tensor, Tensor]:
        return _images(self.site)

    def loss(self, variables: Tensors, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model.forward(variables, batch.images), batch.labels)


@dataclass(frozen=True)
class World:
    """A strategy on that ViT, and what came of some rounds."""

    strategy: Strategy
    model: compose.TunedModel
    specs: Specs
    start: Tensors
    outcome: toy.Outcome

    def sent(self, number: int = 1) -> dict[str, Tensors]:
        """Updates of a round by site."""
        return {site: learned.update for site, learned in self.outcome.learned[number - 1].items()}

    @property
    def shared(self) -> Tensors:
        return self.outcome.server.shared

    @property
    def products(self) -> tuple[Product, ...]:
        return products(self.specs)

    def dense(self, product: Product, tensors: Tensors) -> Tensor:
        """left @ right, of the start where a factor is missing."""
        held = {**self.start, **tensors}
        return torch.cat([held[name] for name in product.left]) @ held[product.right]

    def acting(self, product: Product, tensors: Tensors) -> Tensor:
        """base + scale * left @ right: what the model feels."""
        own = base.parameters(self.model.backbone.module)
        held = torch.cat([{**own, **tensors}[name].detach() for name in product.base])
        return held + product.scale * self.dense(product, tensors)


def _world(strategy: Strategy, rounds: int = 1, steps: int = 1, tuner: dict[str, Any] = LORA) -> World:
    backbone = small.backbone()
    options = {key: value for key, value in tuner.items() if key != "name"}
    built = registry.build("tuners", tuner["name"], options)
    model = compose.attach(backbone, [built], HeadConfig(), 3, strategy.declares, 0)
    backbone.module.double()
    specs: dict[str, Spec] = {n: replace(spec, dtype=torch.float64) for n, spec in model.specs.items()}
    start: dict[str, Tensor] = {n: v.double() for n, v in small.moved(dict(model.initial(0))).items()}
    frozen = base.parameters(backbone.module) if strategy.declares.changes_base else {}
    whole = {**{n: v.detach() for n, v in frozen.items()}, **start}
    own = dict.fromkeys(SITES, start)

    def make(site: str, number: int) -> Vit:
        return Vit(strategy, specs, site, number, steps, model=model)

    return World(strategy, model, specs, start, toy.play(strategy, rounds, specs, whole, own, make))


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0]))


def _by(name: str, **options: Any) -> Strategy:
    return cast(Strategy, registry.build("strategies", name, options))


def _mean_of_products(world: World, product: Product, number: int = 1) -> Tensor:
    sent = world.sent(number)
    return _mean([world.dense(product, sent[site]) for site in SITES], [SHARES[site] for site in SITES])


# ------------------------------------------------------------------------------------------------ sums of factors
@pytest.mark.parametrize("name", ["flora", "fedex", "fedit"])
def test_i1_i2_what_acts_is_the_mean_of_products_and_not_under_the_mean_of_factors(name: str) -> None:
    world = _world(_by(name), steps=3)
    gaps = []
    for product in world.products:
        wanted = world.acting(product, {}) + product.scale * (
            _mean_of_products(world, product) - world.dense(product, {})
        )
        gaps.append(float((world.acting(product, world.shared) - wanted).abs().max()))
    assert max(gaps) < 1e-10 if name != "fedit" else min(gaps) > 1e-6


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_i3_with_one_factor_common_both_means_are_one(name: str) -> None:
    world = _world(_by(name), rounds=2, steps=3)
    start, sent = world.start, world.sent(2)
    held = {**start, **{n: v for n, v in world.outcome.received["a"].items() if n in start}}
    for product in world.products:
        dense = [world.dense(product, {**held, **sent[site]}) for site in SITES]
        mean = _mean(dense, [SHARES[site] for site in SITES])
        torch.testing.assert_close(world.dense(product, {**held, **world.shared}), mean, **CLOSE)
    trained = {n for t in sent.values() for n in t}
    assert all((product.right in trained) == (name == "rolora") for product in world.products)


def test_i4_another_basis_is_the_same_product_with_orthonormal_rows() -> None:
    svd, plain = _world(_by("fedsvd"), steps=3), _world(_by("ffa"), steps=3)
    for product in svd.products:
        torch.testing.assert_close(svd.dense(product, svd.shared), plain.dense(product, plain.shared), **CLOSE)
        right = svd.shared[product.right]
        torch.testing.assert_close(right @ right.T, torch.eye(RANK, dtype=torch.float64), **CLOSE)
        assert (plain.shared[product.right] @ right.T - torch.eye(RANK)).abs().max() > 1e-3, "it was not before"


def test_i5_flexlora_misses_what_the_dropped_singular_values_say() -> None:
    world = _world(_by("flexlora"), steps=3)
    for product in world.products:
        mean = _mean_of_products(world, product)
        dropped = torch.linalg.svdvals(mean)[RANK:]
        error = (world.dense(product, world.shared) - mean).norm()
        torch.testing.assert_close(error, dropped.norm(), **CLOSE)
        assert error > 1e-6, "something is dropped"


def test_i6_flexlora_of_one_site_is_lossless() -> None:
    world = _world(_by("flexlora"), steps=3)
    alone = world.strategy.combine(
        world.strategy.init_server(world.start, world.specs, SITES),
        [Update("a", world.sent()["a"], SIZES["a"])],
        world.specs,
    )
    for product in world.products:
        wanted = world.dense(product, world.sent()["a"])
        torch.testing.assert_close(world.dense(product, alone.shared), wanted, **CLOSE)


def test_i7_the_residual_is_the_covariance_and_has_rank_k_minus_one_times_r() -> None:
    """Not K r: the deviations from a mean add up to nothing."""
    world = _world(_by("fedex"), steps=3)
    weights = [SHARES[site] for site in SITES]
    for product in world.products:
        sent = [world.sent()[site] for site in SITES]
        lefts = [torch.cat([t[name] for name in product.left]) for t in sent]
        rights = [t[product.right] for t in sent]
        left, right = _mean(lefts, weights), _mean(rights, weights)
        covariance = _mean([(b - left) @ (a - right) for b, a in zip(lefts, rights, strict=True)], weights)
        own = base.parameters(world.model.backbone.module)
        before = torch.cat([own[name].detach() for name in product.base])
        residual = (torch.cat([world.shared[name] for name in product.base]) - before) / product.scale
        torch.testing.assert_close(residual, covariance, **CLOSE)
        torch.testing.assert_close(residual, _mean_of_products(world, product) - left @ right, **CLOSE)
        assert torch.linalg.matrix_rank(covariance, rtol=1e-9) == (len(SITES) - 1) * RANK


# ------------------------------------------------------------------------------------------------ one full step
TUNERS = {
    "lora": LORA,
    "adapter": {"name": "adapter", "width": 3},
    "prompts": {"name": "prompts", "length": 2},
    "bitfit": {"name": "bitfit"},
    "full": {"name": "full"},
}


def _slope(world: World, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    leaves = {n: v.clone().requires_grad_() for n, v in world.start.items()}
    loss = F.cross_entropy(world.model.forward(leaves, images), labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _gap(first: Tensors, second: Tensors) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in second)


@pytest.mark.parametrize("tuner", TUNERS)
def test_i8_i9_one_full_step_of_fedavg_is_the_centralised_step_whatever_is_trained(tuner: str) -> None:
    """And not with uniform weights, nor with Adam, whose first step is a sign."""
    world, uniform = (_world(FedAvg(weights), tuner=TUNERS[tuner]) for weights in ("examples", "uniform"))
    images, labels = (torch.cat(parts) for parts in zip(*map(_images, SITES), strict=True))
    slope = _slope(world, images, labels)
    central = {n: v - RATE * slope[n] for n, v in world.start.items()}
    assert _gap(world.shared, central) < 1e-10
    assert _gap(uniform.shared, central) > 1e-5
    signs = [{n: g / (g.abs() + 1e-8) for n, g in _slope(world, *_images(site)).items()} for site in SITES]
    means = {n: _mean([s[n] for s in signs], list(SHARES.values())) for n in slope}
    assert _gap(means, {n: g / (g.abs() + 1e-8) for n, g in slope.items()}) > 0.1


def test_i8_factor_averaging_is_centralised_and_product_averaging_is_not_by_lr_squared() -> None:
    """Section 3.1: both statements are true. The gap of fedex is the covariance, which falls as the rate squared."""
    gaps = []
    for rate in (0.4, 0.2, 0.1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toy, "RATE", rate)
            factors, product = _world(_by("fedit")), _world(_by("fedex"))
        images, labels = (torch.cat(parts) for parts in zip(*map(_images, SITES), strict=True))
        slope = _slope(factors, images, labels)
        central = {n: v - rate * slope[n] for n, v in factors.start.items()}
        assert _gap(factors.shared, central) < 1e-10
        first = factors.products[0]
        gaps.append(float((product.acting(first, product.shared) - factors.acting(first, central)).norm()))
    ratios = [one / other for one, other in pairwise(gaps)]
    assert all(3.9 < ratio < 4.1 for ratio in ratios), gaps


# ------------------------------------------------------------------------------------------------ optimisation
@pytest.mark.parametrize("mu", [0.0, 0.3, 5.0])
def test_i12_fedprox_of_one_step_is_fedavg_and_of_two_is_not(mu: float) -> None:
    for steps, same in ((1, True), (2, mu == 0)):
        one = _world(registry.build("strategies", "fedprox", {"mu": mu}), steps=steps)
        assert (_gap(one.shared, _world(FedAvg(), steps=steps).shared) < 1e-10) == same


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_i13_scaffold_of_one_step_is_fedavg_in_every_round(weights: str) -> None:
    """And of several steps in round 1 alone."""
    scaffold = lambda rounds, steps: _world(_by("scaffold", weights=weights), rounds, steps)  # noqa: E731
    fedavg = lambda rounds, steps: _world(FedAvg(cast(Any, weights)), rounds, steps)  # noqa: E731
    assert _gap(scaffold(4, 1).shared, fedavg(4, 1).shared) < 1e-10
    assert _gap(scaffold(1, 3).shared, fedavg(1, 3).shared) == 0
    assert _gap(scaffold(3, 3).shared, fedavg(3, 3).shared) > 1e-7


def test_i16_a_server_step_of_one_is_fedavg_and_adams_first_is_adams() -> None:
    plain = _world(FedAvg(), rounds=3, steps=2)
    same = _world(_by("fedopt", server="avgm", beta1=0.0, server_learning_rate=1.0), rounds=3, steps=2)
    assert _gap(same.shared, plain.shared) < 1e-10
    once, b1, b2, eps = _world(FedAvg(), steps=2), 0.9, 0.99, 1e-3
    eta, tau = np.sqrt(1 - b2) / (1 - b1), eps * np.sqrt(1 - b2)
    options = {"server": "adam", "beta1": b1, "beta2": b2, "tau": tau, "start": "zero", "server_learning_rate": eta}
    adam = _world(_by("fedopt", **options), steps=2)
    for name, mean in once.shared.items():
        parameter = torch.nn.Parameter(once.start[name].clone())
        optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(b1, b2), eps=eps)
        parameter.grad = once.start[name] - mean
        optimizer.step()
        torch.testing.assert_close(adam.shared[name], parameter.detach(), **CLOSE)


# ------------------------------------------------------------------------------------------------ several adapters
def test_i20_the_mean_of_the_others_follows_from_the_mean_of_all() -> None:
    own = [toy.draw(at, 4, 3) for at in range(5)]
    mean = _mean(own, [1 / 5] * 5)
    for at, value in enumerate(own):
        others = _mean([v for i, v in enumerate(own) if i != at], [1 / 4] * 4)
        torch.testing.assert_close((5 * mean - value) / 4, others, **CLOSE)


def test_i23_both_adapters_merged_are_the_summed_forward() -> None:
    world = _world(_by("dual_lora", personal_rank=3), rounds=2, steps=2)
    served = world.outcome.model(world.strategy, "b")
    images, _ = _images("b")
    summed = world.model.features(served, images)
    alone = world.model.features({n: v for n, v in served.items() if ".personal." not in n}, images)
    assert (summed - alone).abs().max() > 1e-6
    torch.testing.assert_close(compose.merge(world.model, served)(images), summed, **CLOSE)


def test_a_robust_sum_in_place_of_the_mean_is_another_step() -> None:
    """Without this the identities above could hold whatever is summed."""
    world = _world(FedAvg("uniform", aggregate=Aggregation("median")))
    assert _gap(world.shared, _world(FedAvg("uniform")).shared) > 1e-6
