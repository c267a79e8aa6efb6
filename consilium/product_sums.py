"""Common: sums of products of factors. In: weighted tensors by site, products. Out: what replaces the coordinator's.

One rule per function, for each product by itself; what they are for stands in `aggregation.py` and docs/aggregation.md.
Terms come sorted by site and are summed in float64 in that order; results have the type of the tensor they replace.
A term that holds one factor of a product alone was trained beside the coordinator's other one, which stands in for it.
No dense sum is formed but where a base takes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.algebra import LowRank, squared_norm
from consilium.errors import WireError
from consilium.products import Product
from consilium.ranks import filled
from consilium.tensors import Tensors, weighted_mean

Terms = Sequence[tuple[float, Tensors]]  # weight, tensors of one site
Pair = tuple[float, Tensor, Tensor]  # share of the site (all add up to 1), left [rows, r_k], right [r_k, columns]


def product_svd(products: Sequence[Product], terms: Terms, start: Tensors) -> dict[str, Tensor]:
    """Factors whose product is sum w_k L_k R_k at the rank of the coordinator's own in `start`: the nearest there is,
    and exact where that rank is enough. Sites may send any ranks. The dense sum is never formed. Where nobody sent one
    of the two factors, it is common and stays, and the mean of the other, filled with zeros, is exact."""
    found: dict[str, Tensor] = {}
    for product in products:
        if len(_sent(product, terms)) <= len(product.left):
            found |= _means(product, terms, start)
        else:
            old = start[product.right].double()
            found |= _put(product, truncated(_pairs(product, terms, start), old, len(old)), start)
    return found


def refactored(products: Sequence[Product], found: Tensors, start: Tensors) -> dict[str, Tensor]:
    """The products that `found` changed in `start`, the same to rounding, as U S and V: rows of V are orthonormal and
    span what they did. Where a left factor is zero, the right one keeps its span in an orthonormal basis of it."""
    news: dict[str, Tensor] = {}
    for product in products:
        if {*product.left, product.right} & found.keys():
            now = {**start, **found}
            left, right = _left(product, now), now[product.right].double()
            news |= _put(product, truncated([(1.0, left, right)], right[:0], len(right)), start)
    return news


def truncated(pairs: Sequence[Pair], old: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U S [rows, rank] and V [rank, columns] of sum share_k left_k @ right_k; float64.

    Two thin QR and the SVD of a core as small as all ranks together. The largest entry of every row of V is positive.
    Where the sum has a lower rank, U S is zero and V goes on orthonormally, within the bases of old and of the sites:
    of two factors that are zero both, neither would ever be trained.
    """
    q_left, r_left = torch.linalg.qr(torch.cat([share * left for share, left, _ in pairs], dim=1))
    q_right, r_right = torch.linalg.qr(torch.cat([old, *(right for _, _, right in pairs)]).T)
    u, s, v = torch.linalg.svd(r_left @ r_right[:, len(old) :].T)
    left = _padded(q_left @ (u[:, : len(s)] * s), columns=rank)
    right = _padded(q_right @ v.T, columns=rank).T
    signs = right.gather(1, right.abs().argmax(dim=1, keepdim=True)).sign()
    return left * signs.T, right * signs


def _padded(matrix: Tensor, columns: int) -> Tensor:
    """Its first columns, and zeros where it has fewer."""
    return torch.nn.functional.pad(matrix[:, :columns], (0, max(columns - matrix.shape[1], 0)))


def stack(products: Sequence[Product], terms: Terms, start: Tensors) -> dict[str, Tensor]:
    """base + scale * (sum w_k L_k R_k - L_0 R_0), with the factors (L_0, R_0) of `start` put back; any ranks.

    As `start` holds the factors of every round before, these are the ones that training began with.
    """
    found = dict(start)
    for product in products:
        if pairs := _pairs(product, terms, start):
            kept = _left(product, start), start[product.right].double()
            lefts = torch.cat([*(share * left for share, left, _ in pairs), -kept[0]], dim=1)
            rights = torch.cat([*(right for _, _, right in pairs), kept[1]])
            found |= _added(product, lefts @ rights, found)
    return _news(found, start)


def residual(products: Sequence[Product], terms: Terms, start: Tensors) -> dict[str, Tensor]:
    """Factors: their means L, R; base + scale * (sum w_k L_k R_k - L R), formed as the sum of w_k (L_k - L) (R_k - R):
    exactly nothing for one site, or where one factor is common. Equal ranks."""
    found = dict(start)
    for product in products:
        if pairs := _pairs(product, terms, start):
            found |= _means(product, terms, start)
            left, right = _left(product, found), found[product.right].double()
            lefts = torch.cat([share * (own - left) for share, own, _ in pairs], dim=1)
            found |= _added(product, lefts @ torch.cat([own - right for _, _, own in pairs]), found)
    return _news(found, start)


def padded(products: Sequence[Product], terms: Terms, start: Tensors, by_size: bool = False) -> dict[str, Tensor]:
    """Factors: means of what sites of any rank sent, filled with zeros up to the coordinator's rank in `start`. With
    `by_size` a site counts in a product by ||L_k R_k||, the size of its own; by its weight where all are zero."""
    found: dict[str, Tensor] = {}
    for product in products:
        if held := _held(product, terms, start):
            sizes = [_size(product, tensors) if by_size else 0.0 for _, tensors in held]
            shares = sizes if any(sizes) else [weight for weight, _ in held]
            sent = sorted(_sent(product, terms))
            filled_up = [{n: filled(tensors[n], start[n]) for n in sent} for _, tensors in held]
            found |= weighted_mean(zip(shares, filled_up, strict=True))
    return found


def _size(product: Product, tensors: Tensors) -> float:
    """||L R||, from matrices as small as the rank."""
    squared = squared_norm(LowRank(_left(product, tensors), tensors[product.right].double()))
    return math.sqrt(max(float(squared), 0.0))


def corrected(products: Sequence[Product], terms: Terms, start: Tensors, ridge: float) -> dict[str, Tensor]:
    """Factors: R the mean, L the mean and D = M R^T (R R^T + ridge I)^-1, with M what the means miss, the covariance of
    `residual`: the least of ||(L + D) R - sum w_k L_k R_k||^2 + ridge ||D||^2. With ridge = 0 the best left factor
    beside R there is. Exactly the means for one site, or where one factor is common. Equal ranks. Nothing is dense."""
    found = dict(start)
    for product in products:
        if pairs := _pairs(product, terms, start):
            found |= _means(product, terms, start)
            left, right = _left(product, found), found[product.right].double()
            lefts = torch.cat([share * (own - left) for share, own, _ in pairs], dim=1)
            seen = torch.cat([own - right for _, _, own in pairs]) @ right.T
            if (missed := lefts @ seen).any():
                gram = right @ right.T + ridge * torch.eye(len(right), dtype=right.dtype)
                found |= _rows(product.left, left + missed @ torch.linalg.pinv(gram, hermitian=True), start)
    return _news(found, start)


def _sent(product: Product, terms: Terms) -> set[str]:
    """The factors that some site trained."""
    return {*product.left, product.right} & {name for _, tensors in terms for name in tensors}


def _held(product: Product, terms: Terms, start: Tensors) -> Terms:
    """Both factors of every site that trained one of them."""
    names = {*product.left, product.right}
    held: list[tuple[float, Tensors]] = [
        (w, _both(product, tensors, start)) for w, tensors in terms if names & tensors.keys()
    ]
    total = float(sum(weight for weight, _ in held))
    if held and not total > 0:
        what = "the weights of a mean must add up to more than nothing"
        raise WireError(what, where=product.right, received=total)
    return held


def _both(product: Product, tensors: Tensors, start: Tensors) -> dict[str, Tensor]:
    """Both factors of a site at the rank at which it trained one of them or both."""
    left, right = next((tensors[n] for n in product.left if n in tensors), None), tensors.get(product.right)
    rank = len(right) if right is not None else left.shape[1] if left is not None else 0
    own = {**{n: start[n][:, :rank] for n in product.left}, product.right: start[product.right][:rank]}
    return {name: tensors.get(name, value) for name, value in own.items()}


def _pairs(product: Product, terms: Terms, start: Tensors) -> list[Pair]:
    held = _held(product, terms, start)
    total = float(sum(weight for weight, _ in held))
    return [(w / total, _left(product, tensors), tensors[product.right].double()) for w, tensors in held]


def _means(product: Product, terms: Terms, start: Tensors) -> dict[str, Tensor]:
    sent = _sent(product, terms)
    held = _held(product, terms, start)
    return weighted_mean([(w, {n: filled(tensors[n], start[n]) for n in sorted(sent)}) for w, tensors in held])


def _left(product: Product, tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].double() for name in product.left])


def _put(product: Product, factors: tuple[Tensor, Tensor], like: Tensors) -> dict[str, Tensor]:
    """Both factors of a product by their names."""
    return {**_rows(product.left, factors[0], like), product.right: factors[1].to(like[product.right].dtype)}


def _rows(names: Sequence[str], stacked: Tensor, like: Tensors) -> dict[str, Tensor]:
    """Matrices that lie below one another, apart again."""
    pieces = torch.split(stacked, [len(like[name]) for name in names])
    return {name: piece.to(like[name].dtype) for name, piece in zip(names, pieces, strict=True)}


def _added(product: Product, delta: Tensor, found: Tensors) -> dict[str, Tensor]:
    if not delta.any():
        return {}
    base = torch.cat([found[name].double() for name in product.base])
    return _rows(product.base, base + product.scale * delta, found)


def _news(found: Tensors, start: Tensors) -> dict[str, Tensor]:
    """What was put in the place of something else."""
    return {name: value for name, value in found.items() if value is not start[name]}
