"""Common: how the tensors of several sites become one. In: weighted tensors by site, products of factors. Out: tensors.

The mean of factors is no mean of products: sum w_k L_k R_k = L R + sum w_k (L_k - L) (R_k - R), with L and R the means.
Only the product acts in the model, so several sums are on offer (`product_sums.py`); which is exact for what stands in
docs/aggregation.md.

    mean         every tensor by itself, factors too: FedAvg's
    refactor     the same, then every product of the means in another basis: U S on the left, V on the right (FedSVD,
                 arXiv 2505.12805)
    product_svd  the mean of products, cut back to the rank: U S on the left, V on the right (FlexLoRA, 2402.11505)
    stack        the mean of products goes into the frozen base, factors start anew (FLoRA, arXiv 2409.05976)
    residual     factors get their means, what these miss goes into the frozen base (FedEx-LoRA, arXiv 2410.09432)
    corrected    factors get their means, the left one also what it can make good of what they miss (LoRA-FAIR,
                 arXiv 2411.14961)
    padded, padded_by_size   the mean of factors of any ranks, filled with zeros, by weight or by the product's size
                 (HetLoRA, arXiv 2401.06432)
    median, trimmed_mean   by coordinate, every site counts once: a few wild sites cannot pull it far (arXiv 1803.01498)

Before any of them, updates that are longer than `clip` can be shortened to it (Sun et al., arXiv 1911.07963).

Terms come sorted by site and are summed in float64 in that order; results have the type of the tensor they replace.
A term that holds one factor of a product alone was trained beside the coordinator's other one, which stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from consilium.errors import ConfigError
from consilium.product_sums import Terms, corrected, padded, product_svd, refactored, residual, stack
from consilium.products import Product, products
from consilium.protocols import Declaration, Spec, Specs
from consilium.registry import Options
from consilium.tensors import Tensors, weighted_mean

Weighting = Literal["examples", "uniform"]
Offered = Literal["mean", "refactor", "product_svd", "stack", "residual", "median", "trimmed_mean"]  # by any strategy
Kind = Offered | Literal["corrected", "padded", "padded_by_size"]


# ------------------------------------------------------------------------------------------------ tensor by tensor
def median(terms: Terms) -> dict[str, Tensor]:
    """Middle value of each coordinate over the sites that sent the tensor, weights aside; of an even number of sites
    the mean of the two in the middle, so that one site is itself and two are their mean."""
    return _by_name(terms, partial(cut_off, "median", 0.0))


def trimmed_mean(terms: Terms, trim: float) -> dict[str, Tensor]:
    """Mean of each coordinate without its floor(trim * n) smallest and largest values, weights aside, over the n sites
    that sent the tensor; nothing is cut, and this is the uniform mean, where trim * n < 1 (always of one or two)."""
    return _by_name(terms, partial(cut_off, "trimmed_mean", trim))


def cut_off(kind: str, trim: float, count: int) -> int:
    """How many of so many sites a robust sum leaves out at either end of a coordinate; 0: it is the uniform mean."""
    return (count - 1) // 2 if kind == "median" else math.floor(round(trim * count, 9))


def clipped(tensors: Tensors, start: Tensors, limit: float) -> Tensors:
    """start + (w - start) min(1, limit / ||w - start||), the norm over all tensors of the site together, float64; an
    update that is short enough keeps its bits."""
    steps = {name: value.double() - start[name].double() for name, value in tensors.items()}
    length = math.sqrt(sum(float(step.square().sum()) for step in steps.values()))
    if length <= limit:
        return tensors
    return {n: (start[n].double() + step * (limit / length)).to(tensors[n].dtype) for n, step in steps.items()}


def _by_name(terms: Terms, cut: Callable[[int], int]) -> dict[str, Tensor]:
    names = sorted({name for _, tensors in terms for name in tensors})
    values = {name: [tensors[name] for _, tensors in terms if name in tensors] for name in names}
    return {name: _middle(found, cut(len(found))) for name, found in values.items()}


def _middle(values: Sequence[Tensor], cut: int) -> Tensor:
    ordered = torch.stack([value.double() for value in values]).sort(dim=0).values
    return ordered[cut : len(values) - cut].mean(dim=0).to(values[0].dtype)


# ------------------------------------------------------------------------------------------------ the choice
_BY_PRODUCT: Mapping[str, Callable[[Sequence[Product], Terms, Tensors], dict[str, Tensor]]] = {
    "product_svd": product_svd,
    "padded": padded,
    "padded_by_size": partial(padded, by_size=True),
    "stack": stack,
    "residual": residual,
}
_MEANS = ("mean", "refactor")
_OF_PRODUCTS = ("refactor", "corrected", *_BY_PRODUCT)
_CHANGES_BASE = ("stack", "residual")
_RESTARTS = ("stack", "product_svd", "refactor")  # factors come back as they began, or in another basis
ROBUST = ("median", "trimmed_mean")


@dataclass(frozen=True)
class Aggregation:
    """One of the sums above. `of_factors`: a tuner without products is refused, though the sum itself needs none."""

    kind: Kind = "mean"
    trim: float = 0.0  # of trimmed_mean: the share of sites cut off at either end
    of_factors: bool = False
    clip: float | None = None  # the longest that a site's update may be, over all of its tensors; a longer one is cut
    largest: float | None = None  # and the longest that is not refused
    period: int = 1  # of refactor: rounds from one change of basis to the next
    ridge: float = 0.0  # of corrected: what a large correction costs

    def __call__(
        self, stream: Iterable[tuple[float, Tensors]], products: Sequence[Product], start: Tensors, round: int = 0
    ) -> dict[str, Tensor]:
        """What replaces tensors of `start`: products by the rule, all other tensors by the mean or the robust sum.
        Means read their terms as they come and keep none."""
        if (clip := self.clip) is not None:
            stream = ((weight, clipped(tensors, start, clip)) for weight, tensors in stream)
        if self.kind in _MEANS:
            means = weighted_mean(stream)
            return {**means, **refactored(products, means, start)} if self._refactors(round) else means
        terms = list(stream)
        if self.kind not in _OF_PRODUCTS:
            return self._plain(terms)
        factors = {name for product in products for name in (*product.left, product.right)}
        rest = self._plain([(w, {n: t for n, t in tensors.items() if n not in factors}) for w, tensors in terms])
        rule = partial(corrected, ridge=self.ridge) if self.kind == "corrected" else _BY_PRODUCT[self.kind]
        return {**rest, **rule(products, terms, {**start, **rest})}

    def _refactors(self, round: int) -> bool:
        return self.kind == "refactor" and round % self.period == 0

    def _plain(self, terms: Terms) -> dict[str, Tensor]:
        if self.kind == "median":
            return median(terms)
        return trimmed_mean(terms, self.trim) if self.kind == "trimmed_mean" else weighted_mean(terms)

    def declare(self, declaration: Declaration) -> Declaration:
        """The declaration of a strategy that sums so: all but plain means look at every site's own update.
        ConfigError for a router, whose weights depend on the image: a base cannot take the place of what it weighs."""
        if self.kind in _CHANGES_BASE and declaration.combination != "sum":
            received = f"{self.kind}, parts combined by a {declaration.combination}"
            raise ConfigError("this aggregation needs adapters that are summed", received=received)
        plain = self.kind in _MEANS and self.clip is None and self.largest is None
        alone = declaration.needs_individual_updates or not plain
        changes = declaration.changes_base or self.kind in _CHANGES_BASE
        anew = declaration.restarts_factors or self.kind in _RESTARTS
        largest = declaration.largest_update if self.largest is None else self.largest
        bounded = replace(declaration, needs_individual_updates=alone, largest_update=largest)
        return replace(bounded, changes_base=changes, restarts_factors=anew, refactors=self._refactors)

    def products(self, specs: Specs, shared: Specs) -> tuple[Product, ...]:
        """The products all of whose factors travel; ConfigError where there is none and the sum is one of products."""
        found = products(specs)
        whole = tuple(product for product in found if {*product.left, product.right} <= shared.keys())
        if (self.of_factors and not found) or (self.kind in _OF_PRODUCTS and not whole):
            raise ConfigError(
                "nothing that this strategy sums is a product of two factors",
                where="strategy" if self.of_factors else "strategy.aggregate",
                allowed="lora or low_rank_prompts" + (", with both factors shared" if found else ""),
                received=f"{self.kind} of tensors with the roles {sorted({spec.tag.role for spec in specs.values()})}",
            )
        return whole

    def down(self, specs: Specs, shared: Specs) -> dict[str, Spec]:
        """What comes back: the shared tensors, and the bases that change, dense: rows * columns numbers each, where the
        published FLoRA sends the factors of all sites, (sum r_k) (rows + columns), once more for every round missed.
        Factors that always start anew are sent once, so they count as base too."""
        products = self.products(specs, shared)
        if self.kind not in _CHANGES_BASE:
            return dict(shared)
        factors = {name for product in products for name in (*product.left, product.right)}
        anew = {name: _as_base(spec) for name, spec in shared.items() if name in factors and self.kind == "stack"}
        return {**_bases(products, specs), **shared, **anew}


def _bases(products: Sequence[Product], specs: Specs) -> dict[str, Spec]:
    pairs = [(specs[left], specs[p.right], base) for p in products for left, base in zip(p.left, p.base, strict=True)]
    shapes = {base: (left, (left.shape[0], right.shape[1])) for left, right, base in pairs}
    return {
        base: Spec(shape, replace(left.tag, role="base", slot="base"), left.dtype)
        for base, (left, shape) in shapes.items()
    }


def _as_base(spec: Spec) -> Spec:
    return replace(spec, tag=replace(spec.tag, slot="base"))


class SumOptions(Options):
    """Keys of `[strategy]` for every strategy that sums by choice."""

    weights: Weighting = "examples"  # of the robust sums, which count every site once: uniform
    aggregate: Offered = "mean"
    trim: float | None = Field(default=None, ge=0, lt=0.5)  # of trimmed_mean: share of sites cut off at either end
    clip_updates: float | None = Field(default=None, gt=0)  # length to which a site's longer update is cut; None: never
    refuse_updates: float | None = Field(default=None, gt=0)  # length of an update from which a site is refused by name

    @model_validator(mode="before")
    @classmethod
    def _count_once(cls, table: Mapping[str, object]) -> Mapping[str, object]:
        return {"weights": "uniform", **table} if table.get("aggregate") in ROBUST else table

    @model_validator(mode="after")
    def _fit(self) -> SumOptions:
        if (self.trim is not None) != (self.aggregate == "trimmed_mean"):
            raise ValueError("trim belongs to aggregate = 'trimmed_mean', which needs it")
        if self.aggregate in ROBUST and self.weights != "uniform":
            raise ValueError(f"{self.aggregate} counts every site once: weights = 'uniform', or leave weights out")
        if (
            self.clip_updates is not None
            and self.refuse_updates is not None
            and self.refuse_updates <= self.clip_updates
        ):
            raise ValueError("clip_updates has no effect where refuse_updates is not larger")
        return self

    def aggregation(self, of_factors: bool = False) -> Aggregation:
        """The sum that these keys choose."""
        return Aggregation(self.aggregate, self.trim or 0.0, of_factors, self.clip_updates, self.refuse_updates)
