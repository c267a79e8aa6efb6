"""With a key nothing that a site keeps to itself lies in any file in clear, whatever the strategy."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium import registry
from consilium.engines.state import StateFolder
from consilium.keeping import kept
from tests import federation, variants

ALIKE = {"pooled", "ensemble", "fedpft", "fedopal_weights", "fedopal_representations", "feddpa_f", "fedrep", "fedacs"}
STRATEGIES = sorted(
    name
    for name, member in registry.members("strategies").items()
    if name not in ALIKE and member.facts["stays"] != "nothing but the data"  # or keep what another one keeps
)
SITES = federation.hospitals(7, 6)
KEY = bytes(range(32))


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_personal_value_lies_in_a_file_in_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """States are opened with the key, and all files are searched for the bytes of what was in them; what a site also
    sends or serves to all is no secret."""
    monkeypatch.setenv("SITE_KEY", KEY.hex())
    settings = variants.settings(
        name,
        head={"share": "personal"} if name != "lg" else {},
        train={"rounds": 2, "moments": "keep", "local_epochs": 0.8},
        engine={"state_key_variable": "SITE_KEY"},
    )
    outcome = federation.run(tmp_path, settings, SITES)
    pieces, sent = outcome.experiment, {n for number in (1, 2) for n in outcome.experiment.up(number)}
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    marks: dict[bytes, str] = {}
    for site in SITES:
        states = StateFolder(tmp_path / "sites" / site, pieces.handshake.agreement, KEY, site)
        for number in states.rounds():
            state = states.load(number)
            own = {n: v for n, v in state.personal.tensors.items() if not {n, n.partition("/")[2]} & sent}
            secret = {**own, **{f"moments {n}": v for n, v in state.moments.items()}}
            marks |= federation.traces({n: v.flatten() for n, v in secret.items()})
    assert marks or not kept(pieces, tuple(SITES))
    everything = b"".join(files)
    assert not sorted({what for mark, what in marks.items() if mark in everything})
