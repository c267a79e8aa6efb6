"""A client app of Flower that keeps no service, beside the package's own: what the benchmark of hospitals compares.

Nothing heavy is imported until a site builds itself, as a site that asks its service imports nothing of it either.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consilium.engines import relay

ANEW, BUILT = "anew", "built.jsonl"  # files in a site's folder: it asks no service; seconds of every message


def client() -> Any:
    """The package's client app; where a site's folder says so, it builds the site itself and asks no service."""
    flower = importlib.import_module("consilium.engines.flower")
    ask = relay.ask

    def answer(path: Path, request: bytes, timeout: float | None = None) -> bytes:
        folder = path.parent.parent
        return _built(folder, request) if (folder / ANEW).is_file() else ask(path, request, timeout)

    flower.relay.ask = answer
    return flower.client()


def _built(folder: Path, request: bytes) -> bytes:
    from consilium.deployment import files, hospital

    own = files.read_site(folder)
    guard = hospital.guarded(own, hospital.open_site(own, _silent), _silent)
    with (folder / BUILT).open("a") as file:
        file.write(json.dumps(age()) + "\n")
    return guard.answer(request)


def age() -> float:
    """Seconds since this process began: what it imported counts too."""
    after_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot


def built(site: Path) -> list[float]:
    """Seconds from the start of every message's process until it could begin to answer."""
    return [float(line) for line in (site / BUILT).read_text().splitlines()]


def _silent(_: Mapping[str, object]) -> None:
    """Nobody watches."""
