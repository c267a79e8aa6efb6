"""The tables of result.json and what tells two results apart."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from consilium import checkpoint, results, surroundings
from consilium.data import Examples, SiteData
from consilium.errors import StateError
from consilium.messages import Reply
from consilium.protocols import Personal, Spec, Specs, Tag
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import Tensors
from tests import federation


def _examples(labels: list[int], groups: list[str]) -> Examples:
    text = np.array([f"i{number}" for number in range(len(labels))], dtype=np.str_)
    pixels = np.zeros((len(labels), 4, 4, 3), dtype=np.uint8)
    given = np.array(groups, dtype=np.str_)
    return Examples(pixels, np.arange(len(labels)), np.array(labels, dtype=np.int64), text, given, text)


def test_a_site_is_counted_by_image_group_and_class() -> None:
    data = SiteData("a", _examples([0, 2, 2], ["p", "p", "q"]), _examples([], []), _examples([1], ["r"]))
    assert results.site_table(data, ("x", "y", "z")) == {
        "train": {"n": 3, "groups": 2, "classes": {"x": 1, "y": 0, "z": 2}},
        "val": {"n": 0, "groups": 0, "classes": {"x": 0, "y": 0, "z": 0}},
        "test": {"n": 1, "groups": 1, "classes": {"x": 0, "y": 1, "z": 0}},
    }


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_a_tensor_on_the_wire_is_a_row(dtype: torch.dtype, size: int) -> None:
    specs = {"b": Spec((2, 3), Tag("head", "head"), dtype), "a": Spec((), Tag("m", "lora_a"), dtype)}
    rows = results.wire(specs)
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[1] == {"name": "b", "role": "head", "shape": [2, 3], "dtype": str(dtype)[6:], "bytes": 6 * size}
    assert rows[0]["bytes"] == size


def test_parameters_are_counted_apart() -> None:
    pieces = federation.assemble(federation.configure(strategy={"name": "fedper"}))
    found, head = results.parameters(pieces), pieces.backbone.num_features * 3 + 3
    assert found["trainable"] - found["exchanged"] == head
    assert found["backbone"] == pieces.backbone.num_parameters


class _InTurn(FedAvg):
    """The head travels in round 2 only, the rest in all others."""

    def up(self, specs: Specs, round: int) -> Specs:
        return {name: spec for name, spec in specs.items() if (spec.tag.role == "head") == (round == 2)}

    def down(self, specs: Specs, round: int) -> Specs:
        return self.up(specs, round)


def test_what_travels_in_any_round_is_listed() -> None:
    for rounds, both in ((1, False), (2, True)):
        pieces = federation.assemble(federation.configure(train={"rounds": rounds}), _InTurn())
        up, down = results.both_ways(pieces)
        assert ("head.bias" in up, len(up) == len(pieces.model.specs)) == (both, both)
        assert down == up


@pytest.mark.parametrize("counts", ["site", "federation"])
def test_every_number_that_leaves_a_site_is_declared(tmp_path: Path, counts: str) -> None:
    task = {"class_weight": "inverse", "class_counts": counts}
    settings = federation.configure(task=task, evaluation={"serve": "best", "every": 2})
    outcome = federation.run(tmp_path, settings, federation.hospitals(6, 6))
    replies = [outcome.decode("up", data) for way, _, data in outcome.wire if way == "up"]
    fields = {"site", "round", "tensors", "num_examples", "numbers", "failure"}
    assert {field.name for field in dataclasses.fields(Reply)} == fields
    validations = [reply.numbers.get("val", {}) for reply in replies]
    seen = {"num_examples", "failure"} | {name for reply in replies for name in reply.numbers} - {"val"}
    seen |= {f"val.{way}" for each in validations for way in each}
    rows = {row["name"]: row for row in results.numbers(outcome.experiment)}
    assert rows.keys() == seen
    assert ("class_counts" in rows) == (counts == "federation")
    metrics = {name for each in validations for values in each.values() for name in values}
    assert metrics
    assert all(name in rows["val.incoming"]["what"] for name in metrics)
    assert rows["val.outgoing"]["sent"] == "round 1 and every 2 rounds"


@pytest.mark.parametrize(
    ("strategy", "tuner", "alone"), [("fedper", "linear", 1), ("fedper", "lora", 0), ("local", "lora", 0)]
)
def test_a_federation_that_shares_nothing_is_warned_of(strategy: str, tuner: str, alone: int) -> None:
    pieces = federation.assemble(federation.configure(strategy={"name": strategy}, tuner=[{"name": tuner}]))
    found = results.warnings(pieces, SimpleNamespace(warnings=("about data",), sites={}))
    assert found[0] == "about data"
    assert len([text for text in found if "nothing is shared" in text]) == alone == len(found) - 1


@pytest.mark.parametrize(
    ("models", "reason"), [((), "no validation or test images"), (("personal",), "no global model")]
)
def test_why_held_out_sites_are_not_measured(tmp_path: Path, models: tuple[str, ...], reason: str) -> None:
    columns = {"split": "test", "model": models, "site": "far", "id": "i", "group": "g", "label": 0}
    table = pd.DataFrame(columns).assign(**{f"p.{name}": 1 / 3 for name in federation.CLASSES})
    path = tmp_path / "held_out" / "sites" / "far" / "predictions.parquet"
    path.parent.mkdir(parents=True)
    table.to_parquet(path)
    pieces = federation.assemble(federation.configure())
    found = results._held_out(tmp_path, pieces, SimpleNamespace(held_out={"far": None}))
    assert found["metrics"] is None
    assert reason in found["reason"]


class _Based(FedAvg):
    """It changes the base too, so that what is used holds more than the variables."""

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        base = {"norm.bias": torch.zeros(64)}
        return {name: {**tensors, **base} for name, tensors in super().deploy(received, personal).items()}


def test_the_global_adapter_of_a_changed_base_is_kept(tmp_path: Path) -> None:
    settings = federation.configure(train={"rounds": 1})
    outcome = federation.run(tmp_path, settings, federation.hospitals(6, 6), strategy=_Based())
    results.collect(tmp_path, outcome.experiment, outcome.progress)
    adapter, _ = checkpoint.load(tmp_path / "adapters" / "global.safetensors")
    assert adapter.keys() == {"norm.bias", *outcome.experiment.model.specs}


def test_versions_and_memory_are_those_of_this_process() -> None:
    assert surroundings.versions()["torch"] == torch.__version__.split("+")[0] or surroundings.versions()["torch"]
    assert surroundings.versions()["python"].startswith("3.")
    held = np.ones(40_000_000)
    assert surroundings.peak_memory() > held.nbytes


def test_a_gpu_is_named_with_the_memory_that_was_held_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = federation.assemble(federation.configure())
    assert "peak_device_memory_bytes" not in surroundings.hardware(pieces.setting.device, pieces.config.engine)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5)
    moved = dataclasses.replace(pieces, setting=dataclasses.replace(pieces.setting, device="cuda:1"))
    found = surroundings.hardware(moved.setting.device, moved.config.engine)
    assert (found["name"], found["peak_device_memory_bytes"]) == ("a GPU, cuda:1", 5)


def test_other_code_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest_at(folder: Path) -> str:
        surroundings.code_digest.cache_clear()
        monkeypatch.setattr(surroundings, "__file__", str(folder / "surroundings.py"))
        return surroundings.code_digest()

    here = Path(surroundings.__file__).parent
    shutil.copytree(here, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    try:
        same = digest_at(here)
        assert digest_at(tmp_path / "copy") == same
        (tmp_path / "copy" / "notes.md").write_text("no code")
        assert digest_at(tmp_path / "copy") == same
        (tmp_path / "copy" / "tensors.py").rename(tmp_path / "copy" / "tensor.py")
        assert digest_at(tmp_path / "copy") != same
    finally:
        surroundings.code_digest.cache_clear()


def test_a_report_that_cannot_be_written_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("consilium.report.html.render", full)
    with pytest.raises(StateError, match=r"(?s)report\.html.*No space left.*--resume"):
        results.report(tmp_path)


@pytest.mark.parametrize("tree", [{}, {"personal": {"balanced_accuracy": {"mean": {"value": 0.5}}}}])
def test_the_headline_is_what_is_known(tmp_path: Path, tree: dict[str, object]) -> None:
    checkpoint.write_json(tmp_path / "result.json", {"metrics": {"test": tree}})
    found = results.outcome(tmp_path)
    assert found["headline"] == ({"balanced_accuracy_mean": {"value": 0.5}} if tree else {})
    assert found["result"] == str(tmp_path / "result.json")


def test_what_sites_left_is_gathered_and_a_site_that_wasnever_drawn_is_named(tmp_path: Path) -> None:
    settings = federation.configure(train={"rounds": 1, "participation": 0.3}, strategy={"name": "fedper"})
    outcome = federation.run(tmp_path, settings, federation.hospitals(6, 6, 6))
    results.collect(tmp_path, outcome.experiment, outcome.progress)
    summary = checkpoint.read_json(tmp_path / "summary.json")
    (drawn,) = outcome.progress.passes
    assert summary["image_passes"] == {"total": 6, "per_site": {"a": 0, "b": 0, "c": 0} | {drawn: 6}}
    assert summary["served_round"] == 1
    assert summary["site_seconds"]["per_site"] == {"a": 0, "b": 0, "c": 0} | outcome.progress.site_seconds
    assert summary["site_seconds"]["total"] == outcome.progress.site_seconds[drawn] > 0
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert set(table["site"]) == {"a", "b", "c"}
    assert set(table[table["model"] == "before_aggregation"]["site"]) == {drawn}
    assert {path.stem for path in (tmp_path / "adapters").iterdir()} == {"a", "b", "c"}
    adapter, meta = checkpoint.load(tmp_path / "adapters" / "b.safetensors")
    assert adapter.keys() == outcome.experiment.model.specs.keys()
    assert (meta["model"], meta["classes"]) == ("b", list(federation.CLASSES))


@pytest.mark.parametrize(
    ("passes", "named"),
    [({"a": 3, "b": 1}, None), ({"a": 3, "b": 0, "c": 0}, "2 sites"), ({"a": 3, "b, c": 0}, "1 site "), ({}, None)],
)
def test_a_site_that_wasnever_drawn_is_warned_of(passes: dict[str, int], named: str | None) -> None:
    found = results.never_drawn(passes)
    assert len(found) == (named is not None)
    assert all(text.startswith(named or "") and text.endswith("b, c") for text in found)


@pytest.mark.parametrize(
    ("strategy", "share", "told"),
    [
        ({"name": "trimmed_mean", "trim": 0.2}, 1.0, "trimmed_mean of the 4 sites"),
        ({"name": "trimmed_mean"}, 1.0, None),
        ({"name": "trimmed_mean"}, 0.5, "trimmed_mean of the 2 sites"),
        ({"name": "fedprox", "aggregate": "trimmed_mean", "trim": 0.0}, 1.0, "trimmed_mean of the 4 sites"),
        ({"name": "median"}, 1.0, None),
        ({"name": "fedavg", "aggregate": "median"}, 0.5, "median of the 2 sites"),
        ({"name": "fedavg"}, 0.5, None),
    ],
)
def test_a_robust_sum_that_leaves_nobody_out_is_warned_of(
    strategy: dict[str, object], share: float, told: str | None
) -> None:
    pieces = federation.assemble(federation.configure(strategy=strategy, train={"participation": share}))
    found = results.warnings(pieces, SimpleNamespace(warnings=(), sites=dict.fromkeys("abcd")))
    assert [text.partition(" of a round")[0] for text in found] == ([told] if told else [])


@pytest.mark.parametrize("content", [None, b"", b"PAR1 cut short"])
def test_a_table_that_is_lost_or_damaged_is_told_by_its_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "predictions.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StateError, match=r"cannot be read[\s\S]*predictions\.parquet"):
        checkpoint.read_table(path)
