"""Pages of a run across hospitals: the coordinator's of what was sent, each hospital's own of what stayed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium import checkpoint
from consilium.deployment import files, hospital, own_page
from consilium.engines import relay
from consilium.errors import StateError
from consilium.report.html import render
from consilium.report.load import load_run
from tests.commands import call
from tests.hospitals_apart import FEDERATION, SITE, SITES, Apart, made

OWN = SITE.replace("num_images = 64", "num_images = 64\nnum_sites = 3")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """prairie is late in round 1, and harbour is away at the end."""
    here = made(tmp_path_factory.mktemp("pages"), FEDERATION.replace('"fedavg"', '"fedper"'), OWN)
    grid = here.grid(prairie={"takes": 67})
    prairie = next(node for node in grid.nodes.values() if node.takes)
    harbour = list(grid.nodes.values())[1]
    handle, other = prairie.handler, harbour.handler

    def back(content: object) -> object:
        prairie.takes = 0
        return handle(content)  # type: ignore[arg-type]

    def leave(content: object) -> object:
        reply = other(content)  # type: ignore[arg-type]
        harbour.online = sum(site == "harbour" for site, *_ in here.seen) < 3
        return reply

    prairie.handler, harbour.handler = back, leave  # type: ignore[assignment]
    here.conduct(grid)
    return here


def words(page: Path) -> str:
    """Text of a page, without its tags."""
    text = page.read_text().split("</style>")[1]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def test_the_coordinators_page_is_written_at_the_end_and_says_who_took_part(apart: Apart) -> None:
    text = words(apart.run / "report.html")
    assert "harbour was away at the end: its test images were not read" in text
    assert "prairie without 1 (late)" in (apart.run / "report.html").read_text()
    for section in ("Results", "Rounds", "Learning curves", "What left each site", "To run it again"):
        assert section in text
    run = load_run(apart.run)
    assert run.result.agreement_hash in text
    assert "http" not in (apart.run / "report.html").read_text().replace("http://www.w3.org", "")  # self-contained


def test_a_hospital_that_was_never_heard_of_is_on_it(apart: Apart, tmp_path: Path) -> None:
    run = shutil.copytree(apart.run, tmp_path / "run")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events:
        event["sites"]["coast"] = {"status": "refused", "message": "gate.strategies"}
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = render([run], tmp_path / "page.html")
    away = ", ".join(f"{event['round']} (refused)" for event in events)
    assert f"coast without {away}" in page.read_text()
    assert f"coast 0 of {len(events)}" in words(page)


def test_its_numbers_are_those_that_hospitals_sent(apart: Apart) -> None:
    result, run = json.loads((apart.run / "result.json").read_text()), load_run(apart.run)
    entry, sent = run.result.metrics.test["personal"]["accuracy"], result["metrics"]["test"]
    assert set(entry.per_site) == set(sent) == {"alpine", "prairie"}
    for site, tree in sent.items():
        value = entry.per_site[site]
        assert {**tree["personal"]["accuracy"]} == {key: getattr(value, key) for key in ("value", "low", "high", "n")}
    over = result["over_sites"]["test"]["accuracy"]
    assert (entry.mean.value, entry.worst.site) == (over["mean"], over["worst"]["site"])
    assert entry.pooled.value is None
    assert run.result.sites["harbour"].test.n == 0
    assert run.result.sites["alpine"].train.n == result["num_examples"]["alpine"]


def test_nothing_of_an_image_or_a_patient_is_in_it(apart: Apart) -> None:
    text = (apart.run / "report.html").read_text()
    for site in SITES:
        test = apart.residents[site].site.data.test
        assert not any(str(name) in text for name in [*test.ids, *test.groups])
        assert str(apart.at(site)) not in text


def test_the_verb_makes_it_again_and_beside_a_simulation(apart: Apart, tmp_path: Path) -> None:
    before = (apart.run / "report.html").read_bytes()
    (apart.run / "report.html").unlink()
    assert call("report", apart.run) == 0
    assert (apart.run / "report.html").read_bytes() == before
    both = render([apart.run, apart.run], tmp_path / "both.html")
    assert "2 runs side by side" in words(both)


def test_a_run_that_ended_without_its_page_gets_it(apart: Apart) -> None:
    (apart.run / "report.html").unlink()
    asked = len(apart.seen)
    apart.conduct()
    assert (apart.run / "report.html").is_file()
    assert len(apart.seen) == asked


@pytest.mark.parametrize(
    ("change", "said"),
    [({"metrics": {"test": 3}}, "metrics.test"), ({"num_examples": {"alpine": "many"}}, "num_examples.alpine")],
)
def test_a_result_that_was_damaged_is_named(apart: Apart, change: dict[str, object], said: str, tmp_path: Path) -> None:
    table = {**json.loads((apart.run / "result.json").read_text()), **change}
    (tmp_path / "result.json").write_text(json.dumps(table))
    with pytest.raises(StateError) as caught:
        load_run(tmp_path)
    assert said in str(caught.value)


# ------------------------------------------------------------------------------------------------ at a hospital
def test_a_hospital_gets_a_page_of_its_own(apart: Apart) -> None:
    site = apart.at("alpine")
    own = files.read_site(site)
    guard = hospital.guarded(own, apart.resident("alpine").site, lambda _: None)
    for name, request, _ in apart.seen:
        if name == "alpine":
            guard.answer(request)
    (run,) = [path.name for path in (site / files.STATE).glob("*/") if path.name != "nameless"]
    page = own_page.write(own, apart.resident("alpine").site, run)
    text = words(page)
    assert page == site.resolve() / "report.html"
    for section in ("Mistakes and calibration", "What left this hospital", "Every request of this run"):
        assert section in text
    result = checkpoint.read_json(site / files.STATE / run / "result.json")
    sent = json.loads((apart.run / "result.json").read_text())["metrics"]["test"]["alpine"]["personal"]
    for metric, value in sent.items():
        mine = result["metrics"]["test"]["personal"][metric]["pooled"]
        assert mine["value"] == pytest.approx(value["value"], nan_ok=True) if value["value"] is not None else True
    sizes = [len(request) for name, request, _ in apart.seen if name == "alpine"]
    assert result["bytes"]["down"]["total"] == sum(sizes)
    assert "harbour" not in page.read_text()


def test_the_service_makes_it_when_a_run_ends_and_the_verb_anew(apart: Apart, tmp_path: Path) -> None:
    there = made(tmp_path, FEDERATION.replace('"fedavg"', '"fedper"'), OWN)
    site, told = there.at("alpine"), list[dict[str, object]]()
    with pytest.raises(StateError, match="no run has ended"):
        hospital.page(site, None)

    def ask_all() -> None:
        answered = [relay.ask(site / files.SOCKET, request) for name, request, _ in apart.seen if name == "alpine"]
        assert all(answered)

    hospital.serve(site, lambda event: told.append(dict(event)), ask_all)
    assert [event["path"] for event in told if event["event"] == "page"] == [str(site.resolve() / "report.html")]
    before = (site / "report.html").read_bytes()
    assert call("site", "report", site) == 0
    assert (site / "report.html").read_bytes() == before
    with pytest.raises(StateError, match="has not ended here"):
        hospital.page(site, "0" * 16)


def test_a_page_that_cannot_be_made_keeps_no_reply_back(apart: Apart, tmp_path: Path) -> None:
    there = made(tmp_path, FEDERATION.replace('"fedavg"', '"fedper"'), OWN)
    site, told = there.at("alpine"), list[dict[str, object]]()
    (site / "report.html").mkdir()
    replies = list[bytes]()

    def ask_all() -> None:
        requests = [request for name, request, _ in apart.seen if name == "alpine"]
        replies.extend(relay.ask(site / files.SOCKET, request) for request in requests)

    hospital.serve(site, lambda event: told.append(dict(event)), ask_all)
    assert all(replies)
    assert any("no page was made" in str(event.get("text")) for event in told)
