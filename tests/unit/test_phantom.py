"""The phantom: what its table holds, what its pictures depend on, and that its signs mean what they should."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from consilium import registry
from consilium.errors import ConfigError, DataError
from consilium.sites import phantom, phantom_camera, phantom_draw
from consilium.sites.phantom import CLASSES, EVERYWHERE, FOUR, MARKED_SITE, Phantom, PhantomOptions

SMALL = PhantomOptions(num_images=80, image_size=32)
CLEAN = phantom_camera.Camera((1.0, 1.0, 1.0), 0.0, 0.0, 0.0, 1.0, 0.0, 0)
PLAIN = phantom_draw.Lesion(**dict.fromkeys(phantom_draw.Lesion.__annotations__, 0.0))
EVERY_SIGN = replace(phantom_draw.Lesion(**dict.fromkeys(phantom_draw.Lesion.__annotations__, 0.6)), irregularity=0.1)
PATIENT = phantom_draw.Patient(tone=0.2, hairs=0.0)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(lesion: phantom_draw.Lesion, *, own: int = 0, shot: int = 0, size: int = 64, marked: bool = False) -> Any:
    randoms = (random(own), random(shot))
    pixels = phantom_draw.draw(PATIENT, lesion, CLEAN, marked=marked, size=size, randoms=randoms)
    return pixels.astype(np.float64)


def test_the_default_has_four_hospitals_of_different_size_and_mix() -> None:
    records = registry.build("sources", "phantom", {}).records()
    assert list(records.columns) == ["id", "label", "site", "group"]
    assert len(records) == PhantomOptions().num_images
    assert records.id.is_unique
    assert records.groupby("group").site.nunique().max() == 1
    assert 1.5 < records.groupby("group").size().mean() < 2.5
    assert records.site.value_counts().to_dict().keys() == {site.name for site in FOUR}
    assert records.site.value_counts().nunique() == 4
    for site in FOUR:
        shares = records[records.site == site.name].label.value_counts(normalize=True)
        assert [shares[name] for name in CLASSES] == pytest.approx(site.mix, abs=0.03)


@settings(max_examples=25)
@given(num_sites=st.integers(1, 12), extra=st.integers(0, 60), size=st.integers(16, 40), seed=st.integers(0, 2**40))
def test_any_number_of_sites_and_pictures_of_any_size(num_sites: int, extra: int, size: int, seed: int) -> None:
    options = PhantomOptions(num_images=num_sites + extra, num_sites=num_sites, image_size=size, seed=seed)
    source = Phantom(options)
    records = source.records()
    assert len(records) == num_sites + extra
    assert records.site.nunique() == num_sites
    assert source.decode(source.content(records.id.iloc[-1])).shape == (size, size, 3)


def test_a_picture_depends_on_the_options_and_its_id_only() -> None:
    first, second = Phantom(SMALL), Phantom(SMALL)
    ids = list(first.records().id)
    assert len(set(map(first.content, ids))) == len(ids)
    assert [first.content(id) for id in ids] == [second.content(id) for id in reversed(ids)][::-1]
    assert Phantom(SMALL.model_copy(update={"seed": 1})).content(ids[0]) != first.content(ids[0])


def test_further_sites_leave_the_first_pictures_alone() -> None:
    four, six = (Phantom(SMALL.model_copy(update={"num_sites": number})) for number in (4, 6))
    assert four.content("harbour-00000") == six.content("harbour-00000")


def test_the_table_and_the_look_of_the_default_are_pinned() -> None:
    source = Phantom(PhantomOptions())
    table = source.records().to_csv(index=False, lineterminator="\n").encode()
    assert hashlib.sha256(table).hexdigest()[:16] == "a8f3ff37dad0a61c"
    levels = [source.decode(source.content(f"{site.name}-00007")).mean((0, 1)).round(1).tolist() for site in FOUR]
    assert np.allclose(
        levels, [[172.5, 118.5, 98.8], [162.3, 113.2, 90.7], [89.4, 68.7, 66.8], [146.4, 114.2, 94.8]], atol=0.5
    )


def test_content_is_lossless_and_readable_elsewhere() -> None:
    source = Phantom(SMALL)
    content = source.content("alpine-00003")
    assert np.array_equal(source.decode(content), np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize(
    "content",
    [b"", b"P6\n4 4\n255\n", b"P6\n4 4\n255\n" + bytes(47), b"P5\n4 4\n255\n" + bytes(48), b"P6\n4\n255\nxxxx"],
)
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="no picture"):
        Phantom(SMALL).decode(content)


def test_an_unknown_id_is_refused() -> None:
    with pytest.raises(DataError, match="no picture of this id"):
        Phantom(SMALL).content("alpine-99999")


@pytest.mark.parametrize("options", [{"num_images": 3}, {"image_size": 8}, {"difficulty": 1.5}, {"num_patients": 3}])
def test_options_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"where: sources\.phantom"):
        registry.build("sources", "phantom", options)


def test_difficulty_one_takes_all_meaning_from_the_signs() -> None:
    easy, hard = (
        [phantom.lesion_signs(random(5), label, difficulty) for label in range(len(CLASSES))] for difficulty in (0, 1)
    )
    assert len(set(easy)) == len(CLASSES)
    assert len(set(map(repr, hard))) == 1


def test_ink_dots_mean_something_at_one_site_only() -> None:
    marks = {site.name: site.marks for site in phantom.site_list(9, seed=3)}
    assert len(set(marks.pop(MARKED_SITE))) == 2
    assert set(marks.values()) == {EVERYWHERE}


@pytest.mark.parametrize("name", [field for field in phantom_draw.Lesion.__annotations__ if field != "softness"])
def test_every_sign_is_seen(name: str) -> None:
    base = replace(PLAIN, melanin=0.6, softness=0.2)
    changed = np.abs(drawn(replace(base, **{name: getattr(base, name) + 0.25})) - drawn(base)).max(2)
    assert (changed > 5).sum() > 10
    assert changed[:4, :4].max() <= 1  # a sign stays near the lesion


def test_ink_dots_lie_at_the_edge() -> None:
    changed = np.abs(drawn(EVERY_SIGN, marked=True) - drawn(EVERY_SIGN)).max(2)
    assert (changed > 20).sum() > 20
    assert changed[12:-12, 12:-12].max() <= 1


def test_two_photographs_of_one_lesion_show_the_same_lesion_turned() -> None:
    x, y = phantom_camera.grid(48)
    upright = phantom_draw.Plane(x, y, x, y, 0.0, 1.0, (0.0, 0.0))
    turned = phantom_draw.Plane(x, y, y, -x, np.pi / 2, 1.0, (0.0, 0.0))
    first, second = (
        phantom_draw._with_lesion(random(1), np.full((48, 48, 3), 0.8), EVERY_SIGN, plane)
        for plane in (upright, turned)
    )
    assert np.allclose(np.rot90(first, -1), second, atol=1e-6)
    assert not np.allclose(first, second, atol=0.1)


def test_the_same_picture_at_another_size() -> None:
    fine, coarse = drawn(EVERY_SIGN, size=192), drawn(EVERY_SIGN, size=48)
    averaged = fine.reshape(48, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(averaged - coarse).mean() < 6
    assert np.abs(averaged - drawn(EVERY_SIGN, own=1, size=48)).mean() > 12


@pytest.mark.parametrize("step", [1, 4, 12])
def test_compression_agrees_with_the_cosine_transform_in_floats(step: int) -> None:
    pixels = drawn(EVERY_SIGN, size=30).astype(np.uint8)
    slow = np.stack([_slow_compression(pixels[..., channel], step) for channel in range(3)], 2)
    apart = np.abs(phantom_camera._compressed(pixels, step).astype(int) - slow)
    assert apart.max() <= step  # a coefficient exactly between two multiples may go either way
    assert (apart > 1).mean() < 0.05


def _slow_compression(channel: Any, step: int) -> Any:
    size = len(channel)
    whole = np.pad(channel, (0, -size % 8), mode="edge").astype(float)
    n = np.arange(8)
    basis = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / 16) * np.sqrt(np.where(n[:, None] == 0, 1, 2) / 8)
    steps = step * (1 + (n[:, None] + n) / 2)
    for top in range(0, len(whole), 8):
        for left in range(0, len(whole), 8):
            block = whole[top : top + 8, left : left + 8]
            block[:] = basis.T @ (np.floor(basis @ block @ basis.T / steps + 0.5) * steps) @ basis
    return np.clip(np.floor(whole[:size, :size] + 0.5), 0, 255).astype(int)


def test_the_identity_changes_with_every_option() -> None:
    base = Phantom(PhantomOptions()).identity
    assert base == Phantom(PhantomOptions()).identity
    for change in ({"num_images": 9}, {"num_sites": 3}, {"image_size": 32}, {"difficulty": 0.5}, {"seed": 1}):
        assert Phantom(PhantomOptions(**change)).identity != base
