"""What cannot be used is refused before training: exit code 2, a sentence that says how to mend it, and no folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from tests import hospitals
from tests.e2e.processes import Done, Parent

RUN = """
[sites]
source = "manifest"
table = "table.csv"
images = "images"
columns = { image = "image", label = "label", site = "site", group = "patient" }

[backbone]
name = "test_vit"
weights = "random"
image_size = 16

[train]
rounds = 1

[evaluation]
bootstrap = 0
"""


def _hospitals(folder: Path, table: pd.DataFrame, files: Mapping[str, bytes] | None = None) -> Path:
    hospitals.write(folder, table, files)
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.toml and two flawless hospitals."""
    return _hospitals(tmp_path_factory.mktemp("two hospitals"), hospitals.two_sites())


def _refused(done: Done, *words: str) -> None:
    assert done.code == 2, done
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        *((f"{table}nonsense=1", ("unknown key", "nonsense", "allowed", "received: 1")) for table in (
            "", "sites.", "sites.split.", "sites.partition.", "task.", "backbone.", "tuner.", "head.", "strategy.",
            "train.", "train.schedule.", "evaluation.", "engine."
        )),
        ("train.rounds=0", ("train.rounds", "greater than or equal to 1", "received: 0")),
        ("train.rounds=many", ("train.rounds", "integer", "received: 'many'")),
        ("train=5", ("train", "received: 5")),
        ("tuner=[]", ("tuner", "at least 1")),
        ("seed=-1", ("seed", "received: -1")),
        ("tuner.name=loar", ("tuners", "full, ia3, linear, lora", "received: loar")),
        ("strategy.name=fedagv", ("strategies", "fedavg", "received: fedagv")),
        ("sites.source=manifset", ("sources", "manifest", "received: manifset")),
        ("task.name=clasification", ("tasks", "classification", "received: clasification")),
        ("strategy={name='fedper'}\nhead.share=shared", ("head.share", "contradicts", "remedy")),
        ("strategy={name='fedper'}\nhead.share=frozen", ("role", "head", "strategy.fedper", "remedy")),
        ("train.learning_rates.prompt=0.1", ("train.learning_rates", "lora_a", "received: ['prompt']")),
        ("evaluation.serve=best\ntrain.participation=0.5", ("evaluation.serve", "participation", "remedy")),
        ("evaluation.serve=best\nevaluation.select=acuracy", ("evaluation.select", "accuracy", "received: acuracy")),
        ("evaluation.serve=best\nsites.split={train=0.8, val=0.0, test=0.2}", ("evaluation.serve", "validation")),
        ("evaluation.references=['loacl']", ("evaluation.references", "'local' or 'pooled'", "received: 'loacl'")),
        ("task.classes=['a']", ("task.classes", "allowed: a", "received: b")),
        ("task.classes=['a', 'b', 'a']", ("task.classes", "twice")),
        ("sites.held_out=['esat']", ("sites.held_out", "allowed: east, west", "received: esat")),
        ("sites.held_out=['east', 'west']", ("sites.held_out", "every site")),
        ("sites.split={train=0.0, val=0.5, test=0.5}", ("training rows", "received: east, west", "remedy")),
        ("engine.device=tpu", ("engine.device", "cuda", "received: tpu")),
        ("tuner.rank=999", ("rank", "received: 999")),
        ("backbone.name=vit_nope", ("backbone.name", "received: vit_nope")),
        ("backbone.weights=nope.safetensors", ("backbone.weights", "nope.safetensors")),
        ("rounds", ("key=value", "received: rounds")),
    ],
)  # fmt: skip
def test_a_bad_setting(consilium: Parent, two: Path, setting: str, words: tuple[str, ...]) -> None:
    settings = [word for line in setting.split("\n") for word in ("--set", line)]
    _refused(consilium("run", "run.toml", "--quiet", *settings, cwd=two), *words)
    assert not (two / "runs").exists() or not any((two / "runs").iterdir())


def _broken(change: str) -> tuple[pd.DataFrame, dict[str, bytes]]:
    table = hospitals.two_sites()
    files = {f"{id}.png": hospitals.png(hospitals.pixels(number)) for number, id in enumerate(table["id"])}
    if change == "corrupt":
        files["i0005.png"] = b"no picture"
    elif change == "missing":
        del files["i0005.png"]
    elif change == "empty label":
        table.loc[5, "label"] = ""
    elif change == "twice":
        table.loc[5, "id"] = "i0004"
    elif change == "one class":
        table["label"] = "a"
    elif change in ("global", "../east"):
        table.loc[5, "site"] = change
    return table, files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("corrupt", ("1 of 40 images", "tolerate_corrupt", "received: i0005", "remedy")),
        ("missing", ("1 image files are missing", "received: i0005")),
        ("empty label", ("no value", "label", "data rows 6")),
        ("twice", ("more than once", "table.csv", "received: i0004")),
        ("one class", ("task.classes", "two or more", "'a'")),
        ("global", ("global", "remedy")),
        ("../east", ("folder", "received: ../east")),
    ],
)
@pytest.mark.parametrize("verb", ["run", "check"])
def test_bad_data(consilium: Parent, tmp_path: Path, verb: str, change: str, words: tuple[str, ...]) -> None:
    _refused(consilium(verb, "run.toml", cwd=_hospitals(tmp_path, *_broken(change))), *words)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.toml", None, ("does not exist", "absent.toml", "remedy")),
        ("broken.toml", b"[sites\n", ("not valid TOML", "broken.toml", "line 1")),
        ("latin.toml", b'name = "\xe9"\n', ("not valid TOML", "latin.toml", "utf-8")),
    ],
)
def test_a_bad_file(
    consilium: Parent, tmp_path: Path, name: str, content: bytes | None, words: tuple[str, ...]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    _refused(consilium("run", name, cwd=tmp_path), *words)
    assert not (tmp_path / "runs").exists()


def test_what_is_odd_but_usable_is_trained_with_a_warning(consilium: Parent, tmp_path: Path) -> None:
    table, files = _broken("corrupt")
    table.loc[table["site"] == "west", "label"] = "a"
    lonely = table["id"].isin(["i0000", "i0001"])
    table.loc[lonely, "site"] = "island"
    settings = ("--set", "sites.tolerate_corrupt=0.1", "--set", "name=odd hospitals")
    done = consilium("run", "run.toml", *settings, cwd=_hospitals(tmp_path, table, files))
    assert (done.code, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    for words in (
        "unreadable images were dropped (`consilium data audit`",
        "2 sites: training on one class only (a): island, west",
        "site island: one patient only",
    ):
        assert any(words in line for line in lines), done.stdout
    assert (tmp_path / "runs" / "odd hospitals" / "result.json").is_file()


def test_a_corrected_run_may_use_the_folder_that_was_refused_before(
    consilium: Parent, two: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    _refused(consilium("run", "run.toml", "--out", out, "--set", "train.learning_rates.prompt=1", cwd=two))
    assert not out.exists()
    out.mkdir(parents=True)
    _refused(consilium("run", "run.toml", "--out", out, "--set", "train.learning_rates.prompt=1", cwd=two))
    assert list(out.iterdir()) == [], "a folder that was there stays, as it was"
    assert consilium("run", "run.toml", "--out", out, "--quiet", cwd=two).code == 0
    assert (out / "result.json").is_file()
