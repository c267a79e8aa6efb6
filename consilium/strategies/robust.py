"""Stage 8, strategies: FedAvg with a sum that a few sites which send rubbish cannot pull far.

In: updates of sites. Out: the next shared tensors.

Yin, Chen, Ramchandran, Bartlett, ICML 2018, arXiv 1803.01498, of n sites' values of each coordinate:
median: the middle one, of an even number the mean of the two in the middle.
trimmed_mean: the mean without the floor(beta n) smallest and the floor(beta n) largest.
    beta -> trim    n -> sites that sent the tensor in this round
Norm clipping (Sun et al., arXiv 1911.07963) goes before either, or before any mean: clip_updates; refuse_updates turns
a site away by name. Numbers that are not finite are refused of every strategy.
Leaves the site: the shared tensors, number of training images (unused). Stays: images, personal tensors. Kept between
rounds: as FedAvg. The coordinator has to see every site's own update: no secure sum will do.
Departures: the papers aggregate gradients in every step, here models after local training. Every site counts once. A
trim that cuts nobody off (beta n < 1) is the uniform mean: 0.25 needs four sites in a round. Honest sites with unlike
data are cut off as well: a rare class that one hospital alone has may be lost.
Identity: one or two sites: the uniform mean; median of all equal = that update; each coordinate lies within those of
honest sites while fewer than half (median), or at most floor(beta n), are not.
Family: robust sums
Identity test: test_each_coordinate_stays_among_honest_sites
Slow reference: test_robust_rounds_are_the_papers
"""

from __future__ import annotations

from pydantic import Field, model_validator

from consilium.aggregation import Aggregation
from consilium.registry import Options, register
from consilium.strategies.fedavg import FedAvg


class MedianOptions(Options):
    """Keys of `[strategy]` for median."""

    clip_updates: float | None = Field(default=None, gt=0)  # length to which a site's longer update is cut; None: never
    refuse_updates: float | None = Field(default=None, gt=0)  # length of an update from which a site is refused by name

    @model_validator(mode="after")
    def _apart(self) -> MedianOptions:
        if self.clip_updates is not None and (self.refuse_updates or float("inf")) <= self.clip_updates:
            raise ValueError("clip_updates has no effect where refuse_updates is not larger")
        return self


class TrimmedMeanOptions(MedianOptions):
    """Keys of `[strategy]` for trimmed_mean."""

    trim: float = Field(default=0.25, gt=0, lt=0.5)  # share of the sites cut off at either end. Ours: one of four


_SOURCE = "Yin et al., ICML 2018, arXiv 1803.01498"
_FACTS = {"leaves the site": "all trained tensors", "stays": "nothing but the data"}


@register(
    "strategies",
    "median",
    options=MedianOptions,
    summary="the middle value of each coordinate over the sites: a few wild sites cannot pull it far",
    source=_SOURCE,
    facts={**_FACTS, "exact": "median of each coordinate"},
)
def median(options: MedianOptions) -> FedAvg:
    """FedAvg with the coordinate-wise median."""
    return FedAvg("uniform", aggregate=Aggregation("median", clip=options.clip_updates, largest=options.refuse_updates))


@register(
    "strategies",
    "trimmed_mean",
    options=TrimmedMeanOptions,
    summary="the mean of each coordinate without its smallest and largest values over the sites",
    source=_SOURCE,
    facts={**_FACTS, "exact": "trimmed mean of each coordinate"},
)
def trimmed_mean(options: TrimmedMeanOptions) -> FedAvg:
    """FedAvg with the coordinate-wise trimmed mean."""
    clip, largest = options.clip_updates, options.refuse_updates
    return FedAvg("uniform", aggregate=Aggregation("trimmed_mean", options.trim, clip=clip, largest=largest))
