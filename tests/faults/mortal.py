"""A SuperLink that dies at a named moment: PLAN, then Flower's own words. In front of `door.py`, and as light.

PLAN is a file with the end of an address and how: "before" a request of it is looked at, or "unanswered", once it was
worked on and before the caller hears so. It is looked for at every request, so that it may come while the link runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from consilium.deployment import door


def main() -> None:
    """The link, behind a door that may kill it."""
    plan = Path(sys.argv.pop(1))

    def due(path: str, how: str) -> bool:
        return plan.is_file() and (path, how) == tuple(json.loads(plan.read_text()))

    class Mortal(door.Door):
        async def __call__(self, scope: door.Scope, receive: door.Receive, send: door.Send) -> None:
            path = str(scope.get("path", ""))

            async def sending(message: door.Scope) -> None:
                if due(path, "unanswered"):
                    die()
                await send(message)

            if due(path, "before"):
                die()
            await super().__call__(scope, receive, sending)

    def die() -> None:
        plan.rename(plan.with_suffix(".done"))
        os.kill(os.getpid(), signal.SIGKILL)

    door.Door = Mortal  # type: ignore[misc]
    door.main()


if __name__ == "__main__":
    main()
