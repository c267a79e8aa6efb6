"""The algebra of named tensors on chosen values: zero, one, empty, non-finite; examples are worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from consilium import payload, tensors
from consilium.errors import WireError
from consilium.protocols import Spec, Tag


def test_map_goes_name_by_name_and_refuses_other_names() -> None:
    first, second = {"b": torch.ones(2), "a": torch.zeros(1)}, {"a": torch.ones(1), "b": torch.ones(2)}
    added = tensors.map_tensors(torch.add, first, second)
    assert list(added) == ["a", "b"]
    assert added["b"].tolist() == [2, 2]
    with pytest.raises(WireError, match=r"not in both: \['c'\]"):
        tensors.map_tensors(torch.add, first, {**second, "c": torch.ones(1)})


def test_detached_copies_share_nothing() -> None:
    live = {"w": torch.ones(3, requires_grad=True), "view": torch.ones(4, 2).T}
    copies = tensors.detach(live)
    assert not copies["w"].requires_grad
    assert copies["view"].is_contiguous()
    copies["w"] += 1
    assert live["w"].tolist() == [1, 1, 1]


def test_weighted_mean_by_hand() -> None:
    terms = [(1.0, {"x": torch.tensor([1.0, 0.0])}), (3.0, {"x": torch.tensor([5.0, 4.0]), "y": torch.tensor(7.0)})]
    mean = tensors.weighted_mean(terms)
    assert mean["x"].tolist() == [4.0, 3.0]
    assert mean["y"].item() == 7.0
    assert tensors.weighted_mean([]) == {}


def test_weighted_mean_sums_in_float64_and_keeps_the_type() -> None:
    tiny = [(1.0, {"x": torch.tensor(2.0**24)}), (1.0, {"x": torch.tensor(1.0)}), (1.0, {"x": torch.tensor(1.0)})]
    mean = tensors.weighted_mean(tiny)["x"]
    assert mean.dtype == torch.float32
    assert mean.item() == torch.tensor((2.0**24 + 2) / 3).item()
    half = tensors.weighted_mean([(1.0, {"x": torch.ones(2, dtype=torch.bfloat16)})])["x"]
    assert half.dtype == torch.bfloat16


def slow_mean(terms: list[tuple[float, tensors.Tensors]]) -> dict[str, torch.Tensor]:
    """Tensor by tensor, with a new copy in every step."""
    found = {}
    for name in sorted({name for _, term in terms for name in term}):
        held = [(weight, term[name]) for weight, term in terms if name in term]
        total = torch.zeros_like(held[0][1], dtype=torch.float64)
        for weight, tensor in held:
            total = total + tensor.to(torch.float64) * weight
        found[name] = (total / float(sum(weight for weight, _ in held))).to(held[0][1].dtype)
    return found


def laid_out(seed: int, names: str, width: torch.dtype = torch.float32, gap: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of odd shapes behind one another in one piece of memory, with a gap between."""
    shapes = {"a": (3, 5), "b": (), "c": (7,), "d": (0, 2), "e": (2, 1, 4)}
    whole, at, found = torch.randn(100, generator=torch.Generator().manual_seed(seed)).to(width), 3, {}
    for name in names:
        length = math.prod(shapes[name])
        found[name] = whole[at : at + length].view(shapes[name])
        at += length + gap
    return found


TERMS = {
    "laid out alike": [laid_out(seed, "abcde") for seed in range(4)],
    "with gaps": [laid_out(0, "abc"), laid_out(1, "abc", gap=1), laid_out(2, "abc")],
    "some names first": [laid_out(0, "ac"), laid_out(1, "abcde"), laid_out(2, "ac"), laid_out(3, "abcde")],
    "some names last": [laid_out(0, "abcde"), laid_out(1, "bc"), laid_out(2, "e"), laid_out(3, "abcde")],
    "apart": [laid_out(0, "ab"), laid_out(1, "ce"), laid_out(2, "ab"), laid_out(3, "ce")],
    "in another order": [laid_out(0, "ab"), laid_out(1, "ba"), laid_out(2, "ab")],
    "of another type": [laid_out(0, "abc"), laid_out(1, "abc", torch.bfloat16), laid_out(2, "abc", torch.float64)],
    "of mixed types": [
        {**laid_out(seed, "ab"), **{n: t.half() for n, t in laid_out(9, "ce").items()}} for seed in (0, 1)
    ],
    "copies": [{name: value.clone() for name, value in laid_out(seed, "abcde").items()} for seed in range(3)],
    "transposed": [{"a": laid_out(seed, "a")["a"].T, "c": laid_out(seed, "ac")["c"]} for seed in range(3)],
}


@pytest.mark.parametrize("kind", TERMS)
def test_a_mean_has_the_bits_of_the_slow_one_wherever_its_terms_lie(kind: str) -> None:
    terms = [(0.1 + 1.7 * at, term) for at, term in enumerate(TERMS[kind])]
    before = [tensors.digest_all(term) for _, term in terms]
    assert tensors.equal(tensors.weighted_mean(iter(terms)), slow_mean(terms))
    assert [tensors.digest_all(term) for _, term in terms] == before


def test_tensors_of_a_message_are_one() -> None:
    declared = {n: Spec(shape, Tag("head", "head")) for n, shape in {"w": (2, 3), "b": (2,)}.items()}
    data = b"".join(payload.chunks({"w": torch.ones(2, 3), "b": torch.zeros(2)}, declared))
    read = payload.loads(data, declared)
    joint = tensors._flat([*read.values()])
    assert joint is not None
    assert joint.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    version = read["w"]._version
    read["b"] += 1
    assert read["w"]._version == version  # writing to one is no news of another
    assert tensors._flat([read["w"], read["b"]]) is None
    assert tensors._flat([read["w"].T, read["b"]]) is None


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_mean_needs_weights(weight: float) -> None:
    with pytest.raises(WireError, match="more than nothing"):
        tensors.weighted_mean([(weight, {"x": torch.ones(1)})])


def test_squared_distance_is_over_the_second_names_and_has_the_gradient_of_a_square() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    distance = tensors.squared_distance({"x": x, "other": torch.ones(9)}, {"x": torch.tensor([0.0, 5.0])})
    distance.backward()
    assert distance.item() == 1 + 9
    assert x.grad is not None
    assert x.grad.tolist() == [2, -6]
    assert tensors.squared_distance({"x": x}, {}).item() == 0


def test_non_finite_names() -> None:
    values = {"fine": torch.ones(2), "nan": torch.tensor([1.0, float("nan")]), "inf": torch.tensor(-float("inf"))}
    assert tensors.non_finite({**values, "empty": torch.zeros(0), "int": torch.ones(1, dtype=torch.int64)}) == [
        "inf",
        "nan",
    ]


def test_equal_sees_names_shapes_types_and_single_bits() -> None:
    one = {"x": torch.zeros(2, 2)}
    assert tensors.equal(one, {"x": torch.zeros(2, 2)})
    for other in (
        {"y": torch.zeros(2, 2)},
        {"x": torch.zeros(4)},
        {"x": torch.zeros(2, 2, dtype=torch.float64)},
        {"x": torch.full((2, 2), -0.0)},
        {**one, "y": torch.zeros(1)},
    ):
        assert not tensors.equal(one, other)
    assert tensors.equal({"x": torch.tensor(float("nan"))}, {"x": torch.tensor(float("nan"))})


def test_digests_see_a_transposed_view_as_its_values() -> None:
    square = torch.arange(4.0).view(2, 2)
    assert tensors.digest(square.T) == tensors.digest(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    assert tensors.digest(square.T) != tensors.digest(square)
    assert tensors.digest_all({"a": square}) != tensors.digest_all({"b": square})
    assert len(tensors.digest_all({})) == 64


def test_tensors_that_share_memory_are_written_apart() -> None:
    block = torch.arange(6.0)
    held = {"kept": block, "sent": block, "part": block[:2], "turned": block.view(2, 3).T}
    assert tensors.equal(tensors.loads(tensors.dumps(held)), held)


def test_a_file_has_the_bytes_that_the_library_would_write() -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8]
    held = {f"{kind} é": torch.arange(5).to(kind) for kind in [*kinds, torch.int16, torch.uint8, torch.bool]}
    held |= {"none": torch.empty(0, 3), "one": torch.tensor(1.5), "turned": torch.ones(2, 3).T}
    text = json.dumps({"a": 'é\n\x01\x7f"'})
    for each, meta, metadata in (
        (held, {"a": 'é\n\x01\x7f"'}, {"consilium": text}),
        (held, None, None),
        ({}, None, None),
    ):
        assert tensors.dumps(each, meta) == save(tensors.detach(each), metadata=metadata)


def test_pieces_of_a_file_are_no_copies() -> None:
    value = torch.zeros(1000)
    (piece,) = [piece for piece in tensors.pieces({"x": value}) if len(piece) == 4000]
    value += 1
    assert bytes(piece[:4]) == bytes.fromhex("0000803f")


def test_a_type_without_a_name_is_refused() -> None:
    with pytest.raises(WireError, match=r"(?s)no name.*x.*complex64"):
        tensors.dumps({"x": torch.zeros(1, dtype=torch.complex64)})


def test_meta_is_read_without_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(tensors.dumps({"x": torch.ones(3)}, {"round": 4, "sites": ["a"]}))
    assert tensors.meta_of(path.read_bytes()) == {"round": 4, "sites": ["a"]}
    path.write_bytes(tensors.dumps({"x": torch.ones(3)}))
    assert tensors.meta_of(path.read_bytes()) == {}


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, b"no tensors here at all"])
def test_bytes_that_are_no_tensors_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="not a whole safetensors payload"):
        tensors.loads(data)


def test_select_names_what_is_missing() -> None:
    held = {"a": torch.ones(1), "b": torch.ones(1)}
    assert list(tensors.select(held, ["b"])) == ["b"]
    with pytest.raises(WireError, match=r"\['c'\]"):
        tensors.select(held, ["a", "c"])


def test_num_elements() -> None:
    assert tensors.num_elements({"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.0)}) == 7
