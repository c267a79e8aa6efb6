"""Stochastic blocks by themselves: draws, cycles, sub-modules, counts, and the same step as plain autograd."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import registry
from consilium.errors import ConfigError
from consilium.protocols import Part
from consilium.tuners.stochastic_block import StochasticBlock
from tests import own_tensors, small

SUBMODULES = {
    "attention": {"attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"},
    "mlp": {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"},
    "norm": {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"},
    "qkv": {"attn.qkv.weight", "attn.qkv.bias"},
    "proj": {"attn.proj.weight", "attn.proj.bias"},
    "fc1": {"mlp.fc1.weight", "mlp.fc1.bias"},
    "fc2": {"mlp.fc2.weight", "mlp.fc2.bias"},
    "norm1": {"norm1.weight", "norm1.bias"},
    "norm2": {"norm2.weight", "norm2.bias"},
}
ANY_BLOCKS = st.integers(1, 24).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))
SEEDS = st.integers(0, 2**32)


def _tuner(**options: object) -> StochasticBlock:
    found: StochasticBlock = registry.build("tuners", "stochastic_block", options)
    return found


@given(sizes=ANY_BLOCKS, seed=SEEDS, cycle=st.integers(0, 50), scope=st.sampled_from(["global", "site"]))
def test_a_cycle_holds_every_block_exactly_once(sizes: tuple[int, int], seed: int, cycle: int, scope: str) -> None:
    total, number = sizes
    length = -(-total // number)
    tuner, blocks = _tuner(blocks_per_round=number, draw="cycle", scope=scope), range(100, 100 + total)
    rounds = [tuner.drawn(blocks, cycle * length + at, "a", seed) for at in range(1, length + 1)]
    assert Counter(block for drawn in rounds for block in drawn) == dict.fromkeys(blocks, 1)
    assert all(len(drawn) == number for drawn in rounds[:-1])


@given(sizes=ANY_BLOCKS, seed=SEEDS, round=st.integers(1, 500), scope=st.sampled_from(["global", "site"]))
def test_a_uniform_draw_has_its_number_of_blocks(sizes: tuple[int, int], seed: int, round: int, scope: str) -> None:
    total, number = sizes
    drawn = _tuner(blocks_per_round=number, scope=scope).drawn(range(total), round, "a", seed)
    assert len(drawn) == number
    assert drawn <= set(range(total))


def test_uniform_draws_are_even_and_may_come_again() -> None:
    tuner = _tuner()
    draws = [next(iter(tuner.drawn(range(12), round, "a", 0))) for round in range(1, 2401)]
    assert all(140 < times < 260 for times in Counter(draws).values())
    assert any(first == second for first, second in pairwise(draws))


@pytest.mark.parametrize("draw", ["uniform", "cycle"])
def test_a_draw_comes_from_seed_round_and_perhaps_site_alone(draw: str) -> None:
    shared, own = _tuner(draw=draw), _tuner(draw=draw, scope="site")

    def draws(tuner: StochasticBlock, site: str, seed: int) -> list[frozenset[int]]:
        return [tuner.drawn(range(12), round, site, seed) for round in range(1, 49)]

    known = draws(own, "a", 0)
    torch.manual_seed(5)
    assert draws(own, "a", 0) == known
    assert draws(own, "a", 0) != draws(own, "b", 0)
    assert draws(own, "a", 0) != draws(own, "a", 1)
    assert draws(shared, "a", 0) == draws(shared, "b", 0) != draws(shared, "a", 1)
    assert draws(shared, "a", 0)[:12] != draws(shared, "a", 0)[12:24], "each cycle is shuffled anew"


def test_two_of_a_hybrid_draw_apart() -> None:
    first, second = _tuner(targets=["qkv", "mlp"]), _tuner(targets=["norm"])
    draws = [[tuner.drawn(range(12), round, "a", 0) for round in range(1, 13)] for tuner in (first, second)]
    assert draws[0] != draws[1]
    again = _tuner(targets=["mlp", "qkv"])
    assert [again.drawn(range(12), round, "a", 0) for round in range(1, 13)] == draws[0]


def test_the_draw_selects_by_the_block_of_a_tensor() -> None:
    backbone = small.backbone()
    tuner = _tuner()
    specs = tuner.attach(backbone, [Part()], "sum").specs
    for round in range(1, 9):
        active, drawn = tuner.active(specs, round, "a", 3), tuner.drawn([0, 1], round, "a", 3)
        names = {name for name, spec in specs.items() if active(spec.tag)}
        assert names == {f"blocks.{block}.{name}" for block in drawn for name in SUBMODULES["attention"]}


def test_only_candidates_are_drawn() -> None:
    tuner = _tuner(blocks=(1,))
    specs = tuner.attach(small.backbone(), [Part()], "sum").specs
    assert specs.keys() == {f"blocks.1.{name}" for name in SUBMODULES["attention"]}
    assert all(tuner.active(specs, round, "a", 0)(spec.tag) for round in range(1, 20) for spec in specs.values())


@pytest.mark.parametrize("targets", [*((each,) for each in SUBMODULES), ("fc1", "norm2"), ("attention", "qkv")])
def test_targets_are_sub_modules(targets: tuple[str, ...]) -> None:
    specs = own_tensors.attached("stochastic_block", small.backbone(), targets=targets).specs
    names = {name for target in targets for name in SUBMODULES[target]}
    assert specs.keys() == {f"blocks.{block}.{name}" for block in (0, 1) for name in names}


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_a_block_is_all_of_it(make: str) -> None:
    backbone = small.backbone(make)
    added = own_tensors.attached("stochastic_block", backbone, targets=["block"])
    own = {name for name, _ in backbone.module.named_parameters() if name.startswith("blocks.")}
    assert added.specs.keys() == own
    assert added.forgets_moments


def test_norms_inside_of_an_attention_are_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small.MAKES, "normed", ("vit_tiny_patch16_224", {"qk_norm": True}))
    specs = own_tensors.attached("stochastic_block", small.backbone("normed"), targets=["norm"]).specs
    assert {"blocks.0.attn.q_norm.weight", "blocks.1.norm2.bias"} <= specs.keys()


@pytest.mark.parametrize(("name", "width"), own_tensors.WIDTHS.items())
def test_counts_of_a_round_are_the_closed_formulas(name: str, width: int) -> None:
    formulas = {"attention": 4 * width**2 + 4 * width, "mlp": 8 * width**2 + 5 * width, "norm": 4 * width}
    formulas["block"] = sum(formulas.values())
    for target, size in formulas.items():
        tuner = _tuner(targets=[target], blocks_per_round=2)
        specs = tuner.attach(own_tensors.empty(name), [Part()], "sum").specs
        active = tuner.active(specs, 1, "a", 0)
        assert own_tensors.count({n: spec for n, spec in specs.items() if active(spec.tag)}) == 2 * size
    assert width != 768 or formulas["attention"] == 2_362_368


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_a_step_is_the_step_of_plain_autograd(make: str) -> None:
    options = {"blocks": (1,), "targets": ("block",)}
    own_tensors.assert_same_step("stochastic_block", make, lambda name: name.startswith("blocks.1."), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"blocks_per_round": 3}, r"more blocks per round(.|\n)*1 to 2(.|\n)*3"),
        ({"blocks": (0,), "blocks_per_round": 2}, r"more blocks per round(.|\n)*1 to 1"),
        ({"blocks": (0, 7)}, r"no such block(.|\n)*0 to 1(.|\n)*7"),
        ({"blocks": ()}, "no block is chosen"),
        ({"blocks_per_round": 0}, "blocks_per_round"),
        ({"targets": []}, "targets"),
        ({"targets": ["head"]}, r"targets(.|\n)*attention"),
        ({"draw": "ambient"}, r"draw(.|\n)*cycle"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        own_tensors.attached("stochastic_block", small.backbone(), **options)


def test_a_target_that_no_block_has_is_refused() -> None:
    backbone = small.backbone()
    places = {name: at for name, at in backbone.modules.items() if at.role != "norm2"}
    with pytest.raises(ConfigError, match=r"no block has this(.|\n)*norm1(.|\n)*norm2"):
        own_tensors.attached("stochastic_block", replace(backbone, modules=places), targets=["norm1", "norm2"])
