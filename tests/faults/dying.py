"""A client app of Flower's that dies once: PLAN, then Flower's own words. PLAN is a file that names the call of the
node that it does not live to make; it is looked for at every start."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.cli import flwr_clientapp

INSTALL = """
from consilium.deployment import processes
whole = processes.environment
def first(home):
    found = whole(home)
    return {{**found, "PATH": {folder!r} + ":" + found["PATH"]}}
processes.environment = first
"""


def install(folder: Path, plan: Path) -> str:
    """A hook (loopback.py) by which a node starts these apps instead of Flower's; the folder is made for that."""
    folder.mkdir()
    script = folder / "flwr-clientapp"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {__name__} "{plan}" "$@"\n')
    script.chmod(0o755)
    return INSTALL.format(folder=str(folder))


def main() -> None:
    """The app, with its end in it."""
    plan = Path(sys.argv.pop(1))
    if plan.is_file():
        name = plan.read_text()

        def die(*_: Any) -> None:
            plan.rename(plan.with_suffix(".done"))
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(RuntimeHttpClient, name, die)
    flwr_clientapp()


if __name__ == "__main__":
    main()
