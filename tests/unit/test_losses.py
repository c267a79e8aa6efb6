from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from consilium.tasks.losses import class_weights, weighted_loss

KINDS = ("none", "inverse", "sqrt_inverse", "effective_number")


def slow_loss(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray, gamma: float, smoothing: float) -> float:
    """Image by image in float64, from the equation."""
    losses = []
    for z, y in zip(outputs.astype(np.float64), labels, strict=True):
        log_p = z - z.max() - math.log(np.exp(z - z.max()).sum())
        q = np.full(len(z), smoothing / len(z))
        q[y] += 1 - smoothing
        losses.append(weights[y] * (1 - math.exp(log_p[y])) ** gamma * -(q * log_p).sum())
    return float(np.mean(losses))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_equation(gamma: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(20, 5, generator=generator), torch.randint(0, 5, (20,), generator=generator)
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    found = weighted_loss(outputs, labels, weights, focal_gamma=gamma, label_smoothing=smoothing)
    assert found.item() == pytest.approx(
        slow_loss(outputs.numpy(), labels.numpy(), weights.numpy(), gamma, smoothing), rel=1e-5
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_weights_and_focus_it_is_the_cross_entropy_of_torch(smoothing: float) -> None:
    outputs, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 4
    found = weighted_loss(outputs, labels, torch.ones(4), focal_gamma=0, label_smoothing=smoothing)
    torch.testing.assert_close(found, cross_entropy(outputs, labels, label_smoothing=smoothing))


def test_the_loss_of_a_batch_is_the_mean_of_its_halves() -> None:
    outputs, labels = torch.randn(8, 3, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 3
    weights = torch.tensor([1.0, 5.0, 0.1])
    whole, *halves = (
        weighted_loss(outputs[part], labels[part], weights, focal_gamma=0, label_smoothing=0)
        for part in (slice(None), slice(4), slice(4, None))
    )
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gradients_are_finite_at_certainty_and_right_elsewhere(gamma: float) -> None:
    outputs = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    weighted_loss(outputs, torch.tensor([0, 0]), torch.ones(2), focal_gamma=gamma, label_smoothing=0.1).backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    doubles = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    assert torch.autograd.gradcheck(
        lambda z: weighted_loss(z, labels, torch.tensor([1.0, 2.0, 3.0]), focal_gamma=gamma, label_smoothing=0.1),
        doubles,
    )


def test_half_precision_outputs_are_summed_in_float32() -> None:
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(6) % 3
    half, full = (
        weighted_loss(z, labels, torch.ones(3), focal_gamma=2, label_smoothing=0) for z in (outputs, outputs.float())
    )
    assert half.dtype == torch.float32
    assert half == full


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[100, 10, 1], [7, 0, 3], [0, 0, 5]])
def test_weights_have_mean_one_over_the_images(kind: str, counts: list[int]) -> None:
    weights = class_weights(kind, counts)  # type: ignore[arg-type]
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()
    assert float((weights * torch.tensor(counts)).sum()) == pytest.approx(sum(counts), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "ratio"),
    [("none", 1.0), ("inverse", 25.0), ("sqrt_inverse", 5.0), ("effective_number", (1 - 0.99**100) / (1 - 0.99**4))],
)
def test_rare_classes_weigh_more_as_their_definition_says(kind: str, ratio: float) -> None:
    weights = class_weights(kind, [100, 4], beta=0.99)  # type: ignore[arg-type]
    assert float(weights[1] / weights[0]) == pytest.approx(ratio, rel=1e-5)


def test_effective_number_goes_from_none_to_inverse() -> None:
    counts = [50, 5, 0]
    torch.testing.assert_close(class_weights("effective_number", counts, beta=0.0), torch.ones(3))
    nearly = class_weights("effective_number", counts, beta=1 - 1e-9)
    torch.testing.assert_close(nearly, class_weights("inverse", counts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_image_weights_are_still_finite(kind: str) -> None:
    torch.testing.assert_close(class_weights(kind, [0, 0]), torch.ones(2))  # type: ignore[arg-type]
