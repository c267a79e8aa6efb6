"""dual_lora with combine = "router": FedAvg of a routed pair, its forward by hand, and what stays at a site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from consilium import registry
from consilium.errors import ConfigError
from consilium.protocols import Declaration, Part
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import equal, select
from tests import federation

SITES = federation.hospitals(14, 9, 20)
HALF = {"rounds": 4, "participation": 0.67, "learning_rate": 0.05}


def _run(folder: Path, options: Mapping[str, Any], **how: Any) -> federation.Outcome:
    settings = federation.configure(strategy={"name": "dual_lora", **options}, train=HALF)
    return federation.run(folder, settings, SITES, **how)


def test_it_is_fedavg_of_the_shared_one_of_a_routed_pair(tmp_path: Path) -> None:
    parts = (Part(), Part("personal", personal=True))
    plain = FedAvg(declares=Declaration(parts, combination="router"))
    routed, other = _run(tmp_path / "dual", {"combine": "router"}), _run(tmp_path / "plain", {}, strategy=plain)
    assert equal(routed.shared, other.shared)
    assert all(equal(routed.served(site), other.served(site)) for site in SITES)
    summed = _run(tmp_path / "sum", {})
    assert not equal(routed.shared, summed.shared)
    assert routed.progress.ledger.payload == summed.progress.ledger.payload, "the router does not travel"


@torch.no_grad()
def _by_hand(outcome: federation.Outcome, served: Mapping[str, Tensor], images: Tensor) -> np.ndarray:
    """Logits with softmax(R x) in front of both adapters, token by token."""
    module, specs, handles = outcome.experiment.backbone.module, outcome.experiment.model.specs, []
    layers = sorted({name.split(".lora.")[0] for name in served if ".lora." in name})

    def mix(layer: str) -> Any:
        def hook(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x,), lora = inputs, f"{layer}.lora"
            (router,) = (value for name, value in served.items() if name.startswith(lora) and "router" in name)
            shares = torch.softmax(x @ router.T, dim=-1)
            for at, part in enumerate(("shared", "personal")):
                a, b = served[f"{lora}.{part}.a"], served[f"{lora}.{part}.b"]
                output = output + specs[f"{lora}.{part}.b"].scale * shares[..., at : at + 1] * (x @ a.T @ b.T)
            return output

        return hook

    handles = [module.get_submodule(layer).register_forward_hook(mix(layer)) for layer in layers]
    try:
        return (module(images) @ served["head.weight"].T + served["head.bias"]).numpy()
    finally:
        for handle in handles:
            handle.remove()


def test_the_served_model_is_the_formula_and_the_router_is_the_sites_own(tmp_path: Path) -> None:
    outcome = _run(tmp_path, {"combine": "router"})
    wanted = outcome.experiment.backbone.preprocessing
    for site, data in SITES.items():
        pixels = torch.from_numpy(data.test.images.astype(np.float32) / 255)
        images = ((pixels - torch.tensor(wanted.mean)) / torch.tensor(wanted.std)).permute(0, 3, 1, 2)
        z = _by_hand(outcome, outcome.served(site), images)
        table = pd.read_parquet(tmp_path / "sites" / site / "predictions.parquet")
        rows = table[(table["split"] == "test") & (table["model"] == "personal")]
        expected = torch.softmax(torch.from_numpy(z), dim=1).numpy()
        np.testing.assert_allclose(rows[[f"p.{name}" for name in federation.CLASSES]], expected, atol=1e-5)
        own = {name for name in outcome.served(site) if "router" in name or ".personal." in name}
        assert any(outcome.served(site)[name].any() for name in own if "router" in name)
        federation.assert_absent(select(outcome.served(site), own), outcome.wire)
        assert set(table["model"]) == {"personal", "before_aggregation"}, "a shared adapter alone is no model of a pair"


def test_what_cannot_go_is_refused() -> None:
    with pytest.raises(ConfigError, match="personal_rank = 0 leaves one"):
        registry.build("strategies", "dual_lora", {"combine": "router", "personal_rank": 0})
    with pytest.raises(ConfigError, match="combine"):
        registry.build("strategies", "fedopal", {"combine": "router"})
    with pytest.raises(ConfigError, match="server = 'mean' with a router"):
        registry.build("strategies", "dual_lora", {"combine": "router", "server": "fedsvd"})
    tuner = [{"name": "low_rank_prompts", "length": 12, "rank": 2}]
    prompts = federation.configure(tuner=tuner, strategy={"name": "dual_lora", "combine": "router"})
    with pytest.raises(ConfigError, match="token by token"):
        federation.assemble(prompts)
