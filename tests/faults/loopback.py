"""Real hospitals on this machine: a SuperLink, SuperNodes, TLS, node keys, and services, each a process of its own.

Everything is started by the command line, as an engineer does it. A process may be given a hook: Python source that
runs before it and may make it slow, or make it lie.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consilium import seeds
from consilium.deployment import conduct, files, processes

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds after which a test gives up waiting, of which a machine that is busy needs many
SITES = ("alpine", "harbour", "prairie")
FEDERATION = """
name = "loopback"
seed = 4
[task]
classes = ["carcinoma", "keratosis", "melanoma", "naevus"]
[backbone]
name = "test_vit"
weights = "random"
image_size = 32
[[tuner]]
name = "lora"
rank = 2
[strategy]
name = "{strategy}"
[train]
rounds = {rounds}
batch_size = 8
quorum = 0.6
learning_rate = 1e-2
[evaluation]
bootstrap = 20
[deployment]
sites = ["alpine", "harbour", "prairie"]
address = "127.0.0.1:{port}"
deadline = {deadline}
grace = {grace}
"""
OWN = """
[sites]
source = "phantom"
num_images = 64
num_sites = 3
[engine]
device = "cpu"
[gate]
min_patients = 1
min_images = 1
"""
SLOW = """
import pathlib, time
from consilium.engines.site import Site
from consilium.messages import envelope_of
handle = Site.handle
def slowly(self, data):
    mark = pathlib.Path({mark!r})
    while mark.exists() and mark.read_text() in ("", str(envelope_of(data)["round"])):
        time.sleep(0.1)
    return handle(self, data)
Site.handle = slowly
"""


@dataclass
class Loopback:
    """One federation on one machine."""

    folder: Path
    port: int
    deadline: float = 120.0
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)  # name -> words before its command (spaces.py)

    def at(self, name: str) -> Path:
        return self.folder / name

    @property
    def run(self) -> Path:
        return self.at(files.COORDINATOR) / conduct.RUN

    # -------------------------------------------------------------------------------------------- processes
    def words(self, *words: object, hook: str = "") -> list[str]:
        source = f"import sys\n{hook}\nfrom consilium.cli import main\nmain(sys.argv[1:])"
        return [sys.executable, "-c", source, *map(str, words)]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **cache, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def call(self, *words: object, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """One verb to its end."""
        return subprocess.run(
            self.words(*words), capture_output=True, text=True, timeout=timeout, env=self.environment(), check=False
        )

    def start(self, name: str, *words: object, hook: str = "") -> None:
        """A service, in a group of its own, that stays; its output goes to a file."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                [*self.before.get(name, []), *self.words(*words, hook=hook)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
                preexec_fn=processes._end_with_parent,  # nothing is left of a test that is killed
            )

    def kill(self, name: str, sign: signal.Signals = signal.SIGKILL) -> None:
        """End a service by a signal, as a crash or an operator does."""
        process = self.running.pop(name)
        process.send_signal(sign)
        process.wait(PATIENCE)

    def process(self, name: str) -> int:
        """Of Flower's program that a service started last."""
        lines = [line for line in self.output(name).splitlines() if line.startswith("started program=")]
        return int(lines[-1].rpartition("process=")[2].split()[0])

    def parts(self, name: str) -> dict[str, int]:
        """Programs of Flower that this one started, and those that these started: name -> process."""
        return _parts(self.process(name))

    def output(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text(errors="replace") if path.is_file() else ""

    # -------------------------------------------------------------------------------------------- parts
    def link(self, hook: str = "") -> None:
        before = self.output("link").count("ready address=")
        self.start("link", "coordinator", "start", self.at(files.COORDINATOR), hook=hook)
        self.wait(lambda: self.output("link").count("ready address=") > before, "the SuperLink")

    def join(self, site: str, hook: str = "") -> None:
        before = self.output(site).count("ready site=")
        self.start(site, "site", "join", self.at(site), hook=hook)
        self.wait(lambda: self.output(site).count("ready site=") > before, site)

    def join_all(self, hooks: Mapping[str, str] | None = None) -> None:
        """All sites at once."""
        for site in SITES:
            self.start(site, "site", "join", self.at(site), hook=(hooks or {}).get(site, ""))
        for site in SITES:
            self.wait(lambda site=site: "ready site=" in self.output(site), site)  # type: ignore[misc]

    def begin(self, hooks: Mapping[str, str] | None = None) -> None:
        """The SuperLink, all sites, and a run."""
        self.link()
        self.join_all(hooks)
        self.submit()

    def at_work(self, round: int = 2) -> Path:
        """Begun, and prairie's service has its request of this round; it answers when the file is gone."""
        self.link()
        for site in SITES[:2]:
            self.join(site)
        mark = self.slowly(SITES[2], round)
        self.submit()
        self.until_asked(SITES[2], round)
        return mark

    def slowly(self, site: str, round: int | None = None) -> Path:
        """Join with a service that waits before it answers, in all rounds or in one, as long as the file is there."""
        mark = self.folder / f"{site}.slow"
        mark.write_text(str(round or ""))
        self.join(site, SLOW.format(mark=str(mark)))
        return mark

    def submit(self, verb: str = "submit") -> None:
        done = self.call("coordinator", verb, self.at(files.COORDINATOR))
        assert done.returncode == 0, done.stderr

    # -------------------------------------------------------------------------------------------- looking
    def status(self) -> dict[str, Any]:
        done = self.call("coordinator", "status", self.at(files.COORDINATOR), "--json")
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"state": "none", "sites": {}}
        return {**found, "code": done.returncode}

    def quick(self) -> dict[str, Any]:
        """The same from the file alone, many times a second."""
        try:
            found: dict[str, Any] = json.loads((self.at(files.COORDINATOR) / "status.json").read_text())
        except (OSError, ValueError):
            return {"state": "none", "sites": {}}
        return found

    def wait(self, until: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not until():
            if time.monotonic() > end:
                raise AssertionError(f"waited {PATIENCE:g} s for {what}\n{self.told()}")
            time.sleep(0.1)

    def asked(self, site: str) -> list[int]:
        """Rounds that a site's service was asked for, again where its reply was lost."""
        return [int(number) for number in re.findall(r"asked kind=round round=(\d+)", self.output(site))]

    def until_asked(self, site: str, round: int) -> None:
        self.wait(lambda: round in self.asked(site), f"{site}'s work in round {round}")

    def over(self) -> bool:
        return self.quick()["state"] in ("finished", "failed")

    def closed(self) -> int:
        """Rounds, by now."""
        return int(self.quick().get("closed", 0))

    def until_closed(self, round: int) -> None:
        """Or until the run is over."""
        self.wait(lambda: self.closed() >= round or self.over(), f"the end of round {round}")

    def ended(self) -> dict[str, Any]:
        """The state of the run when it is over; patience is for a round, and for what comes after the last."""
        while not self.over():
            self.until_closed(self.closed() + 1)
        return self.quick()

    def rounds(self) -> list[dict[str, Any]]:
        """Lines of events.jsonl."""
        path = self.run / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def log(self) -> list[dict[str, Any]]:
        """Lines of the coordinator's log."""
        path = self.at(files.COORDINATOR) / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def told(self) -> str:
        """All outputs, for a test that fails."""
        parts = [f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.out")]
        return "\n".join([json.dumps(self.quick(), indent=1), *parts])


def _parts(of: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # gone meanwhile
            continue
        if parent == of:
            name = next((Path(word).name for word in words if Path(word).name.startswith(("flwr-", "flower-"))), "")
            found |= {name: int(entry.name)} | _parts(int(entry.name))
    return found


def busy() -> float:
    """Processes that want to run, for each core: at least one, at most so many that waiting longer is no help."""
    return min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 4.0)


def steady_port() -> int:
    """A port that nobody uses, nor is given for a connection of his own while who listens on it is away."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # below those that systems hand out
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


@contextmanager
def loopback(
    folder: Path,
    *,
    strategy: str = "fedavg",
    rounds: int = 3,
    deadline: float = 120,
    grace: float = 5,
    change: Mapping[str, str] | None = None,
) -> Iterator[Loopback]:
    """New folders; `change`: text of the agreement -> other text; `deadline`: seconds on a machine with nothing else to
    do, `Loopback.deadline` on this one. All processes end with the test."""
    folder.mkdir(exist_ok=True)
    port, deadline = steady_port(), math.ceil(deadline * busy())
    settings = {"strategy": strategy, "rounds": rounds, "deadline": deadline, "grace": grace}
    text = FEDERATION.format(port=port, **settings)
    for old, new in (change or {}).items():
        text = text.replace(old, new)
    (folder / "federation.toml").write_text(text)
    (folder / "own.toml").write_text(OWN)
    made = Loopback(folder / "made", port, deadline)
    done = made.call(
        "deploy", "init", folder / "federation.toml", "--out", made.folder, "--site-file", folder / "own.toml"
    )
    assert done.returncode == 0, done.stderr
    for site in SITES:  # personal tensors start as in a simulation, to compare with one
        (made.at(site) / files.SECRET).write_text(
            json.dumps({"seed": seeds.derive(4, site=site, purpose="personal start")})
        )
    try:
        yield made
    finally:
        for name in list(made.running):
            made.kill(name, signal.SIGTERM)
