"""What must hold for the payload of every tuner: next to nothing travels beside the values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from consilium import payload
from consilium.messages import size
from tests import federation, variants


@pytest.mark.parametrize("variant", [*variants.TUNERS, *variants.HYBRIDS])
def test_a_payload_is_hardly_longer_than_its_values(variant: str) -> None:
    """Of a small ViT with three classes; the share falls with the width."""
    tiny = {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 224}
    pieces = federation.assemble(federation.configure(backbone=tiny, tuner=variants.table(variant)))
    sent = pieces.sent(1, "a")
    values = sum(math.prod(size or 0 for size in spec.shape) * spec.dtype.itemsize for spec in sent.values())
    for declared in (pieces.up(1), pieces.down(1)):
        assert values < payload.num_bytes(declared, sent) <= 1.01 * values


@pytest.mark.parametrize("variant", ["lora", "stochastic_block site"])
def test_who_knows_the_experiment_can_list_every_recorded_message(tmp_path: Path, variant: str) -> None:
    settings = federation.configure(tuner=variants.table(variant))
    outcome = federation.run(tmp_path, settings, federation.hospitals(10, 7))
    reader = federation.assemble(settings)
    for way, _, data in outcome.wire:
        tensors = outcome.decode(way, data).tensors
        found = reader.contents("up" if way == "up" else "down", data)
        shapes = {row["name"]: (tuple(row["shape"]), f"torch.{row['dtype']}", row["bytes"]) for row in found}
        assert shapes == {name: (tuple(t.shape), str(t.dtype), t.nbytes) for name, t in tensors.items()}
        assert 0 <= size(data).payload - sum(row["bytes"] for row in found) <= 9 + len(reader.model.specs)
