"""Codecs: how far narrow tensors may be off, what they weigh, and that what was left unsaid is said later."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.errors import TrainingError, WireError
from consilium.filters.codec import Codec
from consilium.filters.narrow import Width, forms, narrowed, num_bytes, widened
from consilium.protocols import Slot, Spec, Tag
from consilium.rounds import Broadcast
from consilium.tensors import digest, equal

WIDTHS: tuple[Width, ...] = ("bfloat16", "int8")
TAG = Tag("m", "lora_a")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def values(draw: st.DrawFn) -> Tensor:
    """Numbers of very different size, rows of zeros among them."""
    shape = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    size = 10.0 ** draw(st.sampled_from([-46, -44, -40, -38, -20, -3, 0, 3, 20, 38]))
    drawn = (torch.randn(shape, generator=generator).double() * size).clamp(-3.4e38, 3.4e38).float()
    keep = torch.rand(shape[:1], generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return drawn * keep.float().reshape(-1, *[1] * (drawn.ndim - 1)) if drawn.ndim else drawn


@given(values(), st.sampled_from(WIDTHS))
def test_narrow_tensors_have_the_foretold_forms_and_bytes(value: Tensor, width: Width) -> None:
    parts = narrowed(value, width)
    shape = tuple(value.shape)
    assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == forms(shape, width)
    assert sum(t.nbytes for t in parts.values()) == num_bytes(shape, width)
    free = forms((None, *shape[1:]) if shape else shape, width)
    assert all(
        want in (None, have) for part, t in parts.items() for want, have in zip(free[part][0], t.shape, strict=True)
    )


@given(values())
def test_bfloat16_keeps_eight_bits(value: Tensor) -> None:
    found = widened(narrowed(value, "bfloat16"), "bfloat16")
    normal = value.abs() >= torch.finfo(torch.float32).smallest_normal
    off = (found.double() - value.double()).abs()
    assert bool((off[normal] <= value.abs().double()[normal] * 2**-8).all())
    assert bool((off[~normal] <= 2**-134).all())
    assert bool(found.isfinite().all())


@given(values())
def test_int8_is_at_most_half_a_step_off(value: Tensor) -> None:
    parts = narrowed(value, "int8")
    found = widened(parts, "int8")
    rows, columns = (len(value), math.prod(value.shape[1:])) if value.ndim > 1 else (1, value.numel())
    along = 1 if rows <= columns else 0
    matrix, off = value.reshape(rows, columns).double(), (found - value).double().abs().reshape(rows, columns)
    largest = matrix.abs().amax(along) if matrix.numel() else torch.zeros(min(rows, columns)).double()
    bound = largest / 254 * (1 + 2**-14) + 2**-142 + (largest - torch.finfo(torch.bfloat16).max).clamp(min=0)
    assert bool((off <= bound.unsqueeze(along)).all())
    assert bool(found.isfinite().all())
    assert not found[value == 0].any()


@given(values(), st.sampled_from(WIDTHS))
def test_what_was_coded_once_is_coded_without_loss(value: Tensor, width: Width) -> None:
    if value.abs().max().item() > 1e37 if value.numel() else False:
        return
    once = widened(narrowed(value, width), width)
    twice = widened(narrowed(once, width), width)
    torch.testing.assert_close(twice, once, rtol=0 if width == "bfloat16" else 1e-6, atol=1e-43)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_coded(width: Width, bad: float) -> None:
    with pytest.raises(TrainingError):
        narrowed(torch.tensor([1.0, bad]), width)


def test_scales_of_another_tensor_are_refused() -> None:
    parts = narrowed(torch.randn(3, 5), "int8")
    for scale in (torch.ones(5), torch.ones(1), torch.ones(3, 1), torch.ones(0), torch.ones(())):
        with pytest.raises(WireError, match="another tensor"):
            widened({**parts, "scale": scale}, "int8")


# ------------------------------------------------------------------------------------------------ what is coded
def _spec(*shape: int | None, slot: Slot = "parameter", dtype: torch.dtype = torch.float32) -> Spec:
    return Spec(shape, Tag("m", "lora_a", slot=slot), dtype)


SPECS = {
    "a": _spec(8, 192),
    "b": _spec(576, 8),
    "bias": _spec(3),
    "number": _spec(1),
    "free": _spec(None, 4),
    "control": _spec(8, 192, slot="control"),
    "statistic": _spec(8, 192, slot="statistic"),
    "base": _spec(8, 192, slot="base"),
    "count": _spec(9, dtype=torch.int64),
    "sum": _spec(9, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("width", "coded"), [("bfloat16", {"a", "b", "bias", "number", "free"}), ("int8", {"a", "b", "bias", "free"})]
)
def test_parameters_in_float32_are_coded_and_nothing_else(width: Width, coded: set[str]) -> None:
    codec = Codec(width)
    assert codec.coded(SPECS).keys() == coded
    assert codec.wire(SPECS).keys() == SPECS.keys() | set(codec.names(coded))
    assert Codec().wire(SPECS) == SPECS
    assert Codec().coded(SPECS) == {}


@pytest.mark.parametrize(("width", "ratio"), [("bfloat16", 2.0), ("int8", 3.9)])
def test_factors_weigh_half_or_a_quarter(width: Width, ratio: float) -> None:
    codec, factors = Codec(width), {name: SPECS[name] for name in ("a", "b")}
    whole = sum(4 * math.prod(size or 0 for size in spec.shape) for spec in factors.values())
    assert whole / sum(codec.num_bytes(spec) for spec in factors.values()) >= ratio


# ------------------------------------------------------------------------------------------------ up
def _draws(*shape: int, count: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) * size for _ in range(count)]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_sum_of_what_arrived_is_the_sum_of_what_was_meant_but_for_the_last_residual(width: Width) -> None:
    codec, specs, kept = Codec(width), {"w": _spec(4, 6)}, {}
    meant, arrived = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    for received, update in zip(_draws(4, 6, count=40), _draws(4, 6, count=41), strict=False):
        wire, kept = codec.reply({"w": received + 0.01 * update}, {"w": received}, kept, specs)
        assert wire.keys() <= codec.wire(specs).keys() - {"w"}
        meant += (received + 0.01 * update).double()
        arrived += codec.read(wire, {"w": received}, specs)["w"].double()
    torch.testing.assert_close(arrived + kept["w"].double(), meant, rtol=0, atol=1e-8)
    assert kept["w"].abs().max() > 1e-6


@pytest.mark.parametrize(("feedback", "closer"), [(True, True), (False, False)])
def test_a_small_steady_drift_arrives_with_feedback_and_is_lost_without(feedback: bool, closer: bool) -> None:
    """One large number in the row makes the step so wide that the drift of the others is less than half of it."""
    codec, specs, kept = Codec("int8", feedback), {"w": _spec(8)}, {}
    drift = torch.tensor([1.0, *[0.001] * 7])
    held = torch.zeros(8)
    for _ in range(100):
        wire, kept = codec.reply({"w": held + drift}, {"w": held}, kept, specs)
        held = codec.read(wire, {"w": held}, specs)["w"]
    moved = held[1:]
    assert bool((moved > 0).all()) == closer
    assert (moved - 0.1).abs().max() <= (1 / 127 if closer else 0.1)
    assert bool(kept) == feedback


def test_a_residual_waits_until_its_tensor_is_sent_again_unless_its_basis_changes() -> None:
    codec, specs = Codec("int8", forgets=frozenset({"b"})), {"a": _spec(2, 3), "b": _spec(3, 2), "head": _spec(2, 2)}
    held = {name: torch.zeros(spec.shape) for name, spec in specs.items()}  # type: ignore[arg-type]
    update = {name: torch.randn(value.shape) for name, value in held.items()}
    wire, kept = codec.reply({"a": update["a"], "b": update["b"]}, held, {}, specs)
    assert kept.keys() == {"a"}
    _, later = codec.reply({"head": update["head"]}, held, kept, specs)
    assert equal({"a": later["a"]}, kept)
    assert "b" not in {name.split(":")[0] for name in later}
    assert "b:int8" in wire


def test_what_was_not_received_or_not_declared_travels_as_it_is() -> None:
    codec, specs = Codec("int8"), {"w": _spec(4, 4)}
    wire, kept = codec.reply({"w": torch.ones(4, 4), "secret": torch.ones(2)}, {}, {}, specs)
    assert wire.keys() == {"w", "secret"}, "what is not declared is left for the message to refuse"
    assert kept == {}


@pytest.mark.parametrize(
    ("wire", "held"),
    [
        ({"w:int8"}, {"w"}),
        ({"w:scale"}, {"w"}),
        ({"w:int8", "w:scale"}, set()),
        ({"w:int8", "w:scale", "w"}, {"w"}),
        ({"v:int8", "v:scale"}, {"w", "v"}),
        ({"w:other"}, {"w"}),
        ({"x"}, {"w"}),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(wire: set[str], held: set[str]) -> None:
    codec, value = Codec("int8"), torch.randn(3, 4)
    tensors = {name: narrowed(value, "int8").get(name.partition(":")[2], value) for name in wire}
    with pytest.raises(WireError, match="coded tensor"):
        codec.read(tensors, dict.fromkeys(held, value), {"w": _spec(3, 4)})


def test_a_step_of_another_shape_or_out_of_bounds_is_refused() -> None:
    codec, specs = Codec("int8"), {"w": _spec(None, 4)}
    wire = {f"w:{part}": value for part, value in narrowed(torch.ones(2, 4), "int8").items()}
    with pytest.raises(WireError, match="another shape"):
        codec.read(wire, {"w": torch.zeros(3, 4)}, specs)
    with pytest.raises(TrainingError, match="infinity"):
        codec.read({**wire, "w:scale": torch.full((2,), 1e36)}, {"w": torch.full((2, 4), 3e38)}, specs)


def test_without_a_width_everything_is_left_alone() -> None:
    codec, update, specs = Codec(), {"a": torch.randn(8, 192)}, SPECS
    wire, kept = codec.reply(update, {"a": torch.zeros(8, 192)}, {}, specs)
    assert (wire["a"] is update["a"], kept) == (True, {})
    assert codec.read(wire, {}, specs)["a"] is update["a"]
    shared, memory = codec.broadcast({"a": torch.zeros(8, 192)}, update, Broadcast(), specs)
    assert (shared["a"] is update["a"], memory) == (True, Broadcast())
    assert codec.request(update, {}, {"a": "x"}, memory)["a"] is update["a"]


# ------------------------------------------------------------------------------------------------ down
def _round_trip(codec: Codec, feedback_after: int = 30) -> tuple[Tensor, Tensor, Broadcast]:
    """A mean that moves by a steady drift from what the sites hold, and a site that always hears of it."""
    specs, memory, drift = {"w": _spec(8)}, Broadcast(), torch.tensor([1.0, *[0.001] * 7])
    shared = {"w": torch.zeros(8)}
    site = shared["w"]
    for _ in range(feedback_after):
        before = shared
        shared, memory = codec.broadcast(before, {"w": before["w"] + drift}, memory, specs)
        wire = codec.request(shared, {"w": digest(site)}, {"w": digest(shared["w"])}, memory)
        assert wire.keys() == set(codec.names(["w"]))
        site = codec.read(wire, {"w": site}, specs)["w"]
        assert equal({"w": site}, shared)
    return site, feedback_after * drift, memory


@pytest.mark.parametrize("width", WIDTHS)
def test_a_site_holds_what_the_coordinator_believes_and_nothing_is_lost_on_the_way(width: Width) -> None:
    site, meant, memory = _round_trip(Codec(width))
    torch.testing.assert_close(site.double() + memory.residual["w"].double(), meant.double(), rtol=0, atol=1e-5)
    lost, _, none = _round_trip(Codec(width, feedback=False))
    assert none.residual == {}
    assert (lost - meant).abs().max() > (site - meant).abs().max() or width == "bfloat16"


def test_who_holds_anything_else_gets_the_whole_value() -> None:
    codec, specs = Codec("int8"), {"w": _spec(8), "v": _spec(8)}
    first = {name: torch.randn(8) for name in specs}
    shared, memory = codec.broadcast(first, {"w": torch.randn(8), "v": first["v"]}, Broadcast(), specs)
    assert shared["v"] is first["v"], "what did not change is not coded"
    versions = {name: digest(value) for name, value in shared.items()}
    lacking = {"w": shared["w"]}
    for held in ({}, {"w": "else"}, {"w": versions["w"]}):
        assert codec.request(lacking, held, versions, memory).keys() == {"w"}
    assert codec.request(lacking, {"w": digest(first["w"])}, versions, memory).keys() == {"w:int8", "w:scale"}
    own = {"w": torch.randn(8)}  # a strategy with something of its own for this site
    assert codec.request(own, {"w": digest(first["w"])}, {"w": digest(own["w"])}, memory).keys() == {"w"}
