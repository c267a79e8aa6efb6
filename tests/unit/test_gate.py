"""The hospital's own rules, and the journal of what left: a rule that is taken out must fail a test here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from consilium.deployment import files, hospital
from consilium.deployment.gate import Gate, GateConfig
from consilium.deployment.guard import Guard
from consilium.deployment.journal import JOURNAL, START, Journal
from consilium.engines.resident import Resident
from consilium.errors import ConfigError, StateError
from consilium.messages import envelope_of
from consilium.protocols import Spec, Tag
from tests.hospitals_apart import SITES, Apart, made

OPEN = GateConfig(min_patients=1, min_images=1)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """A finished run: its requests can be asked again of a guard with other rules."""
    found = made(tmp_path_factory.mktemp("gate"))
    found.conduct()
    return found


def guard(apart: Apart, folder: Path, rules: GateConfig, site: str = "alpine") -> Guard:
    """A guard over the site's own service; what it writes lies in `folder`."""
    resident = Resident(apart.resident(site).site, lambda _: None)
    found = resident.site
    return Guard(resident, Gate(rules, found.experiment, found.data, folder, lambda: 1000.0), Journal(folder))


def asked(apart: Apart, kind: str, site: str = "alpine") -> bytes:
    """The newest request of a kind."""
    return next(data for name, data, _ in reversed(apart.seen) if name == site and envelope_of(data)["kind"] == kind)


def reply(apart: Apart, folder: Path, rules: GateConfig, kind: str = "round") -> dict[str, Any]:
    return envelope_of(guard(apart, folder, rules).answer(asked(apart, kind)))


def test_open_rules_change_nothing(apart: Apart, tmp_path: Path) -> None:
    for kind in ("round", "finish"):
        request = asked(apart, kind)
        assert guard(apart, tmp_path, OPEN).answer(request) == apart.resident("alpine").answer(request)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"strategies": ("fedprox", "ditto")}, "gate.strategies does not allow fedavg"),
        ({"versions": ("9.*",)}, "gate.versions does not allow"),
        ({"min_patients": 1000}, "fewer training patients here than gate.min_patients"),
        ({"approval": True}, "nobody at the site has approved agreement"),
        ({"tensors": ({"role": "head"},)}, "gate.tensors does not allow"),
        ({"tensors": ({"part": "other"},)}, "gate.tensors does not allow"),
        ({"tensors": ({"block": "0"}, {"role": "head"})}, "gate.tensors does not allow"),
        ({"max_bytes": 1000}, "gate.max_bytes is 1000"),
    ],
)
def test_each_rule_refuses_by_its_own_name(apart: Apart, tmp_path: Path, rules: dict[str, Any], said: str) -> None:
    found = reply(apart, tmp_path, GateConfig.model_validate(rules))
    assert said in found["failure"]["message"]
    assert found["failure"]["code"] == "refused"
    assert found["num_examples"] == 0
    assert found["numbers"] == {}


def test_a_refused_request_never_reaches_the_site(apart: Apart, tmp_path: Path) -> None:
    door = guard(apart, tmp_path, GateConfig(strategies=("other",)))
    heard: list[Any] = []
    door = replace(door, resident=replace(door.resident, tell=heard.append))
    door.answer(asked(apart, "round"))
    assert [event["event"] for event in heard] == ["refused"]  # of what reaches it, it tells more


@pytest.mark.parametrize(
    ("rules", "said"),
    [({"strategies": ["fedper"]}, ["refused"]), ({"max_bytes": 10}, ["repeated", "refused"]), ({}, ["repeated"])],
)
def test_who_serves_the_site_hears_what_its_rules_refuse(
    apart: Apart, tmp_path: Path, rules: dict[str, Any], said: list[str]
) -> None:
    told = list[dict[str, Any]]()
    door = guard(apart, tmp_path, OPEN.model_copy(update=rules))
    door = replace(door, resident=replace(door.resident, tell=lambda event: told.append(dict(event))))
    failure = envelope_of(door.answer(asked(apart, "round")))["failure"]
    assert [event["event"] for event in told] == said
    assert failure is None or told[-1]["message"] == failure["message"]


def test_metrics_leave_by_name(apart: Apart, tmp_path: Path) -> None:
    rules = GateConfig(min_patients=1, min_images=1, metrics=("accuracy", "balanced_*"))
    numbers = reply(apart, tmp_path, rules, "finish")["numbers"]
    tree = numbers["metrics"]["test"]["personal"]
    known = {name for name, entry in tree.items() if entry["value"] is not None}
    assert known <= {"accuracy", "balanced_accuracy", "balanced_accuracy_declared"}
    assert "accuracy" in known
    site = next(name for name in SITES if len(apart.resident(name).site.data.val))
    door = guard(apart, tmp_path, rules, site)
    val = envelope_of(door.answer(asked(apart, "round", site)))["numbers"]["val"]["incoming"]
    assert {name for name, value in val.items() if value is not None} <= known
    assert val["accuracy"] is not None


def test_a_metric_from_few_images_is_blanked_and_said(apart: Apart, tmp_path: Path) -> None:
    plain = reply(apart, tmp_path / "open", OPEN, "finish")["numbers"]["metrics"]["test"]["personal"]
    counts = sorted({entry["n"] for entry in plain.values() if entry["value"] is not None})
    rules = GateConfig(min_patients=1, min_images=counts[0] + 1)
    tree = reply(apart, tmp_path / "shut", rules, "finish")["numbers"]["metrics"]["test"]["personal"]
    for name, entry in plain.items():
        small = entry["value"] is not None and (entry["n"] <= counts[0] or "." in name)  # that class is told by others
        assert tree[name] == ({"value": None, "low": None, "high": None, "n": 0} if small else entry) or (
            entry["value"] is None and tree[name]["value"] is None
        )
    (line,) = Journal(tmp_path / "shut").entries()
    assert line["blanked"]


def test_few_validation_images_blank_the_quick_metrics(apart: Apart, tmp_path: Path) -> None:
    rules = GateConfig(min_patients=1, min_images=1000)
    val = reply(apart, tmp_path, rules)["numbers"]["val"]
    assert all(value is None for table in val.values() for value in table.values())


def test_rare_classes_do_not_leave_as_counts(apart: Apart, tmp_path: Path) -> None:
    door = guard(apart, tmp_path, GateConfig(min_patients=1, min_images=1000))
    from consilium.messages import Reply

    assert door.gate._rare(Reply("alpine", 0, 9, numbers={"class_counts": [2000, 999]}), {})
    assert not door.gate._rare(Reply("alpine", 0, 9, numbers={"class_counts": [2000, 0]}), {})
    specs = {"counts": Spec((2,), Tag("head", "count", slot="statistic"))}
    assert door.gate._rare(Reply("alpine", 0, 9, {"counts": torch.tensor([2000.0, 999.0])}), specs)
    assert not door.gate._rare(Reply("alpine", 0, 9, {"counts": torch.tensor([2000.0, 0.0])}), specs)


def test_the_next_round_waits_for_its_time(apart: Apart, tmp_path: Path) -> None:
    now = [0.0]
    found = apart.resident("alpine").site
    rules = GateConfig(min_seconds=60, min_patients=1)
    door = Gate(rules, found.experiment, found.data, tmp_path, lambda: now[0])
    fields = {"kind": "round", "round": 1, "handshake": {"version": "0.1.0"}}
    assert door.refusal(fields, "one") is None
    now[0] = 10.0
    assert door.refusal(fields, "one") is None  # the same request, asked again
    assert "may come in 50 s" in str(door.refusal({**fields, "round": 2}, "two"))
    assert door.refusal({**fields, "kind": "finish", "round": 2}, "three") is None
    now[0] = 60.0
    assert door.refusal({**fields, "round": 2}, "two") is None


def test_an_agreement_that_the_rules_would_refuse_is_refused_at_the_start(apart: Apart, tmp_path: Path) -> None:
    own = files.read_site(apart.at("alpine"))
    shut = replace(own, gate=GateConfig.model_validate({"tensors": [{"role": "head"}]}), folder=tmp_path)
    with pytest.raises(ConfigError, match="sends what this hospital forbids"):
        hospital.guarded(shut, apart.resident("alpine").site, lambda _: None)


def test_a_journal_that_was_changed_anywhere_is_said_before_anything_leaves(apart: Apart, tmp_path: Path) -> None:
    own = replace(files.read_site(apart.at("alpine")), gate=OPEN, folder=tmp_path)
    for number in range(3):
        Journal(tmp_path).add({"what": number})
    hospital.guarded(own, apart.resident("alpine").site, lambda _: None)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"what":0', b'"what":7'))
    with pytest.raises(StateError, match="not as it was written"):
        hospital.guarded(own, apart.resident("alpine").site, lambda _: None)


def test_unknown_rules_are_no_rules(tmp_path: Path) -> None:
    apart = made(tmp_path)
    path = apart.at("alpine") / files.SITE
    path.write_text(path.read_text() + "\n[gate]\nmin_patient = 4\n")
    with pytest.raises(ConfigError, match="min_patient"):
        files.read_site(apart.at("alpine"))


def test_bytes_that_are_no_message_are_refused_and_written_down(apart: Apart, tmp_path: Path) -> None:
    found = envelope_of(guard(apart, tmp_path, OPEN).answer(b"noise"))
    assert found["failure"]["code"] == "refused"
    (line,) = Journal(tmp_path).entries()
    assert (line["kind"], line["request"]["bytes"]) == ("unreadable", 5)


# ------------------------------------------------------------------------------------------------ the journal
def test_every_tensor_and_number_that_leaves_is_written_down(apart: Apart, tmp_path: Path) -> None:
    door = guard(apart, tmp_path, OPEN)
    request = asked(apart, "round")
    data = door.answer(request)
    (line,) = Journal(tmp_path).entries()
    specs = apart.resident("alpine").site.experiment.up(3)
    assert {name for name, *_ in line["tensors"]} == set(specs)
    assert sum(size for *_, size in line["tensors"]) == 4 * sum(
        int(torch.Size([n or 0 for n in spec.shape]).numel()) for spec in specs.values()
    )
    assert line["reply"]["bytes"] == len(data)
    assert "val.incoming.accuracy" in line["numbers"]
    assert line["before"] == START


def test_nothing_leaves_that_could_not_be_written_down(apart: Apart, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / JOURNAL).mkdir()  # a file cannot be made here, as on a disk that is full
    with pytest.raises((StateError, OSError)):
        guard(apart, folder, OPEN).answer(asked(apart, "round"))


def test_the_journal_holds_no_value_of_any_tensor_or_metric(apart: Apart, tmp_path: Path) -> None:
    guard(apart, tmp_path, OPEN).answer(asked(apart, "finish"))
    (line,) = Journal(tmp_path).entries()
    assert "value" not in json.dumps(line["numbers"])
