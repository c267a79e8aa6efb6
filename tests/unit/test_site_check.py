"""What a hospital is told before anybody waits for it: each line says what, and where it is not good, the remedy."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("flwr")

from consilium.deployment import approvals, files, machine, processes, reach, site_check
from consilium.deployment.reach import Finding
from consilium.engines import relay
from consilium.errors import ConfigError
from consilium.experiment import pick_device
from tests.commands import call
from tests.hospitals_apart import made

CLASSES = ("carcinoma", "keratosis", "melanoma", "naevus")
OWN = """
[sites]
source = "manifest"
table = "{data}/table.csv"
images = "{data}"
columns = {{ image = "image", label = "label", group = "group" }}
split = {{ column = "split" }}
[engine]
device = "cpu"
cache = "{data}/cache"
[gate]
min_patients = 1
"""
Row = list[str]
Change = Callable[[Path, list[Row]], object]


def hospital(folder: Path, change: Change = lambda *_: None) -> Path:
    """A hospital with 24 images of 12 patients, and a fault."""
    data = folder / "data"
    data.mkdir(parents=True)
    made(folder, site=OWN.format(data=data))
    draw, rows = np.random.default_rng(0), list[Row]()
    for at in range(24):
        name = f"i{at:02}.png"
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(data / name)
        rows.append([name, CLASSES[at % 4], f"p{at // 2}", ("train", "val", "test", "train")[at // 6]])
    change(data, rows)
    with (data / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "group", "split"], *rows])
    return folder / "made" / "alpine"


@pytest.fixture(autouse=True)
def _nobody_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "connection", lambda *_: [Finding("connection", "good", "by hand")])


def told(folder: Path, **more: str) -> dict[str, Finding]:
    """By what was looked at; of several the last one. Whatever is not good says what to do."""
    found = site_check.check(folder, lambda _: None, **more)
    assert all(bool(each.remedy) == (each.verdict != "good") for each in found), found
    return {each.what: each for each in found}


def test_a_hospital_that_is_ready(tmp_path: Path) -> None:
    found = told(hospital(tmp_path))
    assert {each.what for each in found.values() if each.verdict != "good"} == {"users"}  # one user, to try out
    assert [*found] == [
        *("users", "permissions", "flower", "train images", "val images", "test images", "leakage", "split"),
        *("agreement", "backbone", "version", "gate", "disk", "memory", "device", "journal", "connection"),
    ]
    assert "12 of 6 groups: carcinoma 3, keratosis 3, melanoma 3, naevus 3" in found["train images"].text


def one_class(_: Path, rows: list[Row]) -> None:
    for row in rows:
        row[1] = "naevus"


def in_two_splits(_: Path, rows: list[Row]) -> None:
    rows[0][3] = "test"


def no_tests(_: Path, rows: list[Row]) -> None:
    for row in rows:
        row[3] = "train" if row[3] == "test" else row[3]


@pytest.mark.parametrize(
    ("change", "what", "verdict", "text"),
    [
        (lambda _, rows: rows.clear(), "data", "bad", "the table has no rows"),
        (lambda _, rows: rows.append(["away.png", "naevus", "p99", "train"]), "data", "bad", "away.png"),
        (lambda data, _: (data / "i03.png").write_bytes(b"no image"), "data", "bad", "1 of 24 images are unreadable"),
        (lambda _, rows: rows[3].__setitem__(1, "mole"), "data", "bad", "mole"),
        (in_two_splits, "data", "bad", "more than one split"),
        (one_class, "data", "doubtful", "training on one class only"),
        (no_tests, "test images", "doubtful", "0 of 0 groups"),
        (lambda data, _: shutil.copy(data / "i00.png", data / "i12.png"), "leakage", "doubtful", "i00.png = i12.png"),
    ],
)
def test_data_that_is_not_ready(change: Change, what: str, verdict: str, text: str, tmp_path: Path) -> None:
    found = told(hospital(tmp_path, change))
    assert (found[what].verdict, text in found[what].text) == (verdict, True), found[what]
    assert {
        "agreement",
        "disk",
        "memory",
        "journal",
        "connection",
    } <= found.keys()  # the rest is looked at too


def test_a_hospital_speaks_of_its_own_images(tmp_path: Path) -> None:
    said = [each.text for each in site_check.check(hospital(tmp_path, one_class), lambda _: None)]
    assert "this site has no training images of the classes carcinoma, keratosis, melanoma" in said


def test_digests_are_compared_where_one_is_told(tmp_path: Path) -> None:
    folder = hospital(tmp_path)
    ours = told(folder)["agreement"].text.split()[0]
    assert told(folder, digest=ours)["agreement"].verdict == "good"
    assert told(folder, digest=ours[:12])["agreement"].verdict == "good"
    wrong = told(folder, digest="0" * 64)["agreement"]
    assert (wrong.verdict, "0" * 64 in wrong.text) == ("bad", True)


@pytest.mark.parametrize("wrong", ["away", "noise"])
def test_weights_that_are_none(wrong: str, tmp_path: Path) -> None:
    folder = hospital(tmp_path)
    (tmp_path / "noise").write_bytes(b"no weights")
    text = (folder / files.SITE).read_text()
    (folder / files.SITE).write_text(f'{text}\n[backbone]\nweights = "{tmp_path / wrong}"\n')
    found = told(folder)
    assert found["model"].verdict == "bad"
    assert str(tmp_path / wrong) in found["model"].text


def test_rules_and_words_that_keep_it_out(tmp_path: Path) -> None:
    folder = hospital(tmp_path)
    ours = told(folder)["agreement"].text.split()[0]
    approvals.approve(folder, ours, "Dr Rivera")
    approvals.withdraw(folder, "Dr Rivera")
    assert (told(folder)["gate"].verdict, "taken back" in told(folder)["gate"].text) == ("bad", True)
    (folder / "journal.jsonl").write_text("{}\n")
    assert told(folder)["journal"].verdict == "bad"


def test_a_hospital_that_keeps_as_many_runs_as_it_may(tmp_path: Path) -> None:
    folder = hospital(tmp_path)
    with (folder / files.SITE).open("a") as file:
        file.write("max_runs = 1\n")
    assert "runs" not in told(folder)
    (folder / files.STATE / ("a" * 16)).mkdir(parents=True)
    found = told(folder)
    assert (found["runs"].verdict, "a" * 16 in found["runs"].text) == ("doubtful", True)
    assert found["gate"].verdict == "good", "the run that it knows goes on"


def test_metrics_that_nobody_measures_are_named(tmp_path: Path) -> None:
    folder = hospital(tmp_path)
    text = (folder / files.SITE).read_text()
    (folder / files.SITE).write_text(f'{text}metrics = ["accuracy", "sensitivity.*", "loss"]\n')
    assert "gate.metrics" not in told(folder)
    (folder / files.SITE).write_text(f'{text}metrics = ["acuracy", "loss", "c_index"]\n')
    found = told(folder)["gate.metrics"]
    assert (found.verdict, found.text.rpartition(": ")[2]) == ("doubtful", "acuracy, c_index")


def test_the_verb_prints_remedies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hospital(tmp_path, one_class)
    assert call("site", "check", folder) == 0
    assert "-> to try out only" in capsys.readouterr().out
    code = call("site", "check", folder, "--digest", "0000", "--json")
    table = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert code == (1 if table["agreement"]["verdict"] == "bad" else 0)


# ------------------------------------------------------------------------------------------------ who could read what
def test_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "keys" / processes.NODE_KEY
    key.parent.mkdir()
    key.write_text("key")
    assert "one user" in machine.users(tmp_path).text
    key.unlink()
    assert machine.users(tmp_path).verdict == "good"
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    other = machine.users(tmp_path)
    assert (other.verdict, "runuser -u" in other.remedy) == ("doubtful", True)


def test_permissions(tmp_path: Path) -> None:
    (tmp_path / files.SECRET).write_text("{}")
    (tmp_path / files.SECRET).chmod(0o644)
    tmp_path.chmod(0o700)
    assert machine.permissions(tmp_path).verdict == "good"  # nobody comes so far
    tmp_path.chmod(0o750)
    found = machine.permissions(tmp_path)
    assert (found.verdict, files.SECRET in found.text, found.remedy) == ("doubtful", True, f"chmod 700 {tmp_path}")
    (tmp_path / files.SECRET).chmod(0o600)
    assert files.SECRET not in machine.permissions(tmp_path).text


# ------------------------------------------------------------------------------------------------ room and device
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "verdict"), [(0, "bad"), (10**6, "bad"), (10**8, "doubtful"), (10**11, "good")])
def test_disk(free: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    assert machine._disk("disk", tmp_path, 10**6).verdict == verdict


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", full)
    found = machine._disk("disk", tmp_path, 0)
    assert (found.verdict, "Read-only file system" in found.text) == ("bad", True)


def test_memory_is_what_the_machine_or_its_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._allowed(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert machine._allowed(tmp_path) is None
    (tmp_path / "memory.max").write_text("105\n")
    assert machine._allowed(tmp_path) == 100
    monkeypatch.setattr(machine, "_available", lambda: 10**11)
    monkeypatch.setattr(machine, "_allowed", lambda: None)
    assert machine.memory().verdict == "good"
    monkeypatch.setattr(machine, "_allowed", lambda: 100)
    assert machine.memory().verdict == "doubtful"
    monkeypatch.setattr(machine, "_available", lambda: None)
    monkeypatch.setattr(machine, "_allowed", lambda: None)
    assert "does not say" in machine.memory().text


def test_a_secret_that_is_damaged_and_one_that_is_not_drawn_yet(tmp_path: Path) -> None:
    folder = hospital(tmp_path)
    (folder / files.SECRET).unlink()
    assert "secret" not in told(folder)
    assert not (folder / files.SECRET).exists()
    (folder / files.SECRET).write_text("{}")
    assert told(folder)["secret"].verdict == "bad"


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hospital(tmp_path)
    text = (folder / files.SITE).read_text()
    (folder / files.SITE).write_text(text.replace('device = "cpu"', 'device = "cuda"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU was found" in told(folder)["model"].text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1", "float32") == "cuda:1"
    with pytest.raises(ConfigError, match="no GPU of this number"):
        pick_device("cuda:2", "float32")


def test_flower_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", missing)
    assert machine.flower().verdict == "bad"


def test_the_name_of_a_socket_that_a_system_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.socket(Path("/short")) == []
    monkeypatch.setattr(relay, "_FOLDERS", tmp_path / "none")
    (found,) = machine.socket(tmp_path / ("x" * 100))
    assert found.verdict == "bad"
