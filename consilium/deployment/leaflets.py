"""Composition: what to do with new folders. In: an agreement and its folders. Out: a checklist, a README in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consilium.deployment import files, services

GUIDE = "docs/deployment.md"
TEXT = """Made: {folders}

To do, in this order ({guide}; each folder has a README.md with its own list):
 1. {coordinator}: keep it on the coordinator's machine. Open port {port} inwards there; nothing else.
 2. The other folders: one to each hospital, by a safe way. A hospital opens nothing inwards; outwards it must reach
    {address} (TCP, TLS).
 3. In earnest: replace keys/ by a certificate of an authority that all trust, which names this address and 127.0.0.1;
    let each hospital make its own node key, and enrol its public half:
    consilium coordinator enrol {coordinator} SITE node.key.pub
    What was made here is for trying out: whoever ran this command could read along. It ends after 90 days.
 4. At each hospital: fill in site.toml, then   consilium site check FOLDER   and   consilium site join FOLDER
    (in earnest install.sh: two users and two services of systemd)
 5. At the coordinator:                         consilium coordinator start {coordinator}
                                                consilium coordinator submit {coordinator} --wait
"""
LEADER = """# Coordinator

- [ ] The port: {port}/tcp inwards, from the hospitals' addresses only. Nothing else. Outwards: nothing.
- [ ] Keys in earnest: keys/ca.crt, keys/server.pem, keys/server.key; the certificate names `{host}` and `127.0.0.1`.
      What lies there now is for trying out and ends after 90 days. Remove keys/ca.key from this machine.
- [ ] Of each hospital: node.key.pub, compared by telephone: `consilium coordinator enrol . SITE node.key.pub`
- [ ] `./start.sh` to try out, or as root `./install.sh` (user `{user}`, folder `/var/lib/{user}`)
- [ ] `consilium coordinator submit . --wait`; `consilium coordinator status .`; `consilium coordinator resume .`

Here lie: `federation.toml` (the agreement), `keys/`, `nodes/` (public keys of hospitals), `app/` (what Flower carries:
two lines), `run/` (checkpoints and result), `status.json`, `log.jsonl`, `superlink.log`, `superlink.db`. Back up
`keys/`, `nodes/` and `run/`. All steps: {guide} of the package.
"""
SITE = """# {name}

- [ ] Outwards to {address} (TCP, TLS). Inwards nothing. No internet: neither for the package once it is installed, nor
      for weights, which must lie on a disk here.
- [ ] `site.toml`: where images lie, on what to compute, and under `[gate]` what may leave.
- [ ] Keys in earnest: make your own node.key (`ssh-keygen -t ecdsa -b 384 -N '' -f node.key`), give its .pub to the
      coordinator; ask it for ca.crt, and compare by telephone.
- [ ] `consilium site check .` : everything that a round would meet, before anybody waits.
- [ ] `consilium site approve . --by NAME`, where `gate.approval = true`; `consilium site withdraw . --by NAME` takes it
      back at once, `consilium site approvals .` lists both.
- [ ] `./start.sh` to try out, by one user; in earnest as root `./install.sh`: user `{user}` reads images and has no
      network, user `{node_user}` has the network and cannot read images.
- [ ] `consilium site audit-log .` : everything that left, line by line.
- [ ] To withdraw: stop both services; `consilium site states .`; `consilium site states . --delete RUN`.

Back up `secret.json`, `state/`, `journal.jsonl`, `journal.head.json`, `approvals.jsonl` and `keys/`. All steps: {guide}
of the package.
"""


def checklist(federation: Path, folders: Sequence[Path]) -> str:
    """The list as text."""
    agreement = files.read_text(federation)
    address = agreement.deployment.address
    port, names = address.rpartition(":")[2], ", ".join(map(str, folders))
    text = TEXT.format(folders=names, coordinator=folders[0], port=port, address=address, guide=GUIDE)
    return text + _weights(agreement.table["backbone"].get("weights"))


def _weights(given: str | None) -> str:
    """Where every machine, the coordinator's too, looks for the backbone; nothing where there is no file to it."""
    if given in ("random", "embedded"):
        return ""
    if given is None:
        return (
            " 6. No backbone.weights: every machine must have them in its cache of the model hub, which nobody asks.\n"
        )
    own = "a hospital may name its own place: [backbone] weights in site.toml"
    if Path(given).is_absolute():
        return f" 6. Every machine, the coordinator's too, reads the weights from {given}; {own}.\n"
    return f" 6. Copy the weights into every folder, the coordinator's too, as FOLDER/{given}; {own}.\n"


def leader(folder: Path, address: str) -> None:
    """README.md of the coordinator's folder."""
    host, _, port = address.rpartition(":")
    text = LEADER.format(port=port, host=host, user=services.LEADER, guide=GUIDE)
    (folder / "README.md").write_text(text, encoding="utf-8")


def site(folder: Path, name: str, address: str) -> None:
    """README.md of a hospital's folder."""
    users = {"user": services.SERVICE_USER, "node_user": services.NODE_USER}
    (folder / "README.md").write_text(SITE.format(name=name, address=address, guide=GUIDE, **users), encoding="utf-8")
