"""Stage 3, tuners. In: tensors of one site, or of S sites stacked along a first axis. Out: the same function of rows.

Several sites can go through the frozen backbone as one batch, [S * B, ...], the rows of a site one after another. What
they train has one more axis in front then, [S, ...], and the tensors of a site act on its rows alone. A tuner that
forms what it adds with these functions, and draws no dropout, can be stacked and says so: `stackable`.

On a processor each site's product is computed by itself, by the very call that the site alone would make, so that what
is summed over rows, the gradient of a weight, is summed in the same order; on a GPU all are one batched product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b: x [..., in], weight [out, in], bias [out]; or x [S * B, ..., in], weight [S, out, in], bias [S, out]."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return batched(x, weight, bias) if x.is_cuda else one_by_one(x, weight, bias)


def batched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All sites in one product of batches of matrices."""
    rows = x.reshape(len(weight), -1, x.shape[-1])
    found = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return found.view(*x.shape[:-1], -1)


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The products that the sites alone would form, below one another."""
    biases = [None] * len(weight) if bias is None else bias.unbind()
    return torch.cat([F.linear(*each) for each in zip(x.chunk(len(weight)), weight, biases, strict=True)])


def spread(value: Tensor, axes: int, rows: int) -> Tensor:
    """A tensor of so many axes as it is; S of them, [S, ...], as [rows, ...], each for every row of its site."""
    if value.ndim == axes:
        return value
    return value[:, None].expand(-1, rows // len(value), *value.shape[1:]).flatten(0, 1)
