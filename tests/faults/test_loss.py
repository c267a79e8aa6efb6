"""The measure of what a fault cost, on folders of a run in one process: whatever is taken away shows, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from consilium import checkpoint
from consilium.deployment import files, hospital
from tests import hospitals_apart
from tests.faults.loopback import OWN, SITES, Loopback
from tests.faults.loss import Look, Lost, figures

Damage = Any


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Loopback:
    text = hospitals_apart.FEDERATION.replace('"fedavg"', '"fedopal_weights"')
    apart = hospitals_apart.made(tmp_path_factory.mktemp("measured"), text, OWN)
    for site in SITES:
        own = files.read_site(apart.at(site))
        guard: Any = hospital.guarded(own, hospital.open_site(own, lambda _: None), lambda _: None)
        apart.residents[site] = guard  # with the hospital's rules and its journal
    apart.conduct()
    return Loopback(apart.folder, 0)


def newest(made: Loopback, pattern: str) -> Path:
    return max(made.folder.glob(pattern))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def other_tensors(path: Path) -> None:
    tensors, meta = checkpoint.load(path)
    checkpoint.save(path, {name: tensor + 1 for name, tensor in tensors.items()}, meta)


def smaller_totals(path: Path) -> None:
    tensors, meta = checkpoint.load(path)
    meta["ledger"]["payload"]["up"]["harbour"] -= 1
    checkpoint.save(path, tensors, meta)


def another_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"kind":"round"', b'"kind":"roumd"', 1))


DAMAGES: dict[str, tuple[str, Damage]] = {
    "state": ("prairie/state/*/state-*", Path.unlink),
    "half a state": ("prairie/state/*/state-*", cut),
    "other state": ("prairie/state/*/state-*", other_tensors),
    "served model": ("alpine/state/*/served.safetensors", Path.unlink),
    "journal": ("harbour/journal.jsonl", cut),
    "line of a journal": ("harbour/journal.jsonl", another_line),
    "checkpoint": ("coordinator/run/checkpoints/*", Path.unlink),
    "totals of bytes": ("coordinator/run/checkpoints/*", smaller_totals),
    "closed round": ("coordinator/run/events.jsonl", cut),
    "name of the run": ("coordinator/run/config.json", cut),
    "secret": ("prairie/secret.json", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_taken_away_is_missing(damage: str, made: Loopback) -> None:
    pattern, harm = DAMAGES[damage]
    path = newest(made, pattern)
    good, look = path.read_bytes(), Look.at(made)
    assert look.closed == 3
    assert not look.missing()
    harm(path)
    try:
        missing = look.missing()
    finally:
        path.write_bytes(good)
    assert list(missing) == [str(path)]
    assert 0 < missing[str(path)] <= len(good)
    assert not look.missing()


def test_a_later_state_stands_for_an_earlier_one_and_more_lines_are_no_loss(made: Loopback) -> None:
    path, journal, look = newest(made, "prairie/state/*/state-*"), made.at("alpine") / "journal.jsonl", Look.at(made)
    later, lines = path.with_name("state-00009.safetensors"), journal.read_bytes()
    path.rename(later)
    journal.write_bytes(lines + b"{}\n")
    try:
        assert not look.missing()
    finally:
        later.rename(path)
        journal.write_bytes(lines)


def test_rounds_without_a_site_and_rounds_done_again_are_lost(made: Loopback) -> None:
    notes: dict[str, Any] = {}
    lost = Lost(notes.__setitem__)
    path = made.run / "events.jsonl"
    good = path.read_text()
    first, second, third = good.splitlines()
    away = json.loads(third)
    away["sites"]["harbour"] = {"status": "late"}
    lost.before(made, "a fault")
    path.write_text(f"{first}\n{second}\n{json.dumps(away)}\n")
    try:
        with pytest.raises(AssertionError, match=r"a fault: .*events\.jsonl"):
            lost.after(rounds=[3])
    finally:
        path.write_text(good)
    assert notes == {"fault: a fault": {"rounds_lost": 2, "bytes_lost": len(third) + 1}}


def test_a_fault_that_was_not_recovered_from_is_counted_as_tried() -> None:
    rows = {
        "one": {"rounds_lost": 2, "bytes_lost": 0, "recovered": True},
        "other": {"rounds_lost": None, "bytes_lost": None, "recovered": False},
    }
    found = figures(rows, 12.4)
    assert {key: found[key] for key in ("tried", "recovered", "rounds_lost", "bytes_lost", "seconds")} == {
        "tried": 2,
        "recovered": 1,
        "rounds_lost": 2,
        "bytes_lost": 0,
        "seconds": 12,
    }
