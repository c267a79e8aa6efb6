"""Hospitals whose only way out is a proxy that wants a password, and alone knows the coordinator's name."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from tests.connect_proxy import proxy
from tests.faults.loopback import SITES, loopback
from tests.faults.outcome import assert_as_simulated

KNOWN = f"Basic {base64.b64encode(b'clinic:s@cret').decode()}"


@pytest.mark.loopback
@pytest.mark.faults
def test_the_run_is_the_same_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator's machine has the proxy in its environment too: its own parts do without."""
    elsewhere = {"127.0.0.1:": "coordinator.test:"}
    with proxy(KNOWN) as way, loopback(tmp_path / "there", rounds=2, change=elsewhere) as made:
        for name in ("HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://clinic:s%40cret@127.0.0.1:{way.port}")
        made.link()
        made.join_all()
        checked = made.call("site", "check", made.at("alpine"), "--json")
        (line,) = (each for each in json.loads(checked.stdout) if each["what"] == "connection")
        assert line["verdict"] == "good", line
        made.submit()
        assert_as_simulated(made, tmp_path / "here")
        assert set(way.led) == {f"coordinator.test:{made.port}"}
        logs = [path for path in made.folder.rglob("*") if path.suffix in (".log", ".jsonl", ".out")]
        assert len(logs) > len(SITES)
        assert not [path for path in logs if "s%40cret" in path.read_text(errors="replace")], "the password"
