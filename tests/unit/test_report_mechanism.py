"""The report's section on how shared and personal part relate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from consilium.errors import StateError
from consilium.report.html import render
from tests.unit.test_report import SITES, events, write_run

LEARNED = {"overlap_received": 0.9, "overlap_right": 0.25, "overlap_left": 12.5, "share_personal": 0.375}
FOUND = {
    "schema_version": 1,
    "split": "val",
    "sites": {"aarhus": {"images": 30, "groups": 12}, "bern": {"images": 20, "groups": 9}},
    "left_out": ["delft"],
    "chance": 0.5,
    "parts": {
        "backbone": {"value": 0.81, "low": 0.7, "high": 0.9, "control": 0.48},
        "personal_adds": {"value": 0.66, "low": 0.6, "high": 0.7, "control": 0.51},
    },
    "cross": {"aarhus": {"aarhus": {"value": 0.71}, "bern": {"value": 0.43, "low": 0.4, "high": 0.5}}},
    "differences": {"personal - backbone": {"value": -0.15, "low": -0.2, "high": -0.1}},
}


def _page(folder: Path) -> str:
    return render([folder]).read_text()


def _told(page: str, start: str) -> list[str]:
    return re.findall(rf'aria-label="({start}[^"]*)"', page)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def _with_numbers(folder: Path, numbers: dict[str, Any]) -> None:
    lines = events(SITES)
    for line in lines:
        for event in line["sites"].values():
            if event["status"] == "ok":
                event["learned"] = numbers
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_without_two_parts_or_a_probe_there_is_no_section_but_what_aggregation_changed(folder: Path) -> None:
    page = _page(folder)
    assert "Shared and personal" not in page
    (told,) = _told(page, "Balanced accuracy after minus before aggregation")
    assert all(site in told for site in SITES)


def test_numbers_of_rounds_are_drawn_site_by_site(folder: Path) -> None:
    _with_numbers(folder, LEARNED)
    page = _page(folder)
    (told,) = _told(page, "overlap at aarhus: as the shared part came in")
    assert "0.900 in round 1" in told
    assert "after training 0.250" in told
    assert "12.500" in _told(page, "overlap at aarhus: after training")[0], "on an axis of its own"
    (told,) = _told(page, "share at bern")
    assert "shared 0.625" in told
    assert "personal 0.375" in told
    assert page.count('class="diagonal"') > 2 * len(SITES), "chance is drawn"


def test_what_the_probe_told_is_drawn_and_its_differences_listed(folder: Path) -> None:
    (folder / "mechanism.json").write_text(json.dumps(FOUND))
    page = _page(folder)
    (told,) = set(_told(page, "Which site"))
    assert told == "Which site: backbone 0.810; what personal adds 0.660"
    for text in ("model of aarhus", "images of bern", "0.400 to 0.500"):
        assert text in page
    for text in (
        "with a personal part minus backbone",
        "-0.200 to -0.100",
        "chance 0.500",
        "50 of 21 patients",
        "delft",
    ):
        assert text in page


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}', '{"schema_version": 1, "parts": 3}'])
def test_a_file_that_cannot_be_read_is_named(folder: Path, text: str) -> None:
    (folder / "mechanism.json").write_text(text)
    with pytest.raises(StateError, match="mechanism"):
        _page(folder)
