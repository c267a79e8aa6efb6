"""A package of somebody else brings a tuner, a strategy, a task and a source by entry points alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
from consilium import registry
from consilium.registry import Options, register


class Rank(Options):
    rank: int = 2


class Nothing(Options):
    pass


class Size(Options):
    images: int = 60


@register("tuners", "guest_lora", options=Rank, summary="LoRA with the guest's rank", source="guest et al.")
def tuner(options: Rank) -> object:
    return registry.build("tuners", "lora", {"rank": options.rank})


@register("strategies", "guest_average", options=Nothing, summary="FedAvg under another name")
def strategy(options: Nothing) -> object:
    return registry.build("strategies", "fedavg", {})


@register("tasks", "guest_classes", options=Nothing, summary="classification under another name")
def task(options: Nothing) -> object:
    return registry.build("tasks", "classification", {})


@register("sources", "guest_phantom", options=Size, summary="a smaller phantom", facts={"network": "no"})
def source(options: Size) -> object:
    return registry.build("sources", "phantom", {"num_images": options.images, "num_sites": 2})
"""
NAMES = {"tuners": "guest_lora", "strategies": "guest_average", "tasks": "guest_classes", "sources": "guest_phantom"}


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an installer leaves it: one module and its metadata."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "guest.py").write_text(MODULE)
    info = folder / "guest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[consilium.{kind}]\nguest = guest\n\n" for kind in NAMES))
    return folder


def _consilium(guest: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(guest)} if guest else {}
    command = [sys.executable, "-m", "consilium", *words]
    return subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True)


def test_the_guests_members_are_listed_with_source_facts_and_options(guest: Path) -> None:
    done = _consilium(guest, "list", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    found = {kind: {member["name"]: member for member in listed[kind]} for kind in NAMES}
    assert all(name in found[kind] for kind, name in NAMES.items())
    assert found["tuners"]["guest_lora"]["options"] == {"rank": 2}
    assert found["tuners"]["guest_lora"]["source"] == "guest et al."
    assert found["sources"]["guest_phantom"]["facts"] == {"network": "no"}
    assert found["strategies"]["guest_average"]["module"] == "guest"


def test_without_the_package_the_name_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[strategy]\nname = "guest_average"\n')
    done = _consilium(None, "check", str(file))
    assert done.returncode == 2
    assert "guest_average" in done.stderr
    assert "fedavg" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_of_guests_alone_trains_what_they_built(guest: Path, tmp_path: Path) -> None:
    file = tmp_path / "guests.toml"
    file.write_text(
        f'''
        [sites]
        source = "{NAMES["sources"]}"
        images = 48
        [task]
        name = "{NAMES["tasks"]}"
        [backbone]
        weights = "embedded"
        [[tuner]]
        name = "{NAMES["tuners"]}"
        rank = 1
        [strategy]
        name = "{NAMES["strategies"]}"
        [train]
        rounds = 1
        local_steps = 1
        [evaluation]
        bootstrap = 20
        '''
    )
    done = _consilium(guest, "run", str(file), "--out", str(tmp_path / "run"), "--quiet")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert sum(site[split]["n"] for site in result["sites"].values() for split in site) == 48
    assert {row["shape"][0] for row in result["wire"]["up"] if row["role"] == "lora_a"} == {1}


def test_a_plugin_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.py").write_text("import a_package_that_is_absent\n")
    info = tmp_path / "torn-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torn\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[consilium.tuners]\ntorn = torn\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-m", "consilium", "list", "tuners"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torn" in done.stderr
    assert "a_package_that_is_absent" in done.stderr
    assert "Traceback" not in done.stderr
