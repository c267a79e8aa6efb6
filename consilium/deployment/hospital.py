"""Composition: the service at a hospital. In: the site's folder. Out: replies, for as long as it runs.

What is in the folder: `federation.toml`, `site.toml`, the secret, `state/` with what the site keeps of each run,
`log.jsonl`, and `journal.jsonl` with all that left. The service reads the images once, keeps the backbone warm, and
listens on a socket in `socket/`, which the site's Flower node asks for every message.
"""

from __future__ import annotations

import pwd
from collections.abc import Callable
from pathlib import Path

from consilium import run, run_folder
from consilium.deployment import files, node, own_page
from consilium.deployment import gate as gating
from consilium.deployment.files import SiteFile
from consilium.deployment.gate import Gate
from consilium.deployment.guard import Guard
from consilium.deployment.journal import Journal
from consilium.deployment.log import Log, Show
from consilium.engines.kept import claimed
from consilium.engines.relay import Listener, Other
from consilium.engines.resident import Resident
from consilium.engines.site import Site
from consilium.errors import ConfigError
from consilium.experiment import assemble
from consilium.messages import envelope_of


def open_site(own: SiteFile, show: Show) -> Site:
    """Everything a hospital needs to answer: its images, decoded, and the model. Raises what a run would raise."""
    prepared = run.prepare(own.config, show)
    pieces = assemble(own.config, prepared.classes)
    return Site(pieces, prepared.sites[own.name], own.folder / files.STATE, files.secret(own.folder))


def guarded(own: SiteFile, site: Site, tell: Show) -> Guard:
    """The site behind its own rules; ConfigError where these would refuse every round, StateError where a line of the
    journal is not as it was written: from then on its end alone is looked at."""
    gate, journal = Gate(own.gate, site.experiment, site.data, own.folder), Journal(own.folder)
    gating.check(gate)
    for _ in journal.entries():
        pass
    return Guard(Resident(site, tell), gate, journal)


def serve(
    folder: Path, show: Show, until: Callable[[], None], socket: Path | None = None, node_user: str | None = None
) -> None:
    """Answer requests until `until` returns. StateError where another process serves this folder.

    `socket`: where to listen, if not in the folder; `node_user`: the system's name of a user beside this one who may
    ask, and who runs the node (`connect`).
    """
    own, other = files.read_site(folder), _user(node_user)
    tell = Log(own.folder / files.LOG).before(show)
    with claimed(own.folder / files.STATE):
        run_folder.clean(own.folder / files.STATE)
        site = open_site(own, show)
        guard = guarded(own, site, tell)

        def answer(data: bytes) -> bytes:
            try:
                reply = guard.answer(data)
            except Exception as error:  # nothing leaves; why is said here
                tell({"event": "fault", "message": f"{type(error).__name__}: {error}"})
                raise
            _end(own, site, data, reply, tell)
            return reply

        where, largest = socket or own.folder / files.SOCKET, 2 * guard.gate.largest
        with Listener(where, answer, other, largest):
            tell({"event": "ready", "site": own.name, "images": len(site.data.train)})
            until()


def _end(own: SiteFile, site: Site, data: bytes, reply: bytes, tell: Show) -> None:
    """After the last message of a run: the site's own page. One that cannot be made keeps no reply back."""
    asked = envelope_of(data) if envelope_of(reply)["failure"] is None else {}
    if asked.get("kind") != "finish":
        return
    try:
        tell({"event": "page", "path": str(own_page.write(own, site, asked["handshake"]["run"]))})
    except Exception as error:
        tell({"event": "warning", "text": f"no page was made: {type(error).__name__}: {error}"})


def page(folder: Path, run: str | None) -> Path:
    """Make the site's own page of a run anew; left out, of the one that ended last."""
    own = files.read_site(folder)
    name = run if run is not None else own_page.newest(own.folder / files.STATE)
    return own_page.write(own, open_site(own, lambda _: None), name)


def _user(name: str | None) -> Other | None:
    """A user by name; ConfigError where the system knows none of that name."""
    if name is None:
        return None
    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        remedy = f"useradd --system {name}"
        raise ConfigError("no user of this name", where="--node-user", received=name, remedy=remedy) from error
    return Other(found.pw_uid, found.pw_gid)


def join(folder: Path, show: Show, until: Callable[[], None]) -> None:
    """The service, and Flower's node beside it, by one user."""
    serve(folder, show, lambda: node.connect(folder, folder / files.SOCKET, show, until))
