"""Common: data vectors. In: what sites made of one start. Out: one difference that stands for all of them.

    tau_k = theta_k - theta_pre        theta = theta_pre + lambda sum c_k tau_k

Data vectors: arXiv 2408.13038 (task arithmetic, Ilharco et al., ICLR 2023, arXiv 2212.04089, of hospitals).
TIES: Yadav, Tam, Choshen, Raffel, Bansal, NeurIPS 2023, arXiv 2306.01708, algorithm 1: of every vector its longest
entries are kept (`density`: which share, of all entries of the vector together); each entry gets the sign of their sum;
the mean is over those that have it.
DARE: Yu, Yu, Yu, Huang, Li, ICML 2024, arXiv 2311.03099: of every vector a share `density` of the entries, drawn at
random, is kept and divided by `density`; then the mean.

Only products of factors act in the model, so the entries of a vector are those of scale * left @ right. Sums of them
stay factors and are never formed; TIES and DARE look at entries, and form them.
Departures: an entry whose kept values add up to nothing is zero in TIES. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from consilium import algebra, seeds
from consilium.algebra import LowRank
from consilium.product_sums import truncated
from consilium.products import Product
from consilium.tensors import Tensors, under, within

Rule = Literal["mean", "sum", "ties", "dare"]
LINEAR: tuple[Rule, ...] = ("mean", "sum")  # of which a site can be taken away again
_NOTHING = 1e-12  # singular values below this share of the largest are rounding of the float64 sum


@dataclass(frozen=True)
class Vector:
    """A difference, float64: `plain` tensors by name, `products` by the name of the right factor, as factors or
    dense [rows, columns]; the scale is in them."""

    plain: Tensors
    products: Mapping[str, LowRank | Tensor]


@dataclass(frozen=True)
class Term:
    """What one site brings, and its weight in a mean."""

    site: str
    vector: Vector
    weight: float = 1.0


# ------------------------------------------------------------------------------------------------ from and to models
def value_of(product: Product, tensors: Tensors) -> LowRank:
    """scale * left @ right of these tensors, float64."""
    left = torch.cat([tensors[name].double() for name in product.left])
    return LowRank(product.scale * left, tensors[product.right].double())


def difference(values: Tensors, start: Tensors, products: Sequence[Product], before: Sequence[Product]) -> Vector:
    """values - start; `before`: the products of the start, which may have another rank and scale."""
    of_start = {product.right: value_of(product, start) for product in before}
    factors = {name for product in products for name in (*product.left, product.right)}
    plain = {name: values[name].double() - start[name].double() for name in sorted(values.keys() - factors)}
    made = {product.right: value_of(product, values) for product in products}
    return Vector(plain, {name: _minus(value, of_start[name]) for name, value in made.items()})


def _minus(value: LowRank, start: LowRank) -> LowRank:
    return algebra.weighted_sum([(1.0, value), (-1.0, start)]) if start.left.any() else value


def added(vector: Vector, scale: float, start: Tensors) -> dict[str, Tensor]:
    """start + scale * vector of the plain tensors, float64."""
    return {name: start[name].double() + scale * step for name, step in vector.plain.items()}


def product_at(vector: Vector, scale: float, product: Product, start: Tensors) -> LowRank | Tensor:
    """start's product + scale * the vector's: factors, or dense where the vector is."""
    first, step = value_of(product, start), vector.products[product.right]
    if isinstance(step, Tensor):
        return first.left @ first.right + scale * step
    moved = LowRank(scale * step.left, step.right)
    return algebra.weighted_sum([(1.0, first), (1.0, moved)]) if first.left.any() else moved


def folded(vector: Vector, scale: float, products: Sequence[Product], base: Tensors) -> dict[str, Tensor]:
    """base + scale * vector of the frozen tensors that products are added to, dense, by their names."""
    found: dict[str, Tensor] = {}
    for product in products:
        rows = [len(base[name]) for name in product.base]
        pieces = torch.split(scale * dense(vector.products[product.right]), rows)
        found |= {n: base[n].double() + piece for n, piece in zip(product.base, pieces, strict=True)}
    return found


def cut(vector: Vector, scale: float, product: Product, start: Tensors) -> dict[str, Tensor]:
    """start's product + scale * the vector's as the nearest factors of start's shapes, by their names."""
    near, _ = at_rank(product_at(vector, scale, product, start), start[product.right])
    pieces = torch.split(near.left / product.scale, [len(start[name]) for name in product.left])
    return {product.right: near.right, **dict(zip(product.left, pieces, strict=True))}


def packed(vector: Vector) -> dict[str, Tensor]:
    """The vector as named tensors, for a state that holds nothing else."""
    found = under("plain", vector.plain)
    for name, value in vector.products.items():
        pair = {"entries": value} if isinstance(value, Tensor) else {"left": value.left, "right": value.right}
        found |= {f"{kind}/{name}": tensor for kind, tensor in pair.items()}
    return found


def unpacked(tensors: Tensors) -> Vector:
    """The vector of `packed`."""
    lefts, rights = within("left", tensors), within("right", tensors)
    factors = {name: LowRank(lefts[name], rights[name]) for name in lefts}
    return Vector(within("plain", tensors), {**within("entries", tensors), **factors})


def at_rank(value: LowRank | Tensor, like: Tensor) -> tuple[LowRank, float]:
    """The nearest factors with as many rows on the right as `like` [rank, columns], and the share of the value's length
    that they miss."""
    left, right = (
        (value, torch.eye(value.shape[1]).double()) if isinstance(value, Tensor) else (value.left, value.right)
    )
    found = LowRank(*truncated([(1.0, left, right)], like.double(), len(like)))
    whole = _squared(value)
    missed = max(whole - float(algebra.squared_norm(found)), 0.0)  # it is a projection
    return found, math.sqrt(missed / whole) if whole else 0.0


def dense(value: LowRank | Tensor) -> Tensor:
    """Every entry."""
    return value if isinstance(value, Tensor) else value.left @ value.right


# ------------------------------------------------------------------------------------------------ rules
def merged(rule: Rule, terms: Sequence[Term], density: float, seed: int) -> Vector:
    """One vector of several, in whatever order they come; `density`: of ties and dare, `seed`: of dare."""
    ordered = sorted(terms, key=lambda term: term.site)
    if rule in LINEAR:
        return combination(list(zip(coefficients(rule, ordered), (term.vector for term in ordered), strict=True)))
    entries = [_entries(term.vector) for term in ordered]
    if rule == "ties":
        return _as_vector(ties(entries, density), ordered[0].vector)
    shares = coefficients("mean", ordered)
    thinned = [dare(each, density, seed, term.site) for each, term in zip(entries, ordered, strict=True)]
    summed = {name: _sum([s * each[name] for s, each in zip(shares, thinned, strict=True)]) for name in entries[0]}
    return _as_vector(summed, ordered[0].vector)


def coefficients(rule: Rule, terms: Sequence[Term]) -> list[float]:
    """c_k of a linear rule: one for each site, or its share of all weights."""
    total = math.fsum(term.weight for term in terms)
    return [1.0 if rule == "sum" else term.weight / total for term in terms]


def combination(terms: Sequence[tuple[float, Vector]]) -> Vector:
    """sum c_k tau_k, exactly; with a negative c_k a vector is taken away. Products get the rank that the sum has."""
    first = terms[0][1]
    plain = {name: _sum([c * vector.plain[name] for c, vector in terms]) for name in first.plain}
    return Vector(plain, {name: _total([(c, vector.products[name]) for c, vector in terms]) for name in first.products})


def _total(terms: Sequence[tuple[float, LowRank | Tensor]]) -> LowRank | Tensor:
    factors = [(c, value) for c, value in terms if isinstance(value, LowRank)]
    if len(factors) < len(terms):
        return _sum([c * dense(value) for c, value in terms])
    total = algebra.weighted_sum(factors)
    return total if len(terms) == 1 else reduced(total)


def reduced(product: LowRank) -> LowRank:
    """The same product by as few factors as it needs, at least one: two thin QR and a small SVD."""
    found, singular = algebra.truncated(product, product.left.shape[1])
    rank = max(1, int((singular > _NOTHING * singular.max()).sum()))
    return LowRank(found.left[:, :rank], found.right[:rank])


def ties(vectors: Sequence[Tensors], density: float) -> dict[str, Tensor]:
    """Trim, elect signs, mean of those that agree."""
    trimmed = [_trimmed(vector, density) for vector in vectors]
    return {name: _elected(torch.stack([vector[name] for vector in trimmed])) for name in vectors[0]}


def _trimmed(vector: Tensors, density: float) -> dict[str, Tensor]:
    """Its longest entries, over all tensors together; of equally long ones at the limit all."""
    lengths = torch.cat([value.abs().flatten() for value in vector.values()])
    kept = max(1, round(density * len(lengths)))
    limit = lengths.kthvalue(len(lengths) - kept + 1).values
    return {name: torch.where(value.abs() >= limit, value, 0.0) for name, value in vector.items()}


def _elected(values: Tensor) -> Tensor:
    """[sites, ...]: the mean over the sites whose sign is that of the sum."""
    agrees = (values.sign() == values.sum(dim=0).sign()) & (values != 0)
    return torch.where(agrees, values, 0.0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def dare(vector: Tensors, density: float, seed: int, site: str) -> dict[str, Tensor]:
    """Entries drawn from (seed, site, name of the tensor), divided by the share that is kept."""
    found = {}
    for name, value in vector.items():
        draw = torch.rand(value.shape, generator=seeds.generator(seed, site=site, purpose=f"dare/{name}")).double()
        found[name] = torch.where(draw < density, value / density, 0.0)
    return found


# ------------------------------------------------------------------------------------------------ what is told of them
def cosine(first: Vector, second: Vector) -> float:
    """Of two vectors with factors; 0 where one of them is nothing."""
    lengths = math.sqrt(_inner(first, first) * _inner(second, second))
    return _inner(first, second) / lengths if lengths else 0.0


def _inner(first: Vector, second: Vector) -> float:
    plain = [float((value * second.plain[name]).sum()) for name, value in first.plain.items()]
    pairs = [(value, second.products[name]) for name, value in first.products.items()]
    return math.fsum([*plain, *(_product_inner(one, other) for one, other in pairs)])


def _product_inner(one: LowRank | Tensor, other: LowRank | Tensor) -> float:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return float(algebra.inner(one, other))
    return float((dense(one) * dense(other)).sum())


def _squared(value: LowRank | Tensor) -> float:
    return _product_inner(value, value)


def _entries(vector: Vector) -> dict[str, Tensor]:
    return {**vector.plain, **{name: dense(value) for name, value in vector.products.items()}}


def _as_vector(entries: Tensors, like: Vector) -> Vector:
    return Vector({name: entries[name] for name in like.plain}, {name: entries[name] for name in like.products})


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total
