"""The benchmark of a GPU, on a CPU: it says that it needs one, and all but the numbers can be tried."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "SITES", 4)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "found.json")]) == 2
    assert "found none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_it_can_be_tried_without_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--try"]) == 0
    assert capsys.readouterr().out == "it works; numbers need a GPU\n"


@pytest.mark.usefixtures("small")
def test_its_table_has_every_federation_and_the_ratio_asked_for() -> None:
    found = {**gpu.measure("cpu", gpu.TINY), "device": "a GPU", "data sheet, FLOP/s": None}
    lines = gpu.table(found).splitlines()
    rows = [name for name, value in found.items() if isinstance(value, dict) and "images/s" in value]
    assert len(rows) == 5
    assert all(any(line.startswith(name) for line in lines) for name in rows)
    assert "target: at least 0.8" in lines[-1]
    assert "unknown" in lines[3]


def test_the_flops_of_an_image_are_those_of_its_products() -> None:
    """LoRA on qkv: every product of a block forward, all but the first block's qkv and below for the gradient."""
    settings = gpu.configuration("cpu", gpu.TINY, 1, {})
    module = gpu.assemble(settings, gpu.CLASSES).backbone.module
    linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    tokens = (gpu.TINY["size"] // 16) ** 2 + 1
    forward = 2 * tokens * linear
    assert forward < gpu.flops_of_an_image("cpu", gpu.TINY) < 3 * forward


@pytest.mark.parametrize(
    ("name", "rate"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", None)]
)
def test_what_the_maker_states_is_known_for_a_few(name: str, rate: float | None) -> None:
    assert gpu.data_sheet(name) == rate
