"""A hospital whose disk is full, whose state is damaged, whose folder two processes want."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.loopback import SLOW, loopback
from tests.faults.outcome import assert_as_simulated

# Files of this process may have 20 kB from here on: enough for a line of a log, too little for a state. SIGXFSZ is
# ignored by Python, so that writing fails as it does on a full disk.
TROUBLE = """
import resource
from consilium.engines.site import Site
from consilium.messages import envelope_of
handle = Site.handle
def troubled(self, data):
    fields = envelope_of(data)
    number = fields["round"] if fields["kind"] == "round" else 0
    if number == 2:
        whole = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, whole[1]))
        try:
            return handle(self, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    if number == 4:
        path = self.folder / "state-00003.safetensors"
        backup = path.read_bytes()
        path.write_bytes(backup[:len(backup) // 2])
        try:
            return handle(self, data)
        finally:
            path.write_bytes(backup)
    return handle(self, data)
Site.handle = troubled
"""


@pytest.mark.faults
def test_a_full_disk_a_damaged_state_and_a_second_process_keep_the_last_good_state(tmp_path: Path, lost: Lost) -> None:
    befalls = {"disk full at a site": [2], "personal state damaged": [4], "two processes on one folder": [1, 3, 5]}
    with loopback(tmp_path / "there", strategy="fedopal", rounds=5) as made:
        mark = made.folder / "harbour.slow"
        mark.write_text("2")
        made.begin({"prairie": TROUBLE, "harbour": SLOW.format(mark=str(mark))})
        made.until_closed(1)
        lost.before(made, *befalls)
        second = made.call("site", "join", made.at("prairie"))
        assert second.returncode == 1, second.stderr
        assert "another process serves this site's folder" in second.stderr
        again = made.call("coordinator", "submit", made.at(files.COORDINATOR))
        assert again.returncode == 1
        assert "the run of this folder is going on" in again.stderr
        mark.unlink()
        assert_as_simulated(made, tmp_path / "here", {"prairie": [2, 4]})
        rows = [each["sites"]["prairie"] for each in made.rounds()]
        assert all(rows[number - 1]["message"].startswith("see failures.jsonl at the site, ") for number in (2, 4))
        kept = next(made.at("prairie").glob("state/*/failures.jsonl")).read_text().splitlines()
        full, damaged = [json.loads(line)["text"] for line in kept]
        assert "a file could not be written" in full
        assert "state-00003.safetensors" in damaged
        for fault, rounds in befalls.items():
            lost.after(fault, rounds=rounds)
