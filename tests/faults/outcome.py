"""What a federation ends with: the same in a simulation of it, and where both are compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from consilium import checkpoint, config
from consilium import run as simulation
from consilium.deployment import files, journal
from consilium.engines import simulate
from consilium.messages import envelope_of
from consilium.protocols import Failure
from tests.faults.loopback import OWN, SITES, Loopback

Tensors = dict[str, Any]
Absent = Mapping[str, Collection[int]]  # site -> rounds without it


def simulated(made: Loopback, folder: Path, absent: Absent | None = None, late: Absent | None = None) -> Path:
    """The run folder of the same federation in one process, where sites may be absent from rounds, or reply to some
    when the next one is open, and count in that."""
    agreement = (made.at(files.COORDINATOR) / files.FEDERATION).read_text()
    table, own = (config.config_file.tomllib.loads(each) for each in (agreement.split("[deployment]")[0], OWN))
    del own["gate"]
    with _without(absent or {}, late or {}):
        return simulation.run(config.from_dict({**table, **own}), folder)


@contextmanager
def _without(absent: Absent, late: Absent) -> Iterator[None]:
    whole, federation = simulate.Transport.round, simulation.Coordinator
    held: dict[str, bytes | Failure] = {}

    def round(self: simulate.Transport, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        fields = {site: envelope_of(requests[site]) for site in requests}
        away = {
            site for site, each in fields.items() if each["kind"] == "round" and each["round"] in absent.get(site, ())
        }
        came = {site: held.pop(site) for site in requests if site in held}
        for site, reply in whole(self, {site: requests[site] for site in requests if site not in away | came.keys()}):
            if fields[site]["kind"] == "round" and fields[site]["round"] in late.get(site, ()):
                held[site] = reply
                yield site, Failure(site, "late", "under way")
            else:
                yield site, reply
        yield from came.items()
        yield from ((site, Failure(site, "lost", "absent")) for site in sorted(away))

    simulate.Transport.round = round  # type: ignore[method-assign]
    if late:
        simulation.Coordinator = partial(federation, expect=lambda _: None)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        simulate.Transport.round = whole  # type: ignore[method-assign]
        simulation.Coordinator = federation  # type: ignore[misc]


def last(run: Path) -> Tensors:
    """Tensors of the newest checkpoint."""
    return checkpoint.load(max((run / "checkpoints").glob("*.safetensors")))[0]


def assert_as_simulated(made: Loopback, folder: Path, absent: Absent | None = None, late: Absent | None = None) -> Path:
    """The run ends with every reply but those named, with whole journals, and with the bits of a simulation in which it
    is so; the simulation's folder."""
    assert made.ended()["state"] == "finished", made.told()
    for site in SITES:
        assert missed(made, site) == sorted({*(absent or {}).get(site, ()), *(late or {}).get(site, ())}), site
    here = simulated(made, folder, absent, late)
    assert_same(made, here)
    assert_journals_whole(made)
    return here


def assert_same(made: Loopback, run: Path) -> None:
    """The last checkpoint, and the model that every site serves itself, are those of the simulation, to the bit."""
    pairs = {"coordinator": (last(made.run), last(run))}
    for site in SITES:
        there = next(made.at(site).glob("state/*/served.safetensors"))
        pairs[site] = checkpoint.load(there)[0], checkpoint.load(run / "sites" / site / there.name)[0]
    for where, (found, wanted) in pairs.items():
        assert found.keys() == wanted.keys(), where
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), where


def missed(made: Loopback, site: str) -> list[int]:
    """Rounds that were closed without a site."""
    return [each["round"] for each in made.rounds() if each["sites"][site]["status"] != "ok"]


def died(made: Loopback) -> bool:
    """Whether the coordinator says, or its folder shows, that the run has ended too early."""
    return made.status()["state"] in ("died", "failed")


def resume(made: Loopback) -> None:
    """As soon as the SuperLink takes it."""
    folder = made.at(files.COORDINATOR)
    made.wait(lambda: made.call("coordinator", "resume", folder).returncode == 0, "a SuperLink that takes the run")


def written(made: Loopback, site: str, round: int) -> list[dict[str, Any]]:
    """Lines of a site's journal about the requests of a round."""
    lines = [json.loads(line) for line in (made.at(site) / journal.JOURNAL).read_text().splitlines()]
    return [line for line in lines if (line["kind"], line["round"]) == ("round", round)]


def up(run: Path) -> dict[str, int]:
    """Bytes of tensors that each site's replies brought, as the run has counted them."""
    found: dict[str, int] = checkpoint.read_json(run / "summary.json")["bytes"]["up"]["per_site"]
    return found


def assert_journals_whole(made: Loopback) -> None:
    for site in SITES:
        done = made.call("site", "audit-log", made.at(site))
        assert done.returncode == 0, done.stderr
