"""docs/pairs.md says of every tuner with every strategy whether they run or are refused, and why; here it is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from consilium import members, registry
from consilium.errors import ConfigError
from tests import federation, variants

PAGE = Path(__file__).parent.parent.parent / "docs" / "pairs.md"
SITES = federation.hospitals(8, 7)


def _rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def _table() -> dict[tuple[str, str], str]:
    head, _, *rows = _rows()
    return {(tuner, row[0]): cell for row in rows for tuner, cell in zip(head[1:], row[1:], strict=True)}


def _reasons() -> dict[str, str]:
    """Number of a note -> the words of the error, in quotes on the page."""
    return dict(re.findall(r'^(\d+)\. .*?"([^"]+)"', PAGE.read_text(), flags=re.MULTILINE))


TABLE, REASONS = _table(), _reasons()


def test_the_table_names_every_pair_there_is() -> None:
    tuners, strategies = registry.members("tuners"), registry.members("strategies")
    assert TABLE.keys() == {(tuner, strategy) for tuner in tuners for strategy in strategies}
    assert {cell for cell in TABLE.values() if cell != "runs"} <= {f"refused ({note})" for note in REASONS}


@pytest.mark.parametrize(("tuner", "strategy"), sorted(TABLE), ids=lambda name: name)
def test_a_pair_does_what_the_table_says(tmp_path: Path, tuner: str, strategy: str) -> None:
    settings = variants.settings(strategy, tuner=variants.table(tuner), train={"rounds": 1})
    cell = TABLE[tuner, strategy]
    if cell != "runs":
        with pytest.raises(ConfigError, match=re.escape(REASONS[cell.removeprefix("refused (").removesuffix(")")])):
            federation.assemble(settings)
        return
    sites = SITES if strategy in variants.FEDERATED else {"pooled": federation.pooled(SITES)}
    outcome = federation.run(tmp_path, settings, sites)
    assert outcome.progress.server.round == 1
    served, pieces = next(members.each(outcome.served(min(sites)))), outcome.experiment
    assert served.keys() >= {"head.weight", "head.bias"}
    start, active = pieces.initial(settings.seed), pieces.active(1, "a")
    trained = {name for name, spec in pieces.model.specs.items() if active(spec.tag) and spec.tag.role != "head"}
    assert all(name in served and not torch.equal(served[name], start[name]) for name in trained) or strategy == "flora"
    assert {name for name in served if name in start and not torch.equal(served[name], start[name])}
