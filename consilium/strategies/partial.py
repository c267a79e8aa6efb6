"""Stage 8, strategies: methods that are FedAvg with a rule on tags that says what stays at the site.

In: updates of sites. Out: the next shared tensors.

local: nothing travels.
pooled: no federation: one model is trained on the images of all sites in one place, and tested at each. A simulation
  can do that; a hospital's side refuses (`Declaration.pools_images`). What travels is between that place and itself.
fedper: Arivazhagan, Aggarwal, Singh, Choudhary, arXiv 1912.00818: base layers W_B travel, personalisation layers W_P
  stay: the head, and what is trained from block `personal_from_block` on. With the last layers personal it is FLOP
  (Yang, Zhang, Hao, Spell, Carin, KDD 2021, arXiv 2102.05218).
fedsa: FedSA-LoRA, Guo et al., ICLR 2025, arXiv 2410.01463: right factors (LoRA's A) travel, left ones (B) and the head
  stay, as in the authors' setting for classification; whatever else a hybrid trains travels.
fedbn: Li, Jiang, Zhang, Kamp, Dou, ICLR 2021, arXiv 2102.07623: norms stay, by role, so LayerNorm and RMSNorm as well.
lg: LG-FedAvg, Liang, Liu, Ziyin, Salakhutdinov, Morency, arXiv 2001.01523: local representations stay: everything below
  block `shared_from_block`, or all but the head; the global model is the head and what lies between.
Leaves the site: what the rule shares, number of training images. Stays: the rest, initialised at the site from its own
  seed (a head that the server ever knew gives labels away). Kept between rounds: personal tensors at the site.
Departures: none in the rules; any optimiser. fedbn: the paper's BatchNorm has statistics, norms of a transformer none.
Identity: nothing personal = FedAvg, all personal = local (tests/identities); lg and fedper divide the same tensors;
  under fedbn norms of two sites differ after training (tests/unit/test_strategy_partial.py); pooled
  = FedAvg of one site that has all images (tests/unit/test_strategy_pooled.py).
Family: partial sharing
Family of local, pooled: references
Identity test of local: test_all_personal_is_local_training
Identity test of pooled: test_it_is_fedavg_of_one_site_that_has_all_images
Family of fedsa: federated LoRA
Identity test of fedper: test_fedper_with_nothing_personal_is_fedavg
Identity test of fedsa: test_aggregate::test_one_site_is_local_training
Identity test of fedbn: test_norms_of_two_sites_differ_under_fedbn_and_never_travel
Identity test of lg: test_lg_and_fedper_divide_the_same_tensors
Slow reference of local, fedper, lg, fedbn: test_rules_on_tags_are_the_papers
Slow reference of pooled: test_fedavgs_rounds_are_the_papers
Slow reference of fedsa: test_round_by_round_the_factors_are_the_formulas
"""

from __future__ import annotations

from pydantic import Field

from consilium.aggregation import Aggregation
from consilium.protocols import Declaration, Selector, Tag
from consilium.registry import Options, register
from consilium.strategies.fedavg import FedAvg, FedAvgOptions
from consilium.strategies.federated_lora import LEFT, FactorOptions

BEHIND_BLOCKS = ("norm", "fc_norm", "attn_pool")  # modules of the backbone; what else lies outside comes before


def nothing(tag: Tag) -> bool:  # noqa: ARG001
    """Share no tensor."""
    return False


def below(personal_from_block: int | None) -> Selector:
    """Share everything but the head and, if a block is given, everything from that block on and behind the blocks."""

    start = personal_from_block
    return lambda tag: tag.role != "head" and not (start is not None and is_top(tag, start))


def above(shared_from_block: int | None) -> Selector:
    """Share the head and, if a block is given, everything from that block on and behind the blocks."""
    start = shared_from_block
    return lambda tag: tag.role == "head" or (start is not None and is_top(tag, start))


def is_top(tag: Tag, start: int) -> bool:
    """Whether a tensor lies in this block, above it or behind the blocks."""
    return tag.module.split(".")[0] in BEHIND_BLOCKS if tag.block is None else tag.block >= start


def but_norms(tag: Tag) -> bool:
    """Share everything but norms."""
    return tag.role != "norm"


@register(
    "strategies",
    "local",
    options=Options,
    summary="every site trains alone; the reference that a federation must beat",
    facts={"leaves the site": "nothing", "stays": "everything"},
)
def local(options: Options) -> FedAvg:  # noqa: ARG001
    """Nothing travels."""
    return FedAvg(shares=nothing)


@register(
    "strategies",
    "pooled",
    options=Options,
    summary="one model is trained on the images of all sites in one place: a simulation's upper reference",
    facts={"leaves the site": "all images and labels (a hospital refuses)", "stays": "nothing"},
)
def pooled(options: Options) -> FedAvg:  # noqa: ARG001
    """FedAvg of one site that has all images."""
    return FedAvg(declares=Declaration(pools_images=True))


class FedPerOptions(FedAvgOptions):
    """Keys of `[strategy]` for fedper."""

    personal_from_block: int | None = Field(default=None, ge=0)  # from this block on, trained tensors stay too


@register(
    "strategies",
    "fedper",
    options=FedPerOptions,
    summary="the head (and, if wanted, the last blocks) stays at the site, the rest is averaged",
    source="Arivazhagan et al., arXiv 1912.00818; FLOP: Yang et al., KDD 2021, arXiv 2102.05218",
    facts={"leaves the site": "trained tensors without the head", "stays": "the head, trained tensors of last blocks"},
)
def fedper(options: FedPerOptions) -> FedAvg:
    """FedAvg below the personal layers; a head that is declared shared or frozen elsewhere is refused."""
    return FedAvg(
        options.weights,
        shares=below(options.personal_from_block),
        declares=Declaration(required_roles=frozenset({"head"}), last_block=options.personal_from_block),
        aggregate=options.aggregation(),
    )


def but_left_factors(tag: Tag) -> bool:
    """Share everything but the left factors of products and the head."""
    return tag.role not in LEFT and tag.role != "head"


@register(
    "strategies",
    "fedsa",
    options=FactorOptions,
    summary="right factors are averaged, left factors and the head stay at the site",
    source="FedSA-LoRA: Guo et al., ICLR 2025, arXiv 2410.01463",
    facts={
        "leaves the site": "right factors",
        "stays": "left factors and the head",
        "exact": "mean of right factors; every site has a product of its own, so no mean of products is meant",
    },
)
def fedsa(options: FactorOptions) -> FedAvg:
    """FedAvg of the right factors; a head that is declared shared is refused."""
    return FedAvg(options.weights, shares=but_left_factors, aggregate=Aggregation(of_factors=True))


@register(
    "strategies",
    "fedbn",
    options=FedAvgOptions,
    summary="norms stay at the site, the rest is averaged",
    source="FedBN: Li et al., ICLR 2021, arXiv 2102.07623",
    facts={"leaves the site": "trained tensors without norms", "stays": "trained norms, LayerNorm included"},
)
def fedbn(options: FedAvgOptions) -> FedAvg:
    """FedAvg of all but norms; a tuner that trains no norm is refused."""
    declares = Declaration(required_roles=frozenset({"norm"}))
    return FedAvg(options.weights, shares=but_norms, declares=declares, aggregate=options.aggregation())


class LgOptions(FedAvgOptions):
    """Keys of `[strategy]` for lg."""

    shared_from_block: int | None = Field(default=None, ge=0)  # from this block on, trained tensors travel too


@register(
    "strategies",
    "lg",
    options=LgOptions,
    summary="the lower layers stay at the site, the head (and, if wanted, the last blocks) is averaged",
    source="LG-FedAvg: Liang et al., arXiv 2001.01523",
    facts={"leaves the site": "the head, trained tensors of last blocks", "stays": "trained tensors of lower layers"},
)
def lg(options: LgOptions) -> FedAvg:
    """FedAvg above the local layers."""
    return FedAvg(
        options.weights,
        shares=above(options.shared_from_block),
        declares=Declaration(required_roles=frozenset({"head"}), last_block=options.shared_from_block),
        aggregate=options.aggregation(),
    )
