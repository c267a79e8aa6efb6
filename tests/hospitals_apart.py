"""A deployment in one process: folders as `consilium deploy init` makes them, services that answer, Flower's double."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from consilium import seeds
from consilium.deployment import conduct, files, hospital, init
from consilium.deployment.board import Board
from consilium.engines import flower
from consilium.engines.resident import Resident
from tests.flower_double import LocalGrid, Node

SITES = ("alpine", "harbour", "prairie")
FEDERATION = """
name = "apart"
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
name = "fedavg"
[train]
rounds = 3
batch_size = 8
quorum = 0.6
learning_rate = 1e-2
[evaluation]
bootstrap = 20
[deployment]
sites = ["alpine", "harbour", "prairie"]
deadline = 60
grace = 5
"""
SITE = """
[sites]
source = "phantom"
num_images = 64
[engine]
device = "cpu"
"""


@dataclass
class Apart:
    """Folders of one deployment, and what its services were asked. `seen`: (site, request, reply)."""

    folder: Path
    seen: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    told: list[Mapping[str, Any]] = field(default_factory=list)
    residents: dict[str, Resident] = field(default_factory=dict)

    def at(self, name: str) -> Path:
        return self.folder / name

    @property
    def run(self) -> Path:
        return self.at(files.COORDINATOR) / conduct.RUN

    def resident(self, site: str) -> Resident:
        """The service of a site, started when it is first asked."""
        if site not in self.residents:
            own = files.read_site(self.at(site))
            self.residents[site] = Resident(hospital.open_site(own, lambda _: None), self.told.append)
        return self.residents[site]

    def slow_at_first(self, takes: int = 67) -> LocalGrid:
        """Nodes of which prairie takes that many looks for its first reply: 67 is two seconds after its round."""
        grid = self.grid(prairie={"takes": takes})
        prairie = next(node for node in grid.nodes.values() if node.takes)
        handle = prairie.handler

        def at_once(content: RecordDict) -> RecordDict:
            prairie.takes = 0
            return handle(content)

        prairie.handler = at_once
        return grid

    def grid(self, **nodes: Mapping[str, Any]) -> LocalGrid:
        """A node per site; options of `Node` by site."""
        keys = files.public_keys(self.at(files.COORDINATOR), files.deployment(self.at(files.COORDINATOR)))
        return LocalGrid({key: Node(self._handler(site), **nodes.get(site, {})) for site, key in keys.items()})

    def conduct(self, grid: LocalGrid | None = None) -> Path:
        """The run of the coordinator's folder, to its end or to an error."""
        grid = grid or self.grid()
        folder, now = self.at(files.COORDINATOR), [0.0]

        def sleep(seconds: float) -> None:
            now[0] += max(seconds, 0.01)

        board, agreement = Board(folder), files.read(folder)
        keys = {site: flower.fingerprint(key) for site, key in files.public_keys(folder, agreement.deployment).items()}
        settings = agreement.deployment
        clock: Callable[[], float] = lambda: now[0]  # noqa: E731
        wire = flower.Transport(grid, keys, settings.deadline, settings.grace, board.show, 1.0, clock, sleep)
        with board.reporting():
            conduct.federate(agreement, wire, self.run, board)
        return self.run

    def _handler(self, site: str) -> Callable[[RecordDict], RecordDict]:
        def handle(content: RecordDict) -> RecordDict:
            request = flower.unpack(content)
            reply = self.resident(site).answer(request)
            self.seen.append((site, request, reply))
            return flower.pack(reply)

        return handle


def made(folder: Path, federation: str = FEDERATION, site: str = SITE) -> Apart:
    """New folders; personal tensors start as they do in a simulation, so that both can be compared."""
    (folder / "federation.toml").write_text(federation)
    (folder / "own.toml").write_text(site)
    init.init(folder / "federation.toml", folder / "made", folder / "own.toml")
    apart = Apart(folder / "made")
    for name in files.read_text(folder / "federation.toml").deployment.sites:
        secret = seeds.derive(4, site=name, purpose="personal start")
        (apart.at(name) / files.SECRET).write_text(f'{{"seed": {secret}}}')
    return apart
