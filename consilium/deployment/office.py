"""Composition: what an engineer asks of a coordinator's folder. In: the folder. Out: a link, a run, its state.

Flower's own exit codes say that a run was handed over, not how it ended; the state comes from the folder:
`status.json`, written by the coordinator itself, and the lock that it holds while it lives. Before it lives, Flower is
asked.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consilium import checkpoint, run_folder
from consilium.deployment import board, door, files, processes
from consilium.deployment.log import Log, Show
from consilium.deployment.processes import APP, CONNECTION, Supervised
from consilium.errors import ConfigError, StateError

FLOWER_RUN = "flower.json"
ENDED = ("finished", "failed", "stopped", "died")


def start(folder: Path, show: Show, until: Callable[[], None]) -> None:
    """Keep the SuperLink running until `until` returns; enrolled sites are registered with it."""
    known(folder)
    meeting, tell = files.deployment(folder), Log(folder / board.LOG).before(show)
    keys = files.public_keys(folder, meeting)
    address = meeting.address
    processes.await_port(address, tell)
    if damaged := processes.set_aside(folder.resolve()):
        text = f"the SuperLink's database could not be read and is now {damaged.name}; a new one is made"
        tell({"event": "warning", "text": text})
    processes.write_connection(folder.resolve(), address)
    command = processes.superlink(folder.resolve(), address)
    with Supervised(
        door.SUPERLINK, command, folder.resolve() / processes.HOME, folder / "superlink.log", tell, pause=2.0
    ):
        for site in keys:
            register(folder, site)
        if not processes.is_guarded(folder.resolve(), address):
            raise StateError(
                "the SuperLink serves more than hospitals need", remedy="install a Flower that is declared"
            )
        tell({"event": "ready", "address": address, "sites": sorted(keys)})
        until()


def register(folder: Path, site: str, patience: float = 60.0) -> None:
    """Tell the SuperLink the key of a site; one that it knows stays. Waits for a SuperLink that is just starting."""
    path, end = folder.resolve() / files.NODES / f"{site}.pub", time.monotonic() + patience
    while True:
        try:
            processes.flwr(folder.resolve(), "supernode", "register", str(path), CONNECTION, "--name", site)
            return
        except StateError as error:
            if "already" in str(error.received):
                return
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def enrol(folder: Path, site: str, key: Path) -> str:
    """Take a site's public key into the coordinator's folder; its fingerprint, to be compared by telephone, as
    `ssh-keygen -l` tells it at the hospital."""
    from consilium.engines.flower import spoken

    known(folder)
    sites = files.deployment(folder).sites
    if site not in sites:
        allowed = ", ".join(sites)
        raise ConfigError("this site is no part of the agreement", allowed=allowed, received=site)
    try:
        data = key.read_bytes()
        found = spoken(data)
    except (OSError, ValueError) as error:
        remedy = "give the site's node.key.pub, never node.key"
        raise ConfigError("this is no public key", where=str(key), received=str(error), remedy=remedy) from error
    checkpoint.write_bytes(folder / files.NODES / f"{site}.pub", data)  # on a full disk the old key stays
    return found


def twins(folder: Path, site: str) -> list[str]:
    """Other sites that have the same key now: a run is refused until each has its own."""
    paths = {each: folder / files.NODES / f"{each}.pub" for each in files.deployment(folder).sites}
    keys = {each: path.read_bytes().split()[:2] for each, path in paths.items() if path.is_file()}
    return sorted(each for each, key in keys.items() if each != site and key == keys[site])


def submit(folder: Path) -> dict[str, Any]:
    """Begin the run of this folder, or go on with it; StateError where it is running or finished, or another process
    begins it now. One that was killed after its last file and before it said so is begun once more, and says so."""
    known(folder)
    with run_folder.locked(folder / processes.HOME, "another submit is at work: see consilium coordinator status"):
        return _submit(folder)


def _submit(folder: Path) -> dict[str, Any]:
    from consilium.engines.flower import fingerprints

    state = status(folder)["state"] if (folder / board.STATUS).is_file() else "new"
    if state in ("starting", "running"):
        remedy = f"consilium coordinator status {folder}"
        raise StateError("the run of this folder is going on", where=str(folder), remedy=remedy)
    if run_folder.is_done(folder / files.RUN) and state not in ("died", "failed", "stopped"):
        remedy = f"look at {folder / files.RUN / 'result.json'}, or move {files.RUN}/ away to begin anew"
        raise StateError("the run of this folder is finished", where=str(folder), remedy=remedy)
    fingerprints(files.public_keys(folder, files.settled(folder)))
    here = folder.resolve()
    with _kept(folder / board.STATUS, folder / FLOWER_RUN):
        (folder / FLOWER_RUN).unlink(missing_ok=True)
        board.Board(folder).handed_over()
        words = ["run", str(here / APP), CONNECTION, "--run-config", f"folder={processes.quoted(here)}"]
        found = _of_superlink(folder, *words)
    checkpoint.write_json(folder / FLOWER_RUN, {"run": str(found["run-id"])})
    return found  # type: ignore[no-any-return]


@contextmanager
def _kept(*paths: Path) -> Iterator[None]:
    """Put files back as they were where what follows fails: how the last run ended is not forgotten."""
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    except BaseException:
        for path, data in before.items():
            path.unlink(missing_ok=True) if data is None else checkpoint.write_bytes(path, data)
        raise


def _of_superlink(folder: Path, *words: str) -> Any:
    """What Flower's command line says; where the SuperLink is not there at all, that."""
    try:
        return processes.flwr(folder.resolve(), *words)
    except StateError as error:
        address = files.deployment(folder).address
        if processes.is_guarded(folder, address):
            raise
        where, remedy = f"port {address.rpartition(':')[2]} of this machine", f"consilium coordinator start {folder}"
        raise StateError("the SuperLink does not answer", where=where, remedy=remedy) from error


def begun(folder: Path) -> None:
    """StateError unless there is a run to go on with."""
    known(folder)
    if not (folder / files.RUN / run_folder.CONFIG).is_file():
        raise StateError("there is no run to resume", where=str(folder), remedy="consilium coordinator submit")


def stop(folder: Path, patience: float = 60.0) -> None:
    """End the run; what is closed stays, and `resume` goes on from it. StateError where it goes on all the same."""
    known(folder)
    if not (folder / FLOWER_RUN).is_file():
        raise StateError("no run was begun here", where=str(folder), remedy="consilium coordinator submit")
    if (folder / board.STATUS).is_file() and (state := status(folder)["state"]) in ENDED:
        remedy = "nothing is to be done: consilium coordinator status says how it ended"
        raise StateError("no run is going on", where=str(folder), received=state, remedy=remedy)
    run, end = checkpoint.read_json(folder / FLOWER_RUN)["run"], time.monotonic() + patience
    try:
        _of_superlink(folder, "stop", run, CONNECTION)
    except StateError as error:
        if "already finished" not in str(error.received):  # it was told so a moment ago, and has yet to say it
            raise
    while (state := status(folder)["state"]) not in ENDED:
        if time.monotonic() >= end:
            remedy = "consilium coordinator status; if it stays, start the coordinator anew: it ends all runs"
            raise StateError("Flower stopped the run, and its process works on", received=state, remedy=remedy)
        time.sleep(0.2)


def status(folder: Path) -> dict[str, Any]:
    """How the run stands; "died" where it says that it is going on and nobody works on it."""
    known(folder)
    found = board.read(folder)
    if found.get("state") in ENDED or run_folder.is_held(folder):
        return found
    end = ("died", _died(folder)) if "process" in found else _before(folder, board.age(found))
    again = board.read(folder)
    if end is None or again != found:  # it came, went on, or ended meanwhile
        return again
    return again | {"state": end[0], "message": end[1]}


def _died(folder: Path) -> str:
    """What to say, and to do first where the disk is so full that the coordinator could not say it."""
    free = shutil.disk_usage(folder).free
    room = f"make room, as its disk has {free / 1e6:.1f} MB left, then " if free < LITTLE else ""
    return f"the coordinator's process ended without a word: {room}resume it"


def _before(folder: Path, age: float) -> tuple[str, str] | None:
    """How a run ended whose coordinator never said a word; None where it may yet."""
    if not (folder / FLOWER_RUN).is_file():  # `submit` is at work, or ended before Flower had the run
        return ("died", "it was not handed over to Flower: submit it again") if age > HANDING else None
    if age < USUAL:
        return None
    run = str(checkpoint.read_json(folder / FLOWER_RUN)["run"])
    try:
        (told,) = processes.flwr(folder.resolve(), "list", CONNECTION, "--run-id", run)["runs"]
    except (StateError, ValueError):
        if processes.is_guarded(folder, files.deployment(folder).address):
            return None  # it is busy: the next look asks again
        return "died", "the SuperLink does not answer: consilium coordinator start, then submit it again"
    said, _, how = str(told["status"]).partition(":")
    if said != "finished":
        return None
    if how == "stopped":
        return "stopped", board.STOPPED
    return "died", f"its process ended before it said a word (Flower: {told['status']}): see superlink.log"


def known(folder: Path) -> None:
    """ConfigError for what is no coordinator's folder at all."""
    received = "" if (folder / files.FEDERATION).is_file() else f"no {files.FEDERATION} in it"
    received = "a hospital's folder" if (folder / files.SITE).exists() else received
    if received:
        remedy = "give the folder that consilium deploy init made for the coordinator"
        raise ConfigError("this is no coordinator's folder", where=str(folder), received=received, remedy=remedy)


LITTLE = 32e6  # bytes of a disk that may well be why a process ended without a word
USUAL = 10.0  # seconds in which a coordinator's process says its first word, as a rule; after that Flower is asked
HANDING = 150.0  # seconds that `submit` may take to hand a run over to Flower, and a little more


def follow(folder: Path, show: Callable[[dict[str, Any]], None], poll: float = 1.0) -> dict[str, Any]:
    """Show the state at every look, until the run has ended."""
    while True:
        found = status(folder)
        show(found)
        if found["state"] in ENDED:
            return found
        time.sleep(poll)
