"""Sums by coordinate, what may be configured, what is refused, and that no dense sum is formed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import aggregation, registry
from consilium.aggregation import Aggregation, SumOptions, Terms
from consilium.errors import ConfigError, WireError
from consilium.products import Product
from consilium.protocols import Declaration, Factor, Spec, Specs, Tag
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import Tensors, equal


def _specs(part: str = "shared") -> Specs:
    """LoRA beside one layer of 6 x 4, and a head."""
    tag = lambda role: Tag("blocks.0.attn.qkv", role, part, 0)  # noqa: E731
    base = ("blocks.0.attn.qkv.weight",)
    return {
        "b": Spec((6, 2), tag("lora_b"), scale=0.5, factor=Factor(base, "left")),
        "a": Spec((2, 4), tag("lora_a"), scale=0.5, factor=Factor(base, "right")),
        "head.weight": Spec((3, 4), Tag("head", "head")),
    }


def _random(specs: Specs, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn([size or 0 for size in spec.shape], generator=generator) for name, spec in specs.items()}


# ------------------------------------------------------------------------------------------------ by coordinate
def _terms(*values: float) -> Terms:
    return [(float(10**at), {"x": torch.tensor([value, -value])}) for at, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "middle"), [((7.0,), 7.0), ((1.0, 4.0), 2.5), ((9.0, 1.0, 2.0), 2.0), ((1.0, 100.0, 2.0, 4.0), 3.0)]
)
def test_the_median_is_the_middle_of_each_coordinate_whatever_the_weights(
    values: tuple[float, ...], middle: float
) -> None:
    assert aggregation.median(_terms(*values))["x"].tolist() == [middle, -middle]


@pytest.mark.parametrize(
    ("trim", "values", "mean"),
    [
        (0.2, (1.0, 2.0, 3.0, 4.0, 90.0), 3.0),  # one of five at either end
        (0.2, (1.0, 2.0, 3.0, 90.0), 24.0),  # of four, 0.8 is none
        (0.4, (5.0, 6.0), 5.5),
        (0.4, (5.0,), 5.0),
        (0.0, (1.0, 8.0), 4.5),
        (0.3, tuple(map(float, range(10))), 4.5),
        (0.29, tuple(float(at**3) for at in range(100)), sum(at**3 for at in range(29, 71)) / 42),  # not 28.999...
    ],
)
def test_a_trimmed_mean_drops_the_same_number_at_both_ends(trim: float, values: tuple[float, ...], mean: float) -> None:
    assert aggregation.trimmed_mean(_terms(*values), trim)["x"].tolist() == pytest.approx([mean, -mean])


def test_robust_sums_take_each_tensor_over_the_sites_that_sent_it_and_keep_its_type() -> None:
    terms = [(1, {"x": torch.tensor([1.0])}), (1, {"x": torch.tensor([3.0]), "y": torch.tensor([2.0]).half()})]
    for found in (aggregation.median(terms), aggregation.trimmed_mean(terms, 0.4)):
        assert found["x"].item() == 2
        assert (found["y"].item(), found["y"].dtype) == (2, torch.float16)
    assert aggregation.median([]) == {}


@pytest.mark.parametrize("kind", ["median", "trimmed_mean", "mean"])
def test_one_wild_site_of_five_moves_the_mean_and_no_robust_sum(kind: aggregation.Kind) -> None:
    honest = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    for wild in (1e30, -1e30):
        sites = [*honest, torch.full((3, 2), wild)]
        found = Aggregation(kind, 0.2)([(1, {"x": value}) for value in sites], (), {})["x"]
        inside = (found >= honest.amin(0)) & (found <= honest.amax(0))
        assert bool(inside.all()) == (kind != "mean")


# ------------------------------------------------------------------------------------------------ products
PRODUCT = Product(("b",), "a", ("w",), 0.5, "shared")


def _sites(count: int = 3) -> tuple[Terms, Tensors]:
    start = {**_random(_specs(), 0), "w": torch.randn(6, 4, generator=torch.Generator().manual_seed(9))}
    return [(at + 1.0, _random(_specs(), at + 1)) for at in range(count)], start


def _acting(tensors: Tensors) -> Tensor:
    return tensors["w"].double() + 0.5 * tensors["b"].double() @ tensors["a"].double()


@pytest.mark.parametrize(
    ("kind", "exact"), [("mean", False), ("product_svd", False), ("stack", True), ("residual", True)]
)
def test_only_what_changes_the_base_gives_the_mean_of_products_of_any_rank(kind: aggregation.Kind, exact: bool) -> None:
    terms, start = _sites()
    found = {**start, **Aggregation(kind)(terms, [PRODUCT], start)}
    total = sum(weight for weight, _ in terms)
    wanted = sum(weight / total * _acting({**start, **tensors}) for weight, tensors in terms)
    gap = float((_acting(found) - wanted).abs().max())
    assert gap < 1e-6 if exact else gap > 0.05
    mean = sum(weight / total * tensors["head.weight"].double() for weight, tensors in terms)
    torch.testing.assert_close(found["head.weight"].double(), mean)


def test_a_residual_of_one_site_is_exactly_nothing_and_the_base_keeps_its_bits() -> None:
    terms, start = _sites(count=1)
    found = Aggregation("residual")(terms, [PRODUCT], start)
    assert equal(found, terms[0][1])


def test_a_stack_puts_the_factors_back_and_forgets_no_product_it_began_with() -> None:
    terms, start = _sites()
    untrained = [(weight, {"b": start["b"], "a": start["a"]}) for weight, _ in terms]
    same = {**start, **Aggregation("stack")(untrained, [PRODUCT], start)}
    torch.testing.assert_close(same["w"], start["w"])
    assert Aggregation("stack")(terms, [PRODUCT], start).keys() == {"w", "head.weight"}


@pytest.mark.parametrize("kind", ["stack", "residual"])
def test_a_site_that_sent_one_factor_counts_with_the_coordinators_other(kind: aggregation.Kind) -> None:
    terms, start = _sites()
    terms = [*terms[:2], (terms[2][0], {"b": terms[2][1]["b"]})]
    found = {**start, **Aggregation(kind)(terms, [PRODUCT], start)}
    wanted = sum(weight / 6 * _acting({**start, **tensors}) for weight, tensors in terms)
    torch.testing.assert_close(_acting(found), wanted, rtol=1e-5, atol=1e-5)


def test_two_shared_parts_on_one_base_both_go_into_it() -> None:
    terms, start = _sites()
    start = {**start, **{f"{name}2": value * 3 for name, value in start.items() if name in "ab"}}
    terms = [(weight, {**t, "a2": t["a"] + 1, "b2": t["b"] - 1}) for weight, t in terms]
    second = Product(("b2",), "a2", ("w",), 2.0, "other")
    for kind in ("stack", "residual"):
        found = {**start, **Aggregation(kind)(terms, [PRODUCT, second], start)}
        acting = lambda t: _acting(t) + 2 * t["b2"].double() @ t["a2"].double()  # noqa: E731
        wanted = sum(weight / 6 * acting({**start, **tensors}) for weight, tensors in terms)
        torch.testing.assert_close(acting(found), wanted, rtol=1e-5, atol=1e-5)


def test_a_base_that_is_trained_itself_gets_its_mean_and_the_residual() -> None:
    terms, start = _sites()
    terms = [(weight, {**tensors, "w": start["w"] * weight}) for weight, tensors in terms]
    found = {**start, **Aggregation("residual")(terms, [PRODUCT], start)}
    wanted = sum(weight / 6 * _acting(tensors) for weight, tensors in terms)
    torch.testing.assert_close(_acting(found), wanted, rtol=1e-5, atol=1e-5)


def test_a_product_that_no_site_sent_stays_as_it_is() -> None:
    terms, start = _sites()
    heads = [(weight, {"head.weight": tensors["head.weight"]}) for weight, tensors in terms]
    for kind in ("product_svd", "stack", "residual"):
        assert Aggregation(kind)(heads, [PRODUCT], start).keys() == {"head.weight"}
        assert Aggregation(kind)([], [PRODUCT], start) == {}


def test_weights_of_nothing_are_refused() -> None:
    terms, start = _sites(1)
    for kind in ("mean", "product_svd", "stack", "residual"):
        with pytest.raises(WireError, match="more than nothing"):
            Aggregation(kind)([(0.0, terms[0][1])], [PRODUCT], start)


def test_factors_that_start_at_zero_leave_a_basis_to_train_on() -> None:
    """With B = 0 everywhere the basis is the coordinator's own, made orthonormal: of two zeros nothing would move."""
    start = {"b": torch.zeros(6, 2), "a": torch.randn(2, 4)}
    terms = [(1, start), (2, {**start, "a": torch.randn(2, 4)})]
    found = aggregation.product_svd([PRODUCT], terms, start)
    assert not found["b"].any()
    torch.testing.assert_close(found["a"] @ found["a"].T, torch.eye(2))
    spanned = torch.linalg.matrix_rank(torch.cat([found["a"], start["a"]]), atol=1e-4)
    assert spanned == 2


def test_a_product_svd_of_huge_layers_forms_nothing_dense() -> None:
    """200,000 x 200,000 numbers would be 320 GB."""
    size, generator = 200_000, torch.Generator().manual_seed(1)
    shapes = {"b": (size, 2), "a": (2, size)}
    draw = lambda: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}  # noqa: E731
    terms = [(1.0, draw())] * 2
    found = aggregation.product_svd([PRODUCT], terms, draw())
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    rows = slice(0, 50)
    wanted = terms[0][1]["b"][rows] @ terms[0][1]["a"][:, rows]
    torch.testing.assert_close(found["b"][rows] @ found["a"][:, rows], wanted, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ configuration
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedper"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"aggregate": "trimmed_mean"}, "trim belongs to"),
        ({"trim": 0.1}, "trim belongs to"),
        ({"aggregate": "median", "trim": 0.1}, "trim belongs to"),
        ({"aggregate": "trimmed_mean", "trim": 0.5}, "less than 0.5"),
        ({"aggregate": "trimmed_mean", "trim": -0.1}, "greater than or equal to 0"),
        ({"aggregate": "median", "weights": "examples"}, "counts every site once"),
        ({"aggregate": "krum"}, "product_svd"),
    ],
)
def test_what_would_have_no_effect_is_refused(strategy: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        registry.build("strategies", strategy, options)


@pytest.mark.parametrize("options", [{}, {"aggregate": "median"}, {"aggregate": "trimmed_mean", "trim": 0.25}])
def test_options_survive_writing_out_and_reading_again(options: dict[str, Any]) -> None:
    read = SumOptions.model_validate(options)
    assert SumOptions.model_validate(read.model_dump()) == read
    assert read.weights == ("uniform" if options else "examples")
    assert read.aggregation() == Aggregation(options.get("aggregate", "mean"), options.get("trim", 0.0))


def test_a_strategy_declares_what_its_sum_needs() -> None:
    told = {
        kind: (told.needs_individual_updates, told.changes_base, told.restarts_factors)
        for kind in ("mean", "median", "trimmed_mean", "product_svd", "stack", "residual")
        for told in [FedAvg(aggregate=Aggregation(kind)).declares]
    }
    assert told == {
        "mean": (False, False, False),
        "median": (True, False, False),
        "trimmed_mean": (True, False, False),
        "product_svd": (True, False, True),
        "stack": (True, True, True),
        "residual": (True, True, False),
    }
    assert FedAvg(declares=Declaration(needs_individual_updates=True)).declares.needs_individual_updates
    for kind in ("stack", "residual"):
        with pytest.raises(ConfigError, match="adapters that are summed"):
            FedAvg(declares=Declaration(combination="router"), aggregate=Aggregation(kind))


@pytest.mark.parametrize("kind", ["product_svd", "stack", "residual"])
def test_a_sum_of_products_without_a_product_is_refused_with_the_roles_there_are(kind: aggregation.Kind) -> None:
    strategy = FedAvg(aggregate=Aggregation(kind))
    head = {name: spec for name, spec in _specs().items() if name == "head.weight"}
    for specs, roles in ((head, "'head'"), (_specs("personal"), "lora_a")):
        with pytest.raises(ConfigError, match=rf"product of two factors(.|\n)*{kind}(.|\n)*{roles}"):
            strategy.down(specs, 1)
    half = FedAvg(shares=lambda tag: tag.role != "lora_b", aggregate=Aggregation(kind))
    with pytest.raises(ConfigError, match="with both factors shared"):
        half.down(_specs(), 1)


def test_bases_come_down_dense_and_never_go_up() -> None:
    base = "blocks.0.attn.qkv.weight"
    for kind, slots in (("stack", "base"), ("residual", "parameter")):
        strategy = FedAvg(aggregate=Aggregation(kind))
        down = strategy.down(_specs(), 1)
        assert strategy.up(_specs(), 1).keys() == _specs().keys() == down.keys() - {base}
        assert (down[base].shape, down[base].tag.slot, down[base].tag.block) == ((6, 4), "base", 0)
        assert down["a"].tag.slot == down["b"].tag.slot == slots
        assert math.prod(size or 0 for size in down[base].shape) == 24
    for kind in ("mean", "product_svd", "median"):
        assert FedAvg(aggregate=Aggregation(kind)).down(_specs(), 1) == _specs()
