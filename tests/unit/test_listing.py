from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from consilium import listing
from consilium.deployment.reach import Finding
from consilium.errors import StateError


def _text(renderable: RenderableType) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def _tree(value: float) -> dict[str, Any]:
    mean = {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 40}
    return {"balanced_accuracy": {"mean": mean}, "macro_auroc": {"mean": mean}}


def _run(folder: Path, name: str, value: float) -> Path:
    folder.mkdir()
    result = {
        "name": name,
        "parameters": {"trainable": 1234},
        "bytes": {"up": {"total": 1_000_000}, "down": {"total": 500_000}},
        "metrics": {"test": {"personal": _tree(value)}},
        "references": {"local": {"metrics": {"test": {"personal": _tree(0.5)}}}},
        "majority": {"test": _tree(0.2)},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_runs_stand_side_by_side_with_intervals_and_one_majority_class(tmp_path: Path) -> None:
    shown = _text(listing.comparison([_run(tmp_path / "a", "lora", 0.8), _run(tmp_path / "b", "linear", 0.6)]))
    rows = {name: line for line in shown.splitlines() for name in [line.strip("│ ").split("│")[0].strip()] if name}
    assert "0.800 [0.750, 0.850]" in rows["lora"]
    assert "1.5 MB" in rows["lora"]
    assert "0.600 [0.550, 0.650]" in rows["linear"]
    assert "0.500 [0.450, 0.550]" in rows["lora, local training"]
    assert shown.count("majority class") == 1


def test_a_folder_that_holds_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"result\.json"):
        listing.comparison([tmp_path])


def test_an_outline_shows_every_value_and_equal_mappings_as_a_table() -> None:
    values = {
        "sites": {"a": {"n": 1}, "b": {"n": 2}},
        "flat": {"x": 1},
        "rows": [{"id": "i1"}],
        "none": [],
        "yes": True,
    }
    shown = _text(listing.outline(values, title="[found]"))
    assert shown.splitlines()[0] == "[found]"
    assert [line.split()[-2:] for line in shown.splitlines() if line.split()[-1] in "12"] == [
        ["a", "1"],
        ["b", "2"],
        ["x:", "1"],
    ]
    assert all(text in shown for text in ("i1", "none: none", "yes: True"))


def test_a_long_list_is_cut_and_says_so() -> None:
    shown = _text(listing.outline({"groups": [{"group": f"patient-{number}"} for number in range(25)]}, title="audit"))
    assert "patient-19" in shown
    assert "patient-20" not in shown
    assert "5 more rows" in shown


def test_an_outline_has_a_line_for_each_sentence_and_an_end() -> None:
    values = {"warnings": ("one site, alone", "two sites"), "classes": ["a", "b"]}
    shown = _text(listing.outline({**values, "bytes": {"per": {"a": {f"s{n}": n for n in range(50)}}}}, title="trial"))
    lines = [line.strip(" │├└─") for line in shown.splitlines()]
    assert {"one site, alone", "two sites", "classes: a, b", "warnings"} <= set(lines)
    assert (
        _text(listing.outline({"row": {"a": {"sites": list(range(50))}, "b": {"sites": [1]}}}, "t")).count("30 more")
        == 1
    )


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_digest_is_whole_on_a_narrow_terminal(width: int) -> None:
    digest, console = "0123456789abcdef" * 4, Console(width=width)
    tables = [listing.findings([Finding("agreement", "good", digest)]), listing.rows([{"by": "me", "run": digest}])]
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    shown = capture.get()
    assert "…" not in shown
    assert "".join(shown.split()).count(digest) == 2
