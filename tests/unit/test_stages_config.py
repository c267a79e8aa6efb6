"""Stages: their configuration, and sequences that cannot be, which are refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from consilium import checkpoint, config, run, stages
from consilium.coordinator import Coordinator
from consilium.errors import ConfigError, StateError
from tests.staged import LINEAR, LORA, PERSONAL, TUNE, assembled, configured


# ------------------------------------------------------------------------------------------------ configurations
def test_a_stage_takes_from_the_tables_what_it_leaves_out() -> None:
    made = configured({**LINEAR, "train": {"local_steps": 3}}, TUNE, train={"local_epochs": 2.0}, tuner=LORA)
    first, second = made.at(0), made.at(1)
    assert (first.train.local_steps, first.train.local_epochs, first.train.rounds) == (3, None, 2)
    assert (second.train.local_steps, second.train.local_epochs) == (None, 2.0)
    assert second == made == made.at(1).at(1)
    assert config.from_dict(json.loads(json.dumps(made.to_dict()))).to_dict() == made.to_dict()


def test_the_preset_is_a_head_and_then_what_the_tables_say() -> None:
    plain = configured(tuner=LORA, strategy={"name": "fedprox", "mu": 0.1})
    made = configured(tuner=LORA, strategy={"name": "fedprox", "mu": 0.1}, stages="two_stage")
    warm, tune = made.stages
    assert (warm.tuner[0].name, warm.train.rounds, warm.train.learning_rate) == ("linear", 5, 0.01)
    assert (tune.tuner, tune.train, tune.strategy) == (plain.tuner, plain.train, plain.strategy) == (
        made.tuner, made.train, made.strategy)  # fmt: skip
    with pytest.raises(ConfigError, match=r"two_stage[\s\S]*three_stage"):
        configured(stages="three_stage")


def test_every_stage_draws_from_a_seed_of_its_own() -> None:
    made = configured(LINEAR, TUNE, PERSONAL)
    draws = [made.at(number).draws for number in range(3)]
    assert (draws[0], draws[2]) == (made.seed, made.draws)
    assert len(set(draws)) == 3
    assert made.model_copy(update={"seed": 7}).at(0).draws == 7


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
        configured(*each)


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
        assembled(*each)


def test_a_key_that_every_stage_replaces_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.rounds has no effect"):
        configured({**LINEAR, "train": {"rounds": 1}}, {**TUNE, "train": {"rounds": 3}})


def test_a_start_that_is_lost_or_of_another_run_is_refused(tmp_path: Path) -> None:
    experiment = assembled(LINEAR, TUNE)
    with pytest.raises(StateError, match="cannot be read"):
        stages.start(tmp_path, experiment)
    checkpoint.save(tmp_path / stages.START, {}, {"agreement": "another"})
    with pytest.raises(StateError, match="another run"):
        stages.start(tmp_path, experiment)


def test_a_changed_frozen_tensor_ends_the_run(tmp_path: Path) -> None:
    """The check at the end of every stage, with a site that moves what it should have left."""
    settings = configured(LINEAR, TUNE, PERSONAL)
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
