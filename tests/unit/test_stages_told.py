"""Stages: what travels in each, what the check, the report and the folder say of them, what is made of the run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from consilium import checkpoint, registry, run, signing
from consilium.check import check
from consilium.continued import Continued
from consilium.errors import ConfigError
from consilium.export import export, load
from consilium.messages import envelope_of
from consilium.sealing import is_sealed
from consilium.tensors import equal, loads
from tests.federation import bits, traces
from tests.staged import LINEAR, PERSONAL, TUNE, configured, finished, served


# ------------------------------------------------------------------------------------------------ wire and test split
def test_what_travels_in_each_stage_and_that_the_test_split_is_read_once(tmp_path: Path) -> None:
    settings = configured(LINEAR, TUNE, PERSONAL)
    recorded: list[tuple[str, str, bytes]] = []
    run.run(settings, tmp_path, record=lambda way, site, data: recorded.append((way, site, data)))
    found = checkpoint.read_json(tmp_path / "result.json")
    width, classes = 64, len(found["classes"])
    head = 4 * (width * classes + classes)
    lora = sum(row["bytes"] for row in found["stages"][1]["wire"]["up"] if row["role"] != "head")
    assert [sum(row["bytes"] for row in stage["wire"]["up"]) for stage in found["stages"]] == [head, head + lora, 0]
    sites = len(found["sites"])
    assert head * 2 * sites <= found["stages"][0]["bytes"]["up"]["total"] < (head + 16) * 2 * sites
    asked = [envelope_of(data) for way, _, data in recorded if way == "down"]
    ends = [fields["context"].get("test", True) for fields in asked if fields["kind"] == "finish"]
    assert ends == [False] * sites + [False] * sites + [True] * sites
    for folder in ("1-linear", "2-tune"):
        assert set(pd.read_parquet(tmp_path / "stages" / folder / "predictions.parquet")["split"]) == {"val"}
    assert set(pd.read_parquet(tmp_path / "predictions.parquet")["split"]) == {"val", "test"}


def test_the_check_says_what_the_run_will_exchange_stage_by_stage() -> None:
    each = (LINEAR, TUNE, PERSONAL)
    said, found = check(configured(*each)).to_dict(), checkpoint.read_json(finished(*each) / "result.json")
    ways = ("up", "down")
    assert said["bytes"] == {way: found["bytes"][way] for way in ways}
    assert said["image_passes"] == found["image_passes"]["per_site"]
    for row, stage in zip(said["stages"], found["stages"], strict=True):
        assert (row["sent"], row["received"]) == tuple(stage["bytes"][way]["total"] for way in ways)
        assert {key: row[key] for key in stage["parameters"]} == stage["parameters"]
        assert row["image_passes"] == stage["image_passes"]["total"]
    assert sum(row["sent"] for row in said["stages"]) == said["bytes"]["up"]["total"]
    assert found["rounds"] == sum(stage["rounds"] for stage in found["stages"]) == 6


def test_references_go_through_the_same_stages() -> None:
    out = finished(LINEAR, TUNE, evaluation={"references": ["local", "pooled"]})
    found = checkpoint.read_json(out / "result.json")
    passes = found["image_passes"]
    assert found["references"]["local"]["image_passes"] == passes
    assert found["references"]["pooled"]["image_passes"]["total"] == passes["total"]
    first, last = (served(folder / "references" / "local") for folder in (out / "stages" / "1-linear", out))
    assert set(first) < set(last)


# ------------------------------------------------------------------------------------------------ what comes after
def test_the_report_shows_every_stage() -> None:
    out = finished(LINEAR, TUNE, PERSONAL)
    page = (out / "report.html").read_text()
    for name, rounds in (("linear", "1 to 2"), ("tune", "3 to 4"), ("own", "5 to 6")):
        assert page.count(f"<title>{name}</title>") >= 3, "a mark in every figure over rounds"
        assert rounds in page
    assert "lora r=2 combined by local" in page
    assert "in round 6" in page


def test_with_a_key_what_a_stage_hands_to_sites_is_encrypted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SITE_KEY", "0a" * 32)
    plain, out = finished(TUNE, PERSONAL, PERSONAL | {"name": "on"}), tmp_path / "run"
    run.run(configured(TUNE, PERSONAL, PERSONAL | {"name": "on"}, engine={"state_key_variable": "SITE_KEY"}), out)
    of_sites = sorted(path for path in out.rglob("sites/*/*.safetensors"))
    assert {path.name for path in of_sites} > {"start.safetensors", "served.safetensors"}
    assert all(is_sealed(path.read_bytes()) for path in of_sites)
    clear = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for path in plain.rglob("start.safetensors"):  # of the same run without a key: what each site began a stage with
        own = {n: v for n, v in checkpoint.load(path)[0].items() if ".personal." in n and v.any()}
        assert not [name for mark, name in traces({n: v.flatten() for n, v in own.items()}).items() if mark in clear]
    first, second = (checkpoint.read_json(each / "result.json")["metrics"] for each in (plain, out))
    assert first == second


def test_a_model_of_the_sites_own_does_not_take_the_place_of_the_common_one() -> None:
    """A site that used another model than all have in common keeps both: its own is frozen, the common is global's."""
    strategy = registry.build("strategies", "fedavg", {})
    later = Continued(strategy, strategy.declares, frozenset({"x", "y"}), everywhere=True)
    own, common, trained = torch.ones(2), torch.zeros(2), torch.full((2,), 7.0)
    personal = later.init_site({"x": own, "y": own, "common/x": common}, {}, "a")
    models = later.deploy({"w": trained}, personal)
    assert equal(models["personal"], {"x": own, "y": own, "w": trained})
    assert equal(models["global"], {"x": common, "y": own, "w": trained})


def test_a_run_in_stages_is_exported_whole(tmp_path: Path) -> None:
    """To timm everything is folded in, and compared with the model there; to peft adapters of all stages go."""
    staged, folded = finished(LINEAR, TUNE, PERSONAL), finished(TUNE, {**TUNE, "name": "again", "merge": True})
    for number, out in enumerate((staged, folded)):
        assert (export(out, "timm", tmp_path / f"timm-{number}", "alpine") / "model.safetensors").is_file()
        loaded = load(export(out, "safetensors", tmp_path / f"own-{number}", "alpine"))
        assert bits(loaded.variables) == bits(served(out))
    written = loads((export(staged, "peft", tmp_path / "peft", "alpine") / "adapter_model.safetensors").read_bytes())
    assert {len(value) for name, value in written.items() if "lora_A" in name} == {4}, "2 and 2, side by side"
    with pytest.raises(ConfigError, match="changed the backbone"):
        export(folded, "peft", tmp_path / "no", "alpine")
    mixed = finished({"name": "ia3", "tuner": "ia3"}, TUNE)
    with pytest.raises(ConfigError, match="peft has no such method"):
        export(mixed, "peft", tmp_path / "no", "alpine")


def test_a_run_in_stages_is_no_data_vector(tmp_path: Path) -> None:
    key = tmp_path / "key"
    signing.new_key(key)
    with pytest.raises(ConfigError, match="data vector"):
        export(finished(LINEAR, TUNE), "safetensors", tmp_path / "out", "alpine", sign=key)
