"""Stage 8, strategies: the published ways to federate low-rank factors: FedAvg with another sum, or part of it frozen.

In: updates of sites. Out: the next shared tensors. Formulas, and what each is exact for: docs/aggregation.md.

fedit: Zhang et al., ICASSP 2024, arXiv 2305.05644: both factors are averaged, each by itself.
ffa: FFA-LoRA, Sun, Li, Li, Ding, ICLR 2024, arXiv 2403.12313: A stays at the common start, B is averaged.
rolora: RoLoRA, Chen et al., NeurIPS 2025, arXiv 2502.01755: B is trained and averaged in odd rounds, A in even ones.
flexlora: FlexLoRA, Bai et al., NeurIPS 2024, arXiv 2402.11505: the mean of products, cut back to the rank by an SVD.
flora: FLoRA, Wang et al., NeurIPS 2024, arXiv 2409.05976: the mean of products goes into W_0, factors start anew.
fedex: FedEx-LoRA, Singhal et al., ACL 2025, arXiv 2410.09432: means of factors, and what they miss goes into W_0.

    B -> the left factor     A -> the right factor     W_0 -> the frozen tensor that scale * B A is added to
Leaves the site: the factors that the round trains, whatever else the tuner trains, and the number of training images.
Stays: images, personal tensors. Kept between rounds: as FedAvg; flora and fedex also change frozen weights, everywhere.
Departures: they work for low-rank prompts too. What else a hybrid trains is averaged. `ranks` (flexlora and flora, with
lora) are ranks of single sites: the first rows of A and columns of B, at the tuner's scale (decision 0025).
flexlora: U S | V. flora: factors start anew from the run's first draw, alike at all sites; flora, fedex: the changed
W_0 comes down as one matrix, not as factors of all sites or of the residual (docs/aggregation.md says what that costs).
Identity: one site = local training, for flora merged and restarted in every round; equal sites = one site; ffa, rolora:
mean of factors = mean of products (tests/identities/test_aggregate.py).
Family: federated LoRA
Identity test of fedit: test_one_step_on_pooled_data_is_the_mean_of_factors_and_not_of_products
Identity test of ffa, rolora: test_with_one_factor_common_the_mean_of_factors_is_the_mean_of_products
Identity test of flexlora, fedex: test_aggregate::test_one_site_is_local_training
Identity test of flora: test_flora_of_one_site_merges_and_starts_anew
Slow reference: test_round_by_round_the_factors_are_the_formulas
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from consilium.aggregation import Aggregation, Kind, Weighting
from consilium.protocols import Declaration, Part, Tag, Trains
from consilium.registry import Options, register
from consilium.strategies.fedavg import FedAvg

LEFT = frozenset({"lora_b", "prompt_left"})
RIGHT = frozenset({"lora_a", "prompt_right"})


class FactorOptions(Options):
    """Keys of `[strategy]` for the published names, which leave no sum to choose."""

    weights: Weighting = "examples"

    @model_validator(mode="before")
    @classmethod
    def _equal(cls, table: Mapping[str, object]) -> Mapping[str, object]:
        if "ranks" in table and "ranks" not in cls.model_fields:
            raise ValueError("a mean of factors needs one rank at all sites: ranks are of hetlora, flexlora and flora")
        return table


class RankedOptions(FactorOptions):
    """Keys of `[strategy]` where sites may have ranks of their own."""

    ranks: Mapping[
        str, Annotated[int, Field(ge=1)]
    ] = {}  # site -> its rank; of the others, and the largest: the tuner's


def all_trained(tag: Tag, round: int) -> bool:  # noqa: ARG001
    """Both factors, in every round."""
    return True


def right_frozen(tag: Tag, round: int) -> bool:  # noqa: ARG001
    """Everything but the right factors."""
    return tag.role not in RIGHT


def alternating(tag: Tag, round: int) -> bool:
    """Left factors in odd rounds, right ones in even rounds, everything else in all."""
    return tag.role not in (RIGHT if round % 2 else LEFT)


@dataclass(frozen=True)
class _Preset:
    name: str
    kind: Kind
    trains: Trains
    summary: str
    source: str
    leaves: str
    exact: str
    options: type[FactorOptions] = FactorOptions

    def build(self, options: FactorOptions) -> FedAvg:
        """FedAvg with this sum and this rule of what trains."""
        aggregate = Aggregation(self.kind, of_factors=True)
        parts = (Part(ranks=options.ranks if isinstance(options, RankedOptions) else {}),)
        return FedAvg(options.weights, declares=Declaration(parts, trains=self.trains), aggregate=aggregate)


PRESETS = (
    _Preset(
        "fedit",
        "mean",
        all_trained,
        "low-rank factors are averaged, each by itself",
        "Zhang et al., ICASSP 2024, arXiv 2305.05644",
        "both factors and the head",
        "mean of factors; not of products",
    ),
    _Preset(
        "ffa",
        "mean",
        right_frozen,
        "right factors stay at the common start, left factors are averaged",
        "FFA-LoRA: Sun et al., ICLR 2024, arXiv 2403.12313",
        "left factors and the head",
        "mean of products, as the right factor is common",
    ),
    _Preset(
        "rolora",
        "mean",
        alternating,
        "left factors are trained in odd rounds, right factors in even ones",
        "RoLoRA: Chen et al., NeurIPS 2025, arXiv 2502.01755",
        "the factors that the round trains, and the head",
        "mean of products, as one factor is common in every round",
    ),
    _Preset(
        "flexlora",
        "product_svd",
        all_trained,
        "products are averaged and cut back to the rank",
        "FlexLoRA: Bai et al., NeurIPS 2024, arXiv 2402.11505",
        "both factors and the head",
        "the nearest to the mean of products at this rank; the mean itself where its rank is no larger",
        RankedOptions,
    ),
    _Preset(
        "flora",
        "stack",
        all_trained,
        "the mean of products is folded into the frozen weights, factors start anew",
        "FLoRA: Wang et al., NeurIPS 2024, arXiv 2409.05976",
        "both factors and the head",
        "mean of products",
        RankedOptions,
    ),
    _Preset(
        "fedex",
        "residual",
        all_trained,
        "factors are averaged, what this misses of the mean of products goes into the frozen weights",
        "FedEx-LoRA: Singhal et al., ACL 2025, arXiv 2410.09432",
        "both factors and the head",
        "mean of products",
    ),
)

for _preset in PRESETS:
    _facts = {"leaves the site": _preset.leaves, "stays": "nothing but the data", "exact": _preset.exact}
    register(
        "strategies",
        _preset.name,
        options=_preset.options,
        summary=_preset.summary,
        source=_preset.source,
        facts=_facts,
    )(_preset.build)
