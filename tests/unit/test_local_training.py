"""The training loop against a plain one, written out slowly; what is drawn, kept, clipped and left alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from consilium import config, seeds
from consilium.data import Batch
from consilium.errors import ConfigError, TrainingError
from consilium.local.augment import normalise, to_float
from consilium.local.schedule import factor
from consilium.local.train import FALLBACK_LEARNING_RATE, Trainer, epoch_images, plan
from consilium.tensors import Tensors, equal
from tests import federation

COUNT = 14
EXAMPLES = federation.examples("a", COUNT, 0)
ADAMW: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 0.01, "clip_norm": 0}
MOMENTUM: dict[str, Any] = {**federation.SGD, "momentum": 0.9, "weight_decay": 0.1}


@lru_cache(maxsize=1)
def _pieces():
    return federation.assemble(federation.configure(tuner=[{"name": "lora", "rank": 4, "blocks": [0, 5]}]))


def _trainer(round: int = 1, state: dict[str, Tensor] | None = None, site: str = "a", **train: Any) -> Trainer:
    keys = {**federation.TABLE["train"], **train}
    setting = replace(_pieces().setting, config=config.TrainConfig.model_validate(keys))
    return Trainer(setting, EXAMPLES, round, site, [5, 5, 4], state if state is not None else {})


def _start() -> Tensors:
    draw = torch.Generator().manual_seed(1)
    start = _pieces().model.initial(3)
    return {name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in start.items()}


def _batch(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(EXAMPLES.images[EXAMPLES.rows[rows]])
    return normalise(to_float(pixels), _pieces().backbone.preprocessing), torch.from_numpy(EXAMPLES.labels[rows])


def _order(trainer: Trainer, purpose: str = "train") -> list[list[np.ndarray]]:
    generator = seeds.generator(3, round=trainer.round, site=trainer.site, purpose=f"{purpose}/order")
    return plan(COUNT, trainer.setting.config, None, generator)


def _slowly(trainer: Trainer, start: Tensors, steps: list[list[np.ndarray]], rates: Mapping[str, float]) -> Tensors:
    """torch's own optimiser, one group per tensor, written as one would by hand."""
    train = trainer.setting.config
    live = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [
        {"params": [live[name]], "lr": rates[name], "weight_decay": train.weight_decay if value.ndim > 1 else 0.0}
        for name, value in start.items()
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=train.momentum)
    for step in steps:
        images, labels = _batch(np.concatenate(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(_pieces().model.forward(live, images), labels).backward()
        torch.nn.utils.clip_grad_norm_(list(live.values()), train.clip_norm or math.inf)
        optimizer.step()
    return {name: value.detach() for name, value in live.items()}


def _close(first: Tensors, second: Tensors, tolerance: float = 1e-6) -> bool:
    return all(bool((first[name] - second[name]).abs().max() < tolerance) for name in second)


# ------------------------------------------------------------------------------------------------ the plain loop
@pytest.mark.parametrize("train", [federation.SGD, MOMENTUM, ADAMW, {**federation.SGD, "clip_norm": 0.05}])
def test_training_is_the_plain_loop(train: dict[str, Any]) -> None:
    trainer, start = _trainer(**train), _start()
    fitted = trainer.fit(start)
    steps = _order(trainer)
    assert [len(rows) for step in steps for rows in step] == [6, 6, 2]
    slow = _slowly(trainer, start, steps, dict.fromkeys(start, train.get("learning_rate", 0.05)))
    assert _close(fitted.variables, slow)
    assert not _close(start, slow, 1e-4)
    assert (fitted.num_steps, fitted.image_passes) == (3, COUNT)
    assert fitted.step_lengths == pytest.approx(dict.fromkeys(start, 3 * train.get("learning_rate", 0.05)))


def test_the_loss_is_the_mean_over_the_steps() -> None:
    trainer, start = _trainer(**{**federation.SGD, "learning_rate": 1e-9}), _start()
    losses = []
    for step in _order(trainer):
        images, labels = _batch(step[0])
        losses.append(float(torch.nn.functional.cross_entropy(_pieces().model.forward(start, images), labels)))
    assert trainer.fit(start).loss == pytest.approx(sum(losses) / 3, rel=1e-5)


@pytest.mark.parametrize("train", [federation.SGD, ADAMW])
def test_accumulation_is_the_large_batch(train: dict[str, Any]) -> None:
    small = _trainer(batch_size=2, accumulate=3, **train).fit(_start())
    large = _trainer(batch_size=6, **train).fit(_start())
    assert _close(small.variables, large.variables, 2e-6 if train is federation.SGD else 2e-4)
    assert small.num_steps == large.num_steps == 3
    assert small.loss == pytest.approx(large.loss, rel=1e-5)


def test_clipping_bounds_the_step() -> None:
    start = _start()
    for clip in (0.01, 0.1):
        moved = _trainer(**{**federation.SGD, "clip_norm": clip, "local_steps": 1}).fit(start).variables
        length = math.sqrt(sum(float((moved[n] - start[n]).square().sum()) for n in start))
        assert length == pytest.approx(clip * 0.05, rel=1e-3)


# ------------------------------------------------------------------------------------------------ length and order
@pytest.mark.parametrize(
    ("train", "epochs", "sizes"),
    [
        ({}, None, [4, 4, 2]),
        ({"local_epochs": 2}, None, [4, 4, 2, 4, 4, 2]),
        ({"local_epochs": 0.5}, None, [4, 1]),
        ({"local_epochs": 1.1}, None, [4, 4, 2, 1]),
        ({"local_epochs": 0.01}, None, [1]),
        ({"local_steps": 4}, None, [4, 4, 2, 4]),
        ({"local_steps": 4}, 0.2, [2]),
        ({"local_epochs": 3}, 0.2, [2]),
    ],
)
def test_a_round_is_as_long_as_asked(train: dict[str, Any], epochs: float | None, sizes: list[int]) -> None:
    settings = config.TrainConfig(batch_size=4, **train)
    steps = plan(10, settings, epochs, torch.Generator().manual_seed(0))
    assert [len(rows) for step in steps for rows in step] == sizes
    rows = np.concatenate([rows for step in steps for rows in step])
    assert len(set(rows[:10])) == min(len(rows), 10), "no image comes twice before all were seen"


def test_accumulated_steps_count_their_small_batches() -> None:
    settings = config.TrainConfig(batch_size=2, accumulate=3, local_steps=2)
    steps = plan(5, settings, None, torch.Generator().manual_seed(0))
    assert [[len(rows) for rows in step] for step in steps] == [[2, 2, 1], [2, 2, 1]]


def test_shares_of_an_epoch_are_not_rounded_by_binary_fractions() -> None:
    assert 0.07 * 100 > 7
    assert [epoch_images(share, 100) for share in (0.07, 1.1, 0.7, 0.301, 1 / 3)] == [7, 110, 70, 31, 34]


def test_every_epoch_and_round_and_site_and_purpose_has_an_order_of_its_own() -> None:
    orders = [
        np.concatenate([r for s in _order(_trainer(n, site=site), purpose) for r in s]).tolist()
        for n in (1, 2)
        for site in "ab"
        for purpose in ("train", "mixing")
    ]
    twice = np.concatenate(
        [r for s in plan(COUNT, config.TrainConfig(local_epochs=2), None, torch.Generator()) for r in s]
    )
    orders += [twice[:COUNT].tolist(), twice[COUNT:].tolist()]
    assert len({tuple(order) for order in orders}) == 10
    assert all(sorted(order) == list(range(COUNT)) for order in orders)


def test_no_images_or_nothing_to_train_leaves_everything() -> None:
    start = _start()
    for fitted in (
        replace(_trainer(), examples=federation.examples("a", 0, 0)).fit(start),
        _trainer().fit(start, only=lambda _: False),
    ):
        assert equal(fitted.variables, start)
        assert (fitted.num_steps, fitted.image_passes) == (0, 0)
        assert math.isnan(fitted.loss)


# ------------------------------------------------------------------------------------------------ schedule, moments
def test_the_schedule_runs_over_the_federation() -> None:
    schedule = {"name": "linear", "warmup": 0.0}
    lengths = [
        _trainer(number, rounds=4, **{**federation.SGD, "schedule": schedule}).fit(_start()).step_lengths["head.bias"]
        for number in (1, 2, 3, 4)
    ]
    each = [1 - (step + 0.5) / 12 for step in range(12)]
    assert lengths == pytest.approx([0.05 * sum(each[at : at + 3]) for at in (0, 3, 6, 9)])
    again = {**schedule, "restart": True}
    first, last = (
        _trainer(number, rounds=4, **{**federation.SGD, "schedule": again}).fit(_start()).step_lengths["head.bias"]
        for number in (1, 4)
    )
    assert first == pytest.approx(last)


def test_the_rate_of_a_step_is_the_schedules() -> None:
    schedule = config.Schedule(name="cosine", warmup=0.5)
    train = {**federation.SGD, "local_steps": 1, "rounds": 5, "schedule": schedule.model_dump(), "batch_size": COUNT}
    start = _start()
    moves = [_trainer(n, **train).fit(start).variables["head.bias"] - start["head.bias"] for n in (1, 3)]
    torch.testing.assert_close(moves[0] / factor(schedule, 0.1), moves[1] / factor(schedule, 0.5), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("train", [MOMENTUM, ADAMW])
def test_kept_moments_over_two_rounds_are_one_long_optimiser(train: dict[str, Any]) -> None:
    moments: dict[str, Tensor] = {}
    rounds = [_trainer(number, moments, moments="keep", **train) for number in (1, 2)]
    after_one = rounds[0].fit(_start()).variables
    kept = rounds[1].fit(after_one).variables
    steps = [*_order(rounds[0]), *_order(rounds[1])]
    rate = dict.fromkeys(_start(), train["learning_rate"])
    assert _close(kept, _slowly(rounds[0], _start(), steps, rate), 1e-5)
    reset = _trainer(2, **train).fit(after_one).variables
    assert not _close(kept, reset, 1e-4)


def test_moments_are_forgotten_unless_kept() -> None:
    moments: dict[str, Tensor] = {}
    _trainer(1, moments, **ADAMW).fit(_start())
    assert moments == {}


@pytest.mark.parametrize("purpose", ["plain", "head/second"])
def test_moments_are_kept_whatever_the_purpose_and_the_variables_are_called(purpose: str) -> None:
    moments: dict[str, Tensor] = {}
    start = {**_start(), "mix/weight": torch.ones(3)}
    for number in (1, 2):
        trainer = _trainer(number, moments, moments="keep", **{**ADAMW, "local_steps": 1})

        def objective(live: Tensors, batch: Batch, _: object, trainer: Trainer = trainer) -> Tensor:
            model = {name: value for name, value in live.items() if name != "mix/weight"}
            return trainer.loss(model, batch) + live["mix/weight"].square().sum()

        start = dict(trainer.fit(start, objective=objective, purpose=purpose).variables)
    steps = {key: float(value) for key, value in moments.items() if "/step/" in key}
    assert steps == {f"{purpose}/step/{name}": 2.0 for name in start}


def test_two_purposes_keep_their_moments_apart() -> None:
    moments: dict[str, Tensor] = {}
    trainer = _trainer(1, moments, moments="keep", **ADAMW)
    trainer.fit(_start())
    alone = {name: value.clone() for name, value in moments.items()}
    trainer.fit(_start(), purpose="second")
    assert {name.split("/")[0] for name in moments} == {"train", "second"}
    assert equal({name: moments[name] for name in alone}, alone)


# ------------------------------------------------------------------------------------------------ what is trained
def test_frozen_weights_are_trained_only_where_they_are_asked_for() -> None:
    name = "blocks.0.attn.qkv.weight"
    weight = dict(_pieces().backbone.module.named_parameters())[name].detach().clone()
    start = {**_start(), name: weight}
    fitted = _trainer(**ADAMW).fit(start)
    assert torch.equal(fitted.variables[name], weight)
    assert name not in fitted.step_lengths
    asked = _trainer(**ADAMW).fit(start, only=lambda tag: tag.slot == "base").variables
    assert [n for n, value in asked.items() if not torch.equal(value, start[n])] == [name]


def test_tokens_and_positions_are_not_pulled_to_zero() -> None:
    pieces = federation.assemble(federation.configure(tuner=[{"name": "full"}]))
    setting = replace(pieces.setting, config=config.TrainConfig.model_validate(ADAMW))
    decays = Trainer(setting, EXAMPLES, 1, "a", [5, 5, 4], {})._decays(list(pieces.model.specs))
    matrices = {name for name, spec in pieces.model.specs.items() if len(spec.shape) > 1}
    assert {name for name, decay in decays.items() if decay} == matrices - {"cls_token", "pos_embed"}


def test_moments_of_a_tuner_that_forgets_are_not_kept() -> None:
    forgetful = [replace(each, forgets_moments=True) for each in _pieces().model.attached]
    model = replace(_pieces().model, attached=tuple(forgetful))
    assert model.forgotten == {name for name, spec in model.specs.items() if spec.tag.role != "head"}
    moments: dict[str, Tensor] = {}
    trainer = _trainer(1, moments, moments="keep", **ADAMW)
    replace(trainer, setting=replace(trainer.setting, model=model)).fit(_start())
    assert {key.rpartition("/")[2] for key in moments} == {"head.bias", "head.weight"}


@pytest.mark.parametrize(
    ("aggregate", "kept"), [("mean", True), ("residual", True), ("product_svd", False), ("stack", False)]
)
def test_moments_of_factors_that_come_back_in_another_basis_are_not_kept(aggregate: str, kept: bool) -> None:
    pieces = federation.assemble(federation.configure(strategy={"name": "fedavg", "aggregate": aggregate}))
    moments: dict[str, Tensor] = {}
    trainer = _trainer(1, moments, moments="keep", **ADAMW)
    replace(trainer, setting=replace(pieces.setting, config=trainer.setting.config)).fit(pieces.model.initial(3))
    assert any("lora" in key for key in moments) == kept
    assert any("head" in key for key in moments)


def test_a_strategy_may_leave_some_of_it_untrained() -> None:
    trainer = _trainer()
    setting = replace(trainer.setting, trains=lambda tag, round: tag.role == "lora_b" and round == 2)
    start = _start()
    none, some = (replace(trainer, setting=setting, round=round).fit(start) for round in (1, 2))
    assert equal(none.variables, start)
    moved = {name for name, value in some.variables.items() if not torch.equal(value, start[name])}
    assert moved == {name for name, spec in setting.model.specs.items() if spec.tag.role == "lora_b"}


def test_a_factor_scales_the_tuners_rates_and_a_head_only_where_it_is_alone() -> None:
    plain, scaled = (
        _trainer(learning_rate=None, learning_rate_factor=f)._learning_rates(list(_start())) for f in (1, 4)
    )
    assert all(scaled[name] == plain[name] * (1 if name.startswith("head") else 4) for name in plain)
    head = federation.assemble(federation.configure(tuner=[{"name": "linear"}])).setting
    trainer = _trainer(learning_rate=None, learning_rate_factor=4)
    rates = replace(trainer, setting=replace(head, config=trainer.setting.config))._learning_rates(["head.bias"])
    assert rates["head.bias"] == 4 * head.model.learning_rates["head"]
    with pytest.raises(ConfigError, match="learning_rate replaces"):
        federation.configure(train={"learning_rate": 0.1, "learning_rate_factor": 2})


def test_what_is_not_selected_keeps_its_bits() -> None:
    start = _start()
    fitted = _trainer(**ADAMW).fit(start, only=lambda tag: tag.role == "lora_b").variables
    for name, value in start.items():
        assert torch.equal(fitted[name], value) != name.endswith(".b")


def test_roles_have_rates_of_their_own() -> None:
    train = {**federation.SGD, "local_steps": 2, "learning_rates": {"lora_b": 0.2}}
    trainer, start = _trainer(**train), _start()
    fitted = trainer.fit(start)
    rates = {name: 0.2 if name.endswith(".b") else 0.05 for name in start}
    assert fitted.step_lengths == pytest.approx({name: 2 * rate for name, rate in rates.items()})
    assert _close(fitted.variables, _slowly(trainer, start, _order(trainer), rates))


def test_without_a_rate_the_tuners_presets_hold() -> None:
    setting = replace(_pieces().setting, config=config.TrainConfig(local_steps=1))
    fitted = Trainer(setting, EXAMPLES, 1, "a", [5, 5, 4]).fit({**_start()})
    presets, specs = _pieces().model.learning_rates, _pieces().model.specs
    factor_now = factor(setting.config.schedule, 0.5 / setting.config.rounds)
    assert fitted.step_lengths == pytest.approx({n: presets[specs[n].tag.role] * factor_now for n in specs})


def _mixing(train: dict[str, Any], **given: Any) -> tuple[Tensor, dict[str, Any]]:
    """One number that mixes two models, learnt over a fixed pair."""
    trainer, old = _trainer(**train), _start()
    new = trainer.fit(old).variables
    fixed = {**{f"old/{n}": v for n, v in old.items()}, **{f"new/{n}": v for n, v in new.items()}}
    seen: dict[str, Any] = {}

    def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:
        seen["noise"] = torch.rand(1, generator=generator)
        seen["grad"] = {name for name, value in variables.items() if value.requires_grad}
        share = variables["share"]
        mixed = {n: variables[f"old/{n}"] + share * (variables[f"new/{n}"] - variables[f"old/{n}"]) for n in old}
        return trainer.loss(mixed, batch)

    fitted = trainer.fit({"share": torch.zeros(1)}, objective=objective, fixed=fixed, purpose="mixing", **given)
    assert fitted.variables.keys() == {"share"}
    seen["length"] = fitted.step_lengths["share"]
    return fitted.variables["share"], seen


def test_an_objective_over_other_variables() -> None:
    share, seen = _mixing(federation.SGD, learning_rate=2.0)
    assert share > 0, "the trained model is the better one"
    assert seen["grad"] == {"share"}
    assert seen["length"] == pytest.approx(3 * 2.0)
    assert torch.equal(seen["noise"], _mixing(federation.SGD, learning_rate=2.0)[1]["noise"])
    setting = replace(_pieces().setting, config=config.TrainConfig(local_steps=1))
    fitted = Trainer(setting, EXAMPLES, 1, "a", [5, 5, 4]).fit(
        {"x": torch.ones(1)}, objective=lambda v, *_: v["x"].sum()
    )
    assert fitted.step_lengths["x"] == pytest.approx(
        FALLBACK_LEARNING_RATE * factor(setting.config.schedule, 0.5 / setting.config.rounds)
    )


def test_after_every_step_variables_are_put_where_they_may_be() -> None:
    visited: list[float] = []

    def clamp(variables: Tensors) -> Tensors:
        visited.append(float(variables["share"]))
        return {"share": variables["share"].clamp(0.0, 0.5)}

    share, _ = _mixing(federation.SGD, learning_rate=500.0, after_step=clamp)
    assert len(visited) == 3
    assert max(visited) > 0.5
    assert 0 <= share <= 0.5


def test_variables_that_are_not_the_models_do_not_decay() -> None:
    trainer = _trainer(**{**MOMENTUM, "momentum": 0.0, "weight_decay": 0.5})
    still = {"mix": torch.ones(2, 2)}
    fitted = trainer.fit(still, objective=lambda v, *_: 0 * v["mix"].sum())
    assert equal(fitted.variables, still)
    model = trainer.fit(_start(), objective=lambda v, *_: 0 * v["head.weight"].sum()).variables
    assert model["head.weight"].norm() < _start()["head.weight"].norm()
    assert torch.equal(model["head.bias"], _start()["head.bias"])


def test_a_copy_of_a_variable_is_trained_like_it() -> None:
    train = {"optimizer": "adamw", "weight_decay": 0.5, "learning_rate": 0.01, "learning_rates": {"lora_b": 0.03}}
    moments: dict[str, Tensor] = {}
    trainer, start = _trainer(state=moments, moments="keep", **train), _start()
    setting = replace(trainer.setting, trains=lambda tag, _: tag.role != "lora_a", anew=frozenset({"head.bias"}))
    trainer, copies = replace(trainer, setting=setting), {f"v/{name}": value for name, value in start.items()}

    def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        return trainer.loss({name: variables[f"v/{name}"] for name in start}, batch)

    plain, copied = trainer.fit(start), trainer.fit(copies, objective=objective)
    assert equal({f"v/{name}": value for name, value in plain.variables.items()}, copied.variables)
    assert copied.step_lengths == {f"v/{name}": length for name, length in plain.step_lengths.items()}
    assert any(name.endswith("/v/head.weight") for name in moments)
    assert not any(name.endswith("head.bias") for name in moments)
    nothing = lambda v, *_: 0 * v["v/head.weight"].sum()  # noqa: E731
    own = trainer.fit(copies, objective=nothing, learning_rate=0.1, purpose="own")
    assert equal(own.variables, copies), "with a rate of its own it is no weight, and does not decay"


def test_what_enters_a_module_can_be_watched_with_its_gradient() -> None:
    trainer, start = _trainer(), {name: value.requires_grad_() for name, value in _start().items()}
    images, labels = _batch(np.arange(5))
    batch, modules = Batch(lambda: images, labels, torch.arange(5)), ["blocks.0.attn.qkv", "blocks.5.mlp.fc1"]
    model = trainer.setting.model
    with trainer.watch(modules) as seen:
        loss = trainer.loss(start, batch)
    assert seen.keys() == {*modules, ""}
    tokens = images.shape[-1] ** 2 // 16**2 + 1
    assert {seen[name].shape[:2] for name in modules} == {(5, tokens)}
    assert torch.equal(seen[""], model.features(start, images))
    head = torch.nn.functional.linear(seen[""], start["head.weight"], start["head.bias"])
    assert torch.equal(trainer.setting.task.loss(head, labels, [5, 5, 4]), loss)
    assert torch.autograd.grad(seen[modules[1]].square().sum(), start["blocks.0.attn.qkv.lora.shared.b"])[0].any()
    before = dict(seen)
    trainer.loss(_start(), batch)
    assert all(seen[name] is before[name] for name in seen), "closed"
    with pytest.raises(ConfigError, match="no such module"), trainer.watch(["blocks.99.attn.qkv"]):
        pass


def test_moments_of_what_enters_a_module_are_over_all_tokens_of_the_split() -> None:
    trainer, start = _trainer(), _start()
    modules = ["blocks.0.attn.qkv", "blocks.5.mlp.fc1"]
    images, _ = _batch(np.arange(len(trainer.examples)))
    with torch.no_grad(), trainer.setting.model.watch(modules) as seen:
        trainer.setting.model.features(start, images)
    found = trainer.second_moments(start, modules)
    assert found.keys() == set(modules)
    for name in modules:
        tokens = seen[name].flatten(0, 1).double()
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], tokens.T @ tokens / len(tokens), rtol=1e-5, atol=1e-6)
    assert equal(found, trainer.second_moments(start, modules)), "no draw, no augmentation"
    assert replace(trainer, examples=federation.examples("a", 0, 0)).second_moments(start, modules) == {}


def test_an_objective_that_needs_no_gradient_moves_nothing() -> None:
    fitted = _trainer(**federation.SGD).fit(_start(), objective=lambda *_: torch.tensor(1.0))
    assert equal(fitted.variables, _start())


# ------------------------------------------------------------------------------------------------ draws, precision
def test_dropout_is_drawn_from_round_and_site_and_leaves_the_global_generator_alone() -> None:
    train = config.TrainConfig.model_validate({**federation.TABLE["train"], **federation.SGD, "batch_size": COUNT})

    def fit(number: int, site: str, dropout: float = 0.5) -> Tensor:
        pieces = federation.assemble(federation.configure(tuner=[{"name": "lora", "rank": 4, "dropout": dropout}]))
        start = {name: value + 0.01 for name, value in pieces.model.initial(3).items()}
        fitted = Trainer(replace(pieces.setting, config=train), EXAMPLES, number, site, [5, 5, 4]).fit(start)
        return fitted.variables["blocks.0.attn.qkv.lora.shared.b"]

    torch.manual_seed(77)
    state = torch.random.get_rng_state()
    first = fit(1, "a")
    assert torch.equal(torch.random.get_rng_state(), state), "nothing was taken from it"
    torch.manual_seed(5)
    assert torch.equal(fit(1, "a"), first)
    noise = (fit(1, "a", 0.0) - fit(2, "b", 0.0)).abs().max()  # the same batch in another order
    for other in (fit(2, "a"), fit(1, "b")):
        assert (other - first).abs().max() > 100 * noise


def test_augmentation_is_drawn_from_round_and_site() -> None:
    train = {**federation.SGD, "augmentation": "dermoscopy"}
    first = _trainer(1, **train).fit(_start()).variables
    assert equal(_trainer(1, **train).fit(_start()).variables, first)
    assert not equal(_trainer(1, **federation.SGD).fit(_start()).variables, first)


def test_mixed_precision_comes_close_and_keeps_float32_variables() -> None:
    full = _trainer(**federation.SGD).fit(_start())
    half = _trainer(**{**federation.SGD, "precision": "bfloat16"}).fit(_start())
    assert all(value.dtype == torch.float32 for value in half.variables.values())
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    assert half.loss != full.loss


def test_half_precision_needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="float16 needs a GPU"):
            federation.assemble(federation.configure(train={"precision": "float16"}))


def test_a_loss_that_is_not_finite_names_the_site() -> None:
    with pytest.raises(TrainingError, match="site 'a' is not finite in round 1"):
        _trainer(**federation.SGD).fit(_start(), objective=lambda v, *_: v["head.bias"].sum() * math.inf)


def test_features_are_of_the_whole_split_without_augmentation() -> None:
    trainer = _trainer(augmentation="dermoscopy")
    features, labels = trainer.features(_start())
    images, truth = _batch(np.arange(COUNT))
    with torch.no_grad():
        expected = _pieces().model.features(_start(), images)
    torch.testing.assert_close(features, expected)
    assert torch.equal(labels, truth)
    assert trainer.num_examples == COUNT
