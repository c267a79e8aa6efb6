"""Common: where and by what a run was computed. In: nothing, or a device. Out: versions, memory, device."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from consilium.config_engine import EngineConfig

PACKAGES = ("torch", "torchvision", "timm", "safetensors", "numpy", "pandas", "pydantic")


def hardware(device: str, engine: EngineConfig) -> dict[str, Any]:
    """Where the run took place; of a GPU also the most bytes that this process held on it."""
    found: dict[str, Any] = {"device": device, "name": platform.processor() or platform.machine()}
    if device.startswith("cuda"):
        found |= {
            "name": torch.cuda.get_device_name(device),
            "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device),
        }
    return {
        **found,
        "cores": os.cpu_count(),
        "threads": engine.threads,
        "workers": engine.workers,
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def peak_memory() -> int:
    """Largest resident bytes of this process or of any worker, as the system counted them."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest of this package's own source, so that results of different code are never taken for one another."""
    root = Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]
