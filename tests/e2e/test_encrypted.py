"""Runs whose sites' files are encrypted: the same bits, nothing personal in clear, and no way on without the key."""

from __future__ import annotations

import base64
import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from consilium import checkpoint, cli, config, run
from consilium.check import check
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError, StateError, TrainingError
from consilium.export import export
from consilium.predict import load_trained
from consilium.sealing import is_sealed, key_id, sealed
from consilium.tensors import Tensors, digest_all, equal
from tests import federation
from tests.e2e import runs

KEY, OTHER = bytes(range(32)), bytes(range(7, 39))
NAMED = {"state_key_variable": "SITE_KEY"}
STOP = 2


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_KEY", KEY.hex())


def _config(**engine: Any) -> config.Config:
    table = tomllib.loads(runs.CONFIG)
    more = {"strategy": {"name": "ditto"}, "head": {"share": "personal"}, "engine": engine}
    table["train"] |= {"moments": "keep"}
    table["evaluation"] |= {"references": ["local"]}
    return config.from_dict({**table, **more})


class _Stop(Exception):
    pass


def _run(out: Path, stop: bool = False, resume: bool = False, **engine: Any) -> Path:
    def display(event: Mapping[str, Any]) -> None:
        if stop and event["event"] == "round" and event["round"] == STOP:
            raise _Stop

    return run.run(_config(**engine), out, resume=resume, display=display)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run as it is, then, as its neighbour, one with a key."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITE_KEY", KEY.hex())
        return _run(folder / "plain"), _run(folder / "sealed", **NAMED)


def _agreement(out: Path) -> str:
    return str(checkpoint.read_json(out / "config.json")["agreement_hash"])


def _sites(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "sites").iterdir())


def _kept(out: Path, key: bytes | None) -> dict[str, Tensors]:
    """All that sites keep, by file: states of any round, moments among them, and the models they use."""
    found: dict[str, Tensors] = {}
    for name, where in (("run", out), ("local", out / "references" / "local")):
        agreement = _agreement(where)
        for site in _sites(where):
            states = StateFolder(where / "sites" / site, agreement, key, site)
            for number in states.rounds():
                state = states.load(number)
                found |= {f"{name}/{site}/{number}": {**state.personal.tensors}}
                found |= {f"{name}/{site}/{number}/moments": state.moments}
            seal = sealed("model", key, agreement, site)
            for path in (where / "sites" / site / "served.safetensors", where / "adapters" / f"{site}.safetensors"):
                found |= {f"{name}/{path.parent.name}/{site}": checkpoint.load(path, seal)[0]}
    return found


def test_nothing_personal_lies_in_any_file_of_the_run_folder_in_clear(done: tuple[Path, Path]) -> None:
    plain, encrypted = done
    personal = _kept(encrypted, KEY)
    assert len(personal) > 4 * len(_sites(encrypted))
    for out, hidden in ((encrypted, True), (plain, False)):
        everything = b"".join(runs.contents(out).values())
        for name, tensors in personal.items():
            own = {n: value for n, value in tensors.items() if n.startswith(("own/", "head.")) or "moments" in name}
            marks = federation.traces(own)
            assert marks or not own, name
            assert all((mark in everything) != hidden for mark in marks), name


def test_the_key_lies_in_no_file_and_is_in_no_event(done: tuple[Path, Path], tmp_path: Path) -> None:
    forms = [KEY, KEY.hex().encode(), KEY.hex().upper().encode(), base64.b64encode(KEY)]
    events: list[Any] = []
    run.run(_config(**NAMED), tmp_path / "told", display=events.append)
    everything = b"".join(runs.contents(done[1]).values()) + json.dumps(events, default=str).encode()
    assert not [form for form in forms if form in everything]


def test_files_are_encrypted_and_the_rest_is_bit_by_bit_what_it_is_without(done: tuple[Path, Path]) -> None:
    """Numbers, predictions, the coordinator's checkpoints; and, opened, all that sites keep."""
    plain, encrypted = done
    personal, ours = _kept(plain, None), _kept(encrypted, KEY)
    assert {n: digest_all(t) for n, t in ours.items()} == {n: digest_all(t) for n, t in personal.items()}
    for path in sorted(encrypted.rglob("*.safetensors")):
        at_site = path.parent.parent.name == "sites" or (path.parent.name == "adapters" and path.stem != "global")
        assert is_sealed(path.read_bytes()) == at_site, path
    for name in ("predictions.parquet", "split.parquet", "checkpoints/round-00003.safetensors"):
        if name.startswith("checkpoints"):
            assert equal(checkpoint.load(plain / name)[0], checkpoint.load(encrypted / name)[0])
        else:
            assert (plain / name).read_bytes() == (encrypted / name).read_bytes()
    first, second = (checkpoint.read_json(out / "result.json") for out in done)
    assert first["metrics"] == second["metrics"]
    assert first["bytes"]["up"] == second["bytes"]["up"]
    assert first["config_hash"] == second["config_hash"]


@pytest.mark.parametrize("engine", [{}, {"workers": 2}], ids=["one worker", "two processes"])
def test_a_stopped_run_goes_on_with_its_key_to_the_same_bits(
    tmp_path: Path, done: tuple[Path, Path], engine: dict[str, Any]
) -> None:
    file = tmp_path / "site.key"
    file.write_text(KEY.hex())
    file.chmod(0o600)
    with pytest.raises(_Stop):
        _run(tmp_path / "run", stop=True, **NAMED)
    again = _run(tmp_path / "run", resume=True, state_key_file=str(file), **engine)  # the same key from elsewhere
    assert {n: digest_all(t) for n, t in _kept(again, KEY).items()} == {
        n: digest_all(t) for n, t in _kept(done[1], KEY).items()
    }
    assert (again / "predictions.parquet").read_bytes() == (done[1] / "predictions.parquet").read_bytes()


@pytest.mark.parametrize(
    ("began", "goes_on", "key", "says"),
    [
        (NAMED, {}, KEY, "encrypted, and no key is given"),
        (NAMED, NAMED, OTHER, f"(?s)another key.*{key_id(KEY)}.*{key_id(OTHER)}"),
        ({}, NAMED, KEY, "not encrypted, though a key is given"),
    ],
    ids=["no key", "another key", "a key too late"],
)
def test_without_its_key_a_run_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: Any, goes_on: Any, key: bytes, says: str
) -> None:
    with pytest.raises(_Stop):
        _run(tmp_path / "run", stop=True, **began)
    before = runs.contents(tmp_path / "run")
    monkeypatch.setenv("SITE_KEY", key.hex())
    with pytest.raises(StateError, match=says):
        _run(tmp_path / "run", resume=True, **goes_on)
    assert runs.contents(tmp_path / "run") == before


def test_a_missing_key_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SITE_KEY")
    for act in (lambda: _run(tmp_path / "run", **NAMED), lambda: check(_config(**NAMED))):
        with pytest.raises(ConfigError, match="no such variable"):
            act()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("harm", ["swap", "older", "byte", "cut"])
def test_a_changed_or_exchanged_state_is_refused_by_name_and_the_true_one_goes_on(
    tmp_path: Path, done: tuple[Path, Path], harm: str
) -> None:
    with pytest.raises(_Stop):
        _run(tmp_path / "run", stop=True, **NAMED)
    first, other = (tmp_path / "run" / "sites" / site for site in _sites(tmp_path / "run")[:2])
    newest = first / f"state-{STOP:05d}.safetensors"
    true = newest.read_bytes()
    broken = {
        "swap": (other / newest.name).read_bytes(),
        "older": (first / f"state-{STOP - 1:05d}.safetensors").read_bytes(),
        "byte": true[:-40] + bytes([true[-40] ^ 1]) + true[-39:],
        "cut": true[: len(true) // 2],
    }[harm]
    newest.write_bytes(broken)
    held = runs.contents(tmp_path / "run" / "checkpoints")
    with pytest.raises(TrainingError, match=rf"(?s){first.name}: refused.*changed or cut, or belongs elsewhere"):
        _run(tmp_path / "run", resume=True, **NAMED)
    assert runs.contents(tmp_path / "run" / "checkpoints") == held
    newest.write_bytes(true)
    again = _run(tmp_path / "run", resume=True, **NAMED)
    assert (again / "predictions.parquet").read_bytes() == (done[1] / "predictions.parquet").read_bytes()


def test_a_sites_model_is_used_and_exported_with_the_key_alone(
    tmp_path: Path, done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, encrypted = done
    site = _sites(encrypted)[0]
    assert equal(load_trained(encrypted, site, "cpu").variables, load_trained(plain, site, "cpu").variables)
    moved = shutil.copytree(encrypted, tmp_path / "copy")
    other = _sites(encrypted)[1]
    shutil.copy(moved / "adapters" / f"{other}.safetensors", moved / "adapters" / f"{site}.safetensors")
    with pytest.raises(StateError, match="belongs elsewhere"):
        load_trained(moved, site, "cpu")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", str(encrypted), "--format", "safetensors", "--out", str(tmp_path / "out"), "--site", site])
    assert "not encrypted" in capsys.readouterr().err
    assert not is_sealed((tmp_path / "out" / "adapter.safetensors").read_bytes())
    monkeypatch.delenv("SITE_KEY")
    with pytest.raises(ConfigError, match="no such variable"):
        export(encrypted, "safetensors", tmp_path / "more", site)
    assert not (tmp_path / "more").exists()
