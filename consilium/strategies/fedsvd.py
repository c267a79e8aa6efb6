"""Stage 8, strategies: left factors are averaged beside a common right one, then the product gets another basis.

In: updates of sites. Out: the next shared tensors.

FedSVD: Lee et al., NeurIPS 2025, arXiv 2505.12805. Sites train B beside a common A; every `period` rounds

    B <- sum p_k B_k     U S V^T = svd(B A)     A <- V_r^T, orthonormal rows     B <- U_r S_r

B, A -> left and right factor (of a low-rank prompt too), without the scale alpha / r. p_k -> weights.
Leaves the site: left factors, the head, what else the tuner trains, the number of training images. Stays: images,
personal tensors, and A, which no site trains. Kept between rounds: as FedAvg. Right factors go down after each change
of basis (bytes: N_B up; N_B down, N after a change). A late site gets the newest B and A together, so that it is never
between two bases.
Departures: the head is trained and averaged (the authors' code freezes it), and any optimiser is taken. With B = 0 the
basis of an SVD is arbitrary, so their code waits for some steps; here A then keeps its span, and nothing waits. Moments
of factors start anew in every round, whatever train.moments says: they belong to another basis. The first A is the
tuner's own (its start = "orthonormal" makes the rows orthonormal from round 1 on). With a wire.codec both factors
travel as steps, so that rows are orthonormal up to what the codec loses.
Identity: B A, and so the model, is what the mean made it; A A^T = I after a change of basis; with a period beyond the
run this is ffa, bit by bit; one site: its own product (tests/unit/test_strategy_fedsvd.py).
Family: federated LoRA
Identity test: test_a_period_beyond_the_run_is_ffa_bit_by_bit
Slow reference: test_strategy_fedsvd::test_rounds_are_the_papers
"""

from __future__ import annotations

from pydantic import Field

from consilium.aggregation import Aggregation
from consilium.protocols import Declaration
from consilium.registry import register
from consilium.strategies.fedavg import FedAvg
from consilium.strategies.federated_lora import FactorOptions, right_frozen


class FedsvdOptions(FactorOptions):
    """Keys of `[strategy]` for fedsvd."""

    period: int = Field(default=1, ge=1)  # rounds from one change of basis to the next; the paper's algorithm: each


@register(
    "strategies",
    "fedsvd",
    options=FedsvdOptions,
    summary="left factors are averaged, then an SVD of the product gives both a new basis, orthonormal on the right",
    source="FedSVD: Lee et al., NeurIPS 2025, arXiv 2505.12805",
    facts={
        "leaves the site": "left factors and the head",
        "stays": "nothing but the data",
        "exact": "mean of products, as the right factor is common",
    },
)
def fedsvd(options: FedsvdOptions) -> FedAvg:
    """FedAvg of left factors with a change of basis after the sum."""
    summed = Aggregation("refactor", of_factors=True, period=options.period)
    return FedAvg(options.weights, declares=Declaration(trains=right_frozen), aggregate=summed)
