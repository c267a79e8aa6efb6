"""Stage 8, strategies: both factors are averaged, and the left one is corrected for what the means miss.

In: updates of sites. Out: the next shared tensors.

LoRA-FAIR: Bian et al., ICCV 2025, arXiv 2411.14961. After the means the server looks for a correction that brings the
product of what it sends near the mean of products, and that is not large:

    min over dB of || (Bbar + dB) Abar - sum p_k B_k A_k ||^2 + ridge ||dB||^2;    sites get Bbar + dB and Abar

Bbar, Abar -> means of left and right factors    p_k -> weights    dB -> D in `product_sums.corrected`
Leaves the site: both factors, what else the tuner trains, the number of training images. Stays: images, personal
tensors. Kept between rounds: as FedAvg. Bytes: N up, N down.
Departures: the paper compares by a cosine and its penalty's size is not known to us. Here the distance is Frobenius's,
so that the correction has a closed form (ridge regression on Abar), and the default of `ridge` is ours: A starts with
rows of squared length 1/3. What else a hybrid trains is averaged. The product is not the mean of products: of what the
means miss, only what lies in the rows of Abar can be made good.
Identity: ridge = 0 is the nearest left factor beside Abar (least squares); one site, equal sites, a large ridge, or one
common factor: fedit (tests/unit/test_strategy_lora_fair.py).
Family: federated LoRA
Identity test: test_strategy_lora_fair::test_equal_sites_and_one_site_are_fedit
Slow reference: test_strategy_lora_fair::test_rounds_are_the_papers_with_the_correction_by_dense_least_squares
"""

from __future__ import annotations

from pydantic import Field

from consilium.aggregation import Aggregation
from consilium.registry import register
from consilium.strategies.fedavg import FedAvg
from consilium.strategies.federated_lora import FactorOptions


class LoraFairOptions(FactorOptions):
    """Keys of `[strategy]` for lora_fair."""

    ridge: float = Field(default=0.01, ge=0)  # what a large correction costs; ours, the paper's is not known to us


@register(
    "strategies",
    "lora_fair",
    options=LoraFairOptions,
    summary="low-rank factors are averaged, and the left one is corrected towards the mean of products",
    source="LoRA-FAIR: Bian et al., ICCV 2025, arXiv 2411.14961",
    facts={
        "leaves the site": "both factors and the head",
        "stays": "nothing but the data",
        "exact": "nearer to the mean of products than the mean of factors",
    },
)
def lora_fair(options: LoraFairOptions) -> FedAvg:
    """FedAvg with a corrected left factor."""
    return FedAvg(options.weights, aggregate=Aggregation("corrected", of_factors=True, ridge=options.ridge))
