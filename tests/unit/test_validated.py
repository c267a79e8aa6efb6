"""A model that comes back as it went out is not validated again, and its numbers are those of a second look."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from consilium.engines.site import Site
from consilium.engines.state import SiteState, StateFolder
from tests import federation

SITES = federation.hospitals(9, 7)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of sites, once for each time that one looks at its validation images."""
    seen: list[str] = []
    plain = Site._validate

    def count(site: Site, *given: Any) -> Any:
        seen.append(site.data.name)
        return plain(site, *given)

    monkeypatch.setattr(Site, "_validate", count)
    return seen


def run(folder: Path, strategy: str, rounds: int = 3) -> list[Any]:
    """What sites told of their models, round by round."""
    train = {**federation.TABLE["train"], "rounds": rounds}
    settings = federation.configure(strategy={"name": strategy}, train=train)
    told = federation.run(folder, settings, SITES).events
    return [{s: each["val"] for s, each in event["sites"].items()} for event in told if event["event"] == "round"]


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out of every state what was validated."""
    plain = StateFolder.save

    def save(folder: StateFolder, state: SiteState, keep: Any) -> None:
        plain(folder, replace(state, validated={}), keep)

    monkeypatch.setattr(StateFolder, "save", save)


def test_a_site_alone_looks_once_at_each_model_and_tells_the_same(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(tmp_path / "remembered", "local")
    assert len(looks) == len(SITES) * (1 + 3)
    forget(monkeypatch)
    assert run(tmp_path / "forgotten", "local") == told
    assert len(looks) == len(SITES) * (1 + 3 + 6)
    for before, after in pairwise(told):
        assert all(after[site]["incoming"] == before[site]["outgoing"] for site in SITES)


def test_a_model_that_was_combined_is_looked_at(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(tmp_path / "remembered", "fedavg")
    assert len(looks) == len(SITES) * 6
    assert all(told[1][site]["incoming"] != told[0][site]["outgoing"] for site in SITES)
    forget(monkeypatch)
    assert run(tmp_path / "forgotten", "fedavg") == told


def test_another_model_than_the_remembered_one_is_looked_at(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = StateFolder.load

    def other(folder: StateFolder, round: int) -> SiteState:
        return replace(plain(folder, round), validated={"of": "another", "numbers": {"loss": -1.0}})

    told = run(tmp_path / "right", "local")
    looks.clear()
    monkeypatch.setattr(StateFolder, "load", other)
    assert run(tmp_path / "wrong", "local") == told
    assert len(looks) == len(SITES) * 6
