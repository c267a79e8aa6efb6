"""What a run leaves behind is whole, strict, consistent with itself, and what `consilium check` had said before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from consilium import checkpoint, config, tensors
from consilium.data import Preprocessing
from tests import hospitals
from tests.e2e.processes import ROOT, Parent
from tests.e2e.runs import KINDS, Finished, contents, events, read, words

SITES = ("alpine", "harbour", "prairie", "summit")


def _result(finished: Finished, kind: str) -> tuple[Path, dict[str, Any]]:
    out = finished(kind)
    return out, read(out / "result.json")


# ------------------------------------------------------------------------------------------------ files and keys
def test_every_file_is_there(finished: Finished) -> None:
    found = contents(finished("fedavg")).keys()
    run = {"config.json", "split.parquet", "events.jsonl", "predictions.parquet", "adapters/{}.safetensors"}
    run |= {"checkpoints/round-00003.safetensors", "sites/{}/served.safetensors", "sites/{}/predictions.parquet"}
    expected = {name.format(site) for name in run for site in SITES} | {"result.json", "report.html"}
    expected |= {"adapters/global.safetensors"}
    expected |= {f"references/local/{name.format(site)}" for name in run for site in SITES}
    expected |= {f"references/pooled/{name.format('pooled')}" for name in run}
    assert expected - found == set()
    assert not [name for name in found if name.endswith((".tmp", ".partial"))]


KEYS = {
    "schema_version", "name", "consilium_version", "versions", "hardware", "seed",
    "config_hash", "agreement_hash", "split_hash", "data_digest", "backbone", "classes",
    "parameters", "site_parameters", "bytes", "wire", "kept_at_site", "numbers", "seconds", "site_seconds",
    "image_passes", "peak_memory_bytes", "rounds", "served_round", "sites", "warnings", "metrics",
    "references", "majority",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more"), [("fedavg", {"sites_harmed"}), ("fedper", {"sites_harmed"}), ("half", set()), ("best", set())]
)
def test_result_has_the_promised_keys_and_no_others(finished: Finished, kind: str, more: set[str]) -> None:
    out, result = _result(finished, kind)
    assert result.keys() == KEYS | more
    documented = (ROOT / "docs" / "architecture.md").read_text()
    assert [key for key in result if key not in documented] == []
    assert result["schema_version"] == 1
    assert set(result["versions"]) >= {"python", "torch", "timm", "numpy"}
    assert (result["seed"], result["rounds"], result["name"]) == (3, 3, "tiny")
    assert result["backbone"].keys() == {"name", "digest", "licence", "preprocessing"}
    assert result["references"].keys() == {path.name for path in out.glob("references/*")}
    assert result["peak_memory_bytes"] > 1e7
    assert result["seconds"] == pytest.approx(sum(event["seconds"] for event in events(out)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolved_configuration_is_a_configuration(finished: Finished, kind: str) -> None:
    out, result = _result(finished, kind)
    stored = read(out / "config.json")
    again = config.from_dict(stored["config"])
    images = Preprocessing(**result["backbone"]["preprocessing"])
    assert (
        config.config_hash(again, result["backbone"]["digest"], images)
        == stored["config_hash"]
        == result["config_hash"]
    )
    agreed = config.agreement_hash(again, result["backbone"]["digest"], stored["classes"], images)
    assert agreed == stored["agreement_hash"] == result["agreement_hash"]


# ------------------------------------------------------------------------------------------------ numbers that agree
@pytest.mark.parametrize("kind", KINDS)
def test_sites_split_and_predictions_are_about_the_same_images(finished: Finished, kind: str) -> None:
    out, result = _result(finished, kind)
    split, table = (pd.read_parquet(out / name) for name in ("split.parquet", "predictions.parquet"))
    assert len(split) == (96 if kind == "unseen" else 64)
    split = split[split["site"].isin(result["sites"])]  # one that is held out is in no table of the run
    for (site, name), rows in split.groupby(["site", "split"]):
        sizes = result["sites"][site][name]
        assert (sizes["n"], sizes["groups"]) == (len(rows), rows["group"].nunique())
        counts = {label: count for label, count in sizes["classes"].items() if count}
        assert counts == rows["label"].value_counts().to_dict()
    known = split.set_index("id")
    for (name, model, site), rows in table.groupby(["split", "model", "site"]):
        expected = known[(known["site"] == site) & (known["split"] == name)]
        assert sorted(rows["id"]) == sorted(expected.index), (name, model, site)
        assert (rows["group"].to_numpy() == expected.loc[rows["id"], "group"].to_numpy()).all()
        labels = [result["classes"][label] for label in rows["label"]]
        assert labels == list(expected.loc[rows["id"], "label"])
    probabilities = table[[f"p.{name}" for name in result["classes"]]].to_numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


MODELS = {"fedavg": {"personal", "global", "before_aggregation"}, "fedper": {"personal", "before_aggregation"}}


@pytest.mark.parametrize("kind", ["fedavg", "fedper"])
def test_metrics_are_those_of_the_predictions(finished: Finished, kind: str) -> None:
    out, result = _result(finished, kind)
    table, classes = pd.read_parquet(out / "predictions.parquet"), result["classes"]
    for split in ("val", "test"):
        assert result["metrics"][split].keys() == MODELS[kind]
        for model, tree in result["metrics"][split].items():
            rows = table[(table["split"] == split) & (table["model"] == model)]
            _same_numbers(rows, tree, classes)
            sizes = {site: result["sites"][site][split]["n"] for site in SITES}
            assert {site: tree["accuracy"]["per_site"][site]["n"] for site in SITES} == sizes
            assert tree["accuracy"]["pooled"]["n"] == sum(sizes.values()) == len(rows)


def _same_numbers(rows: pd.DataFrame, tree: dict[str, Any], classes: list[str]) -> None:
    found = {site: rows[rows["site"] == site] for site in SITES}
    for part, some in [("pooled", rows), *found.items()]:
        scores = some[[f"p.{name}" for name in classes]].to_numpy()
        values = {
            metric: tree[metric]["pooled"] if part == "pooled" else tree[metric]["per_site"][part] for metric in tree
        }
        if not len(some):
            assert {values[metric]["value"] for metric in ("accuracy", "balanced_accuracy", "macro_auroc")} == {None}
            continue
        answers = scores.argmax(axis=1)
        assert values["accuracy"]["value"] == pytest.approx(accuracy_score(some["label"], answers))
        present = some[some["label"].isin(some["label"].unique())]["label"]
        recalls = [np.mean(answers[(present == label).to_numpy()] == label) for label in sorted(present.unique())]
        assert values["balanced_accuracy"]["value"] == pytest.approx(np.mean(recalls))
        if len(recalls) == len(classes):
            assert values["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(present, answers))
            one_by_one = [roc_auc_score(present == label, scores[:, label]) for label in range(len(classes))]
            assert values["macro_auroc"]["value"] == pytest.approx(np.mean(one_by_one))
    known = [v["value"] for v in tree["accuracy"]["per_site"].values() if v["value"] is not None]
    assert tree["accuracy"]["mean"]["value"] == pytest.approx(np.mean(known))
    assert tree["accuracy"]["worst"]["value"] == min(known)


def test_global_and_personal_are_one_model_where_all_is_shared(finished: Finished) -> None:
    out, result = _result(finished, "fedavg")
    assert result["metrics"]["test"]["global"] == result["metrics"]["test"]["personal"]
    assert result["metrics"]["test"]["before_aggregation"] != result["metrics"]["test"]["personal"]
    adapters = {path.stem: checkpoint.load(path)[0] for path in (out / "adapters").iterdir()}
    assert adapters.keys() == {*SITES, "global"}
    assert all(tensors.equal(adapters["global"], adapter) for adapter in adapters.values())


def test_personal_heads_differ_and_shared_tensors_do_not(finished: Finished) -> None:
    out, result = _result(finished, "fedper")
    adapters = {path.stem: checkpoint.load(path)[0] for path in (out / "adapters").iterdir()}
    assert adapters.keys() == set(SITES)
    kept = {row["name"] for row in result["kept_at_site"]}
    sent = {row["name"] for row in result["wire"]["up"]}
    assert (kept, kept & sent) == ({"head.bias", "head.weight"}, set())
    for site in SITES[1:]:
        assert adapters[site].keys() == kept | sent
        assert tensors.equal({n: adapters[site][n] for n in sent}, {n: adapters["alpine"][n] for n in sent})
        assert not tensors.equal({n: adapters[site][n] for n in kept}, {n: adapters["alpine"][n] for n in kept})
    assert tensors.num_elements(adapters["alpine"]) == result["parameters"]["trainable"]
    assert sum(row["bytes"] for row in result["wire"]["up"]) == 4 * result["parameters"]["exchanged"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_add_up(finished: Finished, kind: str) -> None:
    out, result = _result(finished, kind)
    logged = events(out)
    for way in ("up", "down"):
        counted = result["bytes"][way]
        assert counted["total"] == sum(counted["per_site"].values()) > 0
        assert counted["per_site"].keys() == result["sites"].keys()
    for site in result["sites"]:
        up, down = ([event["bytes"][way].get(site, 0) for event in logged] for way in ("up", "down"))
        assert result["bytes"]["up"]["per_site"][site] == sum(up)
        assert [count > 0 for count in up] == [event["sites"][site]["status"] == "ok" for event in logged]
        finish = result["bytes"]["down"]["per_site"][site] - sum(down)
        shared = [row["name"] for row in result["wire"]["down"]]
        adapter = checkpoint.load(out / "adapters" / f"{site}.safetensors")[0]
        rest = 9 + math.ceil(len(shared) / 8) + sum(adapter[name].nbytes for name in shared)
        assert finish == rest * (2 if kind == "best" else 1), "the last shared tensors go out once more, to be served"
    control = result["bytes"]["control"]
    assert min(control["up"], control["down"]) > 0
    assert all(reference["bytes"]["up"]["total"] == 0 for reference in result["references"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_has_a_line_per_round(finished: Finished, kind: str) -> None:
    out, result = _result(finished, kind)
    logged = events(out)
    assert [event["round"] for event in logged] == [1, 2, 3]
    for event in logged:
        assert event.keys() == {"round", "seconds", "bytes", "sites", "val_mean"}
        assert event["sites"].keys() == result["sites"].keys()
        trained = {site: row for site, row in event["sites"].items() if row["status"] == "ok"}
        assert len(trained) == (2 if kind == "half" else len(result["sites"]))
        assert {row["status"] for row in event["sites"].values()} <= {"ok", "not_drawn"}
        for row in trained.values():
            assert row["num_steps"] > 0
            assert row["val"].keys() == {"incoming", "outgoing"}
            assert math.isfinite(row["loss"])
        known = [row["val"]["incoming"]["accuracy"] for row in trained.values()]
        known = [value for value in known if value is not None]
        assert event["val_mean"]["accuracy"] == (pytest.approx(np.mean(known)) if known else None)
    passes = {site: sum(event["sites"][site].get("image_passes", 0) for event in logged) for site in result["sites"]}
    assert result["image_passes"] == {"total": sum(passes.values()), "per_site": passes}


def test_the_served_round_is_the_one_with_the_best_validation(finished: Finished) -> None:
    out, result = _result(finished, "best")
    came_in = {event["round"] - 1: event["val_mean"]["balanced_accuracy"] for event in events(out)}
    predictions = pd.read_parquet(out / "predictions.parquet")
    rows = predictions[(predictions["split"] == "val") & (predictions["model"] == "personal")]
    served = result["metrics"]["val"]["personal"]["balanced_accuracy"]["mean"]["value"]
    judged = {number: value for number, value in came_in.items() if number >= 1}
    assert len(rows)
    assert served >= max(judged.values()) - 1e-9
    assert result["served_round"] == 3 or judged[result["served_round"]] == pytest.approx(served)


def test_sites_harmed_is_the_difference_to_the_local_reference(finished: Finished) -> None:
    _, result = _result(finished, "fedavg")
    used = result["metrics"]["test"]["personal"]["balanced_accuracy"]["per_site"]
    alone = result["references"]["local"]["metrics"]["test"]["personal"]["balanced_accuracy"]["per_site"]
    for site, difference in result["sites_harmed"]["difference"].items():
        assert difference["value"] == pytest.approx(used[site]["value"] - alone[site]["value"])
    assert result["sites_harmed"]["count"] == len(result["sites_harmed"]["sites"])
    most = max(result["classes"], key=lambda name: result["sites"]["summit"]["train"]["classes"][name])
    answered = result["sites"]["summit"]["test"]["classes"][most] / result["sites"]["summit"]["test"]["n"]
    assert result["majority"]["test"]["accuracy"]["per_site"]["summit"]["value"] == pytest.approx(answered)


# ------------------------------------------------------------------------------------------------ said before
def _compare(check: dict[str, Any], out: Path) -> None:
    result = read(out / "result.json")
    for way in ("up", "down"):
        assert check["bytes"][way] == result["bytes"][way]
        assert check["wire"][way] == result["wire"][way]
    assert check["image_passes"] == result["image_passes"]["per_site"]
    for key in ("parameters", "kept_at_site", "sites", "split_hash", "warnings"):
        assert check[key] == result[key], key
    full, rounds = check["bytes_per_round"], events(out)
    took_part = [{site for site, row in each["sites"].items() if row["status"] == "ok"} for each in rounds]
    assert all(full[way]["total"] == sum(full[way]["per_site"].values()) for way in ("up", "down"))
    assert all(full["up"]["per_site"][site] == rounds[0]["bytes"]["up"].get(site, 0) for site in took_part[0])
    for each, present in zip(rounds, took_part, strict=True):
        measured = {site: each["bytes"]["down"].get(site, 0) for site in present}
        later = each["round"] > 1  # before, a site has what starts alike at all sites
        assert all(value == full["down"]["per_site"][site] for site, value in measured.items()) or not later
        assert all(value <= full["down"]["per_site"][site] for site, value in measured.items())


@pytest.mark.parametrize("kind", KINDS)
def test_check_says_what_the_run_then_measures(
    consilium: Parent, finished: Finished, tmp_path: Path, kind: str
) -> None:
    done = consilium("check", *words(tmp_path, *KINDS[kind])[1:], "--json")
    assert (done.code, done.stderr) == (0, "")
    _compare(json.loads(done.stdout), finished(kind))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ("strategy.name=fedprox", "tuner={name='linear'}", "evaluation.every=2"),
        ("tuner={name='full'}", "train.rounds=1", "train.learning_rate=1e-4"),
        ("train.local_steps=3", "train.accumulate=2", "train.participation=0.7", "strategy.weights=uniform"),
        ("strategy.name=local", "train.local_epochs=0.3"),
        ("strategy.name=fedper", "strategy.personal_from_block=3", "tuner.targets=['qkv','fc1']", "head.kind=mlp"),
        ("head.share=frozen", "tuner.blocks=[0, 5]", "train.local_epochs=1.5"),
        ("head.share=personal", "sites.num_sites=1", "sites.num_images=20"),
    ],
)
def test_check_says_it_of_other_methods_too(consilium: Parent, tmp_path: Path, settings: tuple[str, ...]) -> None:
    command = words(tmp_path, *settings)
    done, ran = consilium("check", *command[1:], "--json"), consilium(*command, "--quiet", "--out", tmp_path / "out")
    assert (done.code, done.stderr, ran.code, ran.stderr) == (0, "", 0, "")
    _compare(json.loads(done.stdout), tmp_path / "out")


# ------------------------------------------------------------------------------------------------ the command line
def test_json_output_is_json_and_nothing_else(consilium: Parent, tmp_path: Path) -> None:
    done = consilium(*words(tmp_path, "train.rounds=2"), "--json", "--out", tmp_path / "out")
    assert (done.code, done.stderr) == (0, "")
    kinds = [event["event"] for event in done.events]
    assert (kinds.count("start"), kinds.count("round"), kinds.count("finish"), kinds[-1]) == (1, 2, 1, "finish")
    assert kinds.count("site") == 2 * 4 + 4
    lines = [
        {key: value for key, value in event.items() if key != "event"}
        for event in done.events
        if event["event"] == "round"
    ]
    assert lines == events(tmp_path / "out")
    assert Path(done.events[-1]["result"]).is_file()
    assert Path(done.events[-1]["report"]).is_file()


def test_quiet_output_is_the_outcome(consilium: Parent, tmp_path: Path) -> None:
    done = consilium(*words(tmp_path, "train.rounds=1"), "--quiet", "--out", tmp_path / "out")
    assert (done.code, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "balanced accuracy mean", "balanced accuracy worst", "balanced accuracy pooled", "result", "report"
    ]  # fmt: skip


def test_settings_override_the_file(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    settings = (*KINDS["fedavg"], "tuner.rank=4", "evaluation.references=[]", "train.rounds=1", "engine.threads=2")
    done = consilium(*words(tmp_path, *settings), "--quiet", "--out", tmp_path / "out")
    assert (done.code, done.stderr) == (0, "")
    stored, result = (read(tmp_path / "out" / name) for name in ("config.json", "result.json"))
    assert [tuner["rank"] for tuner in stored["config"]["tuner"]] == [4]
    assert (stored["config"]["engine"]["threads"], result["hardware"]["threads"], result["rounds"]) == (2, 2, 1)
    assert (result["references"], (tmp_path / "out" / "references").exists()) == ({}, False)
    before = read(finished("fedavg") / "result.json")["parameters"]
    head = 4 * 64 + 4
    assert result["parameters"]["trainable"] - head == 2 * (before["trainable"] - head)


def test_paths_are_relative_to_the_configuration_wherever_it_is_run_from(consilium: Parent, tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "a place with spaces", tmp_path / "elsewhere"
    elsewhere.mkdir()
    hospitals.write(place, hospitals.two_sites())
    (place / "my run.toml").write_text(
        '[sites]\nsource = "manifest"\ntable = "table.csv"\nimages = "images"\n'
        'columns = { image = "image", label = "label", site = "site", group = "patient" }\n'
        '[backbone]\nname = "test_vit"\nweights = "random"\nimage_size = 16\n'
        "[train]\nrounds = 1\n[evaluation]\nbootstrap = 0\n"
        '[engine]\ncache = "decoded images"\n'
    )
    done = consilium("run", "../a place with spaces/my run.toml", "--set", "name=of spaces", "--quiet", cwd=elsewhere)
    assert (done.code, done.stderr) == (0, "")
    assert (elsewhere / "runs" / "of spaces" / "result.json").is_file()
    assert list((place / "decoded images").glob("*.npy"))
    assert {path.name for path in elsewhere.iterdir()} == {"runs"}
