"""Sites that train as one batch get what each gets alone: every tuner, federations, failures, resumed runs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import config, experiment, registry, run
from consilium.backbones import compiled
from consilium.check import check
from consilium.config import HeadConfig
from consilium.engines import stacked
from consilium.engines.site import Site
from consilium.errors import ConfigError
from consilium.local.seats import Seat, Table, together
from consilium.local.train import Trainer
from consilium.protocols import Declaration, Part
from consilium.tensors import Tensors, equal
from consilium.tuners import compose, stacking
from tests import federation, small, variants
from tests.e2e.runs import CONFIG, assert_same, read

VARIANTS = sorted({**variants.TUNERS, **variants.HYBRIDS})
NEVER = {"attention", "bitfit", "full", "norm", "lora dora", "stochastic_block", "stochastic_block site"}
NEVER |= {"norm + adapter + ia3", "bitfit + lora + low_rank_prompts"}
CLASSES, SITES, ROWS = 4, 3, 2
HOSPITALS = federation.hospitals(14, 9, 20, 11)  # batches of 6 and of what is left
LIMIT = 300  # seconds after which a run that waits for itself fails its test


def _built(variant: str) -> list[Any]:
    return [registry.build("tuners", t.pop("name"), t) for t in map(dict, variants.table(variant))]  # type: ignore[arg-type]


def _settings(number: int | str, variant: str = "lora", strategy: str = "fedavg", **tables: Any) -> config.Config:
    train = {**federation.TABLE["train"], "rounds": 2, **tables.pop("train", {})}
    engine = {"device": "cpu", "stacked_sites": number}
    chosen = {"tuner": variants.table(variant), "strategy": {"name": strategy}, "train": train, "engine": engine}
    return federation.configure(**chosen, **tables)


def _run(folder: Path, settings: config.Config, **keys: Any) -> federation.Outcome:
    """In a thread of its own, so that a run that hangs is a failure and not the end of the tests."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(federation.run, folder, settings, HOSPITALS, **keys).result(timeout=LIMIT)
    finally:
        pool.shutdown(wait=False)


def _assert_alike(one: federation.Outcome, other: federation.Outcome, relative: float = 1e-5) -> None:
    pairs = [(one.shared, other.shared), *((one.served(site), other.served(site)) for site in HOSPITALS)]
    for first, second in pairs:
        assert first.keys() == second.keys()
        for name in first:
            assert (first[name] - second[name]).norm() <= relative * (1 + first[name].norm()), name


# ------------------------------------------------------------------------------------------------ tuners
ONE, TWO = (Part(),), (Part(), Part("personal", personal=True))
STACKABLE = sorted(set(VARIANTS) - NEVER)
OTHERS = sorted(set(small.MAKES) - {"vit"})
HEADS = {"linear": HeadConfig(), "mlp": HeadConfig(kind="mlp", hidden=8), "frozen": HeadConfig(share="frozen")}
MODELS = [
    *((variant, "vit", "linear", ONE) for variant in STACKABLE),
    *((variant, "vit", "mlp", TWO) for variant in STACKABLE),
    *((variant, make, "linear", TWO) for variant in sorted(variants.TUNERS.keys() - NEVER) for make in OTHERS),
    ("lora", "vit", "frozen", ONE),
]


@pytest.mark.parametrize(
    ("variant", "make", "head", "parts"), MODELS, ids=lambda each: str(len(each)) if isinstance(each, tuple) else each
)
def test_a_stackable_tuner_gives_every_site_its_own_outputs_and_gradients(
    variant: str, make: str, head: str, parts: tuple[Part, ...]
) -> None:
    backbone = small.backbone(make)
    backbone.module.double()
    model = compose.attach(backbone, _built(variant), HEADS[head], CLASSES, Declaration(parts=parts), 0)
    model = replace(model, head_start={name: value.double() for name, value in model.head_start.items()})
    sites = [
        {n: (v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(site))).double().requires_grad_()
         for n, v in model.initial(site).items()}
        for site in range(SITES)
    ]  # fmt: skip
    images = [small.images(SITES * ROWS)[at::SITES].double() for at in range(SITES)]
    alone = [model.forward(own, x) for own, x in zip(sites, images, strict=True)]
    wanted = [_gradients(outputs, own) for outputs, own in zip(alone, sites, strict=True)]
    joint = {name: torch.stack([own[name] for own in sites]) for name in sites[0]}
    outputs = model.forward(joint, torch.cat(images)).chunk(SITES)
    torch.testing.assert_close(outputs, alone, rtol=1e-10, atol=1e-10)
    for number, own in enumerate(sites):
        found = _gradients(outputs[number], own)
        torch.testing.assert_close(found, wanted[number], rtol=1e-9, atol=1e-11)


def _gradients(outputs: Tensor, own: Tensors) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs.square().sum(), list(own.values()), retain_graph=True)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (3, 1, 2, 5)], ids=str)
@pytest.mark.parametrize("bias", [None, torch.randn(3, 7, dtype=torch.float64)], ids=["plain", "bias"])
def test_the_product_of_a_gpu_is_that_of_a_processor(shape: tuple[int, ...], bias: Tensor | None) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(stacking.batched(x, weight, bias), stacking.one_by_one(x, weight, bias))
    assert stacking.affine(x, weight, bias).shape == (*shape[:-1], 7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tuner_that_cannot_be_stacked_trains_in_turns_and_an_explicit_number_is_refused(variant: str) -> None:
    pieces = federation.assemble(_settings("auto", variant, train={"batch_size": 1}))
    assert bool(pieces.never_stacked) == (variant in NEVER)
    number = stacked.resolved(pieces, 16).config.engine.stacked_sites
    assert (number == 1) == (variant in {*NEVER, "linear"})  # a head on cached features leaves nothing to share
    explicit = federation.assemble(_settings(2, variant))
    if variant in NEVER:
        with pytest.raises(ConfigError, match=r"several sites in one batch[\s\S]*engine\.stacked_sites"):
            stacked.resolved(explicit, 4)
    else:
        assert stacked.resolved(explicit, 4).config == explicit.config


@pytest.mark.parametrize("name", ["lora", "adapter", "prompts", "low_rank_prompts"])
def test_dropout_which_draws_for_the_whole_batch_keeps_sites_apart(name: str) -> None:
    table = [{**variants.table(name)[0], "dropout": 0.1}]
    assert federation.assemble(federation.configure(tuner=table)).never_stacked


def test_a_strategy_that_changes_frozen_weights_keeps_sites_apart() -> None:
    assert "frozen weights" in federation.assemble(_settings("auto", strategy="flora")).never_stacked


# ------------------------------------------------------------------------------------------------ federations
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "one round": ("fedavg", {"train": {"rounds": 1}}),
    "fedavg kept moments": ("fedavg", {"train": {"moments": "keep", "clip_norm": 0.05}}),
    "fedprox accumulates": ("fedprox", {"train": {"accumulate": 2, "local_epochs": 1.5}}),
    "fedper mlp": ("fedper", {"head": {"kind": "mlp", "hidden": 8}, "train": {"learning_rates": {"head": 0.002}}}),
    "half, class weights": ("fedavg", {"task": {"class_weight": "inverse"}, "train": {"participation": 0.75}}),
    "sgd steps": ("local", {"train": {**federation.SGD, "momentum": 0.9, "local_steps": 5}}),
    "augmented": ("fedavg", {"train": {"augmentation": "dermoscopy", "schedule": {"name": "cosine"}}}),
}
CASES = [*((variant, "one round") for variant in STACKABLE), *(("lora", way) for way in WAYS)]
CASES += [("lora frozen a", "fedprox accumulates"), ("prompts deep", "fedper mlp"), ("lora + prompts", "sgd steps")]


@pytest.mark.parametrize(("variant", "way"), sorted(set(CASES)))
def test_a_stacked_federation_is_the_sequential_one(tmp_path: Path, variant: str, way: str) -> None:
    strategy, tables = WAYS[way]
    one, three = (
        _run(tmp_path / str(number), _settings(number, variant, strategy, **tables)) for number in (1, 3)
    )  # a, b, c together, d alone
    _assert_alike(one, three)


@pytest.mark.parametrize("strategy", variants.FEDERATED)
def test_every_strategy_can_be_stacked_or_says_why_not(tmp_path: Path, strategy: str) -> None:
    chosen = [
        variants.settings(strategy, train={"rounds": 2, "local_epochs": 0.5}, engine={"stacked_sites": number})
        for number in (1, 4)
    ]
    if federation.assemble(chosen[0]).never_stacked:
        return
    _assert_alike(*(_run(tmp_path / str(number), settings) for number, settings in enumerate(chosen)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputed_blocks_and_mixed_precision(tmp_path: Path, precision: str) -> None:
    train = {"precision": precision, "rounds": 1}
    outcomes = []
    for number in (1, 4):
        settings = _settings(number, train=train)
        engine = settings.engine.model_copy(update={"gradient_checkpointing": True})
        outcomes.append(_run(tmp_path / str(number), settings.model_copy(update={"engine": engine})))
    _assert_alike(*outcomes, 1e-5 if precision == "float32" else 0.03)


def test_sites_are_really_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = Table.forward
    monkeypatch.setattr(Table, "forward", lambda self, wishes: sizes.append(len(wishes)) or original(self, wishes))
    _run(tmp_path, _settings(4, train={"rounds": 1}))
    assert sizes == [4, 2]  # all with six images, then a and c, who have six more; what is left differs


# ------------------------------------------------------------------------------------------------ failures
@pytest.mark.parametrize("site", "abc")
def test_a_site_that_fails_leaves_the_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    """In the middle of a step, when the others wait for it."""
    settings, original = _settings(4, train={"quorum": 0.5, "rounds": 1}), Trainer.loss

    def fails(self: Trainer, variables: Tensors, batch: Any) -> Tensor:
        if self.site == site and len(batch.labels) == 6:
            raise OSError("no power")
        return original(self, variables, batch)

    monkeypatch.setattr(Trainer, "loss", fails)
    one, four = (_run(tmp_path / str(n), config.from_dict(_with(settings, n))) for n in (1, 4))
    _assert_alike(one, four)
    assert [event["sites"][site]["status"] for event in four.events if event["event"] == "round"] == ["error"]


def _with(settings: config.Config, number: int) -> dict[str, Any]:
    plain = settings.to_dict()
    return {**plain, "engine": {**plain["engine"], "stacked_sites": number}}


def test_non_finite_numbers_stay_with_their_site() -> None:
    pieces = federation.assemble(_settings(1))
    trainers = {n: Trainer(pieces.setting, data.train, 1, n, [5, 5, 4]) for n, data in HOSPITALS.items()}
    start = pieces.model.initial(3)
    bad = {name: torch.full_like(value, torch.nan) for name, value in start.items()}

    def work(site: str, seat: Seat | None) -> Tensors | str:
        try:
            return replace(trainers[site], seat=seat).fit(bad if site == "b" else start).variables
        except Exception as error:
            return type(error).__name__

    table = Table(pieces.model, "cpu", "float32")
    found = together({site: lambda seat, site=site: work(site, seat) for site in trainers}, table)
    assert found["b"] == "TrainingError"
    for site in "acd":
        torch.testing.assert_close(found[site], work(site, None), rtol=1e-5, atol=1e-7)


class _Stop(Exception):
    pass


def test_a_stacked_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    def stop(told: Mapping[str, Any]) -> None:
        if (told["event"], told.get("round")) == ("site", 2):
            raise _Stop

    settings = _settings(3, strategy="fedper", train={"rounds": 3, "participation": 0.75, "moments": "keep"})
    whole = _run(tmp_path / "whole", settings)
    with pytest.raises(_Stop):
        _run(tmp_path / "stopped", settings, display=stop)
    resumed = _run(tmp_path / "stopped", settings)
    assert equal(resumed.shared, whole.shared)
    assert all(equal(resumed.served(site), whole.served(site)) for site in HOSPITALS)


def test_the_work_of_sites_is_not_counted_once_for_each_that_waits(tmp_path: Path) -> None:
    outcome = _run(tmp_path, _settings(4))
    assert 0 < sum(outcome.progress.site_seconds.values()) <= outcome.progress.seconds


# ------------------------------------------------------------------------------------------------ which sites, how many
def test_groups_follow_the_names_and_only_sites_that_train_make_one(tmp_path: Path) -> None:
    outcome = _run(tmp_path, _settings(3))
    down = [(outcome.decode("down", data).kind, site, data) for way, site, data in outcome.wire if way == "down"]
    rounds = {site: data for kind, site, data in reversed(down) if kind == "round"}
    finish = {site: data for kind, site, data in down if kind == "finish"}
    assert stacked.groups(rounds, _settings(3)) == [("a", "b", "c"), ("d",)]
    assert stacked.groups({**rounds, "a": b"damaged"}, _settings(3)) == [("a",), ("b",), ("c",), ("d",)]
    assert stacked.groups({}, _settings(3)) == []
    assert stacked.groups(finish, _settings(3)) == [("a",), ("b",), ("c",), ("d",)]
    assert stacked.groups(rounds, _settings("auto")) == [("a",), ("b",), ("c",), ("d",)]


def test_auto_is_decided_by_sizes_and_changes_nothing_where_batches_are_large() -> None:
    def number(sites: int, batch: int, **engine: Any) -> object:
        settings = _settings("auto", train={"batch_size": batch})
        keys = settings.engine.model_copy(update=engine)
        pieces = experiment.assemble(settings.model_copy(update={"engine": keys}), federation.CLASSES)
        return stacked.resolved(pieces, sites).config.engine.stacked_sites

    assert number(100, config.TrainConfig().batch_size) == 1
    assert [number(sites, 1) for sites in (1, 8, 15, 16, 100)] == [1, 1, 1, 4, 8]
    assert number(100, 1, workers=3) == number(100, 1)
    assert number(100, 5) == 1


def _prepared(folder: Path, *settings: str) -> config.Config:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.toml").write_text(CONFIG)
    without = ("tuner.0.dropout=0", "train.augmentation=none", *settings)
    return config.load(folder / "tiny.toml", [f"engine.cache={folder / 'cache'}", *without])


def test_workers_do_not_matter_and_the_number_is_written_down_and_hashed(tmp_path: Path) -> None:
    keys = ("engine.stacked_sites=2", "evaluation.references=['pooled']")
    one = run.run(_prepared(tmp_path, *keys, "engine.workers=1"), tmp_path / "one")
    two = run.run(_prepared(tmp_path, *keys, "engine.workers=2"), tmp_path / "two")
    assert_same(one, two)
    auto = run.run(_prepared(tmp_path, "train.rounds=1"), tmp_path / "auto")
    explicit = run.run(_prepared(tmp_path, "train.rounds=1", "engine.stacked_sites=1"), tmp_path / "explicit")
    assert read(auto / "config.json")["config"]["engine"]["stacked_sites"] == 1
    assert read(auto / "config.json")["config_hash"] == read(explicit / "config.json")["config_hash"]
    assert read(one / "config.json")["config_hash"] != read(auto / "config.json")["config_hash"]


def test_check_shows_the_number_and_the_memory_it_takes(tmp_path: Path) -> None:
    alone, four = (check(_prepared(tmp_path, f"engine.stacked_sites={number}")) for number in ("'auto'", 4))
    assert (alone.stacked_sites, four.stacked_sites) == (1, 4)
    assert four.memory_bytes["activations"] == 4 * alone.memory_bytes["activations"]


def test_a_site_alone_in_its_group_has_no_seat() -> None:
    seats: list[Seat | None] = []

    def site(name: str, seat: Seat | None) -> Site:
        seats.append(seat)
        return Site(federation.assemble(_settings(1)), HOSPITALS[name], Path(), 0, seat)

    stacked.answers(federation.assemble(_settings(1)), {"a": b""}, site)
    assert seats == [None]


def test_no_more_sites_go_together_than_a_round_draws() -> None:
    def number(sites: int, **train: float) -> object:
        pieces = federation.assemble(_settings(50, train=train))
        return stacked.resolved(pieces, sites).config.engine.stacked_sites

    assert (number(3), number(80), number(20, participation=0.25), number(2, participation=0.1)) == (3, 50, 5, 1)


def test_blocks_compiled_for_a_processor_are_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "by_block", lambda *_: None)
    table = {"device": "cpu", "compile": True}
    with pytest.raises(ConfigError, match=r"compiled blocks[\s\S]*engine\.stacked_sites"):
        stacked.resolved(federation.assemble(federation.configure(engine={**table, "stacked_sites": 3})), 3)
    alone = stacked.resolved(federation.assemble(federation.configure(engine=table)), 16)
    assert alone.config.engine.stacked_sites == 1
