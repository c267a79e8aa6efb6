"""Composition: a hospital's node. In: a folder with the agreement and keys/. Out: Flower's SuperNode, kept running.

It speaks to the coordinator and asks the site's service through its socket. It needs neither images nor a model, and
imports nothing of them: it may belong to a user of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from consilium.deployment import files, processes
from consilium.deployment.log import Log, Show
from consilium.deployment.processes import Supervised
from consilium.errors import ConfigError


def connect(folder: Path, socket: Path, show: Show, until: Callable[[], None]) -> None:
    """Flower's node alone, until `until` returns. The folder needs no more than the agreement and keys/."""
    address, tell = files.deployment(folder).address, Log(folder / files.LOG).before(show)
    folder = folder.resolve()
    missing = [name for name in (processes.CA, processes.NODE_KEY) if not os.access(folder / "keys" / name, os.R_OK)]
    if missing:
        where, remedy = str(folder / "keys"), "copy keys/ of the site's folder there, for the node's user alone"
        raise ConfigError("the node cannot read its keys", where=where, received=", ".join(missing), remedy=remedy)

    command = processes.supernode(folder, address, socket.resolve())
    with Supervised(processes.SUPERNODE, command, folder / processes.HOME, folder / "supernode.log", tell):
        until()
