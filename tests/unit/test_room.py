"""A run that the disk has no room for is refused before it trains, with the numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consilium.engines.state import check_room, least_bytes
from consilium.errors import StateError
from tests import federation

KINDS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "kept": {"train": {"moments": "keep"}},
    "sgd": {"train": {**federation.SGD, "moments": "keep"}},
    "momentum": {"train": {**federation.SGD, "momentum": 0.9, "moments": "keep"}},
    "local": {"strategy": {"name": "local"}},
    "ffa": {"strategy": {"name": "ffa"}},
    "rolora": {"strategy": {"name": "rolora"}},
    "fedper": {"strategy": {"name": "fedper"}},
    "random blocks": {"tuner": [{"name": "stochastic_block"}]},
    "full": {"tuner": [{"name": "full"}]},
}


def _free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_not_smaller_than_what_is_asked_for(kind: str, tmp_path: Path) -> None:
    found = federation.run(tmp_path, federation.configure(**KINDS[kind]), federation.hospitals(6, 6))
    least = least_bytes(found.experiment, "a")
    sizes = [path.stat().st_size for path in tmp_path.glob("sites/*/state-*.safetensors")]
    assert len(sizes) == 4
    assert least <= min(sizes)
    assert (
        kind in ("fedper", "local", "rolora") or max(sizes) < 1.5 * least + 20_000
    )  # names and digests; what is personal


def test_a_full_disk_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = federation.assemble(federation.configure(train={"participation": 0.5}))
    sites, need = [f"site-{number}" for number in range(100)], 100 * least_bytes(pieces, "site-0")
    _free(monkeypatch, need)
    check_room(pieces, tmp_path / "not" / "there", sites)
    _free(monkeypatch, need - 1)
    with pytest.raises(StateError, match=r"(?s)no room.*there.*GB free.*50 sites x 2 rounds x .* MB = .* GB"):
        check_room(pieces, tmp_path / "not" / "there", sites)


def test_what_is_there_needs_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = federation.run(tmp_path, federation.configure(), federation.hospitals(6, 6))
    _free(monkeypatch, 0)
    check_room(found.experiment, tmp_path, "ab")
    (tmp_path / "sites" / "a" / "state-00003.safetensors").unlink()
    with pytest.raises(StateError, match="no room"):
        check_room(found.experiment, tmp_path, "ab")
