"""Augmentation changes what it may and nothing else; every draw is the generator's."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from consilium.data import Preprocessing
from consilium.local import augment


def _draw(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(64, 3, 16, 16, generator=_draw(9))


def _symmetries(image: Tensor) -> list[Tensor]:
    turns = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
    return [*turns, *(turn.flip(-1) for turn in turns)]


def test_uint8_becomes_float_and_is_normalised_per_channel() -> None:
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert augment.to_float(pixels).shape == (1, 3, 1, 1)
    settings = Preprocessing(1, (0.5, 0.5, 0.1), (0.5, 0.25, 0.1))
    found = augment.normalise(augment.to_float(pixels), settings)
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 2.0, 1.0]))


def test_none_is_the_identity(images: Tensor) -> None:
    assert torch.equal(augment.PRESETS["none"](images, _draw()), images)


@pytest.mark.parametrize("preset", sorted(augment.PRESETS))
def test_draws_come_from_the_generator_alone(images: Tensor, preset: str) -> None:
    before = images.clone()
    torch.manual_seed(1)
    first = augment.PRESETS[preset](images, _draw(3))
    torch.manual_seed(2)
    assert torch.equal(augment.PRESETS[preset](images, _draw(3)), first)
    assert torch.equal(images, before), "the store is not written to"
    assert torch.equal(augment.PRESETS[preset](images, _draw(4)), first) == (preset == "none")
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1


def test_dihedral_gives_each_image_one_of_eight_symmetries(images: Tensor) -> None:
    found = augment.dihedral(images, _draw())
    which = [
        next(at for at, turned in enumerate(_symmetries(image)) if torch.equal(turned, result))
        for image, result in zip(images, found, strict=True)
    ]
    assert set(which) == set(range(8)), "all eight occur, drawn for each image"


def test_a_radiograph_is_never_mirrored_nor_turned_far() -> None:
    """A bright dot left of the middle stays left, at any draw."""
    images = torch.zeros(256, 3, 33, 33)
    images[:, :, 14:19, 4:9] = 1
    found = augment.affine(images, _draw(), degrees=7, shift=0.05, scale=0.05).mean(1)
    columns = (found.sum(1) * torch.arange(33)).sum(1) / found.sum((1, 2))
    rows = (found.sum(2) * torch.arange(33)).sum(1) / found.sum((1, 2))
    assert columns.min() > 3
    assert columns.max() < 10
    assert (rows - 16).abs().max() < 4
    assert columns.std() > 0.5
    assert rows.std() > 0.5


def test_affine_of_nothing_is_the_identity(images: Tensor) -> None:
    found = augment.affine(images, _draw(), degrees=0, shift=0, scale=0)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-5)


def test_a_shift_is_a_share_of_the_width() -> None:
    images = torch.zeros(512, 1, 40, 40)
    images[:, :, :, 20:] = 1
    found = augment.affine(images, _draw(), degrees=0, shift=0.1, scale=0)
    edge = 40 - found[:, 0, 20].sum(-1)
    assert 15.9 <= edge.min() < 16.5
    assert 23.5 < edge.max() <= 24.1


def test_colour_changes_each_image_within_its_limits(images: Tensor) -> None:
    grey = torch.full_like(images, 0.5)
    assert torch.equal(augment.colour(grey, _draw(), contrast=0, brightness=0, gain=0), grey)
    brighter = augment.colour(grey, _draw(), contrast=0.3, brightness=0.1, gain=0)
    levels = brighter[:, 0, 0, 0]
    assert (levels - 0.5).abs().max() <= 0.1
    assert levels.std() > 0.04
    torch.testing.assert_close(brighter, levels.view(-1, 1, 1, 1).expand_as(brighter))
    tinted = augment.colour(grey, _draw(), contrast=0, brightness=0, gain=0.2)[:, :, 0, 0]
    assert (tinted / 0.5 - 1).abs().max() <= 0.2
    assert (tinted.max(1).values - tinted.min(1).values).median() > 0.05


def test_contrast_keeps_an_images_mean() -> None:
    images = 0.4 + 0.2 * torch.rand(32, 3, 8, 8, generator=_draw(5))
    found = augment.colour(images, _draw(), contrast=0.2, brightness=0, gain=0)
    torch.testing.assert_close(found.mean((1, 2, 3)), images.mean((1, 2, 3)))
    spread = found.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.8 <= spread.min() < 0.9
    assert 1.1 < spread.max() <= 1.2
