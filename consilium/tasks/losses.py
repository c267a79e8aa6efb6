"""Stage 5, task. In: class counts; head outputs and labels. Out: class weights, and the loss of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

ClassWeight = Literal["none", "inverse", "sqrt_inverse", "effective_number"]


def class_weights(kind: ClassWeight, counts: Sequence[int], beta: float = 0.999) -> Tensor:
    """Weight of each class, float32 [C], with mean 1 over the counted images: sum_c n_c w_c = sum_c n_c.

    `inverse` 1 / n, `sqrt_inverse` 1 / sqrt(n), `effective_number` (1 - beta) / (1 - beta^n) (Cui et al., CVPR 2019,
    equation 2). A class without images is weighted as if it had one, so that every weight is finite.
    """
    number = torch.tensor(list(counts), dtype=torch.float64)
    seen = number.clamp_min(1)
    raw = {
        "none": torch.ones_like(seen),
        "inverse": 1 / seen,
        "sqrt_inverse": seen.rsqrt(),
        "effective_number": (1 - beta) / -torch.expm1(seen * (math.log(beta) if beta > 0 else -math.inf)),
    }[kind]
    total = (number * raw).sum()
    return (raw * (number.sum() / total if total > 0 else 1)).to(torch.float32)


@lru_cache(maxsize=4096)
def class_weights_on(device: torch.device, kind: ClassWeight, counts: tuple[int, ...], beta: float) -> Tensor:
    """`class_weights` on a device, made once: numbers that become a tensor in every step make the program wait."""
    with torch.inference_mode(False):
        return class_weights(kind, counts, beta).to(device)


def weighted_loss(
    outputs: Tensor, labels: Tensor, weights: Tensor, *, focal_gamma: float, label_smoothing: float
) -> Tensor:
    """Mean over the batch of w_y (1 - p_y)^gamma H(q, p); outputs [B, C], labels [B], weights [C]; a scalar.

    q is the true class, mixed with the uniform distribution by `label_smoothing`; gamma is that of the focal loss (Lin
    et al., ICCV 2017, equation 4). The sum is divided by B, not by the batch's weights: the expected loss then does not
    depend on how rare classes fall into batches, and a site rich in rare images counts as it would in pooled training.
    """
    exact = outputs if outputs.dtype == torch.float64 else outputs.to(torch.float32)
    log_p = log_softmax(exact, dim=1)
    of_truth = log_p.gather(1, labels[:, None])[:, 0]
    losses = -(1 - label_smoothing) * of_truth - label_smoothing * log_p.mean(dim=1)
    if focal_gamma > 0:
        wrong = (-torch.expm1(of_truth)).clamp_min(1e-12)  # keeps the gradient finite at p = 1 for gamma below 1
        losses = wrong**focal_gamma * losses
    return (weights.to(losses)[labels] * losses).mean()
