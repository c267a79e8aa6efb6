"""Composition: the model that a merged vector becomes. In: a vector, a model of the common start. Out: its variables.

What is no product of factors keeps its form. A sum of LoRA products stays one of factors, of the rank that the sum has,
so that nothing is lost; with a rank given, the nearest factors of that rank. What has entries alone (TIES, DARE), or
factors whose tuner cannot have any rank, goes into the frozen weights that the products are added to, exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from consilium import config, experiment, registry, vectors
from consilium.algebra import LowRank
from consilium.errors import ConfigError
from consilium.merging.adapters import products_of, start_of
from consilium.predict import Trained
from consilium.products import Product
from consilium.protocols import Specs
from consilium.tuners.compose import TunedModel
from consilium.tuners.lora import Lora
from consilium.vectors import Vector

WITH_RANK = ("lora", "low_rank_prompts")


@dataclass(frozen=True)
class Target:
    """`trained` without its variables; the vector that they come from, and where its products go."""

    trained: Trained
    start: Mapping[str, Tensor]  # of the sites' common start
    before: tuple[Product, ...]  # and its products; none where everything is plain
    vector: Vector
    rank: int | None  # asked for; None: exact

    def values(self, scale: float) -> tuple[dict[str, Tensor], float]:
        """theta_pre + scale * vector by the model's names, float64, and the largest share of a product that a rank cut
        off."""
        found, missed = vectors.added(self.vector, scale, self.start), 0.0
        fresh = self.trained.model.initial(self.trained.experiment.config.seed)
        for first, product in zip(self.before, products_of(self.trained) if self.before else (), strict=True):
            value: LowRank | Tensor = vectors.product_at(self.vector, scale, first, self.start)
            if self.rank is not None or isinstance(value, Tensor):
                value, lost = vectors.at_rank(value, fresh[product.right])
                missed = max(missed, lost)
            rows = [len(fresh[name]) for name in product.left]
            pieces = torch.split(value.left / product.scale, rows)
            found |= {product.right: value.right, **dict(zip(product.left, pieces, strict=True))}
        return found, missed

    def model(self, scale: float) -> Trained:
        """The same as a model, float32."""
        values, _ = self.values(scale)
        return replace(self.trained, variables={name: value.float() for name, value in values.items()})


def target(like: Trained, vector: Vector, rank: int | None) -> Target:
    """Where the vector goes. ConfigError for a rank that nothing has."""
    start, own = start_of(like), products_of(like) if vector.products else ()
    if rank is not None and not own:
        what = "nothing that is merged is a product of two factors, so a rank has no effect"
        raise ConfigError(what, where="--rank", received=rank)
    names = {table.name for table in like.experiment.config.tuner}
    entries = any(isinstance(value, Tensor) for value in vector.products.values())
    if own and rank is None and (entries or not exact(like)):
        return Target(_plain(like, {}), *_into_base(like, start, own, vector), None)
    if own and rank is not None and not names & set(WITH_RANK):
        raise ConfigError("no tuner here takes a rank", where="--rank", received=", ".join(sorted(names)))
    ranks = {p.base[0].rpartition(".")[0]: _rank(vectors.product_at(vector, 1.0, p, start), rank) for p in own}
    return Target(_plain(like, ranks), start, own, vector, rank)


def exact(like: Trained) -> bool:
    """Whether the tuners can hold products of any rank."""
    factors = {name for p in products_of(like) for name in (*p.left, p.right)}
    pairs = zip(like.model.tuners, like.model.attached, strict=True)
    return all(isinstance(tuner, Lora) for tuner, own in pairs if own.specs.keys() & factors)


def _rank(value: LowRank | Tensor, asked: int | None) -> int:
    if asked is not None or isinstance(value, Tensor):
        return asked or 1
    return value.left.shape[1]


def _into_base(
    like: Trained, start: Mapping[str, Tensor], own: tuple[Product, ...], vector: Vector
) -> tuple[dict[str, Tensor], tuple[Product, ...], Vector]:
    """The same vector without products: what they add is a difference of frozen weights, and factors do not move."""
    module = like.experiment.backbone.module
    bases = {name: module.get_parameter(name).detach() for product in own for name in product.base}
    added = vectors.folded(vector, 1.0, own, {name: torch.zeros_like(value) for name, value in bases.items()})
    plain = dict(vector.plain)
    for name, step in added.items():
        plain[name] = plain[name] + step if name in plain else step
    still = {name: torch.zeros_like(start[name]).double() for p in own for name in (*p.left, p.right)}
    return {**bases, **start}, (), Vector({**plain, **still}, {})


def _plain(like: Trained, ranks: Mapping[str, int]) -> Trained:
    """A model of the same backbone, tuners and head, whose layers have these ranks and scale 1."""
    settings = like.experiment.config.to_dict()
    tables = [_table(table, own, ranks) for table, own in zip(settings["tuner"], _by_table(like), strict=True)]
    share = "frozen" if settings["head"]["share"] == "frozen" else None
    head, strategy = {**settings["head"], "share": share}, {"name": "fedavg"}
    changed = {**settings, "name": "merged", "tuner": tables, "strategy": strategy, "head": head}
    pieces = experiment.assemble(config.from_dict(changed), like.experiment.task.classes)
    return Trained(pieces, cast(TunedModel, pieces.model), {}, "merged")


def _by_table(like: Trained) -> list[Specs]:
    """What each `[[tuner]]` table attached; the model has them in the order of precedence."""
    tables = like.experiment.config.tuner
    built = [registry.build("tuners", table.name, table.options()) for table in tables]
    order = sorted(range(len(built)), key=lambda at: getattr(built[at], "precedence", 0))
    return [like.model.attached[order.index(at)].specs for at in range(len(tables))]


def _table(table: Mapping[str, Any], own: Specs, ranks: Mapping[str, int]) -> dict[str, Any]:
    """With the ranks of its own layers, where it has a rank."""
    layers = {spec.tag.module: None for spec in own.values() if spec.factor is not None}
    here = {layer: rank for layer, rank in ranks.items() if layer in layers}
    if table["name"] == "low_rank_prompts" and ranks:
        return {**table, "rank": max(ranks.values())}
    if table["name"] != "lora" or not here:
        return dict(table)
    rank, _ = Counter(here.values()).most_common(1)[0]
    others = {layer: own_rank for layer, own_rank in here.items() if own_rank != rank}
    plain = {"alpha": None, "rank_stabilised": False, "freeze_a": False}
    return {**table, **plain, "rank": rank, "ranks": others}
