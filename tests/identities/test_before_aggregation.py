"""The model "before aggregation" is what the site had trained, whatever the last sum did to the base beneath it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from consilium.local.predict import outputs
from tests import federation

SITES = federation.hospitals(14, 9)


@pytest.mark.parametrize("strategy", ["fedavg", "flora", "fedex", "rolora", "fedsa"])
def test_it_is_what_the_site_had_trained(tmp_path: Path, strategy: str) -> None:
    train = {**federation.TABLE["train"], "rounds": 2, "learning_rate": 0.05}
    outcome = federation.run(tmp_path, federation.configure(strategy={"name": strategy}, train=train), SITES)
    pieces, setting = outcome.experiment, outcome.experiment.setting
    held, before = {site: dict(pieces.common) for site in SITES}, {}
    for way, site, data in outcome.wire:
        message = outcome.decode(way, data)
        if way == "down" and message.kind == "round":
            held[site] |= message.tensors
        elif way == "up" and message.tensors:
            before[site] = {**held[site], **message.tensors}
    for site, variables in before.items():
        kept = {n: v for n, v in outcome.served(site).items() if n not in variables}  # personal: as at the end
        found = outputs(setting.model, {**kept, **variables}, SITES[site].test, setting.preprocessing, "cpu", "float32")
        table = pd.read_parquet(outcome.folder / "sites" / site / "predictions.parquet")
        rows = table[(table.model == "before_aggregation") & (table.split == "test")]
        stored = rows[[f"p.{name}" for name in federation.CLASSES]].to_numpy()
        np.testing.assert_allclose(stored, torch.softmax(found, 1).numpy(), rtol=1e-4, atol=1e-5)
