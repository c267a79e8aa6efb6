"""Common: the algebra of low-rank products. In: factors left [rows, r], right [r, columns]. Out: the same, or numbers.

Nothing here forms a dense matrix of rows * columns numbers: sums lie along the rank, and what else is asked of a
product is asked of matrices as small as its rank. Results have the type of what comes in; ask in float64 where digits
count. Each formula is tested against the dense computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RELATIVE = 1e-6  # singular values below this share of the largest span nothing


@dataclass(frozen=True)
class LowRank:
    """left @ right: [rows, r] and [r, columns]."""

    left: Tensor
    right: Tensor


def weighted_sum(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """sum weight * product, exactly: factors of any ranks side by side. (1, a), (1, b) adds, (1, a), (-1, b) subtracts
    and takes a part away again, (s, a) scales."""
    lefts = [weight * product.left for weight, product in terms]
    return LowRank(torch.cat(lefts, dim=1), torch.cat([product.right for _, product in terms]))


def truncated(product: LowRank, rank: int) -> tuple[LowRank, Tensor]:
    """The nearest product of at most this rank, U S and V with orthonormal rows, and all singular values [<= r],
    falling. Two thin QR and the SVD of an r x r core."""
    q_left, r_left = torch.linalg.qr(product.left)
    q_right, r_right = torch.linalg.qr(product.right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
    size = min(rank, len(s))
    return LowRank(q_left @ (u[:, :size] * s[:size]), vh[:size] @ q_right.mT), s


def inner(first: LowRank, second: LowRank) -> Tensor:
    """<first, second> = tr((left_2^T left_1) (right_1 right_2^T)), the sum of products of all entries."""
    return ((second.left.mT @ first.left) * (second.right @ first.right.mT)).sum()


def squared_norm(product: LowRank) -> Tensor:
    """||left @ right||^2, the sum of squares of all entries."""
    return inner(product, product)


def basis(rows: Tensor) -> Tensor:
    """Orthonormal rows [<= r, d] that span the rows of a matrix [r, d]; none for zeros."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = vh[s > _RELATIVE * s.max()] if s.any() else vh[:0]
    return kept


def orthogonalised(rows: Tensor, against: Tensor) -> Tensor:
    """rows (I - Q^T Q), with Q a basis of `against` [r', d]: what of these rows is orthogonal to all of the others."""
    q = basis(against)
    return rows - (rows @ q.mT) @ q


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles between two row spaces, falling: 1 for a common direction, 0 for orthogonal."""
    cosines: Tensor = torch.linalg.svdvals(basis(first) @ basis(second).mT)
    return cosines.clamp(max=1)


def overlap(first: Tensor, second: Tensor) -> float:
    """Mean of the squared cosines, ||Q_1 Q_2^T||^2 / min(r_1, r_2): 0 orthogonal, 1 one inside the other; 0 for zeros.
    Any factor (M right, left M^-1) of the same product has the same. Of random rows [r, d]: max(r_1, r_2) / d."""
    cosines = principal_cosines(first, second)
    return float(cosines.square().mean()) if len(cosines) else 0.0
