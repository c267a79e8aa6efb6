"""Payloads: what goes in comes out bit by bit, at the size that was foretold, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium import payload
from consilium.errors import WireError
from consilium.protocols import Spec, Tag
from consilium.tensors import equal

TAG = Tag("head", "head")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]
Declared = dict[str, Spec]


@st.composite
def declared(draw: st.DrawFn) -> tuple[Declared, dict[str, Tensor]]:
    """Some declared tensors, some of their dimensions free, and some of them at hand."""
    names = draw(st.lists(st.text("abé./0", min_size=1, max_size=4), max_size=12, unique=True))
    specs, found = {}, {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        free = tuple(None if draw(st.booleans()) else size for size in shape)
        specs[name] = Spec(free, TAG, dtype)
        if draw(st.booleans()):
            found[name] = (torch.rand(shape, generator=torch.Generator().manual_seed(len(specs))) * 90).to(dtype)
    return specs, found


def _dumps(tensors: dict[str, Tensor], specs: Declared) -> bytes:
    return b"".join(payload.chunks(tensors, specs))


@given(declared())
def test_what_goes_in_comes_out(drawn: tuple[Declared, dict[str, Tensor]]) -> None:
    specs, tensors = drawn
    data = _dumps(tensors, specs)
    assert equal(payload.loads(data, specs), tensors)
    assert payload.loads(data, dict(reversed(specs.items()))).keys() == tensors.keys()
    found = payload.rows(data, specs)
    assert [row["name"] for row in found] == sorted(tensors)
    assert [(row["shape"], row["bytes"]) for row in found] == [
        (list(tensors[name].shape), tensors[name].nbytes) for name in sorted(tensors)
    ]


@given(declared())
def test_the_size_is_known_from_what_is_declared(drawn: tuple[Declared, dict[str, Tensor]]) -> None:
    specs, tensors = drawn
    fixed = {name: replace(specs[name], shape=tuple(value.shape)) for name, value in tensors.items()}
    data = _dumps(tensors, {**specs, **fixed})
    assert len(data) == payload.num_bytes({**specs, **fixed}, tensors)
    if tensors:
        assert len(data) == 9 + -(-len(specs) // 8) + sum(value.nbytes for value in tensors.values())
    free = sum(specs[name].shape.count(None) for name in tensors)
    assert len(_dumps(tensors, specs)) == len(data) + 4 * free


def test_the_bytes_are_these() -> None:
    specs = {"b": Spec((None, 2), TAG), "a": Spec((2,), TAG, torch.uint8), "c": Spec((), TAG, torch.float64)}
    tensors = {"a": torch.tensor([7, 8], dtype=torch.uint8), "b": torch.tensor([[1.0, -2.0]])}
    data = _dumps(tensors, specs)
    assert data[0] == 1
    assert data[9:].hex(" ") == "03 01 00 00 00 00 00 80 3f 00 00 00 c0 07 08"


def test_a_view_travels_as_its_values_and_what_arrives_can_be_written_to() -> None:
    specs = {"w": Spec((3, 2), TAG)}
    square = torch.arange(6.0).view(2, 3)
    found = payload.loads(_dumps({"w": square.T}, specs), specs)["w"]
    assert torch.equal(found, square.T)
    found += 1
    assert square[0, 0] == 0


SPECS = {"w": Spec((2, 3), TAG), "stack": Spec((None, 2), TAG, torch.float64), "n": Spec((), TAG, torch.int64)}
HELD = {"w": torch.arange(6.0).view(2, 3), "stack": torch.ones(5, 2, dtype=torch.float64)}
WHOLE = _dumps(HELD, SPECS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (WHOLE[:5], "cut off"),
        (WHOLE[:9], "cut off"),
        (WHOLE[:12], "cut off"),
        (WHOLE[:-1], "another length"),
        (WHOLE + b"\0", "another length"),
        (b"\2" + WHOLE[1:], "another format"),
        (WHOLE[:1] + b"\0" + WHOLE[2:], "declare other tensors"),
        (WHOLE[:9] + b"\x0f" + WHOLE[10:], "no tensor that is declared"),
        (WHOLE[:9] + b"\0" + WHOLE[10:], "no tensor that is declared"),
        (WHOLE[:9] + b"\7" + WHOLE[10:], "another length"),
        (WHOLE[:10] + b"\4" + WHOLE[11:], "another length"),
        (WHOLE[:10] + b"\xff\xff\xff\xff" + WHOLE[14:], "another length"),
    ],
)
def test_what_is_no_whole_payload_is_refused(data: bytes, reason: str) -> None:
    for read in (payload.loads, payload.rows):
        with pytest.raises(WireError, match=f"{reason}(.|\n)*site a, round 3"):
            read(data, SPECS, "site a, round 3")


@pytest.mark.parametrize(
    "other",
    [
        {**SPECS, "v": SPECS["w"]},
        {name: spec for name, spec in SPECS.items() if name != "n"},
        {**SPECS, "w": Spec((3, 2), TAG)},
        {**SPECS, "w": Spec((2, None), TAG)},
        {**SPECS, "w": Spec((2, 3), TAG, torch.int32)},
    ],
    ids=["one more", "one less", "another shape", "free", "another type"],
)
def test_two_ends_that_declare_other_tensors_do_not_understand_one_another(other: Declared) -> None:
    with pytest.raises(WireError, match="declare other tensors"):
        payload.loads(WHOLE, other)


def test_a_tag_is_no_part_of_the_form() -> None:
    tagged = {name: replace(spec, tag=Tag("other", "bias")) for name, spec in SPECS.items()}
    assert equal(payload.loads(WHOLE, tagged), HELD)


@given(st.binary(max_size=60), st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE)))
def test_any_other_bytes_are_tensors_of_the_declared_form_or_refused(noise: bytes, start: int, end: int) -> None:
    try:
        found = payload.loads(WHOLE[:start] + noise + WHOLE[end:], SPECS)
    except WireError:
        return
    assert found.keys() <= SPECS.keys()
    for name, value in found.items():
        assert value.dtype == SPECS[name].dtype
        assert all(want in (None, have) for want, have in zip(SPECS[name].shape, value.shape, strict=True))
