"""Across real processes: TLS, node keys, a SuperLink and SuperNodes. By --faults; test_guide.py always runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from consilium import checkpoint
from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.loopback import SITES, loopback
from tests.faults.outcome import assert_as_simulated

SGD = 'optimizer = "sgd"\nmomentum = 0\nweight_decay = 0\nclip_norm = 0'  # what scaffold is defined for
PARITY: dict[str, tuple[str, dict[str, str]]] = {
    "fedavg": ("fedavg", {}),
    "fedopal": ("fedopal", {}),
    "scaffold": ("scaffold", {"[evaluation]": f"{SGD}\n[evaluation]"}),
    "flora": ("flora", {}),
    "stochastic_block": ("fedavg", {'name = "lora"\nrank = 2': 'name = "stochastic_block"'}),
}


@pytest.mark.faults
@pytest.mark.parametrize("method", PARITY)
def test_across_real_processes_and_in_one_the_bits_are_the_same(method: str, tmp_path: Path) -> None:
    """What is shared, in both checkpoints that are kept, and the model that each hospital serves."""
    strategy, change = PARITY[method]
    with loopback(tmp_path / "there", strategy=strategy, rounds=2, change=change) as made:
        made.begin()
        here = assert_as_simulated(made, tmp_path / "here")
        for path in sorted(here.glob("checkpoints/*.safetensors")):
            ours, theirs = (checkpoint.load(run / "checkpoints" / path.name)[0] for run in (made.run, here))
            assert any(name.startswith("shared/") for name in theirs)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.faults
def test_a_site_is_killed_and_comes_back_and_the_bits_are_those_of_a_simulation(tmp_path: Path, lost: Lost) -> None:
    """The deployment guide's way, with one fault: prairie's processes die in round 2 and are started again."""
    with loopback(tmp_path / "there", rounds=3, deadline=200) as made:
        mark = made.at_work()
        lost.before(made, "site stopped in training, back in time")
        made.kill("prairie", signal.SIGTERM)
        mark.unlink()
        made.join("prairie")
        assert_as_simulated(made, tmp_path / "here")
        status = made.call("coordinator", "status", made.at(files.COORDINATOR))
        assert (status.returncode, status.stdout.splitlines()[0]) == (0, "finished: round 3 of 3, 3 closed")
        for site in SITES:
            journal = made.call("site", "audit-log", made.at(site), "--json")
            lines = json.loads(journal.stdout)
            assert [line["kind"] for line in lines if not line["failure"]][-1] == "finish"
        result = json.loads((made.run / "result.json").read_text())
        assert set(result["metrics"]["test"]) == set(SITES)
        lost.after()
