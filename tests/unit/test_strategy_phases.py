"""What is trained first, never, or once more at the end: FedRep, FedBABU, FedAvg with fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from consilium import config, registry, results
from consilium.check import predicted_passes
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.local.train import Setting, Trainer
from consilium.protocols import Strategy
from consilium.strategies.fedavg import FedAvg, everything
from consilium.strategies.phases import head_first
from consilium.tensors import Tensors, equal
from tests import federation, quadratics
from tests.quadratics import BODY, Federation, Problem

SITES = quadratics.problems(30, 50, 20)
START = np.linspace(-1, 1, quadratics.SIZE)
DRAWS = (("a", "b"), ("b", "c"), ("a", "c"), ("a", "b", "c"))
CLOSE = {"rtol": 0, "atol": 1e-10}
RATE, STEPS = 0.05, 3
HOSPITALS = federation.hospitals(14, 9, 20)


def _build(name: str, **options: Any) -> Strategy:
    member: Strategy = registry.build("strategies", name, options)
    return member


def _run(folder: Path, name: str, strategy: Strategy | None = None, **tables: Any) -> federation.Outcome:
    settings = federation.configure(strategy={"name": name, **tables.pop("options", {})}, **tables)
    return federation.run(folder, settings, HOSPITALS, strategy=strategy)


# ------------------------------------------------------------------------------------------------ FedRep
def _steps(problem: Problem, w: np.ndarray, chosen: slice) -> np.ndarray:
    w = w.copy()
    for _ in range(STEPS):
        w[chosen] -= RATE * problem.gradient(w)[chosen]
    return w


def test_fedrep_is_the_papers_algorithm() -> None:
    """Algorithm 1: heads first with the rest still, then the rest with heads still; the rest is averaged."""
    secrets = {site: START + at for at, site in enumerate(SITES)}
    here = Federation(_build("fedrep", head_epochs=2), SITES, START, STEPS, RATE, secrets)
    body, heads = START[:BODY].copy(), {site: start[BODY:] for site, start in secrets.items()}
    for drawn in DRAWS:
        bodies = []
        for site in drawn:
            w = _steps(SITES[site], np.concatenate([body, heads[site]]), slice(BODY, None))
            w = _steps(SITES[site], w, slice(0, BODY))
            heads[site] = w[BODY:]
            bodies.append(w[:BODY])
        body = np.average(bodies, axis=0, weights=[SITES[site].images for site in drawn])
        here.round(*drawn)
        assert here.asked[drawn[0]] == [("head", 2.0), ("train", None)]
        for site in SITES:
            np.testing.assert_allclose(here.model(site), np.concatenate([body, heads[site]]), **CLOSE)


def test_fedrep_with_nothing_personal_is_fedavg(tmp_path: Path) -> None:
    """I11; and it is not FedPer where the head is personal."""
    fedavg = _run(tmp_path / "fedavg", "fedavg")
    nothing = FedAvg(fit=head_first(everything, 1.0))
    assert equal(_run(tmp_path / "nothing", "fedavg", nothing).shared, fedavg.shared)
    fedper, fedrep = (_run(tmp_path / name, name).shared for name in ("fedper", "fedrep"))
    assert fedper.keys() == fedrep.keys()
    assert not equal(fedper, fedrep)


def test_the_work_of_both_phases_is_counted_and_predicted(tmp_path: Path) -> None:
    images = {site: len(data.train) for site, data in HOSPITALS.items()}
    outcome = _run(tmp_path, "fedrep", options={"head_epochs": 2.5}, train={"rounds": 2})
    assert outcome.progress.passes == {"a": 2 * (35 + 14), "b": 2 * (23 + 9), "c": 2 * (50 + 20)}
    assert predicted_passes(outcome.experiment.config, images) == outcome.progress.passes


# ------------------------------------------------------------------------------------------------ the end of a run
def _finished(outcome: federation.Outcome, site: str, epochs: float) -> Tensors:
    """What one more fit of everything makes of the final global model, on a schedule of its own."""
    pieces = outcome.experiment
    schedule = pieces.setting.config.schedule.model_copy(update={"restart": True})
    train = pieces.setting.config.model_copy(update={"schedule": schedule})
    setting = replace(pieces.setting, config=train, trains=Setting.trains)
    counts = np.bincount(HOSPITALS[site].train.labels, minlength=3).tolist()
    trainer = Trainer(setting, HOSPITALS[site].train, outcome.progress.server.round, site, counts)
    return trainer.fit(outcome.shared, epochs=epochs, purpose="finish").variables


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_fedavg_is_fine_tuned_at_every_site_after_the_last_round(tmp_path: Path, schedule: str) -> None:
    train = {"rounds": 3, "participation": 0.34, "schedule": {"name": schedule, "warmup": 0}}
    fedavg = _run(tmp_path / "fedavg", "fedavg", train=train)
    tuned = _run(tmp_path / "tuned", "fedavg_finetune", options={"finetune_epochs": 2}, train=train)
    assert equal(tuned.shared, fedavg.shared)
    assert tuned.progress.ledger.payload == fedavg.progress.ledger.payload, "nothing more travels"
    for site in HOSPITALS:
        assert equal(tuned.served(site), _finished(tuned, site, 2))
        assert not any(torch.equal(value, fedavg.shared[name]) for name, value in tuned.served(site).items())
        moved = (tuned.served(site)["head.weight"] - fedavg.shared["head.weight"]).abs().max()
        assert moved > 0.005, "the end of the rounds' cosine is no place to learn anything"


def test_tested_are_the_global_and_the_fine_tuned_model(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "fedavg_finetune", train={"rounds": 1})
    table = pd.read_parquet(tmp_path / "sites" / "a" / "predictions.parquet")
    assert set(table.model) == {"personal", "global", "before_aggregation"}
    scores = {name: rows["p.dark"].to_numpy() for name, rows in table.groupby("model")}
    assert not np.array_equal(scores["personal"], scores["global"])
    results.collect(tmp_path, outcome.experiment, outcome.progress)
    assert (tmp_path / "adapters" / "global.safetensors").exists()


def test_the_last_phase_sees_no_other_split(tmp_path: Path) -> None:
    other = {
        s: replace(d, val=federation.examples(s, 6, 90), test=federation.examples(s, 6, 91))
        for s, d in HOSPITALS.items()
    }
    settings = federation.configure(strategy={"name": "fedavg_finetune"}, train={"rounds": 1})
    first = federation.run(tmp_path / "first", settings, HOSPITALS)
    second = federation.run(tmp_path / "second", settings, other)
    assert all(equal(first.served(site), second.served(site)) for site in HOSPITALS)


def test_its_work_is_counted_and_predicted(tmp_path: Path) -> None:
    train = {"rounds": 2, "participation": 0.34}
    outcome = _run(tmp_path, "fedbabu", options={"finetune_epochs": 1.5}, train=train)
    images = {site: len(data.train) for site, data in HOSPITALS.items()}
    assert predicted_passes(outcome.experiment.config, images) == outcome.progress.passes
    drawn = {site for _, site, _ in outcome.sent("up")}
    assert outcome.progress.passes.keys() == HOSPITALS.keys() > drawn


def test_a_run_that_ended_twice_ends_alike(tmp_path: Path) -> None:
    """The last request comes again where the coordinator was killed before it heard the answers."""
    first = _run(tmp_path, "fedavg_finetune", train={"rounds": 2})
    served = {site: first.served(site) for site in HOSPITALS}
    again = _run(tmp_path, "fedavg_finetune", train={"rounds": 2})
    assert all(equal(again.served(site), served[site]) for site in HOSPITALS)
    assert again.progress.passes == first.progress.passes


def test_class_counts_of_the_federation_reach_the_last_phase(tmp_path: Path) -> None:
    task = {"class_counts": "federation", "class_weight": "inverse"}
    own = _run(tmp_path / "own", "fedavg_finetune", train={"rounds": 1}, task={**task, "class_counts": "site"})
    every = _run(tmp_path / "every", "fedavg_finetune", train={"rounds": 1}, task=task)
    assert not equal(every.served("a"), own.served("a"))


def test_guests_are_not_fine_tuned(tmp_path: Path) -> None:
    """A finish without a word of training is what held-out sites get."""
    outcome = _run(tmp_path / "run", "fedavg_finetune", train={"rounds": 1})
    finishes = [outcome.decode(way, data) for way, _, data in outcome.wire if way == "down"]
    assert [request.context.get("train") for request in finishes if request.kind == "finish"] == [True] * 3
    plain = _run(tmp_path / "plain", "fedavg", train={"rounds": 1})
    finishes = [plain.decode(way, data) for way, _, data in plain.wire if way == "down"]
    assert [dict(request.context) for request in finishes if request.kind == "finish"] == [{}] * 3


# ------------------------------------------------------------------------------------------------ FedBABU
def test_the_head_of_fedbabu_keeps_its_common_start_until_the_end(tmp_path: Path) -> None:
    """I19."""
    outcome = _run(tmp_path, "fedbabu", train={"rounds": 3})
    pieces, start = outcome.experiment, outcome.experiment.model.initial(3)
    assert torch.equal(outcome.shared["head.weight"], start["head.weight"])
    assert not any("head" in name for _, _, tensors in outcome.sent("up") for name in tensors)
    assert {n for number, _, t in outcome.sent("down") if number == 1 for n in t} >= {"head.weight"}
    for site in HOSPITALS:
        assert torch.equal(_states(outcome, site).received["head.weight"], start["head.weight"])
        assert not torch.equal(outcome.served(site)["head.weight"], start["head.weight"])
        assert equal(outcome.served(site), _finished(outcome, site, 1))
    width = pieces.backbone.num_features
    assert float(start["head.weight"].std()) == pytest.approx(width**-0.5, rel=0.2), "it must give a gradient"
    small = federation.assemble(federation.configure()).model.initial(3)["head.weight"]
    assert float(small.std()) < 0.02


def _states(outcome: federation.Outcome, site: str) -> Any:
    folder = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
    return folder.load(outcome.progress.builds_on[site])


def test_fedbabu_is_fedavg_of_the_body() -> None:
    here = Federation(_build("fedbabu"), SITES, START, STEPS, RATE)
    body = START[:BODY].copy()
    for drawn in DRAWS:
        ends = [_steps(SITES[site], np.concatenate([body, START[BODY:]]), slice(0, BODY))[:BODY] for site in drawn]
        body = np.average(ends, axis=0, weights=[SITES[site].images for site in drawn])
        here.round(*drawn)
        np.testing.assert_allclose(here.shared, np.concatenate([body, START[BODY:]]), **CLOSE)


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"strategy": {"name": "fedrep"}, "head": {"share": "shared"}}, "contradicts"),
        ({"strategy": {"name": "fedrep"}, "head": {"share": "frozen"}}, "role that nothing has"),
        ({"strategy": {"name": "fedbabu"}, "head": {"share": "frozen"}}, "role that nothing has"),
        ({"strategy": {"name": "fedrep", "personal_from_block": 6}}, "no such block"),
        ({"strategy": {"name": "fedrep", "head_epochs": 0}}, "greater than 0"),
        ({"strategy": {"name": "fedavg_finetune", "finetune_epochs": 0}}, "greater than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        federation.assemble(config.from_dict({**federation.TABLE, **table}))
