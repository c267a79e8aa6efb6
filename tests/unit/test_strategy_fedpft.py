"""fedpft: what a site sends against moments and scikit-learn, the head against scikit-learn's, and what is hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from torch import Tensor

from consilium import mixtures, registry, results, seeds
from consilium.data import Examples, SiteData
from consilium.errors import ConfigError, TrainingError, WireError
from consilium.local.train import Trainer
from consilium.mixtures import Mixture
from consilium.protocols import Update
from consilium.tensors import equal
from tests import federation

SITES = federation.hospitals(40, 25)
LINEAR = [{"name": "linear"}]


def _settings(**options: Any) -> Any:
    train = {"rounds": options.pop("rounds", 1), "participation": options.pop("participation", 1.0)}
    return federation.configure(tuner=LINEAR, strategy={"name": "fedpft", **options}, train=train)


def _run(folder: Path, sites: Mapping[str, SiteData] = SITES, **options: Any) -> federation.Outcome:
    return federation.run(folder, _settings(**options), sites)


def _features(outcome: federation.Outcome, examples: Examples) -> np.ndarray:
    """Of the frozen backbone, by hand."""
    wanted = outcome.experiment.backbone.preprocessing
    pixels = torch.from_numpy(examples.images[examples.rows].astype(np.float32) / 255)
    images = ((pixels - torch.tensor(wanted.mean)) / torch.tensor(wanted.std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return outcome.experiment.backbone.module(images).double().numpy()


def _sent(outcome: federation.Outcome) -> dict[str, Mapping[str, Tensor]]:
    return {site: tensors for _, site, tensors in outcome.sent("up")}


def _few(data: SiteData, label: int, keep: int) -> SiteData:
    """The site with `keep` images of a class."""
    labels = data.train.labels
    rows = np.concatenate([np.flatnonzero(labels != label), np.flatnonzero(labels == label)[:keep]])
    cut = {key: getattr(data.train, key)[rows] for key in ("rows", "labels", "ids", "groups", "origins")}
    return replace(data, train=Examples(data.train.images, **cut))


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
def test_one_component_is_the_mean_and_variance_of_a_class(tmp_path: Path, kind: str) -> None:
    outcome = _run(tmp_path, components=1, covariance=kind, floor=1e-3)
    for site, tensors in _sent(outcome).items():
        x, labels = _features(outcome, SITES[site].train), SITES[site].train.labels
        for at in range(3):
            own = x[labels == at]
            covariance = np.cov(own.T, bias=True) + 1e-3 * np.eye(x.shape[1])
            assert tensors["mixture/count"][at] == len(own)
            np.testing.assert_allclose(tensors["mixture/mean"][at, 0], own.mean(axis=0), atol=1e-5)
            spread = tensors["mixture/spread"][at].double()
            if kind == "full":
                root = mixtures.unpacked(spread, x.shape[1])[0].numpy()
                np.testing.assert_allclose(root @ root.T, covariance, atol=1e-4)
            else:
                wanted = np.diag(covariance) if kind == "diagonal" else np.diag(covariance).mean()
                np.testing.assert_allclose(spread[0] ** 2, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_mixtures_and_head_are_scikit_learns(tmp_path: Path, participation: float) -> None:
    """Two components end where scikit-learn's steps from the same place stay; the head solves its problem on draws."""
    outcome = _run(tmp_path, components=2, samples=30, decay=0.01, participation=participation)
    sent = _sent(outcome)
    assert len(sent) == (2 if participation == 1 else 1)
    for site, tensors in sent.items():
        x, labels = _features(outcome, SITES[site].train), SITES[site].train.labels
        for at in range(3):
            weight, mean, spread = (
                tensors[f"mixture/{part}"][at].double().numpy() for part in ("weight", "mean", "spread")
            )
            k = int((weight > 0).sum())
            start = {
                "weights_init": weight[:k] / weight.sum(),
                "means_init": mean[:k],
                "precisions_init": 1 / spread[:k] ** 2,
            }
            theirs = GaussianMixture(k, covariance_type="diag", reg_covar=1e-4, tol=1e-3, **start).fit(x[labels == at])
            mine = Mixture(*(torch.from_numpy(each[:k]) for each in (weight, mean, spread)))
            own = mine.log_likelihoods(torch.from_numpy(x[labels == at])).logsumexp(dim=1).mean()
            assert theirs.score(x[labels == at]) == pytest.approx(float(own), abs=0.02)
    drawn, labels = _drawn(outcome, list(sent.values()), 30)
    middle, width = drawn.mean(axis=0), drawn.std(axis=0)
    rows = np.hstack([(drawn - middle) / width, np.ones((len(drawn), 1))])
    head = LogisticRegression(C=1 / (0.01 * len(rows)), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(
        rows, labels
    )
    weight = head.coef_[:, :-1] / width
    np.testing.assert_allclose(outcome.shared["head.weight"], weight, atol=1e-4)
    np.testing.assert_allclose(outcome.shared["head.bias"], head.coef_[:, -1] - weight @ middle, atol=1e-4)
    assert equal(outcome.served("b"), outcome.shared)


def _drawn(outcome: federation.Outcome, sent: list[Mapping[str, Tensor]], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Features by the paper's recipe, from the same stream of numbers."""
    rows = []
    for at in range(3):
        seed = int(outcome.progress.server.memory["seed"])
        generator = torch.Generator().manual_seed(seeds.derive(seed, purpose=f"features/{at}"))
        shares = torch.cat(
            [t["mixture/weight"][at].double() * t["mixture/count"][at] / t["mixture/weight"][at].sum() for t in sent]
        )
        which = torch.multinomial(shares, number, replacement=True, generator=generator)
        mean, spread = (
            torch.cat([t[f"mixture/{part}"][at].double() for t in sent])[which] for part in ("mean", "spread")
        )
        noise = torch.randn(number, mean.shape[1], dtype=torch.float64, generator=generator)
        rows.append((mean + spread * noise).numpy())
    return np.concatenate(rows), np.repeat(np.arange(3), number)


def test_small_classes_do_not_leave_and_no_component_stands_for_few(tmp_path: Path) -> None:
    sites = {"a": _few(SITES["a"], 1, 4), "b": _few(SITES["b"], 1, 0)}
    outcome = _run(tmp_path, sites, components=10, min_images=5)
    for tensors in _sent(outcome).values():
        assert tensors["mixture/count"][1] == 0
        assert not any(value[1].any() for value in tensors.values())
        for at in (0, 2):
            weight = tensors["mixture/weight"][at]
            each = weight[weight > 0] * tensors["mixture/count"][at]
            assert float(each.min()) > 5 - 1e-3
            assert len(each) < 10
    served = outcome.experiment.model.forward(outcome.served("a"), torch.zeros(4, 3, federation.SIZE, federation.SIZE))
    assert (served.argmax(dim=1) != 1).all(), "nobody has seen the class"


def test_every_class_of_every_site_has_draws_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    fit = mixtures.fit

    def listed(x: Any, count: int, covariance: Any, floor: float, generator: torch.Generator) -> Any:
        drawn.append(generator.initial_seed())
        return fit(x, count, covariance, floor, generator)

    monkeypatch.setattr(mixtures, "fit", listed)
    sent = _sent(_run(tmp_path, components=1))
    assert len(set(drawn)) == len(drawn) == sum(int((t["mixture/count"] > 0).sum()) for t in sent.values())
    assert len(drawn) > len(SITES)


def test_one_class_or_one_image_at_a_site(tmp_path: Path) -> None:
    only = _few(_few(SITES["a"], 1, 0), 2, 0)
    single = _few(_few(_few(SITES["b"], 0, 1), 1, 0), 2, 0)
    outcome = _run(tmp_path, {"a": only, "b": single}, min_images=1)
    assert _sent(outcome)["b"]["mixture/count"].tolist() == [1, 0, 0]
    assert all(bool(value.isfinite().all()) for value in outcome.shared.values())
    with pytest.raises(TrainingError, match=r"nothing to train a head on(.|\n)*no class of 30 images"):
        _run(tmp_path / "none", min_images=30)


def test_only_declared_statistics_travel_once_and_bytes_are_the_formula(tmp_path: Path) -> None:
    sizes = {"spherical": 1, "diagonal": 64, "full": 64 * 65 // 2}
    for kind, size in sizes.items():
        outcome = _run(tmp_path / kind, components=3, covariance=kind, rounds=2)
        c, width = outcome.experiment.model.specs["head.weight"].shape
        assert width == 64
        assert [number for number, _, _ in outcome.sent("up")] == [2, 2]
        assert not [number for number, _, _ in outcome.sent("down") if number < 2]
        wanted = 4 * c * (1 + 3 * (1 + width + size)) + 9 + 1
        ledger = outcome.progress.ledger.summary()
        assert ledger["up"]["per_site"] == dict.fromkeys(SITES, wanted)
        assert ledger["down"]["per_site"] == dict.fromkeys(SITES, 4 * c * (width + 1) + 9 + 1)


def test_nan_and_what_is_no_mixture_are_refused_by_name(tmp_path: Path) -> None:
    outcome = _run(tmp_path)
    pieces, strategy = outcome.experiment, outcome.experiment.strategy
    start = strategy.init_server(pieces.initial(3), pieces.model.specs, tuple(SITES))
    assert strategy.declares.checks is not None
    strategy.declares.checks(Update("b", _sent(outcome)["b"], 25))
    many = {**_sent(outcome)["b"], "mixture/count": torch.full((3,), 1e6)}
    with pytest.raises(WireError, match="no mixture"):  # a million draws are the most that a site can make us do
        strategy.declares.checks(Update("b", many, 2**40))
    for part, value in (("count", -3.0), ("count", 2.5), ("count", 26.0), ("weight", -0.1), ("weight", 0.0)):
        sent = {name: tensor.clone() for name, tensor in _sent(outcome)["b"].items()}
        sent[f"mixture/{part}"][0] = value
        with pytest.raises(WireError, match="site b sent what is no mixture"):
            strategy.declares.checks(Update("b", sent, 25))
    assert not outcome.shared["head.weight"].isnan().any()
    whole = strategy.combine(start, [Update("b", _sent(outcome)["b"], 25)], pieces.model.specs)
    assert bool(whole.shared["head.bias"].isfinite().all())


def test_a_site_whose_features_are_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.features

    def broken(self: Trainer, variables: Any) -> Any:
        found, labels = original(self, variables)
        return (found * math.nan if self.site == "b" else found), labels

    monkeypatch.setattr(Trainer, "features", broken)
    with pytest.raises(TrainingError, match="from site b"):
        _run(tmp_path)


def test_it_says_that_nothing_is_trained(tmp_path: Path) -> None:
    outcome = _run(tmp_path)
    assert outcome.progress.passes == dict.fromkeys(SITES, 0)
    assert results.never_drawn(outcome.progress.passes) == []


@pytest.mark.parametrize(
    "tables",
    [
        {"tuner": [{"name": "lora"}]},
        {"head": {"kind": "mlp"}},
        {"head": {"share": "personal"}},
        {"tuner": ["linear", "norm"]},
    ],
)
def test_what_cannot_go_is_refused(tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="for a shared linear head on frozen features"):
        federation.assemble(federation.configure(**{"tuner": LINEAR, "strategy": {"name": "fedpft"}, **tables}))


def test_options_that_make_no_sense_are_refused() -> None:
    for options in ({"components": 0}, {"covariance": "tied"}, {"min_images": 0}, {"floor": 0}, {"decay": -1}):
        with pytest.raises(ConfigError):
            registry.build("strategies", "fedpft", options)
