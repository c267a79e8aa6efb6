"""What a site is said to keep is what it keeps: for every strategy, against the files of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from consilium import keeping, registry, results
from consilium.engines.state import StateFolder
from consilium.experiment import Experiment
from tests import federation, variants

STRATEGIES = variants.FEDERATED
NOTHING = "nothing but the data"


def _told(pieces: Experiment, sites: tuple[str, ...] = ("a", "b")) -> dict[str, tuple[Any, ...]]:
    return {name: (spec.shape, spec.dtype) for name, spec in keeping.kept(pieces, sites).items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_state_of_a_site_holds_what_was_told(tmp_path: Path, strategy: str) -> None:
    settings = variants.settings(strategy, train={"rounds": 2, "local_epochs": 0.5})
    done = federation.run(tmp_path, settings, federation.hospitals(7, 8))
    told = _told(done.experiment)
    for site in ("a", "b"):
        state = StateFolder(tmp_path / "sites" / site, done.experiment.handshake.agreement).load(2)
        held = {name: (tuple(value.shape), value.dtype) for name, value in state.personal.tensors.items()}
        assert held == {name: each for name, each in told.items() if not name.startswith(keeping.SERVED)}
        last = {name.removeprefix(keeping.SERVED) for name in told if name.startswith(keeping.SERVED)}
        assert last <= done.served(site).keys()
        assert bool(last) <= (done.experiment.strategy.declares.finish_epochs > 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_list_says_that_nothing_stays_only_where_nothing_does(strategy: str) -> None:
    told = _told(federation.assemble(variants.settings(strategy)))
    assert (registry.get("strategies", strategy).facts["stays"] == NOTHING) == (not told)


def test_what_a_strategy_keeps_beside_the_model_has_the_role_and_size_of_its_variable() -> None:
    pieces = federation.assemble(variants.settings("apfl"))
    rows = {row["name"]: row for row in results.wire(keeping.kept(pieces, ("a", "b")))}
    assert rows["/alpha"] == {"name": "/alpha", "role": "alpha", "shape": [], "dtype": "float64", "bytes": 8}
    assert (rows["own/head.weight"]["role"], rows["own/head.weight"]["shape"][0]) == ("head", len(federation.CLASSES))


def test_one_site_is_enough() -> None:
    assert _told(federation.assemble(variants.settings("ditto")), ("a",))
