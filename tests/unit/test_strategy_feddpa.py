"""feddpa_t and feddpa_f: rounds of least squares against the formulas in float64, and FedIT underneath."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from consilium import instances, registry, seeds
from consilium.data import Examples
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.protocols import Strategy
from consilium.tensors import equal
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20)
EXACT = {"rtol": 0, "atol": 1e-10}
HALF = {"participation": 0.67}
DRAWN = {2: ("a", "c"), 3: ("b",)}
G, P = "layer.lora.shared", "layer.lora.personal"


def _build(name: str, **options: Any) -> Strategy:
    found: Strategy = registry.build("strategies", name, options)
    return found


def _run(folder: Path, name: str, options: Mapping[str, Any], **tables: Any) -> federation.Outcome:
    return federation.run(folder, federation.configure(strategy={"name": name, **options}, **tables), SITES)


def _slope(v: Mapping[str, Tensor], site: str, of: tuple[str, ...], share: float | None) -> dict[str, Tensor]:
    """Gradient with respect to `of` of the mixture with this share of the personal adapter; None: the shared alone."""
    leaves = {n: value.clone().requires_grad_(n in of) for n, value in v.items()}
    x, y = toy.data(site)
    shared, own = (toy.SCALE * leaves[f"{part}.b"] @ leaves[f"{part}.a"] for part in (G, P))
    weight = toy.frozen() + (shared if share is None else (1 - share) * shared + share * own)
    loss = ((x @ weight.T @ leaves["head.weight"].T - y) ** 2).mean()
    return dict(zip(of, torch.autograd.grad(loss, [leaves[n] for n in of]), strict=True))


def _train(v: dict[str, Tensor], site: str, of: tuple[str, ...], share: float | None) -> dict[str, Tensor]:
    for _ in range(3):
        slope = _slope(v, site, of, share)
        v = {n: value - toy.RATE * slope[n] if n in of else value for n, value in v.items()}
    return v


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_feddpa_ts_rounds_are_the_formulas(share: float) -> None:
    strategy = _build("feddpa_t", local_weight=share)
    outcome = toy.federate(strategy, 4, drawn=DRAWN)
    known, own, shared = toy.specs(strategy), (f"{P}.a", f"{P}.b"), (f"{G}.a", f"{G}.b", "head.weight")
    w = {n: toy.initial(known, 1)[n] for n in shared}
    personal = {s: {n: toy.initial(known, 2 + at)[n] for n in own} for at, s in enumerate(toy.SITES)}
    for number in range(1, 5):
        sent = []
        for site in DRAWN.get(number, toy.SITES):
            if number > 1:
                found = _train({**w, **personal[site]}, site, own, share)
                personal[site] = {n: found[n] for n in own}
            sent.append(_train({**w, **personal[site]}, site, shared, None))
        w = {n: sum(each[n] for each in sent) / len(sent) for n in w}
    torch.testing.assert_close(dict(outcome.server.shared), w, **EXACT)
    for site in toy.SITES:
        kept = outcome.personal[site].tensors
        torch.testing.assert_close({n: kept[n] for n in own}, personal[site], **EXACT)
        served = outcome.model(strategy, site)
        scaled = {f"{G}.b": (1 - share) * w[f"{G}.b"], f"{P}.b": share * personal[site][f"{P}.b"]}
        expected = {**w, **personal[site], **scaled}
        torch.testing.assert_close(dict(served), expected, **EXACT)


@pytest.mark.parametrize("name", ["feddpa_t", "feddpa_f"])
@pytest.mark.parametrize("head", [None, "personal"])
def test_the_shared_adapter_is_fedits(tmp_path: Path, name: str, head: str | None) -> None:
    tables: dict[str, Any] = {"train": {**HALF, "moments": "keep"}}
    found = _run(tmp_path / name, name, {}, **tables)
    plain = _run(tmp_path / "fedit", "fedit", {"weights": "uniform"}, **tables)
    assert equal(found.shared, plain.shared)
    assert found.progress.ledger.payload == plain.progress.ledger.payload
    if head:  # a head that stays is trained in either phase
        kept = _run(tmp_path / "head", name, {}, head={"share": head}, **tables)
        assert not any(n.startswith("head") for n in kept.shared)
        assert not torch.equal(kept.served("a")["head.weight"], kept.served("b")["head.weight"])


def test_before_a_local_phase_the_model_in_use_is_the_shared_one(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "feddpa_t", {}, train={"rounds": 1})
    served = outcome.served("a")
    assert all(torch.equal(served[name], value) for name, value in outcome.shared.items())
    assert not any(value.any() for name, value in served.items() if name.endswith("personal.b"))


def test_feddpa_f_trains_the_personal_adapter_alone_and_last(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "feddpa_f", {"local_epochs": 2})
    start = federation.assemble(federation.configure(strategy={"name": "feddpa_f"})).model.initial(3)
    for site, data in SITES.items():
        served = outcome.served(site)
        assert all(torch.equal(served[name], value) for name, value in outcome.shared.items())
        own = {name for name in served if ".personal." in name}
        assert all(served[name].any() for name in own)
        federation.assert_absent({name: served[name] for name in own}, outcome.wire)
        assert outcome.progress.passes[site] == (3 + 2) * len(data.train)
        states = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
        kept = states.load(3).personal.tensors
        assert not any(kept[name].any() for name in own if name.endswith(".b")), "nothing before the end"
    assert start.keys() == outcome.served("a").keys()


def test_work_of_a_round_is_known(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "feddpa_t", {})
    assert outcome.progress.passes == {site: 5 * len(data.train) for site, data in SITES.items()}


# ------------------------------------------------------------------------------------------------ weights by image
def _backbone(outcome: federation.Outcome, *adapters: tuple[Mapping[str, Tensor], str, float]) -> torch.nn.Module:
    """The frozen backbone with weight * s B A of these adapters, (variables, part, weight), added to its weights."""
    module = copy.deepcopy(outcome.experiment.backbone.module)
    for name, spec in outcome.experiment.model.specs.items():
        for variables, part, weight in adapters:
            if spec.tag.part == part and name.endswith(".b"):
                product = variables[name].double() @ variables[f"{name.removesuffix('b')}a"].double()
                layer = module.get_parameter(f"{name.split('.lora.')[0]}.weight")
                layer.data = (layer.double() + weight * spec.scale * product).float()
    return module


def _images(outcome: federation.Outcome, examples: Examples) -> Tensor:
    wanted = outcome.experiment.backbone.preprocessing
    pixels = torch.from_numpy(examples.images[examples.rows].astype(np.float32) / 255)
    return ((pixels - torch.tensor(wanted.mean)) / torch.tensor(wanted.std)).permute(0, 3, 1, 2)


@torch.no_grad()
def _by_hand(
    outcome: federation.Outcome, site: str, most: float, of: str, number: int
) -> tuple[np.ndarray, list[float]]:
    """Probabilities of the site's test images, one by one, each through weights of its own; and the personal shares."""
    served, images = outcome.served(site), _images(outcome, SITES[site].test)
    only = _backbone(outcome, (served, "personal", 1.0))
    drawn = seeds.numpy_generator(3, site=site, purpose="instances").permutation(len(SITES[site].train))[:number]
    known = only(_images(outcome, SITES[site].train)[np.sort(drawn)]).double()
    found, shares = [], []
    for image in images:
        h = only(image[None]).double()[0]
        likeness = float(torch.stack([h @ k / (h.norm() * k.norm()) for k in known]).mean())
        share = min(max(most * likeness, 0.0), 1.0)
        share = share if of == "personal" else 1 - share
        module = _backbone(outcome, (served, "shared", 1 - share), (served, "personal", share))
        z = module(image[None]).double()[0] @ served["head.weight"].double().T + served["head.bias"].double()
        found.append(torch.softmax(z, dim=0).numpy())
        shares.append(share)
    return np.stack(found), shares


@pytest.mark.parametrize("name", ["feddpa_t", "feddpa_f"])
@pytest.mark.parametrize(("most", "of", "number"), [(0.5, "personal", 5), (0.9, "shared", 3)])
def test_adapters_are_weighed_image_by_image(tmp_path: Path, name: str, most: float, of: str, number: int) -> None:
    how = {"combine": "instance", "instance_weight": most, "instance_of": of, "instances": number}
    rates = {"learning_rates": {"lora_a": 0.1, "lora_b": 0.1}}  # so that adapters move far enough to tell them apart
    outcome = _run(tmp_path / "images", name, how, train=rates)
    plain = _run(tmp_path / "plain", name, {}, train=rates)
    columns = [f"p.{each}" for each in federation.CLASSES]
    for site in SITES:
        table, other = (
            pd.read_parquet(tmp_path / which / "sites" / site / "predictions.parquet") for which in ("images", "plain")
        )
        rows = (table["split"] == "test") & (table["model"] == "personal")
        expected, shares = _by_hand(outcome, site, most, of, number)
        np.testing.assert_allclose(table[rows][columns], expected, rtol=0, atol=1e-5)
        assert np.abs(other[rows][columns].to_numpy() - expected).max() > 1e-3, "otherwise nothing is tested"
        assert np.std(shares) > 0
        features = outcome.served(site)[instances.FEATURES]
        assert len(features) == number
        federation.assert_absent({"features": features}, outcome.wire)
    assert equal(outcome.shared, plain.shared), "it is a matter of use, not of training"
    assert outcome.progress.ledger.payload == plain.progress.ledger.payload


def test_weights_by_image_are_the_formula() -> None:
    near = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 3.0]])
    variables = instances.weighed({}, 0.8, "personal") | {instances.FEATURES: torch.tensor([[2.0, 0.0], [0.0, 1.0]])}
    wanted = [0.8 * 0.5, 0.8 * 0.5, 0.0, 0.8 * 2**-0.5]  # mean cosines 1/2, 1/2, -1/2, 1/sqrt 2
    np.testing.assert_allclose(instances.of_personal(variables, near), wanted, atol=1e-12)
    other = {**variables, **instances.weighed({}, 0.8, "shared")}
    np.testing.assert_allclose(instances.of_personal(other, near), 1 - np.array(wanted), atol=1e-12)


def test_with_weights_by_image_a_first_round_is_the_shared_model_alone(tmp_path: Path) -> None:
    tables = [
        _run(tmp_path / how, "feddpa_t", {"combine": how}, train={"rounds": 1}).folder for how in ("fixed", "instance")
    ]
    first, second = (pd.read_parquet(folder / "sites" / "a" / "predictions.parquet") for folder in tables)
    pd.testing.assert_frame_equal(first[first["model"] == "personal"], second[second["model"] == "personal"])


def test_a_served_model_needs_nothing_else_and_one_without_a_sites_features_is_refused(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "feddpa_t", {"combine": "instance"}, head={"share": "personal"})
    served, model = outcome.served("b"), outcome.experiment.model
    images = _images(outcome, SITES["b"].test)
    with torch.no_grad():
        assert instances.forward(model, served, images).shape == (6, 3)
        with pytest.raises(ConfigError, match="need features of the site's images"):
            instances.forward(model, {n: v for n, v in served.items() if n != instances.FEATURES}, images)


def test_a_site_without_training_images_has_nothing_to_weigh(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "feddpa_t", "combine": "instance"})
    sites = {**federation.hospitals(14, 9), "z": federation.hospital("z", 0, 50)}
    outcome = federation.run(tmp_path, settings, sites)
    assert len(outcome.served("z")[instances.FEATURES]) == 0
    assert not any(value.any() for name, value in outcome.served("z").items() if name.endswith("personal.b"))


def test_what_cannot_go_is_refused() -> None:
    with pytest.raises(ConfigError):
        _build("feddpa_t", local_weight=0)
    for name in ("feddpa_t", "feddpa_f"):
        for options in ({"instances": 3}, {"instance_weight": 0.4}, {"instance_of": "shared"}):
            with pytest.raises(ConfigError, match="of combine = 'instance' only"):
                _build(name, **options)
        for options in ({"instances": 0}, {"instance_weight": 0}, {"instance_of": "router"}):
            with pytest.raises(ConfigError):
                _build(name, combine="instance", **options)
    with pytest.raises(ConfigError, match="nothing that this strategy sums is a product"):
        federation.assemble(federation.configure(tuner=[{"name": "prompts"}], strategy={"name": "feddpa_t"}))
