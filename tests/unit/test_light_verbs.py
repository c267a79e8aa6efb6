"""Verbs that need no model load none: an engineer who asks how a run stands waits for no torch, nor does a node."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from tests.hospitals_apart import Apart, made

HEAVY = {"torch", "torchvision", "timm", "pandas", "sklearn", "pyarrow", "matplotlib"}
SCRIPT = """
import json, sys
from consilium.cli import main
from consilium.deployment import processes
processes.flwr = lambda *words, **more: {"success": True, "run-id": "1", "runs": []}  # no SuperLink here
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    print("code:", end.code or 0)
print("loaded:", *sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """Those that `deploy init` makes; a hospital without its node's key, a coordinator without one of its sites'."""
    found = made(tmp_path_factory.mktemp("light"))
    (found.at("harbour") / "keys" / "node.key").unlink()
    (found.at("prairie") / files.SITE).write_text('site = "prairie"\n')
    return found


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("coordinator enrol COORDINATOR alpine ALPINE/keys/node.key.pub", 0),
        ("coordinator status COORDINATOR", 1),
        ("coordinator stop COORDINATOR", 1),
        ("coordinator resume COORDINATOR", 1),
        ("coordinator submit COORDINATOR", 0),
        ("coordinator status COORDINATOR --json", 3),
        ("coordinator stop COORDINATOR", 0),
        ("coordinator start ALPINE", 2),  # it ends at the keys that are not there
        ("site node HARBOUR", 2),
        ("site audit-log ALPINE", 0),
        ("site states ALPINE --json", 0),
        ("site approvals ALPINE", 0),
        ("site withdraw ALPINE --by someone", 2),
    ],
)
def test_a_verb_loads_nothing_heavy(words: str, code: int, folders: Apart) -> None:
    for name in ("coordinator", "alpine", "harbour"):
        words = words.replace(name.upper(), str(folders.at(name)))
    quoted = "[" + ", ".join(f'"{word}"' for word in words.split()) + "]"
    done = subprocess.run([sys.executable, "-c", SCRIPT, quoted], capture_output=True, text=True, check=False)
    *_, ended, loaded = done.stdout.splitlines()
    assert ended == f"code: {code}", done.stderr
    assert set(loaded.split()) & HEAVY == set()


def test_an_agreement_that_was_changed_is_read_as_a_whole_before_it_is_begun(folders: Apart) -> None:
    path = folders.at("coordinator") / files.FEDERATION
    whole = path.read_text()
    path.write_text(whole.replace("rank = 2", "rnak = 2"))
    try:
        with pytest.raises(Exception, match="rnak"):
            files.settled(folders.at("coordinator"))
    finally:
        path.write_text(whole)
    assert files.settled(folders.at("coordinator")).sites == ("alpine", "harbour", "prairie")
