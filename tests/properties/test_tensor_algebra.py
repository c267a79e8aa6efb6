"""Laws of the algebra of named tensors, over drawn names, shapes, types and values."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import tensors
from consilium.tensors import Tensors

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def named(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Tensors:
    names = draw(st.lists(NAMES, max_size=5, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return {
        name: (torch.randn(draw(SHAPES), generator=generator) * 50).abs().to(draw(st.sampled_from(dtypes)))
        for name in names
    }


@given(named())
def test_written_and_read_is_the_identity(held: Tensors) -> None:
    assert tensors.equal(tensors.loads(tensors.dumps(held)), held)


@given(named(), st.data())
def test_any_flipped_bit_changes_both_digests(held: Tensors, data: st.DataObject) -> None:
    filled = [name for name, value in held.items() if value.numel()]
    if not filled:
        return
    name = data.draw(st.sampled_from(filled))
    raw = bytearray(held[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1
    changed = torch.frombuffer(raw, dtype=torch.uint8).view(held[name].dtype).view(held[name].shape)
    assert tensors.digest(changed) != tensors.digest(held[name])
    assert tensors.digest_all({**held, name: changed}) != tensors.digest_all(held)


@given(named([torch.float32, torch.float64]), st.lists(st.integers(1, 10_000), min_size=1, max_size=5))
def test_the_mean_of_equal_terms_is_that_term(held: Tensors, weights: list[int]) -> None:
    assert tensors.equal(
        tensors.weighted_mean([(weight, held) for weight in weights]), {n: held[n] for n in sorted(held)}
    )


@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.integers(0, 999)), min_size=1, max_size=6), st.integers(1, 5))
def test_the_mean_is_numpys_and_lies_between_its_terms(pairs: list[tuple[float, int]], length: int) -> None:
    rows = [torch.randn(length, generator=torch.Generator().manual_seed(seed)) for _, seed in pairs]
    mean = tensors.weighted_mean([(weight, {"x": row}) for (weight, _), row in zip(pairs, rows, strict=True)])["x"]
    stacked = np.stack([row.double().numpy() for row in rows])
    slow = np.average(stacked, axis=0, weights=[weight for weight, _ in pairs])
    np.testing.assert_allclose(mean.numpy(), slow.astype(np.float32), rtol=1e-6, atol=1e-7)
    assert (mean.numpy() >= stacked.min(0) - 1e-6).all()
    assert (mean.numpy() <= stacked.max(0) + 1e-6).all()


@given(st.floats(0.1, 100), st.integers(0, 99), st.integers(0, 99))
def test_the_mean_does_not_depend_on_the_unit_of_weights(unit: float, first: int, second: int) -> None:
    a, b = ({"x": torch.randn(3, generator=torch.Generator().manual_seed(seed))} for seed in (first, second))
    plain, scaled = tensors.weighted_mean([(2, a), (5, b)]), tensors.weighted_mean([(2 * unit, a), (5 * unit, b)])
    torch.testing.assert_close(plain["x"], scaled["x"])


@given(named([torch.float32]), named([torch.float32]))
def test_split_then_merge_is_the_identity(first: Tensors, second: Tensors) -> None:
    both = {**first, **second}
    kept = tensors.select(both, both.keys() - first.keys())
    assert tensors.equal({**kept, **tensors.select(both, first)}, both)
    assert tensors.num_elements(kept) + tensors.num_elements(tensors.select(both, first)) == tensors.num_elements(both)


@given(named([torch.float64]))
def test_distance_to_oneself_is_zero_and_grows_with_the_square(held: Tensors) -> None:
    assert tensors.squared_distance(held, held) == 0
    away = {name: value + 3 for name, value in held.items()}
    torch.testing.assert_close(
        tensors.squared_distance(away, held).double(), torch.tensor(9.0 * tensors.num_elements(held)).double()
    )
