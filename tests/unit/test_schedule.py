"""Learning-rate schedules against torch's own and by their shape; over the federation, not restarted."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from consilium.config import Schedule
from consilium.local.schedule import factor, federation_progress

Name = Literal["constant", "cosine", "linear", "one_cycle"]


def _torch_one_cycle(steps: int, rising: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, pct_start=rising)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step() if len(rates) < steps else None
    return rates


@pytest.mark.parametrize("rising", [0.3, 0.1])
def test_one_cycle_is_torchs(rising: float) -> None:
    steps = 20_001
    schedule = Schedule(name="one_cycle") if rising == 0.3 else Schedule(name="one_cycle", warmup=rising)
    for step, rate in list(enumerate(_torch_one_cycle(steps, rising)))[::500]:
        assert factor(schedule, step / (steps - 1)) == pytest.approx(rate, abs=2e-3)
    assert factor(schedule, rising) == pytest.approx(1.0)
    assert factor(schedule, 0.0) == pytest.approx(1 / 25)
    assert factor(schedule, 1.0) == pytest.approx(1 / 25 / 1e4)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", (1, 1, 1)),
        ("linear", (0.75, 0.5, 0.25)),
        ("cosine", tuple((1 + math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75))),
    ],
)
def test_shapes_after_the_warm_up(name: Name, values: tuple[float, ...]) -> None:
    schedule = Schedule(name=name, warmup=0.2)
    assert [factor(schedule, x) for x in (0.0, 0.05, 0.1)] == pytest.approx([0, 0.25, 0.5])
    assert [factor(schedule, x) for x in (0.4, 0.6, 0.8)] == pytest.approx(list(values))
    assert [factor(Schedule(name=name, warmup=0), x) for x in (0.25, 0.5, 0.75)] == pytest.approx(list(values))


def test_progress_runs_over_the_federation() -> None:
    schedule = Schedule()
    found = [federation_progress(schedule, number, 4, step, 5) for number in range(1, 5) for step in range(5)]
    assert found == pytest.approx([(step + 0.5) / 20 for step in range(20)])


def test_progress_starts_again_in_every_round_only_if_asked() -> None:
    schedule = Schedule(restart=True)
    found = [federation_progress(schedule, number, 4, step, 5) for number in range(1, 5) for step in range(5)]
    assert found == pytest.approx([(step + 0.5) / 5 for step in range(5)] * 4)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "one_cycle"])
def test_no_step_is_without_a_rate(name: Name) -> None:
    for schedule in (Schedule(name=name), Schedule(name=name, warmup=0), Schedule(name=name, warmup=0.9)):
        rates = [factor(schedule, federation_progress(schedule, n, 3, s, 1)) for n in (1, 2, 3) for s in range(1)]
        assert all(0 < rate <= 1 for rate in rates)
