"""merge: data vectors in a run; the served model against whole weight matrices, and the choice of its scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import checkpoint, registry, vectors
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError, TrainingError
from consilium.messages import envelope_of
from consilium.products import products
from consilium.registry import parse_options
from consilium.tensors import Tensors, equal, within
from consilium.tuners import base
from tests import federation, variants

SITES = federation.hospitals(14, 9, 20)


def _settings(options: dict[str, Any] | None = None, **tables: Any):
    table = {"name": "merge", **(options or {})}
    return federation.configure(strategy=table, **tables)


def _run(folder: Path, options: dict[str, Any] | None = None, sites: Any = SITES, **tables: Any):
    return federation.run(folder, _settings(options, **tables), sites)


def _dense(outcome: federation.Outcome, values: Tensors) -> dict[str, Tensor]:
    """Whole weights, float64: frozen ones, what was trained, products folded in."""
    model, own = outcome.experiment.model, {name: value.double() for name, value in values.items()}
    frozen = {n: p.detach().double() for n, p in base.parameters(outcome.experiment.backbone.module).items()}
    found, made = {**frozen, **own}, products(model.specs)
    for product in made:
        rows = product.scale * torch.cat([own[name] for name in product.left]) @ own[product.right]
        for name, piece in zip(product.base, torch.split(rows, [len(own[n]) for n in product.left]), strict=True):
            start = own.get(name, outcome.experiment.backbone.module.get_parameter(name).detach().double())
            found[name] = start + piece
    return {n: v for n, v in found.items() if n not in {f for p in made for f in (*p.left, p.right)}}


def _sent(outcome: federation.Outcome) -> dict[str, Tensors]:
    return {site: tensors for _, site, tensors in outcome.sent("up")}


@pytest.mark.parametrize("tuner", ["lora", "low_rank_prompts", "norm", "lora + prompts", "lora dora"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_served_model_is_the_dense_sum(tmp_path: Path, tuner: str, scale: float) -> None:
    """theta_pre + lambda sum n_k/n tau_k, over weights with products folded in."""
    options = {"scale": scale, "products": "fold"}
    outcome = _run(tmp_path, options, tuner=variants.table(tuner), train={"rounds": 2})
    start = _dense(outcome, outcome.experiment.model.initial(3))
    models = {site: _dense(outcome, {**outcome.experiment.model.initial(3), **t}) for site, t in _sent(outcome).items()}
    total = sum(len(SITES[site].train) for site in models)
    found = _dense(outcome, outcome.served("a"))
    for name, value in start.items():
        step = sum(len(SITES[site].train) / total * (model[name] - value) for site, model in models.items())
        torch.testing.assert_close(found[name], value + scale * step, rtol=0, atol=1e-6)
    assert all(equal(outcome.served(site), outcome.served("a")) for site in SITES)


def test_a_cut_product_is_the_nearest_of_the_tuners_rank(tmp_path: Path) -> None:
    tuner = [{"name": "lora", "rank": 4, "alpha": 10.0}]  # a scale that is not one
    exact = _run(tmp_path / "fold", {"scale": 1.0, "products": "fold"}, tuner=tuner, train={"rounds": 1})
    cut = _run(tmp_path / "cut", {"scale": 1.0}, tuner=tuner, train={"rounds": 1})
    frozen = _dense(exact, exact.experiment.model.initial(3))
    whole, near = _dense(exact, exact.served("a")), _dense(cut, cut.served("a"))
    for product in products(exact.experiment.model.specs):
        (name,) = product.base
        u, s, v = torch.linalg.svd(whole[name] - frozen[name])
        nearest = u[:, :4] * s[:4] @ v[:4]
        torch.testing.assert_close(near[name] - frozen[name], nearest, rtol=0, atol=1e-6)
        assert cut.served("a")[product.right].shape == (4, whole[name].shape[1])
    torch.testing.assert_close(near["head.weight"], whole["head.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["ties", "dare"])
@pytest.mark.parametrize("kind", ["fold", "cut"])
def test_other_rules_act_on_entries(tmp_path: Path, rule: Any, kind: str) -> None:
    options = {"rule": rule, "scale": 1.0, "density": 0.3, "products": kind}
    outcome = _run(tmp_path, options, train={"rounds": 1})
    strategy, specs = outcome.experiment.strategy, outcome.experiment.model.specs
    start, own = outcome.experiment.model.initial(3), products(specs)
    terms = [
        vectors.Term(site, vectors.difference({**start, **t}, start, own, own), len(SITES[site].train))
        for site, t in _sent(outcome).items()
    ]
    expected = vectors.merged(rule, terms, 0.3, 0)
    assert strategy.options.rule == rule
    torch.testing.assert_close(
        outcome.served("b")["head.weight"].double(),
        start["head.weight"].double() + expected.plain["head.weight"],
        rtol=0,
        atol=1e-6,
    )


def test_one_site_at_scale_one_is_its_local_training(tmp_path: Path) -> None:
    sites = federation.hospitals(14)
    outcome = _run(tmp_path / "merge", {"scale": 1.0}, sites, train={"rounds": 2, "quorum": 1.0})
    (sent,) = _sent(outcome).values()
    found, alone = (
        _dense(outcome, outcome.served("a")),
        _dense(outcome, {**outcome.experiment.model.initial(3), **sent}),
    )
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_sites_send_once_and_their_own_models_go_on_from_round_to_round(tmp_path: Path) -> None:
    outcome = _run(tmp_path)
    assert [(number, site) for number, site, _ in outcome.sent("up")] == [(3, "a"), (3, "b"), (3, "c")]
    state = StateFolder(tmp_path / "sites" / "a", outcome.experiment.handshake.agreement).load(3)
    assert equal(within("own", state.personal.tensors), _sent(outcome)["a"])
    table = checkpoint.load(tmp_path / "sites" / "a" / "served.safetensors")[0]
    assert "merge/scale" not in table


def test_a_tuner_that_trains_other_tensors_in_other_rounds_sends_all_of_them(tmp_path: Path) -> None:
    tuner = variants.table("stochastic_block site")
    outcome = _run(tmp_path, {"scale": 1.0}, tuner=tuner, train={"rounds": 3})
    assert len({n.split(".")[1] for n in _sent(outcome)["a"] if n.startswith("blocks.")}) > 1


# ------------------------------------------------------------------------------------------------ the scale
def test_the_scale_is_the_one_that_validation_likes_best(tmp_path: Path) -> None:
    scales = [0.2, 1.0, 5.0]
    outcome = _run(tmp_path / "auto", {"scales": scales, "select": "loss"})
    chosen = outcome.progress.chosen
    assert list(chosen["candidates"]) == ["0.2", "1.0", "5.0"]
    assert chosen["best"] == min(chosen["candidates"], key=chosen["candidates"].__getitem__)
    fixed = _run(tmp_path / "fixed", {"scale": float(chosen["best"])})
    assert equal(fixed.served("a"), outcome.served("a"))
    losses = {}
    for scale in scales:
        one = _run(tmp_path / str(scale), {"scale": scale})
        trained = one.served("a")
        model, task, setting = one.experiment.model, one.experiment.task, one.experiment.setting
        from consilium.local.predict import outputs

        rows = [
            task.validation(
                task.probabilities(outputs(model, trained, data.val, setting.preprocessing, "cpu", "float32")).numpy(),
                data.val.labels,
            )["loss"]
            for data in SITES.values()
        ]
        losses[str(scale)] = sum(rows) / len(rows)
    assert chosen["candidates"] == pytest.approx(losses, abs=1e-6)


def test_candidates_go_out_before_the_test_split_is_read_and_bring_numbers_alone(tmp_path: Path) -> None:
    outcome = _run(tmp_path, {"scales": [0.5, 1.0]})
    kinds = [(way, envelope_of(data).get("kind")) for way, _, data in outcome.wire if way == "down"]
    assert [kind for _, kind in kinds] == ["round"] * 9 + ["evaluate"] * 6 + ["finish"] * 3
    assert {site for number, site, _ in outcome.sent("up") if number != 3} == set()


def test_a_run_that_stopped_before_the_choice_makes_the_same(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event["event"] == "site" and event["kind"] == "evaluate":
            raise Stop

    whole = _run(tmp_path / "whole")
    with pytest.raises(Stop):
        federation.run(tmp_path / "cut", _settings(), SITES, display=stop)
    resumed = _run(tmp_path / "cut")
    assert equal(resumed.shared, whole.shared)
    assert resumed.progress.chosen == whole.progress.chosen


def test_half_of_the_sites_are_enough(tmp_path: Path) -> None:
    """The last round's sites are merged; all the others get the model."""
    outcome = _run(tmp_path, {"scale": 1.0}, train={"rounds": 3, "participation": 0.5})
    assert len(_sent(outcome)) == 2
    assert all(equal(outcome.served(site), outcome.served("a")) for site in SITES)


# ------------------------------------------------------------------------------------------------ what stays
def test_a_personal_head_stays(tmp_path: Path) -> None:
    outcome = _run(tmp_path, {"scale": 1.0}, head={"share": "personal"})
    assert not any("head" in name for tensors in _sent(outcome).values() for name in tensors)
    assert not torch.equal(outcome.served("a")["head.weight"], outcome.served("b")["head.weight"])
    for site in SITES:
        federation.assert_absent({"head": outcome.served(site)["head.weight"]}, outcome.wire)


def test_restoring_moves_head_and_norms_at_each_site_alone(tmp_path: Path) -> None:
    tuner = [{"name": "lora", "rank": 4}, {"name": "norm"}]
    plain = _run(tmp_path / "plain", {"scale": 1.0}, tuner=tuner)
    restored = _run(tmp_path / "restored", {"scale": 1.0, "restore_epochs": 1.0}, tuner=tuner)
    assert equal(plain.shared, restored.shared)
    before, after = plain.served("a"), restored.served("a")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    roles = {plain.experiment.model.specs[name].tag.role for name in moved}
    assert roles == {"head", "norm"}


def test_a_site_that_answers_nan_is_refused_by_name(tmp_path: Path) -> None:
    train = {"optimizer": "sgd", "learning_rate": 1e30, "clip_norm": 0, "rounds": 1}
    with pytest.raises(TrainingError, match=r"site a"):
        _run(tmp_path, {"scale": 1.0}, train=train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1.0, "scales": [0.5]}, "scales"),
        ({"scale": 1.0, "select": "loss"}, "select"),
        ({"density": 0.5}, "density"),
        ({"mask_seed": 3}, "mask_seed"),
        ({"rule": "ties", "weights": "uniform"}, "weights"),
        ({"scales": []}, "positive"),
        ({"scales": [1.0, 1.0]}, "once"),
        ({"scale": 0.0}, "scale"),
        ({"rule": "sum"}, "rule"),
    ],
)
def test_keys_without_an_effect_or_a_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_options(registry.get("strategies", "merge"), options)


def test_what_cannot_be_decided_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no such validation metric(.|\n)*luck"):
        federation.assemble(_settings({"select": "luck"}))
    with pytest.raises(ConfigError, match="the sites send once"):
        federation.assemble(_settings(evaluation={"serve": "best"}))
