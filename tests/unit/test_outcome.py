"""What a run across hospitals leaves in result.json, beside what the same agreement leaves as a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from consilium import checkpoint, config, config_file
from consilium import run as simulation
from consilium.deployment import outcome
from tests.hospitals_apart import FEDERATION, SITE, made

MERGED = FEDERATION.replace('name = "fedavg"', 'name = "merge"').replace("rounds = 3", "rounds = 1")
OWN = SITE.replace("num_images = 64", "num_images = 64\nnum_sites = 3")
PLACE = {"hardware", "peak_memory_bytes", "sites", "split_hash", "data_digest"}  # who sees the images knows these
TOGETHER = {"references", "majority", "sites_harmed"}  # and these, who has the predictions of all
APART = {"kind", "run", "late", "num_examples", "over_sites", "untested"}
CLOCK = {"seconds", "site_seconds"}
OWN_WAY = {"config_hash", "numbers", "metrics", "warnings", "bytes"}  # of other tables, messages, or knowledge


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """result.json of a simulation, and of a deployment."""
    folder: Path = tmp_path_factory.mktemp("outcome")
    (folder / "apart").mkdir()
    apart = made(folder / "apart", MERGED, OWN)
    there = checkpoint.read_json(apart.conduct() / "result.json")
    tables = [config_file.read(folder / "apart" / name) for name in ("federation.toml", "own.toml")]
    merged = {key: value for table in tables for key, value in table.items() if key not in ("deployment", "gate")}
    here = simulation.run(config.from_dict(merged), folder / "here")
    return checkpoint.read_json(here / "result.json"), there


def test_both_say_the_same_in_the_same_words(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    here, there = both
    assert here.keys() - there.keys() == (PLACE | TOGETHER) & here.keys()
    assert there.keys() - here.keys() == APART
    same = (here.keys() & there.keys()) - CLOCK - OWN_WAY
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert {way: there["bytes"][way] for way in ("up", "down")} == {way: here["bytes"][way] for way in ("up", "down")}
    assert there["seconds"] > 0


def test_what_was_chosen_by_the_sites_is_said(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    here, there = both
    assert there["chosen"] == here["chosen"]
    assert there["chosen"]["best"] in there["chosen"]["candidates"]


def test_a_late_reply_that_counted_is_told_by_round(tmp_path: Path) -> None:
    lines = [
        '{"round": 1, "sites": {"alpine": {"status": "ok"}, "harbour": {"status": "late"}}}',
        '{"round": 2, "sites": {"alpine": {"status": "ok"}, "harbour": {"status": "ok", "late_from": 1}}}',
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert outcome.late_replies(tmp_path) == {"harbour": [2]}
