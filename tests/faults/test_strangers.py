"""Who does not belong, or holds something else than agreed on: refused by name, and told so at both ends."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import timm
from safetensors.torch import save_file

from consilium.deployment import files, init, processes
from tests.faults.conftest import Lost
from tests.faults.loopback import SITES, busy, loopback
from tests.faults.outcome import assert_as_simulated, resume

UNSIGNED = """
import http.client, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[2])
link = http.client.HTTPSConnection("127.0.0.1", int(sys.argv[1]), timeout=200, context=context)
for name in ("activate-node", "pull-messages", "push-messages", "pull-object", "push-object"):
    link.request("POST", f"/v1/fleet/{name}", b"", {"Content-Type": "application/protobuf"})
    answer = link.getresponse()
    print(answer.status, len(answer.read()))
"""
PLAIN = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=200) as link:
    link.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n")
    print(link.recv(100))
"""
OTHER_VERSION = "import consilium\nconsilium.__version__ = '0.0.1'"


@pytest.mark.faults
def test_other_weights_another_configuration_and_another_version_are_refused_by_name(
    tmp_path: Path, lost: Lost
) -> None:
    with loopback(tmp_path / "there", rounds=2) as made:
        own = made.at("alpine") / files.SITE
        model = timm.create_model("test_vit", num_classes=0, img_size=32)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
        mended = {path: path.read_text() for path in (own, made.at("harbour") / files.FEDERATION)}
        own.write_text(own.read_text() + f'[backbone]\nweights = "{tmp_path / "w.safetensors"}"\n')
        agreed = made.at("harbour") / files.FEDERATION
        agreed.write_text(agreed.read_text().replace("learning_rate = 1e-2", "learning_rate = 2e-2"))
        made.link()
        made.join_all({"prairie": OTHER_VERSION})
        lost.before(made, "other backbone weights", "another configuration", "another package version")
        made.submit()
        state = made.ended()
        assert state["state"] == "failed"
        ours = json.loads((made.run / "config.json").read_text())
        for site, key, mine in (
            ("alpine", "backbone", ours["backbone_digest"]),
            ("harbour", "agreement", ours["agreement_hash"]),
            ("prairie", "version", ours["version"]),
        ):
            said = state["sites"][site]
            assert said["status"] == "refused"
            assert f"coordinator and site do not agree: {key}" in said["message"]
            assert mine in said["message"], "what the coordinator holds"
            assert f"{site}: refused, coordinator and site do not agree: {key}" in state["message"]
            log = [json.loads(line) for line in (made.at(site) / "log.jsonl").read_text().splitlines()]
            failure = next(each["failure"] for each in log if each["event"] == "answered")
            assert (failure["code"], failure["message"]) == ("refused", said["message"])
            journal = json.loads((made.at(site) / "journal.jsonl").read_text().splitlines()[-1])
            assert journal["failure"]["code"] == "refused"
            theirs = said["message"].partition("allowed: ")[2].split()[0]
            assert theirs != mine, "what the site holds"
            assert len(theirs) == (5 if key == "version" else len(mine))
            assert not list(made.at(site).glob("state/*/state-*")), "its data were touched"
        assert not made.rounds()
        for path, text in mended.items():
            path.write_text(text)
        for site in SITES:
            made.kill(site, signal.SIGTERM)
            made.join(site)
        resume(made)
        assert_as_simulated(made, tmp_path / "here")
        lost.after()


@pytest.mark.faults
def test_who_is_not_registered_or_not_the_coordinator_does_not_get_in(tmp_path: Path, lost: Lost) -> None:
    """Wrong authority, foreign key, no key, plain text: the site's own log says which."""
    with loopback(tmp_path) as made:
        made.link()
        lost.before(made, "wrong authority", "unregistered key", "no key", "plain text")
        (tmp_path / "other").mkdir()
        init.certificates(tmp_path / "other", "127.0.0.1")
        shutil.copy(tmp_path / "other" / processes.CA, made.at("alpine") / "keys" / processes.CA)
        keys = made.at("harbour") / "keys"
        for name in (processes.NODE_KEY, processes.PUBLIC_KEY):
            (keys / name).unlink()
        init.node_key(keys, "harbour")
        (made.at("prairie") / "keys" / processes.NODE_KEY).unlink()
        for site in SITES[:2]:
            made.join(site)
        made.wait(lambda: "not whom keys/ca.crt vouches for" in made.output("alpine"), "alpine's node to be refused")
        made.wait(lambda: "does not know this node's key" in made.output("harbour"), "harbour's node to be refused")
        checked = made.call("site", "check", made.at("alpine"), "--json")
        bad = [each["text"] for each in json.loads(checked.stdout) if each["verdict"] == "bad"]
        assert checked.returncode == 1
        assert any("is not whom keys/ca.crt vouches for" in text for text in bad), bad
        keyless = made.call("site", "join", made.at("prairie"))
        assert keyless.returncode in (1, 2)
        assert processes.NODE_KEY in keyless.stderr
        assert "Traceback" not in keyless.stderr
        for arguments in (["--insecure"], ["--root-certificates", str(keys / processes.CA)]):
            assert refused(made.port, arguments)
        plain = subprocess.run(
            [sys.executable, "-c", PLAIN, str(made.port)], capture_output=True, text=True, check=True
        )
        assert "HTTP" not in plain.stdout
        command = [sys.executable, "-c", UNSIGNED, str(made.port), str(keys / processes.CA)]
        unsigned = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[::2]
        assert len(unsigned) == 5
        assert set(unsigned) <= {"401", "403"}, unsigned
        link = (made.at(files.COORDINATOR) / "superlink.log").read_text()
        assert "Activated node_id" not in link
        lost.after()


def refused(port: int, arguments: list[str]) -> bool:
    """Whether a node of Flower's own, without a key, ends or tries in vain until it is stopped."""
    command = [processes.program("flower-supernode"), "--superlink", f"127.0.0.1:{port}", *arguments]
    command += ["--port", str(processes.free_port())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30 * busy(), check=False)
    except subprocess.TimeoutExpired as error:
        return b"SuperNode ID" not in (error.stdout or b"")
    return done.returncode != 0
