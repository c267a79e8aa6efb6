"""Several sites at once: threads, processes and one worker give the same bits, and who may share a process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium import registry
from consilium.coordinator import Coordinator
from consilium.engines import pools
from consilium.engines.simulate import Federation, Simulation, secrets_of
from consilium.errors import ConfigError
from consilium.messages import Request, encode
from consilium.protocols import Failure
from consilium.registry import Options
from consilium.tensors import Tensors
from tests import federation

SITES = federation.hospitals(10, 7, 12, 9, 8)
DROPPED = [{"name": "lora", "rank": 2, "dropout": 0.1}]


def _trained(folder: Path, workers: int, pool: str) -> Tensors:
    settings = federation.configure(engine={"workers": workers, "pool": pool}, train={"rounds": 2, "moments": "keep"})
    here = Federation(settings, federation.CLASSES, SITES, folder, secrets_of(3, SITES))
    with Simulation({"run": here}, workers) as simulation:
        assert (simulation.pool is None) == (workers == 1)
        pieces = federation.assemble(settings)
        transport, explain = simulation.transport("run"), simulation.explain("run")
        return Coordinator(pieces, transport, folder, lambda _: None, explain).run().server.shared


def test_threads_processes_and_one_worker_give_the_same_bits(tmp_path: Path) -> None:
    ways = {"one": (1, "auto"), "threads": (3, "threads"), "processes": (2, "processes")}
    found = {name: federation.bits(_trained(tmp_path / name, *way)) for name, way in ways.items()}
    assert found["one"] == found["threads"] == found["processes"]
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name / "sites" / "b").glob("s*.safetensors")}
        for name in ways
    }
    assert files["one"] == files["threads"] == files["processes"]


def test_threads_leave_the_callers_draws_and_threads_as_they_were(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    _trained(tmp_path, 2, "threads")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("tables", "kind"),
    [
        ({}, "threads"),
        ({"engine": {"pool": "processes"}}, "processes"),
        ({"engine": {"compile": True}}, "processes"),
        ({"tuner": DROPPED}, "processes"),
        ({"tuner": [{"name": "lora", "dropout": 0.0}], "strategy": {"name": "fedper"}}, "threads"),
    ],
)
def test_who_may_share_a_process(tables: Mapping[str, Any], kind: str) -> None:
    settings = federation.configure(**tables)
    assert pools.kind_of([settings]) == kind
    assert pools.kind_of([federation.configure(), settings]) == kind


def test_a_member_of_another_package_gets_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.get("tasks", "classification")
    monkeypatch.setattr(registry, "_members", dict(registry._members))
    registry.register("tasks", "foreign", options=Options, summary="")(lambda options: options)
    settings = federation.configure(task={"name": "foreign"}, engine={"pool": "threads"})
    with pytest.raises(ConfigError, match=r"another package(.|\n)*random generator"):
        pools.check(settings)


def test_threads_with_dropout_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot share a process(.|\n)*engine.pool(.|\n)*dropout"):
        federation.assemble(federation.configure(tuner=DROPPED, engine={"pool": "threads"}))


def test_of_many_sites_some_are_asked_ahead(tmp_path: Path) -> None:
    sites = {f"s{number:03d}": federation.hospital(f"s{number:03d}", 4) for number in range(60)}
    here = Federation(federation.configure(), federation.CLASSES, sites, tmp_path, secrets_of(3, sites))
    order: list[tuple[str, str]] = []
    with Simulation({"run": here}, 2, lambda way, site, _: order.append((way, site))) as simulation:
        answers = [site for site, _ in simulation.transport("run").round(dict.fromkeys(sites, b""))]
    assert answers == sorted(sites)
    assert [site for way, site in order if way == "down"] == sorted(sites)
    steps = [1 if way == "down" else -1 for way, _ in order]
    ahead = [sum(steps[:at]) for at in range(len(steps))]
    assert max(ahead) == 8


def test_of_many_groups_some_are_asked_ahead(tmp_path: Path) -> None:
    sites = {f"s{number:03d}": federation.hospital(f"s{number:03d}", 4) for number in range(60)}
    settings = federation.configure(engine={"stacked_sites": 3})
    here = Federation(settings, federation.CLASSES, sites, tmp_path, secrets_of(3, sites))
    handshake = federation.assemble(settings).handshake
    asked = {site: encode(Request("round", site, 1, 0, handshake), {}) for site in sites}
    order: list[tuple[str, str]] = []
    with Simulation({"run": here}, 2, lambda way, site, _: order.append((way, site))) as simulation:
        answers = [site for site, _ in simulation.transport("run").round(asked)]
    assert answers == sorted(sites)
    steps = [1 if way == "down" else -1 for way, _ in order]
    assert max(sum(steps[:at]) for at in range(len(steps))) == 3 * 8


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_a_stopped_pool_answers_nobody(pool: str, tmp_path: Path) -> None:
    """Nor does it say that a site was lost: with a small quorum its round would be closed without it."""
    settings = federation.configure(engine={"pool": pool})
    here = Federation(settings, federation.CLASSES, SITES, tmp_path, secrets_of(3, SITES))
    with Simulation({"run": here}, 2) as simulation:
        simulation.stop()
        with pytest.raises(pools.Stopped):
            dict[str, bytes | Failure](simulation.transport("run").round(dict.fromkeys(SITES, b"")))
