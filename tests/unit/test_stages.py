"""Stages: each begins with what the one before ended with, and leaves what it does not train as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from consilium import checkpoint, run, seeds, stages
from consilium.experiment import Experiment, assemble
from consilium.predict import load_trained
from tests.federation import bits
from tests.staged import LINEAR, LORA, PERSONAL, TUNE, configured, finished, served


# ------------------------------------------------------------------------------------------------ what is handed on
def test_one_stage_is_a_run_without_stages_bit_for_bit() -> None:
    plain, one = finished(tuner=LORA), finished(TUNE)
    for site in ("alpine", "harbour", "prairie"):
        assert bits(served(plain, site)) == bits(served(one, site))
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
    out = finished(LINEAR, TUNE, PERSONAL)
    for site in ("alpine", "harbour", "prairie"):
        second, last = served(out / "stages" / "2-tune", site), served(out, site)
        assert set(second) == {name for name in last if ".personal." not in name}
        assert bits(second) == bits({name: last[name] for name in second})
        own = [value for name, value in last.items() if name.endswith("personal.b")]
        assert own
        assert all(value.any() for value in own)
        assert bits({"": served(out / "stages" / "1-linear", site)["head.weight"]}) != bits({"": last["head.weight"]})


def test_a_stage_is_a_run_that_begins_with_the_end_of_the_one_before(tmp_path: Path) -> None:
    """By hand: a run of LoRA alone, with the stage's seed and the head that linear probing left."""
    out = finished(LINEAR, TUNE)
    head = served(out / "stages" / "1-linear")
    settings = configured(tuner=LORA).model_copy(update={"seed": seeds.derive(3, purpose="stage 2")})

    def initial(self: Experiment, seed: int) -> dict[str, Tensor]:
        return {**self.model.initial(seed), **head}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "initial", initial)
        patch.setattr(Experiment, "common", {})
        by_hand = run.run(settings, tmp_path / "by-hand")
    for site in ("alpine", "harbour", "prairie"):
        assert bits(served(out, site)) == bits(served(by_hand, site))


def test_a_personal_step_follows_the_gradient_of_the_whole_model(tmp_path: Path) -> None:
    """One step of plain gradient descent on the personal left factors, by hand in float64 up to rounding."""
    once = {"optimizer": "sgd", "learning_rate": 0.5, "clip_norm": 0, "weight_decay": 0, "rounds": 1, "local_steps": 1,
            "batch_size": 1000, "schedule": {"name": "constant", "warmup": 0}}  # fmt: skip
    settings = configured(LINEAR, TUNE, {**PERSONAL, "train": once})
    steps = stages.steps(settings, tmp_path)
    out = run.run(settings, tmp_path)
    prepared = run.prepare(settings, lambda _: None)
    experiment = assemble(steps[-1][0], prepared.classes)
    after, before = served(out), served(out / "stages" / "2-tune")
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
    out = finished({**TUNE, "strategy": {"name": "fedper"}}, {**PERSONAL, "strategy": {"name": "fedavg"}})
    first = {site: served(out / "stages" / "1-tune", site) for site in ("alpine", "harbour")}
    last = {site: served(out, site) for site in ("alpine", "harbour")}
    assert not torch.equal(first["alpine"]["head.weight"], first["harbour"]["head.weight"])
    for site in first:
        assert torch.equal(first[site]["head.weight"], last[site]["head.weight"])
    assert not (out / "adapters" / "global.safetensors").exists()


def test_a_second_shared_adapter_trains_beside_the_first() -> None:
    out = finished(TUNE, {**TUNE, "name": "again", "part": "second", "tuner": {"name": "lora", "rank": 3}})
    before, after = served(out / "stages" / "1-tune"), served(out)
    adapters = [name for name in before if ".lora." in name]
    assert bits({name: after[name] for name in adapters}) == bits({name: before[name] for name in adapters})
    assert {after[name].shape[0] for name in after if name.endswith("second.a")} == {3}
    shared = checkpoint.load(out / "adapters" / "global.safetensors")[0]
    assert bits(shared) == bits(after)


def test_selection_is_per_stage_and_the_next_begins_with_the_chosen_round() -> None:
    best = {"serve": "best"}
    out = finished({**LINEAR, "evaluation": best}, TUNE, train={"rounds": 3, "learning_rate": 1.0})
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
    out = finished(TUNE, {**LINEAR, "merge": True})
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
    out = finished(TUNE, {**TUNE, "name": "again", "merge": True})
    start = checkpoint.load(out / "sites" / "alpine" / stages.START)[0]
    assert not [name for name in start if ".lora." in name]
    frozen = [name for name in start if name.endswith("qkv.weight")]
    last = served(out)
    assert bits({name: last[name] for name in frozen}) == bits({name: start[name] for name in frozen})
    assert [name for name in last if ".lora.shared." in name]


# ------------------------------------------------------------------------------------------------ any strategy
SGD = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "clip_norm": 0, "learning_rate": 0.01}


@pytest.mark.parametrize("name", ["scaffold", "dual_lora", "moon", "fedex", "fedrep", "fedavg_finetune"])
def test_any_strategy_leaves_a_frozen_adapter_alone(name: str, tmp_path: Path) -> None:
    """Whatever a strategy trains, keeps and sends: it never sees the adapter of the stage before."""
    then = {"name": "then", "tuner": {**LORA, "targets": ["proj"]}, "strategy": {"name": name}}
    each = [TUNE, {**then, "train": SGD} if name == "scaffold" else then]
    out = run.run(configured(*each), tmp_path)
    for site in ("alpine", "harbour", "prairie"):
        before, after = served(out / "stages" / "1-tune", site), served(out, site)
        adapters = [name for name in before if ".lora." in name]
        assert bits({name: after[name] for name in adapters}) == bits({name: before[name] for name in adapters})
        own = [name for name in after if "proj.lora.shared.b" in name]
        assert own
        assert any(after[name].any() for name in own)
    experiment = assemble(configured(*each), checkpoint.read_json(out / "config.json")["classes"])
    assert not experiment.frozen.keys() & {name for way in (experiment.up, experiment.down) for name in way(1)}


def test_a_changed_backbone_stays_changed() -> None:
    """A rule that changes frozen weights: they go on to the next stage, and keep their bits there."""
    out = finished({**TUNE, "strategy": {"name": "fedex"}}, LINEAR)
    before, after = served(out / "stages" / "1-tune"), served(out)
    weights = [name for name in before if name.endswith("qkv.weight")]
    assert weights
    assert bits({name: after[name] for name in before if not name.startswith("head.")}) == bits(
        {name: value for name, value in before.items() if not name.startswith("head.")}
    )
