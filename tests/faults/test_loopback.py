"""Across real processes: TLS, node keys, a SuperLink and SuperNodes. By --faults; test_guide.py always runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from consilium import checkpoint, config
from consilium import run as simulation
from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.loopback import FEDERATION, OWN, SITES, Loopback, loopback


def simulated(folder: Path, strategy: str = "fedavg", rounds: int = 3) -> dict[str, Any]:
    """Tensors of the last checkpoint of the same federation in one process."""
    text = FEDERATION.format(strategy=strategy, rounds=rounds, port=1, deadline=1, grace=1).split("[deployment]")[0]
    table, own = (config.config_file.tomllib.loads(each) for each in (text, OWN))
    del own["gate"]
    out = simulation.run(config.from_dict({**table, **own}), folder)
    return checkpoint.load(max((out / "checkpoints").glob("*.safetensors")))[0]


def same(made: Loopback, tensors: dict[str, Any]) -> bool:
    found = checkpoint.load(max((made.run / "checkpoints").glob("*.safetensors")))[0]
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.faults
def test_a_site_is_killed_and_comes_back_and_the_bits_are_those_of_a_simulation(tmp_path: Path, lost: Lost) -> None:
    """The deployment guide's way, with one fault: prairie's processes die in round 2 and are started again."""
    (tmp_path / "there").mkdir()
    with loopback(tmp_path / "there", rounds=3, deadline=200) as made:
        made.link()
        for site in SITES[:2]:
            made.join(site)
        mark = made.slowly("prairie")
        mark.unlink()
        made.submit()
        made.wait(lambda: made.quick().get("closed") == 1, "round 1")
        mark.touch()
        made.wait(lambda: "asked kind=round round=2" in made.output("prairie"), "prairie's second round")
        made.kill("prairie", signal.SIGTERM)
        mark.unlink()
        made.join("prairie")
        state = made.ended()
        assert state["state"] == "finished", made.told()
        assert [each["sites"]["prairie"]["status"] for each in made.rounds()] == ["ok", "ok", "ok"]
        assert same(made, simulated(tmp_path / "here"))
        status = made.call("coordinator", "status", made.at(files.COORDINATOR))
        assert (status.returncode, status.stdout.splitlines()[0]) == (0, "finished: round 3 of 3, 3 closed")
        for site in SITES:
            journal = made.call("site", "audit-log", made.at(site), "--json")
            lines = json.loads(journal.stdout)
            assert [line["kind"] for line in lines if not line["failure"]][-1] == "finish"
        result = json.loads((made.run / "result.json").read_text())
        assert set(result["metrics"]["test"]) == set(SITES)
        lost("site stopped in training, back in time")
