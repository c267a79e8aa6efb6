"""What a run will cost is counted, not guessed; the references train on as many images as the run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium import config, coordinator, payload, registry
from consilium.check import check, predicted_bytes
from consilium.errors import ConfigError, DataError, WireError
from consilium.experiment import Experiment
from consilium.messages import Reply, encode
from consilium.protocols import Declaration
from consilium.references import reference_config
from consilium.sites import audit
from consilium.sites.manifest import Manifest
from consilium.strategies.fedavg import FedAvg
from tests import federation, hospitals

HUGE = 10**6


def _train(**keys: Any) -> config.Config:
    return federation.configure(train=keys)


# ------------------------------------------------------------------------------------------------ images
def _slowly(images: int, batch: int, epochs: float | None, steps: int | None) -> int:
    """Images of one round, one after the other: an epoch sees each once and ends with what is left."""
    seen, taken, left = 0, 0, images
    goal = math.ceil((epochs or 1.0) * images) if steps is None else math.inf
    while seen < goal and (steps is None or taken < steps):
        size = int(min(batch, left, goal - seen))
        seen, taken, left = seen + size, taken + 1, left - size
        left = left or images
    return seen


@given(
    images=st.integers(1, 60),
    batch=st.integers(1, 20),
    accumulate=st.integers(1, 3),
    length=st.one_of(
        st.none(),
        st.tuples(st.just("local_epochs"), st.sampled_from([0.1, 0.5, 1.0, 1.1, 2.7])),
        st.tuples(st.just("local_steps"), st.integers(1, 9)),
    ),
)
def test_images_are_counted_as_they_are_seen(
    images: int, batch: int, accumulate: int, length: tuple[str, Any] | None
) -> None:
    keys = dict([length]) if length else {}
    settings = _train(rounds=3, batch_size=batch, accumulate=accumulate, **keys)
    steps = keys.get("local_steps")
    expected = 3 * _slowly(images, batch, keys.get("local_epochs"), steps and steps * accumulate)
    assert coordinator.predicted_passes(settings, {"a": images}) == {"a": expected}


def test_a_site_sees_nothing_in_rounds_it_is_not_drawn_for() -> None:
    settings, images = _train(rounds=7, participation=0.5), {"a": 10, "b": 20, "c": 30}
    rounds = [coordinator.drawn_sites(0.5, sorted(images), settings.seed, number) for number in range(1, 8)]
    expected = {site: 10 * "_abc".index(site) * sum(site in drawn for drawn in rounds) for site in images}
    assert coordinator.predicted_passes(settings, images) == expected
    assert {len(drawn) for drawn in rounds} == {2}


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    batch=st.integers(1, 16),
    participation=st.sampled_from([1.0, 0.5, 0.3]),
    length=st.sampled_from([{}, {"local_epochs": 0.3}, {"local_epochs": 1.5}, {"local_steps": 3}]),
)
def test_references_see_as_many_images(
    sizes: list[int], batch: int, participation: float, length: dict[str, Any]
) -> None:
    images = {f"site{number}": size for number, size in enumerate(sizes)}
    settings = _train(rounds=4, batch_size=batch, participation=participation, **length)
    passes = coordinator.predicted_passes(settings, images)
    assert coordinator.predicted_passes(reference_config(settings, "local", images), images) == passes
    pooled = reference_config(settings, "pooled", images)
    in_all = coordinator.predicted_passes(pooled, {"pooled": sum(sizes)})["pooled"]
    assert in_all % 4 == 0
    assert abs(in_all - sum(passes.values())) <= 2, "the nearest number that is the same in every round"


@pytest.mark.parametrize("length", [{}, {"local_epochs": 0.25}, {"local_epochs": 1.5}, {"local_steps": 3}])
@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "ditto"},
        {"name": "feddpa_t"},
        {"name": "fedrep", "head_epochs": 0.5},
        {"name": "fedavg_finetune", "finetune_epochs": 2.0},
    ],
)
def test_a_site_alone_works_as_long_as_in_a_strategy_of_several_phases(
    strategy: dict[str, Any], length: dict[str, Any]
) -> None:
    images = {"a": 90, "b": 33}
    settings = federation.configure(strategy=strategy, train={"rounds": 8, "batch_size": 8, **length})
    alone = reference_config(settings, "local", images)
    plain = settings.model_copy(update={"strategy": config.StrategyConfig(name="local")})
    asked, found, less = (sum(coordinator.predicted_passes(each, images).values()) for each in (settings, alone, plain))
    rounding = 8 * len(images) * (8 if "local_steps" in length else 1)  # whole steps, or whole images, in every round
    assert abs(found - asked) <= rounding
    assert asked > less
    assert reference_config(plain, "local", images).train == plain.train


def test_a_reference_differs_in_nothing_else() -> None:
    settings = federation.configure(strategy={"name": "fedprox", "mu": 0.1}, evaluation={"references": ["local"]})
    alone = reference_config(settings, "local", {"a": 9, "b": 12})
    assert (alone.strategy.name, alone.strategy.options(), alone.evaluation.references) == ("local", {}, ())
    assert alone.train == settings.train
    for name in ("seed", "sites", "task", "backbone", "tuner", "head", "engine"):
        assert getattr(alone, name) == getattr(settings, name)
    pooled = reference_config(settings, "pooled", {"a": 9, "b": 12})
    assert pooled.train == settings.train.model_copy(update={"local_epochs": 1.0})
    other = settings.model_copy(update={"strategy": config.StrategyConfig(name="fedavg")})
    assert reference_config(other, "pooled", {"a": 9, "b": 12}) == pooled


@pytest.mark.parametrize("tuner", ["lora", "linear"])
def test_a_head_that_was_to_be_shared_does_not_stay(tuner: str) -> None:
    asked = federation.configure(tuner=[{"name": tuner}], head={"share": "shared"})
    federation.assemble(asked)
    with pytest.raises(ConfigError, match="contradicts"):
        federation.assemble(asked.model_copy(update={"strategy": config.StrategyConfig(name="fedper")}))
    for name in ("local", "pooled"):  # references share nothing, whatever the run does
        federation.assemble(reference_config(asked, name, {"a": 9, "b": 12}))


# ------------------------------------------------------------------------------------------------ bytes
@pytest.mark.parametrize("serve", ["last", "best"])
def test_bytes_of_full_participation_by_hand(serve: str) -> None:
    settings = federation.configure(evaluation={"serve": serve})
    pieces = federation.assemble(settings)
    found = predicted_bytes(pieces, ["b", "a"])
    one = found["up"]["per_site"]["a"] // 3
    scalars = sum(math.prod(size or 0 for size in spec.shape) for spec in pieces.model.specs.values())
    assert one == 9 + math.ceil(len(pieces.model.specs) / 8) + 4 * scalars
    down = _first(pieces) + one * (3 if serve == "last" else 4)
    assert found["up"] == {"total": 6 * one, "per_site": {"a": 3 * one, "b": 3 * one}}
    assert found["down"] == {"total": 2 * down, "per_site": {"a": down, "b": down}}


def _first(pieces: Experiment) -> int:
    """Bytes of the first message: zeros and weights of the site's own backbone need not be sent."""
    specs = pieces.model.specs
    assert {"head.bias", "blocks.0.attn.qkv.lora.shared.b"} <= pieces.common.keys()
    assert not {"head.weight", "blocks.0.attn.qkv.lora.shared.a"} & pieces.common.keys()
    return payload.num_bytes(pieces.down(1), specs.keys() - pieces.common.keys())


def test_a_site_that_was_away_gets_the_newest_only() -> None:
    settings = _train(rounds=6, participation=0.5)
    pieces = federation.assemble(settings)
    found = predicted_bytes(pieces, ["a", "b"])
    drawn = [coordinator.drawn_sites(0.5, ["a", "b"], settings.seed, number) for number in range(1, 7)]
    one = found["up"]["total"] // 6
    for site in ("a", "b"):
        rounds = sum(site in names for names in drawn)
        assert found["up"]["per_site"][site] == rounds * one
        saved = one - _first(pieces) if site in drawn[0] else 0
        assert found["down"]["per_site"][site] == (rounds + 1) * one - saved


def test_what_is_not_trained_goes_out_once_and_never_comes_back() -> None:
    whole = predicted_bytes(federation.assemble(federation.configure()), ["a"])
    frozen = predicted_bytes(federation.assemble(federation.configure(head={"share": "frozen"})), ["a"])
    personal = predicted_bytes(federation.assemble(federation.configure(head={"share": "personal"})), ["a"])
    assert frozen["up"]["total"] == personal["up"]["total"] < whole["up"]["total"]
    assert personal["down"]["total"] <= frozen["down"]["total"] < whole["down"]["total"]
    local = predicted_bytes(federation.assemble(federation.configure(strategy={"name": "local"})), ["a", "b"])
    assert (local["up"]["total"], local["down"]["total"]) == (0, 0)


def test_a_frozen_factor_goes_down_once_and_is_neither_sent_nor_kept_secret() -> None:
    pieces = federation.assemble(federation.configure(tuner=[{"name": "lora", "freeze_a": True}]))
    assert not [name for name in pieces.up(1) if name.endswith(".a")]
    assert [name for name in pieces.down(1) if name.endswith(".a")]
    with pytest.raises(WireError):
        encode(Reply("a", 1, 3, pieces.model.initial(0)), pieces.up(1))


# ------------------------------------------------------------------------------------------------ the whole verb
@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    sites = hospitals.write(tmp_path, hospitals.two_sites())
    return federation.configure().model_copy(update={"sites": sites})


def test_check_is_plain_and_writes_nothing(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = check(settings)
    assert sorted(tmp_path.rglob("*")) == before
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["parameters"]["exchanged"] == plain["parameters"]["trainable"] < plain["parameters"]["backbone"]
    assert {site: sizes["train"]["n"] for site, sizes in plain["sites"].items()} == {"east": 14, "west": 14}
    assert plain["image_passes"] == {"east": 42, "west": 42}
    assert plain["leakage"]["groups_across_splits"] == []
    assert found.bytes == predicted_bytes(federation.experiment.assemble(settings, ("a", "b")), ["east", "west"])


def test_check_reads_each_image_once_and_audits_what_it_read(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    again, broken = sorted((tmp_path / "images").iterdir())[:2]
    again.write_bytes(sorted((tmp_path / "images").iterdir())[-1].read_bytes())
    broken.write_bytes(b"no image")
    sites = settings.sites.model_copy(update={"tolerate_corrupt": 0.5})
    expected = audit.audit_config(settings := settings.model_copy(update={"sites": sites})).to_dict()
    seen: list[bytes] = []
    decode = Manifest.decode
    monkeypatch.setattr(Manifest, "decode", lambda self, content: seen.append(content) or decode(self, content))
    found = check(settings)
    assert found.leakage == expected
    assert found.leakage["counts"]["duplicates"] == found.leakage["counts"]["unreadable"] == 1
    assert len(seen) == len(set(seen)) == len(list((tmp_path / "images").iterdir())) - 1


def test_check_says_what_the_coordinator_sees(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(settings)
    assert not found.individual_updates
    assert "val.incoming" in [row["name"] for row in found.numbers]
    assert found.warnings == ()
    telling = settings.model_copy(update={"strategy": config.StrategyConfig(name="watching")})
    watching = replace(
        registry.get("strategies", "fedavg"),
        build=lambda options: FedAvg(options.weights, declares=Declaration(needs_individual_updates=True)),
    )
    monkeypatch.setattr(registry, "_members", {**registry._members, ("strategies", "watching"): watching})
    assert check(telling).individual_updates


def test_recomputed_blocks_keep_fewer_activations(settings: config.Config) -> None:
    saving = settings.engine.model_copy(update={"gradient_checkpointing": True})
    plain, less = (check(one).memory_bytes for one in (settings, settings.model_copy(update={"engine": saving})))
    assert less["activations"] < plain["activations"] / 2
    assert less["trained"] == plain["trained"]


@pytest.mark.parametrize("tuner", [{"name": "prompts"}, {"name": "low_rank_prompts", "rank": 2, "depth": "deep"}])
def test_every_token_keeps_as_many_activations(settings: config.Config, tuner: dict[str, Any]) -> None:
    kept = []
    for length in (8, 24):
        table = config.TunerConfig.model_validate({**tuner, "length": length})
        kept.append(check(settings.model_copy(update={"tuner": (table,)})).memory_bytes["activations"])
    own = (federation.SIZE // 16) ** 2 + 1  # patches and the class token
    assert kept[0] * (own + 24) == kept[1] * (own + 8)


def test_memory_grows_with_the_batch_alone(settings: config.Config) -> None:
    larger = settings.train.model_copy(update={"batch_size": 12})
    small, large = (check(one).memory_bytes for one in (settings, settings.model_copy(update={"train": larger})))
    assert large["activations"] == 2 * small["activations"]
    assert (large["weights"], large["trained"]) == (small["weights"], small["trained"])
    assert all(memory["total"] == sum(memory.values()) - memory["total"] for memory in (small, large))


@pytest.mark.parametrize(
    ("table", "changes", "error"),
    [
        ("train", {"participation": 0.5}, ConfigError),
        ("evaluation", {"select": "beauty"}, ConfigError),
        ("task", {"classes": ("x", "y")}, DataError),
        ("train", {"learning_rates": {"prompt": 1.0}}, ConfigError),
    ],
)
def test_check_refuses_what_a_run_would(
    settings: config.Config, table: str, changes: dict[str, Any], error: type[Exception]
) -> None:
    best = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"serve": "best"})})
    changed = getattr(best, table).model_copy(update=changes)
    with pytest.raises(error):
        check(best.model_copy(update={table: changed}))
    check(best)
