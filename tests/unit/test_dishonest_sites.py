"""Sites that send rubbish: NaN and huge updates are refused with the site's name, long ones are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import messages, registry
from consilium.aggregation import clipped
from consilium.coordinator import Transport
from consilium.errors import ConfigError, TrainingError
from consilium.messages import decode_reply, encode
from consilium.tensors import Tensors, equal
from tests import federation, quadratics, variants
from tests.quadratics import Federation

HOSPITALS = federation.hospitals(14, 9, 20)


@dataclass
class Dishonest:
    """A wire on which a site multiplies what it learnt in one round, and checks nothing of it."""

    inner: Transport
    outcome: Any
    times: float
    site: str = "b"
    round_number: int = 2

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Any:
        for site, data in self.inner.round(requests):
            assert isinstance(data, bytes)
            up = self.outcome.wire("up", self.round_number)
            reply = decode_reply(data, {**up, **self.outcome.wire("up", 1)})
            if (site, reply.round) == (self.site, self.round_number) and reply.tensors:
                tensors = {name: value * self.times for name, value in reply.tensors.items()}
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(messages, "check", lambda *_, **__: None)
                    data = encode(replace(reply, tensors=tensors), up)
            yield site, data


def _run(folder: Path, times: float, options: Mapping[str, Any], **train: Any) -> federation.Outcome:
    settings = federation.configure(strategy={"name": "fedavg", **options}, train=train)
    pieces = federation.assemble(settings)
    wrap = lambda inner: Dishonest(inner, pieces, times)  # noqa: E731
    return federation.run(folder, settings, HOSPITALS, wrap=wrap)


def test_a_site_that_sends_nan_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"non-finite numbers from site b in round 2"):
        _run(tmp_path, math.nan, {})


STRATEGIES = sorted(registry.members("strategies").keys() - {"local", "pooled"})  # which send nothing


@pytest.mark.parametrize("name", STRATEGIES)
def test_nan_is_refused_by_name_whatever_the_strategy(tmp_path: Path, name: str) -> None:
    settings = variants.settings(name, train={"rounds": 1, "local_epochs": 0.5})
    pieces = federation.assemble(settings)
    wrap = lambda inner: Dishonest(inner, pieces, math.nan, round_number=1)  # noqa: E731
    with pytest.raises(TrainingError, match=r"non-finite numbers from site b in round 1"):
        federation.run(tmp_path, settings, HOSPITALS, wrap=wrap)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_absurdly_large_update_is_refused_by_name_whatever_the_strategy(tmp_path: Path, name: str) -> None:
    """Else it would overflow, and the honest sites would be blamed for what it makes of their model."""
    settings = variants.settings(name, train={"rounds": 1, "local_epochs": 0.5})
    pieces = federation.assemble(settings)
    wrap = lambda inner: Dishonest(inner, pieces, 1e30, round_number=1)  # noqa: E731
    with pytest.raises(TrainingError, match=r"(?s)too few sites.*b: refused, the update of b is absurdly large"):
        federation.run(tmp_path, settings, HOSPITALS, wrap=wrap)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("times", [-1.0, 0.5, 1e6])
def test_mixtures_that_are_none_end_no_federation(tmp_path: Path, times: float) -> None:
    settings = variants.settings("fedpft", train={"rounds": 1, "quorum": 0.6})
    pieces = federation.assemble(settings)
    outcome = federation.run(
        tmp_path, settings, HOSPITALS, wrap=lambda inner: Dishonest(inner, pieces, times, round_number=1)
    )
    (event,) = (each for each in outcome.events if each["event"] == "round")
    assert {site: each["status"] for site, each in event["sites"].items()} == {"a": "ok", "b": "refused", "c": "ok"}
    assert "site b sent what is no mixture" in event["sites"]["b"]["message"]


def test_a_site_that_sends_a_huge_update_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"too few sites(.|\n)*b: refused, the update of b is too long(.|\n)*up to 50"
    ):
        _run(tmp_path / "stop", 1e6, {"refuse_updates": 50})
    outcome = _run(tmp_path / "goes on", 1e6, {"refuse_updates": 50}, quorum=0.6)
    told = [event["sites"]["b"]["status"] for event in outcome.events if event["event"] == "round"]
    assert told == ["ok", "refused", "ok"]
    assert max(float(value.abs().max()) for value in outcome.shared.values()) < 5


def test_without_a_bound_it_would_have_ruined_the_model(tmp_path: Path) -> None:
    outcome = _run(tmp_path, 1e6, {}, rounds=2, refuse_longer=0)
    assert max(float(value.abs().max()) for value in outcome.shared.values()) > 1e3


@pytest.mark.parametrize(
    "options", [{"clip_updates": 1.0}, {"aggregate": "median"}, {"aggregate": "trimmed_mean", "trim": 0.34}]
)
def test_cut_or_out_of_the_middle_it_cannot_pull_far(tmp_path: Path, options: dict[str, Any]) -> None:
    outcome = _run(tmp_path, 1e6, options, rounds=2, refuse_longer=0)
    assert max(float(value.abs().max()) for value in outcome.shared.values()) < 5


def test_a_bound_that_nobody_meets_changes_no_bit(tmp_path: Path) -> None:
    plain = _run(tmp_path / "plain", 1.0, {})
    for options in ({"clip_updates": 1e6}, {"refuse_updates": 1e6}):
        bounded = _run(tmp_path / next(iter(options)), 1.0, options)
        assert equal(bounded.shared, plain.shared)
        assert bounded.experiment.strategy.declares.needs_individual_updates, "every single update is looked at"
    assert not plain.experiment.strategy.declares.needs_individual_updates


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=8), st.floats(0.1, 100))
def test_what_is_cut_keeps_its_direction_and_has_the_length(values: list[float], limit: float) -> None:
    start = {"x": torch.zeros(1, dtype=torch.float64), "y": torch.ones(len(values) - 1, dtype=torch.float64)}
    sent = {"x": torch.tensor(values[:1], dtype=torch.float64), "y": torch.tensor(values[1:], dtype=torch.float64)}
    before, after = (torch.cat([t["x"] - start["x"], t["y"] - start["y"]]) for t in (sent, clipped(sent, start, limit)))
    length = float(before.norm())
    assert float(after.norm()) == pytest.approx(min(length, limit), abs=1e-9)
    if length > 0:
        np.testing.assert_allclose((after * length).numpy(), (before * min(length, limit)).numpy(), atol=1e-6)


def test_the_mean_of_cut_updates_is_the_formula() -> None:
    sites, start = quadratics.problems(30, 50, 20), np.linspace(-1, 1, quadratics.SIZE)
    here = Federation(registry.build("strategies", "fedavg", {"clip_updates": 0.55}), sites, start, 3, 0.05)
    here.round()
    steps = {update.site: quadratics.whole(update.tensors) - start for update in here.updates}
    lengths = {site: np.linalg.norm(step) for site, step in steps.items()}
    assert min(lengths.values()) < 0.55 < max(lengths.values())
    cut = [steps[site] * min(1, 0.55 / lengths[site]) for site in sites]
    mean = start + np.average(cut, axis=0, weights=[problem.images for problem in sites.values()])
    np.testing.assert_allclose(here.shared, mean, rtol=0, atol=1e-10)


def test_an_update_of_nothing_is_left_alone() -> None:
    start: Tensors = {"x": torch.ones(3)}
    assert clipped(start, start, 0.1) is start


@pytest.mark.parametrize(
    "options", [{"clip_updates": 0}, {"refuse_updates": -1}, {"clip_updates": 2, "refuse_updates": 2}], ids=str
)
def test_bounds_without_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"greater than 0|no effect"):
        registry.build("strategies", "fedavg", options)
