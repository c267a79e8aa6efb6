"""Composition: a hospital's machine, before anybody waits for it. In: the site's folder and model. Out: findings.

Room, device, and who could read what. Nothing is changed: what is written to try the disk is gone again.
"""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from consilium.deployment import files, processes
from consilium.deployment.files import SiteFile
from consilium.deployment.reach import Finding
from consilium.engines.relay import LONGEST_PATH, is_nameable
from consilium.engines.state import least_bytes
from consilium.experiment import Experiment
from consilium.sites.store import default_folder

ROOM = 4  # states that a site keeps at once, with one to spare
NEARLY_FULL = 1e9  # bytes; a journal, logs and the cache of images grow too
SMALL = 1e9  # bytes of memory that training may need on top of what this check took
GROUP, OTHERS = 0o070, 0o007
SECRETS = (files.SECRET, f"keys/{processes.NODE_KEY}", files.STATE, files.SITE)


def flower() -> Finding:
    """Whether the node's program is there."""
    try:
        return Finding("flower", "good", version("flwr"))
    except PackageNotFoundError:
        return Finding("flower", "bad", "Flower is not installed", "pip install 'consilium[flower]'")


# ------------------------------------------------------------------------------------------------ room
def disk(own: SiteFile, experiment: Experiment) -> list[Finding]:
    """The site's folder, and the cache of decoded images where it lies on another disk."""
    needed = ROOM * least_bytes(experiment, own.name)
    cache = own.config.engine.cache or default_folder()
    there = next(path for path in (cache, *cache.parents) if path.exists())
    found = [_disk("disk", own.folder, needed)]
    return found if there.stat().st_dev == own.folder.stat().st_dev else [*found, _disk("disk of the cache", there, 0)]


def _disk(what: str, folder: Path, needed: int) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.3g} GB free in {folder}, {needed / 1e6:.3g} MB needed at least"
    remedy = "free some space, or put the folder on another disk"
    if free <= needed:
        return Finding(what, "bad", text, remedy)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(65536))
    except OSError as error:
        remedy = "let the service's user write there, and free some space"
        return Finding(what, "bad", f"{folder} cannot be written to: {error.strerror}", remedy)
    nearly = free < max(NEARLY_FULL, 2 * needed)
    return Finding(what, "doubtful", f"{text}: nearly full", remedy) if nearly else Finding(what, "good", text)


def memory() -> Finding:
    """What is left with images and model in memory, as they are now and as the service keeps them."""
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = [each for each in (_available(), _allowed()) if each is not None]
    if not found:
        return Finding("memory", "doubtful", "this system does not say how much is free", "look yourself")
    free = min(found)
    text = f"{free / 1e9:.3g} GB free beside the {taken / 1e9:.3g} GB that this check took for images and model"
    if free < SMALL:
        return Finding(
            "memory", "doubtful", text, "training takes more: end other programs, or a smaller batch for all"
        )
    return Finding("memory", "good", text)


def _available() -> int | None:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _allowed(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container or a unit may still take."""
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # there is no limit, or nobody tells
        return None


def device(own: SiteFile, chosen: str) -> Finding:
    """On what it would compute. `chosen`: as the experiment resolved it."""
    if not chosen.startswith("cuda"):
        there = "a GPU is there and is not used" if torch.cuda.is_available() else "no GPU"
        threads = own.config.engine.threads
        return Finding("device", "good", f"processor, {threads} of {os.cpu_count()} threads; {there}")
    free, total = torch.cuda.mem_get_info(chosen)
    text = f"{torch.cuda.get_device_name(chosen)}, {free / 1e9:.3g} of {total / 1e9:.3g} GB free"
    if free < 2 * SMALL:
        return Finding("device", "doubtful", text, "somebody else computes on it: engine.device names another one")
    return Finding("device", "good", text)


# ------------------------------------------------------------------------------------------------ who could read what
def users(folder: Path) -> Finding:
    """Whether what the coordinator makes a node run could read what the service reads."""
    owner, own = folder.stat().st_uid, os.getuid()
    if own not in (owner, *([] if own else [0])) or (own == 0 and owner != 0):
        remedy = f"runuser -u {_name(owner)} -- consilium site check {folder}"
        text = f"this check ran as {_name(own)}, the service will run as {_name(owner)}, who may read less"
        return Finding("users", "doubtful", text, remedy)
    if os.access(folder / "keys" / processes.NODE_KEY, os.R_OK):
        text = f"one user, {_name(own)}, has the images and the node's key: code that is shipped to the node reads both"
        return Finding("users", "doubtful", text, "to try out only; in earnest ./install.sh makes two users")
    return Finding("users", "good", f"{_name(own)} has the images, and not the node's key")


def permissions(folder: Path) -> Finding:
    """What others on this machine could read. A closed folder closes all that is in it."""
    mode = folder.stat().st_mode
    if not mode & (GROUP | OTHERS):
        return Finding("permissions", "good", f"{folder} is its owner's alone")
    open_to_others = [name for name in SECRETS if _is_open(folder / name)]
    text = f"{folder} is open to others ({mode & 0o777:03o})"
    text += f", and so are {', '.join(open_to_others)}" if open_to_others else ""
    return Finding("permissions", "doubtful", text, f"chmod 700 {folder}")


def _is_open(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & (GROUP | OTHERS))
    except OSError:  # it is not there yet
        return False


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def socket(folder: Path) -> list[Finding]:
    """Whether the system takes the name of the socket, where service and node share the folder."""
    path = folder / files.SOCKET
    if is_nameable(path):
        return []
    remedy = "a folder with a shorter name, or site join --service-only --socket PATH"
    return [Finding("socket", "bad", f"its name has more than {LONGEST_PATH} bytes: {path}", remedy)]
