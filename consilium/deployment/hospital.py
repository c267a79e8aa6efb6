"""Composition: the service at a hospital. In: the site's folder. Out: replies, for as long as it runs.

What is in the folder: `federation.toml`, `site.toml`, the secret, `state/` with what the site keeps of each run,
`log.jsonl`. The service reads the images once, keeps the backbone warm, and listens on a socket in `socket/`, which the
site's Flower node asks for every message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from consilium import run
from consilium.deployment import files, processes
from consilium.deployment.files import SiteFile
from consilium.deployment.log import Log
from consilium.deployment.processes import Supervised
from consilium.engines.relay import Listener
from consilium.engines.resident import Resident, claimed
from consilium.engines.site import Site
from consilium.experiment import assemble

SOCKET, STATE, LOG = Path("socket") / "site", "state", "log.jsonl"
Show = Callable[[Mapping[str, object]], None]


def open_site(own: SiteFile, show: Show) -> Site:
    """Everything a hospital needs to answer: its images, decoded, and the model. Raises what a run would raise."""
    prepared = run.prepare(own.config, show)
    pieces = assemble(own.config, prepared.classes)
    return Site(pieces, prepared.sites[own.name], own.folder / STATE, files.secret(own.folder))


def serve(folder: Path, show: Show, until: Callable[[], None]) -> None:
    """Answer requests until `until` returns. StateError where another process serves this folder."""
    own = files.read_site(folder)
    log = Log(own.folder / LOG)

    def tell(event: Mapping[str, object]) -> None:
        log(event)
        show(event)

    with claimed(own.folder / STATE):
        site = open_site(own, show)
        with Listener(own.folder / SOCKET, Resident(site, tell).answer):
            tell({"event": "ready", "site": own.name, "images": len(site.data.train)})
            until()


def join(folder: Path, show: Show, until: Callable[[], None], *, node: bool = True) -> None:
    """The service and, unless it runs elsewhere, Flower's node beside it."""
    own, address = files.read_site(folder), files.read(folder).deployment.address
    log = Log(own.folder / LOG)

    def tell(event: Mapping[str, object]) -> None:
        log(event)
        show(event)

    if not node:
        return serve(folder, show, until)
    command = processes.supernode(own.folder, address, own.folder / SOCKET)

    def connected() -> None:
        with Supervised(command, own.folder / processes.HOME, own.folder / "supernode.log", tell):
            until()

    return serve(folder, show, connected)
