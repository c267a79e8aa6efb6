"""Requests of a coordinator that asks for more than was agreed on: the hospital's side holds by itself."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from consilium import listing, seeds
from consilium.deployment import files, hospital, keeping
from consilium.deployment import gate as gating
from consilium.deployment.gate import Gate, GateConfig
from consilium.deployment.guard import Guard
from consilium.deployment.journal import JOURNAL, Journal, table
from consilium.engines.resident import Resident
from consilium.errors import ConfigError
from consilium.messages import Request, encode, envelope_of
from tests.hospitals_apart import FEDERATION, SITE, Apart, made

MORE = SITE.replace("num_images = 64", "num_images = 400")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """A finished run, with a class of few test images at some site."""
    found = made(tmp_path_factory.mktemp("hostile"), site=MORE)
    found.conduct()
    return found


class Hospital:
    """A guarded site in a folder of its own, and a clock that stands still until it is told to go on."""

    def __init__(self, apart: Apart, folder: Path, site: str = "alpine", **rules: Any) -> None:
        self.site, self.now, self.said = (
            replace(apart.resident(site).site, folder=folder / "state"),
            1000.0,
            list[Any](),
        )
        given = GateConfig(**{"min_patients": 1, "min_images": 1, **rules})
        gate = Gate(given, self.site.experiment, self.site.data, folder, lambda: self.now)
        self.guard = Guard(Resident(self.site, self.said.append), gate, Journal(folder))

    def ask(self, kind: Any = "round", number: Any = 1, *, run: str = "a" * 16, **more: Any) -> str | None:
        """Why a request is refused; None where it is answered."""
        shared = replace(self.site.experiment.handshake, run=run)
        request = Request(kind, self.site.data.name, number, more.pop("builds_on", 0), shared, {}, more)
        allowed = self.site.experiment.wire("down", 1)
        return self.send(encode(replace(request, tensors=_start(request, allowed)), allowed))

    def raw(self, **fields: Any) -> str | None:
        given = {"kind": "round", "site": "alpine", "round": 1, "builds_on": 0, "context": {}}
        shared = vars(self.site.experiment.handshake)
        text = json.dumps({**given, "handshake": shared, **fields}).encode()
        body = struct.pack("<Q", len(text)) + text
        return self.send(hashlib.sha256(body).digest() + body)

    def send(self, data: bytes) -> str | None:
        failure = envelope_of(self.guard.answer(data))["failure"]
        return None if failure is None else str(failure["message"])


def _start(request: Request, allowed: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Other values for every kind, round and run: no two questions are alike."""
    seed = seeds.derive(0, site=str(request.kind), purpose=f"{request.round} {request.handshake.run}")
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn([s or 0 for s in spec.shape], generator=generator) * 0.1 for n, spec in allowed.items()}


# ------------------------------------------------------------------------------------------------ more than agreed on
@pytest.mark.parametrize(
    ("kind", "number", "builds_on"),
    [
        ("round", 4, 0),  # of three
        ("evaluate", 4, 0),
        ("finish", 999, 0),
        ("round", 0, 0),
        ("round", -1, 0),
        ("round", True, 0),
        ("round", 1.0, 0),
        ("round", "1", 0),
        ("round", [1], 0),
        ("round", 2**70, 0),
        ("round", 2, 3),
        ("round", 1, "../../alpine"),
        ("round", 1, True),
        ("images", 1, 0),
        ({"round": 1}, 1, 0),
    ],
    ids=str,
)
def test_what_is_no_request_of_the_agreed_rounds(
    apart: Apart, tmp_path: Path, kind: Any, number: Any, builds_on: Any
) -> None:
    here = Hospital(apart, tmp_path)
    assert "no request of a run" in str(here.ask(kind, number, builds_on=builds_on))
    assert not (tmp_path / "state").exists() or not list((tmp_path / "state").rglob("state-*"))
    assert len(list(Journal(tmp_path).entries())) == 1


@pytest.mark.parametrize(
    "fields",
    [{"handshake": [1]}, {"handshake": None}, {"context": [1]}, {"more": 1}, {"site": ["alpine"]}, {"round": None}],
    ids=str,
)
def test_odd_envelopes_are_refused_and_written_down(apart: Apart, tmp_path: Path, fields: dict[str, Any]) -> None:
    assert Hospital(apart, tmp_path).raw(**fields)
    assert len(list(Journal(tmp_path).entries())) == 1


def test_no_more_questions_than_the_pace_allows_whatever_they_are_called(apart: Apart, tmp_path: Path) -> None:
    here = Hospital(apart, tmp_path, min_seconds=60)
    for kind in ("round", "evaluate", "finish"):
        assert here.ask(kind) is None
        assert here.ask(kind) is None  # the same bytes: the same reply
        for more in ({"run": "b" * 16}, {"number": 2}, {"validate": False}, {"metrics": True}):
            assert f"the next {kind} may come in 60 s" in str(here.ask(kind, **more))
    here.now += 60
    assert here.ask("round", 2, builds_on=1) is None
    assert "may come" in str(here.ask("round", 1)), "back to the round before is a question as well"


def test_new_names_of_runs_do_not_fill_the_disk(apart: Apart, tmp_path: Path) -> None:
    here = Hospital(apart, tmp_path, max_runs=2)
    first, second, third = (run * 16 for run in "abc")
    assert [here.ask(run=run) for run in (first, second)] == [None, None]
    for kind in ("describe", "round", "evaluate", "finish", "images", {"run": second}):
        said = str(here.ask(kind, run=third))
        assert f"gate.max_runs = 2: the site keeps 2 runs ({first}, {second}), see consilium site states" in said
    assert "gate.max_runs" in str(here.raw(handshake={"version": here.site.experiment.handshake.version}))  # nameless
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [first, second]
    assert here.ask("round", 2, run=first, builds_on=1) is None  # what it knows goes on
    narrow = replace(here.guard.gate, rules=here.guard.gate.rules.model_copy(update={"max_runs": 1}))
    assert narrow.full(second) is None, "also where the limit came later"
    keeping.delete(tmp_path, second)
    assert here.ask(run=third) is None
    assert "gate.max_runs" in str(here.ask(run=second)), "it was forgotten, so it is new"


def test_a_refusal_names_some_of_many_runs(apart: Apart, tmp_path: Path) -> None:
    here = Hospital(apart, tmp_path, max_runs=9)
    for number in range(12):
        (tmp_path / "state" / f"{number:016x}").mkdir(parents=True)
    said = str(here.ask(run="f" * 16))
    assert said.count("0" * 15) == 4
    assert "and 8 more" in said


def test_every_candidate_of_a_strategy_has_its_turn(apart: Apart, tmp_path: Path) -> None:
    here = Hospital(apart, tmp_path, min_seconds=60)
    config = here.site.experiment.config
    best = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"serve": "best"})})
    assert here.guard.gate._turns["evaluate"] == 1
    gate = replace(here.guard.gate, experiment=replace(here.site.experiment, config=best), asked={})
    assert gate._turns["evaluate"] == 1
    here.guard.gate.__dict__["_turns"] = {"evaluate": 2}
    assert [here.ask("evaluate", run=run * 16) is None for run in "abc"] == [True, True, False]


# ------------------------------------------------------------------------------------------------ text and size
def test_words_of_a_request_reach_no_terminal_as_they_are(
    apart: Apart, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b[1;1Hnothing left\nhere " + "x" * 9999
    here = Hospital(apart, tmp_path)
    here.raw(site=evil, kind=evil, handshake={"version": evil, "run": evil, "agreement": evil})
    here.raw(kind=evil)
    listing.show(listing.rows(table(Journal(tmp_path).entries())))
    assert "\x1b" not in capsys.readouterr().out
    assert (tmp_path / JOURNAL).stat().st_size < 4000
    assert all("\x1b" not in str(event) and len(str(event)) < 1000 for event in here.said)


def test_a_request_is_no_larger_than_one_of_the_agreement(apart: Apart, tmp_path: Path) -> None:
    here = Hospital(apart, tmp_path)
    assert "as large" in str(here.send(bytes(here.guard.gate.largest + 1)))
    assert "no whole message" in str(here.send(bytes(here.guard.gate.largest)))
    assert here.guard.gate.largest < 2 * 1024**2
    assert here.ask() is None


def test_a_name_cannot_be_guessed_from_what_a_failure_sends(tmp_path: Path) -> None:
    from consilium.engines.failures import seal, unseal

    text = "cannot read /data/MUELLER_Anna.png"
    said = {seal(tmp_path, text) for _ in range(3)}
    assert len(said) == 3
    assert hashlib.sha256(text.encode()).hexdigest()[:16] not in str(said)
    assert {unseal(tmp_path, each) for each in said} == {text}


def test_a_run_is_named_after_no_other_folder(apart: Apart, tmp_path: Path) -> None:
    """At the end the site's page is made in the run's folder: `run` must not lead to another one."""
    asked, _ = _finished(apart, "alpine")
    ended = apart.resident("alpine").site.folder / envelope_of(asked)["handshake"]["run"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "predictions.parquet").write_bytes((ended / "predictions.parquet").read_bytes())
    here = Hospital(apart, tmp_path / "site")
    own, told = files.read_site(apart.at("alpine")), list[Any]()
    for name in (str(elsewhere), "../../elsewhere", f"x/../{ended.name}"):
        assert here.ask("finish", 3, run=name, metrics=True) is None
        request = Request("finish", "alpine", 3, 0, replace(here.site.experiment.handshake, run=name))
        data = encode(request, here.site.experiment.wire("down", 3))
        hospital._end(own, here.site, data, here.guard.answer(data), told.append)
        assert "has not ended here" in str(told.pop())
    assert [path.name for path in elsewhere.iterdir()] == ["predictions.parquet"]


# ------------------------------------------------------------------------------------------------ few images
def _finished(apart: Apart, site: str) -> tuple[bytes, bytes]:
    return next((q, r) for name, q, r in apart.seen if name == site and envelope_of(q)["kind"] == "finish")


def test_what_is_blanked_cannot_be_reckoned_from_the_rest(apart: Apart, tmp_path: Path) -> None:
    """Sum of hits = accuracy * n; the images of a class = n - those of its specificity."""
    asked, reply = _finished(apart, "alpine")
    data = apart.resident("alpine").site.data
    counts = np.unique(data.test.labels, return_counts=True)[1]
    out, _ = Hospital(apart, tmp_path, min_images=int(counts.min()) + 1).guard.gate.let_out(envelope_of(asked), reply)
    tree = envelope_of(out)["numbers"]["metrics"]["test"]["personal"]
    assert tree["accuracy"]["n"] == len(data.test)
    assert all(entry == {"value": None, "low": None, "high": None, "n": 0} for n, entry in tree.items() if "." in n)
    out, _ = Hospital(apart, tmp_path, min_images=int(counts.min())).guard.gate.let_out(envelope_of(asked), reply)
    assert any(
        entry["n"] for n, entry in envelope_of(out)["numbers"]["metrics"]["test"]["personal"].items() if "." in n
    )


def test_many_images_of_few_patients_are_few(apart: Apart, tmp_path: Path) -> None:
    asked, reply = _finished(apart, "alpine")
    here = Hospital(apart, tmp_path, min_patients=3)
    data, groups = here.site.data, np.array(["one", "two"] * len(here.site.data.test))[: len(here.site.data.test)]
    gate = replace(here.guard.gate, data=replace(data, test=replace(data.test, groups=groups)))
    out, blanked = gate.let_out(envelope_of(asked), reply)
    numbers = envelope_of(out)["numbers"]["metrics"]
    assert all(entry["value"] is None for entry in numbers["test"]["personal"].values())
    assert numbers["val"]["personal"]["accuracy"]["value"] is not None
    assert "test.personal.accuracy" in blanked


@pytest.mark.parametrize(
    ("work", "images"), [({"local_steps": 1, "batch_size": 1}, 1), ({"local_steps": 2, "batch_size": 2}, 4)]
)
def test_an_update_of_few_images_is_refused_at_the_start(
    apart: Apart, tmp_path: Path, work: dict[str, int], images: int
) -> None:
    here = Hospital(apart, tmp_path, min_images=5)
    config = here.site.experiment.config
    small = config.model_copy(update={"train": config.train.model_copy(update=work)})
    gating.check(here.guard.gate)
    with pytest.raises(ConfigError, match=rf"too few images(.|\n)*{images} images"):
        gating.check(replace(here.guard.gate, experiment=replace(here.site.experiment, config=small)))


def test_a_site_with_a_rank_of_its_own_gets_through_its_gate(tmp_path: Path) -> None:
    apart = made(tmp_path, FEDERATION.replace('"fedavg"', '"hetlora"\nranks = {alpine = 1}'))
    apart.conduct()
    request = next(q for name, q, _ in apart.seen if name == "alpine" and envelope_of(q)["kind"] == "round")
    here = Hospital(apart, tmp_path / "guarded")
    reply = here.guard.answer(request)
    assert envelope_of(reply)["failure"] is None
    (line,) = Journal(tmp_path / "guarded").entries()
    assert {name for name, *_ in line["tensors"]} == set(here.site.experiment.up(1, "alpine"))
