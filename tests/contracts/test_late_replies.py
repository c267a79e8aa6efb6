"""Every strategy: a reply to the round before enters the mean of the next one as it is, or the strategy is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.deployment import late
from tests import federation, variants

SITES = federation.hospitals(14, 9, 20)
NAMES = tuple(SITES)
BASE, BASIS, SINGLE = "the frozen base changes", "another basis", "looks at each update"
MORE, MEAN, ONCE = "more than trained parameters", "more than form the mean", "sites send once"
REFUSED = {  # why, of all reasons the first
    "ensemble": ONCE,
    "fedacs": SINGLE,
    "fedalt": MEAN,
    "fedamp": SINGLE,
    "feddyn": MEAN,
    "fedex": BASE,
    "fedopt": MEAN,
    "fedpft": ONCE,
    "fedsvd": BASIS,
    "flexlora": BASIS,
    "flora": BASE,
    "hetlora": BASIS,
    "local": "nothing is sent",
    "lora_fair": SINGLE,
    "median": SINGLE,
    "merge": ONCE,
    "pfedme": MEAN,
    "rolora": "other tensors are sent in other rounds",
    "scaffold": MORE,
    "trimmed_mean": SINGLE,
}
ROUNDS = {"rounds": 3, "quorum": 0.5}


def pieces_of(name: str, **tables: Any) -> Any:
    return federation.assemble(variants.settings(name, train=ROUNDS, **tables))


def test_every_refused_strategy_is_a_member() -> None:
    assert REFUSED.keys() < set(variants.FEDERATED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_it_is_refused_in_words(name: str) -> None:
    assert REFUSED[name] in next(late.reasons(pieces_of(name), NAMES))


@pytest.mark.parametrize("name", sorted(set(variants.FEDERATED) - REFUSED.keys()))
def test_a_late_reply_is_a_term_of_the_next_rounds_mean(name: str, tmp_path: Path) -> None:
    """Round 1 without b; round 2 the mean of a's and c's replies to it and b's to round 1, by hand in float64."""
    settings = variants.settings(name, train={**ROUNDS, "rounds": 2})
    assert not list(late.reasons(federation.assemble(settings), NAMES))
    told: list[set[str]] = []
    outcome = federation.run(
        tmp_path,
        settings,
        SITES,
        wrap=lambda inner: federation.Belated(inner, {("b", 1)}),
        expect=lambda sites: told.append(set(sites)),
    )
    assert told == [set(), {"b"}]
    uniform = outcome.experiment.strategy.weights == "uniform"
    weight = {site: 1 if uniform else len(data.train) for site, data in SITES.items()}
    sent = {(number, site): tensors for number, site, tensors in outcome.sent("up")}
    assert sent.keys() == {(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "c")}
    terms = [(weight["a"], sent[2, "a"]), (weight["b"], sent[1, "b"]), (weight["c"], sent[2, "c"])]
    for variable in terms[0][1]:
        values = np.stack([tensors[variable].double().numpy() for _, tensors in terms])
        mean = np.average(values, axis=0, weights=[each for each, _ in terms])
        torch.testing.assert_close(outcome.shared[variable].double(), torch.from_numpy(mean), rtol=1e-6, atol=1e-9)
    first, second = (each["sites"]["b"] for each in outcome.events if each["event"] == "round")
    assert (first["status"], second["status"], second["late_from"]) == ("late", "ok", 1)
    assert outcome.progress.builds_on == {"a": 2, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"wire": {"codec": "int8"}}, "a codec sends steps"),
        ({"tuner": [{"name": "stochastic_block"}]}, "other tensors are sent in other rounds"),
        ({"strategy": {"name": "fedavg", "aggregate": "trimmed_mean", "trim": 0.2}}, SINGLE),
        ({"strategy": {"name": "fedavg", "clip_updates": 1.0}}, SINGLE),
        ({"strategy": {"name": "fedavg", "refuse_updates": 1.0}}, SINGLE),
        ({"strategy": {"name": "fedper", "aggregate": "refactor"}}, BASIS),
        ({"strategy": {"name": "fedavg", "aggregate": "residual"}}, BASE),
    ],
)
def test_options_that_change_what_a_round_sums_are_refused(tables: dict[str, Any], why: str) -> None:
    found = federation.assemble(federation.configure(train=ROUNDS, **{"strategy": {"name": "fedavg"}, **tables}))
    assert why in next(late.reasons(found, NAMES))


def test_a_strategy_that_forms_its_sum_by_itself_is_refused() -> None:
    """One that is installed beside the package, and says nothing of itself that would tell."""
    plain = registry.build("strategies", "fedavg", {})

    class Own(type(plain)):  # type: ignore[misc]
        def combine(self, server: Any, updates: Any, specs: Any) -> Any:
            return super().combine(server, updates, specs)

    settings = federation.configure(strategy={"name": "fedavg"}, train=ROUNDS)
    assert MEAN in next(late.reasons(federation.assemble(settings, Own()), NAMES))
    assert not list(late.reasons(federation.assemble(settings, plain), NAMES))
