"""Stages: each begins with what the one before ended with, and leaves what it does not train as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from consilium import checkpoint, config, registry, run, seeds, signing, stages
from consilium.check import check
from consilium.continued import Continued
from consilium.coordinator import Coordinator
from consilium.errors import ConfigError, StateError
from consilium.experiment import Experiment, assemble
from consilium.export import export, load
from consilium.messages import envelope_of
from consilium.predict import load_trained
from consilium.sealing import is_sealed
from consilium.tensors import equal, loads
from tests.federation import bits, traces

LORA = {"name": "lora", "rank": 2}
LINEAR = {"name": "linear", "tuner": "linear"}
TUNE = {"name": "tune", "tuner": LORA}
PERSONAL = {
    "name": "own",
    "tuner": LORA,
    "part": "personal",
    "strategy": {"name": "local"},
    "head": {"share": "frozen"},
}
TABLE: Mapping[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "sites": {"source": "phantom", "num_images": 48, "image_size": 32, "num_sites": 3},
    "backbone": {"name": "test_vit", "weights": "random", "image_size": 32},
    "train": {"rounds": 2, "batch_size": 8, "learning_rate": 0.01},
    "evaluation": {"bootstrap": 0},
    "engine": {"device": "cpu"},
}


def _config(*each: Mapping[str, Any], **tables: Any) -> config.Config:
    merged = {name: {**TABLE.get(name, {}), **value} if isinstance(value, dict) else value
              for name, value in tables.items()}  # fmt: skip
    return config.from_dict({**TABLE, **merged, **({"stages": list(each)} if each else {})})


@lru_cache(maxsize=1)
def _kept() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@lru_cache(maxsize=16)
def _finished(text: str) -> Path:
    """The folder of a run, made once."""
    out = Path(_kept().name) / str(abs(hash(text)))
    return run.run(config.from_dict(json.loads(text)), out)


def _run(*each: Mapping[str, Any], **tables: Any) -> Path:
    return _finished(json.dumps(_config(*each, **tables).to_dict(), sort_keys=True))


def _served(folder: Path, site: str = "alpine") -> dict[str, Tensor]:
    return checkpoint.load(folder / "sites" / site / "served.safetensors")[0]


def _assembled(*each: Mapping[str, Any], **tables: Any) -> Experiment:
    return assemble(_config(*each, **tables), ("a", "b", "c"))


# ------------------------------------------------------------------------------------------------ what is handed on
def test_one_stage_is_a_run_without_stages_bit_for_bit() -> None:
    plain, one = _run(tuner=LORA), _run(TUNE)
    for site in ("alpine", "harbour", "prairie"):
        assert bits(_served(plain, site)) == bits(_served(one, site))
    first, second = (checkpoint.read_json(out / "result.json") for out in (plain, one))
    for key in ("metrics", "wire", "image_passes", "rounds", "served_round", "parameters", "numbers"):
        same = {**second[key]} if isinstance(second[key], dict) else second[key]
        if key == "parameters":
            assert same.pop("frozen") == 0
        assert first[key] == same, key
    assert {way: first["bytes"][way] for way in ("up", "down")} == {way: second["bytes"][way] for way in ("up", "down")}
    predictions = [pd.read_parquet(out / "predictions.parquet") for out in (plain, one)]
    pd.testing.assert_frame_equal(*predictions)


def test_what_a_stage_does_not_train_keeps_its_bits() -> None:
    out = _run(LINEAR, TUNE, PERSONAL)
    for site in ("alpine", "harbour", "prairie"):
        second, last = _served(out / "stages" / "2-tune", site), _served(out, site)
        assert set(second) == {name for name in last if ".personal." not in name}
        assert bits(second) == bits({name: last[name] for name in second})
        own = [value for name, value in last.items() if name.endswith("personal.b")]
        assert own
        assert all(value.any() for value in own)
        assert bits({"": _served(out / "stages" / "1-linear", site)["head.weight"]}) != bits({"": last["head.weight"]})


def test_a_stage_is_a_run_that_begins_with_the_end_of_the_one_before(tmp_path: Path) -> None:
    """By hand: a run of LoRA alone, with the stage's seed and the head that linear probing left."""
    out = _run(LINEAR, TUNE)
    head = _served(out / "stages" / "1-linear")
    settings = _config(tuner=LORA).model_copy(update={"seed": seeds.derive(3, purpose="stage 2")})

    def initial(self: Experiment, seed: int) -> dict[str, Tensor]:
        return {**self.model.initial(seed), **head}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "initial", initial)
        patch.setattr(Experiment, "common", {})
        by_hand = run.run(settings, tmp_path / "by-hand")
    for site in ("alpine", "harbour", "prairie"):
        assert bits(_served(out, site)) == bits(_served(by_hand, site))


def test_a_personal_step_follows_the_gradient_of_the_whole_model(tmp_path: Path) -> None:
    """One step of plain gradient descent on the personal left factors, by hand in float64 up to rounding."""
    once = {"optimizer": "sgd", "learning_rate": 0.5, "clip_norm": 0, "weight_decay": 0, "rounds": 1, "local_steps": 1,
            "batch_size": 1000, "schedule": {"name": "constant", "warmup": 0}}  # fmt: skip
    settings = _config(LINEAR, TUNE, {**PERSONAL, "train": once})
    steps = stages.steps(settings, tmp_path)
    out = run.run(settings, tmp_path)
    prepared = run.prepare(settings, lambda _: None)
    experiment = assemble(steps[-1][0], prepared.classes)
    after, before = _served(out), _served(out / "stages" / "2-tune")
    own = {name: value.double() for name, value in after.items() if ".personal." in name}
    left = {name: torch.zeros_like(value) for name, value in own.items() if name.endswith("b")}
    for value in left.values():
        value.requires_grad_()
    data = prepared.sites["alpine"].train
    backbone = copy.deepcopy(experiment.backbone.module).double()
    pixels = torch.from_numpy(data.images[data.rows].copy()).permute(0, 3, 1, 2).double() / 255
    card = experiment.backbone.preprocessing
    mean, std = (torch.tensor(each).double()[:, None, None] for each in (card.mean, card.std))
    variables = {**{name: value.double() for name, value in before.items()}, **own, **left}
    inside = {name: value for name, value in variables.items() if not name.startswith("head.")}
    features = torch.func.functional_call(backbone, inside, ((pixels - mean) / std,))
    outputs = features @ variables["head.weight"].T + variables["head.bias"]
    torch.nn.functional.cross_entropy(outputs, torch.from_numpy(data.labels)).backward()
    for name, value in left.items():
        assert value.grad is not None
        torch.testing.assert_close(after[name].double(), -0.5 * value.grad, rtol=1e-4, atol=1e-6)


def test_personal_parts_go_on_from_stage_to_stage() -> None:
    """A head that stays at the sites in one stage starts there in the next."""
    out = _run({**TUNE, "strategy": {"name": "fedper"}}, {**PERSONAL, "strategy": {"name": "fedavg"}})
    first = {site: _served(out / "stages" / "1-tune", site) for site in ("alpine", "harbour")}
    last = {site: _served(out, site) for site in ("alpine", "harbour")}
    assert not torch.equal(first["alpine"]["head.weight"], first["harbour"]["head.weight"])
    for site in first:
        assert torch.equal(first[site]["head.weight"], last[site]["head.weight"])
    assert not (out / "adapters" / "global.safetensors").exists()


def test_a_second_shared_adapter_trains_beside_the_first() -> None:
    out = _run(TUNE, {**TUNE, "name": "again", "part": "second", "tuner": {"name": "lora", "rank": 3}})
    before, after = _served(out / "stages" / "1-tune"), _served(out)
    adapters = [name for name in before if ".lora." in name]
    assert bits({name: after[name] for name in adapters}) == bits({name: before[name] for name in adapters})
    assert {after[name].shape[0] for name in after if name.endswith("second.a")} == {3}
    shared = checkpoint.load(out / "adapters" / "global.safetensors")[0]
    assert bits(shared) == bits(after)


def test_selection_is_per_stage_and_the_next_begins_with_the_chosen_round() -> None:
    best = {"serve": "best"}
    out = _run({**LINEAR, "evaluation": best}, TUNE, train={"rounds": 3, "learning_rate": 1.0})
    first = out / "stages" / "1-linear"
    chosen = checkpoint.read_json(first / "summary.json")["served_round"]
    events = [json.loads(line) for line in (first / "events.jsonl").read_text().splitlines()]
    assert 1 <= chosen <= 3
    handed, _ = checkpoint.load(out / stages.START)
    at_round, _ = checkpoint.load(first / "checkpoints" / f"round-{chosen:05d}.safetensors")
    assert torch.equal(handed["head.weight"], at_round["shared/head.weight"])
    assert len(events) == 3


# ------------------------------------------------------------------------------------------------ merging
def test_a_merged_adapter_is_in_the_backbone_and_gives_the_same_outputs() -> None:
    out = _run(TUNE, {**LINEAR, "merge": True})
    before, after = load_trained(out / "stages" / "1-tune", "alpine"), load_trained(out, "alpine")
    assert not [name for name in after.variables if ".lora." in name]
    weights = sorted(name for name in after.variables if name.endswith("qkv.weight"))
    assert weights
    for name in weights:
        own = before.experiment.backbone.module.get_parameter(name).double()
        module = name.removesuffix(".weight")
        factors = (before.variables[f"{module}.lora.shared.{letter}"].double() for letter in "ba")
        left, right = factors
        assert torch.equal(after.variables[name], (own + left @ right).float())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    same_head = {**after.variables, **{n: before.variables[n] for n in ("head.weight", "head.bias")}}
    outputs = [before.model.forward(before.variables, images), after.model.forward(same_head, images)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_after_a_merge_the_same_tuner_starts_anew() -> None:
    out = _run(TUNE, {**TUNE, "name": "again", "merge": True})
    start = checkpoint.load(out / "sites" / "alpine" / stages.START)[0]
    assert not [name for name in start if ".lora." in name]
    frozen = [name for name in start if name.endswith("qkv.weight")]
    last = _served(out)
    assert bits({name: last[name] for name in frozen}) == bits({name: start[name] for name in frozen})
    assert [name for name in last if ".lora.shared." in name]


# ------------------------------------------------------------------------------------------------ wire and test split
def test_what_travels_in_each_stage_and_that_the_test_split_is_read_once(tmp_path: Path) -> None:
    settings = _config(LINEAR, TUNE, PERSONAL)
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
    said, found = check(_config(*each)).to_dict(), checkpoint.read_json(_run(*each) / "result.json")
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
    out = _run(LINEAR, TUNE, evaluation={"references": ["local", "pooled"]})
    found = checkpoint.read_json(out / "result.json")
    passes = found["image_passes"]
    assert found["references"]["local"]["image_passes"] == passes
    assert found["references"]["pooled"]["image_passes"]["total"] == passes["total"]
    first, last = (_served(folder / "references" / "local") for folder in (out / "stages" / "1-linear", out))
    assert set(first) < set(last)


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("each", "told"),
    [
        ([{**LINEAR, "epochs": 3}], r"unknown key: stages\.0\.epochs"),
        ([LINEAR, {**TUNE, "train": {"rounds": 0}}], r"stages\.1\.train\.rounds"),
        ([{**LINEAR, "train": {"round": 1}}], r"unknown key: stages\.0\.train\.round\b"),
        ([{**LINEAR, "task": {"classes": ["a"]}}], r"unknown key: stages\.0\.task"),
        ([LINEAR, LINEAR], "names of their own"),
        ([{**TUNE, "merge": True}], "nothing to merge"),
        ([LINEAR, {**TUNE, "head": {"kind": "mlp"}}], "one head"),
        ([{**LINEAR, "name": "../up"}], r"stages\.0\.name"),
        ([{**TUNE, "part": "a.b"}], r"stages\.0\.part"),
        ([{**TUNE, "tuner": {"name": "nothing"}}], "no tuners of this name"),
        ([{**TUNE, "tuner": {"name": "lora", "ranks": 3}}], "ranks"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_name(each: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _config(*each)


@pytest.mark.parametrize(
    ("each", "told"),
    [
        ([{**TUNE, "strategy": {"name": "fedper"}}, {**TUNE, "name": "then"}], "no common start"),
        ([{**TUNE, "strategy": {"name": "local"}}, {**LINEAR, "head": {"share": "shared"}}], "no common start"),
        ([LINEAR, {**TUNE, "part": "x", "strategy": {"name": "dual_lora"}}], r"stages\.1\.part \(tune\)"),
        ([TUNE, {**LINEAR, "head": {"share": "frozen"}}], "nothing is left to train"),
        ([TUNE, {**TUNE, "name": "wide", "tuner": {"name": "lora", "rank": 3}}], "has a LoRA already"),
        ([LINEAR, {**TUNE, "merge": True}], "nothing to merge"),
        ([LINEAR, {**TUNE, "strategy": {"name": "ensemble"}}], r"no stage among others[\s\S]*stages\.1\.strategy"),
        ([{**LINEAR, "strategy": {"name": "fedpft"}}, TUNE], r"sites send once[\s\S]*stages\.0\.strategy"),
        ([{**LINEAR, "strategy": {"name": "pooled"}}, TUNE], r"no stage among others[\s\S]*stages\.0\.strategy"),
        ([{**TUNE, "strategy": {"name": "local"}}, {**TUNE, "name": "m", "merge": True, "head": {"share": "personal"}}],
         "backbones of their own"),
        ([{"name": "b", "tuner": "bitfit"}, {**PERSONAL, "tuner": "bitfit", "part": "second"}], "bitfit"),
    ],
)  # fmt: skip
def test_an_impossible_sequence_is_refused_before_training(each: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _assembled(*each)


def test_a_key_that_every_stage_replaces_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.rounds has no effect"):
        _config({**LINEAR, "train": {"rounds": 1}}, {**TUNE, "train": {"rounds": 3}})


def test_a_start_that_is_lost_or_of_another_run_is_refused(tmp_path: Path) -> None:
    experiment = _assembled(LINEAR, TUNE)
    with pytest.raises(StateError, match="cannot be read"):
        stages.start(tmp_path, experiment)
    checkpoint.save(tmp_path / stages.START, {}, {"agreement": "another"})
    with pytest.raises(StateError, match="another run"):
        stages.start(tmp_path, experiment)


def test_a_changed_frozen_tensor_ends_the_run(tmp_path: Path) -> None:
    """The check at the end of every stage, with a site that moves what it should have left."""
    settings = _config(LINEAR, TUNE, PERSONAL)
    true = Coordinator.run

    def run_and_spoil(self: Coordinator) -> Any:
        progress = true(self)
        for path in (self.folder / "sites").glob("*/served.safetensors") if self.experiment.frozen else ():
            tensors, meta = checkpoint.load(path)
            checkpoint.save(path, {**tensors, "head.bias": tensors["head.bias"] + 1e-7}, meta)
        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "run", run_and_spoil)
        with pytest.raises(StateError, match=r"head\.bias"):
            run.run(settings, tmp_path)


# ------------------------------------------------------------------------------------------------ configurations
def test_a_stage_takes_from_the_tables_what_it_leaves_out() -> None:
    made = _config({**LINEAR, "train": {"local_steps": 3}}, TUNE, train={"local_epochs": 2.0}, tuner=LORA)
    first, second = made.at(0), made.at(1)
    assert (first.train.local_steps, first.train.local_epochs, first.train.rounds) == (3, None, 2)
    assert (second.train.local_steps, second.train.local_epochs) == (None, 2.0)
    assert second == made == made.at(1).at(1)
    assert config.from_dict(json.loads(json.dumps(made.to_dict()))).to_dict() == made.to_dict()


def test_the_preset_is_a_head_and_then_what_the_tables_say() -> None:
    plain = _config(tuner=LORA, strategy={"name": "fedprox", "mu": 0.1})
    made = _config(tuner=LORA, strategy={"name": "fedprox", "mu": 0.1}, stages="two_stage")
    warm, tune = made.stages
    assert (warm.tuner[0].name, warm.train.rounds, warm.train.learning_rate) == ("linear", 5, 0.01)
    assert (tune.tuner, tune.train, tune.strategy) == (plain.tuner, plain.train, plain.strategy) == (
        made.tuner, made.train, made.strategy)  # fmt: skip
    with pytest.raises(ConfigError, match=r"two_stage[\s\S]*three_stage"):
        _config(stages="three_stage")


def test_every_stage_draws_from_a_seed_of_its_own() -> None:
    made = _config(LINEAR, TUNE, PERSONAL)
    draws = [made.at(number).draws for number in range(3)]
    assert (draws[0], draws[2]) == (made.seed, made.draws)
    assert len(set(draws)) == 3
    assert made.model_copy(update={"seed": 7}).at(0).draws == 7


def test_the_report_shows_every_stage() -> None:
    out = _run(LINEAR, TUNE, PERSONAL)
    page = (out / "report.html").read_text()
    for name, rounds in (("linear", "1 to 2"), ("tune", "3 to 4"), ("own", "5 to 6")):
        assert page.count(f"<title>{name}</title>") >= 3, "a mark in every figure over rounds"
        assert rounds in page
    assert "lora r=2 combined by local" in page
    assert "in round 6" in page


# ------------------------------------------------------------------------------------------------ what comes after
def test_with_a_key_what_a_stage_hands_to_sites_is_encrypted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SITE_KEY", "0a" * 32)
    plain, out = _run(TUNE, PERSONAL, PERSONAL | {"name": "on"}), tmp_path / "run"
    run.run(_config(TUNE, PERSONAL, PERSONAL | {"name": "on"}, engine={"state_key_variable": "SITE_KEY"}), out)
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
    staged, folded = _run(LINEAR, TUNE, PERSONAL), _run(TUNE, {**TUNE, "name": "again", "merge": True})
    for number, out in enumerate((staged, folded)):
        assert (export(out, "timm", tmp_path / f"timm-{number}", "alpine") / "model.safetensors").is_file()
        loaded = load(export(out, "safetensors", tmp_path / f"own-{number}", "alpine"))
        assert bits(loaded.variables) == bits(_served(out))
    written = loads((export(staged, "peft", tmp_path / "peft", "alpine") / "adapter_model.safetensors").read_bytes())
    assert {len(value) for name, value in written.items() if "lora_A" in name} == {4}, "2 and 2, side by side"
    with pytest.raises(ConfigError, match="changed the backbone"):
        export(folded, "peft", tmp_path / "no", "alpine")
    mixed = _run({"name": "ia3", "tuner": "ia3"}, TUNE)
    with pytest.raises(ConfigError, match="peft has no such method"):
        export(mixed, "peft", tmp_path / "no", "alpine")


def test_a_run_in_stages_is_no_data_vector(tmp_path: Path) -> None:
    key = tmp_path / "key"
    signing.new_key(key)
    with pytest.raises(ConfigError, match="data vector"):
        export(_run(LINEAR, TUNE), "safetensors", tmp_path / "out", "alpine", sign=key)


# ------------------------------------------------------------------------------------------------ any strategy
SGD = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "clip_norm": 0, "learning_rate": 0.01}


@pytest.mark.parametrize("name", ["scaffold", "dual_lora", "moon", "fedex", "fedrep", "fedavg_finetune"])
def test_any_strategy_leaves_a_frozen_adapter_alone(name: str, tmp_path: Path) -> None:
    """Whatever a strategy trains, keeps and sends: it never sees the adapter of the stage before."""
    then = {"name": "then", "tuner": {**LORA, "targets": ["proj"]}, "strategy": {"name": name}}
    each = [TUNE, {**then, "train": SGD} if name == "scaffold" else then]
    out = run.run(_config(*each), tmp_path)
    for site in ("alpine", "harbour", "prairie"):
        before, after = _served(out / "stages" / "1-tune", site), _served(out, site)
        adapters = [name for name in before if ".lora." in name]
        assert bits({name: after[name] for name in adapters}) == bits({name: before[name] for name in adapters})
        own = [name for name in after if "proj.lora.shared.b" in name]
        assert own
        assert any(after[name].any() for name in own)
    experiment = assemble(_config(*each), checkpoint.read_json(out / "config.json")["classes"])
    assert not experiment.frozen.keys() & {name for way in (experiment.up, experiment.down) for name in way(1)}


def test_a_changed_backbone_stays_changed() -> None:
    """A rule that changes frozen weights: they go on to the next stage, and keep their bits there."""
    out = _run({**TUNE, "strategy": {"name": "fedex"}}, LINEAR)
    before, after = _served(out / "stages" / "1-tune"), _served(out)
    weights = [name for name in before if name.endswith("qkv.weight")]
    assert weights
    assert bits({name: after[name] for name in before if not name.startswith("head.")}) == bits(
        {name: value for name, value in before.items() if not name.startswith("head.")}
    )
