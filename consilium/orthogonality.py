"""Common: how far two adapters on the same layers are from orthogonal. In: factors, or inputs of a layer. Out: a
number.

    DW_g = s_g B_g A_g, DW_p = s_p B_p A_p      x: what enters the layer      u_g = DW_g x, u_p = DW_p x

Rows of A span what an adapter reads, columns of B what it writes; X below is A (side right) or B^T (side left), [r,
d]. A norm below `floor` counts as the floor: B starts at zero, where a cosine has no value and its gradient no bound.
All but `entrywise` and `frobenius` lie between 0 and 1; those two fall when A shrinks and B grows, which changes
nothing. Products are formed in float64, whatever the precision of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from consilium import algebra
from consilium.algebra import LowRank
from consilium.errors import ConfigError
from consilium.products import Product, products
from consilium.protocols import LocalTraining, Specs
from consilium.tensors import Tensors, under, within

_NOISE = 1e-7  # singular values below this share of the norm are rounding of float32 sums
Couple = tuple[Product, Product]  # of the shared part, of the personal part, on the same base
Sides = Literal["right", "left", "both"]
Prepare = Callable[[LocalTraining, tuple[Couple, ...], Tensors], Tensors]  # ..., all that is known -> what is replaced
DESIGN = "design"  # design/x: what the personal x is made of in every round; no part of the model


def couples(specs: Specs, personal: Collection[str]) -> tuple[Couple, ...]:
    """The products of a shared and of a personal part that are added to the same tensors."""
    found = products(specs)
    own = {product.base: product for product in found if product.part in personal}
    return tuple((p, own[p.base]) for p in found if p.part not in personal and p.base in own)


def factors(product: Product, values: Tensors) -> LowRank:
    """left [rows, r] with the scale in it, right [r, columns]; float64."""
    left = torch.cat([values[name].double() for name in product.left])
    return LowRank(product.scale * left, values[product.right].double())


# ------------------------------------------------------------------------------------------------ of weights
def entrywise(x: Tensor, y: Tensor, floor: float) -> Tensor:  # noqa: ARG001
    """sum |X_g X_p^T|, as in O-LoRA's code."""
    return (x @ y.mT).abs().sum()


def frobenius(x: Tensor, y: Tensor, floor: float) -> Tensor:  # noqa: ARG001
    """||X_g X_p^T||^2 / (r_g r_p)."""
    return (x @ y.mT).square().mean()


def rows(x: Tensor, y: Tensor, floor: float) -> Tensor:
    """The same of rows of length one: the mean squared cosine of their pairs."""
    return frobenius(_unit(x, floor), _unit(y, floor), floor)


def subspace(x: Tensor, y: Tensor, floor: float) -> Tensor:
    """||Q_g^T Q_p||^2 / min(r_g, r_p), Q a basis of the row space: the same for every factorisation of a product.

    Written without the QR, whose gradient has no value at rank deficiency: tr(G_g^-1 C G_p^-1 C^T), C = X_g X_p^T,
    G = X X^T + floor^2.
    """
    cross = x @ y.mT
    first = torch.linalg.solve(_gram(x, floor), cross)
    second = torch.linalg.solve(_gram(y, floor), cross.mT)
    total: Tensor = (first * second.mT).sum()
    return total / min(len(x), len(y))


def _gram(x: Tensor, floor: float) -> Tensor:
    return x @ x.mT + floor**2 * torch.eye(len(x), dtype=x.dtype, device=x.device)


def _unit(x: Tensor, floor: float) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).clamp_min(floor**2).rsqrt()


OF_SIDES: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "entrywise": entrywise,
    "frobenius": frobenius,
    "rows": rows,
    "subspace": subspace,
}


def of_sides(kind: str, side: str, couple: tuple[LowRank, LowRank], floor: float) -> Tensor:
    """One of these of what both read (side right), write (left), or the mean of the two (both)."""
    (g, p), measure = couple, OF_SIDES[kind]
    pairs = {"right": [(g.right, p.right)], "left": [(g.left.mT, p.left.mT)]}
    chosen = pairs["right"] + pairs["left"] if side == "both" else pairs[side]
    return torch.stack([measure(x, y, floor) for x, y in chosen]).mean()


def of_products(couple: tuple[LowRank, LowRank], floor: float) -> Tensor:
    """<DW_g, DW_p>^2 / (||DW_g||^2 ||DW_p||^2), from matrices as small as the ranks."""
    g, p = couple
    sizes = [algebra.squared_norm(each).clamp_min(floor**2) for each in (g, p)]
    return algebra.inner(g, p).square() / (sizes[0] * sizes[1])


def of_weights(kind: str, side: str, pair: Couple, values: Tensors, floor: float) -> Tensor:
    """One of `OF_SIDES`, or "product", of the couple as these values have it."""
    g, p = (factors(product, values) for product in pair)
    return of_products((g, p), floor) if kind == "product" else of_sides(kind, side, (g, p), floor)


def require_trained(pairs: Collection[Couple], side: Sides, training: LocalTraining) -> None:
    """ConfigError where neither part's tensors of this side are trained, so that a penalty on them moves nothing."""
    sides = {"right": ("right",), "left": ("left",), "both": ("right", "left")}[side]
    factors_of = {name: spec for name, spec in training.specs.items() if spec.factor and spec.factor.side in sides}
    concerned = {name for pair in pairs for product in pair for name in (product.right, *product.left)}
    if pairs and not any(training.active(factors_of[name].tag) for name in concerned & factors_of.keys()):
        what, remedy = "the penalty moves nothing: the tuner trains no factor of this side", "choose another side"
        raise ConfigError(what, where="strategy.side", received=side, remedy=remedy)


# ------------------------------------------------------------------------------------------------ of representations
def output(product: Product, values: Tensors, x: Tensor) -> Tensor:
    """u = s B A x for x [..., in]; [..., out]."""
    lefts = torch.cat([values[name] for name in product.left])
    return product.scale * (x @ values[product.right].mT @ lefts.mT)


def cosines(first: Tensor, second: Tensor, floor: float, squared: bool) -> Tensor:
    """Mean of cos^2, or of |cos|, over all vectors [..., d]."""
    u, v = first.float(), second.float()
    sizes = u.square().sum(-1).clamp_min(floor**2) * v.square().sum(-1).clamp_min(floor**2)
    product = (u * v).sum(-1)
    return (product.square() / sizes if squared else product.abs() / sizes.sqrt()).mean()


# ------------------------------------------------------------------------------------------------ made orthogonal
def projected(pairs: Collection[Couple], values: Tensors, sides: Sides) -> dict[str, Tensor]:
    """A_p (I - Q Q^T) with Q a basis of A_g's rows (right), B_p likewise (left): exact until the next step."""
    news: dict[str, Tensor] = {}
    for shared, own in pairs:
        g, p = factors(shared, values), factors(own, values)
        if sides != "left":
            news[own.right] = algebra.orthogonalised(p.right, g.right).to(values[own.right].dtype)
        if sides != "right":
            left = algebra.orthogonalised(p.left.mT, g.left.mT).mT / own.scale
            pieces = torch.split(left, [len(values[name]) for name in own.left])
            news |= {n: piece.to(values[n].dtype).contiguous() for n, piece in zip(own.left, pieces, strict=True)}
    return news


def designed(moment: Tensor, against: Tensor, start: Tensor) -> Tensor:
    """U_r^T / sqrt 3 of the SVD of (I - Q Q^T) H, Q a basis of the rows of `against`: what the inputs most point to of
    all that is orthogonal to these rows; float64 [r, d], the largest entry of every row positive.

    `moment`: H [d, d], the mean of x x^T over inputs x; `start` [r, d]: its rows go on where inputs span fewer than r
    directions. InfLoRA's design (code liangyanshuo/InfLoRA, methods/inflora.py); 1 / sqrt 3 is the length of a row that
    is drawn by Kaiming's rule. ConfigError where the layer has no room for both.
    """
    h, q, rank = moment.double(), algebra.basis(against.double()), len(start)
    u, s, _ = torch.linalg.svd(h - q.mT @ (q @ h))
    found: Tensor = u.mT[:rank][s[:rank] > _NOISE * torch.linalg.matrix_norm(h)]
    if len(found) < rank:
        more = algebra.basis(algebra.orthogonalised(start.double(), torch.cat([q, found])))
        found = torch.cat([found, more[: rank - len(found)]])
    if len(found) < rank:
        what, allowed = "no room for two orthogonal adapters on this layer", f"ranks that add up to {h.shape[0]}"
        raise ConfigError(what, where="strategy.hard", allowed=allowed, received=f"{len(against)} + {rank}")
    signs = found.gather(1, found.abs().argmax(dim=1, keepdim=True)).sign()
    return signs * found / math.sqrt(3)


def project(sides: Sides) -> Prepare:
    """The personal part without what the shared one spans."""

    def prepare(training: LocalTraining, pairs: tuple[Couple, ...], known: Tensors) -> Tensors:  # noqa: ARG001
        return projected(pairs, known, sides)

    return prepare


def design(sides: Sides) -> Prepare:  # noqa: ARG001
    """A_p of the site's own inputs, made once, and without what the shared A reads now."""

    def prepare(training: LocalTraining, pairs: tuple[Couple, ...], known: Tensors) -> Tensors:
        made = within(DESIGN, known) or _designs(training, pairs, known)
        return {**under(DESIGN, made), **projected(pairs, {**known, **made}, "right")}

    return prepare


def _designs(training: LocalTraining, pairs: tuple[Couple, ...], known: Tensors) -> dict[str, Tensor]:
    layers = {own.right: own.base[0].removesuffix(".weight") for _, own in pairs}
    moments, made = training.second_moments(known, set(layers.values())), dict[str, Tensor]()
    for shared, own in pairs:
        g, start = known[shared.right], known[own.right]
        none = torch.zeros(g.shape[1], g.shape[1])  # of a site without images
        made[own.right] = designed(moments.get(layers[own.right], none), g, start).to(start.dtype)
    return made


PREPARE: Mapping[str, Callable[[Sides], Prepare]] = {"projected": project, "designed": design}


# ------------------------------------------------------------------------------------------------ what is logged
NUMBERS: Mapping[str, str] = {
    "overlap_received": "overlap of what the shared part, as it came in, and the personal part read; 1: as at random",
    "overlap_right": "the same after training",
    "overlap_left": "the same of what both write",
    "share_personal": "||DW_p|| / (||DW_g|| + ||DW_p||) over all layers, after training",
}


def numbers(pairs: Collection[Couple], received: Tensors, trained: Tensors) -> dict[str, float]:
    """The numbers above: means over layers; overlaps as multiples of what random rows have, max(r_g, r_p) / d."""
    before, after = ([(factors(g, values), factors(p, values)) for g, p in pairs] for values in (received, trained))
    sizes = [math.sqrt(sum(float(algebra.squared_norm(c[at])) for c in after)) for at in (0, 1)]
    return {
        "overlap_received": _mean([_relative(g.right, p.right) for g, p in before]),
        "overlap_right": _mean([_relative(g.right, p.right) for g, p in after]),
        "overlap_left": _mean([_relative(g.left.mT, p.left.mT) for g, p in after]),
        "share_personal": sizes[1] / sum(sizes) if any(sizes) else 0.0,
    }


def _relative(x: Tensor, y: Tensor) -> float:
    return algebra.overlap(x, y) * x.shape[1] / max(len(x), len(y))


def _mean(values: Collection[float]) -> float:
    return math.fsum(values) / len(values)
